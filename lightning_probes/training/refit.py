"""Fit the probes of a network to their optimum when a point is due, and score them.

Training batches that were kept are run again on the frozen network. If that cannot be, probes are cross-fitted on
validation, or the online probes are published.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torchmetrics.utilities import rank_zero_warn

from lightning_probes.distributed import Ranks
from lightning_probes.network.extractor import LayerExtractor
from lightning_probes.network.pairing import MIXED_BY_STEP, TRAINING
from lightning_probes.network.provenance import Provenance
from lightning_probes.network.torch_internals import compiled_parts, is_shared_out
from lightning_probes.options import first_of
from lightning_probes.precision import accumulator
from lightning_probes.probes.dataset import FeatureDataset, LayerBatch, MemoryStore
from lightning_probes.probes.fit import FittedProbes, fit_layers, strength_of
from lightning_probes.probes.heads import StackedProbes
from lightning_probes.probes.solver import Strength
from lightning_probes.progress import Progress, size
from lightning_probes.replay.calls import CannotRunAgainError, RecordedStep
from lightning_probes.replay.recorded_batches import Context, RecordedBatch, RecordedBatches, device_of
from lightning_probes.replay.replayer import copy_of_weights
from lightning_probes.replay.reservoir import Budget, Reservoir
from lightning_probes.report.curves import Curve, Curves, Kind
from lightning_probes.report.method import CROSS_FITTED
from lightning_probes.training.estimate import seconds_to_fit

Faults = dict[str, Exception]
"""Map layers to what was raised for them."""


_PAUSE = 2.0
"""Announce fits that are likely to take at least so many seconds."""

_SHARED_OUT = "its weights are shared out among processes"


class Refit:
    """Fit and score the probes that are published.

    Args:
        network: extractor whose layers are hooked.
        curves: adds up tallies, of the kinds ``PUBLISHED``, ``START`` and, on the same samples, ``ONLINE``.
        budget: limits on the training samples to fit on; with 0 samples the online probes are published.
        ranks: the processes that train together; each keeps samples of its own, and probes are fitted on those of all.
        progress: shows the progress of a fit.

    Attributes:
        budget: as given.
        batches: number of batches of an epoch in this process; infinite if it is not known.
        fitted: the probes at their optimum for the network as it was when the last point was due.
        cost: as in :class:`~lightning_probes.ProbeReport`, without the share.
        note: why probes are not fitted on training batches that are run again, or why the starting point is missing.
    """

    def __init__(
        self, network: LayerExtractor, curves: Curves, budget: Budget, ranks: Ranks, progress: Progress
    ) -> None:
        self.budget = budget
        self.batches = math.inf
        self.fitted: FittedProbes | None = None
        self.cost: dict[str, float] = {"seconds": 0.0, "kept_bytes": 0, "weights_bytes": 0}
        self.note = "" if budget.samples else "the online probes are published: fit_samples is 0"
        self._network = network
        self._curves = curves
        self._ranks = ranks
        self._progress = progress
        self._batches = RecordedBatches(network, budget)
        self._start = StartingPoint()
        self._validation: defaultdict[int, Reservoir[LayerBatch]] | None = None
        self._crossed: set[str] = set()
        self._is_shared_out = False
        self._online: Tensor | None = None
        self._faults: Faults = {}
        self._strengths: dict[str, Strength] = {}
        self._has_failed = False

    @property
    def is_expected(self) -> bool:
        """Return whether the next point will show fitted probes of all layers, as far as is known."""
        is_refused = self._batches.refusal is not None or bool(self._batches.partly)
        return self.budget.samples > 0 and not is_refused and not self._has_failed

    def begin(self, model: nn.Module, *, gone_before: str, has_start: bool) -> str:
        """Prepare to keep the batches of a run, and copy the first weights if a starting point is due.

        Args:
            model: the network.
            gone_before: which training came before this run; empty if the network as it is now is the starting point of
                each curve.
            has_start: whether the report has a starting point already.

        Returns:
            A note for readers of the report; empty if there is nothing to say.
        """
        self.attach(model)
        if not self.budget.samples:
            return ""
        if self._is_shared_out:
            self._batches.refuse(_SHARED_OUT)
        if gone_before:
            return "" if has_start else f"no starting point: {gone_before}"
        if any(is_lazy(tensor) for tensor in model.parameters()):
            return "no starting point: before the first step the network had parameters without a shape"
        if self._batches.refusal is not None:
            return "no starting point: training cannot be run again"
        self._start.keep(model)
        self.cost["weights_bytes"] = self._start.num_bytes
        return ""

    def attach(self, model: nn.Module) -> None:
        """Find the modules of ``model`` whose calls can be recorded."""
        self._is_shared_out = is_shared_out(model)
        # Hooks in compiled code are part of it, so that new ones would have it compiled again.
        if self.budget.samples or not compiled_parts(model)[1]:
            self._batches.attach(model)

    def end(self) -> str:
        """Release the model and the kept batches; return a note for readers of the report."""
        was_waiting = self._start.is_due
        self._batches.detach()
        self.forget()
        self._drop_start()
        return "no starting point: it waited for a validation that never ended" if was_waiting else ""

    def forget(self) -> None:
        """Discard the recording, kept batches and probes of an unfinished validation."""
        self._batches.abandon()
        self._start.fitted = None
        self._validation = None

    def renew(self, epoch: int, batches: float) -> None:
        """Begin an epoch of so many batches, which replace those of the epoch before."""
        self.batches = batches
        self._batches.kept.renew(epoch)

    def wants(self) -> bool:
        """Decide before a training step whether its batch will be kept, and return that."""
        return self._batches.wants()

    def record(self, provenance: Provenance | None) -> None:
        """Start recording a training step if its batch will be kept, or if ``provenance`` is to follow its samples."""
        self._batches.record(None if self._is_shared_out else provenance)

    def pause_following(self) -> None:
        """Follow no operation of the step until :meth:`go_on_following`: those of backward tell nothing."""
        self._batches.recorder.pause_following()

    def go_on_following(self) -> None:
        """Follow operations of the step again."""
        self._batches.recorder.go_on_following()

    def stop(self) -> RecordedStep | CannotRunAgainError | None:
        """Return what was recorded of a step that has ended, or why it cannot be run again; ``None`` without either."""
        try:
            return self._batches.stop() if not self._is_shared_out else CannotRunAgainError(_SHARED_OUT)
        except CannotRunAgainError as error:
            return error.with_traceback(None)  # The frames of a traceback would hold the batch.

    def close(self, step: RecordedStep | CannotRunAgainError | None, seen: LayerBatch | None) -> None:
        """Keep the batch of a training step that has ended, if it was wanted."""
        self._batches.close(step, seen)
        if self._network.pairing.is_shuffled and self._network.pairing.data == TRAINING:
            self._batches.refuse(MIXED_BY_STEP)
        if self._network.labels.absent_in_training:
            self._batches.refuse("its batches have no usable labels")

    def described(self, *, has_validation: bool) -> str:
        """Describe the most that will be kept; call this after the first training batch.

        Args:
            has_validation: as for :meth:`prepare`.
        """
        if not self.budget.samples:
            return "keeps no training batch (fit_samples=0)"
        if self._batches.refusal is not None:
            samples, values = self.budget.samples, sum(self._network.recorder.widths.values())
            most = size(min(4 * samples * values, self.budget.num_bytes))
            instead = f" but features of validation, up to {samples:,} samples ({most})" * has_validation
            return f"keeps no training batch{instead}: {self._batches.refusal}"
        count, num_bytes = self._batches.kept.most(self.batches)
        if not count:
            return "keeps no training batch (fit_samples and fit_bytes have no room for one)"
        where = ", in each process" * (self._ranks.number > 1)
        weights = f" and the first weights ({size(self._start.num_bytes)})" * self._start.is_due
        return f"keeps up to {count:,} training batch{'es' * (count > 1)} ({size(num_bytes)}{where}){weights}"

    def estimated(self, device: torch.device) -> str:
        """Say about how long the fits of a point will take, after the first training batch; empty if that is little."""
        kept, network = self._batches.kept, self._network
        count, _ = kept.most(self.batches)
        if self._batches.refusal is not None or not count:
            return ""
        samples = count * kept.samples // len(kept.items())
        seconds = seconds_to_fit(network.recorder.widths.values(), network.question.outputs, samples, device)
        return f"fits will take about {seconds:,.0f} s at each point" if seconds >= _PAUSE else ""

    def prepare(
        self,
        model: nn.Module,
        context: Context,
        online: StackedProbes | None,
        *,
        is_validation: bool,
        has_validation: bool,
    ) -> None:
        """Fit the probes on the network as it is now, since a point is due.

        Args:
            model: the network that is trained.
            context: makes the context that the network runs in.
            online: the online probes.
            is_validation: whether a validation follows at once.
            has_validation: whether the run has any validation, for which the starting point waits.
        """
        before, self.fitted = self.fitted, None
        self._online = None
        self.forget()
        if not self.budget.samples:
            return
        try:
            with self.timed("Fitting probes"):
                self.fitted = self._fit(model, context, before, online=online)
        except CannotRunAgainError as error:
            self._batches.refuse(str(error))
        # All processes go the same way, since fits wait for each other.
        missing = set().union(*self._ranks.gather(self._missing() if self.fitted is not None else set()))
        self._has_failed = self.fitted is None or bool(missing)
        if self.fitted is not None and not has_validation and self._batches.partly and missing:
            # The layers that cannot be run again would have no probe but the online one: all are of one kind then.
            self.fitted = None
            self._batches.refuse(self._batches.partly)
        if self.fitted is not None and self._start.is_due and (is_validation or not has_validation):
            with self.timed("Fitting probes at start"):
                self._fit_start(model, context)
        self.cost["kept_bytes"] = max(self.cost["kept_bytes"], self._batches.kept.num_bytes)
        if self.fitted is None:
            reason = self._batches.refusal or "no batch of it was kept: fit_samples and fit_bytes have no room for one"
            self._validation = self._no_batches() if is_validation else None
            self._crossed = set(self._network.layers)
            way = "cross-fitted on validation" if has_validation else "those trained along, which lag behind"
            no_start = ", and there is no starting point" if self._start.is_due else ""
            self._drop_start()
            self._say(f"training cannot be run again ({reason}): the probes are {way}", no_start)
        elif missing:
            self._say_crossed(missing)
            if is_validation:
                self._validation, self._crossed = self._no_batches(), missing

    def _missing(self) -> set[str]:
        """Return the layers without features in training that may have some elsewhere, since nothing went wrong."""
        assert self.fitted is not None
        known = self.fitted.known.keys() | self._faults.keys() | self._curves.set_aside
        # A layer that has never been seen may not run in validation either.
        seen = self._network.recorder.widths
        return {layer for layer in self._network.layers if layer not in known and layer in seen}

    def _say_crossed(self, missing: set[str]) -> None:
        layers = first_of([layer for layer in self._network.layers if layer in missing])
        reason = self._batches.partly or "they have no features there"
        self._say(
            f"training cannot be run again for {layers} ({reason}): cross-fitted on validation where it has features"
        )

    def watch(self, batch: Any, provenance: Provenance | None) -> None:
        """Start recording a step of evaluation, to score the starting point on it or to follow samples."""
        if not self._is_shared_out and (self._start.fitted is not None or provenance is not None):
            self._batches.watch(batch, provenance)

    def score(
        self,
        curve: Curve,
        step: RecordedStep | CannotRunAgainError | None,
        seen: LayerBatch | None,
        online: StackedProbes | None,
        model: nn.Module,
        context: Context,
    ) -> None:
        """Score all probes on a batch that was evaluated."""
        if isinstance(step, CannotRunAgainError):
            if seen is not None and self._start.fitted is not None:
                self._start.fault = self._start.fault or f"validation cannot be run again: {step}"
            step = None
        elif step is not None and step.reason and not self._batches.partly:
            # The starting point would lack layers that training has.
            self._start.fault = self._start.fault or f"validation cannot be run again: {step.reason}"
        if seen is None:
            return
        watched = self._batches.taken(step, seen) if self._start.fitted is not None else None
        if self._validation is None and curve[0] == "val" and (crossed := self._cross_fitted()):
            # In a further validation the probes that were fitted on all of its samples must not score them.
            self._validation, self._crossed = self._no_batches(), crossed
        others = seen
        if self._validation is not None:
            self._keep(self._validation[curve[1]], seen.only(self._crossed))
            others = seen.only(set(self._network.layers) - self._crossed)
        probes = self.fitted.probes if self.fitted is not None else online
        if probes is not None and (self._validation is None or not self._is_all_crossed):
            self._curves.score(Kind.PUBLISHED, curve, probes, others)
        if online is not None and (self.fitted is not None or self._validation is not None):
            target_sums = self._network.question.target_sums(seen.targets)
            self._curves.add(Kind.ONLINE, curve, online.score(seen), target_sums)
        if watched is not None:
            with self.timed():
                self._score_start(watched, seen.marks, curve, model, context)

    def conclude(self) -> dict[str, dict[str, Any]]:
        """Finish a point: add the tallies of the fit, cross-fit if needed, and release what only this point needs.

        Returns:
            :attr:`FittedProbes.known` of the starting point; empty if it was not due.
        """
        if self._start.fitted is not None and (reason := self._ranks.first(self._start.fault)):
            self._drop_start()
            self._say(f"no starting point: {reason}")
        if any(self._ranks.gather(self._validation is not None)):
            with self.timed("Cross-fitting probes"):
                self._cross_fit(self._validation or self._no_batches())
        self._validation = None
        for kind, found in ((Kind.PUBLISHED, self.fitted), (Kind.START, self._start.fitted)):
            if found is not None and found.tally is not None and found.target_sums is not None:
                self._curves.add(kind, ("train", 0), found.share_of(self._ranks), found.target_sums)
                if kind is Kind.PUBLISHED and self._online is not None:
                    self._curves.add(Kind.ONLINE, ("train", 0), self._online, found.target_sums)
        self._strengths = self._strengths_now
        if self.fitted is not None:
            self.fitted = replace(self.fitted, crossed_tally=None, crossed_losses={}, target_sums=None, faults={})
        self._crossed = set()
        self._online = None
        return self._start.conclude()

    def pop_faults(self) -> Faults:
        """Return and forget what was raised for single layers since the last call."""
        faults, self._faults = self._faults, {}
        return faults

    def state_dict(self) -> dict[str, Any]:
        """Return the probes at their optimum as tensors and plain types."""
        known: dict[str, Any] = {"fitter": self._batches.state_dict(), "note": self.note}
        known |= {"strengths": self._strengths, "has_failed": self._has_failed}
        if self.fitted is None:
            return known
        # With these a resumed run knows what needs no fit, as the run would have without the interruption.
        again = {name: getattr(self.fitted, name) for name in ("tally", "fingerprints", "held_out")}
        return {**known, "bank": self.fitted.probes.state_dict(), "about": self.fitted.known, **again}

    def load_state_dict(self, state: Mapping[str, Any], layers: list[str], device: torch.device | str) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._batches.load_state_dict(state["fitter"])
        self.note = self.note or state["note"]
        if "bank" in state:
            probes = StackedProbes(layers, self._network.question)
            probes.load_state_dict(state["bank"], device)
            # Checkpoints of earlier versions have no fingerprints.
            marks, tally = state.get("fingerprints", {}), state.get("tally")
            tally = None if tally is None else tally.to(device, accumulator(device))
            known = state.get("held_out", {}).items()
            held_out = {layer: found.to(device, accumulator(device)) for layer, found in known}
            self.fitted = FittedProbes(probes, state["about"], tally, fingerprints=dict(marks), held_out=held_out)
        self._strengths = dict(state.get("strengths", {})) or self._strengths_now
        self._has_failed = state.get("has_failed", False)

    def _fit(
        self,
        model: nn.Module,
        context: Context,
        before: FittedProbes | None,
        weights: Mapping[str, Tensor] | None = None,
        online: StackedProbes | None = None,
    ) -> FittedProbes | None:
        """Fit all probes on the kept batches of all processes; ``None`` if nothing is kept.

        Probes of ``before`` are taken where a layer has the samples that they were fitted on.

        Raises:
            CannotRunAgainError: the batches of at least one process cannot be run again.
        """
        dataset = FeatureDataset(self._network.question, MemoryStore(self.budget.copy))
        # All processes go on or none does, here and below, since modules and the fit may wait for other processes.
        self._agree_on(self._batches.refusal)
        refusal: CannotRunAgainError | None = None
        faults: Faults = {}
        tally: Tensor | None = None
        kept = self._batches.kept.items()
        shown = self._progress.track("batch", kept, len(kept))
        try:
            with closing(self._batches.run_again(shown, model, context, weights)) as batches:
                for batch in batches:
                    faults |= batch.faults
                    if online is not None:
                        tally = online.score(batch) if tally is None else tally + online.score(batch)
                    dataset.add(batch)
        except CannotRunAgainError as error:
            refusal = error
        self._agree_on(refusal)
        self._faults |= faults
        numbers = torch.tensor([len(kept), max(self.batches, len(kept))], dtype=torch.float32)
        number, of_all = self._ranks.total(numbers).tolist()
        share = number / of_all if 0 < of_all < math.inf else None
        found = self._fit_on(dataset, "train", device_of(model), before, share=share)
        if online is not None:
            self._online = tally
        if found is None and faults:  # no layer had features
            raise next(iter(faults.values()))
        return found

    def fit_anew(self, dataset: FeatureDataset, data: str) -> FittedProbes:
        """Fit the probes that are published on a dataset, and return them; see :func:`fit_layers`.

        Args:
            dataset: samples of this process.
            data: name of the data, for the rows of a report.

        Raises:
            ValueError: no process has features.
            Exception: as for :func:`fit_layers`.
        """
        before, self.fitted = self.fitted, None
        self.fitted = self._fit_on(dataset, data, self._ranks.device, before, share=1.0)
        if self.fitted is None:
            raise ValueError("no layer has features")
        return self.fitted

    def count_bytes(self, num_bytes: int) -> None:
        """Take note of the bytes that were kept at one time, of which the cost has the most."""
        self.cost["kept_bytes"] = max(self.cost["kept_bytes"], num_bytes)

    def _fit_on(
        self,
        dataset: FeatureDataset,
        data: str,
        device: torch.device,
        before: FittedProbes | None = None,
        *,
        share: float | None = None,
        is_crossed: bool = False,
    ) -> FittedProbes | None:
        found = fit_layers(
            self._network.question,
            dataset,
            self._network.layers,
            data,
            ranks=self._ranks,
            device=device,
            track=self._progress.track,
            near=self._strengths_now,
            before=before,
            share=share,
            is_crossed=is_crossed,
        )
        self._faults |= found.faults if found is not None else {}
        return found

    @property
    def _strengths_now(self) -> dict[str, Strength]:
        """Return the strength of L2 of each layer's last probe, where the search for the next begins."""
        known = self.fitted.known if self.fitted is not None else {}
        now = {layer: found for layer, row in known.items() if (found := strength_of(row)) is not None}
        return self._strengths | now

    def _agree_on(self, refusal: CannotRunAgainError | None) -> None:
        """Raise in all processes if one of them cannot run its batches again."""
        if reason := self._ranks.first("" if refusal is None else str(refusal)):
            raise CannotRunAgainError(reason)

    # Cross-fitting on validation

    def _no_batches(self) -> defaultdict[int, Reservoir[LayerBatch]]:
        return defaultdict(lambda: Reservoir[LayerBatch](self.budget))

    def _keep(self, kept: Reservoir[LayerBatch], seen: LayerBatch) -> None:
        """Keep a copy of the features of a batch of validation; keep a fair sample if there is no room for all."""
        if kept.wants():
            features = {layer: self.budget.copy(x) for layer, x in seen.features.items()}
            num_bytes = sum(x.numel() * x.element_size() for x in features.values())
            targets = self.budget.copy(seen.targets)
            marks = None if seen.marks is None else seen.marks.clone()
            kept.add(len(targets), LayerBatch(features, targets, each=seen.each, marks=marks), num_bytes)

    def _cross_fit(self, kept: defaultdict[int, Reservoir[LayerBatch]]) -> None:
        """Score each sample of validation by probes that were fitted on others, and fit probes on all of them."""
        num_bytes = sum(batches.num_bytes for batches in kept.values())
        self.cost["kept_bytes"] = max(self.cost["kept_bytes"], num_bytes)
        for dataloader in sorted(set(chain(*self._ranks.gather(list(kept))))):
            # The curve gets a point even if the fit raises.
            self._curves.touch(Kind.PUBLISHED, ("val", dataloader), len(self._network.layers))
            dataset = FeatureDataset(self._network.question, MemoryStore())
            for batch in kept[dataloader].items():
                dataset.add(batch)
            kept[dataloader].clear()
            found = self._fit_on(dataset, CROSS_FITTED, self._ranks.device, is_crossed=True)
            if found is not None and found.crossed_tally is not None and found.target_sums is not None:
                # Targets count once, with the layers whose probes were fitted on training if any were.
                sums = found.target_sums if self._is_all_crossed else torch.zeros_like(found.target_sums)
                self._curves.add(Kind.PUBLISHED, ("val", dataloader), found.crossed_tally, sums)
                if self._is_all_crossed:  # Else other layers were scored on other samples.
                    self._curves.outcomes.enter_crossed(
                        (Kind.PUBLISHED, ("val", dataloader)), found, dataset, self._ranks
                    )
                # Of several loaders the first one gives the probes of the stage "train".
                self.fitted = found if self.fitted is None else self.fitted.with_others(found)

    @property
    def _is_all_crossed(self) -> bool:
        return self._crossed >= set(self._network.layers)

    def _cross_fitted(self) -> set[str]:
        known = self.fitted.known if self.fitted is not None else {}
        return {layer for layer, row in known.items() if row["fitted_on"]["data"] == CROSS_FITTED}

    # The starting point

    def _fit_start(self, model: nn.Module, context: Context) -> None:
        weights = self._start.weights_on(device_of(model))
        try:
            self._start.fitted = self._fit(model, context, self.fitted, weights)
        except CannotRunAgainError as error:
            self._drop_start()
            self._say(f"no starting point: training cannot be run again on the first weights: {error}")

    def _score_start(
        self, batch: RecordedBatch, marks: Tensor | None, curve: Curve, model: nn.Module, context: Context
    ) -> None:
        """Score the probes of the starting point on a batch of validation that is run again on the first weights.

        The samples of the batch have ``marks``.
        """
        start = self._start
        if start.fitted is None or start.fault:
            return
        try:
            for seen in self._batches.run_again([batch], model, context, start.weights):
                self._faults |= seen.faults
                self._curves.score(Kind.START, curve, start.fitted.probes, replace(seen, marks=marks))
        except Exception as error:  # Whatever a module raises must not end a training run.
            reason = str(error) if isinstance(error, CannotRunAgainError) else f"{type(error).__name__}: {error}"
            start.fault = f"validation cannot be run again: {reason}"

    def _drop_start(self) -> None:
        """Give up on the starting point."""
        self._start = StartingPoint()
        self._curves.clear(Kind.START)

    def _say(self, note: str, more: str = "") -> None:
        """Warn, and keep the warning as the note, unless the note begins with it already."""
        if not self.note.startswith(note):
            self.note = note + more
            rank_zero_warn(f"LinearProbeCallback: {self.note}")

    @contextmanager
    def timed(self, title: str = "") -> Iterator[None]:
        """Add the time spent inside to the cost, and show what goes on there under ``title``."""
        begun = time.perf_counter()
        try:
            with self._progress.during(title):
                yield
        finally:
            self.cost["seconds"] += time.perf_counter() - begun


