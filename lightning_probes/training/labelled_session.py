"""Probe a network on a labelled set of its own while it is trained: nothing in training, all of it at each point."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor, nn

from lightning_probes.distributed import Ranks
from lightning_probes.network.extractor import LayerExtractor
from lightning_probes.network.layers import is_any_lazy
from lightning_probes.probes.dataset import FeatureDataset, LayerBatch
from lightning_probes.probes.fit import FittedProbes
from lightning_probes.progress import Progress
from lightning_probes.replay.calling import Caller
from lightning_probes.replay.recorded_batches import Context
from lightning_probes.replay.reservoir import Budget
from lightning_probes.report.curves import Kind
from lightning_probes.report.method import LABELLED_SET
from lightning_probes.report.report import ProbeReport
from lightning_probes.training.labelled_pass import LabelledPass, Take
from lightning_probes.training.labelled_set import STAGES, LabelledSet
from lightning_probes.training.session import ProbingSession, note_in
from lightning_probes.training.two_passes import TwoPasses

_LAZY = "the network had parameters without a shape"


class LabelledSession(ProbingSession):
    """Probe a network on a labelled set of its own, by its ``forward`` alone.

    Steps of training and evaluation are left alone. At a point one pass over the set's training part is kept as
    features, probes are fitted on them, and one pass over its validation part is scored.

    Args:
        network: extractor of the network, whose hooks were removed for the time between points.
        data: the labelled set.
        make_caller: makes, for the network, what calls it on a batch.
        budget: limits the bytes of features in memory; further features go to temporary files.
        ranks: the processes that train together.
        progress: shows the progress of a point, and logs what is probed.
    """

    has_own_data = True

    def __init__(
        self,
        network: LayerExtractor,
        data: LabelledSet,
        make_caller: Callable[[nn.Module], Caller],
        budget: Budget,
        ranks: Ranks,
        progress: Progress,
    ) -> None:
        super().__init__(network, 1.0, budget, ranks, progress, has_lag=False)
        self._data = data
        self._is_given_up = False
        self._max_bytes = budget.num_bytes
        self._passes = LabelledPass(network, data, ranks, progress, make_caller)

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
        """Try the labelled set out on its first batches, and measure the starting point if it is due.

        The arguments are those of :meth:`ProbingSession.begin`.

        Raises:
            Exception: whatever the set, its labels or the network's ``forward`` raise, since training has not begun.
        """
        has_start = bool(report.select(epoch=0, step=0))
        note = f"no starting point: {gone_before}" if gone_before and not has_start else ""
        if not gone_before and is_any_lazy(model):
            note = f"no starting point: before the first step {_LAZY}"
        note_in(report, note, missed)
        for stage in STAGES:
            self._passes.try_out(model, stage)
        self.curves.metrics.try_out(self.network.question)
        self._kept = self._data.described
        self._greet()
        is_due = not (gone_before or has_start or note)
        if is_due:
            self._measure(model)
        return is_due

    def preview(self, batch: object) -> None:
        """Do nothing: the labels of a first validation are not those of the set."""

    def open(self, batch: object) -> None:
        """Do nothing: steps of training are not recorded."""

    def check(self, features: Mapping[str, Tensor] | None = None) -> None:
        """Do nothing: no probes are trained along."""

    def update(self, now: tuple[int, int], model: nn.Module, context: Context) -> None:
        """Take note of epoch and step."""
        self.now = now

    def watch(self, batch: object, samples: int | None, stage: str, dataloader: int) -> None:
        """Do nothing: steps of evaluation are not recorded."""

    def score(self, stage: str, dataloader: int, model: nn.Module, context: Context) -> None:
        """Do nothing: steps of evaluation are not scored."""

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
        """Read the whole set, and fit and score the probes, since a point is due.

        Args:
            model: the network.
            context: not used: the set knows the Trainer's.
            report: report that gets a note if there can be no point.
            gap: not used: no batch of the set is missing after resuming.
            is_validation: not used.
            has_validation: not used.
        """
        if any(self.ranks.gather(is_any_lazy(model))):
            note_in(report, f"no point at epoch {self.now[0]}, step {self.now[1]}: {_LAZY}")
            return
        if self._is_given_up:
            self.curves.touch(Kind.PUBLISHED, ("val", 0), len(self.facts.layers))
            return
        with self._around("probing on data", Kind.PUBLISHED, ("val", 0)):
            self._is_given_up = True
            self._measure(model)
            self._is_given_up = False

    def _measure(self, model: nn.Module) -> None:
        """Fit probes on the first part of the set, and score them on the second.

        Raises:
            ValueError: there is nothing to fit or to score on.
            Exception: whatever loaders or the network raise.
        """
        passes = TwoPasses(self.network, self.curves.labels, self._max_bytes)
        try:
            with self.refit.timed("Features to fit probes on"):
                self._passes.run(model, "train", self._blamed(passes.keep))
            self._refuse_nothing("train", passes.dataset.labelled)
            with self.refit.timed("Fitting probes"):
                found = self._fit(passes.dataset)
            self.refit.count_bytes(passes.store.memory_bytes + passes.store.file_bytes)
        finally:
            passes.store.close()
        self.curves.blame(self.refit.pop_faults(), "fitting its probe", self.now)
        with self.refit.timed("Features to score probes on"):
            score = partial(passes.score, probes=found.probes, curves=self.curves)
            self._passes.run(model, "val", self._blamed(score))
        self._refuse_nothing("val", int(passes.scored))

    def _fit(self, dataset: FeatureDataset) -> FittedProbes:
        try:
            return self.refit.fit_anew(dataset, LABELLED_SET)
        except Exception as error:
            # The others may wait in the fit; what is raised in a pass is raised in all.
            self.ranks.leave(f"fitting probes raised {type(error).__name__}: {error}")
            raise

    def _blamed(self, take: Take) -> Take:
        """Return what sets the layers aside whose features could not be taken, and gives a batch to ``take``."""

        def taken(dataloader: int, seen: LayerBatch) -> None:
            self._drop_contradicted()
            self.curves.blame(seen.faults, "taking its activation", self.now)
            take(dataloader, seen)

        return taken

    def _refuse_nothing(self, stage: str, labelled: int) -> None:
        """Raise in all processes if none has a sample with a label, or if there are too few to fit on."""
        samples = sum(self.ranks.gather(labelled))
        if not samples:
            raise ValueError(f"data: no batch with labels came out of its {stage} loader")
        if stage == "train" and (told := self.network.question.objection(samples)):
            raise ValueError(f"data: its train loader: {told}")

    def _cheaper(self, samples: int) -> str:
        """Return what would lower the cost of a point."""
        return "a smaller set"
