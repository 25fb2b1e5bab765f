"""Which probes are published: those at their optimum on training run again, cross-fitted ones, or the online ones."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn
from torchmetrics.utilities import rank_zero_warn

from lightning_probes.distributed import Ranks
from lightning_probes.network.extractor import ProbedNetwork
from lightning_probes.probes.online import ProbeBank
from lightning_probes.probes.tasks import count_classes
from lightning_probes.progress import Progress, size
from lightning_probes.replay.reservoir import Room
from lightning_probes.report.curves import Curve, Points
from lightning_probes.report.method import CROSS_FITTED
from lightning_probes.training.crossfit import CrossFitter
from lightning_probes.training.fitted import Fitted
from lightning_probes.training.fitting import Context, ProbeFitter, Seen
from lightning_probes.training.starting import StartingPoint


class Optimum:
    """Brings the probes of a network to their optimum when a point is due, and scores them.

    Args:
        network: hooked.
        points: where scores go: ``published``, ``start`` (the network as it was found) and, beside them on the same
            samples, ``online``.
        room: for the training samples to fit on; without any nothing is fitted, the online probes are published.
        ranks: the processes that train together; each keeps samples of its own, the probes are those of all.
        progress: shows how far a fit is.

    Attributes:
        room: as given.
        fitted: the probes at their optimum, on the network as it was when the last point was due.
        cost: as in :class:`~lightning_probes.ProbeReport`, without the share.
        note: why the probes are fitted in another way than on training run again, or the starting point is missing.
    """

    def __init__(self, network: ProbedNetwork, points: Points, room: Room, ranks: Ranks, progress: Progress) -> None:
        self.fitted: Fitted | None = None
        self.cost: dict[str, float] = {"seconds": 0.0, "kept_bytes": 0, "weights_bytes": 0}
        self.note = "" if room.samples else "the online probes are published: fit_samples is 0"
        self._network = network
        self._points = points
        self._fitter = ProbeFitter(network, room, ranks, progress)
        self.room = room
        self._ranks, self._progress = ranks, progress
        self._cross_fitters: defaultdict[int, CrossFitter] | None = None
        self._make_cross_fitter = partial(CrossFitter, network, room, ranks, progress)
        self._start = StartingPoint(self._fitter, points, ranks)

    def begin(self, model: nn.Module, *, gone_before: str, has_start: bool) -> str:
        """Training begins.

        Args:
            model: the network.
            gone_before: what training there was before, or empty: as the network is now it is to be the first point of
                each curve.
            has_start: that point is there already.

        Returns:
            What a reader should know.
        """
        if not self.room.samples:
            return ""
        self._fitter.attach(model)
        if any(type(parameter).__name__ == "DTensor" for parameter in model.parameters()):
            self._fitter.refusal = "its weights are shared out among processes"
        if gone_before:
            return "" if has_start else f"no starting point: {gone_before}"
        note = self._start.keep(model)
        self.cost["weights_bytes"] = self._start.num_bytes
        return note

    def end(self) -> str:
        """Let go of the model and of what was kept of its training; what a reader should know."""
        was_waiting = self._start.is_due
        self._fitter.detach()
        self.forget()
        self._start.drop()
        return "no starting point: it waited for a validation that never ended" if was_waiting else ""

    def forget(self) -> None:
        """A validation that did not end."""
        self._start.fitted = self._cross_fitters = None

    def renew(self, epoch: int) -> None:
        """An epoch begins."""
        self._fitter.renew(epoch)

    def open(self) -> bool:
        """Before a training step: whether its batch will be kept."""
        return self.room.samples > 0 and self._fitter.open()

    def close(self, seen: Seen | None) -> None:
        """After a training step: what it showed; copied, where it is kept."""
        self._fitter.close(seen)
        if self._network.labels.absent_in_training:
            self._fitter.refusal = "its batches have no usable labels"

    def kept(self, batches: float, *, has_validation: bool) -> str:
        """Return a phrase on what is kept, at most, once training had its first batch.

        Args:
            batches: of an epoch.
            has_validation: as for :meth:`prepare`.
        """
        if not self.room.samples:
            return "keeps no training batch (fit_samples=0)"
        if self._fitter.refusal:
            samples, values = self.room.samples, sum(self._network.recorder.widths.values())
            most = size(min(4 * samples * values, self.room.num_bytes))
            instead = f" but features of validation, up to {samples:,} samples ({most})" * has_validation
            return f"keeps no training batch{instead}: {self._fitter.refusal}"
        count, num_bytes = self._fitter.most(batches)
        if not count:
            return "keeps no training batch (fit_samples and fit_bytes have no room for one)"
        where = ", in each process" * (self._ranks.number > 1)
        weights = f" and the first weights ({size(self._start.num_bytes)})" * self._start.is_due
        return f"keeps up to {count:,} training batch{'es' * (count > 1)} ({size(num_bytes)}{where}){weights}"

    def prepare(
        self,
        model: nn.Module,
        context: Context,
        online: ProbeBank | None,
        *,
        is_validation: bool,
        has_validation: bool,
    ) -> None:
        """A point is due: fit the probes on the network as it is now.

        Args:
            model: that is trained.
            context: what it runs in.
            online: the probes that are trained along.
            is_validation: whether a validation follows at once.
            has_validation: whether there will be any: the starting point waits for it.
        """
        self.fitted = self._start.fitted = self._cross_fitters = None
        if not self.room.samples:
            return
        with self._timed("Fitting probes"):
            self.fitted = self._fitter.fit(model, context, online)
        if self.fitted is not None and self._start.is_due and (is_validation or not has_validation):
            with self._timed("Fitting probes at start"):
                reason = self._start.fit(model, context)
            if reason:
                self._say(f"no starting point: {reason}")
        self.cost["kept_bytes"] = max(self.cost["kept_bytes"], self._fitter.num_bytes)
        if self.fitted is None:
            reason = self._fitter.refusal or "no batch of it was kept: fit_samples and fit_bytes have no room for one"
            self._cross_fitters = defaultdict(self._make_cross_fitter) if is_validation else None
            way = "cross-fitted on validation" if has_validation else "those trained along, which lag behind"
            no_start = ", and there is no starting point" if self._start.is_due else ""
            self._start.drop()
            self._say(f"training cannot be run again ({reason}): the probes are {way}", no_start)

    def watch(self, batch: Any) -> None:
        """Before a step of validation: if the starting point is due, what it calls is scored there too."""
        if self._start.fitted is not None:
            self._fitter.watch(batch)

    def score(
        self, curve: Curve, seen: Seen | None, online: ProbeBank | None, model: nn.Module, context: Context
    ) -> None:
        """Score all probes on an evaluated batch."""
        watched = self._fitter.take(seen)
        if seen is None:
            return
        classes = count_classes(seen[1])
        if self._cross_fitters is None and curve[0] == "val" and self._is_cross_fitted():
            # Validated once more: the probes fitted on all of those samples must not score them.
            self._cross_fitters = defaultdict(self._make_cross_fitter)
        if self._cross_fitters is not None:
            self._cross_fitters[curve[1]].add(seen)
        elif (bank := self.fitted.bank if self.fitted is not None else online) is not None:
            self._points.add("published", *curve, bank.score(*seen), classes)
        if online is not None and (self.fitted is not None or self._cross_fitters is not None):
            self._points.add("online", *curve, online.score(*seen), classes)
        if watched is not None:
            with self._timed():
                self._start.score(watched, curve, model, context)

    def conclude(self) -> dict[str, dict[str, Any]]:
        """All samples have been scored: add what the fit itself knows, and let go of what only this point needs.

        Returns:
            :attr:`Fitted.about` of the starting point, if it was due.
        """
        if reason := self._start.missed():
            self._say(f"no starting point: {reason}")
        if any(self._ranks.gather(self._cross_fitters is not None)):
            fitters = self._cross_fitters or defaultdict(self._make_cross_fitter)
            with self._timed("Cross-fitting probes"):
                num_bytes = sum(fitter.num_bytes for fitter in fitters.values())
                self.cost["kept_bytes"] = max(self.cost["kept_bytes"], num_bytes)
                for dataloader in sorted(set(chain(*self._ranks.gather(list(fitters))))):
                    # Whatever is raised now, the curve has a point.
                    layers, classes = len(self._network.layers), self._network.num_classes
                    self._points.touch("published", ("val", dataloader), layers, classes)
                    if (crossed := fitters[dataloader].fit()) is not None:
                        sums, fitted, counts = crossed
                        self._points.add("published", "val", dataloader, sums, counts)
                        # Of several loaders the first one's probes are those of the stage "train".
                        self.fitted = self.fitted or fitted
        self._cross_fitters = None
        for probes, found in (("published", self.fitted), ("start", self._start.fitted)):
            if found is not None and found.sums is not None and found.classes is not None:
                self._points.add(probes, "train", 0, found.sums, found.classes)
        if self.fitted is not None and self.fitted.online is not None and self.fitted.classes is not None:
            self._points.add("online", "train", 0, self.fitted.online, self.fitted.classes)
        if self.fitted is not None:
            self.fitted = Fitted(self.fitted.bank, self.fitted.about)
        return self._start.conclude()

    def state_dict(self) -> dict[str, Any]:
        """The probes at their optimum: tensors and plain types."""
        known = {"fitter": self._fitter.state_dict(), "note": self.note}
        if self.fitted is None:
            return known
        return {**known, "bank": self.fitted.bank.state_dict(), "about": self.fitted.about}

    def load_state_dict(
        self, state: Mapping[str, Any], layers: list[str], num_classes: int, device: torch.device | str
    ) -> None:
        """Take over what :meth:`state_dict` gave."""
        self._fitter.load_state_dict(state["fitter"])
        self.note = self.note or state["note"]
        if "bank" in state:
            bank = ProbeBank(layers, num_classes)
            bank.load_state_dict(state["bank"], device)
            self.fitted = Fitted(bank, state["about"])

    def _is_cross_fitted(self) -> bool:
        about = self.fitted.about.values() if self.fitted is not None else ()
        return any(known["fitted_on"]["data"] == CROSS_FITTED for known in about)

    def _say(self, note: str, more: str = "") -> None:
        """Warn and remember, unless it was the last thing said."""
        if not self.note.startswith(note):
            self.note = note + more
            rank_zero_warn(f"LinearProbeCallback: {self.note}")

    @contextmanager
    def _timed(self, title: str = "") -> Iterator[None]:
        begun = time.perf_counter()
        try:
            with self._progress.during(title):
                yield
        finally:
            self.cost["seconds"] += time.perf_counter() - begun
