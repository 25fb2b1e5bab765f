"""Labels of their own for tokens and pixels: rows are the features at drawn positions, beside scikit-learn."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import make_trainer
from lightning.pytorch import LightningModule, seed_everything
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_probes import LinearProbeCallback, ProbeReport, probe
from lightning_probes.distributed import Ranks
from lightning_probes.network.positions import NoPositionsError, bit_sums, draw, meeting
from lightning_probes.probes.dataset import FeatureDataset, LayerBatch, MemoryStore
from lightning_probes.probes.standardise import inverse_deviation
from lightning_probes.tasks.classification import Classification

POSITIONS = 5


class Tagger(LightningModule):
    """A label a token; its head has none."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(self.embed(x))  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self(batch[0]).mean(dim=1)), batch[0][:, 0] % 3)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 3e-3)


class Segmenter(LightningModule):
    """A label a pixel: maps of the size of the image, of half of it, tokens behind a class token, and no positions."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 2, stride=2)
        self.tokens, self.summary = nn.Linear(6, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.coarse(self.fine(x).relu()).relu().flatten(2).transpose(1, 2)
        return self.summary(self.tokens(F.pad(maps, (0, 0, 1, 0))).mean(dim=1))  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), (batch[0].mean(dim=(1, 2, 3)) > 0).long())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 3e-3)


def sentences(samples: int, seed: int) -> TensorDataset:
    """Each token's label is about the token before it; padding and some others have none."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(1, 12, (samples, 9), generator=generator)
    x[:, 7:] *= torch.randint(2, (samples, 1), generator=generator)
    labels = torch.where((x == 0) | (x == 5), -100, (x.roll(1, 1) + x) % 3)
    return TensorDataset(x, labels)


