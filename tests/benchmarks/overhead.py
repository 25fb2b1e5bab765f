"""What probing costs a training step: CPU time, interleaved, medians; and memory, from the tensors' allocations.

python tests/benchmarks/overhead.py             # all networks, about forty minutes
python tests/benchmarks/overhead.py mlp --rounds 3
"""

from __future__ import annotations

import argparse
import gc
import logging
import platform
import statistics
import sys
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))
from networks import Classifier, ResNet, ViT, mlp

from lightning_probes import LinearProbeCallback
from lightning_probes.network.hooks import ActivationRecorder
from lightning_probes.network.pooling import Reducer

NETWORKS: dict[str, tuple[str, Callable[[], nn.Module], tuple[int, ...], str | None]] = {
    "mlp": ("MLP, 128 layers of 128, 128 probes", lambda: mlp(128, 128, 784), (1, 28, 28), "LeakyReLU"),
    "resnet": ("18-layer residual network, 32x32x3", ResNet, (3, 32, 32), None),
    "vit": ("ViT, 12 blocks of 192, 32x32x3", ViT, (3, 32, 32), None),
}
TARGETS = {"mlp": 1.15, "resnet": 1.05, "vit": 1.05}


class HandRolled(Callback):
    """What one writes without a library: hooks, a head a layer; ``heads`` says how they are trained."""

    def __init__(self, layers: dict[str, nn.Module], heads: str) -> None:
        self.layers, self.heads = layers, heads
        self.recorder = ActivationRecorder(Reducer())
        self.modules: dict[str, nn.Linear] = {}
        self.optimizers: list[torch.optim.Optimizer] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.recorder.attach(self.layers)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.recorder.start(len(batch[1]))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        features = self.recorder.stop().features
        if self.heads == "none":
            return
        if not self.modules:
            self.modules = {layer: nn.Linear(x.shape[1], 10) for layer, x in features.items()}
            parameters = [list(head.parameters()) for head in self.modules.values()]
            if self.heads == "loop":
                self.optimizers = [torch.optim.Adam(p, 1e-3) for p in parameters]
            else:
                self.optimizers = [torch.optim.Adam([q for p in parameters for q in p], 1e-3, fused=True)]
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        losses = [F.cross_entropy(self.modules[layer](x), batch[1]) for layer, x in features.items()]
        if self.heads == "loop":
            for loss, optimizer in zip(losses, self.optimizers, strict=True):
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        else:
            torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
            self.optimizers[0].step()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.recorder.detach()


class Stopwatch(Callback):
    """CPU seconds from the start of one batch to the start of the next, the first left out."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.times.append(time.process_time())

    def steps(self) -> list[float]:
        return [after - before for before, after in zip(self.times[1:], self.times[2:], strict=False)]


def data(shape: tuple[int, ...], samples: int, batch_size: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(samples, *shape), torch.randint(10, (samples,))), batch_size=batch_size)


def fit(model: LightningModule, loader: DataLoader[Any], *callbacks: Callback) -> None:
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader)


def variants(model: Classifier, layers: str | None) -> dict[str, Callable[[], list[Callback]]]:
    """The ways to probe, each made anew for every stretch of training."""
    probes = online_probes(layers)
    probes._network.attach(model)
    chosen = {layer: model.get_submodule(layer) for layer in probes._network.layers if layer != "input"}
    probes._network.detach()
    return {
        "bare": list,
        "hooks only": lambda: [HandRolled(chosen, "none")],
        "nn.Linear + Adam a layer": lambda: [HandRolled(chosen, "loop")],
        "joint fused Adam": lambda: [HandRolled(chosen, "joint")],
        "LinearProbeCallback": lambda: [LinearProbeCallback(layers, input=None)],
        "the same, fit_samples=0": lambda: [online_probes(layers)],
    }


def online_probes(layers: str | None) -> LinearProbeCallback:
    """The online part alone, without the raw input, as the hand-rolled ones."""
    return LinearProbeCallback(layers, input=None, fit_samples=0)


def measure_time(network: str, rounds: int, steps: int, batch_size: int) -> dict[str, tuple[float, float]]:
    """``{variant: (CPU milliseconds a step, ratio to bare)}``: medians of the rounds."""
    _, make, shape, layers = NETWORKS[network]
    seed_everything(0, verbose=False)
    model = Classifier(make(), learning_rate=1e-4)
    loader = data(shape, (steps + 2) * batch_size, batch_size)
    ways = variants(model, layers)
    seen: dict[str, list[float]] = {way: [] for way in ways}
    fit(model, loader)
    for i in range(rounds):
        # Another way is first in every round: whoever is first pays for what the machine did before.
        for way in [*ways][i % len(ways) :] + [*ways][: i % len(ways)]:
            callbacks = ways[way]
            watch = Stopwatch()
            fit(model, loader, *callbacks(), watch)
            seen[way].append(statistics.median(watch.steps()))
    return {
        way: (
            1e3 * statistics.median(times),
            statistics.median(t / bare for t, bare in zip(times, seen["bare"], strict=True)),
        )
        for way, times in seen.items()
    }


class PeakMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The highest sum of the bytes of all tensors that were made inside it and still live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: int = 0
        self.peak: int = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
                self.peak = max(self.peak, self.live)
        return result

    def _free(self, size: int) -> None:
        self.live -= size


def peak_bytes(model: LightningModule, loader: DataLoader[Any], *callbacks: Callback) -> int:
    """The highest sum of live allocations that a fit makes, above what was there before."""
    gc.collect()
    meter = PeakMeter()
    with meter:
        fit(model, loader, *callbacks)
    return meter.peak


def measure_memory(network: str, side: int, batch_size: int = 32) -> tuple[float, float]:
    """MiB that the online part adds to the peak, and MiB of reduced features, probes and optimiser state."""
    _, make, (channels, *_), layers = NETWORKS[network]
    shape = (channels, side, side)
    loader = data(shape, 3 * batch_size, batch_size)
    if network == "mlp":
        make = lambda: mlp(128, 128, side * side)  # noqa: E731
    probes = online_probes(layers)
    bare = peak_bytes(Classifier(make()), loader)
    probed = peak_bytes(Classifier(make()), loader, probes)
    assert probes._session is not None
    bank = probes._session.online.probes
    assert bank is not None
    held = bank.num_bytes + 4 * batch_size * sum(bank.widths.values())
    return (probed - bare) / 2**20, held / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), help=f"of {list(NETWORKS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="timed steps a round; ten times as many for the MLP")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1, help="of torch; waiting threads would count as work")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for network in args.networks:
        title = NETWORKS[network][0]
        steps = args.steps * (10 if network == "mlp" else 1)
        print(f"\n{title}, batch {args.batch_size}: target {TARGETS[network]}")
        for way, (milliseconds, ratio) in measure_time(network, args.rounds, steps, args.batch_size).items():
            print(f"  {way:<28}{milliseconds:>9.1f} ms{ratio:>8.3f}", flush=True)
    if not args.memory:
        return
    print("\nmemory at batch 32: increase of the peak / features, probes, optimiser state (target <= 1.2)")
    for network, sides in (("mlp", (28, 56)), ("resnet", (32, 64))):
        for side in sides:
            more, held = measure_memory(network, side)
            print(f"  {network:<8}{side}x{side}{more:>9.2f} MiB /{held:>8.2f} MiB ={more / held:>6.2f}", flush=True)


if __name__ == "__main__":
    main()