class StartingPoint:
    """Hold the first point of each curve while it is due: the weights of the network as it was found.

    Attributes:
        weights: the first weights by name; ``None`` if no starting point is due.
        fitted: probes of the starting point, while they are scored.
        fault: why the starting point could not be scored on a batch of validation; empty if it could.
    """

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] | None = None
        self.fitted: FittedProbes | None = None
        self.fault = ""

    @property
    def is_due(self) -> bool:
        """Return whether the point is still to come."""
        return self.weights is not None

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the weights."""
        sizes = {id(tensor): tensor.numel() * tensor.element_size() for tensor in (self.weights or {}).values()}
        return sum(sizes.values())

    def keep(self, model: nn.Module) -> None:
        """Copy the weights as they are now."""
        self.weights = copy_of_weights(model)

    def weights_on(self, device: torch.device) -> dict[str, Tensor]:
        """Move the weights to a device, and keep them there, since each batch of validation is run on them."""
        known = self.weights or {}
        # A tied tensor is moved once and stays tied.
        moved = {id(tensor): tensor.to(device) for tensor in known.values()}
        self.weights = {name: moved[id(tensor)] for name, tensor in known.items()}
        return self.weights

    def conclude(self) -> dict[str, dict[str, Any]]:
        """Release the point if it has been scored, and return what is known of its probes."""
        if self.fitted is None:
            return {}
        known = self.fitted.known
        self.fitted = None
        self.weights = None
        return known
