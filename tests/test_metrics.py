"""Metrics of torchmetrics on what the probes predict: right, of each loader, harmless, and refused in time."""

from __future__ import annotations

import copy
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml  # type: ignore[import-untyped]
from fits import Bare, fit_and_listen, make_trainer
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from networks import Classifier, images, loader, mlp
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score, top_k_accuracy_score
from states import differences
from test_config import build, from_yaml
from test_harmless import train
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import (
    MeanAbsoluteError,
    MeanSquaredError,
    Metric,
    MetricCollection,
    PearsonCorrCoef,
    R2Score,
    SpearmanCorrCoef,
)
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassROC,
)
from torchmetrics.wrappers import BootStrapper, ClasswiseWrapper, MinMaxMetric

from lightning_probes import LinearProbeCallback, probe
from lightning_probes.report.layer_metrics import _states, _with_states

CLASSES = 4
LAYERS = ["input", "net.1", "net.2", "net.3"]
NAMES = ["Accuracy", "AUROC", "MulticlassF1Score", "MulticlassAccuracy"]


def asked() -> list[str | Metric]:
    return ["Accuracy", "AUROC", "MulticlassF1Score", MulticlassAccuracy(CLASSES, top_k=2, average="micro")]


def small() -> Classifier:
    seed_everything(3, verbose=False)
    return Classifier(mlp(inputs=16, width=8, depth=1, classes=CLASSES), num_classes=CLASSES)


def data(samples: int, seed: int, left_out: int = 0) -> DataLoader[Any]:
    """Batches of 16, the last one smaller; the classes overlap."""
    x, y = images(samples, size=4, classes=CLASSES, seed=seed).tensors
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    y[:left_out] = -100
    return DataLoader(TensorDataset(x + 3 * noise, y), batch_size=16)


def predicted(
    probes: LinearProbeCallback, model: Classifier, layer: str, held_out: DataLoader[Any]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Probabilities of a layer's probe, from its weights and the features as a forward pass gives them, and labels."""
    assert isinstance(held_out.dataset, TensorDataset)
    x, y = held_out.dataset.tensors
    part = nn.Flatten() if layer == "input" else model.net[: int(layer[-1]) + 1]  # type: ignore[index]
    with torch.no_grad():
        features = part(x).double()
    assert probes._session.refit.fitted is not None
    weight, bias, mean, variance = (t.double() for t in probes._session.refit.fitted.probes.tensors(layer).values())
    scores = ((features - mean) / (variance + 1e-6 * variance.mean()).sqrt()) @ weight.T + bias
    return scores.softmax(dim=1)[y >= 0].numpy(), y[y >= 0].numpy()


def expected(p: NDArray[np.float64], y: NDArray[np.int64]) -> dict[str, float]:
    return {
        "Accuracy": accuracy_score(y, p.argmax(axis=1)),
        "AUROC": roc_auc_score(y, p, multi_class="ovr", average="macro"),
        "MulticlassF1Score": f1_score(y, p.argmax(axis=1), average="macro"),
        "MulticlassAccuracy": top_k_accuracy_score(y, p, k=2),
    }


def found(report: Any, layer: str, stage: str = "val", **conditions: Any) -> dict[str, float]:
    rows = report.select(layer=layer, stage=stage, **conditions)
    return {row["metric"]: row["value"] for row in rows if row["metric"] not in ("error", "cross_entropy", "lag")}


def test_values_are_those_of_scikit_learn_for_every_layer_and_loader(tmp_path: Path) -> None:
    given = asked()
    trainer = make_trainer(tmp_path, probes := LinearProbeCallback(metrics=given))
    held_out = [data(61, 1, left_out=5), data(37, 2)]
    trainer.fit(model := small(), data(150, 0), held_out)
    for layer in LAYERS:
        for i, one in enumerate(held_out):
            values = expected(*predicted(probes, model, layer, one))
            assert found(probes.report, layer, epoch=2, dataloader=i) == pytest.approx(values, abs=1e-5)
            logged = {n: trainer.callback_metrics[f"probe_{n}_val/{layer}/dataloader_idx_{i}"] for n in NAMES}
            assert {n: value.item() for n, value in logged.items()} == pytest.approx(values, abs=1e-5)
        # The starting point and each epoch have values; the samples that probes were fitted on have none.
        assert {row["epoch"] for row in probes.report.select(layer=layer, metric="AUROC")} == {0, 1, 2}
        assert not found(probes.report, layer, stage="train")
    assert not any("Accuracy_train" in name for name in trainer.callback_metrics)
    trainer.test(model, one := data(45, 3), verbose=False)
    values = expected(*predicted(probes, model, "net.2", one))
    assert found(probes.report, "net.2", "test") == pytest.approx(values, abs=1e-5)
    # What the user gave has seen nothing.
    assert isinstance(given[3], Metric)
    assert not given[3].update_called
    assert "probe AUROC, val, after epoch" in probes.report.table(metric="AUROC")
    axes: Any = probes.report.plot(metric="AUROC").axes[0]
    line = axes.lines[-1].get_ydata()
    drawn = [found(probes.report, layer, epoch=2, dataloader=0)["AUROC"] for layer in LAYERS]
    assert list(line) == pytest.approx(drawn)


def test_a_labelled_set_and_probe_have_the_values_of_scikit_learn_too(tmp_path: Path) -> None:
    fitted_on, held_out = data(150, 0), data(61, 1, left_out=5)
    probes = LinearProbeCallback(data=(fitted_on, held_out), metrics=asked())
    make_trainer(tmp_path, probes).fit(model := small(), data(40, 5))
    report = probe(model, fitted_on, held_out, metrics=asked())
    for layer in LAYERS:
        values = expected(*predicted(probes, model, layer, held_out))
        assert found(probes.report, layer, epoch=2) == pytest.approx(values, abs=1e-5)
        assert found(report, layer) == pytest.approx(values, abs=1e-5)


def test_vectors_and_dicts_have_a_row_for_each_entry_and_equal_names_a_number(tmp_path: Path) -> None:
    metrics = [
        MulticlassF1Score(CLASSES, average=None),
        MulticlassF1Score(CLASSES),
        ClasswiseWrapper(MulticlassAccuracy(CLASSES, average=None), labels=list("abcd")),
    ]
    trainer = make_trainer(tmp_path, probes := LinearProbeCallback("net.1", metrics=metrics))  # type: ignore[arg-type]
    trainer.fit(small(), data(150, 0), data(61, 1))
    values = found(probes.report, "net.1", epoch=2)
    each = [f"MulticlassF1Score_{i}" for i in range(CLASSES)]
    by_class = [f"ClasswiseWrapper_multiclassaccuracy_{letter}" for letter in "abcd"]
    assert list(values) == [*each, "MulticlassF1Score-2", *by_class]
    assert values["MulticlassF1Score-2"] == pytest.approx(sum(values[name] for name in each) / CLASSES)
    assert {f"probe_{name}_val/net.1" for name in values} <= trainer.callback_metrics.keys()


def test_soft_targets_count_as_their_likeliest_class(tmp_path: Path) -> None:
    held_out = data(61, 1)
    assert isinstance(held_out.dataset, TensorDataset)
    x, y = held_out.dataset.tensors
    rows = 0.7 * nn.functional.one_hot(y, CLASSES) + 0.3 / CLASSES
    soft = DataLoader(TensorDataset(x, rows), batch_size=16)
    net, common = small().net, {"num_classes": CLASSES, "metrics": ["Accuracy"]}
    report, hard = (probe(net, data(150, 0), one, **common) for one in (soft, held_out))  # type: ignore[arg-type]
    assert found(report, "1") == found(hard, "1")
    assert found(report, "1")["Accuracy"] > 1 / CLASSES


def test_training_can_be_stopped_by_a_metric(tmp_path: Path) -> None:
    # No accuracy of the last layer is ever better than this one by 1.
    stop = EarlyStopping("probe_Accuracy_val/net.3", min_delta=1.0, patience=1, mode="max")
    trainer = make_trainer(tmp_path, LinearProbeCallback(metrics=["Accuracy"]), stop, max_epochs=5)
    trainer.fit(small(), data(150, 0), data(61, 1))
    assert trainer.current_epoch == 2


# Harmless


class Drawing(MulticlassAccuracy):
    """Draws from the global generators in all that it does."""

    def update(self, *args: Any) -> None:
        torch.rand(1)
        np.random.rand()
        super().update(*args)

    def compute(self) -> Tensor:
        torch.rand(1)
        return super().compute()


def test_training_is_bit_identical_with_metrics_that_draw_numbers(tmp_path: Path) -> None:
    def make() -> Classifier:
        return Classifier(mlp(depth=1))

    metrics = ["AUROC", BootStrapper(MulticlassAccuracy(10), num_bootstraps=2), Drawing(10)]
    expected = train(make, tmp_path / "without")
    found = train(make, tmp_path / "with", probes := LinearProbeCallback(metrics=metrics))  # type: ignore[arg-type]
    assert not list(differences(found, expected))
    assert {row["metric"] for row in probes.report.rows} >= {"AUROC", "BootStrapper_mean", "Drawing"}
    assert not probes.report.notes


class Moody(MulticlassAccuracy):
    """Refuses batches of one size, or to compute."""

    samples: Tensor

    def __init__(self, size: int = 0, *, computes: bool = True) -> None:
        super().__init__(CLASSES, average="micro")
        self.size = size
        self.computes = computes
        self.add_state("samples", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        if len(target) == self.size:
            raise RuntimeError("not this one")
        self.samples += len(target)
        super().update(preds, target)

    def compute(self) -> Tensor:
        if not self.computes and self.samples > 2 * CLASSES:
            raise RuntimeError("not today")
        return super().compute()


@pytest.mark.parametrize(
    ("metric", "said"), [(Moody(13), "not this one"), (Moody(computes=False), "not today")], ids=["feed", "compute"]
)
def test_a_metric_that_raises_costs_its_values_and_not_the_run(metric: Metric, said: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, probes := LinearProbeCallback("net.*", metrics=[metric, "Accuracy"]))
    # 13 samples are left for the last batch.
    warned = fit_and_listen(trainer, small(), data(150, 0), data(61, 1))
    assert trainer.current_epoch == 2
    for layer in LAYERS:
        for epoch in (0, 1, 2):
            values = found(probes.report, layer, epoch=epoch)
            assert math.isnan(values["Moody"])
            assert math.isfinite(values["Accuracy"])
    (note,) = probes.report.notes
    assert note == f"metric 'Moody' raised RuntimeError: {said}; its value is NaN for input, net.0, net.1 and 2 more"
    assert warned == [f"LinearProbeCallback: {note}"]


class BareTested(Bare):
    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validation_step(batch, batch_idx)


def test_where_probes_are_cross_fitted_metrics_are_nan_and_a_note_says_so(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, probes := LinearProbeCallback("body.2", metrics=["AUROC"]))
    trainer.fit(model := BareTested(), loader(), loader(48, seed=1))
    rows = probes.report.select(stage="val", metric="AUROC", layer="body.2")
    assert len(rows) == 2
    assert all(math.isnan(row["value"]) for row in rows)
    assert math.isnan(trainer.callback_metrics["probe_AUROC_val/body.2"])
    assert sum(note.startswith("metrics are not computed on samples") for note in probes.report.notes) == 1
    # The probes have not seen a test set.
    trainer.test(model, loader(48, seed=2), verbose=False)
    assert probes.report.select(stage="test", metric="AUROC", layer="body.2")[0]["value"] > 0.5


# Refused


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (["Acuracy"], "metrics: torchmetrics has no metric 'Acuracy'; nearest: Accuracy,"),
        (["torchmetrics.AUROC"], "nearest: AUROC"),
        ("Accuracy", "metrics: expected a list of names or objects of torchmetrics metrics, found 'Accuracy'; write"),
        ([MulticlassAccuracy], "give an instance of it: MulticlassAccuracy(...)"),
        ([3], "metrics: expected names or objects of torchmetrics metrics, found 3"),
        (MetricCollection([MulticlassAccuracy(4)]), "write list(collection.values())"),
    ],
)
def test_what_is_no_metric_is_refused_at_once(metrics: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        LinearProbeCallback(metrics=metrics)
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        probe(small(), data(32, 0), data(32, 1), metrics=metrics)


class Untold(Classifier):
    """Only labels show how many classes there are."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        del self.num_classes


@pytest.mark.parametrize("way", ["told", "by the labels", "data", "probe"])
@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (MulticlassAccuracy(7), r"'MulticlassAccuracy' does not score these probes, of 4 outputs.*number of classes"),
        ("MultilabelAccuracy", r"'MultilabelAccuracy' does not score.*num_labels"),
        ("BLEUScore", r"'BLEUScore' does not score"),
        (MulticlassROC(CLASSES), r"computes tuple; expected a number, a vector or a dict"),
        (MulticlassConfusionMatrix(CLASSES), r"computes 4x4 numbers; expected a number"),
    ],
)
def test_a_metric_that_does_not_score_the_probes_is_refused_before_the_first_step(
    metric: Any, message: str, way: str, tmp_path: Path
) -> None:
    seed_everything(3, verbose=False)
    net = mlp(inputs=16, width=8, depth=1, classes=CLASSES)
    model = Untold(net) if way == "by the labels" else Classifier(net, num_classes=CLASSES)
    before = copy.deepcopy(model.state_dict())
    training = data(32, 0)
    if way == "by the labels":
        assert isinstance(training.dataset, TensorDataset)
        x, y = training.dataset.tensors
        training = DataLoader(TensorDataset(x, nn.functional.one_hot(y, CLASSES).float()), batch_size=16)
    own: Any = {"data": (training, training)} if way == "data" else {}
    trainer = make_trainer(tmp_path, LinearProbeCallback(metrics=[metric], **own))
    run = partial(probe, metrics=[metric]) if way == "probe" else trainer.fit
    with pytest.raises(ValueError, match=message):
        run(model, training, data(32, 1))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# Written


WRITTEN = """
num_classes: 10
metrics:
  - AUROC
  - class_path: torchmetrics.classification.MulticlassAccuracy
    init_args: {num_classes: 4, top_k: 2, average: micro}
"""


def test_names_and_objects_can_be_written_in_yaml_and_names_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = from_yaml(yaml.safe_load(WRITTEN))._network.metrics
    assert list(metrics) == ["AUROC", "MulticlassAccuracy"]
    assert isinstance(metrics["MulticlassAccuracy"], MulticlassAccuracy)
    assert metrics["MulticlassAccuracy"].top_k == 2
    with pytest.raises(ValueError, match="torchmetrics has no metric 'Acuracy'; nearest: Accuracy"):
        from_yaml({"metrics": ["Acuracy"]})
    monkeypatch.chdir(tmp_path)
    probes = build("--trainer.callbacks.metrics=[Accuracy, AUROC]")
    assert list(probes._network.metrics) == ["Accuracy", "AUROC"]
    assert probes.selection["metrics"] == ["Accuracy", "AUROC"]


def test_metrics_by_name_are_made_with_the_defaults_of_torchmetrics(tmp_path: Path) -> None:
    metrics = ["AUROC", MulticlassAUROC(CLASSES), MulticlassAUROC(CLASSES, thresholds=20)]
    trainer = make_trainer(tmp_path, probes := LinearProbeCallback("net.1", metrics=metrics))  # type: ignore[arg-type]
    trainer.fit(small(), data(150, 0), data(61, 1))
    values = found(probes.report, "net.1", epoch=2)
    assert values["AUROC"] == values["MulticlassAUROC"] != values["MulticlassAUROC-2"]


# Joined


@pytest.mark.parametrize(
    "metric",
    [
        PearsonCorrCoef(),  # its states are not reduced but stacked
        R2Score(),
        SpearmanCorrCoef(),  # it keeps all that it is fed
        MinMaxMetric(MeanAbsoluteError()),  # another metric inside it has states too
        MeanAbsoluteError() + MeanSquaredError(),
    ],
    ids=lambda metric: type(metric).__name__,
)
def test_the_states_of_several_processes_compute_what_one_would_have_computed(metric: Metric) -> None:
    x, y = torch.randn(2, 60, generator=torch.Generator().manual_seed(0))
    whole, *parts = (metric.clone() for _ in range(4))
    whole.update(x, x + y)
    for part, places in zip(parts, (slice(0, 10), slice(10, 40), slice(40, 60)), strict=True):
        part.update(x[places], (x + y)[places])
    joined = _with_states(metric.clone(), [_states(part) for part in parts])
    torch.testing.assert_close(joined.compute(), whole.compute())
    alone = _with_states(metric.clone(), [_states(whole)])  # the others were not fed
    torch.testing.assert_close(alone.compute(), whole.compute())
