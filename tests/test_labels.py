"""A label is used or counted: bad ones in the first batch raise, later ones are left out and their number is told."""

from __future__ import annotations

import math
import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import make_trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_probes import LinearProbeCallback, ProbeReport, probe
from lightning_probes.probes.dataset import draw_folds
from lightning_probes.probes.fit import fit_probe, score
from lightning_probes.tasks.classification import Classification

CLASSES, BATCH = 3, 8

GOOD_INTEGERS = [0, 1, 2]
BAD_INTEGERS = [-1, -99, 3, 200]
GOOD_ROWS = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.2, 0.7, 0.1]]
BAD_ROWS = [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [math.nan, 0.0, 1.0], [2.0, -1.0, 0.0], [0.2, 0.2, 0.2]]
ON_PURPOSE = -100


class Frozen(LightningModule):
    """Is given whatever labels there are, and learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh()).double()

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()  # type: ignore[no-any-return]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


Samples = tuple[Tensor, Tensor]
"""Inputs and labels."""


def inputs(classes: Tensor, seed: int) -> Tensor:
    """Inputs in which the class can be seen but for some noise."""
    g = torch.Generator().manual_seed(seed)
    middles = torch.randn(CLASSES, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return middles[classes % CLASSES] + torch.randn(len(classes), 4, generator=g, dtype=torch.float64)


def samples_of(labels: list[Any], seed: int) -> Samples:
    y = torch.tensor(labels)
    classes = y if y.dim() == 1 else y.nan_to_num().argmax(dim=1)
    return inputs(classes.clamp(0), seed), y


def loader(samples: Samples) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*samples), batch_size=BATCH)


def is_good(labels: Tensor) -> Tensor:
    """By hand: what can be used."""
    rows = labels.tolist()
    good: Any = GOOD_INTEGERS if labels.dim() == 1 else [torch.tensor(row).tolist() for row in GOOD_ROWS]
    return torch.tensor([row in good for row in rows])


def fit(train: Samples, val: Samples, folder: Path, **options: Any) -> ProbeReport:
    probes = LinearProbeCallback("net.*", num_classes=CLASSES, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_trainer(folder, probes, max_epochs=2).fit(Frozen(), loader(train), loader(val))
    return probes.report


def check_counts(report: ProbeReport, stage: str, labels: Tensor) -> None:
    """Used and left out are all, in each row, and the note has the number of those that nobody left out on purpose."""
    used = int(is_good(labels).sum())
    on_purpose = int((labels == ON_PURPOSE).sum()) if labels.dim() == 1 else 0
    unusable = len(labels) - used - on_purpose
    rows = report.select(stage=stage, epoch=2) or report.select(stage=stage)
    assert rows
    for row in rows:
        assert row["labels"] == {"used": used, "left_out": on_purpose, "unusable": unusable}
    notes = [note for note in report.notes if note.startswith(f"{stage}: ")]
    assert len(notes) == (unusable > 0)
    if unusable:
        assert notes[0].startswith(f"{stage}: {unusable} of {len(labels)} samples are left out")
        assert "outside [0, num_classes=3)" in notes[0]


@st.composite
def mixtures(draw: Any) -> list[Any]:
    """A first batch of good labels, then any."""
    is_integer = draw(st.booleans())
    good = st.sampled_from(GOOD_INTEGERS if is_integer else GOOD_ROWS)
    bad = st.sampled_from([*BAD_INTEGERS, ON_PURPOSE] if is_integer else BAD_ROWS)
    first = draw(st.lists(good, min_size=24, max_size=24))
    return [*first, *draw(st.lists(st.one_of(good, bad), min_size=1, max_size=60))]


both = st.tuples(mixtures(), mixtures())
some = settings(max_examples=12, deadline=None, derandomize=True)


@pytest.mark.parametrize("fit_samples", [None, 0], ids=["at the optimum", "online"])
@some
@given(both)
def test_callback_uses_or_counts_each_label_and_its_error_is_that_of_the_good_ones(
    tmp_path_factory: pytest.TempPathFactory, fit_samples: int | None, labels: tuple[list[Any], list[Any]]
) -> None:
    folder = tmp_path_factory.mktemp("labels")
    train, val = samples_of(labels[0], 1), samples_of(labels[1], 2)
    report = fit(train, val, folder, fit_samples=fit_samples)
    check_counts(report, "train", train[1])
    check_counts(report, "val", val[1])
    if fit_samples is None:  # Online probes take a step on each batch, and other batches are other steps.
        good = [tuple(part[is_good(samples[1])] for part in samples) for samples in (train, val)]
        alone = fit(good[0], good[1], folder)  # type: ignore[arg-type]
        keys = ("layer", "stage", "metric", "epoch")
        errors, expected = (
            {tuple(row[key] for key in keys): row["value"] for row in found.rows if row["metric"] != "lag"}
            for found in (report, alone)
        )
        assert errors == pytest.approx(expected, abs=1e-9)
        assert {row["samples"] for row in report.select(stage="val")} == {len(good[1][1])}


@some
@given(both)
def test_probe_uses_or_counts_each_label_and_its_error_is_that_of_the_good_ones(
    labels: tuple[list[Any], list[Any]],
) -> None:
    train, val = samples_of(labels[0], 1), samples_of(labels[1], 2)
    model = Frozen().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = probe(model, loader(train), loader(val), layers="net.1", num_classes=CLASSES)
    check_counts(report, "train", train[1])
    check_counts(report, "val", val[1])
    task = Classification(CLASSES)
    used, scored = is_good(train[1]), is_good(val[1])
    with torch.no_grad():
        features, others = model(train[0]), model(val[0])
    good = task.encode(train[1][used], torch.float64)
    # A sample that is left out has its place in the folds.
    found = fit_probe(task, features[used], good, folds=draw_folds(len(used))[used])
    tally = score(task, found, others[scored], task.encode(val[1][scored], torch.float64)).tolist()
    for metric, value in task.measures(tally).items():
        (row,) = report.select(layer="net.1", stage="val", metric=metric)
        assert row["value"] == pytest.approx(value, abs=1e-4)
        assert row["samples"] == int(scored.sum())


GOOD = [0, 1, 2, 0, 1, 2, 0, 1] * 3


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (-1, "label -1 is outside [0, num_classes=3); -100 leaves a sample out"),
        (
            5,
            "label 5 is outside [0, num_classes=3); if there are more classes: num_classes=6; -100 leaves a sample out",
        ),
        ([1.0, 1.0, 0.0], "row 2 of the labels [8, 3] is no distribution: [1.0, 1.0, 0.0]; several classes in a row"),
        ([0.0, 0.0, 0.0], "row 2 of the labels [8, 3] is no distribution: [0.0, 0.0, 0.0]; a row of zeros names no"),
        ([0.9, 0.9, -0.8], "row 2 of the labels [8, 3] is no distribution"),
    ],
)
@pytest.mark.parametrize("is_posthoc", [False, True])
def test_bad_labels_in_the_first_batch_raise_though_validation_has_good_ones(
    bad: Any, message: str, is_posthoc: bool, tmp_path: Path
) -> None:
    good = GOOD if isinstance(bad, int) else [GOOD_ROWS[label] for label in GOOD]
    train, val = samples_of([*good[:2], bad, *good[3:]], 1), samples_of(good, 2)
    run = partial(fit, train, val, tmp_path)
    if is_posthoc:
        run = partial(probe, Frozen(), loader(train), loader(val), num_classes=CLASSES)
    with pytest.raises(ValueError, match=re.escape(message)):
        run()


@pytest.mark.parametrize(
    "view", [torch.zeros(24, 1, 5, 5), torch.randn(24, 4), torch.zeros(24, 5, dtype=torch.long), torch.rand(24)]
)
def test_what_cannot_be_labels_counts_as_none_and_validation_is_cross_fitted(view: Tensor, tmp_path: Path) -> None:
    train, val = (samples_of(GOOD, 1)[0], view), samples_of(GOOD * 2, 2)
    report = fit(train, val, tmp_path)
    assert {row["fitted_on"]["data"] for row in report.rows} == {"val, cross-fitted"}
    assert any(note.startswith("batches of training have no usable labels") for note in report.notes)
    # The stage "train" of cross-fitted probes is the validation that they were fitted on.
    assert all(row["labels"] == {"used": 48, "left_out": 0, "unusable": 0} for row in report.rows)


def test_a_bad_label_of_validation_does_not_take_its_good_ones_away(tmp_path: Path) -> None:
    """Training has none: validation is cross-fitted on what is good, though its first batch was not."""
    train, val = (samples_of(GOOD, 1)[0], torch.zeros(24, 1, 5, 5)), samples_of([*GOOD, *GOOD, -1], 2)
    report = fit(train, val, tmp_path)
    assert all(row["labels"] == {"used": 48, "left_out": 0, "unusable": 1} for row in report.rows)
    assert "Of 49 labels 48 were used (1 not usable)." in str(report)
    assert any(note.startswith("val: 1 of 49 samples are left out") for note in report.notes)
    with pytest.raises(ValueError, match=r"label -1 is outside"):
        fit(train, samples_of([-1, *GOOD, *GOOD], 2), tmp_path)


def test_the_note_of_a_number_is_replaced_by_that_of_the_next_point(tmp_path: Path) -> None:
    """Two labels are bad in the second epoch and four in the third."""

    class Data(Frozen):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            if self.trainer.training:
                batch = [batch[0], batch[1].clone()]
                self.seen = getattr(self, "seen", -1) + 1
                batch[1][: self.current_epoch if self.seen % 3 else 0] = -1
            return batch

    probes = LinearProbeCallback("net.*", num_classes=CLASSES)
    make_trainer(tmp_path, probes, max_epochs=3).fit(Data(), loader(samples_of(GOOD, 1)), loader(samples_of(GOOD, 2)))
    assert [note[:22] for note in probes.report.notes if note.startswith("train: ")] == ["train: 4 of 24 samples"]
    found = {row["epoch"]: row["labels"]["unusable"] for row in probes.report.select(stage="train") if row["epoch"]}
    assert found == {1: 0, 2: 2, 3: 4}


def test_batches_without_labels_are_told_of_with_their_number(tmp_path: Path) -> None:
    class Data(Frozen):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            self.seen = getattr(self, "seen", -1) + 1
            return batch[:1] if self.trainer.training and self.seen % 3 == 1 else batch

    probes = LinearProbeCallback("net.*", num_classes=CLASSES)
    trainer = make_trainer(tmp_path, probes, max_epochs=1, num_sanity_val_steps=0)
    trainer.fit(Data(), loader(samples_of(GOOD, 1)), loader(samples_of(GOOD, 2)))
    (note,) = [note for note in probes.report.notes if "passed over" in note]
    assert note.endswith(": 1 so far")


def test_a_resumed_run_counts_on_and_is_not_ended_by_what_its_first_batch_has(tmp_path: Path) -> None:
    labels = [*GOOD, *[0, -1, 1, -100, 2, 0, 1, 2]]
    train, val = samples_of(labels, 1), samples_of(GOOD, 2)
    whole = fit(train, val, tmp_path)
    probes = LinearProbeCallback("net.*", num_classes=CLASSES)
    trainer = make_trainer(tmp_path, probes, max_epochs=1)
    trainer.fit(Frozen(), loader(train), loader(val))
    trainer.save_checkpoint(path := tmp_path / "last.ckpt")
    # The batch with a bad label comes first now.
    turned = train[0].roll(8, dims=0), train[1].roll(8, dims=0)
    again = LinearProbeCallback("net.*", num_classes=CLASSES)
    make_trainer(tmp_path, again, max_epochs=2).fit(Frozen(), loader(turned), loader(val), ckpt_path=path)
    expected = {"used": 30, "left_out": 1, "unusable": 1}
    for report in (whole, again.report):
        assert [row["labels"] for row in report.select(stage="train", epoch=2, metric="error", layer="net.1")] == [
            expected
        ]
        assert len([note for note in report.notes if note.startswith("train: 1 of 32 samples are left out")]) == 1
