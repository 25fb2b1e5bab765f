"""A long run: memory stays as it is, and so does the number of hooks."""

from __future__ import annotations

import gc
import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from networks import QUIET, Classifier, images
from torch import nn
from torch.utils.data import DataLoader

from lightning_probes import LinearProbeCallback

STEPS, EPOCH, WARM, TRACED = 12_000, 1_500, 3_000, 9_000
"""In all, in an epoch, until memory is first looked at, until it is traced, which makes a step three times as long."""


class Loop(DataLoader[Any]):
    """The same few batches over and over, cut beforehand: nothing is spent on data."""

    def __init__(self, batches: int) -> None:
        super().__init__(images(32, size=4, classes=4), batch_size=8)
        self._batches = batches
        self._cut = list(super().__iter__())

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Any:
        return (self._cut[i % len(self._cut)] for i in range(self._batches))


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def hooks(model: nn.Module) -> int:
    found = [m.__dict__[name] for m in model.modules() for name in m.__dict__ if name.endswith("_hooks")]
    return sum(len(registered) for registered in found if registered is not None)


class Look(Callback):
    """What the process holds once an epoch, resident and traced bytes and hooks, and the time of a step until then."""

    def __init__(self) -> None:
        self.resident: list[int] = []
        self.traced: list[int] = []
        self.hooks: set[int] = set()
        self.milliseconds: list[float] = []
        self._since = time.process_time()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if step == TRACED:
            tracemalloc.start()
        # In the middle of an epoch, when the batches of the one before are gone.
        if step % EPOCH != EPOCH // 2:
            return
        if step < TRACED:
            steps = EPOCH if self.milliseconds else EPOCH // 2
            self.milliseconds.append(1000 * (time.process_time() - self._since) / steps)
        gc.collect()
        self.hooks.add(hooks(pl_module))
        if tracemalloc.is_tracing():
            self.traced.append(tracemalloc.get_traced_memory()[0])
            if len(self.traced) == 2:
                tracemalloc.stop()
        elif step >= WARM:
            self.resident.append(resident())
        self._since = time.process_time()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_thousands_of_steps_take_no_more_memory_than_a_few(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    probes, look = LinearProbeCallback("net.3", input=None, fit_samples=32), Look()
    trainer = Trainer(**QUIET, max_steps=STEPS, callbacks=[probes, look], default_root_dir=tmp_path)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.LeakyReLU(), nn.Linear(8, 4))
    model = Classifier(net, num_classes=4)
    model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    before = hooks(model)
    try:
        trainer.fit(model, Loop(EPOCH), Loop(4))
    finally:
        tracemalloc.stop()
        torch.set_num_threads(threads)
    print(f"milliseconds a step: {', '.join(f'{t:.3f}' for t in look.milliseconds)}")
    print(f"bytes: resident {look.resident}, traced {look.traced}")
    assert trainer.global_step == STEPS
    assert look.hooks == {before + 1}
    assert hooks(model) == before
    assert (len(look.resident), len(look.traced)) == (4, 2)
    assert look.resident[-1] - look.resident[0] < 4 * 2**20
    # An epoch's six rows in the report; ten bytes a step would be as much.
    assert look.traced[1] - look.traced[0] < 10 * EPOCH
