"""Find input and labels in a batch, whatever kind of container it is."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from lightning_probes.network.torch_internals import tree_leaves
from lightning_probes.options import Where

_LABEL_NAMES = ("label", "labels", "target", "targets", "y", "class", "classes", "category")


def parts_of(value: Any) -> dict[Any, Any]:
    """Return the parts of a container by index, key or name; empty if ``value`` is no container.

    Containers are mappings, named tuples, lists, tuples, dataclasses, and other objects with tensors as attributes,
    such as graphs, of which the tensors are the parts.
    """
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return dict(value._asdict())
    if isinstance(value, (list, tuple)):
        return dict(enumerate(value))
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return _tensors_by_attribute(value)


def _tensors_by_attribute(value: Any) -> dict[str, Tensor]:
    own = getattr(value, "__dict__", None)
    if not isinstance(own, dict) or isinstance(value, (Tensor, nn.Module, type)):
        return {}
    found: dict[str, Tensor] = {}
    for name, part in own.items():
        # The graphs of PyTorch Geometric hand out what is in a mapping that they keep to themselves.
        named = part if name.startswith("_") and isinstance(part, Mapping) else {name: part}
        found |= {key: inner for key, inner in named.items() if isinstance(inner, Tensor) and key not in found}
    return found


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested containers, in an order that is the same each time."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        else:  # A container that is not registered is a leaf of the tree.
            for part in parts_of(leaf).values():
                yield from tensors_in(part)


def extent_of(tensor: Tensor) -> int:
    """Return how many elements of its storage a tensor spans, from its first to its last."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((n - 1) * step for n, step in steps) if tensor.numel() else 0


def storage_of(tensor: Tensor) -> Any:
    """Return a key of the storage of ``tensor``: its device and address, or the tensor's id where it has no address."""
    try:
        return tensor.device, tensor.untyped_storage().data_ptr() or id(tensor)
    except (NotImplementedError, RuntimeError):  # A sparse tensor has several storages.
        return tensor.device, id(tensor)


def pick(batch: Any, where: Where, argument: str) -> Any:
    """Return what ``where`` names in ``batch``.

    Args:
        batch: a tuple, list, mapping, dataclass, named tuple, or an object with tensors as attributes; such of them as
            have names are searched inside it too.
        where: an index, a key or a function of the batch.
        argument: name of the argument that ``where`` was given as, for the message.

    Raises:
        LookupError: ``batch`` has no such index or key; the message lists what it has.
    """
    if callable(where):
        return where(batch)
    for part in (batch, *parts_of(batch).values()):
        parts = parts_of(part)
        if where in parts:
            return parts[where]
        if isinstance(where, int) and part is batch and is_dataclass(batch) and -len(parts) <= where < len(parts):
            return list(parts.values())[where]
        if isinstance(where, int):
            if isinstance(part, (list, tuple)) and -len(part) <= where < len(part):
                return part[where]
            break
    kind = "index" if isinstance(where, int) else "key"
    near = _label_places(batch) if argument.startswith("target") else []
    names = [key for part in (batch, *parts_of(batch).values()) for key in parts_of(part) if isinstance(key, str)]
    alike = difflib.get_close_matches(where, names, 1) if isinstance(where, str) else []
    meant = f"; did you mean {alike[0]!r}?" if alike else ""
    hint = f"; its labels could be {' or '.join(f'target={place}' for place in near[:3])}" if near else ""
    raise LookupError(f"{argument}={where!r}: the batch has no such {kind}; it is {describe(batch)}{meant or hint}")


def describe(batch: Any, depth: int = 2) -> str:
    """Describe a batch in words: its keys or indices with types and shapes."""
    if isinstance(batch, Tensor):
        if batch.is_nested:
            return "a nested tensor"
        return f"{str(batch.dtype).removeprefix('torch.')}{list(batch.shape)}"
    parts = parts_of(batch)
    if not parts or not depth:
        return type(batch).__name__
    inside = ", ".join(f"{key!r}: {describe(part, depth - 1)}" for key, part in parts.items())
    return f"{type(batch).__name__} {{{inside}}}"


