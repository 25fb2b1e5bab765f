"""Kills training at a random batch, resumes it from its last checkpoint, and compares with a run never killed.

    python tests/kill_and_resume.py [--seeds N]

Each run is a process of its own, ended by SIGKILL. What is compared are the numbers of every curve and the final
probes, bit by bit, where the host alone resumes bit-equal, which is found out first, without the callback: checkpoints
at the end of an epoch, the order of the data a function of the epoch. Where it does not, inside an epoch, the points
must be those of the run never killed, none lost and none doubled, and the notes must say what is missing.
"""

from __future__ import annotations

import argparse
import io
import logging
import math
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from asked import ASKED
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from networks import QUIET, Classifier, convnet, images, loader, mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler

from lightning_probes import LinearProbeCallback

EPOCHS, BATCHES, BATCH = 4, 10, 16
"""Of every run."""


class ByEpoch(Sampler[int]):
    """Another order in each epoch, the same one in each run."""

    epoch = 0

    def __len__(self) -> int:
        return BATCHES * BATCH

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(len(self), generator=torch.Generator().manual_seed(self.epoch)).tolist()

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class Seeded(Classifier):
    """What dropout draws is a function of epoch and batch: Lightning's checkpoints hold no random states."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(1000 * self.current_epoch + batch_idx)


class Bare(Seeded):
    """Its steps compute with a parameter between two modules: they cannot be run again."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(32, 10))
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU())
        self.gain = nn.Parameter(torch.ones(32))

    def is_bare(self, batch_idx: int) -> bool:
        return True

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = self.body(batch[0])
        logits: Tensor = self.net(hidden * self.gain if self.is_bare(batch_idx) else hidden)
        return F.cross_entropy(logits, batch[1])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", F.cross_entropy(self.net(self.body(batch[0])), batch[1]))


class Odd(Bare):
    """The first step of each epoch but the first cannot be run again."""

    def is_bare(self, batch_idx: int) -> bool:
        return not batch_idx and self.current_epoch > 0


@dataclass(frozen=True)
class Case:
    """A network, its probes, how it is trained."""

    model: Callable[[], Classifier]
    probes: dict[str, Any] = field(default_factory=lambda: {"fit_samples": 64})
    trainer: dict[str, Any] = field(default_factory=dict)
    every_n_train_steps: int | None = None
    validates: bool = True


CASES = {
    "convolutions, dropout": Case(lambda: Seeded(convnet())),
    "30 layers in turn": Case(lambda: Seeded(mlp(depth=14)), {"layers": "net.*", "fit_samples": 64}),
    "online, 30 layers in turn": Case(
        lambda: Seeded(mlp(depth=14)), {"layers": "net.*", "fit_samples": 0, "every_n_epochs": 2}
    ),
    "inside an epoch": Case(lambda: Seeded(mlp()), every_n_train_steps=3),
    "cross-fitted": Case(Bare),
    "a labelled set": Case(lambda: Seeded(convnet()), {"data": (loader(60, seed=5, shuffle=True), loader(40, seed=6))}),
    "steps that differ": Case(Odd),
    "no validation": Case(lambda: Seeded(mlp(depth=2, dropout=0.1)), validates=False),
    "validation twice an epoch": Case(lambda: Seeded(mlp(depth=2)), trainer={"val_check_interval": 0.5}),
    "every second epoch": Case(lambda: Seeded(mlp(depth=2)), {"fit_samples": 64}, {"check_val_every_n_epoch": 2}),
    "several labels": Case(lambda: Seeded(convnet()), {"fit_samples": 64, **ASKED["multilabel"]}),
    "numbers": Case(lambda: Seeded(convnet()), {"fit_samples": 64, **ASKED["regression"]}),
    "pixels": Case(lambda: Seeded(convnet()), {"fit_samples": 192, **ASKED["pixels"]}),
    "online, inside an epoch": Case(lambda: Seeded(mlp(depth=14)), {"fit_samples": 0}, every_n_train_steps=7),
}


class Kill(Callback):
    """The process is gone at once, in the given event of the given number."""

    def __init__(self, event: str, number: int) -> None:
        self._left = number

        def hit(trainer: Trainer, *args: Any) -> None:
            if not trainer.sanity_checking:
                self._left -= 1
                if not self._left:
                    os.kill(os.getpid(), signal.SIGKILL)

        setattr(self, event, hit)


