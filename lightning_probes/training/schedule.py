"""When: which epoch and step it is, whether a point is due, whether a validation will come."""

from __future__ import annotations

from typing import Any

from lightning_probes.options import whole


class Schedule:
    """What a Trainer's progress means for the curves.

    Args:
        every_n_epochs: a point at the end of every so many epochs.

    Raises:
        TypeError, ValueError: naming the argument and what was given.
    """

    def __init__(self, every_n_epochs: int) -> None:
        self._every_n_epochs = whole("every_n_epochs", every_n_epochs)
        self._resumed: tuple[int, int, bool] | None = None

    def begin(self, trainer: Any, point: tuple[int, int], *, is_restored: bool) -> str:
        """Training begins, perhaps where an earlier run was stopped.

        Args:
            trainer: Lightning's.
            point: epoch and step of the last point of that run.
            is_restored: whether probes go on.

        Returns:
            What a reader should know: of a point that was due and is not there any more.
        """
        epoch, step = trainer.current_epoch, trainer.global_step
        is_restarted, is_last = trainer.fit_loop.restarted_mid_epoch, self._is_last_batch(trainer)
        is_skipped = is_restarted and is_last and trainer.fit_loop.epoch_loop.restarted_on_train_batch_end
        is_inside = is_restarted and not is_last
        # Saved by a validation, the epoch is still to be ended.
        under_way = epoch + (is_restarted and is_last and not is_skipped)
        self._resumed = (under_way, step, is_inside) if is_inside or is_restored else None
        if is_restored and is_skipped and epoch % self._every_n_epochs == 0 and point != (epoch, step):
            return (
                f"no point at epoch {epoch}, step {step}: training was resumed from a checkpoint between the epoch's "
                "last batch and its validation, which Lightning then leaves out"
            )
        return ""

    def gone_before(self, trainer: Any) -> str:
        """Say what training there was before this run, for those who miss its starting point; empty if none."""
        if not trainer.global_step:
            return ""
        if trainer.ckpt_path is not None:
            return "training was resumed before there was one"
        # Neither is it that of the fit before, whose report has it, nor has it that of any other.
        return (
            f"this fit goes on at epoch {trainer.current_epoch}, step {trainer.global_step}, where the Trainer's last "
            "one ended"
        )

    def gap(self, trainer: Any) -> str:
        """What a point that is due now lacks because training was resumed; empty if nothing."""
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
        """Whether the epoch that is under way has a point."""
        return bool((trainer.current_epoch + 1) % self._every_n_epochs == 0)

    def thinner(self, trainer: Any) -> str:
        """Return which argument would have halved the points of a run that is over; empty if none would have."""
        twice = 2 * self._every_n_epochs
        return f"every_n_epochs={twice}" if trainer.current_epoch >= twice else ""

    def now(self, trainer: Any) -> tuple[int, int]:
        """Epochs completed and ``global_step``."""
        # Epochs that were begun are one too few in a run that is resumed from its last batch in an epoch.
        return trainer.current_epoch + self._is_last_batch(trainer), trainer.global_step

    def logged_step(self, trainer: Any) -> int | None:
        """Return the step under which loggers show what is logged now; ``None`` where there are none."""
        # It counts batches that stepped, and counts the last one only once its validation is over.
        step = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", None)
        return step if trainer.loggers and isinstance(step, int) else None

    def has_validation(self, trainer: Any) -> bool:
        """Whether the run validates at all."""
        every, epochs = trainer.check_val_every_n_epoch or 1, trainer.max_epochs or -1
        return bool(trainer.enable_validation and (epochs < 0 or every <= epochs))

    def _is_last_batch(self, trainer: Any) -> bool:
        return bool(trainer.fit_loop.epoch_loop.batch_progress.is_last_batch)
