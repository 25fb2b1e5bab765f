"""Hold the calls of modules that a step made, as plain data that can be kept and run again."""

from __future__ import annotations

import copy
import enum
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_probes.network.batches import extent_of, storage_of, tensors_in
from lightning_probes.network.torch_internals import register_tree_node, tree_map

_PLAIN: tuple[type, ...] = (type(None), bool, int, float, complex, str, bytes, slice, range, enum.Enum)
_PLAIN += (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)

_LARGEST = 10_000
"""Bound the parts of an object that is copied: one of more parts is a data set or a program, not an argument."""


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
        if tensor.dtype != other.dtype or offset < 0 or offset + extent_of(tensor) > extent_of(other):
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


@dataclass(frozen=True)
class Reshaped:
    """Hold the shape of a tensor whose values are those of another, in the same order."""

    size: tuple[int, ...]

    def on(self, other: Tensor) -> Tensor:
        """Return the values of ``other`` in this shape.

        Raises:
            CannotRunAgainError: ``other`` has another number of values.
        """
        try:
            return other.reshape(self.size)
        except RuntimeError as error:
            raise CannotRunAgainError(f"an output of {list(other.shape)} was one of {list(self.size)}") from error


@dataclass(frozen=True)
class Link:
    """Stand in for an input that an earlier call of the step put out.

    Attributes:
        call: index of the earlier call in the step.
        position: index of the tensor among :func:`tensors_in` the output of that call.
        view: how the input lies in that tensor, if it was flattened, sliced or transposed between the two calls; or its
            shape, if its values were copied.
    """

    call: int
    position: int
    view: View | Reshaped | None = None


@dataclass(frozen=True)
class Weight:
    """Stand in for a parameter or buffer of the model that was given to a call as an argument."""

    name: str
    """Name the parameter or buffer as the model does."""


class Copied:
    """Hold a copy of an object that was given to a call, a graph or a dataclass, apart from its tensors.

    For functions on trees it is a container of what stands in the place of the tensors.

    Args:
        template: the copy, in which each tensor is replaced by one of ``markers``.
        markers: as many objects as there are parts.
        parts: what stands in the place of each tensor: a tensor, a `Link` or a `Weight`.
        kind: class of the object if it is a tuple, of which the template is then a list; ``None`` if it is none.
    """

    def __init__(self, template: Any, markers: list[object], parts: list[Any], kind: type | None = None) -> None:
        self.parts = parts
        self._template = template
        self._markers = markers
        self._kind = kind

    @classmethod
    def of(cls, value: Any, keep: Callable[[Tensor], Any]) -> Copied:
        """Copy an object, with all objects that it holds.

        Args:
            value: the object.
            keep: returns what is kept of a tensor in it.

        Raises:
            CannotRunAgainError: what ``keep`` raises.
            Exception: the object cannot be copied without harm: it holds a module, a random generator, an array, a
                function with state or something that has no copy.
        """
        tensors: dict[int, Tensor] = {}
        _collect(value, {}, tensors)
        parts, markers = [keep(tensor) for tensor in tensors.values()], [object() for _ in tensors]
        memo: dict[int, Any] = dict(zip(tensors, markers, strict=True))
        # Tuples of a class of their own may refuse a marker; they are made without being checked again.
        kind = type(value) if isinstance(value, tuple) else None
        template = copy.deepcopy(value if kind is None else list(value), memo)
        left: dict[int, Tensor] = {}
        _collect(template, {}, left)
        if left:
            raise TypeError("its own copy shares tensors with it")
        return cls(template, markers, parts, kind)

    def made(self) -> Any:
        """Return a new object with the parts, which are tensors by now, in their places."""
        memo: dict[int, Any] = {id(marker): part for marker, part in zip(self._markers, self.parts, strict=True)}
        made = copy.deepcopy(self._template, memo)
        return made if self._kind is None else tuple.__new__(self._kind, made)

    def with_parts(self, parts: Any) -> Copied:
        """Return a copy of the same object with other parts."""
        return Copied(self._template, self._markers, list(parts), self._kind)


register_tree_node(Copied, lambda held: (held.parts, held), lambda parts, held: held.with_parts(parts))


def with_objects(tree: Any) -> Any:
    """Return a tree of arguments in which each :class:`Copied` is made into an object."""
    return tree_map(
        lambda leaf: leaf.made() if isinstance(leaf, Copied) else leaf, tree, is_leaf=lambda x: isinstance(x, Copied)
    )


def _collect(value: Any, seen: dict[int, Any], tensors: dict[int, Tensor]) -> None:
    """Find the tensors that an object holds, down through everything that a copy of it would copy."""
    if id(value) in seen or is_plain(value):
        return
    seen[id(value)] = value  # Held, so that no other object gets its id.
    if isinstance(value, Tensor):
        tensors[id(value)] = value
        return
    # The values of an array may be computed from outputs of other layers, which cannot be seen.
    if isinstance(value, (nn.Module, torch.Generator)) or hasattr(value, "__array_interface__") or len(seen) > _LARGEST:
        raise TypeError(f"{type(value).__name__} has no copy of its own")
    inside: list[Any]
    if type(value) is dict:
        inside = [*value.keys(), *value.values()]
    elif type(value) in (list, tuple, set, frozenset):
        inside = list(value)
    else:
        # What copy.deepcopy copies of an object: arguments of its constructor, state, items and pairs.
        reduced = value.__reduce_ex__(4)
        inside = [reduced] if isinstance(reduced, str) else [*reduced[1:3], *map(list, filter(None, reduced[3:5]))]
    for part in inside:
        _collect(part, seen, tensors)


@dataclass(frozen=True)
class Call:
    """Hold a call of a module.

    Attributes:
        module: the module that was called.
        args: its positional arguments, with each tensor replaced by a detached copy, a `Link` or a `Weight`, and each
            object that holds tensors by a `Copied`.
        kwargs: its keyword arguments, with tensors replaced likewise.
        heard: ``{layer: number of its calls in the step before this one}``, so that calls of layers have the same
            numbers where earlier calls are not run again.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    heard: Mapping[str, int] = field(default_factory=dict)


class CannotRunAgainError(Exception):
    """Say why running the calls of a step again would not give the network's features."""


@dataclass(frozen=True)
class RecordedStep:
    """Hold the calls of a step that can be run again.

    Attributes:
        calls: the calls, in order.
        reason: why others cannot be run again; empty if all can.
        numbers: ``{id of an input: the input, and the sample of each of its elements}``, of the inputs that could be
            followed to samples of the batch; empty if nothing was followed.
        is_guessed: whether the samples of an input were guessed from its shape.
    """

    calls: list[Call]
    reason: str = ""
    numbers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    is_guessed: bool = False


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


def key_of(tensor: Tensor) -> Any:
    """Return a key that is equal for two tensors of the same storage, offset, shape, strides and type."""
    return *storage_of(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype
