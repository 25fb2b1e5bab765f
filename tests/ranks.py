"""Cases that several processes run together, each writing down what it found; started by ``test_ranks.py``.

``python ranks.py FILE CASE ...`` in each process, with the environment that torchrun would give it.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from asked import ASKED
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from networks import QUIET, Classifier, convnet, images, mlp
from torch import Tensor, nn
from torch.distributed import destroy_process_group
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset
from torchmetrics.classification import MulticlassF1Score

import lightning_probes.distributed
from lightning_probes import LinearProbeCallback
from lightning_probes.probes.online import OnlineProbes

RANK, NUMBER = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
TRAIN, HELD_OUT = 96, 41

Found = dict[str, Any]


def shared(samples: int, batch_size: int, seed: int) -> DataLoader[Any]:
    """This process's share of the same samples: global batches are the same, however many processes there are."""
    data = images(samples, size=4, seed=seed)
    return DataLoader(
        data, batch_size=batch_size // NUMBER, sampler=DistributedSampler(data, NUMBER, RANK, shuffle=False)
    )


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    return shared(TRAIN, 24, 1), shared(HELD_OUT, 12, 2)


def network() -> Classifier:
    seed_everything(3, verbose=False)
    return Classifier(mlp(inputs=16, width=12, depth=2))


def make_trainer(*callbacks: Callback, **options: Any) -> Trainer:
    several: dict[str, Any] = {"strategy": "ddp", "devices": NUMBER} if NUMBER > 1 else {}
    return Trainer(
        **{
            **QUIET,
            "max_epochs": 2,
            **several,
            "use_distributed_sampler": False,
            "callbacks": list(callbacks),
            **options,
        }
    )


