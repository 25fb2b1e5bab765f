"""Follow the samples of a batch through the operations that a step does outside of its modules.

Every tensor of the batch is given a tensor of sample numbers. Operations that move values move the numbers as well;
operations on corresponding elements join the numbers of their operands.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_probes.network.arrangement import index_of
from lightning_probes.network.batches import extent_of, parts_of, storage_of, tensors_in
from lightning_probes.network.torch_internals import OperationMode, has_compiled, is_in_backward, tree_leaves, tree_map

NOBODY = -1
"""Number an element that is of no sample of the batch, as far as it could be followed."""

MIXED = -2
"""Number an element that is computed from several samples, as in mixup."""

COMPUTED = -3
"""Number an element that is computed from what a module put out, whose samples are not followed."""

_MOVES = {
    "cat",
    "stack",
    "index",
    "gather",
    "index_select",
    "roll",
    "flip",
    "repeat",
    "repeat_interleave",
    "unfold",
    "take",
    "masked_select",
    "copy",
    "_pack_padded_sequence",
}
"""Name the operations that only move values: on sample numbers they do the same."""

_COPIES = {"clone", "_to_copy", "contiguous", "lift_fresh_copy"}
"""Name the operations that keep every value in its place."""

_LARGEST = 2**24
"""Bound the elements of a tensor whose content is compared where no operation could be followed."""


@dataclass
class _Owned:
    """Hold a tensor of the batch and the sample of each element."""

    tensor: Tensor
    numbers: Tensor
    """Hold sample numbers, which broadcast to the tensor. A tensor that is not the network's input has numbers from
    ``samples`` on, which are those of no label."""


class Provenance:
    """Know which sample the elements of a tensor come from, during one step.

    Args:
        batch: the batch of the step.
        labels: the labels in the batch, as the user gave them, or ``None`` if they were computed.
        samples: number of labels.
        inputs: what ``input`` names in the batch; ``None`` for everything beside the labels.
        index: sample of each row, if the batch has such a vector.
        rows: sample of each row of the input, if a layout says so.
        may_trace: whether operations may be followed at all.

    Attributes:
        traces: whether operations are followed. Else shared memory, equal content and shapes have to serve.
    """

    def __init__(
        self,
        batch: Any,
        labels: Any,
        samples: int,
        inputs: Any = None,
        *,
        index: Tensor | None = None,
        rows: Tensor | None = None,
        may_trace: bool = True,
    ) -> None:
        self.samples = samples
        self._numbers: dict[Any, tuple[int, Tensor]] = {}
        self._held: list[Tensor] = []
        self._owned: list[_Owned] = []
        self._is_paused = False
        self._mode = OperationMode(self._follow)
        self.traces = may_trace and self._mode.is_known and not has_compiled()
        self._find(batch, labels, inputs, index, rows)

    # What is known at the start

    def _find(self, batch: Any, labels: Any, inputs: Any, index: Tensor | None, rows: Tensor | None) -> None:
        named = {storage_of(tensor) for tensor, _ in _tensors_and_steps(inputs)} if inputs is not None else set()
        answers = {storage_of(tensor) for tensor, _ in _tensors_and_steps(labels)}
        found = [(tensor, steps) for tensor, steps in _tensors_and_steps(batch) if storage_of(tensor) not in answers]
        # A function of the user's may compute the input anew, which then is no tensor of the batch.
        named &= {storage_of(tensor) for tensor, _ in found}
        for tensor, steps in found:
            if index is not None and tensor is index:
                continue
            numbers = steps if steps is not None else numbers_of(tensor, self.samples, index, rows)
            if numbers is not None:
                is_input = not named or storage_of(tensor) in named
                numbers = numbers.to(tensor.device, torch.int32)
                self._owned.append(_Owned(tensor, numbers if is_input else numbers + self.samples))
                self._set(tensor, self._owned[-1].numbers.expand(tensor.shape))

    # Following a step

    def start(self) -> None:
        """Follow operations from now on, if they may be followed."""
        if self.traces:
            self._mode.start()

    def stop(self) -> None:
        """Follow no operation any more, and forget what was known."""
        self._mode.stop()
        self.traces = False
        # The mode and this object know each other, so that the tensors would stay until the next garbage collection.
        self._numbers, self._held, self._owned = {}, [], []

    def pause(self) -> None:
        """Follow no operation until :meth:`go_on`, since a module runs, whose code may be compiled."""
        if self.traces and not self._is_paused:
            self._is_paused = True
            # Below a mode of the user's that a module enters in, this one stays where it is.
            self._mode.stop()

    def go_on(self) -> None:
        """Follow operations again."""
        if self.traces and self._is_paused:
            self._mode.start()
            self._is_paused = False

    def of(self, tensor: Tensor) -> tuple[Tensor | None, bool]:
        """Return the sample of each element of a tensor that a module is given, and whether that is a mere guess.

        ``None`` stands for a tensor that is of no sample, as far as it could be followed.
        """
        numbers = self._known(tensor)
        if numbers is None:
            numbers = self._by_content(tensor)
        is_computed = numbers is not None and bool((numbers == COMPUTED).all())
        if numbers is not None and not is_computed:
            return numbers, False
        # Where operations are followed, a tensor that none of them made from the batch is not of the batch.
        is_like_a_batch = tensor.dim() > 0 and len(tensor) == self.samples and tensor.is_floating_point()
        if not is_like_a_batch or (self.traces and not is_computed):
            return None, False
        return _along(0, tensor, self.samples).expand(tensor.shape), True

    def remember(self, output: Any) -> None:
        """Take note of what a module put out: whose it is will not be known, but it comes from somewhere."""
        if self.traces:
            for tensor in _plain(list(tensors_in(output))):
                if self._known(tensor) is None:
                    self._set(tensor, tensor.new_full((), COMPUTED, dtype=torch.int32).expand(tensor.shape))

    def _known(self, tensor: Tensor) -> Tensor | None:
        known = self._numbers.get(_key(tensor))
        if known is None:
            return None
        first, numbers = known
        place = tensor.storage_offset() - first
        if place < 0 or place + extent_of(tensor) > len(numbers):
            return None
        return numbers.as_strided(tensor.shape, tensor.stride(), place).clone()

    def _set(self, tensor: Tensor, numbers: Tensor) -> None:
        if any(size > 1 and not step for size, step in zip(tensor.shape, tensor.stride(), strict=True)):
            return  # An expanded tensor has one element in many places.
        key, start = _key(tensor), int(tensor.storage_offset())
        end = start + extent_of(tensor)
        first, known = self._numbers.get(key, (start, None))
        if known is None or start < first or end > first + len(known):
            # Numbers span what has been seen of a storage, which may hold a whole data set.
            low, high = min(start, first), max(end, first + (0 if known is None else len(known)))
            wide = torch.full((high - low,), NOBODY, dtype=torch.int32, device=tensor.device)
            if known is None:
                # An address must not be used a second time while its numbers are known.
                self._held.append(tensor.detach())
            else:
                wide[first - low : first - low + len(known)] = known
            first, known = low, wide
            self._numbers[key] = first, known
        known.as_strided(tensor.shape, tensor.stride(), start - first).copy_(numbers.to(torch.int32))

    def _follow(
        self, name: str, is_changing: bool, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, operation: Any
    ) -> None:
        if is_in_backward():
            return
        try:
            with torch.no_grad():
                self._move(name, is_changing, args, kwargs, output, operation)
        except Exception:  # Whatever an operation does that is not foreseen: its result is of nobody.
            with suppress(Exception), torch.no_grad():
                for tensor in _plain(output):
                    if _key(tensor) not in self._numbers:
                        self._set(tensor, torch.full_like(tensor, MIXED, dtype=torch.int32))

    def _move(
        self, name: str, is_changing: bool, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, operation: Any
    ) -> None:
        given = _plain((args, kwargs))
        known = {id(tensor): self._known(tensor) for tensor in given}
        outputs = _plain(output)
        is_new = [_key(tensor) not in self._numbers for tensor in outputs]
        if all(numbers is None for numbers in known.values()) or not outputs:
            return
        if not is_changing and not any(is_new):
            return  # A view, whose numbers are those of its storage.
        base = name.split("::")[-1].rstrip("_")

        def numbers_of_leaf(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            numbers = known.get(id(leaf))
            # Some operations know no integers; a float holds the number of any sample.
            return torch.full_like(leaf, NOBODY, dtype=torch.float32) if numbers is None else numbers.float()

        moved: Sequence[Tensor | None]
        source = known.get(id(args[0])) if args else None
        if base in _COPIES:
            moved = [source]
        elif base == "constant_pad_nd" and source is not None:
            moved = [torch.constant_pad_nd(source, args[1], NOBODY)]
        elif base in _MOVES:
            # The first argument holds what is moved; others, such as indices and lengths, are taken as they are.
            values = 2 if base == "copy" else 1
            options = {key: value for key, value in kwargs.items() if key not in ("dtype", "out")}
            found = operation(*tree_map(numbers_of_leaf, args[:values]), *args[values:], **options)
            moved = _plain(found)[: len(outputs)]
        else:
            moved = [self._joined(given, known, outputs[0])]
        kinds = {tensor.dtype for tensor in given if known[id(tensor)] is not None}
        for tensor, numbers in zip(outputs, moved, strict=False):
            # What an operation puts out beside the values, such as the sizes of steps, is of no sample.
            if numbers is not None and (len(outputs) == 1 or tensor.dtype in kinds):
                self._set(tensor, numbers)

    def _joined(self, given: list[Tensor], known: dict[int, Tensor | None], output: Tensor) -> Tensor:
        """Return the numbers of an output each of whose elements, or rows, is computed from the corresponding ones."""
        try:
            is_elementwise = torch.broadcast_shapes(*(x.shape for x in given)) == output.shape  # type: ignore[no-untyped-call]
        except RuntimeError:
            is_elementwise = False
        if is_elementwise:
            joined = torch.full(output.shape, NOBODY, dtype=torch.int32, device=output.device)
            for tensor in given:
                if (numbers := known[id(tensor)]) is not None:
                    numbers = numbers.expand(output.shape)
                    # What a batch holds beside the input, such as a weight of each sample, is of the same sample.
                    is_same = (numbers >= 0) & (joined >= 0) & (numbers % self.samples == joined % self.samples)
                    numbers = torch.where(is_same, torch.minimum(numbers, joined), numbers)
                    joined = torch.where(is_same, numbers, joined)
                    differs = (numbers != joined) & (numbers != NOBODY) & (joined != NOBODY)
                    is_mixed = (numbers == MIXED) | (joined == MIXED) | ((numbers >= 0) & (joined >= 0))
                    joined = torch.where(joined == NOBODY, numbers, joined)
                    joined = torch.where(differs, torch.where(is_mixed, MIXED, COMPUTED), joined)
            return joined
        sources = [numbers for tensor in given if (numbers := known[id(tensor)]) is not None]
        rows = torch.full((len(output),) if output.dim() else (1,), MIXED, dtype=torch.int32, device=output.device)
        if len(sources) == 1 and output.dim() and len(sources[0]) == len(output) and sources[0].dim():
            # Believed: such an operation works on each row, as most do.
            each = sources[0].flatten(1) if sources[0].dim() > 1 else sources[0].unsqueeze(1)
            rows = torch.where(each.amin(dim=1) == each.amax(dim=1), each[:, 0], MIXED)
        return rows.view(-1, *[1] * (output.dim() - 1)).expand(output.shape) if output.dim() else rows[0]

    # Where no operation could be followed

    def _by_content(self, tensor: Tensor) -> Tensor | None:
        """Return the sample of each piece of ``tensor`` whose content stands in exactly one sample of the batch.

        A piece is the longest trailing shape that a tensor of the batch has as well.
        """
        if not tensor.dim() or tensor.numel() > _LARGEST or not tensor.numel():
            return None
        found: Tensor | None = None
        for owned in self._owned:
            source = owned.tensor
            common = 0
            while common < min(tensor.dim(), source.dim()) and tensor.shape[-1 - common] == source.shape[-1 - common]:
                common += 1
            numbers = owned.numbers.expand(source.shape)
            for trailing in range(common, 0, -1):
                if (part := _same_pieces(tensor, source, numbers, trailing)) is not None:
                    found = part if found is None else torch.where(found == NOBODY, part, found)
                    break
        return found


def _plain(value: Any) -> list[Tensor]:
    """Return the tensors in nested containers whose elements lie in a storage."""
    leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.layout == torch.strided and not leaf.is_nested]


def numbers_of(tensor: Tensor, samples: int, index: Tensor | None = None, rows: Tensor | None = None) -> Tensor | None:
    """Return the sample of each element of a tensor of the batch, which broadcasts to the tensor.

    Args:
        tensor: a tensor of the batch.
        samples: number of labels.
        index: sample of each row, if the batch has such a vector.
        rows: sample of each row, if a layout says so.

    Returns:
        The numbers; ``None`` if no dimension, or more than one but the first, has as many entries as there are labels.
    """
    if rows is not None and tensor.dim() and len(tensor) == len(rows):
        return rows.view(-1, *[1] * (tensor.dim() - 1))
    if index is not None and tensor.dim() and len(tensor) == len(index):
        return index.view(-1, *[1] * (tensor.dim() - 1))
    places = [dim for dim, size in enumerate(tensor.shape) if size == samples]
    if places and (places[0] == 0 or len(places) == 1):
        return _along(places[0], tensor, samples)
    return None


def _key(tensor: Tensor) -> Any:
    """Return a key of the storage of a tensor, as elements of this size."""
    return *storage_of(tensor), tensor.element_size()


def _along(dim: int, tensor: Tensor, samples: int) -> Tensor:
    shape = [-1 if d == dim else 1 for d in range(tensor.dim())]
    return torch.arange(samples, dtype=torch.int32, device=tensor.device).view(shape)


def _tensors_and_steps(value: Any) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield the tensors in a batch; with the data of a packed sequence the sample of each step."""
    if isinstance(value, PackedSequence):
        yield value.data, index_of(value).view(-1, *[1] * (value.data.dim() - 1))
    elif isinstance(value, Tensor):
        if not value.is_nested and value.layout == torch.strided:
            yield value, None
    else:
        for part in parts_of(value).values():
            yield from _tensors_and_steps(part)


