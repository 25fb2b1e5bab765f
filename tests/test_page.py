"""The page of a report says what the rows say, whatever the names are, and a browser shows it."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from networks import QUIET, Classifier, loader, mlp
from pages import bridge, names, page_with, row, said

from lightning_probes import LinearProbeCallback, ProbeReport
from lightning_probes.report import page
from lightning_probes.report.findings import Kind
from lightning_probes.report.page import FACTS, data_of

TAG = "</script><script>alert(1)</script>"
MEGABYTE = 10**6


class Elements(HTMLParser):
    """The tags of a page, with their attributes, and the text of each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] and self.tags[-1][0] == "script":
            self.scripts.append(data)


def read(path: Path) -> dict[str, Any]:
    """What stands in the page that a report saved, as its script reads it."""
    elements = Elements(path.read_text(encoding="utf-8"))
    assert [tag for tag, _ in elements.tags].count("script") == 2
    found: dict[str, Any] = json.loads(elements.scripts[0])
    return found


def saved(report: ProbeReport, folder: Path) -> dict[str, Any]:
    report.save_html(folder / "page.html")
    return read(folder / "page.html")


def rows_in(data: dict[str, Any]) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """Value, bounds and facts of every row, read off a page."""
    found = {}
    for view in data["views"]:
        absent = {tuple(place) for place in view["absent"]}
        for i, number in enumerate(view["layers"]):
            for j, moment in enumerate(view["moments"]):
                if (i, j) in absent:
                    continue
                bounds = (None if view[key] is None else view[key][i][j] for key in ("low", "high"))
                told = {
                    key: by[i][j] if isinstance(by[i], list) else by[i]
                    for key, by in data["facts"][view["facts"]].items()
                }
                where = view["stage"], view["loader"], view["target"], view["metric"], moment["epoch"], moment["step"]
                found[(*where, data["layers"][number])] = (view["values"][i][j], *bounds, told)
    return found


def known(value: float | None) -> Any:
    return None if value is None or math.isnan(value) else pytest.approx(value, rel=1e-4)


def check(report: ProbeReport, data: dict[str, Any]) -> None:
    """Every row stands in the page, and nothing else does."""
    found = rows_in(data)
    assert len(found) == len(report.rows)
    for one in report.rows:
        where = one["stage"], one["dataloader"], one.get("target", ""), one["metric"], one["epoch"], one["step"]
        value, low, high, told = found[(*where, one["layer"])]
        assert (value, low, high) == (known(one["value"]), known(one.get("low")), known(one.get("high")))
        for key in ("features", "features_total", "rows", "reduction", "converged", "module"):
            assert told.get(key) == one.get(key)
        for key in ("l2", "remaining"):
            assert told.get(key) == known(one.get(key))
    assert data["notes"] == report.notes


def test_page_has_every_row_of_a_run(tmp_path: Path) -> None:
    probes = LinearProbeCallback()
    Trainer(**QUIET | {"max_epochs": 2}, callbacks=[probes]).fit(Classifier(mlp()), loader(64), loader(32, seed=1))
    data = saved(probes.report, tmp_path)
    check(probes.report, data)
    assert (data["views"][0]["stage"], data["views"][0]["metric"]) == ("val", "error")
    assert {view["metric"] for view in data["views"]} == {"error", "cross_entropy", "lag"}
    assert [moment["name"] for moment in data["views"][0]["moments"]] == ["start", "epoch 1", "epoch 2"]
    # Below the panels stands what stands under the table.
    method = " ".join(data["views"][0]["method"]["sentences"])
    assert method.split(".")[0] in " ".join(str(probes.report).split())
    assert data["views"][0]["baseline"] == {"name": "majority class", "value": known(probes.report.baseline["val"])}


@settings(max_examples=60, deadline=None)
@given(
    layers=st.lists(
        st.text(min_size=1, max_size=120) | st.sampled_from([TAG, "<!--", "]]>", "a.b\u2028", "\ud800"]),
        min_size=1,
        max_size=6,
        unique=True,
    ),
    errors=st.lists(st.floats(0, 1) | st.just(math.nan), min_size=1, max_size=4),
    note=st.text(max_size=40) | st.just(TAG),
)
def test_page_keeps_every_name_and_number(
    layers: list[str], errors: list[float], note: str, tmp_path_factory: Any
) -> None:
    rows = [row(layer, i, error, epoch) for i, layer in enumerate(layers) for epoch, error in enumerate(errors)]
    report = ProbeReport(rows=rows, baseline={"val": 0.9}, notes=[note])
    data = saved(report, tmp_path_factory.getbasetemp())
    assert data["layers"] == layers
    check(report, data)


