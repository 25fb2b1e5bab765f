"""Batches, steps and runs out of the ordinary: none ends a run or makes a number wrong without a word."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foldings import CASES, CLASSES, SAMPLES, Host
from lightning.pytorch import LightningModule, Trainer, seed_everything
from networks import QUIET
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from lightning_probes import LinearProbeCallback, ProbeReport


class Small(LightningModule):
    """Classify by an MLP, with something odd beside it in each step."""

    def __init__(self, odd: Callable[[Any, Tensor], Any] = lambda host, x: None) -> None:
        super().__init__()
        seed_everything(0, verbose=False)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, CLASSES))
        self.odd = odd

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.odd(self, batch["x"])
        return F.cross_entropy(self.net(batch["x"]), batch["y"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def vectors(samples: int, seed: int, batch_size: int = 16, **beside: Callable[[int], Any]) -> DataLoader[Any]:
    """Return samples whose class is that of their highest value among the first four."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 8, generator=g)
    data = list(zip(x, x[:, :CLASSES].argmax(dim=1), strict=True))

    def collate(parts: Any) -> dict[str, Any]:
        known = {"x": torch.stack([x for x, _ in parts]), "y": torch.stack([y for _, y in parts])}
        return known | {name: make(len(parts)) for name, make in beside.items()}

    return DataLoader(data, batch_size, collate_fn=collate)  # type: ignore[arg-type]


def fitted(model: LightningModule, *loaders: Any, **options: Any) -> ProbeReport:
    probes = LinearProbeCallback(input="x", target="y", num_classes=CLASSES, **options)
    Trainer(max_epochs=2, callbacks=[probes], num_sanity_val_steps=0, **QUIET).fit(model, *loaders)
    return probes.report


def errors(report: ProbeReport, **where: Any) -> dict[str, float]:
    return {row["layer"]: row["value"] for row in report.select(metric="error", **where)}


@pytest.fixture(scope="module")
def plain() -> dict[str, float]:
    return errors(fitted(Small(), vectors(160, 1), vectors(160, 2)), stage="val", epoch=2)


def flops_of(host: Any, x: Tensor) -> None:
    with FlopCounterMode(display=False) as counter:
        host.net(x)
    host.flops = [*getattr(host, "flops", []), counter.get_total_flops()]


ODD: dict[str, Callable[[Any, Tensor], Any]] = {
    "a sparse tensor": lambda host, x: (x.to_sparse() * 2).to_dense(),
    "a tensor of another type in its memory": lambda host, x: x.view(torch.uint8).sum(),
    "an empty tensor": lambda host, x: x[:0].mean(),
    "complex numbers": lambda host, x: torch.fft.fft(x).abs(),
    "in place on a part": lambda host, x: x.clone()[:, ::2].mul_(2),
}


@pytest.mark.parametrize("odd", ODD)
def test_a_step_may_do_odd_things_with_the_batch(odd: str, plain: dict[str, float]) -> None:
    report = fitted(Small(ODD[odd]), vectors(160, 1), vectors(160, 2))
    assert errors(report, stage="val", epoch=2) == plain


def test_a_mode_of_the_step_sees_what_it_sees_without_the_probes() -> None:
    with_probes: Any = Small(flops_of)
    bare: Any = Small(flops_of)
    fitted(with_probes, vectors(64, 1))
    Trainer(max_epochs=2, **QUIET).fit(bare, vectors(64, 1))
    assert with_probes.flops == bare.flops
    assert bare.flops[0] > 0


@pytest.mark.parametrize(
    "beside",
    [
        lambda n: torch.arange(8).expand(n, -1),
        lambda n: torch.zeros(2**12).as_strided((n, 8), (0, 1)),
        lambda n: torch.eye(n).to_sparse(),
        lambda n: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda n: {"name": "a", "none": None, "rows": [torch.ones(n)]},
    ],
    ids=["expanded", "strides of 0", "sparse", "nested", "containers"],
)
def test_a_batch_may_hold_any_tensors(beside: Callable[[int], Any], plain: dict[str, float]) -> None:
    report = fitted(Small(), vectors(160, 1, other=beside), vectors(160, 2, other=beside))
    assert errors(report, stage="val", epoch=2) == plain


def test_inputs_of_one_dimension_are_samples() -> None:
    class Ids(Small):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, CLASSES))

    def loader(seed: int) -> DataLoader[Any]:
        ids = torch.randint(0, 12, (160,), generator=torch.Generator().manual_seed(seed))
        data = [{"x": i, "y": i % CLASSES} for i in ids]
        return DataLoader(data, 16)  # type: ignore[arg-type]

    report = fitted(Ids(), loader(1), loader(2), layers=["net.*"])
    assert errors(report, stage="val", epoch=2)["net.0"] == 0.0
    assert all(math.isfinite(row["value"]) for row in report.rows)


