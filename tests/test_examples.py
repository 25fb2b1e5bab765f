"""The demonstration gives the same twice, and leaves what it says it leaves."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_probes import ProbeReport

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parent.parent / "examples" / "mnist.py"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, str]]:
    """One epoch, twice: the folder and what was printed."""
    folder = tmp_path_factory.mktemp("mnist")
    started = [
        (
            folder / name,
            subprocess.Popen(
                [sys.executable, str(EXAMPLE), "--epochs", "1", "--output", str(folder / name)],
                cwd=folder,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            ),
        )
        for name in ("one", "other")
    ]
    finished = []
    for output, process in started:
        printed, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
        finished.append((output, printed))
    return finished


def test_two_runs_print_the_same_but_for_the_folder(runs: list[tuple[Path, str]]) -> None:
    one, other = (printed.replace(str(output), "OUTPUT") for output, printed in runs)
    assert one == other
    # The start and the epoch.
    assert re.search(r"^input +784( +\d+\.\d){2} +\d+\.\d-\d+\.\d$", one, flags=re.MULTILINE)
    assert re.search(r"^The network's own error: \d+\.\d %$", one, flags=re.MULTILINE)
    for line in ("Figure: OUTPUT/error_by_depth.png", "Report: OUTPUT/report.json"):
        assert line in one.splitlines()
    assert max(map(len, one.splitlines())) <= 80


def test_two_runs_save_the_same_report(runs: list[tuple[Path, str]]) -> None:
    one, other = (json.loads((output / "report.json").read_text()) for output, _ in runs)
    costs = [saved.pop("cost") for saved in (one, other)]
    assert one == other
    # Times differ; what was kept does not.
    assert [cost["kept_bytes"] for cost in costs] == [costs[0]["kept_bytes"]] * 2
    assert costs[0]["kept_bytes"] > 0
    report = ProbeReport.load(runs[0][0] / "report.json")
    assert {row["samples"] for row in report.select(stage="val")} == {1000}
    assert {row["samples"] for row in report.select(stage="train")} == {4000}
    assert {row["epoch"] for row in report.rows} == {0, 1}
    assert {row["fitted_on"]["samples"] for row in report.rows} == {4000}
    assert one["version"] == 1
    assert str(report) in runs[0][1]


def test_figure_is_there_and_not_blank(runs: list[tuple[Path, str]]) -> None:
    for output, _ in runs:
        pixels = matplotlib.image.imread(output / "error_by_depth.png")[..., :3]
        assert min(pixels.shape[:2]) > 300
        # More colours than ink on paper, and not only a frame.
        assert len({tuple(pixel) for pixel in pixels.reshape(-1, 3).round(1)}) > 5
        assert 0.01 < (pixels.min(axis=2) < 0.9).mean() < 0.5


def test_tensorboard_holds_a_curve_for_each_layer_and_stage(runs: list[tuple[Path, str]]) -> None:
    output = runs[0][0]
    report = ProbeReport.load(output / "report.json")
    events = EventAccumulator(str(output / "tensorboard")).Reload()
    curves = {
        tag: [event.value for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if tag.startswith("probe_")
    }
    expected: dict[str, list[Any]] = {}
    for row in report.select(metric="error"):
        expected.setdefault(f"probe_error_{row['stage']}/{row['layer']}", []).append(pytest.approx(row["value"]))
    assert curves == expected
    assert set(map(len, curves.values())) == {2}
    assert len(curves) == 2 * 10
