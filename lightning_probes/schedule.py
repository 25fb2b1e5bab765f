"""When: which epoch and step it is, whether a point is due, whether a validation will come."""

from __future__ import annotations

from typing import Any

from lightning_probes.arguments import whole


class Schedule:
    """What a Trainer's progress means for the curves.

    Args:
        every_n_epochs: a point at the end of every so many epochs.

    Raises:
        TypeError, ValueError: naming the argument and what was given.
    """

    def __init__(self, every_n_epochs: int) -> None:
        self._every_n_epochs = whole("every_n_epochs", every_n_epochs)

    def is_due(self, trainer: Any) -> bool:
        """Whether the epoch that is under way has a point."""
        return bool(trainer.fit_loop.epoch_progress.current.ready % self._every_n_epochs == 0)

    def now(self, trainer: Any) -> tuple[int, int]:
        """Epochs completed and ``global_step``."""
        # `current_epoch` moves between the hooks of an epoch's end; what was begun does not.
        begun = trainer.fit_loop.epoch_progress.current.ready
        return begun if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch else begun - 1, trainer.global_step

    def has_validation(self, trainer: Any) -> bool:
        """Whether the run validates at all."""
        every, epochs = trainer.check_val_every_n_epoch or 1, trainer.max_epochs or -1
        return bool(trainer.enable_validation and (epochs < 0 or every <= epochs))
