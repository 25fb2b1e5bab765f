"""Find out what is asked, and read the labels of one batch after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_probes.network.batches import as_tensor, pick
from lightning_probes.network.masks import pick_mask
from lightning_probes.network.positions import Positions, draw
from lightning_probes.options import ATTENTION_MASK, Reading, Where
from lightning_probes.tasks.classification import Classification
from lightning_probes.tasks.kinds import new_task
from lightning_probes.tasks.several import Several
from lightning_probes.tasks.task import (
    IGNORED,
    LabelCount,
    Question,
    Task,
    UnknownOutputsError,
    UnusableLabelsError,
)


def find_question(reading: Reading, *owners: Any) -> Question:
    """Return what the probes of a run are asked, and for classes their number if it is given or found.

    Args:
        reading: the checked options ``target``, ``task``, ``num_classes`` and ``positions``.
        owners: a datamodule, a module: see :func:`find_num_classes`. Without any it is not looked for.

    Raises:
        ValueError: ``task`` or ``num_classes`` names no target, or ``num_classes`` is given for another task.
    """
    target, kinds, classes = reading["target"], reading["task"], reading["num_classes"]
    names = list(target) if isinstance(target, Mapping) else [""]
    for argument, given in (("task", kinds), ("num_classes", classes)):
        for name in given if isinstance(given, Mapping) else ():
            if name not in names or not name:
                nameless = f"one target, which has no name: target={{{name!r}: {target!r}}} gives it one"
                there = ", ".join(map(repr, names)) if any(names) else nameless
                raise ValueError(f"{argument}: {name!r} is no name of a target; there is {there}")
    kind_of, tasks = _by_name(kinds, names, Classification.kind), {}
    for (name, kind), number in zip(kind_of.items(), _by_name(classes, names).values(), strict=True):
        is_vain = isinstance(classes, Mapping) or Classification.kind not in kind_of.values()
        if kind != Classification.kind and number is not None and is_vain:
            raise ValueError(
                f"num_classes: it has no effect with task={kind!r}, whose targets tell by their width how many outputs "
                "there are; leave one of the two out"
            )
        tasks[name] = _find_task(kind, number, owners, is_clustered=reading["positions"] is not None)
    return Several(tuple(tasks.items())) if any(names) else tasks[""]


def _by_name(given: Any, names: Sequence[str], otherwise: Any = None) -> dict[str, Any]:
    """Return what is given for each target: one for all, or by name, and ``otherwise`` for the others."""
    return {name: given.get(name, otherwise) if isinstance(given, Mapping) else given for name in names}


def _find_task(kind: str, num_classes: int | None, owners: Sequence[Any], *, is_clustered: bool) -> Task:
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


_MASKED = "positions that the token mask leaves out are not drawn"
"""Note in a report of labels of positions that there was a mask of them."""


class LabelReader:
    """Read the labels of batches; raise on a mistake in the first batch, before training, but never in a later one.

    A label is used or counted: what is left out of later batches is in :meth:`count`.

    Args:
        target: where in a batch the labels are, or those of each of several tasks by name.
        question: what is asked, before anything is known of it.
        most_positions: how many positions of a sample are probed, if each has a label of its own; else ``None``.
        token_mask: where in a batch a mask of such positions is, 0 for those to leave out; ``None`` if it is nowhere.

    Attributes:
        most_positions: as given.
        question: knows what labels mean; it learns the number of outputs from the first labels if nothing else tells.
        positions: where the labels of the batch that was read last are; ``None`` for one label a sample.
        is_checked: whether a first batch has been read to its end.
        is_trusted: whether an earlier run has checked the labels, so that unusable ones raise no more.
        absent_in_training: whether the batches of training have no labels while those of validation have.
        present_in_validation: whether the batches of validation are known to have labels, so that training needs none.
        passed_over: number of later batches that had nothing that could be labels, since they were last told of.
        first_passed_over: why the first of them had nothing.
        notes: what a reader of the report should know.
    """

    def __init__(
        self,
        target: Where | Mapping[str, Where],
        question: Question,
        most_positions: int | None = None,
        *,
        token_mask: Where | None = None,
    ) -> None:
        self._places = dict(target) if isinstance(target, Mapping) else {"": target}
        self.most_positions = most_positions
        self._token_mask = token_mask
        self.positions: Positions | None = None
        self.begin(question, is_checked=False)

    def begin(self, question: Question, *, is_checked: bool) -> None:
        """Prepare for the batches of a run.

        Args:
            question: what probes are asked.
            is_checked: whether the batches of the run are known from an earlier one.
        """
        self.question = question
        self.is_checked = is_checked
        self.is_trusted = False
        self.absent_in_training = False
        self.present_in_validation = False
        self.notes: list[str] = []
        if not is_checked:
            self.passed_over = 0
            self.first_passed_over = ""
        self._left_out: dict[str, Tensor] = {}
        self._previewed: ValueError | None = None

    @property
    def has_positions(self) -> bool:
        """Return whether each position of a sample has a label of its own."""
        return self.most_positions is not None

    def where(self, batch: Any) -> list[Any]:
        """Return the labels of a batch as they are, whatever they are; those that it lacks are missing."""
        found = []
        for where in self._places.values():
            with suppress(Exception):  # A user's function may raise anything.
                found.append(pick(batch, where, "target"))
        return found

    def preview(self, batch: Any) -> None:
        """Look at the first batches of validation before training: if one has labels, batches of training need none."""
        if self.present_in_validation or self._previewed is not None:
            return
        try:
            self._check(self._labels(batch))
            self.present_in_validation = True
        except (UnknownOutputsError, UnusableLabelsError) as error:
            self._previewed = error.with_traceback(None)  # The frames of a traceback would hold the batch.
        except Exception:  # A user's function may raise anything; a mistake will show in training.
            pass

    def read(self, batch: Any, salt: Tensor | None = None) -> Tensor | None:
        """Return targets ``(batch, outputs)``; ``None`` if the batch has nothing that could be labels.

        Those of several tasks stand beside one another. Of labels of their own for each position, those of a sample's
        positions follow one another.

        Args:
            batch: the batch.
            salt: as for :func:`~lightning_probes.network.positions.draw`.

        Raises:
            UnusableLabelsError: some of the labels of the first batch have values without a meaning.
            LookupError, TypeError, ValueError: the first batch has no labels, nor had a previewed one; or the labels do
                not show the number of outputs, and nothing else tells it.
        """
        try:
            labels = self._labels(batch)
            if not self.is_checked:
                self._check_first(labels)
            return self._encoded(labels, batch, salt)
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

    def count(self, targets: Tensor, samples: int) -> dict[str, LabelCount]:
        """Count what became of the labels of the batch that was read last, without waiting for the device.

        Args:
            targets: what :meth:`read` returned.
            samples: number of rows of targets that count, from the first; the others were repeated by a sampler.

        Returns:
            The counts of each task, by the names of the targets.
        """
        found, places = {}, self.question.columns()
        for name, task in self.question.parts.items():
            own = targets[:samples, places[name]]
            both = [task.is_counted(own).sum(), self._left_out[name][:samples].sum()]
            found[name] = LabelCount(samples, torch.stack(both))
        return found

    def _labels(self, batch: Any) -> dict[str, Tensor]:
        found = {name: as_tensor(pick(batch, where, _argument(name))) for name, where in self._places.items()}
        sizes = {name: len(labels) for name, labels in found.items() if labels.dim()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"target: there are other numbers of labels in other targets: {sizes}")
        return found

    def _encoded(self, labels: dict[str, Tensor], batch: Any, salt: Tensor | None) -> Tensor:
        tasks = self.question.parts
        self.positions, nowhere = None, None
        if self.most_positions is not None:
            labels, self.positions, nowhere = self._drawn(labels, self.most_positions, batch, salt)
        each = {name: task.encode(labels[name]) for name, task in tasks.items()}
        self._left_out = {name: task.is_left_out(labels[name]) for name, task in tasks.items()}
        targets = next(iter(each.values())) if len(each) == 1 else torch.cat(list(each.values()), dim=1)
        if nowhere is None:
            return targets
        # Of a sample with few labelled positions some are drawn that a mask leaves out.
        self._left_out = {name: own | nowhere for name, own in self._left_out.items()}
        self.question.leave_out_(without := targets.clone())
        return torch.where(nowhere[:, None], without, targets)

    def _check_first(self, labels: dict[str, Tensor]) -> None:
        try:
            self._check(labels)
        except UnusableLabelsError:
            # A run that is under way goes on.
            if not (self.is_trusted or self.absent_in_training):
                raise

    def _check(self, labels: dict[str, Tensor]) -> None:
        """Let each task learn the number of outputs if it is unknown, and check the labels, values included."""
        for name, task in self.question.parts.items():
            try:
                found, note = self._checked(task, labels[name])
            except UnknownOutputsError as error:
                several = f"; of several targets num_classes={{{name!r}: ...}}" if name else ""
                raise UnknownOutputsError(f"{f'{_argument(name)}: ' * bool(name)}{error}{several}") from None
            except (TypeError, ValueError) as error:
                each = f" (at the positions of labels {list(labels[name].shape)})" * self.has_positions
                raise type(error)(str(error).replace("target:", f"{_argument(name)}:", 1) + each) from None
            self.notes += [f"{name}: {note}" if name else note] * bool(note)
            asked = self.question
            self.question = asked.with_task(name, found) if isinstance(asked, Several) else found

    def _checked(self, task: Task, labels: Tensor) -> tuple[Task, str]:
        if self.most_positions is not None:
            labels = labels.flatten(0, len(self._grid(task, labels)))
            if bool(task.is_left_out(labels).all()):
                raise UnusableLabelsError(
                    f"target: all {len(labels):,} positions of the first batch are left out ({IGNORED} or NaN)"
                )
        found, note = task.learn(labels)
        found.check(labels)
        return found, note

    def _drawn(
        self, labels: dict[str, Tensor], most: int, batch: Any, salt: Tensor | None
    ) -> tuple[dict[str, Tensor], Positions, Tensor]:
        """Draw the same positions for all tasks, of those that have a label for any and that the mask leaves.

        Returns:
            The labels there, the positions, and which of them have no label or are masked, ``(samples * each,)``.
        """
        tasks = self.question.parts
        grids = {name: self._grid(tasks[name], found) for name, found in labels.items()}
        if len(set(grids.values())) > 1:
            raise ValueError(f"target: there are other positions in other targets: {grids}")
        grid = next(iter(grids.values()))
        each = {name: found.flatten(1, len(grid)) for name, found in labels.items()}
        left_out = [tasks[name].is_left_out(x.flatten(0, 1)).view(x.shape[:2]) for name, x in each.items()]
        nowhere = torch.stack(left_out).all(dim=0)
        with suppress(Exception):  # There may be no mask, and a user's function may raise anything.
            mask = pick_mask(batch, self._token_mask, len(nowhere)) if self._token_mask is not None else None
            fits = mask is not None and mask.shape == (len(nowhere), *grid)
            if mask is not None and fits:
                nowhere = nowhere | ~mask.to(nowhere.device)
            # A mask of other tokens, as one for the text beside an image, may be in the batch by its usual name.
            if mask is not None and (fits or self._token_mask != ATTENTION_MASK):
                note = (
                    _MASKED if fits else f"token_mask is not applied: its shape {list(mask.shape)} is not the labels'"
                )
                self.notes += [note] * (note not in self.notes)
        positions = draw(list(each.values()), nowhere, grid, most, salt)
        return {name: positions.take(found) for name, found in each.items()}, positions, positions.take(nowhere)

    def _grid(self, task: Task, labels: Tensor) -> tuple[int, ...]:
        grid = task.grid_of(labels)
        if len(grid) not in (1, 2) or not labels.numel():
            wide = ", labels" * (task.kind == "multilabel")
            raise ValueError(
                f"target: labels have shape {tuple(labels.shape)}; expected (batch, tokens{wide}) or (batch, height, "
                f"width{wide}) with positions={self.most_positions}; for one label a sample leave positions out"
            )
        return grid


def _argument(name: str) -> str:
    """Return how messages name the argument of a target."""
    return f"target[{name!r}]" if name else "target"