def _same_pieces(tensor: Tensor, source: Tensor, numbers: Tensor, trailing: int) -> Tensor | None:
    """Return the sample of each element of ``tensor`` whose piece stands in one sample; ``None`` if none does."""
    leading = source.dim() - trailing
    pieces = numbers.reshape(-1, *source.shape[leading:]).flatten(1)
    if bool((pieces != pieces[:, :1]).any()):
        return None  # A piece of the batch would hold several samples.
    width = pieces.shape[1]
    owners = pieces[:, 0]
    known = source.to(tensor.dtype).reshape(-1, width)
    given = tensor.detach().reshape(-1, width)
    # Two products with random signs stand for the content.
    generator = torch.Generator().manual_seed(0)
    signs = torch.randn(width, 2, generator=generator, dtype=torch.float64)
    marks = [(part.cpu().double() @ signs) @ signs.new_tensor([1.0, 1e3]) for part in (known, given)]
    order = marks[0].argsort()
    marks[0], owners = marks[0][order], owners.cpu()[order]
    first = torch.searchsorted(marks[0], marks[1])
    last = torch.searchsorted(marks[0], marks[1], right=True)
    known_here = last > first
    if not bool(known_here.any()):
        return None
    first, last = first.clamp(max=len(owners) - 1), last.clamp(min=1)
    changes = torch.cat([torch.zeros(1, dtype=torch.long), (owners[1:] != owners[:-1]).long().cumsum(0)])
    is_one = known_here & (changes[first] == changes[last - 1])
    found = torch.where(is_one, owners[first], NOBODY).to(tensor.device)
    shape = tensor.shape[: tensor.dim() - trailing]
    return found.view(*shape, *[1] * trailing).expand(tensor.shape).clone()
