"""No number without what has to be known of it: in table, figure, page and notes."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import Between
from lightning.pytorch import Trainer, seed_everything
from matplotlib.figure import Figure
from networks import QUIET, Classifier, convnet, loader, mlp
from planted import enter
from torch.utils.data import DataLoader, TensorDataset

from lightning_probes import LinearProbeCallback, ProbeReport, probe
from lightning_probes.report.curves import Scores

TRAINED_ON = "on samples that the network was trained on"
LAGS = "trained along, an upper bound that lags"
LOADER = "validation loader"


def words_of(report: ProbeReport) -> dict[str, str]:
    """What a reader sees, by where it is seen; white space as single blanks."""
    figure = report.plot()
    drawn = [axes.get_title() for axes in figure.axes] + [text.get_text() for text in figure.texts]
    seen = {
        "table": str(report),
        "page": re.sub(r"<[^>]*>|base64,\S*", " ", report._repr_html_()),
        "figure": " ".join(drawn),
        "notes": " ".join(report.notes),
        "line": repr(report),
    }
    return {where: " ".join(text.split()) for where, text in seen.items()}


def fit(model: Any, train: Any, *rest: Any, epochs: int = 3, **arguments: Any) -> ProbeReport:
    probes = LinearProbeCallback(**arguments)
    Trainer(**QUIET, max_epochs=epochs, callbacks=[probes]).fit(model, train, *rest)
    return probes.report


def noisy(samples: int) -> DataLoader[Any]:
    """Images of ten brightnesses, with 30 % of the labels drawn anew."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(10, (samples,), generator=generator)
    x = torch.randn(samples, 1, 8, 8, generator=generator) + 0.5 * y.view(-1, 1, 1, 1)
    is_noise = torch.rand(samples, generator=generator) < 0.3
    drawn = torch.randint(10, (samples,), generator=generator)
    return DataLoader(TensorDataset(x, torch.where(is_noise, drawn, y)), batch_size=32, shuffle=True)


@pytest.mark.parametrize("is_replayed", [True, False], ids=["fitted", "trained along"])
def test_without_validation_no_number_is_bare(is_replayed: bool) -> None:
    class Memorises(Classifier if is_replayed else Between):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), 3e-3)

    seed_everything(0, verbose=False)
    report = fit(Memorises(mlp(width=256)), noisy(320), epochs=40, every_n_epochs=20)
    assert {row["stage"] for row in report.rows} == {"train"}
    # No classifier errs on less than 27 % of other samples with such labels.
    assert min(row["value"] for row in list(report.curves().values())[-1].values()) < 0.2
    words = words_of(report)
    for where in ("table", "page", "figure", "line", "notes"):
        assert TRAINED_ON in words[where], where
        assert is_replayed or where == "notes" or LAGS in words[where], where
    for where in ("table", "page", "figure", "notes"):
        assert LOADER in words[where], where
    # An interval would be one of the samples that were learned by heart.
    assert "95 %" not in words["table"] + words["page"]
    assert {(row["low"], row["high"]) for row in report.rows} == {(None, None)}
    assert "95 % interval" not in {text.get_text() for text in report.plot().legends[0].get_texts()}


def test_with_validation_the_training_error_alone_is_headed() -> None:
    report = fit(Classifier(mlp()), loader(96), loader(32, seed=1))
    for table in (report.table(), report.table(metric="cross_entropy")):
        assert TRAINED_ON not in table
        assert "Probes fitted to their optimum on 96 samples of training, scored on 32 others." in table
    assert report.table("train").splitlines()[1] == f"! {TRAINED_ON}, and the probes fitted on"
    assert "scored on the same." in report.table("train")
    assert report.plot(stage="train").axes[0].get_title().splitlines()[1].startswith("on samples")
    assert [note for note in report.notes if LOADER in note] == []


def test_probes_of_a_network_that_is_not_trained_say_what_they_were_fitted_on() -> None:
    report = probe(Classifier(mlp()), loader(96), loader(32, seed=1), trainer=Trainer(**QUIET))
    assert report.table("train").splitlines()[1] == "! on samples that the probes were fitted on"
    assert "Probes fitted to their optimum on 96 samples of training, scored on 32 others." in str(report)


def test_cross_fitted_probes_say_so() -> None:
    report = fit(Between(mlp()), loader(96), loader(40, seed=1))
    words = words_of(report)
    for where in ("table", "page", "figure"):
        assert "Probes cross-fitted on 40 samples of validation in five folds" in words[where], where
        assert "cannot be run again" in words[where], where
    assert report.table("train").splitlines()[1] == "! on the samples of validation that the probes were fitted on"


def test_online_probes_say_that_they_lag() -> None:
    report = fit(Classifier(mlp()), loader(96), loader(32, seed=1), fit_samples=0)
    words = words_of(report)
    for where in ("table", "page", "figure", "line"):
        assert LAGS in words[where], where
        assert TRAINED_ON not in words[where], where
    assert "95 % range" in words["table"]
    assert "Probes trained along with the network, not to their optimum; scored on 32 samples." in words["table"]
    assert f"! {LAGS}; {TRAINED_ON}" in " ".join(report.table("train").split())


def reports_of_many_layers() -> dict[str, ProbeReport]:
    """Forty layers with names of more than seventy characters, one of them set aside, some not at their optimum."""
    parts = ["self_attention.output_projection", "self_attention.query_key_value", "mlp.dense_output"]
    layers = [
        "input",
        *(f"module.encoder.stage_of_blocks.layers.{i}.{part}_layer" for i in range(13) for part in parts),
    ]
    kinds: dict[str, tuple[str, Any]] = {
        "fitted": ("val", {"data": "train", "samples": 14_000}),
        "cross-fitted": ("val", {"data": "val, cross-fitted", "samples": 1000}),
        "online": ("val", {"data": "online", "samples": 20_000}),
        "without validation": ("train", {"data": "train", "samples": 1000}),
    }
    found = {}
    for kind, (stage, fitted_on) in kinds.items():
        found[kind] = report = ProbeReport(notes=[f"set aside at epoch 1, step 7: {layers[5]!r} (NaN or Inf)"])
        for epoch in range(30):
            about = {
                layer: {
                    "depth": i,
                    "features": 512,
                    "features_total": 2048,
                    "fitted_on": fitted_on,
                    "converged": i < 30,
                }
                for i, layer in enumerate(layers)
            }
            wrong = [math.nan if i == 5 else 500.0 - 10 * i for i in range(len(layers))]
            scores = Scores([[w, w, 1000.0] for w in wrong], [600.0, 400.0])
            enter(report, about, scores, stage, dataloader=0, epoch=epoch, step=100 * epoch)
    return found


@pytest.mark.parametrize(("kind", "report"), reports_of_many_layers().items(), ids=list(reports_of_many_layers()))
def test_many_layers_with_long_names_are_told_apart_in_80_columns(kind: str, report: ProbeReport) -> None:
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 80
    first = next(i for i, line in enumerate(lines) if line.startswith("layer ")) + 1
    names = [line.split()[0] for line in lines[first : first + 40]]
    assert len(set(names)) == 40
    assert "nan" not in str(report)
    assert set(lines[first + 5].split()[2:]) == {"-"}
    text = " ".join(str(report).split())
    assert "- stands for a layer that was set aside; a note says why." in text
    assert "Layers are named from module.encoder.stage_of_blocks.layers on (but for input)" in text
    assert "".join(f"Notes: - {report.notes[0]}".split()) in "".join(text.split())
    assert "Not at the optimum (converged: False)" in text
    page = report._repr_html_()
    assert all(page.count(f">{row['layer']}<") == 1 for row in report.curves()[0, 0].values())
    ticks = [label.get_text() for label in report.plot().axes[0].get_xticklabels()]
    # The first of a block has the block's number, and the others what tells them apart in it.
    assert len(ticks) == 40
    assert [tick.split(".")[0] for tick in ticks if not tick.startswith(".")] == ["input", *map(str, range(13))]
    assert all(len(set(ticks[i : i + 3])) == 3 for i in range(1, 40, 3))
    assert max(map(len, ticks)) <= 24


def test_axes_keep_most_of_a_figure_of_long_names(tmp_path: Path) -> None:
    figure = reports_of_many_layers()["fitted"].plot()
    figure.savefig(tmp_path / "long.png")
    (axes,) = figure.axes
    box = axes.get_position()
    assert box.height > 0.45
    assert box.width > 0.7