def train(folder: Path, case: Case, kill: Callback | None, ckpt_path: Path | None, *, with_probes: bool) -> None:
    """One run, or what is left of it; leaves ``final.pt`` if it ends."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    seed_everything(3, verbose=False)
    model = case.model()
    keep = ModelCheckpoint(
        folder,
        filename="{step}",
        save_top_k=-1,
        every_n_train_steps=case.every_n_train_steps,
        every_n_epochs=None if case.every_n_train_steps else 1,
        save_on_train_epoch_end=True if "val_check_interval" in case.trainer else None,
    )
    probes = LinearProbeCallback(**case.probes)
    callbacks: list[Callback] = [keep, *[probes] * with_probes, *([] if kill is None else [kill])]
    trainer = Trainer(
        **{**QUIET, "enable_checkpointing": True, "max_epochs": EPOCHS, "default_root_dir": folder, **case.trainer},
        callbacks=callbacks,
    )
    data = DataLoader(images(BATCHES * BATCH), batch_size=BATCH, sampler=ByEpoch())
    trainer.fit(model, data, loader(48, seed=1) if case.validates else None, ckpt_path=ckpt_path, weights_only=True)
    found = {"weights": model.state_dict(), "rows": probes.report.rows, "notes": probes.report.notes}
    if with_probes:
        found["probes"] = probes.state_dict()["probes"]
    torch.save(found, folder / "final.pt")


def run(folder: Path, case: Case, kill: tuple[str, int] | None = None, *, with_probes: bool = True) -> int:
    """A child that trains in ``folder``, from the last checkpoint there; its exit code."""
    folder.mkdir(exist_ok=True)
    found = sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    killer = Kill(*kill) if kill is not None else None
    child = multiprocessing.get_context("fork").Process(
        target=train, args=(folder, case, killer, found[-1] if found else None), kwargs={"with_probes": with_probes}
    )
    child.start()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def equal(one: Any, other: Any) -> bool:
    """Bit by bit, NaN included."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(bits(one), bits(other))
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other) or (isinstance(one, float) and isinstance(other, float) and math.isnan(one + other))


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor


