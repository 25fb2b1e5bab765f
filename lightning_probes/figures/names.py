"""Shorten the names of layers for a table or an axis, keep them different, and group them by block."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

_GAP = ".."
"""Mark what is cut out of a name, in ASCII: printing a table fails on a terminal that cannot encode a character."""

_MOST_BLOCKS = 16
"""Group layers into at most this many blocks: a reader does not tell more of them apart at a glance."""


class Block(NamedTuple):
    """Hold neighbouring layers whose names share a path.

    Attributes:
        path: the path that they share.
        name: the path without what all layers share.
        first: index of the first of them.
        last: index of the last of them.
    """

    path: str
    name: str
    first: int
    last: int


class Labels(NamedTuple):
    """Hold what is written at the layers of an axis.

    Attributes:
        path: path that was removed from the names, for the caller to state once; empty if none was.
        texts: ``{index of a layer: text}``, at most as many as were asked for.
    """

    path: str
    texts: dict[int, str]


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


def blocks(names: Sequence[str]) -> list[Block]:
    """Group neighbouring layers by the longest path that leaves at most 16 groups of at least two layers on average.

    Args:
        names: paths of layers, all different, in order of depth.

    Returns:
        The groups in order, also those of one layer; empty if there are not two groups of several layers.
    """
    shared = _shared_path(names)
    paths = [name.removeprefix(shared).split(".") for name in names]
    found: list[Block] = []
    for length in range(1, max(map(len, paths), default=0)):
        runs = [
            [i for i, _ in run] for _, run in groupby(enumerate(path[:length] for path in paths), lambda item: item[1])
        ]
        if len(runs) > min(_MOST_BLOCKS, len(names) // 2) or sum(len(run) > 1 for run in runs) < 2:
            continue
        found = []
        for run in runs:
            name = ".".join(paths[run[0]][:length])
            above = shared if names[run[0]].startswith(shared) else ""
            found.append(Block(above + name, name, run[0], run[-1]))
    return found


def labels(names: Sequence[str], width: int, most: int) -> Labels:
    """Return what to write at the layers of an axis, each text of at most ``width`` characters.

    Every n-th layer is named, and the last. If a name is too long, the path that all layers share is removed; of
    neighbours in a block the first has the block's path, and the others have the rest of their names after a dot.

    Args:
        names: paths of layers, all different, in order of depth; at least one.
        width: greatest number of characters of a text, at least 12.
        most: greatest number of layers that are named, at least 2.
    """
    step = -(-len(names) // most)
    shown = list(range(0, len(names), step))
    if shown[-1] != len(names) - 1:
        # The last layer is the one that readers compare the others with. It must not run into its neighbour.
        shown = [i for i in shown if len(names) - 1 - i >= 0.75 * step] + [len(names) - 1]
    path, short = shorten(names, width)
    grouped = blocks(names) if any(len(names[i]) > width for i in shown) else []
    if not grouped:
        return Labels(path, {i: short[names[i]] for i in shown})
    shared = _shared_path(names)
    texts: dict[int, str] = {}
    for block in grouped:
        inside = [i for i in shown if block.first <= i <= block.last]
        for i in inside:
            rest = names[i].removeprefix(block.path)
            texts[i] = names[i].removeprefix(shared) if i == inside[0] or not rest else rest
    different = list(dict.fromkeys(texts.values()))
    cut = dict(zip(different, _cut(different, width), strict=True))
    return Labels(shared.removesuffix("."), {i: cut[text] for i, text in texts.items()})


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
