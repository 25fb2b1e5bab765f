"""A step's calls of modules, as they are kept to be run again: data and nothing else."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_PLAIN: tuple[type, ...] = (type(None), bool, int, float, complex, str, bytes, slice, range, enum.Enum)
_PLAIN += (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)


@dataclass(frozen=True)
class View:
    """How a tensor lies in the memory of another: its shape and strides, from an offset in elements on.

    ``base`` are shape and strides of the other: memory that is laid out differently has no such view.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    base: tuple[tuple[int, ...], tuple[int, ...]]

    @classmethod
    def of(cls, tensor: Tensor, other: Tensor) -> View | None:
        """``tensor``, which shares its storage with ``other``; ``None`` unless it lies within it."""
        offset = int(tensor.storage_offset()) - int(other.storage_offset())
        if tensor.dtype != other.dtype or offset < 0 or offset + _extent(tensor) > _extent(other):
            return None
        return cls(tuple(tensor.shape), tensor.stride(), offset, (tuple(other.shape), other.stride()))

    def on(self, other: Tensor) -> Tensor:
        """The same view of another tensor.

        Raises:
            CannotRunAgainError: it is laid out differently.
        """
        if (tuple(other.shape), other.stride()) != self.base:
            raise CannotRunAgainError(f"an output is laid out differently from that of training: {list(other.shape)}")
        return other.as_strided(self.size, self.stride, other.storage_offset() + self.offset)


def _extent(tensor: Tensor) -> int:
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((n - 1) * step for n, step in steps) if tensor.numel() else 0


@dataclass(frozen=True)
class Link:
    """In the place of a tensor that came out of an earlier call of the step: :func:`tensors_in` its output, there.

    ``view``: it is one of that output, as flattened, sliced or transposed between two modules.
    """

    call: int
    position: int
    view: View | None = None


@dataclass(frozen=True)
class Weight:
    """In the place of a parameter or buffer of the model that was given as an argument: its name in the model."""

    name: str


@dataclass(frozen=True)
class Call:
    """A call of ``module``. Tensors in ``args`` and ``kwargs`` are detached copies, or markers."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class CannotRunAgainError(Exception):
    """Why the calls of a step would not give the network's features when they are run again."""


def tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors in nested containers, mappings and dataclasses, in an order that is the same each time."""
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):
            yield from chain.from_iterable(tensors_in(value) for value in leaf.values())
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            yield from chain.from_iterable(tensors_in(getattr(leaf, field.name)) for field in fields(leaf))


def num_bytes(calls: list[Call]) -> int:
    """Memory of the kept inputs, in bytes; a tensor given to several calls counts once."""
    kept = {id(leaf): leaf for call in calls for leaf in tensors_in((call.args, call.kwargs))}
    return sum(tensor.numel() * tensor.element_size() for tensor in kept.values())


def renumber(call: Call, order: Mapping[int, int]) -> Call:
    """``call`` with the links of its inputs given new numbers ``{old: new}``."""

    def moved(leaf: Any) -> Any:
        return replace(leaf, call=order[leaf.call]) if isinstance(leaf, Link) else leaf

    return replace(call, args=pytree.tree_map(moved, call.args), kwargs=pytree.tree_map(moved, call.kwargs))


def is_plain(leaf: Any) -> bool:
    """Whether it is a value that never changes, or a class or function that holds nothing.

    A bound method or closure could be told of each run.
    """
    if isinstance(leaf, _PLAIN):
        return True
    if inspect.isfunction(leaf):
        return leaf.__closure__ is None
    owner = getattr(leaf, "__self__", None)
    return inspect.isclass(leaf) or (inspect.isbuiltin(leaf) and (owner is None or inspect.ismodule(owner)))


def version_of(tensor: Tensor) -> int:
    """How often it was written to, as far as that is counted."""
    return 0 if tensor.is_inference() else tensor._version


def storage_of(tensor: Tensor) -> Any:
    """Whose memory it is in."""
    return tensor.device, tensor.untyped_storage().data_ptr() or id(tensor)


def key_of(tensor: Tensor) -> Any:
    """The same for two tensors that are one place in one memory."""
    return *storage_of(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype
