"""Run the batches of a labelled set through a frozen network by its ``forward``, in all processes together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_probes.distributed import Ranks
from lightning_probes.network.batches import describe, tensors_in
from lightning_probes.network.extractor import LayerExtractor
from lightning_probes.network.layers import is_any_lazy
from lightning_probes.network.pairing import TRAINING, Pairing
from lightning_probes.network.provenance import Provenance
from lightning_probes.network.torch_internals import is_shared_out, tree_map
from lightning_probes.probes.dataset import LayerBatch
from lightning_probes.progress import Progress
from lightning_probes.replay.calling import Caller, objection
from lightning_probes.replay.calls import Call, Copied, RecordedStep, is_plain
from lightning_probes.replay.frozen import frozen, seeded
from lightning_probes.replay.replayer import Replay
from lightning_probes.replay.sharded import shares_kept
from lightning_probes.replay.trial import pair_first
from lightning_probes.training.labelled_set import LabelledSet

Take = Callable[[int, LayerBatch], Any]
"""Take the index of a batch's loader, and the features and targets of the batch."""


class LabelledPass:
    """Run a part of a labelled set through a network, and leave no trace in the network, the loaders or anywhere else.

    The network is in eval mode, its weights are copies, and layers have hooks only meanwhile. All processes run the
    same number of batches, since modules may wait for each other: one that has run out runs its last batch again, which
    does not count. Which row is of which sample is found out with the first batch of each loader, once in a run.

    Args:
        network: extractor of the network.
        data: the labelled set.
        ranks: the processes that train together.
        progress: shows which batch is run.
        make_caller: makes, for the network, what calls it on a batch.
    """

    def __init__(
        self,
        network: LayerExtractor,
        data: LabelledSet,
        ranks: Ranks,
        progress: Progress,
        make_caller: Callable[[nn.Module], Caller],
    ) -> None:
        self._network = network
        self._data = data
        self._ranks = ranks
        self._progress = progress
        self._make_caller = make_caller

    def try_out(self, model: nn.Module, stage: str) -> None:
        """Run the first batch of each loader of a stage; see only whether it could be run if parameters are lazy.

        Raises:
            TypeError, ValueError: the network has no ``forward``, or one that does not take the input; or a first batch
                has no labels.
            Exception: whatever loaders, labels and network raise.
        """
        if not _has_forward(model):
            raise TypeError(f"data: {type(model).__name__} has no forward that could be called on the batches of data")
        self._run(model, stage, None)

    def run(self, model: nn.Module, stage: str, take: Take) -> None:
        """Run all batches of a stage, and give ``take`` the features of those that have labels.

        Raises:
            Exception: whatever loaders, network or ``take`` raise; in all processes if in one.
        """
        self._run(model, stage, take)

    def _run(self, model: nn.Module, stage: str, take: Take | None) -> None:
        data, ranks, recorder = self._data, self._ranks, self._network.recorder
        caller = self._make_caller(model)
        shared = is_shared_out(model)
        guard = shares_kept(model, ranks.gather) if shared else nullcontext()
        with seeded(), data.in_validation(), _hooked(self._network), frozen(model, recorder), guard:
            runner = _Runner(model, self._network, data, ranks, caller)
            for index, loader in enumerate(data.loaders(stage)):
                name = TRAINING if stage == "train" else f"{stage}/{index}"
                with data.reading(loader, ranks.rank, ranks.number) as (batches, total):
                    shown = self._progress.track("batch", batches, total) if total else batches
                    run = partial(runner.run, index, name, take)
                    self._in_step(shown, run, is_whole=take is not None, is_shared_out=shared)
        if caller.note and caller.note not in self._network.notes:
            self._network.notes.append(caller.note)

    def _in_step(
        self,
        batches: Iterator[tuple[Any, int | None]],
        run: Callable[[tuple[Any, int | None] | None, bool], None],
        *,
        is_whole: bool,
        is_shared_out: bool,
    ) -> None:
        """Run the batches of all processes in step; what one of them raises is raised in all.

        Args:
            batches: batches of this process, and how many samples of each count.
            run: takes one of them, or ``None`` if this process has had none, and whether it is the first.
            is_whole: whether all batches are run and not only the first.
            is_shared_out: whether the processes need each other's weights.
        """
        last: tuple[Any, int | None] | None = None
        error: Exception | None = None
        number = 0
        while True:
            batch = None
            if error is None and (is_whole or not number):
                try:
                    batch = next(batches, None)
                except Exception as raised:  # A data set may raise anything.
                    error = raised
            said = "" if error is None else f"{type(error).__name__}: {error}"
            found = self._ranks.gather((batch is not None, said))
            if error is not None:
                raise error
            if reason := next((text for _, text in found if text), ""):
                raise RuntimeError(f"data: another process raised {reason}")
            if not any(has_batch for has_batch, _ in found):
                return
            if is_shared_out and not number and not all(has_batch for has_batch, _ in found):
                raise ValueError("data: a loader has fewer batches than there are processes, which need each other")
            last = batch if batch is not None else None if last is None else (last[0], 0)
            try:
                run(last, not number)
            except Exception as raised:
                error = raised
            number += 1


