"""Tell from a Trainer's progress the present epoch and step, whether a point is due, and what resuming cost."""

from __future__ import annotations

from typing import Any

from lightning_probes.network.torch_internals import batches_that_stepped, was_restarted
from lightning_probes.options import EveryNEpochs, whole


class Schedule:
    """Decide from a Trainer's progress when the curves get a point, and what a point lacks after resuming.

    Args:
        every_n_epochs: number of epochs from one point to the next, at least 1; ``auto`` has points after epochs 1, 2,
            3, 5, 8, 13, ..., the Fibonacci numbers, and the last of ``max_epochs``: errors move early in training.

    Raises:
        TypeError: ``every_n_epochs`` is neither an integer nor a word.
        ValueError: ``every_n_epochs`` is less than 1, or another word than ``auto``.
    """

    def __init__(self, every_n_epochs: EveryNEpochs) -> None:
        is_auto = every_n_epochs == "auto"
        self._every_n_epochs = None if is_auto else whole("every_n_epochs", every_n_epochs, also="auto")
        self._resumed: tuple[int, int, bool] | None = None

    def __str__(self) -> str:
        """Say when probes are fitted first."""
        every = self._every_n_epochs or 1
        return (
            f"probes are fitted when a point is published, first after epoch {every}, at its validation if it has one"
        )

    def begin(self, trainer: Any, point: tuple[int, int], *, is_restored: bool) -> str:
        """Note where training begins, which is in the middle of an epoch if an earlier run was stopped there.

        Args:
            trainer: the Lightning Trainer.
            point: epoch and step of the last point of the earlier run.
            is_restored: whether the probes of the earlier run are continued.

        Returns:
            A note on a point that was due in the earlier run and is missing for good; empty if there is none.
        """
        epoch, step = trainer.current_epoch, trainer.global_step
        is_last = self._is_last_batch(trainer)
        is_restarted, is_between = was_restarted(trainer)
        is_skipped = is_last and is_between
        is_inside = is_restarted and not is_last
        # A checkpoint saved in the validation after an epoch's last batch does not count that epoch as completed yet.
        under_way = epoch + (is_restarted and is_last and not is_skipped)
        self._resumed = (under_way, step, is_inside) if is_inside or is_restored else None
        if is_restored and is_skipped and self._is_point(epoch, trainer) and point != (epoch, step):
            return (
                f"no point at epoch {epoch}, step {step}: training was resumed from a checkpoint between the epoch's "
                "last batch and its validation, which Lightning then leaves out"
            )
        return ""

    def gone_before(self, trainer: Any) -> str:
        """Say which earlier training this run goes on from, to explain why its report lacks a starting point.

        Returns:
            The end of a sentence; empty if training begins at step 0.
        """
        if not trainer.global_step:
            return ""
        if trainer.ckpt_path is not None:
            return "training was resumed before there was one"
        # The starting point of an earlier fit stands in the report of that fit, not in this one.
        return (
            f"this fit goes on at epoch {trainer.current_epoch}, step {trainer.global_step}, where the Trainer's last "
            "one ended"
        )

    def gap(self, trainer: Any) -> str:
        """Say which batches the probes of a point due now are fitted without because training was resumed.

        Returns:
            A note for the report; empty if no batch is missing.
        """
        if self._resumed is None or self._resumed[0] != trainer.current_epoch:
            return ""
        epoch, step, is_inside = self._resumed
        if is_inside:
            return f"epoch {epoch + 1} was resumed at step {step}: probes are fitted without the batches before that"
        if not self._is_last_batch(trainer):
            return (
                f"epoch {epoch + 1} was resumed at step {step}: until its end probes are fitted without batches of the "
                "epoch before"
            )
        return ""

    def is_due(self, trainer: Any) -> bool:
        """Return whether a point is due at the end of the present epoch."""
        return self._is_point(trainer.current_epoch + 1, trainer)

    def _is_point(self, epoch: int, trainer: Any) -> bool:
        """Return whether a point is due after a number of epochs."""
        if self._every_n_epochs is not None:
            return epoch % self._every_n_epochs == 0
        number, following = 1, 2
        while number < epoch:
            number, following = following, number + following
        return epoch in (number, trainer.max_epochs)

    def thinner(self, trainer: Any) -> str:
        """Return the argument that would have halved the points of the finished run; empty if the run is too short."""
        if self._every_n_epochs is None:
            return ""
        twice = 2 * self._every_n_epochs
        return f"every_n_epochs={twice}" if trainer.current_epoch >= twice else ""

    def now(self, trainer: Any) -> tuple[int, int]:
        """Return the number of completed epochs and ``global_step``."""
        # Lightning's count of begun epochs is one too low in a run that was resumed from the last batch of an epoch.
        return trainer.current_epoch + self._is_last_batch(trainer), trainer.global_step

    def logged_step(self, trainer: Any) -> int | None:
        """Return the step under which loggers show what is logged now; ``None`` where there are none."""
        return batches_that_stepped(trainer) if trainer.loggers else None

    def has_validation(self, trainer: Any) -> bool:
        """Return whether the run has a validation loop that runs before its last epoch is over."""
        every, epochs = trainer.check_val_every_n_epoch or 1, trainer.max_epochs or -1
        return bool(trainer.enable_validation and (epochs < 0 or every <= epochs))

    def _is_last_batch(self, trainer: Any) -> bool:
        return bool(trainer.fit_loop.epoch_loop.batch_progress.is_last_batch)