def test_a_first_batch_of_one_sample_leaves_it_to_the_next() -> None:
    case = CASES["lstm_time_first"]()
    case.batch_size = 1
    host = Host(case)
    train, val = case.loaders()
    report = fitted(host, DataLoader(train.dataset, 17, collate_fn=case.collate), val)
    expected = errors(report, stage="val", epoch=2)
    # 320 samples in batches of 29 begin with one of a single sample.
    batches = [[0], *(list(range(i, min(i + 29, SAMPLES))) for i in range(1, SAMPLES, 29))]
    odd = DataLoader(train.dataset, batch_sampler=batches, collate_fn=case.collate)
    found = fitted(Host(case), odd, val)
    assert errors(found, stage="val", epoch=2).keys() == expected.keys() >= {"net", "head"}
    assert abs(errors(found, stage="val", epoch=2)["net"] - expected["net"]) <= 0.02
    assert any("first batches" in note for note in found.notes)


def test_an_empty_parameter_does_not_hide_a_dead_layer() -> None:
    model = Small()
    model.net.append(nn.ReLU())
    with torch.no_grad():
        model.net.get_parameter("0.bias").fill_(-100.0)
    model.nothing = nn.Parameter(torch.zeros(0, 5))
    report = fitted(model, vectors(160, 1), vectors(160, 2), layers=["net.*"])
    assert errors(report, stage="val", epoch=2).keys() == {"input", "net.0", "net.1", "net.2", "net.3"}


@pytest.mark.parametrize("stage", ["test", "validate"])
def test_another_loader_after_training_is_experimented_with_too(stage: str) -> None:
    class Testable(Host):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.case.step(self, batch["x"])

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.case.step(self, batch["x"])

    case = CASES["gru_time_first_square"]()
    host = Testable(case)
    train, _ = case.loaders()
    square = DataLoader(train.dataset, 32, collate_fn=case.collate)
    probes = LinearProbeCallback(["net"], input="x", target="y", num_classes=CLASSES)
    trainer = Trainer(max_epochs=1, callbacks=[probes], **QUIET)
    trainer.fit(host, train, square)
    expected = errors(probes.report, stage="val", epoch=1)["net"]
    probes.report.rows.clear()
    if stage == "test":
        trainer.test(host, square, verbose=False)
        found = errors(probes.report, stage="test")["net"]
    else:
        trainer.validate(host, [square, square], verbose=False)
        found = errors(probes.report, stage="val", dataloader=1)["net"]
    assert found == expected < 0.2


def test_training_without_labels_orders_layers_by_validation() -> None:
    class Unlabelled(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net(batch["x"]).square().mean()  # type: ignore[no-any-return]

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.net(batch["x"])

    train: DataLoader[Any] = DataLoader([{"x": x} for x in torch.randn(64, 8)], 16)  # type: ignore[arg-type]
    probes = LinearProbeCallback(input="x", target="y", num_classes=CLASSES)
    Trainer(max_epochs=3, callbacks=[probes], **QUIET).fit(Unlabelled(), train, vectors(160, 2))
    for epoch in (1, 2, 3):
        found = errors(probes.report, stage="val", epoch=epoch)
        assert list(found) == ["input", "net.0", "net.1", "net.2"]
        assert all(math.isfinite(value) for value in found.values())


def test_a_run_of_which_some_can_be_run_again_goes_on_after_resuming(tmp_path: Path) -> None:
    case = CASES["frames_folded_by_the_step"]()
    given: dict[str, Any] = {"layers": ["frame.1", "head"], "input": "x", "target": "y", "num_classes": CLASSES}
    trainer = Trainer(max_epochs=1, callbacks=[LinearProbeCallback(**given)], **QUIET)
    trainer.fit(Host(case), *case.loaders())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed = LinearProbeCallback(**given)
    Trainer(max_epochs=2, callbacks=[resumed], **QUIET).fit(
        Host(case), *case.loaders(), ckpt_path=tmp_path / "one.ckpt"
    )
    for epoch in (1, 2):
        rows = resumed.report.select(stage="val", metric="error", epoch=epoch)
        data = {row["layer"]: row["fitted_on"]["data"] for row in rows}
        assert data == {"input": "train", "frame.1": "train", "head": "val, cross-fitted"}
