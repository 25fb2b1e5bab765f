"""A batch -> its input and its labels, the labels as one distribution over the classes per sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_probes.probes.hints import hint_of_floats, hint_of_rows, hint_of_shape, is_distribution

Where = int | Callable[[Any], Any] | str
"""Where in a batch something is: an index, a key (one level of nesting is searched) or a function of the batch."""

IGNORED = -100
"""The label of samples to leave out, as in :func:`torch.nn.functional.cross_entropy`."""


def pick(batch: Any, where: Where, argument: str) -> Any:
    """What ``where`` names in ``batch``.

    Args:
        batch: a tuple, list, mapping, dataclass or named tuple; mappings and dataclasses inside it are searched too.
        where: index, key or callable.
        argument: the name of the argument that ``where`` was given as, for the message.

    Raises:
        LookupError: ``batch`` has no such index or key; the message lists what it has.
    """
    if callable(where):
        return where(batch)
    for part in (batch, *_parts(batch).values()):
        parts = _parts(part)
        if where in parts:
            return parts[where]
        if isinstance(where, int) and part is batch and is_dataclass(batch) and -len(parts) <= where < len(parts):
            return list(parts.values())[where]
        if isinstance(where, int):
            if isinstance(part, (list, tuple)) and -len(part) <= where < len(part):
                return part[where]
            break
    kind = "index" if isinstance(where, int) else "key"
    near = _label_places(batch) if argument == "target" else []
    hint = f"; its labels could be {' or '.join(f'target={place}' for place in near[:3])}" if near else ""
    raise LookupError(f"{argument}={where!r}: the batch has no such {kind}; it is {describe(batch)}{hint}")


def describe(batch: Any, depth: int = 2) -> str:
    """A batch in words: its keys or indices with types and shapes."""
    if isinstance(batch, Tensor):
        if batch.is_nested:
            return "a nested tensor"
        return f"{str(batch.dtype).removeprefix('torch.')}{list(batch.shape)}"
    parts = _parts(batch)
    if not parts or not depth:
        return type(batch).__name__
    inside = ", ".join(f"{key!r}: {describe(part, depth - 1)}" for key, part in parts.items())
    return f"{type(batch).__name__} {{{inside}}}"


def distributions(labels: Tensor, num_classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Labels as rows of class probabilities.

    Args:
        labels: integers ``(samples,)`` or ``(samples, 1)``, or one-hot or soft ``(samples, num_classes)``.
        num_classes: K >= 1.
        dtype: of the result.

    Returns:
        ``(samples, num_classes)``. A row is a distribution, or zero for a sample to leave out: labelled ``-100``, or
        (never an error, which would end a long run) outside ``[0, K)`` or no distribution. Nothing is synchronised
        with the host.

    Raises:
        ValueError: another shape.
    """
    _check_shape(labels, num_classes)
    labels = labels.detach()
    if labels.dim() == 2 and labels.shape[1] == num_classes and (num_classes > 1 or labels.is_floating_point()):
        rows = labels.to(dtype)
        return torch.where(is_distribution(rows).unsqueeze(1), rows, 0.0)
    classes = torch.arange(num_classes, device=labels.device)
    return (labels.reshape(-1, 1) == classes).to(dtype)


