"""Sum tensors and exchange values across the processes that train or probe one network together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torchmetrics.utilities import rank_zero_warn

LONGEST_WAIT = timedelta(minutes=5)
"""Bound the wait for other processes: one of them may have left the loop in which the others are, or have failed."""

T = TypeVar("T")
K = TypeVar("K")
V = TypeVar("V")

Total = Callable[[Tensor], Tensor]
"""Sum a tensor over the processes, each of which holds some of the samples."""


def alone(tensor: Tensor) -> Tensor:
    """Return the sum over one process, which is the tensor itself."""
    return tensor


class Ranks:
    """Connect all processes of a run, every one of which calls the same methods in the same order.

    A process that waits for the others for longer than :data:`LONGEST_WAIT` raises, and works alone until they
    :meth:`meet` again. A new object works alone.

    Attributes:
        rank: number of this process, from 0.
        number: number of processes that work together; with 1 nothing is sent.
        device: device of the network in this process.
        num_bytes: bytes of the tensors that this process has given to be summed.
        note: reason why the process works alone though there are others; empty otherwise.
        own_group: group of this process only, for a library that insists on sending what all processes know; ``None``
            where it works alone.
    """

    def __init__(self) -> None:
        self.rank = 0
        self.number = 1
        self.num_bytes = 0
        self.device = torch.device("cpu")
        self.note = ""
        self.own_group: Any = None
        self._group: Any = None

    def meet(self, trainer: Any) -> Ranks:
        """Connect the processes of a Lightning Trainer; warn and work alone if they cannot reach one another."""
        if self._group is not None and self.number > 1:
            # A process that was lost may still wait in the old group, and the world of that group may be gone.
            with suppress(Exception):
                distributed.destroy_process_group(self._group)
        self.rank = trainer.global_rank
        self.number = trainer.world_size
        self.device = trainer.strategy.root_device
        self.num_bytes = 0
        self.note = ""
        self.own_group = None
        self._group = None
        try:
            if self.number > 1:
                # A group of its own on the host never meets what the network sends. All processes make it anew for each
                # run, so that one that was left alone in an earlier run is not alone in this one.
                self._group = distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)
                self.own_group = _groups_alone(distributed.group.WORLD)[self.rank]
        except Exception as error:
            self.rank = 0
            self.number = 1
            self.note = f"each process probes its own samples, as gloo cannot start: {error}"
            rank_zero_warn(f"LinearProbeCallback: {self.note}")
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave the group out: in another process, or in a copy, the processes have to meet first."""
        return Ranks().__dict__

    def leave(self, reason: str) -> None:
        """Work alone from now on, because something went wrong here and the other processes have gone on."""
        if self.number > 1:
            self.note = f"process {self.rank} went on without the others: {reason}"
            # A process that works alone is process 0, which alone contributes what all processes know.
            self.rank = 0
            self.number = 1
            self.own_group = None

    @property
    def total(self) -> Total:
        """Return the function that sums a tensor over all processes."""
        return self._total if self.number > 1 else alone

    def _total(self, tensor: Tensor) -> Tensor:
        summed = tensor.detach().to("cpu", copy=True).contiguous()
        self.num_bytes += summed.numel() * summed.element_size()
        with self._waiting() as group:
            distributed.all_reduce(summed, group=group)
        return summed.to(tensor.device)

    def gather(self, value: T) -> list[T]:
        """Return the value of each process, in the order of the ranks; anything that can be pickled is sent."""
        if self.number == 1:
            return [value]
        found: list[Any] = [None] * self.number
        with self._waiting() as group:
            distributed.all_gather_object(found, value, group=group)
        return found

    @contextmanager
    def _waiting(self) -> Iterator[Any]:
        try:
            yield self._group
        except Exception as error:
            rank = self.rank
            self.leave("it waited for them in vain")
            raise RuntimeError(f"process {rank} waited for the others in vain ({error})") from error

    def union(self, value: Mapping[K, V]) -> dict[K, V]:
        """Join the mappings of all processes; under a key that several have, the value of the first one counts."""
        return {key: part for found in reversed(self.gather(value)) for key, part in found.items()}

    def first(self, reason: str) -> str:
        """Return the first reason that any process has, with the number of the process; empty if none has one."""
        found = self.gather(reason)
        rank = next((i for i, text in enumerate(found) if text), None)
        if rank is None:
            return ""
        return found[rank] if self.number == 1 else f"process {rank}: {found[rank]}"


@lru_cache(maxsize=1)
def _groups_alone(world: Any) -> list[Any]:
    return [distributed.new_group([rank], backend="gloo") for rank in range(distributed.get_world_size())]


def refuse(strategy: Any) -> None:
    """Refuse a Lightning strategy with which probes are known not to work.

    Raises:
        ValueError: the strategy flattens or partitions weights, or shares samples, in a way that probes do not know.
    """
    unknown = {"FSDPStrategy", "DeepSpeedStrategy"} & {kind.__name__ for kind in type(strategy).__mro__}
    if unknown:
        raise ValueError(
            f"strategy: probes do not work with {unknown.pop()}; expected ddp, or ModelParallelStrategy (FSDP2), or a "
            "single device"
        )
    sharing = getattr(strategy, "distributed_sampler_kwargs", None)
    if sharing and sharing["num_replicas"] != strategy.world_size:
        raise ValueError("strategy: probes do not work with tensor parallelism; expected tensor_parallel_size=1")
