"""Tests that share the machine with others run on one thread: two processes that use all of it wait for each other."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported, and for the processes that tests start.
    os.environ["OMP_NUM_THREADS"] = "1"
