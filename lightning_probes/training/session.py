"""Turn the batches of a run into points on curves: one method for each event of training and evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from typing import Any

from torch import Tensor, nn

from lightning_probes.distributed import Ranks
from lightning_probes.network.extractor import INPUT, LayerExtractor
from lightning_probes.network.pairing import notes_of
from lightning_probes.probes.fit import fitted_on_of
from lightning_probes.probes.heads import StackedProbes
from lightning_probes.probes.linear import LayerProbe, LayerProbes, unknown
from lightning_probes.progress import Progress, size
from lightning_probes.replay.calls import CannotRunAgainError, RecordedStep
from lightning_probes.replay.recorded_batches import Context
from lightning_probes.replay.reservoir import Budget
from lightning_probes.replay.trial import pair, pair_first
from lightning_probes.report.curves import Curve, Curves, Kind, LayerFacts
from lightning_probes.report.method import NO_METRICS, NO_VALIDATION, ONLINE
from lightning_probes.report.report import ProbeReport, Row
from lightning_probes.training.online_training import OnlineTraining
from lightning_probes.training.refit import Refit


class ProbingSession:
    """Probe a network while it is trained or evaluated.

    An exception in the probes' own code sets layers aside, and never ends a training run.

    Args:
        network: extractor of the network, whose layers are hooked while the session is used.
        learning_rate: step size of the online probes.
        budget: limits on the samples that probes are fitted on; with 0 samples the online probes are published.
        ranks: the processes that train together.
        progress: shows the progress of a fit, and logs what is probed once the layers are known.
        has_lag: whether it is asked for how far the online probes lag behind those of a fit.

    Attributes:
        network: as given.
        ranks: as given.
        curves: adds up what is scored.
        facts: knows what rows say of their layers.
        online: trains probes along with the network.
        refit: fits the probes to their optimum that are published instead of the online probes.
        point: epoch and step of the last publication.
        now: epoch and step of the last training step, which warnings name.
        doubts: note on the targets that probes were fitted on, up to the last publication.
    """

    has_own_data = False
    """Tell whether probes are fitted on a labelled set of their own, and not on batches of training."""

    def __init__(
        self,
        network: LayerExtractor,
        learning_rate: float,
        budget: Budget,
        ranks: Ranks,
        progress: Progress,
        *,
        has_lag: bool,
    ) -> None:
        self.network = network
        self.ranks = ranks
        self.curves = Curves(network, ranks)
        self.facts = LayerFacts(network)
        self.online = OnlineTraining(network, learning_rate, ranks)
        self.refit = Refit(network, self.curves, budget, ranks, progress)
        self.point = 0, 0
        self.now = 0, 0
        self.doubts = ""
        self._progress = progress
        self._has_lag = has_lag
        self._is_first_step = True
        self._pairs_noted: list[str] = []
        self._has_greeted = False
        self._kept: Callable[[], str] | None = None
        self._begun = time.perf_counter()

    @property
    def is_ready(self) -> bool:
        """Return whether there are probes to score with."""
        return self.refit.fitted is not None or self.online.probes is not None

    # Beginning and end

    def begin(
        self,
        model: nn.Module,
        report: ProbeReport,
        *,
        batches: float,
        has_validation: bool,
        gone_before: str = "",
        missed: str = "",
    ) -> bool:
        """Start the probes' bookkeeping for a run.

        Args:
            model: the network.
            report: report of the run that is resumed, or an empty one.
            batches: number of batches of an epoch; infinite if it is unknown.
            has_validation: whether the run has samples to score on that it is not trained on.
            gone_before: which training came before this run, so that the run has no starting point; empty if none did.
            missed: why the last point of the resumed run is missing for good; empty if it is not.

        Returns:
            Whether the starting point has been scored already and is to be published.

        Raises:
            ValueError: a metric that was asked for does not score the probes.
        """
        self.refit.batches = batches
        self._kept = partial(self.refit.described, has_validation=has_validation)
        has_start = bool(report.select(epoch=0, step=0))
        note = self.refit.begin(model, gone_before=gone_before, has_start=has_start)
        # A note of the resumed run may not hold for this one.
        report.notes = [known for known in report.notes if known != NO_VALIDATION]
        note_in(report, note, missed, "" if has_validation else NO_VALIDATION)
        note_in(report, NO_METRICS if self.curves.metrics.is_asked and not has_validation else "")
        if missed:
            self.curves.clear()
        self.curves.metrics.try_out(self.network.question)
        # Memory is lent from the first step on, since other memory changes the order of sums.
        self.online.lend()
        return False

    def end(self, report: ProbeReport) -> None:
        """Release everything but the probes, and note in ``report`` what is missing."""
        note_in(report, self.refit.end(), *self.curves.notes)
        self.curves.clear()
        self.online.release()

    def leave_training(self) -> None:
        """Discard the fitted probes if the network was trained after they were fitted."""
        if self.now != self.point:
            self.refit.fitted = None

    def probe(self, layer: str, target: str | None, report: ProbeReport, when: str) -> LayerProbe:
        """Return a copy of the probe of a layer that the last point shows.

        Args:
            layer: name of the layer.
            target: name of the target; ``None`` for the first.
            report: report with that point.
            when: when the first point is published, for the message.

        Raises:
            ValueError: no such layer is probed, or it was left out or set aside.
            RuntimeError: no probe of it has been fitted yet.
        """
        network, fitted, probes = self.network, self.refit.fitted, StackedProbes([], self.network.question)
        shown = report.select(layer=layer, epoch=self.point[0], step=self.point[1], metric="error")
        fitted_on: dict[str, dict[str, Any]] = {}
        if fitted is not None:
            probes = fitted.probes
            fitted_on = {name: fitted_on_of(known) for name, known in fitted.known.items()}
        elif self.online.probes is not None and any((row["fitted_on"] or {}).get("data") == ONLINE for row in shown):
            probes = self.online.probes
            fitted_on = {layer: {"": {"data": ONLINE, "samples": self.online.samples}}}
        missing = network.why_missing | dict.fromkeys(self.curves.set_aside, "it was set aside, see report.notes")
        if layer not in missing and layer not in network.layers:
            raise ValueError(unknown(layer, network.layers))
        if layer not in missing and layer not in fitted_on:
            raise RuntimeError(f"probe: {layer!r} has no fitted probe yet: {when}")
        return LayerProbes(probes, {layer: network.reduction_of(layer)}, fitted_on, missing).probe(layer, target)

    # A step of training

    def preview(self, batch: Any) -> None:
        """Look at a batch of validation before training: if it has labels, batches of training need none."""
        self.network.labels.preview(batch)

    def open(self, batch: Any) -> None:
        """Start recording a training step.

        Raises:
            LookupError, TypeError, ValueError: as :meth:`~lightning_probes.network.extractor.LayerExtractor.open`.
            ValueError: the first batch shows that a metric that was asked for does not score the probes.
        """
        self.online.is_shown = self._has_lag or not self.refit.is_expected
        wanted = set[str]()
        with self._around("recording it"):
            if self.refit.wants():
                wanted = {INPUT}  # No replay gives the raw input.
        provenance = self.network.open(batch, self.online.open(wanted))
        self.curves.metrics.try_out(self.network.question)
        with self._around("recording it"):
            self.refit.record(provenance)

    def check(self, features: Mapping[str, Tensor] | None = None) -> None:
        """Restart restored probes whose widths differ from those of the first ``features`` after resuming.

        Without ``features``, those of the step under way are checked, and whether what the user wrote of layers fits.

        Raises:
            ValueError: the run is strict, and widths differ; or a layer that was named cannot be probed.
        """
        if features is None:
            self.network.check()
        known = self.network.recorder.recording.features if features is None else features
        if afresh := self.online.check(known):
            self.refit.fitted = None
            self.curves.set_aside -= afresh

    def update(self, now: tuple[int, int], model: nn.Module, context: Context) -> None:
        """Take in a training step that has ended: keep its batch if it is wanted, and train the online probes.

        Args:
            now: epochs completed and ``global_step`` after the step.
            model: the network.
            context: makes the context that the network runs in.

        Raises:
            ValueError: the first batch shows that no layer can be probed.
        """
        self.now = now
        seen = self.network.close()
        step: RecordedStep | CannotRunAgainError | None = None
        with self._around("keeping a batch"):
            step = self.refit.stop()
        if seen is not None:
            self.curves.labels.add(("train", 0), seen.labels)
        is_first, self._is_first_step = self._is_first_step, False  # All processes have one, with labels or not.
        with self._around("finding out which row is of which sample", together=is_first):
            seen = pair_first(self.network, step, seen, model, context, self.ranks, is_first=is_first)
        self.network.settle()
        self._drop_contradicted()
        if is_first:
            with self._around("agreeing on layers", together=True):
                self.network.agree(self.ranks.gather)
            self.network.check_layers()
        if seen is not None and (is_first or not self.network.is_ordered):
            # Some of the layers may be left out by now.
            seen = seen.only(self.network.layers)
        if seen is not None:
            self.check(seen.features)
            seen = self.online.accept(seen)
            self.curves.blame(seen.faults, "taking its activation", self.now)
        with self._around("keeping a batch"):
            self.refit.close(step, seen)
        if seen is None:
            return
        with self._around("updating their probes", Kind.TRAINED_ALONG, ("train", 0)):
            tally = self.online.update(seen)
            self.curves.add(Kind.TRAINED_ALONG, ("train", 0), tally, self.network.question.target_sums(seen.targets))
        self._greet()

    def _drop_contradicted(self) -> None:
        """Set layers aside that are not arranged as the first batch showed."""
        for layer, reason in self.network.pop_contradictions().items():
            self.curves.drop(layer, reason, self.now)

    # A step of evaluation

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
        """Fit the probes, since a point is due.

        Args:
            model: the network.
            context: makes the context that the network runs in.
            report: report that gets the notes.
            gap: note on the batches that the fit lacks; empty if it lacks none.
            is_validation: as for :meth:`Refit.prepare`.
            has_validation: as for :meth:`Refit.prepare`.
        """
        with self._around("fitting their probes", Kind.PUBLISHED, ("train", 0), together=True):
            # If no process had labels in its first step, the processes have yet to agree on layers.
            self.network.agree(self.ranks.gather)
            self.online.merge()
            self.refit.prepare(
                model, context, self.online.probes, is_validation=is_validation, has_validation=has_validation
            )
        self.curves.blame(self.refit.pop_faults(), "fitting its probe", self.now)
        if self.refit.fitted is not None:
            note_in(report, gap)

    def watch(self, batch: Any, samples: int | None, stage: str, dataloader: int) -> None:
        """Start recording a step of evaluation, of which the first ``samples`` samples count, or all with ``None``."""
        with self._around("recording a batch"):
            provenance = self.network.open(batch, data=f"{stage}/{dataloader}")
            self.network.count_only(samples)
            self.refit.watch(batch, provenance)

    def score(self, stage: str, dataloader: int, model: nn.Module, context: Context) -> None:
        """Score the probes on the batch that was just evaluated."""
        with self._around("scoring their probes", Kind.PUBLISHED, (stage, dataloader)):
            seen = self.network.close()
            step = self.refit.stop()
            if seen is not None and not self.network.pairing.is_known:
                seen = pair(self.network, step, seen, model, context, is_only=self.ranks.number == 1)
            self.network.settle()
            self._drop_contradicted()
            if seen is not None:
                self.curves.labels.add((stage, dataloader), seen.labels)
                self.curves.blame(seen.faults, "taking its activation", self.now)
            self.refit.score((stage, dataloader), step, seen, self.online.probes, model, context)
        self._greet()

    def forget(self) -> None:
        """Discard the scores of an unfinished validation, and keep those of training."""
        self.curves.clear(Kind.PUBLISHED, Kind.ONLINE, Kind.START)
        self.network.abandon()
        self.refit.forget()

    def _greet(self) -> None:
        """Log once, as soon as the layers are known, what is probed and kept."""
        if self._has_greeted or not (layers := self.facts.described()):
            return
        self._has_greeted = True
        with suppress(Exception):  # A line that cannot be logged must not end a run.
            held = f" ({size(self.online.probes.num_bytes)})" if self.online.probes is not None else ""
            kept = [self._kept(), self.refit.estimated(self.ranks.device)] if self._kept is not None else []
            told = filter(None, [f"LinearProbeCallback: {layers}{held}", *kept, *self.network.notes])
            self._progress.say("; ".join(told))

    # A point

    def publish(
        self, report: ProbeReport, epoch: int, step: int, logged_step: int | None
    ) -> tuple[list[Row], list[Row]]:
        """Enter in ``report`` a point of every curve that has been scored since the last publication.

        A layer whose features were not finite is set aside: its values are NaN from now on. A layer that is set aside,
        that never ran, or whose probe did not reach its optimum is named in one warning.

        Returns:
            The rows of the network as ``fit`` found it, empty unless they were due; and the rows of the network as it
            is now.
        """
        rows, new, paired = list[Row](), list[Row](), list[str]()
        first = dict[str, Row]()
        with self._around("scoring their probes", together=True):
            self.network.agree(self.ranks.gather)
            self.facts.agree(self.ranks)
            own = notes_of(self.network.pairings, self.network.tokens.kinds)
            paired = list(dict.fromkeys(chain(*self.ranks.gather(own))))
            first = self._about(self.refit.conclude())
            self.curves.agree(len(self.facts.layers))
        self.curves.blame(self.refit.pop_faults(), "fitting its probe", self.now)
        with self._around("publishing their scores", together=True):
            at_start = None if logged_step is None else 0
            rows = self.curves.publish(Kind.START, report, first, point=(0, 0), logged_step=at_start)
            # At step 0 the report may have a point already: that of the network as ``fit`` found it.
            if (epoch, step) != (0, 0) or not report.select(epoch=0, step=0):
                new = self._points_of_now(report, epoch, step, logged_step)
        # An evaluation outside of training has the epoch and step of the last point, whose notes are there.
        if (epoch, step) != self.point:
            report.notes = [note for note in report.notes if note != self.doubts]
            self.doubts = self.curves.doubts
            note_in(report, *self.network.notes, *self.network.labels.notes)
            note_in(report, *self.network.notes_on_tokens)
            note_in(report, self.doubts, self.refit.note, self.ranks.note)
            self._count_cost(report)
        report.notes = [note for note in report.notes if note not in self._pairs_noted]
        self._pairs_noted = paired
        note_in(report, *self._pairs_noted, *self.curves.notes)
        self.curves.labels.tell(report)
        self.curves.clear()
        self.online.turn()
        self.point = self.now = epoch, step
        return rows, new

    def sum_up(self, report: ProbeReport, thinner: str) -> None:
        """Log at the end of training what the probes cost; ``thinner`` is an argument that would have halved it."""
        if seconds := self.refit.cost["seconds"]:
            self._count_cost(report)
            fitted = self.refit.fitted.known.values() if self.refit.fitted is not None else ()
            samples = max((known["fitted_on"]["samples"] for known in fitted), default=0)
            fewer = self._cheaper(samples)
            lower = f"{thinner} about halves that, {fewer} lowers it" if thinner else f"{fewer} lowers that"
            share = 100 * report.cost["share"]
            took = f"fitting probes took {seconds:,.1f} s, {share:.{0 if share >= 10 else 1}f} % of this run"
            self._progress.say(f"LinearProbeCallback: {took}; {lower}, at the cost of precision")

    def _cheaper(self, samples: int) -> str:
        """Return what would lower the cost of a point, of which this number of samples was fitted on."""
        return f"fit_samples below {samples:,}" if samples else "a smaller fit_samples"

    def _count_cost(self, report: ProbeReport) -> None:
        share = self.refit.cost["seconds"] / max(time.perf_counter() - self._begun, 1e-9)
        report.cost = {**self.refit.cost, "share": share, "sent_bytes": self.ranks.num_bytes}

    def _points_of_now(self, report: ProbeReport, epoch: int, step: int, logged_step: int | None) -> list[Row]:
        fitted = self.refit.fitted
        along = {"fitted_on": {"data": ONLINE, "samples": self.online.samples}, "converged": None}
        about = self._about(dict.fromkeys(self.facts.layers, along) | (fitted.known if fitted is not None else {}))
        new: list[Row] = []
        for kind in (Kind.PUBLISHED,) if fitted is not None else (Kind.TRAINED_ALONG, Kind.PUBLISHED):
            # If layers are trained in turn, some may not have had their turn yet.
            is_whole = kind is Kind.PUBLISHED or self.online.due() is None
            new += self.curves.publish(
                kind,
                report,
                about,
                point=(epoch, step),
                logged_step=logged_step,
                finite=self.online.probes.finite() if self.online.probes is not None else {},
                reasons=self.network.recorder.reasons if is_whole else None,
            )
        self.curves.warn_unconverged(layer for layer, known in about.items() if known["converged"] is False)
        return new

    def _about(self, known: Mapping[str, Row]) -> dict[str, Row]:
        widths = self.online.widths
        if self.refit.fitted is not None:
            widths |= self.refit.fitted.probes.widths
        return self.facts.about(known, widths)

    @contextmanager
    def _around(
        self, doing: str, kind: Kind = Kind.PUBLISHED, curve: Curve | None = None, *, together: bool = False
    ) -> Iterator[None]:
        """Catch what is raised inside, so that training goes on: set all layers aside, and give a curve a point.

        Args:
            doing: what is done inside, for the note.
            kind: kind of the probes of the curve.
            curve: curve that gets a point after an exception; ``None`` for none.
            together: whether the block communicates; on an exception this process leaves the group.
        """
        try:
            yield
        except Exception as error:
            if together:
                self.ranks.leave(f"{doing} raised {type(error).__name__}: {error}")
            layers = self.facts.layers
            self.curves.fail(layers, doing, error, self.now)
            with suppress(Exception):
                if curve is not None:
                    self.curves.touch(kind, curve, len(layers))


def note_in(report: ProbeReport, *notes: str) -> None:
    """Add notes that are not in the report."""
    report.notes = list(dict.fromkeys(filter(None, [*report.notes, *notes])))
