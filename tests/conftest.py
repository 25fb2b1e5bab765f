"""Tests that share the machine with others run on one thread: two processes that use all of it wait for each other."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported, and for the processes that tests start.
    os.environ["OMP_NUM_THREADS"] = "1"


SLOW = {"compile", "distributed", "paper", "resume"}
"""Markers of what takes minutes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(marker.name in SLOW for marker in item.iter_markers()):
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """Forget what a test compiled: operations of a step are followed only in processes that compile nothing."""
    yield
    if (dynamo := sys.modules.get("torch._dynamo")) is not None and any(dynamo.eval_frame.cached_backends.values()):
        dynamo.reset()


@pytest.fixture(autouse=True)
def no_mode_left() -> Iterator[None]:
    """Fail a test after which operations are followed still: each that comes would take ten times its time."""
    yield
    if (torch := sys.modules.get("torch")) is not None:
        assert not torch._C._len_torch_dispatch_stack()


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Let the interrupt signal raise here and in processes started here, and leave it as it was found.

    A shell has it ignored in what it starts in the background. Lightning ignores it while it shuts down.
    """
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)
