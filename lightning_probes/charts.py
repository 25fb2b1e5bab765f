"""Lay out TensorBoard's Custom Scalars page: charts of few layers each, so that their lines can be told apart."""

from __future__ import annotations

import mmap
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from lightning_probes.figures.names import shorten

MOST_LINES = 8
"""Limit the lines of a chart: TensorBoard does not tell more of them apart."""

_LAYOUT = b"custom_scalars__config__"
"""Name the entry of an event file that holds a layout."""
_NAME_WIDTH = 24


class Charts:
    """Lay out the logged values of layers, as charts of at most eight layers in order of depth.

    TensorBoard uses only the last layout of a run. This one is in the logger's own run, unless the user has a layout
    there, which stays in use: then it is in a sub-run.

    Args:
        prefix: what precedes the names of the callback.
    """

    def __init__(self, prefix: str) -> None:
        self._category = f"{prefix}linear probes"
        self._sub_run = f"{prefix}probes"
        self._series: dict[str, dict[str, tuple[int, str]]] = {}
        self._written: dict[str, list[Any]] = {}

    def begin(self) -> None:
        """Begin a new run, which has no layout yet."""
        self._series, self._written = {}, {}

    def add(self, series: str, layer: str, depth: int, tag: str) -> None:
        """Add a layer to a series of charts.

        Args:
            series: what its charts show, for example ``error, val``.
            layer: path of the layer.
            depth: its depth.
            tag: the name that its values are logged under.
        """
        self._series.setdefault(series, {})[layer] = depth, tag

    def write(self, experiments: Iterable[Any]) -> None:
        """Write the layout to those of the loggers' experiments that are TensorBoard's, if it has changed."""
        charts = self._charts()
        if charts == self._written:
            return
        self._written = charts
        for experiment in writers_of(experiments):
            if holds_another_layout(experiment, self._category):
                self._write_to_sub_run(experiment)
            else:
                experiment.add_custom_scalars({self._category: charts})

    def end(self, experiments: Iterable[Any]) -> None:
        """Write the layout to a sub-run where the user has written one to the logger's run since: the last one wins."""
        for experiment in writers_of(experiments) if self._written else ():
            folder = Path(experiment.log_dir, self._sub_run)
            if holds_another_layout(experiment, self._category) and not folder.exists():
                self._write_to_sub_run(experiment)

    def _write_to_sub_run(self, experiment: Any) -> None:
        with type(experiment)(f"{experiment.log_dir.rstrip('/')}/{self._sub_run}") as writer:
            writer.add_custom_scalars({self._category: self._written})

    def _charts(self) -> dict[str, list[Any]]:
        """Return ``{title: chart}`` as ``add_custom_scalars`` takes it."""
        found: dict[str, list[Any]] = {}
        for series, layers in self._series.items():
            ordered = sorted(layers, key=lambda layer: layers[layer][0])
            _, short = shorten(ordered, _NAME_WIDTH)
            for part in _parts(ordered):
                depths = [layers[part[0]][0], layers[part[-1]][0]]
                span = f"layers {depths[0]}-{depths[1]} ({short[part[0]]} … {short[part[-1]]})"
                title = f"{series}: {span if len(part) > 1 else f'layer {depths[0]} ({short[part[0]]})'}"
                found[title] = ["Multiline", [rf"^{re.escape(layers[layer][1])}$" for layer in part]]
        return found


def _parts(layers: list[str]) -> Iterator[list[str]]:
    """Yield neighbouring layers in as few parts of at most eight as there can be, of about equal size."""
    number = -(-len(layers) // MOST_LINES)
    ends = [round(i * len(layers) / number) for i in range(number + 1)]
    for first, last in pairwise(ends):
        yield layers[first:last]


def writers_of(experiments: Iterable[Any]) -> list[Any]:
    """Return those of the loggers' experiments that are torch's writers of event files."""
    # TensorBoard may not be installed, and whoever has a SummaryWriter has already imported its module.
    if (tensorboard := sys.modules.get("torch.utils.tensorboard")) is None:
        return []
    return [experiment for experiment in experiments if isinstance(experiment, tensorboard.SummaryWriter)]


def holds_another_layout(experiment: Any, category: str) -> bool:
    """Return whether the run of a writer has a layout whose first category is not ``category``.

    Nothing public says what a writer has written, so its event files are searched. A folder that is not on this machine
    counts as one that has a layout.
    """
    if "://" in (folder := str(experiment.log_dir)):
        return True
    experiment.flush()
    # A string of a protocol buffer stands behind its length; the title is the first entry of the first category.
    title = category.encode()
    own = b"\x0a" + bytes([len(title)]) + title if len(title) < 128 else title
    return any(own not in layout for file in Path(folder).glob("*tfevents*") for layout in _layouts_in(file))


def _layouts_in(file: Path) -> list[bytes]:
    """Return the beginnings of the layouts in an event file."""
    if not file.stat().st_size:
        return []
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return [content[found.end() : found.end() + 300] for found in re.finditer(_LAYOUT, content)]


def series_of(row: Mapping[str, Any], loader: str) -> str:
    """Return what the charts of a row's metric show: metric, stage, and target and loader if there are several."""
    return ", ".join(filter(None, [row["metric"], row["stage"], row.get("target", ""), loader.lstrip("/")]))