def pictures(samples: int, seed: int) -> TensorDataset:
    """A pixel's label is whether its neighbourhood is bright; the brightest have none."""
    x = torch.randn(samples, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    around = F.avg_pool2d(x, 3, 1, 1)[:, 0]
    return TensorDataset(x, torch.where(x[:, 0] > 1.5, -100, (around > 0).long()))


def batches(data: TensorDataset) -> DataLoader[Any]:
    return DataLoader(data, batch_size=20)


def at_places(data: TensorDataset) -> tuple[Tensor, Tensor]:
    """The places that are drawn, and their labels, batch after batch."""
    found = []
    for x, y in batches(data):
        flat = y.flatten(1)
        places = draw([flat], flat == -100, tuple(y.shape[1:]), POSITIONS, bit_sums(x, 1)).places
        found.append((places, flat.gather(1, places)))
    return torch.cat([places for places, _ in found]), torch.cat([labels for _, labels in found])


@torch.no_grad()
def of_tagger(model: Any, data: TensorDataset) -> dict[str, Tensor]:
    places, _ = at_places(data)
    x = model.embed(data.tensors[0])
    found = {"embed": x}
    for i, layer in enumerate(model.encoder.layers):
        found[f"encoder.layers.{i}"] = x = layer(x)
    rows = torch.arange(len(x))[:, None]
    return {layer: part[rows, places].flatten(0, 1) for layer, part in found.items()}


@torch.no_grad()
def of_segmenter(model: Any, data: TensorDataset) -> dict[str, Tensor]:
    places, _ = at_places(data)
    x, rows = data.tensors[0], torch.arange(len(data))[:, None]
    row, column = places // 6, places % 6
    fine = model.fine(x)
    coarse = model.coarse(fine.relu())
    tokens = model.tokens(F.pad(coarse.relu().flatten(2).transpose(1, 2), (0, 0, 1, 0)))
    found = {
        "input": x[rows, :, row, column],
        "fine": fine[rows, :, row, column],
        # Two pixels beside one another fall into one place of the coarse map.
        "coarse": coarse[rows, :, row // 2, column // 2],
        "tokens": tokens[rows, 1 + row // 2 * 3 + column // 2],
    }
    return {layer: part.flatten(0, 1) for layer, part in found.items()}


NETWORKS: dict[str, Any] = {"tokens": (Tagger, sentences, of_tagger), "pixels": (Segmenter, pictures, of_segmenter)}


@pytest.mark.parametrize("network", NETWORKS)
def test_errors_are_those_of_scikit_learn_on_the_rows_of_the_drawn_positions(network: str, tmp_path: Path) -> None:
    make, data, extract = NETWORKS[network]
    seed_everything(1, verbose=False)
    model, train, held_out = make(), data(200, 1), data(100, 2)
    layers = ["embed", "encoder.layers.*"] if network == "tokens" else ["fine", "coarse", "tokens"]
    probes = LinearProbeCallback(layers, num_classes=3 if network == "tokens" else 2, positions=POSITIONS)
    make_trainer(tmp_path, probes, max_epochs=2).fit(model, batches(train), batches(held_out))
    model.eval()
    samples = [(extract(model, part), at_places(part)[1].flatten()) for part in (train, held_out)]
    rows = {row["layer"]: row for row in probes.report.select(stage="val", metric="error", epoch=2)}
    assert rows.keys() == samples[0][0].keys()
    for layer, row in rows.items():
        (x, y), (others, truth) = ((features[layer].double(), labels) for features, labels in samples)
        x, y, others, truth = x[y >= 0], y[y >= 0], others[truth >= 0], truth[truth >= 0]
        assert (row["fitted_on"]["samples"], row["samples"]) == (len(y), len(truth))
        mean, variance = x.mean(dim=0), x.var(dim=0, unbiased=False)
        z, held = ((part - mean) * inverse_deviation(mean, variance) for part in (x, others))
        with threadpool_limits(1):
            exact = LogisticRegression(C=1 / (len(z) * row["l2"]), tol=1e-8, max_iter=9999).fit(z, y)
        # Some rows lie at the edge of a decision.
        assert row["value"] == pytest.approx((exact.predict(held) != truth.numpy()).mean(), abs=0.01)
        own = probes.probe(layer)
        assert (own(others.float()).argmax(dim=1) != truth).double().mean().item() == pytest.approx(
            row["value"], abs=1e-9
        )
    assert "fitted to their optimum on" in str(probes.report)
    assert "positions of training" in str(probes.report)
    asked: dict[str, Any] = {"num_classes": 3 if network == "tokens" else 2, "positions": POSITIONS}
    again = probe(model, batches(train), batches(held_out), layers=layers, trainer=make_trainer(tmp_path), **asked)
    for layer, row in rows.items():
        (found,) = again.select(stage="val", metric="error", layer=layer)
        assert found["value"] == pytest.approx(row["value"], abs=0.01)


def test_the_probe_of_a_layer_scores_all_positions(tmp_path: Path) -> None:
    seed_everything(1, verbose=False)
    model, data = Segmenter(), pictures(100, 1)
    report = probe(model, batches(data), batches(data), layers="coarse", num_classes=2, positions=5)
    one = report.probe("coarse")
    maps = model.coarse(model.fine(data.tensors[0]).relu())
    scores = one(one.reduction(maps))
    assert scores.shape == (100, 3, 3, 2)
    torch.testing.assert_close(scores[7, 1, 2], one(maps[7, :, 1, 2]))


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_other_tasks_have_positions_too(task: Any, tmp_path: Path) -> None:
    def ask(batch: Any) -> Tensor:
        x = batch[0][:, 0]
        around = F.avg_pool2d(x[:, None], 3, 1, 1)[:, 0]
        return torch.stack([around > 0, x > 1], dim=-1).float() if task == "multilabel" else around

    seed_everything(1, verbose=False)
    model = Segmenter()
    with torch.no_grad():  # One filter sees the nine pixels around, one the pixel itself.
        model.fine.weight[0], model.fine.weight[1] = 1 / 9, torch.eye(9)[4].view(1, 3, 3)
    probes = LinearProbeCallback(["fine", "coarse"], task=task, target=ask, positions=POSITIONS)
    trainer = make_trainer(tmp_path, probes, max_epochs=1)
    trainer.fit(model, batches(pictures(200, 1)), batches(pictures(100, 2)))
    rows = {row["layer"]: row for row in probes.report.select(stage="val", metric="error", epoch=0)}
    assert {row["samples"] for row in rows.values()} == {100 * POSITIONS}
    assert rows["fine"]["value"] < 0.03
    assert rows["coarse"]["value"] > 0.1
    if task == "regression":
        # Around a pixel of the image there are 7.1 on average, of which it is one.
        assert rows["input"]["value"] == pytest.approx(1 - 1 / 7.1, abs=0.06)


# Which positions


def test_positions_are_drawn_fairly_and_depend_on_the_sample_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (4000, 10), generator=generator)
    left_out = torch.zeros(4000, 10, dtype=torch.bool)
    left_out[:, 3] = True
    drawn = draw([labels], left_out, (10,), 3).places
    counts = torch.bincount(drawn.flatten(), minlength=10)
    assert counts[3] == 0
    # Each of nine positions is expected 4 000 times 3 / 9, give or take 30; six deviations.
    assert all(abs(int(counts[i]) - 4000 / 3) < 180 for i in range(10) if i != 3)
    order = torch.randperm(4000, generator=generator)
    assert torch.equal(draw([labels[order]], left_out[order], (10,), 3).places, drawn[order])
    assert (drawn.diff(dim=1) > 0).all()
    # Padding does not matter, and samples of equal labels have positions of their own.
    padded = draw([F.pad(labels, (0, 5))], F.pad(left_out, (0, 5), value=True), (15,), 3).places
    assert torch.equal(padded, drawn)
    alike = draw([0 * labels], left_out, (10,), 3, torch.arange(4000)).places
    assert len({tuple(row) for row in alike.tolist()}) == 84  # ways of choosing three of nine
    before = torch.get_rng_state()
    few = draw([labels[:2]], ~torch.eye(2, 10, dtype=torch.bool), (10,), 3)
    assert [row.tolist().count(i) for i, row in enumerate(few.places)] == [1, 1]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("space", "grid", "is_map", "met"),
    [
        ((9,), (9,), False, ((9,), 0)),
        ((4,), (9,), False, ((4,), 0)),  # a strided front end
        ((18,), (9,), False, ((18,), 0)),
        ((5,), (9,), False, ((5,), 0)),
        ((5, 7), (10, 14), True, ((5, 7), 0)),
        ((16,), (8, 8), False, ((4, 4), 0)),
        ((17,), (8, 8), False, ((4, 4), 1)),
        ((32 + 4,), (16, 8), False, ((8, 4), 4)),
        ((5, 7), (10, 14), False, ((5, 7), 0)),
    ],
)
def test_grids_are_met(space: Any, grid: Any, is_map: bool, met: Any) -> None:
    assert meeting(space, grid, is_map=is_map) == met


@pytest.mark.parametrize(
    ("space", "grid", "is_map"),
    [((), (9,), False), ((10,), (9,), False), ((8,), (9,), False), ((4, 4), (9,), True), ((15,), (4, 8), False)],
)
def test_grids_that_do_not_meet_are_told_with_their_sizes(space: Any, grid: Any, is_map: bool) -> None:
    there, here = (" x ".join(map(str, sides)) or "none" for sides in (grid, space))
    with pytest.raises(
        NoPositionsError, match=re.escape(f"its positions ({here}) are not those of the labels ({there})")
    ):
        meeting(space, grid, is_map=is_map)


def test_positions_of_a_sample_are_in_one_fold() -> None:
    dataset = FeatureDataset(Classification(2), MemoryStore())
    targets = torch.eye(2)[torch.randint(2, (60,), generator=torch.Generator().manual_seed(0))]
    targets[4::12] = 0  # left out
    for first in (0, 24):
        part = targets[first : first + (24 if first == 0 else 36)]
        dataset.add(LayerBatch({"a": torch.randn(len(part), 3)}, part, each=4))
    samples = dataset.reader(Ranks(), "cpu")("a")
    assert samples is not None
    folds = samples.folds.view(-1, 4)
    assert (folds == folds[:, :1]).all()
    assert dataset.labelled == 15
    assert set(folds[:, 0].bincount().tolist()) == {3}


# Bad input


def fit_with(
    tmp_path: Path, layers: Any = None, data: Any = sentences, make: Any = Tagger, **arguments: Any
) -> ProbeReport:
    seed_everything(1, verbose=False)
    probes = LinearProbeCallback(layers, **{"num_classes": 3, "positions": POSITIONS, **arguments})
    make_trainer(tmp_path, probes, max_epochs=1).fit(make(), batches(data(40, 1)), batches(data(20, 2)))
    return probes.report


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"target": lambda batch: batch[0][:, 0]},
            "labels have shape (20,); expected (batch, tokens) or (batch, height",
        ),
        ({"positions": None}, "labels of their own for each token: positions=16"),
        (
            {"target": lambda batch: 0 * batch[1] - 100},
            "all 180 positions of the first batch are left out (-100 or NaN)",
        ),
        ({"target": lambda batch: batch[1] + 7}, "target: label "),
        ({"layers": "head"}, "'head' cannot be probed: its positions (none) are not those of the labels (9)"),
        ({"positions": 0}, "positions: expected a positive integer, found 0"),
        ({"tokens": "first"}, "tokens: it has no effect with positions"),
        ({"max_features": 64}, "max_features: it has no effect with positions"),
        ({"token_mask": {"embed": 0}}, "token_mask: a mask by layer has no effect with positions"),
        # A label more than there are tokens is a mistake, and not another length.
        ({"target": lambda batch: F.pad(batch[1], (0, 1), value=1)}, "(9) are not those of the labels (10)"),
    ],
)
def test_mistakes_are_told_before_the_first_step(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        fit_with(tmp_path, **arguments)


def test_a_mask_leaves_positions_out(tmp_path: Path) -> None:
    def data(samples: int, seed: int) -> TensorDataset:
        x, labels = sentences(samples, seed).tensors
        return TensorDataset(x, torch.where(x == 0, 2, labels))  # Padding has a label, of one class.

    masked, others = (
        fit_with(tmp_path, data=data, token_mask=mask, positions=8) for mask in (lambda batch: batch[0] != 0, None)
    )
    assert "positions that the token mask leaves out are not drawn" in masked.notes
    short = fit_with(tmp_path, data=data, token_mask=lambda batch: batch[0][:, :5] != 0)
    assert "token_mask is not applied: its shape [20, 5] is not the labels'" in short.notes
    # A third of half of the sentences is padding, which would be told from the rest.
    lost = [next(iter(report.select(stage="train", metric="error")))["labels"] for report in (masked, others)]
    tokens, labels = data(40, 1).tensors
    kept = [(labels != -100) & (tokens != 0), labels != -100]
    assert [one["used"] for one in lost] == [int(part.sum(dim=1).clamp(max=8).sum()) for part in kept]
    baselines = [report.baseline["train"] for report in (masked, others)]
    assert baselines[1] < baselines[0] - 0.03


def test_layers_without_positions_are_left_out_and_told_of(tmp_path: Path) -> None:
    report = fit_with(tmp_path, data=pictures, make=Segmenter, num_classes=2)
    assert {row["layer"] for row in report.rows} == {"input", "fine", "coarse", "tokens"}
    (note,) = (note for note in report.notes if "summary" in note)
    assert note == "left out: summary (its positions (none) are not those of the labels (6 x 6))"
    reductions = {row["layer"]: row["reduction"] for row in report.rows}
    assert reductions["fine"] == "position of 6 x 6"
    assert reductions["tokens"] == "position of 6 x 6, met in 3 x 3 after 1 other token"