class _Runner:
    """Run one batch after the other through a frozen network."""

    def __init__(
        self, model: nn.Module, network: LayerExtractor, data: LabelledSet, ranks: Ranks, caller: Caller
    ) -> None:
        self._model = model
        self._network = network
        self._data = data
        self._ranks = ranks
        self._caller = caller
        self._replay = Replay(model, device=ranks.device)
        self._is_lazy = is_any_lazy(model)

    def run(
        self, dataloader: int, data: str, take: Take | None, batch: tuple[Any, int | None] | None, is_first: bool
    ) -> None:
        """Run a batch, of which no sample counts if the process has run out.

        Args:
            dataloader: index of the loader.
            data: name of the data that the loader has.
            take: takes the features; ``None`` only tries out.
            batch: the batch, and how many of its samples count, ``None`` for all; or ``None`` if there is no batch.
            is_first: whether it is the first of its loader, in all processes.
        """
        network = self._network
        seen: LayerBatch | None = None
        step: RecordedStep | None = None
        error: Exception | None = None
        try:
            if batch is None:
                network.pairing = network.pairings.setdefault(data, Pairing(data))
            else:
                seen, step = self._seen(*batch, dataloader, data, is_trial=take is None)
        except Exception as raised:
            error = raised
            network.abandon()
        if is_first and any(self._ranks.gather(error is not None)) and error is None:
            return  # The other process tells of it before the next batch.
        if error is not None:
            raise error
        if self._is_lazy:
            return
        if seen is not None or is_first:
            seen = pair_first(network, step, seen, self._model, self._data.context, self._ranks, is_first=is_first)
            network.settle()
        if is_first:
            network.agree(self._ranks.gather)
            network.check_layers()
        if seen is not None and take is not None:
            take(dataloader, seen.only(network.layers))

    def _seen(
        self, batch: Any, samples: int | None, dataloader: int, data: str, *, is_trial: bool
    ) -> tuple[LayerBatch | None, RecordedStep | None]:
        """Return the features of a batch, ``None`` if none of its samples counts, and its call."""
        network = self._network
        batch = self._data.moved(batch, dataloader, self._model, self._ranks.device)
        counts = samples != 0
        provenance = network.open(batch, data=data) if counts else None
        network.count_only(samples if counts else None)
        step = self._step(batch, provenance)
        call = step.calls[0]
        if is_trial and (refusal := objection(self._model, call.args, call.kwargs)):
            raise TypeError(f"data: {refusal}; the batch is {describe(batch)}")
        if self._is_lazy:
            network.abandon()
            return None, None
        try:
            with self._data.context():
                self._replay.run(step.calls, network.recorder.skip_to)
        except Exception as error:
            if not is_trial:
                raise
            kind = type(self._model).__name__
            raise RuntimeError(
                f"data: {kind}.forward, called in eval mode on the input of a batch, raised {type(error).__name__}: "
                f"{error}; the batch is {describe(batch)}"
            ) from error
        seen = network.close()
        if is_trial and counts and seen is None:
            stage = data.split("/")[0]
            raise ValueError(
                f"data: the first batch of its {stage} loader has no labels: {network.labels.first_passed_over}"
            )
        return seen, step

    def _step(self, batch: Any, provenance: Provenance | None) -> RecordedStep:
        """Return the call of the network on a batch as a step of one call, with the samples of its inputs."""
        if provenance is None:
            return RecordedStep([self._call(batch)])
        # A function of the user's may compute the input from parts of the batch.
        provenance.start()
        try:
            call = self._call(batch)
            provenance.pause()
            numbers: dict[int, tuple[Tensor, Tensor]] = {}
            is_guessed = False
            for tensor in tensors_in((call.args, call.kwargs)):
                found, guessed = provenance.of(tensor)
                is_guessed |= guessed
                if found is not None:
                    numbers[id(tensor)] = tensor, found
        finally:
            provenance.stop()
        return RecordedStep([call], numbers=numbers, is_guessed=is_guessed)

    def _call(self, batch: Any) -> Call:
        args, kwargs = tree_map(_kept, self._caller.arguments(batch))
        return Call(self._model, args, kwargs)


def _kept(leaf: Any) -> Any:
    """Return an argument as a call keeps it, so that tensors in an object of the user's can be replaced."""
    if isinstance(leaf, Tensor) or is_plain(leaf):
        return leaf
    try:
        return Copied.of(leaf, lambda tensor: tensor)
    except Exception:  # An object may refuse to be copied by any exception.
        return leaf


def _has_forward(model: nn.Module) -> bool:
    """Return whether a module has a ``forward`` of its own, beside that of torch's and Lightning's base classes."""
    kind = next(kind for kind in type(model).__mro__ if "forward" in vars(kind))
    return "forward" in vars(model) or kind.__name__ not in ("Module", "LightningModule")


@contextmanager
def _hooked(network: LayerExtractor) -> Iterator[None]:
    """Let the layers have their hooks inside only."""
    network.recorder.hook()
    try:
        yield
    finally:
        network.recorder.unhook()
