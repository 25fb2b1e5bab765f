"""What bringing all probes to their optimum costs, as a share of an epoch of 50 000 and of 20 000 samples.

python tests/benchmarks/fit_cost.py              # all networks, about half an hour on 2 cores
python tests/benchmarks/fit_cost.py vit --samples 2048

The price of ten epochs of 50 000 samples, everything included but validation, is extrapolated: ten epochs of steps with
probes and eleven fits, the starting point's among them, over ten epochs of steps without. Steps with and without probes
are timed in turns, before the run whose fit is timed.
"""

from __future__ import annotations

import argparse
import logging
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))
from networks import Classifier, ResNet, ViT, images

from lightning_probes import LinearProbeCallback
from lightning_probes.tasks.classification import Classification

NETWORKS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "small": ("residual network of 16-32-64-128, 32x32x3", lambda: ResNet(width=16)),
    "resnet": ("18-layer residual network, 32x32x3", ResNet),
    "vit": ("ViT, 12 blocks of 192, 32x32x3", ViT),
}
TARGETS = {50_000: 0.10, 20_000: 0.25}
PRICES = {"small": 1.15, "resnet": 1.10, "vit": 1.10}
EPOCHS, SAMPLES = 10, 50_000
TIMED = 12
"""Give the steps of each run in which steps are timed; the first is left out."""


class Stopwatch(Callback):
    """Seconds between the starts of batches; leaves the starting point out of what the fit takes."""

    def __init__(self, probes: LinearProbeCallback | None = None) -> None:
        self.probes = probes
        self.starts: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.probes is not None:
            self.probes._session.refit._drop_start()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.starts.append(time.perf_counter())

    @property
    def step(self) -> float:
        """Median of all steps but the first."""
        pairs = zip(self.starts[1:], self.starts[2:], strict=False)
        return statistics.median(after - before for before, after in pairs)


def train(network: str, samples: int, batch_size: int, probes: LinearProbeCallback | None) -> Stopwatch:
    """Train for an epoch of so many samples."""
    seed_everything(0, verbose=False)
    watch = Stopwatch(probes)
    callbacks: list[Callback] = [watch] if probes is None else [probes, watch]
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = DataLoader(images(samples, size=32, channels=3), batch_size=batch_size)
    trainer.fit(Classifier(NETWORKS[network][1](), learning_rate=1e-3), data)
    return watch


def measure(network: str, samples: int, batch_size: int) -> None:
    steps: dict[bool, list[float]] = {True: [], False: []}
    for is_probed in (False, True, True, False):
        probes = LinearProbeCallback(fit_samples=samples) if is_probed else None
        watch = train(network, TIMED * batch_size, batch_size, probes)
        steps[is_probed].append(watch.step)
    bare, probed = (statistics.mean(steps[is_probed]) for is_probed in (False, True))
    probes = LinearProbeCallback(fit_samples=samples)
    train(network, samples, batch_size, probes)
    seconds = probes.report.cost["seconds"]
    fitted = max(row["fitted_on"]["samples"] for row in probes.report.rows)
    print(f"\n{NETWORKS[network][0]}: {bare:.2f} s a step, {seconds:.1f} s to fit on {fitted} samples")
    for epoch, target in TARGETS.items():
        share = seconds / (bare * epoch / batch_size)
        print(f"  epoch of {epoch:,} samples: {share:.1%} (target {target:.0%})", flush=True)
    whole = EPOCHS * SAMPLES / batch_size
    price = (whole * probed + (EPOCHS + 1) * seconds) / (whole * bare)
    print(
        f"  {EPOCHS} epochs of {SAMPLES:,}: {price:.2f} (target {PRICES[network]:.2f}); a step {probed / bare:.3f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), help=f"of {list(NETWORKS)}")
    default = Classification(10).enough_samples
    parser.add_argument("--samples", type=int, default=default, help=f"kept and run again (default {default})")
    parser.add_argument("--batch-size", type=int, default=128)
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for network in args.networks:
        measure(network, args.samples, args.batch_size)


if __name__ == "__main__":
    main()
