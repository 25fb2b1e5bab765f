"""Look at the page in headless Chromium: 5, 40 and 300 layers, wide and narrow, light and dark.

python tests/page_in_browser.py FOLDER [--browser /usr/bin/chromium] [--layers 5 40 300]

Needs ``pip install playwright``. It moves the slider, plays, points, searches and presses keys, and holds what the page
then shows against the rows of the report; there may be no message in the console, and no request but for the page.
Screenshots are left in the folder, to be looked at.
"""

from __future__ import annotations

import argparse
import math
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import ROUND_HALF_UP, Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

from pages import bridge, names, page_with, said
from playwright.sync_api import Browser, Page, sync_playwright

from lightning_probes import ProbeReport
from lightning_probes.report.files import write_whole

SIZES = {5: 6, 40: 30, 300: 100}
"""Moments, by the number of layers."""

WINDOWS = {"wide": (1440, 900), "tablet": (860, 1000), "phone": (390, 844)}


def main() -> None:
    """Check and photograph every size, window and theme."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the pages and the screenshots go")
    found = shutil.which("chromium") or shutil.which("google-chrome")
    parser.add_argument("--browser", default=found, help=f"the program (default {found})")
    parser.add_argument("--layers", type=int, nargs="*", default=list(SIZES), help="which sizes (default all)")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.browser, args=["--no-sandbox"])
        for layers in args.layers:
            report = bridge(names(layers), SIZES[layers])
            file = args.folder / f"{layers}_layers.html"
            write_whole(file, page_with_findings(report, names(layers)))
            for window in WINDOWS:
                for theme in ("light", "dark"):
                    with opened(browser, file, window, theme) as page:
                        look(page, report, args.folder / f"{layers}_layers_{window}_{theme}", window)
                    print(f"{layers} layers, {window}, {theme}: as it should be")
        strange(browser, args.folder)
        print("strange names: as they should be")
        browser.close()


def page_with_findings(report: ProbeReport, layers: list[str]) -> str:
    """Return a page with a finding on the span inside, and two layers that are marked as best."""
    span = tuple(layers[int(0.35 * len(layers)) + 1 : math.ceil(0.75 * len(layers))])
    told = said(f"{len(span)} layers from {span[0]} to {span[-1]} are worse than those on both sides.", span)
    return page_with(report, [told], layers[-2:])


@contextmanager
def opened(browser: Browser, file: Path, window: str, theme: Any) -> Iterator[Page]:
    """Open a page from disk, and see to it that it says nothing in the console and asks for nothing else."""
    width, height = WINDOWS[window]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme)
    heard: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on("dialog", lambda dialog: heard.append(f"dialog: {dialog.message}"))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    yield page
    page.wait_for_timeout(600)  # until the address has been written
    assert not heard, heard
    assert [url.split("#")[0] for url in asked if not url.startswith("data:")] == [file.as_uri()], asked
    page.close()


def look(page: Page, report: ProbeReport, file: Path, window: str) -> None:
    """Use the page as a reader would; fail if what it shows is not what the report says."""
    page.screenshot(path=f"{file}.png", full_page=True)
    curves = list(report.curves("val").values())
    last = len(curves) - 1
    agrees(page, report, last)
    moves(page, report, last)
    keys(page, report, last)
    points(page, report, file, last)
    searches(page, report, file, window)
    reads(page, report, last)
    other_views(page, report, last)
    changes_theme(page)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "it is wider than the window"


def agrees(page: Page, report: ProbeReport, moment: int) -> None:
    """Hold all panels against the rows of a moment: numbers, colours, and the curve."""
    settle(page)
    curve = list(report.curves("val").values())[moment]
    lines = page.evaluate(
        """() => [...document.querySelectorAll("#lines .line")].map((line) => ({
            says: line.getAttribute("aria-label"),
            colour: getComputedStyle(line.querySelector(".swatch")).backgroundColor,
        }))"""
    )
    assert [line["says"] for line in lines] == [f"{layer}: {percent(row['value'])}" for layer, row in curve.items()]
    known = [
        (row["value"], *rgb(line["colour"])) for row, line in zip(curve.values(), lines, strict=True) if is_number(row)
    ]
    lightness = [0.2126 * red + 0.7152 * green + 0.0722 * blue for _, red, green, blue in sorted(known)]
    # Channels are whole numbers, so that nearly equal errors may differ by one the other way.
    assert all(after <= before + 1 for before, after in pairwise(lightness)), "more errors are darker"
    in_map = page.evaluate(
        """(moment) => {
            const canvas = document.querySelector("#map canvas"), now = document.getElementById("now");
            const height = canvas.height / document.querySelectorAll("#lines .line").length;
            const x = now.offsetLeft * canvas.width / canvas.clientWidth;
            const copy = document.createElement("canvas");
            Object.assign(copy, { width: canvas.width, height: canvas.height });
            const pen = copy.getContext("2d", { willReadFrequently: true });
            pen.drawImage(canvas, 0, 0);
            const lines = [...document.querySelectorAll("#lines .line")];
            return lines.map((_, i) => [...pen.getImageData(x, (i + .3) * height, 1, 1).data]);
        }""",
        moment,
    )
    for row, line, pixel in zip(curve.values(), lines, in_map, strict=True):
        if is_number(row):
            near = all(abs(a - b) <= 2 for a, b in zip(rgb(line["colour"]), pixel[:3], strict=True))
            assert near, (row["layer"], line["colour"], pixel)
    path = page.get_attribute("#depth .curve", "d")
    assert path is not None
    across = [float(x) for x in re.findall(r"[ML]([\d.-]+) ", path)]
    values = [row["value"] for row in curve.values() if is_number(row)]
    assert sorted(range(len(values)), key=lambda i: values[i]) == sorted(
        range(len(across)), key=lambda i: (across[i], values[i])
    )


def moves(page: Page, report: ProbeReport, last: int) -> None:
    """Move the slider, and play."""
    for moment in (0, last // 2):
        page.locator("#slider").fill(str(moment))
        agrees(page, report, moment)
    assert f"epoch {last // 2} " in page.inner_text("#moment")
    page.locator("#slider").fill(str(max(0, last - 2)))
    page.click("#play")
    wait_until(page, f"document.getElementById('slider').value == {last}")
    wait_until(page, "document.getElementById('play').ariaLabel == 'Play'")
    agrees(page, report, last)


def keys(page: Page, report: ProbeReport, last: int) -> None:
    """Press every key that the page knows."""
    page.locator("h1").click()
    for key, moment in (("Home", 0), ("ArrowRight", 1), ("ArrowLeft", 0), ("End", last), ("ArrowLeft", last - 1)):
        page.keyboard.press(key)
        agrees(page, report, moment)
    page.keyboard.press("Space")
    wait_until(page, f"document.getElementById('slider').value == {last}")
    before = chosen(page)
    page.keyboard.press("ArrowUp")
    assert chosen(page) == before - 1
    page.keyboard.press("ArrowDown")
    assert chosen(page) == before
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.type("conv1")
    page.keyboard.press("Home")  # moves in what is typed, and not in time
    settle(page)
    assert page.input_value("#slider") == str(last)
    page.keyboard.press("Escape")
    settle(page)
    assert page.input_value("#search") == ""
    assert page.locator("#lines .dim").count() == 0


def points(page: Page, report: ProbeReport, file: Path, last: int) -> None:
    """Point at a cell: the others show its moment, the hint says what is known; click it, and it stays."""
    curves = list(report.curves("val").values())
    moment, line = last // 3, len(curves[0]) // 2
    box = page.locator("#map canvas").bounding_box()
    assert box is not None
    height = box["height"] / len(curves[0])
    left = page.evaluate(f"document.querySelector('#map canvas').clientWidth / {last + 1} * {moment + 0.5}")
    page.locator("#map canvas").scroll_into_view_if_needed()
    box = page.locator("#map canvas").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + min(left, 120 * (moment + 0.5)), box["y"] + (line + 0.5) * height)
    agrees(page, report, moment)
    row = list(curves[moment].values())[line]
    hint = page.inner_text("#hint")
    for words in (
        row["layer"],
        percent(row["value"]),
        percent(row["high"]),
        "lag",
        "remaining",
        "10,000",
        row["reduction"],
    ):
        assert words in hint, (words, hint)
    page.screenshot(path=f"{file}_pointed.png")
    page.mouse.move(2, 2)
    agrees(page, report, last)
    assert page.locator("#hint").is_hidden()
    page.mouse.click(box["x"] + min(left, 120 * (moment + 0.5)), box["y"] + (line + 0.5) * height)
    page.mouse.move(2, 2)
    agrees(page, report, moment)
    assert chosen(page) == line
    assert row["layer"] in page.inner_text("#details")
    page.locator("#slider").fill(str(last))


def searches(page: Page, report: ProbeReport, file: Path, window: str) -> None:
    """Search, leave only what was found, fold modules, and follow a finding."""
    layers = list(next(iter(report.curves("val").values())))
    word = "STAGE0" if len(layers) < 100 else "stage3"
    hits = [layer for layer in layers if word.lower() in layer]
    page.locator("#search").fill(word)
    settle(page)
    assert page.inner_text("#marked-count") == f"{len(hits)} of {len(layers)}"
    assert page.locator("#lines .line:not(.dim)").count() == len(hits)
    page.click("#only")
    settle(page)
    assert page.locator("#lines .line").count() == len(hits)
    page.mouse.move(2, 2)
    page.screenshot(path=f"{file}_found.png")
    page.click("#unmark")
    settle(page)
    assert page.locator("#lines .line").count() == len(layers)
    if page.locator("#fold").is_visible():
        page.click("#fold")
        settle(page)
        folded = page.locator("#lines .line").count()
        assert 1 < folded < len(layers)
        page.screenshot(path=f"{file}_folded.png")
        page.locator(".block[aria-expanded=false]").first.click()
        settle(page)
        assert page.locator("#lines .line").count() > folded
        page.click("#fold")
        settle(page)
        if page.locator("#lines .line").count() != len(layers):
            page.click("#fold")
    page.click(".finding")
    settle(page)
    span = int(re.findall(r"\d+", page.inner_text(".finding"))[0])
    assert page.locator("#lines .line:not(.dim)").count() == span
    page.screenshot(path=f"{file}_finding.png")
    page.keyboard.press("Escape")
    settle(page)
    assert page.locator("#lines .dim").count() == 0


def reads(page: Page, report: ProbeReport, last: int) -> None:
    """Read the table, which follows the moment."""
    page.click("#as-table")
    for moment in (last, 0):
        page.locator("#slider").fill(str(moment))
        settle(page)
        rows = page.evaluate(
            """[...document.querySelectorAll("#table tbody tr")].map(
                (row) => [...row.children].map((cell) => cell.textContent))"""
        )
        curve = list(report.curves("val").values())[moment]
        assert [(name, value) for name, _, value, *_ in rows] == [
            (layer, percent(row["value"])) for layer, row in curve.items()
        ]
    page.click("#as-table")
    page.locator("#slider").fill(str(last))


def other_views(page: Page, report: ProbeReport, last: int) -> None:
    """Choose another stage and another metric."""
    page.select_option("[data-key=stage]", "train")
    settle(page)
    assert "that the network was trained on" in page.inner_text("#warning")
    assert page.locator("#lines .best, #depth .star").count() == 0, "the best on validation are not those of training"
    page.click(".finding")  # is of validation, and leads back there
    settle(page)
    assert page.input_value("[data-key=stage]") == "val"
    assert page.locator("#lines .best").count() == page.locator("#depth .star").count() == 1
    assert page.locator("#lines .alike").count() == 1
    page.keyboard.press("Escape")
    page.select_option("[data-key=metric]", "lag")
    settle(page)
    assert "lag" in page.inner_text("#depth-title").lower()
    page.select_option("[data-key=metric]", "error")
    page.locator("h1").click()
    agrees(page, report, last)


def changes_theme(page: Page) -> None:
    """Press the button for light and dark twice."""
    ground = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(ground)
    page.click("#theme")
    assert page.evaluate(ground) != before
    page.click("#theme")
    assert page.evaluate(ground) == before


def strange(browser: Browser, folder: Path) -> None:
    """Show names that are HTML, long, or of other scripts; one layer at one moment; layers of NaN; and no rows."""
    tag = "</script><script>alert(1)</script>"
    layers = [
        "input",
        tag,
        f"<img src=x onerror=alert(2)>.{tag}",
        "net." + "deep" * 29,
        "\u5c42.\u7b2c\u4e00",
        "a b.c\u2028d",
    ]
    reports = {"strange": bridge(layers, 3), "one": bridge(["net"], 1), "none": ProbeReport(notes=[tag])}
    reports["nan"] = bridge(names(5), 3)
    for row in reports["nan"].rows:
        row |= {"value": math.nan, "low": math.nan, "high": math.nan}
    for name, report in reports.items():
        file = folder / f"{name}.html"
        report.save_html(file)
        for window in WINDOWS:
            with opened(browser, file, window, "light") as page:
                settle(page)
                page.screenshot(path=str(folder / f"{name}_{window}.png"), full_page=True)
                assert page.evaluate("document.querySelectorAll('script, img').length") == 2
                assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
                if report.rows:
                    agrees(page, report, len(report.curves("val")) - 1)
                else:
                    assert "no rows yet" in page.inner_text("#about")
                    assert tag in page.inner_text("#notes")


def settle(page: Page) -> None:
    """Wait until what is due is painted."""
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def wait_until(page: Page, expression: str) -> None:
    """Wait until an expression is true, at most five seconds. The page forbids Playwright's own way, which is eval."""
    for _ in range(250):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(20)
    raise AssertionError(f"not within five seconds: {expression}")


def chosen(page: Page) -> int:
    """Return the number of the chosen line."""
    settle(page)
    return int(
        page.evaluate(
            "[...document.querySelectorAll('#lines .line')].findIndex((line) => line.ariaSelected === 'true')"
        )
    )


def rgb(colour: str) -> list[float]:
    """Return the channels of a colour as the browser writes it."""
    return [float(channel) for channel in re.findall(r"[\d.]+", colour)[:3]]


def is_number(row: dict[str, Any]) -> bool:
    """Return whether a layer was not set aside."""
    return not math.isnan(row["value"])


def percent(value: float) -> str:
    """Return an error as the page writes it: of two numbers that are as near the greater, as scripts round."""
    if math.isnan(value):
        return "set aside"
    return f"{Decimal(100 * float(f'{value:.5g}')).quantize(Decimal('0.1'), ROUND_HALF_UP)} %"


if __name__ == "__main__":
    main()
