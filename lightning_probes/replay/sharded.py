"""Guard the weights of a network that are shared out among processes, of which no copy can stand in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_probes.network.torch_internals import share_of, share_out


class WrittenError(Exception):
    """Say which weights a network wrote to that could not be guarded."""


@contextmanager
def shares_kept(model: nn.Module, gather: Callable[[Any], list[Any]]) -> Iterator[None]:
    """Compare afterwards what each process holds of the weights of ``model`` with what it held before, and restore it.

    All processes enter and leave this context together. Buffers are guarded by
    :func:`~lightning_probes.replay.frozen.frozen`, inside of which this is used.

    Args:
        model: the network.
        gather: returns the values that all processes give to it.

    Raises:
        WrittenError: in any process a weight was written to; it has its value again.
    """
    share_out(model)
    before = [(name, share_of(weight), share_of(weight).to("cpu", copy=True)) for name, weight in _weights(model)]
    written: list[str] = []
    try:
        yield
    finally:
        share_out(model)
        for name, now, copy in before:
            if not torch.equal(_bits(now.cpu()), _bits(copy)):
                written.append(name)
                now.copy_(copy)
    if names := sorted(set().union(*gather(set(written)))):
        raise WrittenError(f"the network writes to {names[0]!r} in forward")


def _weights(model: nn.Module) -> list[tuple[str, Tensor]]:
    return list(nn.Module.named_parameters(model))


def _bits(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor, of which NaN equals itself."""
    return tensor.contiguous().flatten().view(torch.uint8)