def test_nothing_in_a_name_is_a_tag_and_nothing_may_be_asked_for() -> None:
    layers = ["input", TAG, f"<img src=x onerror=alert(2)>.{TAG}", "{{SCRIPT}}"]
    report = bridge(layers, 3)
    report.notes.append(TAG)
    strange = page_with(report, [said(TAG, (TAG,))], [TAG])
    plain = page_with(bridge(["a", "b", "c", "d"], 3), [], [])
    assert Elements(strange).tags[0][0] == "html"
    # The tags are those of a page with other names, but for the hashes in its policy.
    assert [tag for tag, _ in Elements(strange).tags] == [tag for tag, _ in Elements(plain).tags]
    policy = next(about["content"] for tag, about in Elements(strange).tags if about.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:; script-src 'sha256-")
    assert "unsafe" not in policy
    assert re.findall(r"https?://[^\"' ]+", strange) == ["http://www.w3.org/2000/svg"]


def test_findings_and_best_layers_point_at_their_layers() -> None:
    findings = [said("Two are worse.", tuple(names(5)[2:4])), said("Nothing else.", ("gone",), Kind.BEST)]
    text = page_with(bridge(names(5), 2), findings, ["stem.conv", "input", "gone"])
    data = json.loads(Elements(text).scripts[0])
    assert data["views"][0]["best"] == [1, 0]
    assert data["findings"] == [
        {"sentence": "Two are worse.", "view": 0, "kind": "bypass", "layers": [2, 3]},
        {"sentence": "Nothing else.", "view": 0, "kind": "best", "layers": []},
    ]


def test_a_layer_that_was_set_aside_has_the_notes_that_name_it() -> None:
    notes = [
        "set aside: 'net.1', since it is NaN; NaN from now on",
        "left out: net.10, net.1.a",
        "net.1.",
        "about net.10",
    ]
    rows = [row(layer, i, 0.5, 1) for i, layer in enumerate(["net.1", "net.10", "1"])]
    data = data_of(rows, tasks={"": "classification"}, baseline={}, notes=notes)
    assert data["reasons"] == {"0": [0, 2], "1": [1, 3]}


def test_several_stages_targets_loaders_and_metrics_are_views_of_one_page() -> None:
    rows = [
        row("net", 0, 0.5, epoch, stage=stage, dataloader=index, target=target, metric=metric)
        for stage, index in [("train", 0), ("val", 1), ("val", 0)]
        for target in ("colour", "age")
        for metric in (("rmse", "error") if target == "age" else ("error",))
        for epoch in (1, 2)
    ]
    tasks = {"colour": "classification", "age": "regression"}
    data = data_of(rows, tasks=tasks, baseline={"val/age": 1.0, "val/colour": 0.8}, notes=[])
    views = [(view["stage"], view["target"], view["loader"], view["metric"]) for view in data["views"]]
    assert views[:3] == [("val", "colour", 0, "error"), ("val", "colour", 1, "error"), ("val", "age", 0, "error")]
    assert len(views) == len(set(views)) == 9
    assert data["views"][0]["baseline"] == {"name": "majority class", "value": 0.8}
    assert data["views"][2]["baseline"] == {"name": "mean of the targets", "value": 1}
    assert data["views"][2]["quantity"] == "1 - R2"
    assert data["views"][-1]["method"]["warning"] != ""
    assert {view["baseline"] is None for view in data["views"] if view["stage"] == "train"} == {True}


def test_facts_that_never_change_are_written_once_and_others_at_each_moment() -> None:
    rows = [row("net", 0, 0.5, epoch, **{"l2": 0.1 * epoch, "module": "Linear", "shape": (3, 4)}) for epoch in (1, 2)]
    rows += [row("late", 1, 0.5, 2)]
    data = data_of(rows, tasks={"": "classification"}, baseline={}, notes=[])
    (facts,) = data["facts"]
    assert facts["l2"] == [[0.1, 0.2], [None, known(10**-0.5)]]
    assert (facts["module"][0], facts["shape"][0]) == ("Linear", "3 \u00d7 4")
    assert facts["fitted_on"][0] == "train, 50,000 samples"
    assert data["views"][0]["absent"] == [[1, 0]]
    assert data["views"][0]["values"] == [[0.5, 0.5], [None, 0.5]]
    assert facts.keys() <= set(FACTS)


@pytest.mark.parametrize(("layers", "moments"), [(300, 100), (500, 2), (1, 1)])
def test_page_is_small(layers: int, moments: int, tmp_path: Path) -> None:
    report = bridge(names(layers), moments)
    data = saved(report, tmp_path)
    assert (tmp_path / "page.html").stat().st_size < 5 * MEGABYTE
    assert len(data["layers"]) == layers
    assert len(data["views"][0]["moments"]) == moments


def test_report_without_rows_makes_a_page_and_one_of_an_earlier_release_too(tmp_path: Path) -> None:
    assert saved(ProbeReport(notes=["nothing was published"]), tmp_path)["views"] == []
    old = ProbeReport.load(Path(__file__).parent / "data" / "report-0.1.0.json")
    check(old, saved(old, tmp_path))


def test_page_replaces_a_file_in_one_piece_and_says_which_folder_is_missing(tmp_path: Path) -> None:
    report = bridge(names(3), 2)
    file = tmp_path / "page.html"
    file.write_text("before")
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*nowhere"):
        report.save_html(tmp_path / "nowhere" / "page.html")
    unfit = bridge(names(3), 2)
    unfit.rows[0]["reduction"] = object()  # no JSON can hold it
    with pytest.raises(TypeError):
        unfit.save_html(file)
    assert file.read_text() == "before"
    (tmp_path / "taken").write_text("a file where the folder would be")
    with pytest.raises(OSError, match="taken"):
        report.save_html(tmp_path / "taken" / "page.html")
    report.save_html(file)
    assert read(file)["layers"] == names(3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "taken"]


def test_files_of_the_page_are_all_used_and_fit_a_screen() -> None:
    files = {path.name: path.read_text(encoding="utf-8") for path in Path(page.__file__).with_name("web").iterdir()}
    assert files.keys() == {*page.SCRIPTS, "page.html", "page.css"}
    assert max(len(line) for text in files.values() for line in text.splitlines()) <= 120
    # What is not text never goes into the page.
    assert not [name for name, text in files.items() if re.search(r"innerHTML|outerHTML|document\.write|eval\(", text)]


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here to show the page")
def test_browser_shows_the_moment_that_is_asked_for_and_every_name_as_text(tmp_path: Path) -> None:
    # All that a reader can do is tried by command: tests/page_in_browser.py.
    layers = ["input", TAG, "net.0", "net.1", "net.2"]
    report = bridge(layers, 3)
    for moment in (0, 2):
        shown, said = in_browser(report, tmp_path, f"moment={moment}&layer=net.1&search=NET.")
        lines = dict(
            re.findall(
                r'role="option" id="line-(\d)"[^>]*aria-label="([^"]*)"',
                shown.replace("&lt;", "<").replace("&gt;", ">"),
            )
        )
        errors = report.curves("val")[moment, 390 * moment]
        assert list(lines.values()) == [
            f"{layer}: " + ("set aside" if math.isnan(one["value"]) else f"{100 * one['value']:.1f} %")
            for layer, one in errors.items()
        ]
        assert shown.count('class="line dim"') == 2
        assert "<script>alert" not in shown
        assert "CONSOLE" not in said


def in_browser(report: ProbeReport, folder: Path, state: str) -> tuple[str, str]:
    """The page's elements after its script ran, and what the browser said."""
    report.save_html(folder / "page.html")
    address = f"{(folder / 'page.html').as_uri()}#{state}"
    quiet = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    done = subprocess.run(
        [str(BROWSER), *quiet, "--enable-logging=stderr", "--virtual-time-budget=2000", "--dump-dom", address],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, done.stderr
