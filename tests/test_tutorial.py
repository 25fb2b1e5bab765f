"""The tutorial runs, and shows tables and pictures as its saved copy does."""

from __future__ import annotations

import base64
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.image
import nbformat
import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent.parent / "examples" / "tutorial.py"


def kinds(notebook: Any) -> list[list[Any]]:
    """Of the outputs of each cell with code: what they are, not what they say; without what libraries warn of."""
    return [
        [
            (output.output_type, output.get("name"), *sorted(output.get("data", ())))
            for output in cell.outputs
            if output.get("name") != "stderr"
        ]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


@pytest.fixture(scope="module")
def saved() -> Any:
    return nbformat.read(SCRIPT.with_suffix(".ipynb"), as_version=4)


@pytest.fixture(scope="module")
def executed() -> Any:
    spec = importlib.util.spec_from_file_location("tutorial", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    tutorial = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tutorial)
    return tutorial.executed(SCRIPT.with_suffix(".ipynb"))


def shown(notebook: Any, kind: str) -> Iterator[str]:
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if kind in output.get("data", {}):
                yield "".join(output.data[kind])


def test_cells_put_out_what_they_did_when_they_were_saved(saved: Any, executed: Any) -> None:
    assert [cell.source for cell in executed.cells] == [cell.source for cell in saved.cells]
    assert kinds(executed) == kinds(saved)
    assert not [output for cell in kinds(executed) for output in cell if output[0] == "error"]


@pytest.mark.parametrize("which", ["saved", "executed"])
def test_each_report_is_a_table_and_each_figure_one_picture(which: str, request: pytest.FixtureRequest) -> None:
    notebook = request.getfixturevalue(which)
    pages = list(shown(notebook, "text/html"))
    assert len(pages) == 2
    for page in pages:
        assert page.count("<table>") == 1
        assert page.count("<img ") == 2  # by depth, and the map
        assert "majority class" in page
        assert "Probes fitted to their optimum on 4,000 samples of training, scored on 1,000 others." in page
    # pyplot shows the figure of two panels when its cell ends, and nothing shows it again.
    pictures = [base64.b64decode(picture) for picture in shown(notebook, "image/png")]
    pictures += [base64.b64decode(found) for page in pages for found in re.findall(r'base64,([^"]*)"', page)]
    assert len(pictures) == 6
    for i, picture in enumerate(pictures):
        path = request.getfixturevalue("tmp_path") / f"{i}.png"
        path.write_bytes(picture)
        assert min(matplotlib.image.imread(path).shape[:2]) > 250
    # No cell ends in the words that stand for an object without a picture or a table.
    assert not [text for text in shown(notebook, "text/plain") if text.startswith(("<Axes", "[{", "ProbeReport(rows"))]


@pytest.mark.parametrize("pyplot", ["", "import matplotlib.pyplot"], ids=["alone", "beside pyplot"])
def test_a_figure_is_shown_once(pyplot: str, tmp_path: Path) -> None:
    from nbclient import NotebookClient

    make = (
        "from lightning_probes import ProbeReport\n"
        "row = {'layer': 'net', 'depth': 1, 'features': 2, 'features_total': 2, 'stage': 'val', 'dataloader': 0}\n"
        "row |= {'epoch': 1, 'step': 1, 'samples': 4.0, 'metric': 'error', 'value': 0.25, 'low': 0.0, 'high': 0.7}\n"
        "report = ProbeReport(rows=[row])\n"
    )
    cells = [nbformat.v4.new_code_cell(text) for text in (f"{pyplot}\n{make}None", "report.plot()", "report")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    first, figure, report = kinds(notebook)
    assert first == []
    assert figure == [("execute_result", None, "image/png", "text/plain")]
    assert report == [("execute_result", None, "text/html", "text/plain")]
