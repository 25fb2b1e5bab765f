"""Steps that are not as one would expect: skipped by the host, without labels, in an order of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fits import fit_and_listen, make_trainer, small
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from networks import Classifier, images, loader, mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from lightning_probes import LinearProbeCallback
from lightning_probes.distributed import Ranks, refuse
from lightning_probes.network.extractor import LayerExtractor
from lightning_probes.network.hooks import ActivationRecorder
from lightning_probes.options import checked

LAYERS = ["input", "net.1", "net.2", "net.3"]


class Skipping(Classifier):
    """Leaves the rest of its second epoch out from the third batch on, which was opened and has no step."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if self.current_epoch == 1 and batch_idx == 2 else None


def test_a_batch_without_a_step_is_no_batch_of_validation(tmp_path: Path) -> None:
    held_out = loader(50, 16, seed=1)
    for every_n_epochs in (1, 2):
        seed_everything(3, verbose=False)
        probes = LinearProbeCallback(every_n_epochs=every_n_epochs)
        make_trainer(tmp_path, probes, max_epochs=4).fit(Skipping(mlp(depth=1)), loader(96, 16), held_out)
        rows = probes.report.select(stage="val", metric="error", layer="net.1")
        assert {row["samples"] for row in rows} == {50}
        assert rows[-1]["epoch"] == 4
        assert probes.report.notes == []


class LateLabels(IterableDataset[Any]):
    """Batches of which the first have no labels."""

    def __init__(self, unlabelled: int) -> None:
        self.unlabelled = unlabelled

    def __iter__(self) -> Iterator[Any]:
        x, y = images(96).tensors
        for i in range(6):
            batch = {"x": x[16 * i : 16 * i + 16]}
            yield batch if i < self.unlabelled else {**batch, "y": y[16 * i : 16 * i + 16]}


class OfDicts(Classifier):
    """Has a layer that fits no batch in its first two steps, and each batch later on."""

    def __init__(self) -> None:
        seed_everything(3, verbose=False)
        super().__init__(mlp(depth=1))
        self.side = nn.Tanh()
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += self.training
        self.side(x.flatten(1)[:7] if self.steps < 3 else x.flatten(1))
        return super().forward(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch["x"])
        return F.cross_entropy(logits, batch["y"]) if "y" in batch else logits.square().mean()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", F.cross_entropy(self(batch["x"]), batch["y"]))


def test_labels_that_come_late_are_probed_from_then_on(tmp_path: Path) -> None:
    held_out = DataLoader(LateLabels(0), batch_size=None)
    for unlabelled in (0, 1):
        model = OfDicts()
        probes = LinearProbeCallback(input="x", target="y")
        trainer = make_trainer(tmp_path, probes, max_epochs=1, num_sanity_val_steps=1)
        trainer.fit(model, DataLoader(LateLabels(unlabelled), batch_size=None), held_out)
        rows = probes.report.select(stage="val", metric="error", epoch=1)
        assert [row["layer"] for row in rows] == LAYERS
        assert {row["samples"] for row in rows} == {96}
        assert any(note.startswith("left out: side") for note in probes.report.notes)


def test_layers_that_were_left_out_have_no_hook_later() -> None:
    model = small()
    network = LayerExtractor(None, None, checked({"num_classes": 10}, "a test"))
    network.attach(model, order=["input", "net.2"])
    assert [len(module._forward_hooks) for module in model.net.children()] == [0, 0, 1, 0]
    network.open(next(iter(loader(16))))
    model(next(iter(loader(16)))[0])
    batch = network.close()
    assert batch is not None
    assert sorted(batch.features) == ["input", "net.2"]


def test_a_process_that_left_is_the_first_of_its_own() -> None:
    ranks = Ranks()
    ranks.rank, ranks.number = 1, 2
    ranks.leave("a test")
    assert (ranks.rank, ranks.number) == (0, 1)
    assert ranks.note == "process 1 went on without the others: a test"
    assert ranks.gather(3) == [3]
    assert torch.equal(ranks.total(torch.ones(2)), torch.ones(2))


