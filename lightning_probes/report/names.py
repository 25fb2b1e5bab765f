"""Shortens names of layers for a table or an axis, so that all stay different."""

from __future__ import annotations

from collections.abc import Sequence

_GAP = ".."
"""Stands for what was cut out of a name; ASCII, since a terminal that cannot print it would lose the table."""


def shorten(names: Sequence[str], width: int) -> tuple[str, dict[str, str]]:
    """Shorten names to at most ``width`` characters, so that no two of them look the same.

    Where one is too long, the path that all names of more than one segment share is taken away (it is said once,
    elsewhere); what is still too long is cut in the middle, at the same place in all.

    Args:
        names: paths of layers, each once.
        width: greatest number of characters, at least 12.

    Returns:
        The path that was taken away, empty if none was; ``{name: short name}``.
    """
    if all(len(name) <= width for name in names):
        return "", {name: name for name in names}
    prefix = _shared_path(names)
    short = {name: name.removeprefix(prefix) for name in names}
    if len(set(short.values())) < len(names):
        prefix, short = "", {name: name for name in names}
    return prefix.removesuffix("."), dict(zip(short, _cut(list(short.values()), width), strict=True))


def _shared_path(names: Sequence[str]) -> str:
    """Return the path, with its last dot, below which all names of more than one segment are."""
    parents = [name.split(".")[:-1] for name in names if "." in name]
    shared: list[str] = []
    for level in zip(*parents, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return "".join(f"{segment}." for segment in shared) if len(parents) > 1 else ""


def _cut(names: Sequence[str], width: int) -> list[str]:
    """Cut what is longer than ``width``; of all places for the gap take the first that keeps names apart."""
    room = width - len(_GAP)
    # Blocks are told apart at the beginning of a path, their parts at its end, of which a reader needs more.
    for head in sorted(range(room + 1), key=lambda head: abs(head - room // 3)):
        tail = room - head
        cut = [name if len(name) <= width else name[:head] + _GAP + name[len(name) - tail :] for name in names]
        if len(set(cut)) == len(names):
            return cut
    # They differ at several places: a number tells them apart.
    digits = len(str(len(names)))
    keep = width - digits - len(_GAP)
    return [name if len(name) <= width else f"{name[:keep]}{_GAP}{i:0{digits}}" for i, name in enumerate(names)]