def check_labels(labels: Any, num_classes: int) -> None:
    """Raise if ``labels`` are nothing that :func:`distributions` understands; looks at the values (host sync).

    Raises:
        TypeError: no tensor, or no integers where classes are expected.
        ValueError: a shape other than those, a label outside ``[0, num_classes)``, rows that are no distribution.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"target: expected a tensor of labels, found {type(labels).__name__}{_hint_of_kind(labels)}")
    shape = tuple(labels.shape)
    try:
        _check_shape(labels, num_classes)
    except ValueError as error:
        raise ValueError(f"{error}{hint_of_shape(labels)}") from None
    if labels.dim() == 2 and labels.shape[1] == num_classes and (num_classes > 1 or labels.is_floating_point()):
        bad = (~is_distribution(labels.double())).nonzero()
        if len(bad):
            row = labels[int(bad[0])].tolist()
            raise ValueError(
                f"target: row {int(bad[0])} of the labels {list(shape)} is no distribution: {row[:8]}"
                f"{hint_of_rows(labels)}"
            )
        return
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(
            f"target: labels of shape {shape} are {labels.dtype}; expected integers, or rows of probabilities"
            f"{hint_of_floats(labels)}"
        )
    labels = labels.long()  # int8 cannot be compared with 200, nor uint8 with -100
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= num_classes))]
    if len(wrong):
        raise ValueError(f"target: label {int(wrong.flatten()[0])} is outside [0, num_classes={num_classes})")


def _check_shape(labels: Tensor, num_classes: int) -> None:
    shape, known = tuple(labels.shape), f"={num_classes}" if num_classes else ""
    if not shape or not shape[0] or shape[1:] not in ((), (1,), (num_classes,)):
        raise ValueError(
            f"target: labels have shape {shape}; expected (batch,), (batch, 1) or (batch, num_classes{known})"
        )


def _hint_of_kind(labels: Any) -> str:
    if isinstance(labels, (list, tuple)) and labels and isinstance(labels[0], str):
        return f" of str (the first: {labels[0]!r}); number the classes in the dataset: 0, 1, ..."
    if isinstance(labels, (list, tuple)) and labels and isinstance(labels[0], (int, float)):
        return "; a function makes one of it: target=lambda batch: torch.tensor(batch[1])"
    if _parts(labels) and not isinstance(labels, (list, tuple)):
        near = _label_places(labels)
        return f": {describe(labels)}" + (f"; the labels could be its {near[0]}" if near else "")
    return ""


_LABEL_NAMES = ("label", "labels", "target", "targets", "y", "class", "classes", "category")


def _label_places(batch: Any) -> list[str]:
    """Return what ``target`` could be for ``batch``, as it would be written: the likeliest first."""
    found: list[tuple[bool, bool, str]] = []

    def visit(part: Any, path: tuple[Any, ...], written: str) -> None:
        for key, inner in _parts(part).items() if len(path) < 3 else ():
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
                is_near = is_near and _is_picked(batch, key, inner)
                found.append((not is_named, not is_integer, repr(key) if is_near else f"lambda batch: {below}"))

    visit(batch, (), "batch")
    return [place for *_, place in sorted(found, key=lambda place: place[:2])]


def _is_picked(batch: Any, where: Any, value: Tensor) -> bool:
    try:
        return pick(batch, where, "") is value
    except LookupError:
        return False


def pick_mask(batch: Any, where: Where, samples: int) -> Tensor:
    """Which tokens of each sample count: ``(samples, tokens)``, true where the mask in ``batch`` is not 0; a copy.

    Raises:
        LookupError: there is none.
        TypeError, ValueError: it is no tensor, or has another shape.
    """
    mask = pick(batch, where, "token_mask")
    if not isinstance(mask, Tensor):
        raise TypeError(f"token_mask: expected a tensor (batch, tokens), found {type(mask).__name__}")
    if mask.is_nested or mask.dim() != 2 or len(mask) != samples:
        raise ValueError(
            f"token_mask: expected (batch, tokens) with a row for each of the {samples} labels, found {describe(mask)}"
        )
    return mask.detach() != 0


def repeat_views(targets: Tensor, samples: int) -> Tensor:
    """``targets`` of a batch for activations of ``samples`` = k times the batch, view by view."""
    return targets if len(targets) == samples else targets.repeat(samples // len(targets), 1)


def _classes_of(holder: Any) -> Any:
    return holder.get("num_classes") if isinstance(holder, Mapping) else getattr(holder, "num_classes", None)


def _labels_of(module: nn.Module) -> int | None:
    found = getattr(getattr(module, "config", None), "num_labels", None)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        return None
    # Networks without a head have a configuration too, with the number of another task; heads have one of their own.
    return found if getattr(module, "num_labels", None) == found else None


def _parts(batch: Any) -> dict[Any, Any]:
    if isinstance(batch, Mapping):
        return dict(batch)
    if isinstance(batch, tuple) and hasattr(batch, "_asdict"):
        return dict(batch._asdict())
    if isinstance(batch, (list, tuple)):
        return dict(enumerate(batch))
    if is_dataclass(batch) and not isinstance(batch, type):
        return {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {}


class UnknownClassesError(ValueError):
    """Nobody knows the number of classes."""


def find_num_classes(*owners: Any) -> int:
    """The number of classes of the first owner that knows it.

    Looks for an integer ``num_classes`` on each owner (a datamodule, a module), in its ``hparams``, then in the
    torchmetrics metrics among its submodules, then for ``config.num_labels``, as Hugging Face has it.

    Raises:
        UnknownClassesError: nobody knows.
    """
    for owner in owners:
        for holder in (owner, getattr(owner, "hparams", None)):
            found = _classes_of(holder)
            if isinstance(found, int) and found > 0:
                return found
    modules = [module for owner in owners if isinstance(owner, nn.Module) for module in owner.modules()]
    in_metrics = {found for m in modules if isinstance(m, Metric) and isinstance(found := _classes_of(m), int)}
    if len(in_metrics) == 1:
        return in_metrics.pop()
    in_configs = {found for module in modules if (found := _labels_of(module))}
    if not in_metrics and len(in_configs) == 1:
        return in_configs.pop()
    names = ", ".join(dict.fromkeys(type(owner).__name__ for owner in owners if owner is not None))
    several = f" (its metrics disagree: {sorted(in_metrics)})" if in_metrics else ""
    several = several or (f" (its `config.num_labels` disagree: {sorted(in_configs)})" if in_configs else "")
    raise UnknownClassesError(
        f"num_classes is not given and {names} has no `num_classes`, as attribute, hyperparameter or in a metric"
        f"{several}; pass num_classes=..."
    )