def curves(final: dict[str, Any]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """The rows of every curve, a row a point."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in final["rows"]:
        found.setdefault((row["layer"], row["stage"], row["dataloader"], row["metric"]), []).append(row)
    return found


def random_kill(seed: int, case: Case) -> tuple[str, int]:
    """An event and its number: at a batch of training, before it or after it, or in a validation."""
    chance = random.Random(seed)
    if case.validates and chance.random() < 0.3:
        validations = EPOCHS // case.trainer.get("check_val_every_n_epoch", 1)
        return "on_validation_batch_end", chance.randint(4, 3 * validations)
    return chance.choice(["on_train_batch_start", "on_train_batch_end"]), chance.randint(BATCHES + 2, EPOCHS * BATCHES)


def points(final: dict[str, Any]) -> list[tuple[int, int]]:
    found = {(row["epoch"], row["step"]) for row in final["rows"]}
    return sorted(found)


def compare(whole: dict[str, Any], resumed: dict[str, Any], case: Case) -> tuple[int, int, str]:
    """Curves that differ, of how many; what else is wrong."""
    one, other = curves(whole), curves(resumed)
    gaps = [note for note in resumed["notes"] if "resumed at step" in note]
    excused = set()
    if "val_check_interval" in case.trainer and gaps:
        # The point inside the epoch that was resumed, as the note says.
        epochs = {int(note.split()[1]) for note in gaps}
        excused = {point for point in points(whole) if point[0] + 1 in epochs and point[1] % BATCHES}

    def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row for row in rows if (row["epoch"], row["step"]) not in excused]

    keys = one.keys() | other.keys()
    differ = sum(not equal(compared(one.get(key, [])), compared(other.get(key, []))) for key in keys)
    wrong = [] if points(whole) == points(resumed) else [f"points {points(resumed)}, not {points(whole)}"]
    counts = [len(rows) == len(other.get(key, [])) for key, rows in one.items()]
    wrong += [] if all(counts) else ["points lost or doubled"]
    wrong += [] if excused or equal(whole["probes"], resumed["probes"]) else ["the final probes differ"]
    return differ, len(one), "; ".join(wrong)


def sizes(folder: Path) -> str:
    """Bytes of the last checkpoint, split up."""
    last = max(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    saved = torch.load(last, weights_only=True)
    (key,) = [key for key in saved["callbacks"] if "LinearProbe" in key]
    mine = saved["callbacks"].pop(key)
    without = size_of(saved)
    banks = [mine["probes"]["along"]["bank"] or {}, mine["probes"]["optimum"].get("bank", {})]
    parts = dict.fromkeys(("probes", "statistics", "optimiser"), 0)
    kinds = {"weight": "probes", "bias": "probes"} | dict.fromkeys(("mean", "variance", "alive"), "statistics")
    for bank in banks:
        for stack in bank.values():
            for name, tensor in stack["tensors"].items():
                parts[kinds.get(name, "optimiser")] += tensor.numel() * tensor.element_size()
    parts["report"] = size_of(mine["report"])
    split = ", ".join(f"{name} {size:,}" for name, size in parts.items())
    return f"checkpoint of {last.stat().st_size:,} bytes, {without:,} without the callback; it adds {split}"


def size_of(value: Any) -> int:
    torch.save(value, buffer := io.BytesIO())
    return buffer.tell()


def assert_host(folder: Path, name: str, case: Case) -> None:
    """The host alone resumes bit-equal; and the callback does not change it."""
    assert run(folder / "host", case, with_probes=False) == 0
    kill = ("on_train_batch_end", 2 * BATCHES + 7)
    assert run(folder / "resumed host", case, kill, with_probes=False) == -signal.SIGKILL
    assert run(folder / "resumed host", case, with_probes=False) == 0
    one, other = (torch.load(folder / run / "final.pt")["weights"] for run in ("host", "resumed host"))
    assert equal(one, other), f"{name}: the host alone does not resume bit-equal"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, default=20)
    seeds = parser.parse_args(arguments).seeds
    torch.set_num_threads(1)
    begun, kills, differ, total, failures = time.perf_counter(), 0, 0, 0, 0
    with tempfile.TemporaryDirectory() as kept:
        wholes: dict[str, dict[str, Any]] = {}
        for seed in range(seeds):
            name = list(CASES)[seed % len(CASES)]
            case, folder = CASES[name], Path(kept) / f"case {seed % len(CASES)}"
            folder.mkdir(exist_ok=True)
            if name not in wholes:
                if case.every_n_train_steps is None:
                    assert_host(folder, name, case)
                assert run(folder / "whole", case) == 0
                wholes[name] = torch.load(folder / "whole" / "final.pt")
                print(f"{name}: {sizes(folder / 'whole')}", flush=True)
            event, number = random_kill(seed, case)
            code = run(folder / str(seed), case, (event, number))
            kills += code == -signal.SIGKILL
            ended = run(folder / str(seed), case)
            line = f"seed {seed}, {name}: {event} {number}"
            if code != -signal.SIGKILL or ended != 0:
                failures += 1
                print(f"{line}: exit codes {code}, {ended}", flush=True)
                continue
            resumed = torch.load(folder / str(seed) / "final.pt")
            changed, of, wrong = compare(wholes[name], resumed, case)
            if case.every_n_train_steps is not None:
                # Here the host is not bit-equal.
                notes = "; ".join(note for note in resumed["notes"] if "resumed" in note)
                wrong = wrong.removesuffix("the final probes differ")
                wrong += "" if notes or not case.probes["fit_samples"] else "no note"
                print(f"{line}: {wrong or 'all points are there'}; notes: {notes or 'none'}", flush=True)
            else:
                differ, total = differ + changed, total + of
                print(f"{line}: {changed} of {of} curves differ{f'; {wrong}' if wrong else ''}", flush=True)
            failures += bool(wrong)
    print(
        f"{seeds} seeds, {kills} kills, {differ} of {total} curves differ, {failures} runs otherwise wrong "
        f"({time.perf_counter() - begun:.0f} s)"
    )
    return int(bool(differ or failures or kills < seeds))


if __name__ == "__main__":
    sys.exit(main())
