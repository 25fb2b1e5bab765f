"""Hold the calls of modules that a step made, as plain data that can be kept and run again."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_probes.network.batches import tensors_in
from lightning_probes.network.torch_internals import tree_map

_PLAIN: tuple[type, ...] = (type(None), bool, int, float, complex, str, bytes, slice, range, enum.Enum)
_PLAIN += (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)


@dataclass(frozen=True)
class View:
    """Hold how one tensor, the view, lies in the memory of another, the base.

    Attributes:
        size: shape of the view.
        stride: strides of the view, in elements.
        offset: elements from the start of the base to the start of the view.
        base: shape and strides of the base; the view exists only in a tensor that is laid out in the same way.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    base: tuple[tuple[int, ...], tuple[int, ...]]

    @classmethod
    def of(cls, tensor: Tensor, other: Tensor) -> View | None:
        """Return how ``tensor`` lies in ``other``, which shares its storage.

        Returns:
            The view; ``None`` if ``tensor`` does not lie within ``other`` or has another type.
        """
        offset = int(tensor.storage_offset()) - int(other.storage_offset())
        if tensor.dtype != other.dtype or offset < 0 or offset + _extent(tensor) > _extent(other):
            return None
        return cls(tuple(tensor.shape), tensor.stride(), offset, (tuple(other.shape), other.stride()))

    def on(self, other: Tensor) -> Tensor:
        """Return this view of ``other``.

        Raises:
            CannotRunAgainError: ``other`` differs from the base in its shape or strides.
        """
        if (tuple(other.shape), other.stride()) != self.base:
            raise CannotRunAgainError(f"an output is laid out differently from that of training: {list(other.shape)}")
        return other.as_strided(self.size, self.stride, other.storage_offset() + self.offset)


def _extent(tensor: Tensor) -> int:
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((n - 1) * step for n, step in steps) if tensor.numel() else 0


@dataclass(frozen=True)
class Link:
    """Stand in for an input that an earlier call of the step put out.

    Attributes:
        call: index of the earlier call in the step.
        position: index of the tensor among :func:`tensors_in` the output of that call.
        view: how the input lies in that tensor, if it was flattened, sliced or transposed between the two calls.
    """

    call: int
    position: int
    view: View | None = None


@dataclass(frozen=True)
class Weight:
    """Stand in for a parameter or buffer of the model that was given to a call as an argument."""

    name: str
    """Name the parameter or buffer as the model does."""


@dataclass(frozen=True)
class Call:
    """Hold a call of a module.

    Attributes:
        module: the module that was called.
        args: its positional arguments, with each tensor replaced by a detached copy, a `Link` or a `Weight`.
        kwargs: its keyword arguments, with tensors replaced likewise.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class CannotRunAgainError(Exception):
    """Say why running the calls of a step again would not give the network's features."""


def num_bytes(calls: list[Call]) -> int:
    """Return the bytes of all input tensors that ``calls`` keep, counting a tensor given to several calls once."""
    kept = {id(leaf): leaf for call in calls for leaf in tensors_in((call.args, call.kwargs))}
    return sum(tensor.numel() * tensor.element_size() for tensor in kept.values())


def renumber(call: Call, order: Mapping[int, int]) -> Call:
    """Return a copy of ``call`` whose links point to the new indices of their calls, ``{old: new}``."""

    def moved(leaf: Any) -> Any:
        return replace(leaf, call=order[leaf.call]) if isinstance(leaf, Link) else leaf

    return replace(call, args=tree_map(moved, call.args), kwargs=tree_map(moved, call.kwargs))


def is_plain(leaf: Any) -> bool:
    """Return whether ``leaf`` is an immutable value, a class, or a function without state of its own.

    A bound method or a closure is not plain: calling it again could change the state that it holds.
    """
    if isinstance(leaf, _PLAIN):
        return True
    if inspect.isfunction(leaf):
        return leaf.__closure__ is None
    owner = getattr(leaf, "__self__", None)
    return inspect.isclass(leaf) or (inspect.isbuiltin(leaf) and (owner is None or inspect.ismodule(owner)))


def storage_of(tensor: Tensor) -> Any:
    """Return a key of the storage of ``tensor``: its device and address, or the tensor's id where it has no address."""
    return tensor.device, tensor.untyped_storage().data_ptr() or id(tensor)


def key_of(tensor: Tensor) -> Any:
    """Return a key that is equal for two tensors of the same storage, offset, shape, strides and type."""
    return *storage_of(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype
