"""From batches to points on curves: the probes of one run, trained along with it and brought to their optimum."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_probes.distributed import Ranks
from lightning_probes.network.extractor import INPUT, ProbedNetwork
from lightning_probes.probes.online import ProbeBank
from lightning_probes.probes.tasks import count_classes, never_seen
from lightning_probes.progress import Progress, size
from lightning_probes.replay.reservoir import Room
from lightning_probes.report.curves import Points
from lightning_probes.report.facts import LayerFacts
from lightning_probes.report.method import NO_VALIDATION, ONLINE
from lightning_probes.report.report import ProbeReport, Row
from lightning_probes.training.along import ProbesAlong
from lightning_probes.training.fitting import Context
from lightning_probes.training.guard import Guard
from lightning_probes.training.refit import Optimum


class ProbingSession:
    """What is known of a network while it is probed.

    Args:
        network: hooked; it opens each batch, the session closes it.
        learning_rate: of the online probes.
        room: for the samples that probes are brought to their optimum on; without any, online probes are published.
        ranks: the processes that train together.
        progress: shows how far a fit is, and tells the user of the layers, once they are known.

    Attributes:
        network: as given.
        ranks: as given.
        points: what is being scored.
        facts: what rows say of their layers.
        along: the probes that are trained along with the network.
        optimum: the probes that are published instead of them.
        point: epoch and step of the last publication.
        missing: what was noted of classes that never occurred, up to then.
    """

    def __init__(
        self, network: ProbedNetwork, learning_rate: float, room: Room, ranks: Ranks, progress: Progress
    ) -> None:
        self.along = ProbesAlong(network, learning_rate, ranks)
        self.ranks, self._progress = ranks, progress
        self.points = Points(ranks)
        self.optimum = Optimum(network, self.points, room, ranks, progress)
        self.point = 0, 0
        self.network = network
        self.facts = LayerFacts(network)
        self._guard = Guard(network, self.facts, self.points, ranks)
        self._is_first_step, self._has_greeted = True, False
        self.missing = ""
        self._kept: Callable[[], str] | None = None
        self._begun = time.perf_counter()

    @property
    def layers(self) -> list[str]:
        """All layers, in the order of every vector over them."""
        return self.facts.layers

    @property
    def now(self) -> tuple[int, int]:
        """Return epoch and step of the last training step, which faults are told with."""
        return self._guard.now

    @now.setter
    def now(self, now: tuple[int, int]) -> None:
        self._guard.now = now

    @property
    def is_ready(self) -> bool:
        """Whether there are probes to score with."""
        return self.optimum.fitted is not None or self.online is not None

    @property
    def online(self) -> ProbeBank | None:
        """The probes trained along; ``None`` before the first batch with labels."""
        return self.along.bank

    def leave_training(self) -> None:
        """What follows scores the network as training left it; probes fitted on an earlier one do not belong to it."""
        if self.now != self.point:
            self.optimum.fitted = None

    def resize(self, samples: int) -> None:
        """Let probes be brought to their optimum on at most so many samples of this process."""
        self.optimum.room.samples = samples

    def forget(self) -> None:
        """What was scored of a validation that did not end; what was seen in training stays."""
        self.points.clear(("published", "online", "start"))
        self.optimum.forget()

    def begin(
        self,
        model: nn.Module,
        report: ProbeReport,
        *,
        batches: float,
        has_validation: bool,
        gone_before: str = "",
        missed: str = "",
    ) -> None:
        """Training begins.

        Args:
            model: the network.
            report: of the run that goes on, or an empty one.
            batches: of an epoch; infinite if nobody knows.
            has_validation: whether the run has samples to score on that it is not trained on.
            gone_before: what training there was before, that the first point of each curve is not of this run.
            missed: why that run's last point is not there and will not come.
        """
        self._kept = partial(self.optimum.kept, batches, has_validation=has_validation)
        has_start = bool(report.select(epoch=0, step=0))
        note = self.optimum.begin(model, gone_before=gone_before, has_start=has_start)
        report.notes = [known for known in report.notes if known != NO_VALIDATION]  # of the run that goes on
        self._note(report, note, missed, "" if has_validation else NO_VALIDATION)
        if missed:
            self.points.clear()
        # From the first step on, or the same sums would be taken of other memory.
        self.along.lend()

    def end(self, report: ProbeReport) -> None:
        """Let go of everything but the probes, and say in ``report`` what is missing."""
        self._note(report, self.optimum.end(), *self.points.notes)
        self.points.clear()
        self.along.release()

    def open(self, batch: Any) -> None:
        """Before a training step.

        Raises:
            LookupError, TypeError, ValueError: as :meth:`~lightning_probes.network.extractor.ProbedNetwork.open`.
        """
        due = self.along.due()
        with self._guard.around("recording it"):
            if self.optimum.open() and due is not None:
                due.add(INPUT)  # the only features that cannot be had again
        self.network.open(batch, self.along.open(due))

    def check(self, features: Mapping[str, Tensor] | None = None) -> None:
        """With the first ``features`` after resuming: restored probes of other widths start afresh.

        Raises:
            ValueError: there are some, and there must not be.
        """
        if afresh := self.along.check(self.network.recorder.features if features is None else features):
            self.optimum.fitted = None
            self.points.set_aside -= afresh

    def update(self, now: tuple[int, int]) -> None:
        """After a training step, ``now`` epoch and step: one step of the online probes on the same batch."""
        self.now = now
        seen = self.network.close()
        if self._is_first_step:  # which all processes have, with labels or not
            self._is_first_step = False
            with self._guard.around("agreeing on layers", together=True):
                self.network.agree(self.ranks.gather)
            if seen is not None:  # of which some may be left out by now
                seen = {layer: x for layer, x in seen[0].items() if layer in self.network.layers}, seen[1]
        if seen is not None:
            self.check(seen[0])
            seen = self.along.accept(seen[0]), seen[1]
        self._guard.blame("taking its activation")
        with self._guard.around("keeping a batch"):
            self.optimum.close(seen)
        if seen is None:
            return
        with self._guard.around("updating their probes", "trained along", ("train", 0)):
            sums = self.along.update(*seen)
            self.points.add("trained along", "train", 0, sums, count_classes(seen[1]))
        self._greet()

    def prepare(
        self,
        model: nn.Module,
        context: Context,
        report: ProbeReport,
        gap: str,
        *,
        is_validation: bool,
        has_validation: bool,
    ) -> None:
        """A point is due; ``gap``: what a fit lacks; the others are those of :meth:`Optimum.prepare`."""
        with self._guard.around("fitting their probes", "published", ("train", 0), together=True):
            self.along.merge()
            coming = {"is_validation": is_validation, "has_validation": has_validation}
            self.optimum.prepare(model, context, self.online, **coming)
        self._guard.blame("fitting its probe")
        if self.optimum.fitted is not None:
            self._note(report, gap)

    def watch(self, batch: Any, samples: int | None) -> None:
        """Before a step of evaluation; ``samples``: how many of the batch count, ``None`` for all."""
        with self._guard.around("recording a batch"):
            self.optimum.watch(batch)
            self.network.open(batch)
            self.network.count_only(samples)

    def score(self, stage: str, dataloader: int, model: nn.Module, context: Context) -> None:
        """Score the probes on the batch that was just evaluated."""
        seen = self.network.close()
        self._guard.blame("taking its activation")
        with self._guard.around("scoring their probes", "published", (stage, dataloader)):
            self.optimum.score((stage, dataloader), seen, self.online, model, context)
        self._greet()

    def _greet(self) -> None:
        if self._has_greeted or not (layers := self.facts.described()):
            return
        self._has_greeted = True
        with suppress(Exception):  # a line that cannot be said ends no run
            held = f" ({size(self.online.num_bytes)})" if self.online is not None else ""
            kept = [self._kept()] if self._kept is not None else []
            self._progress.say("; ".join([f"LinearProbeCallback: {layers}{held}", *kept, *self.network.notes]))

    def publish(
        self, report: ProbeReport, epoch: int, step: int, logged_step: int | None
    ) -> tuple[list[Row], list[Row]]:
        """A point of every curve that has been scored since the last time, entered in ``report``.

        A layer whose features were not finite is set aside: its values are NaN from now on. One warning names it, and
        one a layer that never ran or whose probe did not reach its optimum.

        Returns:
            The rows of the network as it was found, if they were due; those of now.
        """
        rows, new = list[Row](), list[Row]()
        first = dict[str, Row]()
        with self._guard.around("scoring their probes", together=True):
            self.network.agree(self.ranks.gather)
            self.facts.agree(self.ranks)
            first = self._about(self.optimum.conclude())
            self.points.agree(len(self.layers), self.network.num_classes)
        self._guard.blame("fitting its probe")
        with self._guard.around("publishing their scores", together=True):
            at_start = None if logged_step is None else 0
            rows = self.points.publish("start", report, first, point=(0, 0), logged_step=at_start)
            # A validation before the first step comes too late for the network as it was found.
            if (epoch, step) != (0, 0) or not report.select(epoch=0, step=0):
                new = self._points_of_now(report, epoch, step, logged_step)
        if (epoch, step) != self.point:  # else: evaluated outside of training
            report.notes = [note for note in report.notes if note != self.missing]
            self.missing = never_seen(self.points.classes)
            self._note(report, *self.network.notes, *self.network.labels.notes)
            self._note(report, self.missing, self.optimum.note, self.ranks.note)
            self._count_cost(report)
        self._note(report, *self.points.notes)
        self.points.clear()
        self.along.turn()
        self.point = self.now = epoch, step
        return rows, new

    def sum_up(self, report: ProbeReport, thinner: str) -> None:
        """Say at the end of training what the probes took; ``thinner`` is what would have halved that, if anything."""
        if seconds := self.optimum.cost["seconds"]:
            self._count_cost(report)
            fitted = self.optimum.fitted.about.values() if self.optimum.fitted is not None else ()
            samples = max((known["fitted_on"]["samples"] for known in fitted), default=0)
            fewer = f"fit_samples below {samples:,}" if samples else "a smaller fit_samples"
            lower = f"{thinner} about halves that, {fewer} lowers it" if thinner else f"{fewer} lowers that"
            share = 100 * report.cost["share"]
            took = f"fitting probes took {seconds:,.1f} s, {share:.{0 if share >= 10 else 1}f} % of this run"
            self._progress.say(f"LinearProbeCallback: {took}; {lower}, at the cost of precision")

    def _count_cost(self, report: ProbeReport) -> None:
        share = self.optimum.cost["seconds"] / max(time.perf_counter() - self._begun, 1e-9)
        report.cost = {**self.optimum.cost, "share": share, "sent_bytes": self.ranks.num_bytes}

    def _note(self, report: ProbeReport, *notes: str) -> None:
        """Add what the report does not say yet."""
        report.notes = list(dict.fromkeys(filter(None, [*report.notes, *notes])))

    def _points_of_now(self, report: ProbeReport, epoch: int, step: int, logged_step: int | None) -> list[Row]:
        fitted = self.optimum.fitted
        along = {"fitted_on": {"data": ONLINE, "samples": self.along.samples}, "converged": None}
        about = self._about(dict.fromkeys(self.layers, along) | (fitted.about if fitted is not None else {}))
        new: list[Row] = []
        for probes in ("published",) if fitted is not None else ("trained along", "published"):
            # Of many layers that are trained in turn some may not have had theirs yet.
            is_whole = probes == "published" or self.along.due() is None
            new += self.points.publish(
                probes,
                report,
                about,
                point=(epoch, step),
                logged_step=logged_step,
                finite=self.online.finite() if self.online is not None else {},
                reasons=self.network.recorder.reasons if is_whole else None,
                online="online",
            )
        self.points.warn_unconverged(layer for layer, known in about.items() if known["converged"] is False)
        return new

    def _about(self, known: Mapping[str, Row]) -> dict[str, Row]:
        widths = self.along.widths
        if self.optimum.fitted is not None:
            widths |= self.optimum.fitted.bank.widths
        return self.facts.about(known, widths)
