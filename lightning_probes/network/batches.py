"""Find input and labels in a batch, and read the labels of one batch after another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DistributedSampler
from torchmetrics import Metric

from lightning_probes.network.positions import Drawn, Positions, draw
from lightning_probes.network.torch_internals import tree_leaves
from lightning_probes.options import Where
from lightning_probes.tasks.classification import Classification
from lightning_probes.tasks.kinds import new_task
from lightning_probes.tasks.task import IGNORED, LabelCount, Task, UnknownOutputsError, UnusableLabelsError

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
    near = _label_places(batch) if argument == "target" else []
    hint = f"; its labels could be {' or '.join(f'target={place}' for place in near[:3])}" if near else ""
    raise LookupError(f"{argument}={where!r}: the batch has no such {kind}; it is {describe(batch)}{hint}")


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
    sampler = getattr(loader, "sampler", None)
    batch_size = getattr(loader, "batch_size", None) or getattr(
        getattr(loader, "batch_sampler", None), "batch_size", None
    )
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last or not isinstance(batch_size, int):
        return None
    samples = len(sampler.dataset)  # type: ignore[arg-type]
    own = len(range(sampler.rank, samples, sampler.num_replicas))
    return max(own - batch_idx * batch_size, 0)


def find_task(kind: str, num_classes: int | None, *owners: Any, is_clustered: bool = False) -> Task:
    """Return the task of a run, and for a classification the number of classes if it is given or found.

    Args:
        kind: name of the task.
        num_classes: number of classes that the user gave; ``None`` to look for it.
        owners: a datamodule, a module: see :func:`find_num_classes`.
        is_clustered: whether a sample has several answers.
    """
    if kind != Classification.kind:
        return new_task(kind)
    try:
        return Classification(num_classes or find_num_classes(*owners), is_clustered=is_clustered)
    except UnknownOutputsError as error:
        return Classification(0, str(error), is_clustered=is_clustered)


def find_num_classes(*owners: Any) -> int:
    """Return the number of classes of the first owner that knows it.

    An integer ``num_classes`` is looked for on each owner (a datamodule, a module) and in its ``hparams``, then in the
    torchmetrics metrics among its submodules; then ``config.num_labels``, as Hugging Face has it.

    Raises:
        UnknownOutputsError: no owner knows it.
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
    raise UnknownOutputsError(
        f"num_classes is not given and {names} has no `num_classes`, as attribute, hyperparameter or in a metric"
        f"{several}; pass num_classes=..."
    )


def _classes_of(holder: Any) -> Any:
    return holder.get("num_classes") if isinstance(holder, Mapping) else getattr(holder, "num_classes", None)


def _labels_of(module: nn.Module) -> int | None:
    found = getattr(getattr(module, "config", None), "num_labels", None)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        return None
    # A network without a head has a configuration too, with the number of another task; only a head has `num_labels`.
    return found if getattr(module, "num_labels", None) == found else None


