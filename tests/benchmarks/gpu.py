"""What probes cost on a GPU: a network of the size of ResNet-50 in bfloat16, 17 layers, 1 000 classes, 100 000 samples.

python tests/benchmarks/gpu.py                                                # a few minutes on a data-centre GPU
python tests/benchmarks/gpu.py --device cpu --samples 512 --classes 10 --width 8 --size 64 --batch-size 32

A step is timed with probes and without, in turns; no step but the first may wait for the device, which raises. Then the
fit of all probes at an epoch's end is timed: running the kept batches again, and bringing the probes to their optimum.
The operations of products with the features, over the time of the latter, are given as a share of the rate of a large
product in float32 on the same device.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.scaling import count_products
from networks import QUIET, Classifier

from lightning_probes import LinearProbeCallback
from lightning_probes.training import refit


class Bottleneck(nn.Module):
    """A residual block of three convolutions."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(out)))))
        return self.relu(out + self.shortcut(x))  # type: ignore[no-any-return]


class ResNet50(nn.Module):
    """A stem, 16 bottleneck blocks and a head."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        blocks, inputs = [], width
        for stage, number in enumerate((3, 4, 6, 3)):
            for i in range(number):
                blocks.append(Bottleneck(inputs, width * 2**stage, 2 if stage and not i else 1))
                inputs = 4 * width * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean(dim=(2, 3)))  # type: ignore[no-any-return]


class Images(IterableDataset[Any]):
    """Batches of noisy images made on the device, each with a coarse pattern of its class."""

    def __init__(self, samples: int, classes: int, batch_size: int, size: int, device: str) -> None:
        self.shape, self.classes = (samples, batch_size, size), classes
        generator = torch.Generator(device).manual_seed(1)
        self.patterns = torch.randn(classes, 3, 8, 8, generator=generator, device=device)

    def __len__(self) -> int:
        return self.shape[0] // self.shape[1]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        _, batch_size, size = self.shape
        place: dict[str, Any] = {"device": self.patterns.device}
        place["generator"] = torch.Generator(self.patterns.device).manual_seed(2)
        for _ in range(len(self)):
            labels = torch.randint(self.classes, (batch_size,), **place)
            shown = nn.functional.interpolate(self.patterns[labels], size=(size, size))
            yield (shown / 40 + torch.randn(batch_size, 3, size, size, **place)).bfloat16(), labels


def wait(device: str) -> None:
    """Wait until the device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


class Watch(Callback):
    """Time steps, and raise if one of them waits for the device; a :class:`Beginning` before the probes begins each."""

    def __init__(self, device: str) -> None:
        self.device, self.steps, self.begun = device, [0.0], 0.0

    def begin(self, trainer: Trainer) -> None:
        wait(self.device)
        if trainer.global_step and self.device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        self.begun = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        wait(self.device)
        self.steps.append(time.perf_counter() - self.begun)

    @property
    def step(self) -> float:
        """Median of the later half of the steps, in seconds."""
        return statistics.median(self.steps[len(self.steps) // 2 :])


class WithoutStart(LinearProbeCallback):
    """Probes without a starting point, which would be fitted with the first point."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._session.refit._drop_start()


def train(args: argparse.Namespace, batches: int, probes: LinearProbeCallback | None) -> tuple[Watch, float]:
    """Train for some steps; return what was timed, and the seconds of the whole run."""
    seed_everything(0, verbose=False)
    watch = Watch(args.device)
    others: list[Callback] = [] if probes is None else [probes]
    callbacks = [Beginning(watch), *others, watch]
    options = {**QUIET, "accelerator": args.device, "precision": "bf16-true", "limit_train_batches": batches}
    trainer = Trainer(**options, max_epochs=1, callbacks=callbacks)
    images = Images(args.samples, args.classes, args.batch_size, args.size, args.device)
    model = Classifier(ResNet50(args.classes, args.width), learning_rate=1e-3)
    begun = time.perf_counter()
    trainer.fit(model, DataLoader(images, batch_size=None))
    wait(args.device)
    return watch, time.perf_counter() - begun


class Beginning(Callback):
    """Begin to time a step before the probes see it."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.watch.begin(trainer)


def rate_of(device: str) -> float:
    """Return the operations a second of a large product in float32."""
    size = 8192 if device == "cuda" else 2000
    x = torch.randn(size, size, device=device)
    for done in range(4):
        if done == 1:
            wait(device)
            begun = time.perf_counter()
        x @ x
    wait(device)
    return 3 * 2 * size**3 / (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--width", type=int, default=64, help="of the first stage; a ResNet-50 has 64")
    parser.add_argument("--size", type=int, default=128, help="of the images")
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--rounds", type=int, default=2, help="of timed steps, with and without probes in turn")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}", flush=True)
    steps = min(args.samples // args.batch_size, 60)
    layers = ["net.stem", "net.blocks.*"]
    for _ in range(args.rounds):
        without = train(args, steps, None)[0].step
        online = train(args, steps, LinearProbeCallback(layers, num_classes=args.classes, fit_samples=0))[0].step
        print(f"step {without * 1e3:.1f} ms, with online probes {online / without:.3f} of it", flush=True)
    done, seconds = count_products(), [0.0]
    fit: Any = vars(refit)["fit_layers"]

    def timed(*given: Any, **options: Any) -> Any:
        wait(args.device)
        begun = time.perf_counter()
        found = fit(*given, **options)
        wait(args.device)
        seconds[0] += time.perf_counter() - begun
        return found

    vars(refit)["fit_layers"] = timed
    probes = WithoutStart(
        layers, num_classes=args.classes, fit_samples=args.samples, fit_bytes=2**35, fit_on_device=True
    )
    watch, whole = train(args, args.samples // args.batch_size, probes)
    rows = [row for row in probes.report.rows if row["metric"] == "error"]
    print(
        f"step with probes {watch.step / without:.3f}; pause {probes.report.cost['seconds']:.1f} s"
        f" of a run of {whole:.1f} s for {len(rows)} layers, {rows[0]['fitted_on']['samples']:,} samples"
    )
    rate = rate_of(args.device)
    print(
        f"  to their optimum {seconds[0]:.1f} s, {done[0]:.2e} operations in products:"
        f" {done[0] / seconds[0] / rate:.0%} of {rate:.2e} a second"
    )
    if args.device == "cuda":
        print(f"  memory of the device at its peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    for row in rows:
        told = "" if row["converged"] else ", not at the optimum"
        print(f"  {row['layer']:<12}{row['value']:>7.1%}  l2={row['l2'] or 0:.0e}{told}")


if __name__ == "__main__":
    main()
