"""Run the cells of the tutorial anew and write what they put out into it.

python examples/tutorial.py [--output examples/tutorial.ipynb]
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

TUTORIAL = Path(__file__).with_suffix(".ipynb")


def executed(path: Path) -> Any:
    """Return a notebook with what its cells put out now.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raises.
    """
    notebook = nbformat.read(path, as_version=4)
    # Warnings of the libraries name folders of the machine that it ran on.
    quiet = os.environ | {"PYTHONWARNINGS": "ignore"}
    NotebookClient(notebook, timeout=1200, kernel_name="python3", coalesce_streams=True).execute(env=quiet)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {}
    return notebook


def main() -> None:
    """Execute and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=TUTORIAL, help="notebook (default: beside this script)")
    nbformat.write(executed(TUTORIAL), parser.parse_args().output)


if __name__ == "__main__":
    main()
