"""Look at TensorBoard in headless Chromium: the figures, scalars and charts of a network of 40 layers.

python tests/tensorboard_in_browser.py FOLDER [--browser /usr/bin/chromium] [--epochs 4]

Needs ``pip install playwright``. It trains a small residual network with the callback and a TensorBoardLogger, starts
TensorBoard, and holds what it shows against the rows of the report. Screenshots are left in the folder, to be looked
at.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from networks import QUIET, Classifier, ResNet, loader
from playwright.sync_api import Browser, Page, sync_playwright

from lightning_probes import LinearProbeCallback, ProbeReport
from lightning_probes.charts import MOST_LINES

LAYERS = 40
PATIENCE = 60_000
"""Wait so many milliseconds for what TensorBoard has yet to draw."""


def main() -> None:
    """Train, and check and photograph each of TensorBoard's tabs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the logs and the screenshots go")
    found = shutil.which("chromium") or shutil.which("google-chrome")
    parser.add_argument("--browser", default=found, help=f"the program (default {found})")
    parser.add_argument("--epochs", type=int, default=4, help="to train (default 4)")
    args = parser.parse_args()
    report = trained(args.folder / "logs", args.epochs)
    with served(args.folder / "logs") as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.browser, args=["--no-sandbox"])
        for tab, check in (
            ("timeseries", time_series),
            ("images", images),
            ("scalars", scalars),
            ("custom_scalars", charts),
        ):
            with opened(browser, f"{address}#{tab}") as page:
                check(page, report)
                page.wait_for_timeout(1500)  # until TensorBoard's animations have ended
                page.screenshot(path=str(args.folder / f"{tab}.png"))
            print(f"{tab}: as it should be")
        browser.close()


def trained(folder: Path, epochs: int) -> ProbeReport:
    """Return the report of a residual network of 40 layers, trained with TensorBoard's logs in ``folder``."""
    seed_everything(0, verbose=False)
    probes = LinearProbeCallback("net.layer*.*.*", exclude="net.layer*.*.downsample", input=None)
    logger = TensorBoardLogger(folder, name="", version="run")
    trainer = Trainer(**QUIET | {"logger": logger}, max_epochs=epochs, callbacks=[probes], log_every_n_steps=5)
    few: dict[str, Any] = {"size": 4, "channels": 1}
    model = Classifier(ResNet(width=4, channels=1), learning_rate=0.003)
    trainer.fit(model, loader(640, 32, shuffle=True, **few), loader(400, 200, seed=1, **few))
    assert len(probes.report.curves("val")) == epochs + 1
    assert all(len(curve) == LAYERS for curve in probes.report.curves("val").values())
    return probes.report


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder of logs by TensorBoard, on a free port of this machine, and yield its address."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host=127.0.0.1", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            said: list[str] = []
            for line in process.stdout:
                said.append(line)
                if found := re.search(r"http://\S+", line):
                    yield found[0]
                    break
            else:
                raise RuntimeError(f"TensorBoard does not start: {''.join(said)}")
        finally:
            process.terminate()


@contextmanager
def opened(browser: Browser, address: str) -> Iterator[Page]:
    """Open a tab of TensorBoard in a page of its own."""
    page = browser.new_page(viewport={"width": 1440, "height": 1000})
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    yield page
    page.close()


def last_step(report: ProbeReport) -> int:
    """Return the step under which loggers show the last point."""
    return int(report.select(stage="val", metric="error")[-1]["logged_step"])


def time_series(page: Page, report: ProbeReport) -> None:
    """Look for the groups of cards: a layer is a card of its metric and stage, a kind of figure one of the figures."""
    groups = page.locator("metrics-card-groups metrics-card-group-toolbar")
    groups.filter(has_text="probe_error_val").wait_for()
    shown = ["".join(text.split()) for text in groups.all_inner_texts()]
    for group in ("probe_best_error_val", f"probe_error_val{LAYERS}cards", "probes2cards"):
        assert group in shown, (group, shown)
    groups.filter(has_text=re.compile(r"^\s*probes")).locator("button").click()
    page.locator("image-card").nth(1).wait_for()
    for kind in ("depth", "map"):
        card = page.locator("image-card").filter(has_text=f"{kind}_val")
        card.locator("img").scroll_into_view_if_needed()
        wait_for_pictures(page, card.locator("img").count(), "image-card img")
        assert f"Step {last_step(report)}" in " ".join(card.inner_text().split()), card.inner_text()


def images(page: Page, report: ProbeReport) -> None:
    """Look for both figures, of the last step, as pictures that have been loaded."""
    cards = page.locator("tf-image-loader")
    cards.nth(1).wait_for()
    assert sorted(cards.locator(".name").all_inner_texts()) == ["probes/depth_val", "probes/map_val"]
    for card in cards.all():
        card.get_by_text(re.compile(rf"^\s*step\s*{last_step(report)}\s*$")).first.wait_for()
        card.locator("img").wait_for()
        assert card.locator("img").evaluate("(image) => image.decode().then(() => image.naturalWidth)") > 300


def scalars(page: Page, report: ProbeReport) -> None:
    """Look for a category for each metric and stage with all layers, and for the least error as a curve."""
    categories = page.locator("tf-category-paginated-view")
    categories.filter(has_text="probe_error_val").wait_for()
    shown = {" ".join(text.split()) for text in categories.locator("button.heading").all_inner_texts()}
    assert {f"probe_error_val {LAYERS}", f"probe_error_train {LAYERS}", "probe_best_error_val"} <= shown, shown
    category = categories.filter(has_text="probe_error_val")
    category.locator("button.heading").click()
    names = category.locator("tf-scalar-card .name")
    names.nth(11).wait_for()
    layers = {f"probe_error_val/{layer}" for layer in report.curves("val")[0, 0]}
    assert set(names.all_inner_texts()) <= layers
    names.nth(5).scroll_into_view_if_needed()


def charts(page: Page, report: ProbeReport) -> None:
    """Look for charts of at most eight layers, which together have all layers of each stage, in order of depth."""
    cards = page.locator("tf-custom-scalar-multi-line-chart-card")
    cards.first.wait_for()
    of_depth = {row["depth"]: layer for layer, row in next(iter(report.curves("val").values())).items()}
    next_one = {"val": 1, "train": 1}
    for card in cards.all():
        title = " ".join(card.locator(".name").inner_text().split())
        found = re.fullmatch(r"error, (\w+): layers (\d+)-(\d+) \((\S+) … (\S+)\)", title)
        assert found is not None, title
        stage, first, last = found[1], int(found[2]), int(found[3])
        assert first == next_one[stage]
        assert last - first < MOST_LINES
        assert (found[4], found[5]) == (of_depth[first], of_depth[last])
        card.scroll_into_view_if_needed()
        card.get_by_text(f"Matches ({last - first + 1})").wait_for()
        next_one[stage] = last + 1
    assert next_one == {"val": LAYERS + 1, "train": LAYERS + 1}
    cards.first.scroll_into_view_if_needed()


def wait_for_pictures(page: Page, number: int, selector: str) -> None:
    """Wait until so many pictures are loaded."""
    page.wait_for_function(
        "([selector, number]) => [...document.querySelectorAll(selector)]"
        ".filter((image) => image.complete && image.naturalWidth > 300).length >= number",
        arg=[selector, number],
    )


if __name__ == "__main__":
    main()