def as_tensor(labels: Any) -> Tensor:
    """Return ``labels`` if they are a tensor.

    Raises:
        TypeError: the labels are no tensor; the message says what to write instead.
    """
    if isinstance(labels, Tensor):
        return labels
    raise TypeError(f"target: expected a tensor of labels, found {type(labels).__name__}{_hint_of_kind(labels)}")


def _hint_of_kind(labels: Any) -> str:
    if isinstance(labels, (list, tuple)) and labels and isinstance(labels[0], str):
        return f" of str (the first: {labels[0]!r}); number the classes in the dataset: 0, 1, ..."
    if isinstance(labels, (list, tuple)) and labels and isinstance(labels[0], (int, float)):
        return "; a function makes one of it: target=lambda batch: torch.tensor(batch[1])"
    if parts_of(labels) and not isinstance(labels, (list, tuple)):
        near = _label_places(labels)
        return f": {describe(labels)}" + (f"; the labels could be its {near[0]}" if near else "")
    return ""


def _label_places(batch: Any) -> list[str]:
    """Return what ``target`` could be for ``batch``, as a user would write it, the likeliest first."""
    found: list[tuple[bool, bool, str]] = []

    def visit(part: Any, path: tuple[Any, ...], written: str) -> None:
        for key, inner in parts_of(part).items() if len(path) < 3 else ():
            below = f"{written}[{key!r}]" if isinstance(part, (Mapping, list, tuple)) else f"{written}.{key}"
            below = f"{written}.{key}" if hasattr(part, "_asdict") else below
            if not isinstance(inner, Tensor):
                visit(inner, (*path, key), below)
                continue
            is_named = str(key).lower() in _LABEL_NAMES
            is_integer = not inner.is_floating_point() and not inner.is_complex()
            if inner.dim() and ((is_integer and inner.shape[1:] in ((), (1,))) or is_named):
                # Keys are searched for one level down, indices are not.
                is_near = not path or (len(path) == 1 and isinstance(key, str))
                # Of several parts with the same key the first one is found.
                is_near = is_near and pick(batch, key, "") is inner
                found.append((not is_named, not is_integer, repr(key) if is_near else f"lambda batch: {below}"))

    visit(batch, (), "batch")
    return [place for *_, place in sorted(found, key=lambda place: place[:2])]


def pick_index(batch: Any) -> Tensor | None:
    """Return the vector ``batch`` of a batch, which has the sample of each row as in a batch of graphs, or ``None``."""
    for part in (batch, *parts_of(batch).values()):
        found = None if isinstance(part, Tensor) else parts_of(part).get("batch")
        if isinstance(found, Tensor) and found.dim() == 1 and not found.is_floating_point():
            return None if found.dtype == torch.bool else found
    return None


def unrepeated(loaders: Any, dataloader: int, batch_idx: int) -> int | None:
    """Return how many samples of a batch count, if a sampler repeats some so that all processes have equally many.

    Args:
        loaders: a DataLoader, whose samples come in the order of its sampler, or a collection of loaders.
        dataloader: index of the loader among them.
        batch_idx: index of the batch in this process.

    Returns:
        The number; ``None`` if all samples count.
    """
    loader = tree_leaves(loaders)[dataloader]
    batches = getattr(loader, "batch_sampler", None)
    # Where batches have a sampler of their own, as while Lightning predicts, that of the loader has no effect.
    found = (getattr(holder, "sampler", None) for holder in (loader, batches))
    sampler = next((one for one in found if isinstance(one, DistributedSampler)), None)
    batch_size = getattr(loader, "batch_size", None) or getattr(batches, "batch_size", None)
    if sampler is None or sampler.drop_last or not isinstance(batch_size, int):
        return None
    samples = len(sampler.dataset)  # type: ignore[arg-type]
    own = len(range(sampler.rank, samples, sampler.num_replicas))
    return max(own - batch_idx * batch_size, 0)