def test_layer_that_is_set_aside_has_its_reason_in_the_notes() -> None:
    seed_everything(0, verbose=False)
    model = Classifier(mlp())

    class Explodes(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * math.inf if model.current_epoch and not model.training else x

    model.net.insert(2, Explodes())  # type: ignore[operator]
    report = fit(model, loader(64), loader(32, seed=1))
    assert any("net.2" in note and "NaN or Inf" in note and "set aside" in note for note in report.notes)
    (line,) = [line for line in str(report).splitlines() if line.startswith("net.2 ")]
    assert line.split()[-1] == "-"
    assert "nan" not in str(report)


def test_own_axes_are_drawn_into_and_returned() -> None:
    report = fit(Classifier(convnet()), loader(32), loader(32, seed=1))
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert report.plot(ax=left) is left
    assert report.plot(stage="train", ax=right) is right
    own = report.plot().axes[0]
    assert [line.get_label() for line in left.lines] == [line.get_label() for line in own.lines]
    assert left.get_legend() is not None
    assert figure.legends == []
    assert TRAINED_ON in " ".join(right.get_title().split())
    for wrong in (figure, figure.axes):
        with pytest.raises(TypeError, match=r"^ax: expected matplotlib Axes, .*, found (Figure|list)$"):
            report.plot(ax=wrong)  # type: ignore[call-overload]


def test_what_is_not_there_is_an_error_that_lists_what_is() -> None:
    report = fit(Classifier(mlp()), loader(32), loader(32, seed=1))
    with pytest.raises(ValueError, match=r"^metric: expected one of 'error', 'cross_entropy', 'lag', found 'accuracy'"):
        report.table(metric="accuracy")
    with pytest.raises(
        ValueError, match=r"^stage: expected one of 'val', 'test', 'train', found 'valid'; did you mean"
    ):
        report.table(stage="valid")
    with pytest.raises(ValueError, match=r"^stage: .* found 'valid'"):
        report.plot(stage="valid")
    with pytest.raises(ValueError, match=r"^the report has no test error .*; it has train cross_entropy .* val lag"):
        report.table("test")
    with pytest.raises(ValueError, match=r"^the report has no val error \(dataloader 3\); it has"):
        report.table(dataloader=3)
    assert ProbeReport(notes=["why"]).table() == "ProbeReport: no rows yet\nNotes:\n- why"


def test_repr_is_one_short_line() -> None:
    report = fit(Classifier(mlp()), loader(96), loader(32, seed=1))
    assert re.fullmatch(
        r"ProbeReport\(8 layers, 4 points, lowest val error \d+\.\d % at \S+, \d notes?\)", repr(report)
    )
    assert repr(ProbeReport()) == "ProbeReport(no rows yet)"


def test_points_that_came_about_in_another_way_are_named() -> None:
    report = ProbeReport()
    kinds = [{"data": "online", "samples": 100}] * 2 + [{"data": "train", "samples": 96}]
    for epoch, fitted_on in enumerate(kinds, start=1):
        about = {"net": {"depth": 1, "features": 2, "features_total": 2, "fitted_on": fitted_on, "converged": None}}
        enter(report, about, Scores([[3.0, 1.0, 10.0]], [5.0, 5.0]), "val", dataloader=0, epoch=epoch, step=epoch)
    table = " ".join(str(report).split())
    assert f"! at epoch 1, epoch 2: {LAGS} layer" in table
    assert "Probes fitted to their optimum on 96 samples of training, scored on 10 others." in table
    assert "But at epoch 1, epoch 2: Probes trained along with the network, not to their optimum" in table


def test_layers_whose_rows_differ_are_told_apart() -> None:
    report, plain = ProbeReport(), "one row a sample"
    rows = {"input": plain, "enc.0": "mean of 6 parts", "enc.1": "mean of 6 parts", "head": plain}
    fitted_on = {"data": "train", "samples": 96}
    known = {"depth": 1, "features": 2, "features_total": 2, "fitted_on": fitted_on, "converged": True}
    about = {layer: {**known, "rows": of, "reduction": "vector"} for layer, of in rows.items()}
    tally = [[3.0, 1.0, 10.0]] * 4
    enter(report, about, Scores(tally, [5.0, 5.0]), "val", dataloader=0, epoch=1, step=1)
    words = " ".join(str(report).split())
    assert (
        "Features: vectors (4). Rows differ between layers: one row a sample: input, head; "
        "mean of 6 parts: enc.0, enc.1." in words
    )
    alike = {layer: {**row, "rows": plain} for layer, row in about.items()}
    enter(again := ProbeReport(), alike, Scores(tally, [5.0, 5.0]), "val", dataloader=0, epoch=1, step=1)
    assert "Features: vectors (4); one row a sample." in " ".join(str(again).split())


@pytest.mark.parametrize("total", [0.0, 1.0])
def test_report_without_any_value_is_shown(total: float) -> None:
    report = ProbeReport(notes=["scoring raised RuntimeError: $\\frac{ is no formula$"])
    about = {"net": {"depth": 1, "features": 2, "features_total": 2, "fitted_on": None, "converged": None}}
    enter(report, about, Scores([[math.nan, math.nan, total]], [0.0, 0.0]), "val", dataloader=1, epoch=1, step=1)
    words = words_of(report)
    assert all("is no formula$" in words[where] for where in ("table", "page", "figure", "notes"))
    assert "<img " in report._repr_html_()
    assert "dataloader 1" in words["table"]


def test_axes_may_be_small() -> None:
    axes = Figure(figsize=(3, 3)).subplots(6, 6)[2, 3]
    reports_of_many_layers()["without validation"].plot(ax=axes)
    assert len(axes.get_title().splitlines()) <= 8


def test_layers_that_were_fitted_in_another_way_are_named() -> None:
    report = ProbeReport()
    about = {
        layer: {"depth": i, "features": 2, "features_total": 2, "fitted_on": fitted_on, "converged": True}
        for i, (layer, fitted_on) in enumerate(
            {
                "a": {"data": "train", "samples": 96},
                "b": {"data": "train", "samples": 96},
                "c": {"data": "online", "samples": 50},
            }.items()
        )
    }
    enter(report, about, Scores([[3.0, 1.0, 10.0]] * 3, [5.0, 5.0]), "val", dataloader=0, epoch=1, step=1)
    table = " ".join(str(report).split())
    assert "Probes fitted to their optimum on 96 samples of training, scored on 10 others." in table
    assert "But c: Probes trained along with the network" in table
