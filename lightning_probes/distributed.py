"""The processes that train or probe one network together: what they sum, and what they tell one another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.utils._pytree import tree_leaves
from torch.utils.data import DistributedSampler
from torchmetrics.utilities import rank_zero_warn

from lightning_probes.probes.rows import Total, alone

LONGEST_WAIT = timedelta(minutes=5)
"""For other processes. One of them may have left the loop in which the others are, or have failed."""

T = TypeVar("T")
K = TypeVar("K")
V = TypeVar("V")


class Ranks:
    """All processes of a run. Every one of them calls the same methods in the same order.

    One that waits for the others for longer than :data:`LONGEST_WAIT` raises, and is alone until they :meth:`meet`
    again. Made anew, a process is alone.

    Attributes:
        rank: of this process.
        number: of processes, as long as they come; 1: nothing is sent.
        device: of the network.
        num_bytes: of the tensors that this process has given to be summed.
        note: why it is alone though there are others; empty otherwise.
    """

    def __init__(self) -> None:
        self.rank, self.number = 0, 1
        self.num_bytes = 0
        self.device = torch.device("cpu")
        self.note = ""
        self._group: Any = None

    def meet(self, trainer: Any) -> Ranks:
        """Become those of a Lightning Trainer; each is alone, with a warning, if they cannot reach one another."""
        if self._group is not None and self.number > 1:  # of a lost one somebody may still wait
            with suppress(Exception):  # the world that it was of may be gone
                distributed.destroy_process_group(self._group)
        self.rank, self.number, self.device = trainer.global_rank, trainer.world_size, trainer.strategy.root_device
        self.num_bytes, self.note, self._group = 0, "", None
        try:
            if self.number > 1:
                # Of their own and on the host: what they tell one another never meets what the network does. In each
                # run anew, by all of them: one that was left alone in an earlier run is not alone in this one.
                self._group = distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)
        except Exception as error:
            self.number, self.note = 1, f"each process probes its own samples, as gloo cannot start: {error}"
            rank_zero_warn(f"LinearProbeCallback: {self.note}")
        return self

    def __getstate__(self) -> dict[str, Any]:
        """In another process, or a copy, they have to meet first."""
        return Ranks().__dict__

    @property
    def own_group(self) -> Any:
        """One of this process only, for those who insist on telling what all know."""
        return _groups_alone(distributed.group.WORLD)[self.rank] if self.number > 1 else None

    def leave(self, reason: str) -> None:
        """Something went wrong here, and the others are somewhere else by now: this process is alone from now on."""
        if self.number > 1:
            self.number, self.note = 1, f"process {self.rank} went on without the others: {reason}"

    @property
    def total(self) -> Total:
        """The sum of a tensor over all processes."""
        return self._total if self.number > 1 else alone

    def _total(self, tensor: Tensor) -> Tensor:
        summed = tensor.detach().to("cpu", copy=True).contiguous()
        self.num_bytes += summed.numel() * summed.element_size()
        with self._waiting() as group:
            distributed.all_reduce(summed, group=group)
        return summed.to(tensor.device)

    def gather(self, value: T) -> list[T]:
        """What each process has, in the order of the ranks; anything that can be pickled."""
        if self.number == 1:
            return [value]
        found: list[Any] = [None] * self.number
        with self._waiting() as group:
            distributed.all_gather_object(found, value, group=group)
        return found

    def gather_tensor(self, tensor: Tensor, group: Any = None) -> list[Tensor]:
        """The same for tensors, each on the device of this process's own; as torchmetrics asks for it."""
        return [part.to(tensor.device) for part in self.gather(tensor.cpu())]

    @contextmanager
    def _waiting(self) -> Iterator[Any]:
        try:
            yield self._group
        except Exception as error:
            self.leave("it waited for them in vain")
            raise RuntimeError(f"process {self.rank} waited for the others in vain ({error})") from error

    def union(self, value: Mapping[K, V]) -> dict[K, V]:
        """What any process has under each key; of several the first one's."""
        return {key: part for found in reversed(self.gather(value)) for key, part in found.items()}

    def first(self, reason: str) -> str:
        """The first reason that any process has, and which process; empty if none has one."""
        found = self.gather(reason)
        rank = next((i for i, text in enumerate(found) if text), None)
        if rank is None:
            return ""
        return found[rank] if self.number == 1 else f"process {rank}: {found[rank]}"


@lru_cache(maxsize=1)
def _groups_alone(world: Any) -> list[Any]:
    return [distributed.new_group([rank], backend="gloo") for rank in range(distributed.get_world_size())]


def unrepeated(loaders: Any, dataloader: int, batch_idx: int) -> int | None:
    """How many samples of a batch count, where a sampler repeats some so that all processes have equally many.

    Args:
        loaders: a DataLoader, whose samples come in the order of its sampler, or a collection of them.
        dataloader: which of them.
        batch_idx: of the batch, in this process.

    Returns:
        ``None``: all.
    """
    loader = tree_leaves(loaders)[dataloader]
    sampler = getattr(loader, "sampler", None)
    batch_size = getattr(loader, "batch_size", None) or getattr(
        getattr(loader, "batch_sampler", None), "batch_size", None
    )
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last or not isinstance(batch_size, int):
        return None
    samples = len(sampler.dataset)  # type: ignore[arg-type]
    own = len(range(sampler.rank, samples, sampler.num_replicas))
    return max(own - batch_idx * batch_size, 0)


def refuse(strategy: Any) -> None:
    """Say no to what is known not to work.

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
