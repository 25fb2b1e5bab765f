"""The labels of one batch after another, and the mask of their tokens: usable, missing on purpose, or passed over."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_probes.network.batches import UnknownClassesError, Where, check_labels, distributions, pick, pick_mask
from lightning_probes.probes.hints import is_rows

ATTENTION_MASK = "attention_mask"
"""Where Hugging Face's batches have their mask; others need none there."""


class LabelReader:
    """Reads labels strictly from the first batch, so that a mistake shows before training; later ones end no run.

    Args:
        target: where in a batch the labels are.
        token_mask: where the mask of tokens is.

    Attributes:
        num_classes: how many classes there are; 0 as long as nobody knows.
        is_checked: whether a first batch has been read to its end.
        absent_in_training: whether the batches of training have no labels while those of validation have.
        present_in_validation: whether those of validation are known to have some, so that training needs none.
        notes: what a reader should know.
    """

    def __init__(self, target: Where, token_mask: Where | None) -> None:
        self._target = target
        self._token_mask = token_mask
        self.begin(0, is_checked=False)

    def begin(self, num_classes: int, *, is_checked: bool, unknown: str = "") -> None:
        """Begin a run.

        Args:
            num_classes: how many classes there are; 0 where only the labels may tell.
            is_checked: whether its batches are known from an earlier run.
            unknown: what is said where they do not.
        """
        self.num_classes, self._unknown = num_classes, unknown
        self.is_checked = is_checked
        self.absent_in_training = self.present_in_validation = self._has_passed_over = False
        self._previewed: UnknownClassesError | None = None
        self.notes: list[str] = []

    def preview(self, batch: Any) -> None:
        """A batch of validation before training begins: if it has usable labels, those of training need none."""
        try:
            labels = pick(batch, self._target, "target")
            self._learn(labels)
            check_labels(labels, self.num_classes)
            self.present_in_validation = True
        except UnknownClassesError as error:
            self._previewed = error
        except Exception:  # whatever a user's function raises; a mistake will show in training
            pass

    def read(self, batch: Any) -> Tensor | None:
        """Targets ``(batch, classes)``; ``None`` where there are none that can be used.

        Raises:
            LookupError, TypeError, ValueError: the first batch has no usable labels, and none that was previewed; or
                they do not tell the number of classes that nobody knows.
        """
        try:
            labels = pick(batch, self._target, "target")
            if not self.is_checked:
                self._learn(labels)
                check_labels(labels, self.num_classes)
            return distributions(labels, self.num_classes)
        except Exception as error:  # whatever a user's function raises
            if not self.is_checked and not self.absent_in_training:
                if not self.present_in_validation:
                    if self._previewed is not None:  # there are labels, and that is all they lack
                        raise self._previewed from error
                    raise
                self.absent_in_training = True
                self.notes.append(f"batches of training have no usable labels ({error})")
            elif self.is_checked and not self._has_passed_over:
                self._has_passed_over = True
                self.notes.append(f"batches whose labels cannot be used are passed over (the first: {error})")
            return None

    def _learn(self, labels: Any) -> None:
        """Take the number of classes that nobody knows from the width of one-hot or soft labels.

        Raises:
            TypeError, ValueError: they have none, or they are no labels.
        """
        if self.num_classes:
            return
        if isinstance(labels, Tensor) and is_rows(labels):
            check_labels(labels, labels.shape[1])
            self.num_classes = labels.shape[1]
            self.notes.append(f"num_classes is {self.num_classes}, the width of the labels")
        elif isinstance(labels, Tensor) and labels.shape[1:] in ((), (1,)) and not labels.is_floating_point():
            raise UnknownClassesError(f"{self._unknown} (the highest label of the first batch is {int(labels.max())})")
        else:
            check_labels(labels, 0)

    def read_mask(self, batch: Any, samples: int) -> Tensor | None:
        """``(batch, tokens)``: which tokens count; ``None`` where the batch does not say.

        Raises:
            LookupError, TypeError, ValueError: the first batch has no usable mask where the user said.
        """
        try:
            return None if self._token_mask is None else pick_mask(batch, self._token_mask, samples)
        except Exception:  # whatever a user's function raises
            if not self.is_checked and self._token_mask != ATTENTION_MASK:
                raise
            return None
