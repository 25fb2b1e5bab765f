"""Benchmarks that no other test runs a part of still run, at a small size."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"
SMALL = {
    "findings.py": shlex.split("--simulations 2 --samples 200 --layers 4 --part findings best"),
    "gpu.py": shlex.split("--device cpu --samples 96 --classes 4 --width 4 --size 32 --batch-size 16 --rounds 1"),
    "scaling.py": ["--case", json.dumps({"width": 16, "classes": 3, "samples": 1_000})],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_runs_at_a_small_size(name: str) -> None:
    command = [sys.executable, str(BENCHMARKS / name), *SMALL[name]]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "to their optimum" in said or "the most of all" in said or json.loads(said)["converged"]
