"""How the price of bringing probes to their optimum grows with layers, width, classes and samples, one at a time.

python tests/benchmarks/scaling.py                 # four tables with their exponents, and the largest case
python tests/benchmarks/scaling.py width classes

Each case runs in a process of its own, on one thread: the processor time of a fit, the choice of the strength of L2
included; the growth of the memory of the process at its peak, beside the bytes of the features; the rate of the
products with the features, as a share of that of a large matrix product on this machine. The exponent is the slope of
time over the factor on logarithmic axes, by least squares over the larger half of the cases.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lightning_probes.distributed import Ranks
from lightning_probes.probes.dataset import FeatureDataset, LayerBatch, MemoryStore
from lightning_probes.probes.fit import fit_layers
from lightning_probes.probes.rows import Rows
from lightning_probes.probes.solver import Problems
from lightning_probes.tasks.classification import Classification


@dataclass(frozen=True)
class Case:
    """What is fitted."""

    layers: int = 1
    width: int = 256
    classes: int = 10
    samples: int = 10_000


FACTORS: dict[str, list[Case]] = {
    "layers": [Case(layers=n, width=64, samples=2_000) for n in (1, 4, 16, 64, 256)],
    "width": [Case(width=n) for n in (64, 256, 1024, 2048, 4096)],
    "classes": [Case(classes=n, samples=20_000) for n in (2, 10, 100, 300, 1000)],
    "samples": [Case(samples=n) for n in (1_000, 5_000, 20_000, 50_000, 100_000)],
    "largest": [Case(width=2048, classes=1000, samples=100_000)],
}
GREATEST = {"layers": 1.1, "classes": 1.1, "samples": 1.1}


def data_of(case: Case) -> FeatureDataset:
    """Return features in which a class can be seen through noise, their variances from 1 to 1e-3."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(case.classes, (case.samples,), generator=generator)
    means = torch.randn(case.classes, case.width, generator=generator)
    scale = torch.logspace(0, -1.5, case.width)
    dataset = FeatureDataset(Classification(case.classes), MemoryStore())
    targets = torch.zeros(case.samples, case.classes, dtype=torch.bool)
    targets[torch.arange(case.samples), labels] = True
    for rows in torch.arange(case.samples).split(1_000):  # type: ignore[no-untyped-call]
        shown = 2 / math.sqrt(case.width) * means[labels[rows]]
        features = {
            f"layer {i}": (shown + torch.randn(len(rows), case.width, generator=generator)) * scale
            for i in range(case.layers)
        }
        dataset.add(LayerBatch(features, targets[rows].float()))
    return dataset


def count_products() -> list[float]:
    """Make products with features add their operations to the list that is returned."""
    done = [0.0]

    def counted(owner: type, name: str, operations: Any) -> None:
        original = getattr(owner, name)

        def call(self: Any, *given: Any, **options: Any) -> Any:
            done[0] += operations(self, *given, **options)
            return original(self, *given, **options)

        setattr(owner, name, call)

    counted(Problems, "evaluate", lambda problems, v, **options: 4.0 * v.numel() * problems.x.samples)
    counted(Rows, "gram", lambda rows, weights=None: 1.25 * rows.samples * rows.width**2)
    return done


def peak() -> float:
    """Return the greatest memory of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def run(case: Case) -> dict[str, float]:
    """Fit a case in this process."""
    torch.set_num_threads(1)
    x = torch.randn(2_000, 2_000)
    begun = time.process_time()
    for _ in range(5):
        x @ x
    rate = 5 * 2 * 2_000**3 / (time.process_time() - begun)
    dataset = data_of(case)
    before, done = peak(), count_products()
    begun = time.process_time()
    found = fit_layers(
        Classification(case.classes),
        dataset,
        dataset.layers,
        "train",
        ranks=Ranks(),
        device=torch.device("cpu"),
        track=lambda name, items, total: items,
    )
    seconds = time.process_time() - begun
    assert found is not None
    return {
        "seconds": seconds,
        "memory": peak() - before,
        "features": 4 * case.layers * case.samples * case.width / 2**30,
        "share": done[0] / seconds / rate,
        "converged": all(known["converged"] for known in found.known.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("factors", nargs="*", default=list(FACTORS), help=f"of {list(FACTORS)}")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run(Case(**json.loads(args.case)))))
        return
    print(f"{platform.machine()}, one thread, torch {torch.__version__}")
    for factor in args.factors:
        print(
            f"\n{'layers':>7}{'width':>7}{'classes':>9}{'samples':>9}{'fit':>10}{'memory':>10}{'features':>10}{'rate':>7}"
        )
        times: list[tuple[float, float]] = []
        for case in FACTORS[factor]:
            command = [sys.executable, __file__, "--case", json.dumps(vars(case))]
            told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found = json.loads(told)
            times.append((getattr(case, factor, 1), found["seconds"]))
            print(
                f"{case.layers:>7}{case.width:>7}{case.classes:>9}{case.samples:>9}{found['seconds']:>8.2f} s"
                f"{found['memory']:>6.2f} GiB{found['features']:>6.2f} GiB{found['share']:>6.0%}"
                + ("" if found["converged"] else "  not at the optimum"),
                flush=True,
            )
        if len(times) > 2:
            x, y = np.log(np.array(times[len(times) // 2 :])).T
            most = f" (at most {GREATEST[factor]})" if factor in GREATEST else ""
            print(f"time grows with the power {np.polyfit(x, y, 1)[0]:.2f} of {factor}{most}")


if __name__ == "__main__":
    main()
