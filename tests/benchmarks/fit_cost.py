"""What bringing all probes to their optimum costs, as a share of an epoch of 50 000 and of 20 000 samples.

python tests/benchmarks/fit_cost.py              # both networks, about a quarter of an hour on 2 cores
python tests/benchmarks/fit_cost.py vit --samples 2048
"""

from __future__ import annotations

import argparse
import logging
import platform
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))
from networks import Classifier, ResNet, ViT, images

from lightning_probes import LinearProbeCallback
from lightning_probes.probes.tasks import Classification

NETWORKS = {"resnet": ("18-layer residual network, 32x32x3", ResNet), "vit": ("ViT, 12 blocks of 192, 32x32x3", ViT)}
TARGETS = {50_000: 0.10, 20_000: 0.25}


class Stopwatch(Callback):
    """Seconds between the starts of batches; leaves the starting point out of what the fit takes."""

    def __init__(self, probes: LinearProbeCallback) -> None:
        self.probes = probes
        self.starts: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.probes._session.refit._drop_start()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.starts.append(time.perf_counter())

    @property
    def step(self) -> float:
        """Median of all steps but the first."""
        pairs = zip(self.starts[1:], self.starts[2:], strict=False)
        return statistics.median(after - before for before, after in pairs)


def measure(network: str, samples: int, batch_size: int) -> None:
    seed_everything(0, verbose=False)
    probes = LinearProbeCallback(fit_samples=samples)
    watch = Stopwatch(probes)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[probes, watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = images(samples, size=32, channels=3)
    trainer.fit(Classifier(NETWORKS[network][1](), learning_rate=1e-3), DataLoader(data, batch_size=batch_size))
    seconds = probes.report.cost["seconds"]
    fitted = max(row["fitted_on"]["samples"] for row in probes.report.rows)
    print(f"\n{NETWORKS[network][0]}: {watch.step:.2f} s a step, {seconds:.1f} s to fit on {fitted} samples")
    for epoch, target in TARGETS.items():
        share = seconds / (watch.step * epoch / batch_size)
        print(f"  epoch of {epoch:,} samples: {share:.1%} (target {target:.0%})", flush=True)


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
