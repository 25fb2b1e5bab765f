"""Keep a fair sample of the batches of a stretch of training, within bounds of samples and bytes."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


@dataclass
class Budget:
    """Hold how much of the training data may be kept, and where."""

    samples: int
    """Limit the number of samples to keep; 0 keeps none."""
    num_bytes: int
    """Limit the memory of what is kept, in bytes."""
    on_device: bool = False
    """Keep copies on the device of the original tensor instead of on the host."""

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a detached copy of ``tensor`` where copies are kept."""
        return tensor.detach().to(tensor.device if self.on_device else "cpu", copy=True)


class Reservoir(Generic[T]):
    """Keep whole batches of a stretch of training: all if they fit, else each with about the same probability.

    Every batch is kept until one does not fit. From then on the kept batches are a reservoir of constant size, in which
    later batches replace random ones (algorithm R, Vitter 1985). When a new stretch begins, each batch that is added
    replaces one of the earlier stretches.

    Args:
        budget: limits on samples and bytes.
        seed: seed of the random choice of batches.

    Attributes:
        seen: number of batches in this stretch so far.
        samples: number of samples that are kept.
        num_bytes: bytes that are kept.
    """

    def __init__(self, budget: Budget, seed: int = 0) -> None:
        self._budget = budget
        self._seed = seed
        # A generator of its own leaves the global random states as they are.
        self._random = Random(seed)
        self.clear()

    def clear(self) -> None:
        """Discard all batches and begin a stretch with nothing kept."""
        self._kept: list[tuple[int, int, int, T]] = []
        self._before: list[tuple[int, int, int, T]] = []
        self._is_full = False
        self._place: int | None = None
        self.seen = self.samples = self.num_bytes = 0

    def renew(self, stretch: int) -> None:
        """Begin a new stretch, and keep the present batches until new ones replace them.

        Args:
            stretch: number of the stretch, such as the epoch. Random choices depend on it and on the seed, not on
                earlier stretches.
        """
        before = [*self._before, *self._in_order()]
        self.clear()
        self._random.seed(f"{self._seed}, {stretch}")
        self._before = before
        self._count()

    def wants(self) -> bool:
        """Count the next batch and return whether to keep it; call this once for each batch, before its step."""
        self.seen += 1
        self._place = self._draw(self.seen) if self._is_full else len(self._kept)
        return self._place < len(self._kept) or not self._is_full

    def add(self, samples: int, item: T, num_bytes: int) -> None:
        """Keep the batch that :meth:`wants` asked for, unless it does not fit.

        Args:
            samples: number of samples in the batch.
            item: what to keep of the batch.
            num_bytes: bytes that ``item`` takes.
        """
        assert self._place is not None
        place, self._place = self._place, None
        own_samples, own_bytes = _sizes(self._kept)
        fits = own_samples + samples <= self._budget.samples and own_bytes + num_bytes <= self._budget.num_bytes
        if not self._is_full and not fits:
            self._is_full, place = True, self._draw(self.seen)
            if place >= len(self._kept):
                return
        self._kept[place : place + 1] = [(self.seen, samples, num_bytes, item)]
        self._before = self._before[1:]
        self._count()
        # Batches differ in size, so the limits may be exceeded: earlier stretches give way first, then random batches.
        while self.samples > self._budget.samples or self.num_bytes > self._budget.num_bytes:
            if self._before:
                self._before.pop(0)
            else:
                self._kept.pop(self._draw(len(self._kept)))
            self._count()

    def most(self, batches: float) -> tuple[int, int]:
        """Return how many of a stretch's batches will be kept, if all are as large as the first one, and their bytes.

        Args:
            batches: number of batches in the stretch; may be infinite.

        Returns:
            The number of batches and their bytes; zeros as long as nothing was kept in this stretch.
        """
        if not self._kept:
            return 0, 0
        _, samples, num_bytes, _ = self._kept[0]
        most = int(min(batches, self._budget.samples // max(samples, 1), self._budget.num_bytes // max(num_bytes, 1)))
        return most, most * num_bytes

    def items(self) -> list[T]:
        """Return what is kept, in order of arrival."""
        return [item for _, _, _, item in [*self._before, *self._in_order()]]

    def _in_order(self) -> list[tuple[int, int, int, T]]:
        return sorted(self._kept, key=lambda kept: kept[0])

    def _draw(self, n: int) -> int:
        return self._random.randrange(n)

    def _count(self) -> None:
        self.samples, self.num_bytes = _sizes([*self._before, *self._kept])


def _sizes(kept: list[tuple[int, int, int, T]]) -> tuple[int, int]:
    return sum(samples for _, samples, _, _ in kept), sum(num_bytes for _, _, num_bytes, _ in kept)
