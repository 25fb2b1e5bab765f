"""The features of every sample of a pass: in half their bytes, in memory up to a budget, after that on disk."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from lightning_probes.network.batches import repeat_views
from lightning_probes.probes.rows import Parts
from lightning_probes.probes.tasks import count_classes

_BLOCK = 2048
"""Samples that are read at a time."""

_LARGEST = 3e4
"""In deviations of a layer's first batch; float16 ends at 65 504."""


@dataclass(frozen=True)
class _Filed:
    """Where in a layer's file some samples are."""

    offset: int
    samples: int
    dtype: torch.dtype


class FeatureStore:
    """Keeps features batch by batch; read again as often as a solver wants, a block at a time.

    float32 is kept as float16, in deviations from the mean of the layer's first batch that has some: the relative
    rounding of 2^-11 is far below what a probe can tell. What would overflow there, and float64, is kept as it is.

    Args:
        max_bytes: of features in memory; what comes after goes to a temporary file a layer.

    Attributes:
        memory_bytes: of features in memory.
        file_bytes: of features in files.
        samples: batches' samples so far; a layer with several views of each has a multiple.
        labelled: those of them that are not left out.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files: dict[str, IO[bytes]] = {}
        self._kept: dict[str, list[Tensor | _Filed]] = {}
        self._batches: dict[str, list[tuple[int, int]]] = {}
        self._shift: dict[str, tuple[Tensor, Tensor]] = {}
        self._widths: dict[str, int] = {}
        self._targets: list[Tensor] = []
        self._positions: list[Tensor] = []
        self.memory_bytes = self.file_bytes = self.samples = self.labelled = 0

    @property
    def layers(self) -> list[str]:
        """Those that have been seen."""
        return list(self._kept)

    @property
    def classes(self) -> Tensor:
        """``(classes,)``: how often each occurs in this process."""
        return torch.stack([count_classes(targets.float()) for targets in self._targets]).sum(dim=0)

    def values(self, layer: str) -> int:
        """Numbers that are kept of a layer."""
        return self._widths[layer] * sum(samples for _, samples in self._batches[layer])

    def add(self, features: Mapping[str, Tensor], targets: Tensor, positions: Tensor) -> None:
        """Keep what a batch showed.

        Args:
            features: ``{layer: (samples, features)}``, samples a multiple of the targets'.
            targets: ``(batch, classes)``, distributions.
            positions: ``(batch,)``, of its samples in the whole pass.

        Raises:
            OSError: no space for a file; all files are gone.
        """
        is_hard = bool(((targets == 0) | (targets == 1)).all())
        self._targets.append((targets.bool() if is_hard else targets).cpu())
        self._positions.append(positions)
        self.samples += len(targets)
        self.labelled += int((targets.sum(dim=1) > 0).sum())
        for layer, x in features.items():
            part = self._encode(layer, x)
            size = part.numel() * part.element_size()
            self._widths[layer] = x.shape[1]
            self._batches.setdefault(layer, []).append((len(self._targets) - 1, len(x)))
            if self.memory_bytes + size <= self._max_bytes:
                self.memory_bytes += size
                self._kept.setdefault(layer, []).append(part)
            else:
                self._kept.setdefault(layer, []).append(self._write(layer, part))
                self.file_bytes += size

    def read(self, layer: str, device: torch.device | str = "cpu") -> tuple[Parts, Tensor, Tensor]:
        """The features of a layer, in the order of the pass, as they were to half precision.

        Returns:
            Parts of ``(samples, features)``, made anew whenever they are asked for; targets ``(samples, classes)``;
            positions ``(samples,)``. Views of one sample have its target and its position.
        """
        blocks = self._blocks(layer)
        lengths = [sum(_samples(part) for part in block) for block in blocks]

        def block(i: int) -> Tensor:
            return torch.cat([self._decode(layer, part) for part in blocks[i]]).to(device)

        batches = self._batches[layer]
        y = torch.cat([repeat_views(self._targets[i].float(), samples) for i, samples in batches])
        where = [self._positions[i].repeat(samples // len(self._positions[i])) for i, samples in batches]
        return Parts(lengths, block), y.to(device), torch.cat(where)

    def close(self) -> None:
        """Let go of everything; the files are gone."""
        for file in self._files.values():
            file.close()
        if self._folder is not None:
            self._folder.cleanup()
        self._files, self._folder, self._kept = {}, None, {}

    def _encode(self, layer: str, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            return x.cpu()
        if layer not in self._shift:
            deviation = x.std(dim=0, unbiased=False)
            # Features that are constant in the first batch will move later.
            scale = deviation + 1e-2 * deviation.mean()
            if not bool((scale.isfinite() & (scale > 0)).all()):  # a batch of one sample, say: nothing to measure with
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
        """Parts side by side, those that follow one another in the file as one."""
        blocks: list[list[Tensor | _Filed]] = []
        for part in self._kept[layer]:
            last = blocks[-1] if blocks else []
            if last and sum(map(_samples, last)) + _samples(part) <= _BLOCK:
                before = last[-1]
                if isinstance(part, _Filed) and isinstance(before, _Filed) and part.dtype == before.dtype:
                    last[-1] = _Filed(before.offset, before.samples + part.samples, part.dtype)
                else:
                    last.append(part)
            else:
                blocks.append([part])
        return blocks

    def _write(self, layer: str, part: Tensor) -> _Filed:
        try:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="lightning-probes-")
            if layer not in self._files:
                path = Path(self._folder.name) / f"{len(self._files)}.features"
                self._files[layer] = path.open("w+b", buffering=0)
            file = self._files[layer]
            offset, data = file.tell(), memoryview(part.contiguous().numpy().tobytes())
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
        return _Filed(offset, len(part), part.dtype)

    def _map(self, layer: str, filed: _Filed) -> Tensor:
        width = self._widths[layer]
        first = filed.offset - filed.offset % mmap.ALLOCATIONGRANULARITY
        count = filed.samples * width
        size = filed.offset - first + count * filed.dtype.itemsize
        # Mapped for as long as the tensor lives: pages that were read do not add up.
        pages = mmap.mmap(self._files[layer].fileno(), size, access=mmap.ACCESS_COPY, offset=first)
        flat = torch.frombuffer(pages, dtype=filed.dtype, count=count, offset=filed.offset - first)
        return flat.view(filed.samples, width)


def _samples(part: Tensor | _Filed) -> int:
    return part.samples if isinstance(part, _Filed) else len(part)
