"""Hold the features of all layers and samples, in memory or on disk, until probes are fitted on them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import IO, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_probes.distributed import Ranks, Total
from lightning_probes.probes.rows import Parts
from lightning_probes.tasks.task import LabelCount, Question

FOLDS = 5
"""Set into how many parts samples are cut: some are held out to choose a strength, each in turn to cross-fit."""

_BLOCK = 2048
"""Bound the rows that are read from a store at a time."""

_GOLDEN = -0x61C8864680B583EB
"""Multiply by this odd number, 2^64 over the golden ratio, to spread bits (Knuth, volume 3, section 6.4)."""

_AT_ONCE = 2**18
"""Bound the numbers that are multiplied at once to hash rows."""

_LARGEST = 3e4
"""Bound the values kept in half precision, in deviations of the layer's first batch; float16 ends at 65 504."""


@dataclass
class LayerBatch:
    """Hold what the layers of a network put out for the samples of one batch.

    Attributes:
        features: ``{layer: (rows, features)}``. A layer has one row for each sample, or several views of the whole
            batch, one after the other: rows ``i``, ``i + batch``, ``i + 2 batch`` ... are of sample ``i``.
        targets: ``(batch, outputs)``, as the tasks encode them; of labels of their own for each position ``(batch *
            each, outputs)``, and the features likewise.
        faults: ``{layer: exception}`` of the layers whose features could not be taken.
        labels: what became of the labels of each task, by name; ``None`` for a batch that is run again, whose labels
            were counted before.
        each: how many neighbouring targets are of one sample.
        marks: a number for each sample that only its input has, ``(batch,)``; ``None`` in training, or if the input is
            not known.
    """

    features: dict[str, Tensor]
    targets: Tensor
    faults: dict[str, Exception] = field(default_factory=dict)
    labels: Mapping[str, LabelCount] | None = None
    each: int = 1
    marks: Tensor | None = None

    @property
    def samples(self) -> int:
        """Return the number of samples."""
        return len(self.targets) // self.each

    def targets_of(self, rows: int) -> Tensor:
        """Return the target of each row of a layer that has this number of rows."""
        return self.targets if len(self.targets) == rows else self.targets.repeat(rows // len(self.targets), 1)

    def only(self, layers: Sequence[str] | set[str]) -> LayerBatch:
        """Return this batch with the features of some layers only."""
        features = {x: part for x, part in self.features.items() if x in layers}
        return replace(self, features=features)


def draw_folds(samples: int) -> Tensor:
    """Draw the fold of each sample on the host: ``(samples,)`` of ``0 .. FOLDS - 1``, in folds as even as can be.

    Folds are drawn at random so that sorted data do not put one class into one fold. The generator is of its own, so
    that the global random state is left alone.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randperm(samples, generator=generator, device="cpu").remainder(FOLDS)


class LayerSamples(NamedTuple):
    """Hold one layer's features of all samples of this process."""

    layer: str
    features: Tensor | Parts
    """Hold ``(rows, features)``, or parts that are read again for each product."""
    targets: Tensor
    """Hold the target of each row, ``(rows, outputs)``."""
    folds: Tensor
    """Hold the fold of each row, ``(rows,)`` of ``0 .. FOLDS - 1``; views of one sample are in one fold."""

    def fingerprint(self, total: Total) -> int:
        """Return a number that the same rows with the same targets have in any order, and others all but never.

        Bits are compared, and not values: a feature that was rounded otherwise makes another row. ``total`` sums a
        tensor over the processes that share the samples; the folds do not count.
        """
        parts = self.features if isinstance(self.features, Parts) else (self.features,)
        targets = hash_rows(self.targets)
        found = torch.zeros_like(targets[:0].sum())
        first = 0
        for part in parts:
            own = hash_rows(part).to(targets) * _GOLDEN + targets[first : first + len(part)]
            first += len(part)
            # Without this a sum of rows would be one of columns, which rows of other samples may have as well.
            found += _scattered(_scattered(own)).sum()
        return int(total(found))


class Store(Protocol):
    """Keep features of layers, part by part."""

    def put(self, layer: str, x: Tensor) -> None:
        """Append ``(rows, features)`` to the features that are kept of a layer."""

    def read(self, layer: str) -> Parts:
        """Return all features that are kept of a layer, in the order in which they were put."""

    def is_read_whole(self, layer: str) -> bool:
        """Return whether all features of a layer should be in memory at once while its probe is fitted."""

    def drop(self, layer: str) -> None:
        """Discard the features of a layer."""


class FeatureDataset:
    """Hold the features and targets of this process, and hand them out one layer after the other.

    The *place* of a sample is its number among the samples, which decides its fold.

    Args:
        question: knows which targets count.
        store: keeps the features.
        numbers_left_out: whether samples that are left out have a place too. They have one in a whole pass over a
            dataset, and none in training, where a sampler may have added them.

    Attributes:
        samples: number of samples so far.
        labelled: number of those that count.
        layers: layers that have been seen, in the order in which they came.
    """

    def __init__(self, question: Question, store: Store, *, numbers_left_out: bool = False) -> None:
        self.samples = 0
        self.labelled = 0
        self._question = question
        self._store = store
        self._numbers_left_out = numbers_left_out
        self._targets: list[Tensor] = []
        self._places: list[Tensor] = []
        self._counted: list[Tensor] = []
        self._marks: list[Tensor | None] = []
        self._batches: dict[str, list[tuple[int, int]]] = {}
        self._shapes: dict[str, tuple[int, torch.dtype]] = {}

    @property
    def layers(self) -> list[str]:
        """Return the layers that have been seen."""
        return list(self._batches)

    @property
    def target_sums(self) -> Tensor:
        """Return the sums over the targets of this process, on the host."""
        sums = self._question.target_sums(torch.zeros(0, self._question.outputs))
        for targets in self._targets:
            sums = sums + self._question.target_sums(targets if targets.is_floating_point() else targets.float())
        return sums

    def add(self, batch: LayerBatch) -> None:
        """Keep the features and targets of a batch.

        Raises:
            OSError: a store on disk has no space left.
        """
        targets = batch.targets
        counted = self._question.is_counted(targets).cpu().view(-1, batch.each).any(dim=1)
        if self._numbers_left_out:
            places = self.samples + torch.arange(len(counted))
        else:
            places = (self.labelled - 1 + counted.cumsum(dim=0)).clamp(min=0)
        self._places.append(places.repeat_interleave(batch.each))
        self._counted.append(counted)
        self._marks.append(None if batch.marks is None else batch.marks.cpu())
        is_binary = bool(((targets == 0) | (targets == 1)).all())
        self._targets.append((targets.bool() if is_binary else targets.clone()).cpu())
        self.samples += len(counted)
        self.labelled += int(counted.sum())
        for layer, x in batch.features.items():
            self._shapes.setdefault(layer, (x.shape[1], x.dtype))
            self._batches.setdefault(layer, []).append((len(self._targets) - 1, len(x)))
            self._store.put(layer, x)

    @property
    def marks(self) -> Tensor | None:
        """Return the mark of each sample that has a place, on the host; ``None`` if any batch has none."""
        if not self._marks or any(part is None for part in self._marks):
            return None
        marks = torch.cat([part for part in self._marks if part is not None])
        if self._numbers_left_out:
            return marks
        return marks[torch.cat(self._counted)]

    @property
    def places(self) -> Tensor:
        """Return the place of the sample of each target, ``(rows,)``."""
        return self._place_of(None)

    def by_sample(self, layer: str | None, values: Tensor) -> Tensor:
        """Return the sums over the rows of each sample that has a place, of values of the rows, ``(..., rows)``.

        The rows are those of a layer, or with ``None`` those of the targets.
        """
        places = self.samples if self._numbers_left_out else self.labelled
        sums = torch.zeros(*values.shape[:-1], places, dtype=values.dtype)
        return sums.index_add_(-1, self._place_of(layer), values.cpu())

    def _place_of(self, layer: str | None) -> Tensor:
        """Return the place of each row of a layer, or of each target."""
        if layer is None:
            return torch.cat(self._places)
        batches = self._batches[layer]
        return torch.cat([self._places[i].repeat(rows // len(self._places[i])) for i, rows in batches])

    @property
    def targets(self) -> Tensor:
        """Return the targets ``(rows, outputs)`` of all samples, on the host."""
        return torch.cat([part.float() if part.dtype == torch.bool else part for part in self._targets])

    def targets_of(self, layer: str) -> Tensor:
        """Return the target of each row of a layer, on the host."""
        each = [LayerBatch({}, self._targets[i]).targets_of(rows) for i, rows in self._batches[layer]]
        return torch.cat(each)

    def reader(self, ranks: Ranks, device: torch.device | str) -> Callable[[str], LayerSamples | None]:
        """Return a function that hands out a layer's samples, once: a whole layer is freed when the caller drops it.

        A sample is in the same fold however many processes share the samples.

        Args:
            ranks: the processes that share the samples; each calls this method, and reads the same layers.
            device: device of the tensors that are handed out.

        Returns:
            A function of a layer's name. It returns the samples of this process, which may have no row, or ``None`` if
            no process has any of the layer. If processes differ in the width of a layer, that of the first one counts.
        """
        shapes = ranks.union(self._shapes)
        # Places are taken modulo the number of samples, which must not be 0.
        samples = max(int(ranks.total(torch.tensor(self.samples if self._numbers_left_out else self.labelled))), 1)
        folds = draw_folds(samples)

        def read(layer: str) -> LayerSamples | None:
            if layer not in shapes:
                return None
            if self._shapes.get(layer) != shapes[layer]:
                width, dtype = shapes[layer]
                nothing = torch.zeros(0, width, dtype=dtype, device=device)
                targets = torch.zeros(0, self._question.outputs, device=device)
                return LayerSamples(layer, nothing, targets, folds[:0].to(device))
            fold = folds[(self._place_of(layer) * ranks.number + ranks.rank) % samples]
            features = self._features(layer, device)
            return LayerSamples(layer, features, self.targets_of(layer).to(device), fold.to(device))

        return read

    def _features(self, layer: str, device: torch.device | str) -> Tensor | Parts:
        parts = self._store.read(layer)
        if not self._store.is_read_whole(layer):
            return Parts(parts.lengths, lambda i: parts[i].to(device))
        whole = torch.cat(list(parts)).to(device)
        self._store.drop(layer)
        return whole


class MemoryStore:
    """Keep features in memory as they are.

    Args:
        copy: copies features, in case they will not stay as they are; by default they are kept without a copy.
    """

    def __init__(self, copy: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        self._copy = copy
        self._kept: dict[str, list[Tensor]] = {}

    def put(self, layer: str, x: Tensor) -> None:
        """Keep a part of the features of a layer."""
        self._kept.setdefault(layer, []).append(self._copy(x))

    def read(self, layer: str) -> Parts:
        """Return the parts of a layer."""
        kept = self._kept[layer]
        return Parts([len(part) for part in kept], lambda i: kept[i])

    def is_read_whole(self, layer: str) -> bool:
        """Return true: features are in memory already."""
        return True

    def drop(self, layer: str) -> None:
        """Discard the features of a layer."""
        self._kept.pop(layer, None)


@dataclass(frozen=True)
class _Filed:
    """Locate some rows in a layer's file of one precision."""

    path: Path
    first: int
    samples: int
    dtype: torch.dtype


class HalfPrecisionStore:
    """Keep features in half their bytes, in memory up to a budget and after that in temporary files.

    Features in float32 are kept in float16, in deviations from the mean of the layer's first batch in which features
    vary: the relative rounding of 2^-11 is far below what a probe can tell. Features that would overflow in float16,
    and features in float64, are kept as they are.

    Args:
        max_bytes: greatest number of bytes of features in memory; files, one for each layer and precision, take the
            rest. A layer larger than a quarter of this is read part by part while its probe is fitted.

    Attributes:
        memory_bytes: bytes of the features that were kept in memory.
        file_bytes: bytes of the features that were written to files.
    """

    def __init__(self, max_bytes: int) -> None:
        self.memory_bytes = 0
        self.file_bytes = 0
        self._max_bytes = max_bytes
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files: dict[tuple[str, torch.dtype], IO[bytes]] = {}
        self._kept: dict[str, list[Tensor | _Filed]] = {}
        self._shift: dict[str, tuple[Tensor, Tensor]] = {}
        self._widths: dict[str, int] = {}

    def put(self, layer: str, x: Tensor) -> None:
        """Keep a part of the features of a layer.

        Raises:
            OSError: there is no space for a file; all files are deleted.
        """
        part = self._encode(layer, x)
        size = part.numel() * part.element_size()
        self._widths[layer] = x.shape[1]
        if self.memory_bytes + size <= self._max_bytes:
            self.memory_bytes += size
            self._kept.setdefault(layer, []).append(part)
        else:
            self._kept.setdefault(layer, []).append(self._write(layer, part))
            self.file_bytes += size

    def read(self, layer: str) -> Parts:
        """Return a layer in blocks of about 2 048 rows, each of which is decoded anew whenever it is read."""
        blocks = self._blocks(layer)

        def block(i: int) -> Tensor:
            return torch.cat([self._decode(layer, part) for part in blocks[i]])

        return Parts([sum(_samples(part) for part in block) for block in blocks], block)

    def is_read_whole(self, layer: str) -> bool:
        """Return whether a layer in float32 takes at most a quarter of the budget."""
        values = self._widths[layer] * sum(_samples(part) for part in self._kept[layer])
        return 4 * values <= self._max_bytes / 4

    def drop(self, layer: str) -> None:
        """Discard what is in memory of a layer; its files stay until :meth:`close`."""
        self._kept.pop(layer, None)

    def close(self) -> None:
        """Discard all features, and delete the files."""
        for file in self._files.values():
            file.close()
        if self._folder is not None:
            self._folder.cleanup()
        self._files = {}
        self._folder = None
        self._kept = {}

    def _encode(self, layer: str, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            return x.cpu()
        if layer not in self._shift:
            deviation = x.std(dim=0, unbiased=False)
            # Features that are constant in the first batch may vary later, so their scale is not 0.
            scale = deviation + 1e-2 * deviation.mean()
            # A batch of one sample, for example, has no deviation to measure in.
            if not bool((scale.isfinite() & (scale > 0)).all()):
                return x.cpu()
            self._shift[layer] = x.mean(dim=0), scale
        mean, scale = (part.to(x.device) for part in self._shift[layer])
        moved = (x - mean) / scale
        return moved.half().cpu() if bool((moved.abs() <= _LARGEST).all()) else x.cpu()

    def _decode(self, layer: str, part: Tensor | _Filed) -> Tensor:
        x = self._map(layer, part) if isinstance(part, _Filed) else part
        if x.dtype != torch.float16:
            return x
        mean, scale = (part.cpu() for part in self._shift[layer])
        return x.float().mul_(scale).add_(mean)

    def _blocks(self, layer: str) -> list[list[Tensor | _Filed]]:
        """Join parts into blocks, and parts that follow one another in a file into one part."""
        blocks: list[list[Tensor | _Filed]] = []
        for part in self._kept[layer]:
            last = blocks[-1] if blocks else []
            if last and sum(map(_samples, last)) + _samples(part) <= _BLOCK:
                before = last[-1]
                if isinstance(part, _Filed) and isinstance(before, _Filed) and part.path == before.path:
                    last[-1] = _Filed(before.path, before.first, before.samples + part.samples, part.dtype)
                else:
                    last.append(part)
            else:
                blocks.append([part])
        return blocks

    def _write(self, layer: str, part: Tensor) -> _Filed:
        try:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="lightning-probes-")
            if (layer, part.dtype) not in self._files:
                new = Path(self._folder.name) / f"{len(self._files)}.features"
                self._files[layer, part.dtype] = new.open("w+b", buffering=0)
            file = self._files[layer, part.dtype]
            first = file.tell() // (part.shape[1] * part.element_size())
            data = memoryview(part.contiguous().numpy().tobytes())
            while data:
                data = data[file.write(data) :]
        except OSError as error:
            folder, size = Path(tempfile.gettempdir()), self.file_bytes
            self.close()
            raise OSError(
                error.errno,
                f"features cannot be written to {folder} after {size / 2**20:,.0f} MiB ({error.strerror}); nothing of "
                "them is left there. Allow more memory (max_bytes), probe fewer layers, or set TMPDIR to a larger disk",
            ) from error
        return _Filed(Path(file.name), first, len(part), part.dtype)

    def _map(self, layer: str, filed: _Filed) -> Tensor:
        # The file is mapped only as long as the tensor lives, so that pages that were read do not add up.
        width, end = self._widths[layer], filed.first + filed.samples
        rows = torch.from_file(str(filed.path), shared=False, size=end * width, dtype=filed.dtype).view(end, width)
        return rows[filed.first :]


def hash_rows(x: Tensor) -> Tensor:
    """Return a number for each row of ``(rows, width)``, which depends on the bits of its values as floats in order.

    Rows of other widths have other numbers.
    """
    if not x.is_floating_point():
        # Targets of zeros and ones are kept in a byte each, and others of the same kind are not.
        return torch.cat([hash_rows(rows.float()) for rows in x.split(4096)])  # type: ignore[no-untyped-call]
    return _products(x.contiguous().view(torch.int32), 8 * x.shape[1] + x.element_size())


def mark_rows(x: Tensor) -> Tensor:
    """Return a number for each row of ``(rows, width)``, as :func:`hash_rows` does, at about an eighth of its price.

    It depends on the sums of eight neighbours each: rows that differ have another number, unless their difference is in
    the order of neighbours alone.
    """
    if x.is_floating_point():
        x = (x if x.dtype in (torch.float32, torch.float64) else x.float()).contiguous().view(torch.int32)
    elif x.dtype == torch.bool:
        x = x.to(torch.uint8)
    eighths = x.shape[1] // 8
    sums = x[:, : 8 * eighths].reshape(len(x), eighths, 8).sum(dim=2, dtype=torch.long)
    return _products(torch.cat([sums, x[:, 8 * eighths :].long()], dim=1), x.shape[1])


def _products(numbers: Tensor, seed: int) -> Tensor:
    """Return the sums of integers ``(rows, width)`` times factors that each seed and width has."""
    factors = _factors(numbers.shape[1] + 1, seed, numbers.device)
    # Integers wrap around alike on every device. A few rows at a time stay in the cache.
    some = numbers.split(max(1, _AT_ONCE // max(numbers.shape[1], 1)))  # type: ignore[no-untyped-call]
    return torch.cat([(rows.long() * factors[1:]).sum(dim=1) for rows in some]) + factors[0]


@lru_cache(maxsize=16)
def _factors(number: int, seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    ends = torch.iinfo(torch.long)
    factors = torch.randint(ends.min, ends.max, (number,), generator=generator, device="cpu")
    return (factors | 1).to(device)  # A product with an odd number loses no bit.


def _scattered(x: Tensor) -> Tensor:
    """Make each bit of integers depend on many of theirs."""
    return (x ^ (x >> 32)) * _GOLDEN


def _samples(part: Tensor | _Filed) -> int:
    return part.samples if isinstance(part, _Filed) else len(part)