class LabelReader:
    """Read the labels of batches; raise on a mistake in the first batch, before training, but never in a later one.

    A label is used or counted: what is left out of later batches is in :meth:`count`.

    Args:
        target: where in a batch the labels are.
        task: what is asked, before anything is known of it.
        most_positions: how many positions of a sample are probed, if each has a label of its own; else ``None``.

    Attributes:
        positions: where the labels of the batch that was read last are; ``None`` for one label a sample.
        task: knows what labels mean; it learns the number of outputs from the first labels if nothing else tells.
        is_checked: whether a first batch has been read to its end.
        is_trusted: whether an earlier run has checked the labels, so that unusable ones raise no more.
        absent_in_training: whether the batches of training have no labels while those of validation have.
        present_in_validation: whether the batches of validation are known to have labels, so that training needs none.
        passed_over: number of later batches that had nothing that could be labels, since they were last told of.
        first_passed_over: why the first of them had nothing.
        notes: what a reader of the report should know.
    """

    def __init__(self, target: Where, task: Task, most_positions: int | None = None) -> None:
        self._target = target
        self._most_positions = most_positions
        self.positions: Positions | None = None
        self.begin(task, is_checked=False)

    def begin(self, task: Task, *, is_checked: bool) -> None:
        """Prepare for the batches of a run.

        Args:
            task: what probes are asked.
            is_checked: whether the batches of the run are known from an earlier one.
        """
        self.task = task
        self.is_checked = is_checked
        self.is_trusted = False
        self.absent_in_training = False
        self.present_in_validation = False
        self.notes: list[str] = []
        if not is_checked:
            self.passed_over = 0
            self.first_passed_over = ""
        self._left_out: Tensor | None = None
        self._previewed: ValueError | None = None

    def where(self, batch: Any) -> Any:
        """Return the labels of a batch as they are, whatever they are; ``None`` without any."""
        try:
            return pick(batch, self._target, "target")
        except Exception:  # A user's function may raise anything.
            return None

    def preview(self, batch: Any) -> None:
        """Look at the first batches of validation before training: if one has labels, batches of training need none."""
        if self.present_in_validation or self._previewed is not None:
            return
        try:
            self._check(as_tensor(pick(batch, self._target, "target")))
            self.present_in_validation = True
        except (UnknownOutputsError, UnusableLabelsError) as error:
            self._previewed = error.with_traceback(None)  # The frames of a traceback would hold the batch.
        except Exception:  # A user's function may raise anything; a mistake will show in training.
            pass

    def read(self, batch: Any) -> Tensor | None:
        """Return targets ``(batch, outputs)``; ``None`` if the batch has nothing that could be labels.

        Of labels of their own for each position, those of a sample's positions follow one another.

        Raises:
            UnusableLabelsError: some of the labels of the first batch have values without a meaning.
            LookupError, TypeError, ValueError: the first batch has no labels, nor had a previewed one; or the labels do
                not show the number of outputs, and nothing else tells it.
        """
        try:
            labels = as_tensor(pick(batch, self._target, "target"))
            if not self.is_checked:
                self._check_first(labels)
            self.positions = None
            if self._most_positions is not None:
                labels, self.positions = self._drawn(labels, self._most_positions)
            targets = self.task.encode(labels)
            self._left_out = self.task.is_left_out(labels)
            return targets
        except Exception as error:  # A user's function may raise anything.
            if self.is_checked:
                self.pass_over(str(error) or type(error).__name__)
            elif not self.absent_in_training:
                if isinstance(error, UnusableLabelsError):
                    raise
                if self._previewed is not None:  # Validation has labels, which are wrong or lack the number of outputs.
                    raise self._previewed from error
                if not self.present_in_validation:
                    raise
                self.absent_in_training = True
                self.notes.append(f"batches of training have no usable labels ({error})")
            return None

    def pass_over(self, reason: str) -> None:
        """Count a batch that is passed over because of its labels, and keep the first reason."""
        self.first_passed_over = self.first_passed_over or reason
        self.passed_over += 1

    def count(self, targets: Tensor, samples: int) -> LabelCount:
        """Count what became of the labels of the batch that was read last, without waiting for the device.

        Args:
            targets: what :meth:`read` returned.
            samples: number of rows of targets that count, from the first; the others were repeated by a sampler.
        """
        assert self._left_out is not None
        used, left_out = self.task.is_counted(targets[:samples]).sum(), self._left_out[:samples].sum()
        return LabelCount(samples, torch.stack([used, left_out]))

    def _check_first(self, labels: Tensor) -> None:
        try:
            self._check(labels)
        except UnusableLabelsError:
            # A run that is under way goes on.
            if not (self.is_trusted or self.absent_in_training):
                raise

    def _drawn(self, labels: Tensor, most: int) -> Drawn:
        grid = self._grid(labels)
        each = labels.flatten(1, len(grid))
        is_left_out = self.task.is_left_out(each.flatten(0, 1)).view(each.shape[:2])
        return draw(each, is_left_out, grid, most)

    def _grid(self, labels: Tensor) -> tuple[int, ...]:
        grid = self.task.grid_of(labels)
        if len(grid) not in (1, 2) or not labels.numel():
            wide = ", labels" * (self.task.kind == "multilabel")
            raise ValueError(
                f"target: labels have shape {tuple(labels.shape)}; expected (batch, tokens{wide}) or (batch, height, "
                f"width{wide}) with positions={self._most_positions}; for one label a sample leave positions out"
            )
        return grid

    def _check(self, labels: Tensor) -> None:
        """Let the task learn the number of outputs if it is unknown, and check the labels, values included."""
        if self._most_positions is not None:
            labels = labels.flatten(0, len(self._grid(labels)))
            if bool(self.task.is_left_out(labels).all()):
                raise UnusableLabelsError(
                    f"target: all {len(labels):,} positions of the first batch are left out ({IGNORED} or NaN)"
                )
        self.task, note = self.task.learn(labels)
        self.notes += [note] * bool(note)
        self.task.check(labels)
