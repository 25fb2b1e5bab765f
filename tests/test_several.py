"""Several targets of the same features: each has the curves that it would have by itself."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml  # type: ignore[import-untyped]
from asked import ASKED, answers, numbers
from fits import count_fits, make_trainer
from jsonargparse import ArgumentParser
from lightning.pytorch import seed_everything
from lightning.pytorch.loggers import CSVLogger
from networks import QUIET, Classifier, loader, mlp
from torch import Tensor

from lightning_probes import LinearProbeCallback, ProbeReport, probe
from lightning_probes.cli import ProbeTrainer

NAMES = ["digit", "answers", "numbers"]


def fit(folder: Path, probes: LinearProbeCallback, **options: Any) -> Classifier:
    seed_everything(3, verbose=False)
    model = Classifier(mlp(inputs=16, width=12, depth=1))
    data = loader(320, 32, size=4, seed=1), loader(160, 32, size=4, seed=2)
    make_trainer(folder, probes, **options).fit(model, *data)
    return model


def alone(name: str, **arguments: Any) -> LinearProbeCallback:
    several = ASKED["several"]
    kind = several["task"].get(name, "classification")
    return LinearProbeCallback("net.*", target=several["target"][name], task=kind, **arguments)


@pytest.mark.parametrize("fit_samples", [None, 0], ids=["at the optimum", "online"])
def test_each_has_the_curves_that_it_would_have_by_itself(fit_samples: int | None, tmp_path: Path) -> None:
    together = LinearProbeCallback("net.*", fit_samples=fit_samples, **ASKED["several"])
    fit(tmp_path, together)
    for name in NAMES:
        one = alone(name, fit_samples=fit_samples)
        fit(tmp_path, one)
        rows = together.report.select(target=name)
        assert len(rows) == len(one.report.rows)
        for row, expected in zip(rows, one.report.rows, strict=True):
            assert row["value"] == pytest.approx(expected["value"], rel=1e-5, abs=1e-6)
            near = ("value", "low", "high", "error_by_output", "rmse_by_output")
            plain = [{key: known for key, known in one.items() if key not in near} for one in (row, expected)]
            assert plain[0] == {**plain[1], "target": name}
        stages = {key: value for key, value in together.report.baseline.items() if key.endswith(f"/{name}")}
        assert {key.split("/")[0]: value for key, value in stages.items()} == pytest.approx(one.report.baseline)


def test_a_layer_is_fitted_once_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = count_fits(monkeypatch)
    fit(tmp_path, LinearProbeCallback("net.[1-3]", **ASKED["several"]), max_epochs=1)
    assert sorted(done) == sorted(["input", *2 * ["net.1", "net.2", "net.3"]])


def test_probe_finds_what_the_callback_finds(tmp_path: Path) -> None:
    together = LinearProbeCallback("net.*", **ASKED["several"])
    model = fit(tmp_path, together, max_epochs=1)
    data = loader(320, 32, size=4, seed=1), loader(160, 32, size=4, seed=2)
    found = probe(model, *data, layers="net.*", trainer=make_trainer(tmp_path), **ASKED["several"])
    assert (
        found.tasks
        == together.report.tasks
        == {"digit": "classification", "answers": "multilabel", "numbers": "regression"}
    )
    for row in found.select(stage="val", metric="error"):
        (same,) = together.report.select(stage="val", metric="error", epoch=1, layer=row["layer"], target=row["target"])
        assert row["value"] == pytest.approx(same["value"], abs=0.01)
    for report in (found, together):
        layer = report.probe("net.1", "numbers")
        assert layer.out_features == 2
        assert report.probe("net.1").out_features == 10
    with torch.no_grad():
        x, y = data[1].dataset.tensors  # type: ignore[attr-defined]
        predicted, truth = layer(model.net.get_submodule("1")(x.flatten(1))), numbers((x, y))
    (row,) = together.report.select(stage="val", metric="error", epoch=1, layer="net.1", target="numbers")
    for i, error in enumerate(row["error_by_output"]):
        has = ~truth[:, i].isnan()
        off = (predicted[has, i] - truth[has, i]).square().sum() / (truth[has, i] - truth[has, i].mean()).square().sum()
        assert off.item() == pytest.approx(error, abs=1e-3)


def test_names_join_keys_tables_and_figures(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    probes = LinearProbeCallback(
        "net.1", log_metrics=["rmse", "balanced_error"], metrics=["R2Score", "Accuracy"], **ASKED["several"]
    )
    fit(tmp_path, probes, max_epochs=1, logger=logger)
    logged = set(Path(logger.log_dir, "metrics.csv").read_text().splitlines()[0].split(","))
    assert {f"probe_error_val/{name}/net.1" for name in NAMES} <= logged
    assert {"probe_rmse_val/numbers/net.1", "probe_balanced_error_train/answers/input"} <= logged
    # Each metric is that of the targets that it can score.
    assert {key.split("/")[1] for key in logged if "R2Score" in key} == {"answers", "numbers"}
    assert {key.split("/")[1] for key in logged if "Accuracy" in key} == {"digit", "answers"}
    assert any("'R2Score' does not score those of 'digit'" in note for note in probes.report.notes)
    (row,) = probes.report.select(target="answers", layer="net.1", metric="Accuracy", stage="val", epoch=1)
    (error,) = probes.report.select(target="answers", layer="net.1", metric="error", stage="val", epoch=1)
    assert error["value"] == pytest.approx(1 - row["value"], abs=0.02)  # means over labels and over entries
    shown = str(probes.report)
    assert [f"{name}, val" in shown for name in NAMES] == [True] * 3
    assert probes.report.table(target="numbers").startswith("probe 1 - R2 in %, numbers, val")
    assert "numbers 1 - R2" in " ".join(probes.report.plot(target="numbers").axes[0].get_title().split())
    with pytest.raises(
        ValueError, match="target: expected one of 'digit', 'answers', 'numbers', found 'number'; did you mean"
    ):
        probes.report.table(target="number")
    probes.report.save(tmp_path / "report.json")
    assert ProbeReport.load(tmp_path / "report.json") == probes.report


def own(batch: Any) -> Tensor:
    return batch[1] % 3  # type: ignore[no-any-return]


def test_several_in_yaml() -> None:
    written = """
    target: {digit: 1, rest: test_several.own}
    task: {digit: classification}
    num_classes: {digit: 10, rest: 3}
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LinearProbeCallback, "probes")
    given = {"class_path": "lightning_probes.LinearProbeCallback", "init_args": yaml.safe_load(written)}
    probes = parser.instantiate_classes(parser.parse_object({"probes": given})).probes
    assert {name: task.outputs for name, task in probes._network.question.parts.items()} == {"digit": 10, "rest": 3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": {"digits": "regression"}}, "task: 'digits' is no name of a target; there is 'digit', 'rest'"),
        ({"num_classes": {"": 3}}, "num_classes: '' is no name of a target"),
        ({"target": {}}, "target: an empty mapping names no target"),
        ({"target": {"a/b": 1}}, "target: expected names without '/' as keys, found 'a/b'"),
        ({"target": 1, "task": {"digit": "regression"}}, "there is one target, which has no name"),
        ({"task": {"rest": "regresion"}}, r"task\['rest'\]: expected .* did you mean 'regression'"),
        (
            {"task": {"rest": "multilabel"}, "num_classes": {"rest": 3}},
            "num_classes: it has no effect with task='multilabel'",
        ),
    ],
)
def test_mistakes_are_told_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        LinearProbeCallback(**{"target": {"digit": 1, "rest": own}, **arguments})


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"digit": 1, "gone": 7}, r"target\['gone'\]=7: the batch has no such index"),
        ({"digit": 1, "rest": lambda batch: batch[1][:3]}, "other numbers of labels in other targets"),
        ({"digit": 1, "rest": lambda batch: batch[1] + 20}, r"target\['rest'\]: label .* is outside"),
    ],
)
def test_mistakes_in_the_first_batch_name_the_target(target: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises((LookupError, ValueError), match=message):
        fit(tmp_path, LinearProbeCallback("net.*", target=target, num_classes=10), max_epochs=1)


def test_a_target_that_later_batches_lack_costs_those_batches_and_is_told(tmp_path: Path) -> None:
    seen = []

    def sometimes(batch: Any) -> Tensor:
        seen.append(len(batch[1]))
        if len(seen) == 4:
            raise KeyError("gone")
        return answers(batch)

    probes = LinearProbeCallback("net.*", target={"digit": 1, "rest": sometimes}, task={"rest": "multilabel"})
    fit(tmp_path, probes, max_epochs=1)
    assert any("batches whose labels cannot be used are passed over" in note for note in probes.report.notes)
    assert all(row["samples"] > 0 for row in probes.report.rows)


def test_a_target_without_a_label_has_a_note_and_the_others_their_tables(tmp_path: Path) -> None:
    probes = LinearProbeCallback("net.*", target={"digit": 1, "none": lambda batch: 0 * batch[1] - 100}, num_classes=10)
    fit(tmp_path, probes, max_epochs=1)
    shown = str(probes.report)
    assert "digit, val" in shown
    assert "val, target 'none': none of 160 labels is used, since all leave their sample out" in " ".join(shown.split())
    assert "digit" in probes.report._repr_html_()
    with pytest.raises(ValueError, match="no val error of 'none'"):
        probes.report.table(target="none")


def test_the_lag_is_there_where_targets_are_of_other_samples(tmp_path: Path) -> None:
    halves: Any = {f"{rest}": partial(of_half, rest) for rest in (0, 1)}
    probes = LinearProbeCallback("net.1", target=halves, num_classes=10, log_metrics=["lag"])
    fit(tmp_path, probes, max_epochs=1)
    rows = probes.report.select(metric="lag", layer="net.1", epoch=1)
    assert {(row["stage"], row["target"]) for row in rows} >= {("val", "0"), ("val", "1")}
    assert {row["samples"] for row in rows if row["stage"] == "val"} == {80}


def of_half(rest: int, batch: Any) -> Tensor:
    return torch.where(torch.arange(len(batch[1])) % 2 == rest, batch[1], -100)


class WithData(Classifier):
    def train_dataloader(self) -> Any:
        return loader(96, 32, size=4, seed=1)

    def val_dataloader(self) -> Any:
        return loader(64, 32, size=4, seed=2)


def test_the_command_line_draws_a_figure_for_each(tmp_path: Path) -> None:
    trainer = ProbeTrainer(**QUIET, callbacks=[LinearProbeCallback("net.1", **ASKED["several"])])
    report = trainer.probe(WithData(mlp(inputs=16, width=12, depth=1)), output=str(tmp_path / "report.json"))
    assert list(report.tasks) == NAMES
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"report.json", *(f"report.{name}.png" for name in NAMES)}
