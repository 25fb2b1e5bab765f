"""Shorten the names of layers for a table or an axis, and keep them different."""

from __future__ import annotations

from collections.abc import Sequence

_GAP = ".."
"""Mark what is cut out of a name, in ASCII: printing a table fails on a terminal that cannot encode a character."""


def shorten(names: Sequence[str], width: int) -> tuple[str, dict[str, str]]:
    """Shorten names to at most ``width`` characters, so that no two of them look the same.

    If a name is too long, the path that all names of more than one segment share is removed, for the caller to state
    once. Names that are still too long are cut in the middle, all at the same place.

    Args:
        names: paths of layers, all different.
        width: greatest number of characters of a short name, at least 12.

    Returns:
        The path that was removed, empty if none was; and ``{name: short name}``.
    """
    if all(len(name) <= width for name in names):
        return "", {name: name for name in names}
    prefix = _shared_path(names)
    short = {name: name.removeprefix(prefix) for name in names}
    if len(set(short.values())) < len(names):
        prefix, short = "", {name: name for name in names}
    return prefix.removesuffix("."), dict(zip(short, _cut(list(short.values()), width), strict=True))


def _shared_path(names: Sequence[str]) -> str:
    """Return the path, with its last dot, that all names of more than one segment share; empty if there is none."""
    parents = [name.split(".")[:-1] for name in names if "." in name]
    shared: list[str] = []
    for level in zip(*parents, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return "".join(f"{segment}." for segment in shared) if len(parents) > 1 else ""


def _cut(names: Sequence[str], width: int) -> list[str]:
    """Cut names longer than ``width`` at the first place that keeps all names different; number them if none does."""
    room = width - len(_GAP)
    # The beginning of a path tells blocks apart, and its end the parts of a block. A reader needs more of the end, so a
    # third of the room for the beginning is tried first.
    for head in sorted(range(room + 1), key=lambda head: abs(head - room // 3)):
        tail = room - head
        cut = [name if len(name) <= width else name[:head] + _GAP + name[len(name) - tail :] for name in names]
        if len(set(cut)) == len(names):
            return cut
    # Names that differ at several places may all look the same with one gap, so a number tells them apart.
    digits = len(str(len(names)))
    keep = width - digits - len(_GAP)
    return [name if len(name) <= width else f"{name[:keep]}{_GAP}{i:0{digits}}" for i, name in enumerate(names)]