def tensors(state: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of nested dictionaries."""
    if isinstance(state, Tensor):
        yield name, state.clone()
    elif isinstance(state, dict):
        for key, part in state.items():
            yield from tensors(part, f"{name}/{key}")


def found(model: LightningModule, probes: LinearProbeCallback) -> Found:
    report = probes.report
    known = {"rows": report.rows, "notes": report.notes, "cost": report.cost, "baseline": report.baseline}
    known["outcomes"] = report.outcomes
    return {**known, "probes": dict(tensors(probes.state_dict()["probes"])), "weights": model.state_dict()}


def fit(model: LightningModule, probes: LinearProbeCallback, *data: Any, **options: Any) -> Found:
    make_trainer(probes, **options).fit(model, *(data or loaders()))
    return found(model, probes)


class Between(Classifier):
    """Its step computes before and between its modules: it cannot be run again."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.gain = nn.Parameter(torch.ones(()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        net: Any = self.net
        return F.cross_entropy(net[1:](net[0](batch[0] + 0 * self.gain) * self.gain), batch[1])


class OneSided(Classifier):
    """A layer that runs in one process only."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.side = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        if RANK == NUMBER - 1:
            self.side(x.flatten(1))
        return super().forward(x)


class Raising(Classifier):
    """Cannot be run again in one process."""

    is_in_step = False

    def forward(self, x: Tensor) -> Tensor:
        if RANK == NUMBER - 1 and not self.is_in_step:
            raise RuntimeError("not a second time")
        return super().forward(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.is_in_step = True
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.is_in_step = False
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.is_in_step = True
        super().validation_step(batch, batch_idx)
        self.is_in_step = False


class Infinite(Classifier):
    """In the second epoch a layer of one process is not finite."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.side = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        is_now = RANK == NUMBER - 1 and self.current_epoch and self.training
        self.side(x.flatten(1) / (0.0 if is_now else 1.0))
        return super().forward(x)


class Alone(Classifier):
    """Each process trains by itself."""

    def on_train_start(self) -> None:
        wrapped: Any = self.trainer.model
        wrapped.require_backward_grad_sync = False


class Sharded(Classifier):
    """FSDP2."""

    def configure_model(self) -> None:
        assert self.device_mesh is not None
        mesh = self.device_mesh["data_parallel"]
        for layer in self.net.children():
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


class OtherWidths(Classifier):
    """A layer whose features number otherwise in one process."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.side = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        self.side(x.flatten(1)[:, : 8 + RANK])
        return super().forward(x)


class Uneven(IterableDataset[Any]):
    """Some batches in each process."""

    def __init__(self, batches: int, seed: int) -> None:
        self.batches = batches
        self.data = images(8 * 10, size=4, seed=seed + RANK)

    def __iter__(self) -> Iterator[Any]:
        x, y = self.data.tensors
        for i in range(self.batches):
            yield x[8 * i : 8 * i + 8], y[8 * i : 8 * i + 8]


def same() -> Found:
    return fit(network(), LinearProbeCallback(log_metrics=["cross_entropy"]))


def asked(name: str) -> Callable[[], Found]:
    """What one process finds, whatever the probes are asked."""

    def case() -> Found:
        seed_everything(3, verbose=False)
        return fit(Classifier(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), mlp(64, 1, 64))), probes())

    def probes() -> LinearProbeCallback:
        return LinearProbeCallback(["net.*", "net.2.*"] if name != "pixels" else "net.[01]", **ASKED[name])

    case.__name__ = name
    return case


def metrics() -> Found:
    """A layer and a loader that only the last and the first process have."""
    seed_everything(3, verbose=False)
    model = OneSided(mlp(inputs=16, width=12, depth=1))
    several: Found = {"strategy": DDPStrategy(find_unused_parameters=True)} if NUMBER > 1 else {}
    macro = MulticlassF1Score(10, average=None)
    probes = LinearProbeCallback(metrics=["Accuracy", "AUROC", "CalibrationError", "MatthewsCorrCoef", macro])
    train, held_out = loaders()
    of_one = DataLoader(Uneven(3 if RANK == 0 else 0, 20), batch_size=None)
    return fit(model, probes, train, [held_out, of_one], **several)


def harmless() -> Found:
    seen = {}
    for name in ("with", "without"):
        seed_everything(3, verbose=False)
        trainer = make_trainer(*([LinearProbeCallback()] if name == "with" else []))
        trainer.fit(model := Classifier(convnet(width=4)), *loaders())
        seen[name] = {**model.state_dict(), "random": torch.rand(3), "loss": trainer.callback_metrics["val_loss"]}
    return seen


def cross_fitted() -> Found:
    seed_everything(3, verbose=False)
    return fit(Between(mlp(inputs=16, width=12, depth=2)), LinearProbeCallback())


def online() -> Found:
    return fit(network(), LinearProbeCallback(fit_samples=0))


def padded() -> Found:
    train, held_out = (DataLoader(images(n, size=4, seed=n), batch_size=8) for n in (TRAIN, HELD_OUT))
    probes, model = LinearProbeCallback(), network()
    trainer = make_trainer(probes, use_distributed_sampler=True)
    trainer.fit(model, train, held_out)
    trainer.test(model, held_out, verbose=False)
    return found(model, probes)


def one_sided() -> Found:
    seed_everything(3, verbose=False)
    options = {"strategy": DDPStrategy(find_unused_parameters=True)} if NUMBER > 1 else {}
    return fit(OneSided(mlp(inputs=16, width=12, depth=1)), LinearProbeCallback(), **options)


def not_finite() -> Found:
    seed_everything(3, verbose=False)
    return fit(Infinite(mlp(inputs=16, width=12, depth=1)), LinearProbeCallback(["net.*", "side"]))


def raising() -> Found:
    seed_everything(3, verbose=False)
    return fit(Raising(mlp(inputs=16, width=12, depth=1)), LinearProbeCallback("net.*"))


def no_validation_batch() -> Found:
    data = [DataLoader(Uneven(n, seed), batch_size=None) for n, seed in ((4, 10), (3 if RANK == 0 else 0, 20))]
    return fit(network(), LinearProbeCallback(), *data)


def fewer_training_batches() -> Found:
    lightning_probes.distributed.LONGEST_WAIT = timedelta(seconds=3)
    seed_everything(3, verbose=False)
    data = [DataLoader(Uneven(n, seed), batch_size=None) for n, seed in ((6 - 2 * RANK, 10), (3, 20))]
    return fit(Alone(mlp(inputs=16, width=12, depth=1)), LinearProbeCallback(), *data)


def other_widths() -> Found:
    seed_everything(3, verbose=False)
    return fit(OtherWidths(mlp(inputs=16, width=12, depth=1)), LinearProbeCallback())


def met_again() -> Found:
    """One process leaves the others in a first fit, for a fault of its own; in a second one all are there."""
    longest, merge = lightning_probes.distributed.LONGEST_WAIT, OnlineProbes.merge

    def raising(*args: Any) -> None:
        raise RuntimeError("injected")

    lightning_probes.distributed.LONGEST_WAIT = timedelta(seconds=3)
    if RANK == 1:
        OnlineProbes.merge = raising  # type: ignore[method-assign,assignment]
    first = fit(network(), probes := LinearProbeCallback())
    lightning_probes.distributed.LONGEST_WAIT, OnlineProbes.merge = longest, merge  # type: ignore[method-assign]
    return {"first": {"notes": first["notes"], "rows": first["rows"]}, **fit(network(), probes)}


def scored_alone() -> Found:
    """After training together one process evaluates by itself, as Lightning recommends."""
    probes, model = LinearProbeCallback(), network()
    make_trainer(probes).fit(model, *loaders())
    known = found(model, probes)
    if RANK == 0:
        trainer = Trainer(**QUIET, callbacks=[probes], use_distributed_sampler=False)
        whole = DataLoader(images(HELD_OUT, size=4, seed=2), batch_size=12)
        known["alone"] = trainer.test(model, whole, verbose=False)[0]["probe_error_test/input"]
    torch.distributed.barrier()
    return known


def resumed() -> Found:
    """Resumed from the checkpoint of the first epoch's end, beside the run that was never stopped."""
    folder = Path(sys.argv[1]).parent / "checkpoints"
    saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    whole, model = LinearProbeCallback(), network()
    make_trainer(whole, saving, max_epochs=3, enable_checkpointing=True).fit(model, *loaders())
    expected = found(model, whole)
    probes, model = LinearProbeCallback(), network()
    make_trainer(probes, max_epochs=3).fit(model, *loaders(), ckpt_path=folder / "epoch=0.ckpt")
    return {**found(model, probes), "expected": {key: expected[key] for key in ("rows", "probes")}}


def kept() -> Found:
    # Each process has a folder of its own, so that both could write.
    with tempfile.TemporaryDirectory() as folder:
        one = fit(network(), LinearProbeCallback(), logger=CSVLogger(folder, name="", version=""))
        return one | {"files": sorted(path.name for path in Path(folder).rglob("*report*"))}


def sharded() -> Found:
    seed_everything(3, verbose=False)
    model, probes = Sharded(mlp(inputs=16, width=12, depth=2)), LinearProbeCallback("net.*")
    make_trainer(probes, strategy=fsdp2()).fit(model, *loaders())
    return {**found(model, probes), "weights": {}}


def labelled_set() -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Of sizes that no number of processes divides."""
    train = DataLoader(images(131, size=4, seed=5), batch_size=20, shuffle=True)
    return train, DataLoader(images(83, size=4, seed=6), batch_size=40)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is shared out, put together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def labelled() -> Found:
    # What the sampler of the second loader repeats does not count.
    return fit(network(), LinearProbeCallback("net.*", data=(labelled_set()[0], shared(83, 40, 6))))


def labelled_harmless() -> Found:
    seen = {}
    for name in ("with", "without"):
        seed_everything(3, verbose=False)
        trainer = make_trainer(*([LinearProbeCallback(data=labelled_set())] if name == "with" else []))
        trainer.fit(model := Classifier(convnet(width=4)), *loaders())
        seen[name] = {**model.state_dict(), "random": torch.rand(3), "loss": trainer.callback_metrics["val_loss"]}
    return seen


class Disk(IterableDataset[Any]):
    """Fails in one process, after some batches."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        for i, one in enumerate(zip(*images(60, size=4, seed=5).tensors, strict=True)):
            if self.passes == 3 and RANK == 1 and i > 30:
                raise OSError("the disk is gone")
            yield one


def labelled_failing() -> Found:
    return fit(network(), LinearProbeCallback(data=(DataLoader(Disk(), 20), labelled_set()[1])))


def fsdp2() -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=NUMBER, tensor_parallel_size=1)


