"""A fair sample of the batches of a stretch of training, within bounds of samples and bytes."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


@dataclass
class Room:
    """How much of the data may be kept, and where."""

    samples: int
    """At most; 0: nothing is kept."""
    num_bytes: int
    """At most."""
    on_device: bool = False
    """Where the network is, and not on the host."""

    def copy(self, tensor: Tensor) -> Tensor:
        """A detached copy that may be kept."""
        return tensor.detach().to(tensor.device if self.on_device else "cpu", copy=True)


def enough_samples(num_classes: int) -> int:
    """On how many a probe is fitted unless told otherwise: 14 000, or 200 a class where that is more.

    On 8 192 an epoch's errors could be 1.7 points too high on average over the layers, of a hundred classes 5 points
    (fidelity.py).
    """
    return max(14_000, 200 * num_classes)


class KeptBatches(Generic[T]):
    """Whole batches of a stretch of training: all of them if they fit, else each with about the same chance.

    Batches are kept until one does not fit. From then on it is a reservoir of as many batches as were kept (algorithm
    R). In a new stretch those of the stretch before stay until new ones take their places, one for one.

    Attributes:
        seen: batches of the stretch so far.
        samples: samples that are kept.
        num_bytes: bytes that are kept.
    """

    def __init__(self, room: Room, seed: int = 0) -> None:
        self._room = room
        self._seed = seed
        self._random = Random(seed)  # of its own; torch's cannot be sent to another process
        self.clear()

    def clear(self) -> None:
        """Begin with nothing kept."""
        self._kept: list[tuple[int, int, int, T]] = []
        self._before: list[tuple[int, int, int, T]] = []
        self._is_full = False
        self._place: int | None = None
        self.seen = self.samples = self.num_bytes = 0

    def renew(self, stretch: int) -> None:
        """Begin a stretch, the one of this number: what is drawn in it does not depend on those before."""
        before = [*self._before, *self._in_order()]
        self.clear()
        self._random.seed(f"{self._seed}, {stretch}")
        self._before = before
        self._count()

    def wants(self) -> bool:
        """Whether the next batch will be kept, asked once for every batch, before its step."""
        self.seen += 1
        self._place = self._draw(self.seen) if self._is_full else len(self._kept)
        return self._place < len(self._kept) or not self._is_full

    def add(self, samples: int, item: T, num_bytes: int) -> None:
        """Keep the batch that was wanted: ``item``, which has so many samples and bytes, unless it does not fit."""
        if self._place is None:
            return
        place, self._place = self._place, None
        own_samples, own_bytes = _sizes(self._kept)
        fits = own_samples + samples <= self._room.samples and own_bytes + num_bytes <= self._room.num_bytes
        if not self._is_full and not fits:
            self._is_full, place = True, self._draw(self.seen)
            if place >= len(self._kept):
                return
        self._kept[place : place + 1] = [(self.seen, samples, num_bytes, item)]
        self._before = self._before[1:]
        self._count()
        # Too much now: batches of the stretch before go first, then some, whichever they are.
        while self.samples > self._room.samples or self.num_bytes > self._room.num_bytes:
            if self._before:
                self._before.pop(0)
            else:
                self._kept.pop(self._draw(len(self._kept)))
            self._count()

    def most(self, batches: float) -> tuple[int, int]:
        """Return how many of ``batches`` will be kept at most, and their bytes, if they are like the first one."""
        if not self._kept:
            return 0, 0
        _, samples, num_bytes, _ = self._kept[0]
        most = int(min(batches, self._room.samples // max(samples, 1), self._room.num_bytes // max(num_bytes, 1)))
        return most, most * num_bytes

    def items(self) -> list[T]:
        """What is kept, in order of arrival."""
        return [item for _, _, _, item in [*self._before, *self._in_order()]]

    def _in_order(self) -> list[tuple[int, int, int, T]]:
        return sorted(self._kept, key=lambda kept: kept[0])

    def _draw(self, n: int) -> int:
        return self._random.randrange(n)

    def _count(self) -> None:
        self.samples, self.num_bytes = _sizes([*self._before, *self._kept])


def _sizes(kept: list[tuple[int, int, int, T]]) -> tuple[int, int]:
    return sum(samples for _, samples, _, _ in kept), sum(num_bytes for _, _, num_bytes, _ in kept)