def test_processes_that_cannot_reach_one_another_probe_alone() -> None:
    trainer = SimpleNamespace(global_rank=1, world_size=2, strategy=SimpleNamespace(root_device=torch.device("cpu")))
    with pytest.warns(UserWarning, match="each process probes its own samples, as gloo cannot start"):
        ranks = Ranks().meet(trainer)
    assert (ranks.rank, ranks.number, ranks.own_group) == (0, 1, None)


def test_tensor_parallelism_is_refused() -> None:
    strategy = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 1}, world_size=2)
    with pytest.raises(ValueError, match="expected tensor_parallel_size=1"):
        refuse(strategy)


def test_what_an_input_function_raises_ends_the_run_before_its_first_step(tmp_path: Path) -> None:
    def broken(batch: Any) -> Any:
        raise ZeroDivisionError("of the user's")

    with pytest.raises(ZeroDivisionError, match="of the user's"):
        make_trainer(tmp_path, LinearProbeCallback(input=broken)).fit(small(), loader(32))


def test_a_layout_says_what_three_dimensions_mean() -> None:
    features = []
    for layout in ({}, {"0": "channels"}, {"*": "tokens"}):
        model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
        network = LayerExtractor("*", None, checked({"num_classes": 10, "layout": layout, "max_features": 9}, "a test"))
        network.attach(model)
        batch = torch.randn(4, 3, 6), torch.tensor([0, 1, 2, 3])
        network.open(batch)
        model(batch[0])
        found = network.close()
        assert found is not None
        features.append({layer: x.shape[1] for layer, x in found.features.items()})
    assert features == [{"input": 6, "0": 6, "1": 6}, {"input": 6, "0": 9, "1": 6}, {"input": 6, "0": 6, "1": 6}]


class OnlyOnce(Classifier):
    """Cannot be run again with the weights that it began with."""

    def __init__(self) -> None:
        seed_everything(3, verbose=False)
        super().__init__(mlp(depth=1))
        self.first = [parameter.detach().clone() for parameter in self.net.parameters()]

    def forward(self, x: Tensor) -> Tensor:
        pairs = zip(self.first, self.net.parameters(), strict=True)
        if not self.training and all(torch.equal(first, now) for first, now in pairs):
            raise RuntimeError("not with these")
        return super().forward(x)


def test_first_weights_that_cannot_be_run_cost_the_starting_point(tmp_path: Path) -> None:
    probes = LinearProbeCallback()
    trainer = make_trainer(tmp_path, probes, num_sanity_val_steps=0)
    (said,) = fit_and_listen(trainer, OnlyOnce(), loader(96), loader(40))
    assert "no starting point: training cannot be run again on the first weights: " in said
    assert "not with these" in said
    assert {row["epoch"] for row in probes.report.rows} == {1, 2}
    assert {row["fitted_on"]["data"] for row in probes.report.rows} == {"train"}


def test_hooks_that_all_fail_in_a_replay_cost_their_layers_and_make_nothing_cross_fitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = ActivationRecorder.record
    is_armed = False

    def raising(recorder: ActivationRecorder, *args: Any, **options: Any) -> None:
        if is_armed and not recorder.memory:  # lent in steps, and not in a replay
            raise RuntimeError("injected")
        record(recorder, *args, **options)

    class Arming(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            nonlocal is_armed
            is_armed = trainer.current_epoch == 1

    monkeypatch.setattr(ActivationRecorder, "record", raising)
    probes = LinearProbeCallback(input=None)
    (said,) = fit_and_listen(make_trainer(tmp_path, probes, Arming()), small(), loader(96), loader(40))
    assert "since fitting their probes raised RuntimeError: injected" in said
    assert {row["fitted_on"]["data"] for row in probes.report.select(epoch=1)} == {"train"}
    assert not any("cannot be run again" in note for note in probes.report.notes)