def labelled_sharded() -> Found:
    seen: Found = {}
    for name in ("without", "with"):
        seed_everything(3, verbose=False)
        model, probes = Sharded(mlp(inputs=16, width=12, depth=2)), LinearProbeCallback("net.*", data=labelled_set())
        make_trainer(*([probes] if name == "with" else []), strategy=fsdp2(), max_epochs=3).fit(model, *loaders())
        weights = {key: whole(value) for key, value in model.state_dict().items()}
        seen[name] = {"weights": weights, "random": torch.rand(3)}
    return {**found(model, probes), **seen, "weights": {}}


class Writing(Sharded):
    """From the second epoch on its forward writes to a parameter that is not shared out."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.gain = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.current_epoch and not self.training:
            self.gain.data.add_(1)
        return super().forward(x) + 0 * self.gain

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...


def labelled_writing() -> Found:
    seed_everything(3, verbose=False)
    model, probes = Writing(mlp(inputs=16, width=12, depth=2)), LinearProbeCallback("net.*", data=labelled_set())
    make_trainer(probes, strategy=fsdp2(), max_epochs=3).fit(model, *loaders())
    return {**found(model, probes), "weights": {}, "gain": model.gain.item()}


CASES: dict[str, Callable[[], Found]] = {
    case.__name__: case
    for case in (
        same,
        metrics,
        harmless,
        cross_fitted,
        online,
        padded,
        one_sided,
        not_finite,
        raising,
        no_validation_batch,
        fewer_training_batches,
        other_widths,
        met_again,
        scored_alone,
        resumed,
        kept,
        sharded,
        labelled,
        labelled_harmless,
        labelled_failing,
        labelled_sharded,
        labelled_writing,
        *map(asked, ASKED),
    )
}


class Save(Callback):
    """What a process finds that will be gone."""

    def __init__(self, probes: LinearProbeCallback, path: str) -> None:
        self.probes = probes
        self.path = path

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.probes.report.save(self.path)


def spawned(path: str) -> None:
    probes = LinearProbeCallback()
    options = {"strategy": "ddp_spawn", "devices": 2, "use_distributed_sampler": True}
    train, held_out = (DataLoader(images(n, size=4, seed=n), batch_size=8) for n in (TRAIN, HELD_OUT))
    make_trainer(probes, Save(probes, path), **options).fit(network(), train, held_out)


if __name__ == "__main__":
    if sys.argv[2:] == ["spawned"]:
        spawned(sys.argv[1])
    else:
        torch.save({name: CASES[name]() for name in sys.argv[2:]}, sys.argv[1])
        if NUMBER > 1:
            destroy_process_group()  # gloo's threads may otherwise abort an interpreter that ends
