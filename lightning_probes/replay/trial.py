"""Run the calls of a step again with the content of single samples replaced, to see which rows change.

Six passes of one batch, at most eleven: two as it was, four with a sample replaced by the one that differs most from
it, and, for layers that stay still, such as dead ones, five more with other weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_probes.distributed import Ranks
from lightning_probes.network.batches import tensors_in
from lightning_probes.network.extractor import LayerExtractor
from lightning_probes.network.pairing import Observation, Outcome, decide
from lightning_probes.network.provenance import MIXED
from lightning_probes.network.torch_internals import is_shared_out, tree_map
from lightning_probes.probes.dataset import LayerBatch
from lightning_probes.replay.calls import Call, CannotRunAgainError, RecordedStep
from lightning_probes.replay.frozen import frozen
from lightning_probes.replay.recorded_batches import Context, device_of
from lightning_probes.replay.replayer import Replay, copy_of_weights

_REPLACED = 4
"""Set how many samples are replaced, one at a time."""

_DONORS = 8
"""Bound the samples among which the one is sought that differs most."""

GUESSED = (
    "rows: some input of the network was not found in the batch, and is assumed to have one row a sample, since its "
    "first dimension is that of the batch"
)
"""Note that the samples of an input were guessed from its shape."""

Key = tuple[str, int]
"""Identify a call of a layer by the layer's name and the number of the call in the step."""

Activations = dict[Key, Tensor | PackedSequence]


class Trial:
    """Experiment with one recorded step.

    Args:
        network: the layers, whose recorder hears them.
        model: the network as it is now.
        device: device on which the model runs.
        context: makes the context that the network runs in.
        step: what was recorded.
        samples: number of samples of the batch.
        index: sample of each row, if the batch has such a vector.
        count: number of samples to replace, at most.
        seed: seed of the choice of samples, which differs between processes.

    Attributes:
        activations: what the layers put out with the step's own content, of each call.
    """

    def __init__(
        self,
        network: LayerExtractor,
        model: nn.Module,
        device: torch.device,
        context: Context,
        step: RecordedStep,
        samples: int,
        index: Tensor | None,
        *,
        count: int = _REPLACED,
        seed: int = 0,
    ) -> None:
        self.activations: Activations = {}
        self._network = network
        self._recorder = network.recorder
        self._model = model
        self._device = device
        self._context = context
        self._step = step
        self._samples = samples
        self._index = index
        used = {id(leaf) for leaf in tensors_in([(call.args, call.kwargs) for call in step.calls])}
        self._numbers = {key: numbers for key, numbers in step.numbers.items() if key in used}
        self._pairs = self._chosen(min(count, _REPLACED), torch.Generator().manual_seed(seed))

    @property
    def is_shuffled(self) -> bool:
        """Return whether the step mixed samples, or changed their order, before the network saw them."""
        return any(self._is_shuffled(numbers) for _, numbers in self._numbers.values())

    def run(self, may_go_on: Callable[[bool], bool] = bool) -> dict[str, dict[int, Outcome]]:
        """Run the experiment.

        Args:
            may_go_on: takes whether layers stay still, and returns whether to run with other weights.

        Returns:
            ``{layer: {number of the call: what was found}}`` in the order of the first calls.

        Raises:
            Exception: whatever a module raises.
        """
        numbers = [numbers for _, numbers in self._numbers.values()]
        is_complete = all(bool(((part >= 0) & (part < self._samples)).all()) for part in numbers)
        inputs = {id(leaf) for leaf in tensors_in([(call.args, call.kwargs) for call in self._step.calls])}
        is_complete &= inputs <= self._numbers.keys()
        self.activations, seen = self._observe(None)
        outcomes = self._decided(seen, is_complete)
        still = {key for key, found in outcomes.items() if found.is_still}
        # Weights that are shared out among processes cannot be replaced by others.
        if may_go_on(bool(still)) and not is_shared_out(self._model):
            with suppress(Exception):  # What other weights do to a network must not undo what is known.
                _, with_others = self._observe(other_weights(self._model, self._device))
                again = self._decided({key: with_others[key] for key in still & with_others.keys()}, is_complete)
                outcomes |= {key: found for key, found in again.items() if found.arrangement is not None}
        found: dict[str, dict[int, Outcome]] = {}
        for (layer, number), outcome in outcomes.items():
            found.setdefault(layer, {})[number] = outcome
        return found

    def _decided(self, seen: Mapping[Key, Observation], is_complete: bool) -> dict[Key, Outcome]:
        return {key: decide(one, self._samples, self._index, is_complete=is_complete) for key, one in seen.items()}

    def _observe(self, weights: Mapping[str, Tensor] | None) -> tuple[Activations, dict[Key, Observation]]:
        """Run the step as it was, twice, and with each sample replaced; observe every call of every layer."""
        before: Activations = {}

        def keep(layer: str, number: int, output: Any) -> None:
            if (activation := self._recorder.activation_of(layer, output)) is not None:
                before[layer, number] = _copied(activation)

        # What probes were made for stays as it is.
        is_watched = self._network.axes.is_watched or self._network.is_ordered
        with nullcontext() if is_watched else self._network.axes.watch(self._model):
            self._run(self._step.calls, weights, keep)
        seen = {key: Observation.of(activation) for key, activation in before.items()}
        for sample, donor in [(None, None), *self._pairs]:
            self._compare(before, seen, sample, donor, weights)
        return before, seen

    def _compare(
        self,
        before: Activations,
        seen: Mapping[Key, Observation],
        sample: int | None,
        donor: int | None,
        weights: Mapping[str, Tensor] | None,
    ) -> None:
        """Run the step with the content of ``sample`` replaced by that of ``donor``, or as it was, and compare."""
        heard: set[Key] = set()

        def compare(layer: str, number: int, output: Any) -> None:
            key = layer, number
            if key in seen and (activation := self._recorder.activation_of(layer, output)) is not None:
                heard.add(key)
                seen[key].compare(before[key], activation, sample)

        calls = self._step.calls if sample is None or donor is None else list(self._swapped(sample, donor))
        self._run(calls, weights, compare)
        if sample is not None:
            for key in seen.keys() - heard:
                seen[key].changes[sample] = None

    def _run(
        self, calls: list[Call], weights: Mapping[str, Tensor] | None, sink: Callable[[str, int, Any], None]
    ) -> None:
        # Each run begins with the same random states, which are restored when it is over.
        with frozen(self._model, self._recorder), self._heard_by(sink), self._context():
            replay = Replay(self._model, device=self._device, weights=weights)
            replay.run(calls, self._recorder.skip_to)

    @contextmanager
    def _heard_by(self, sink: Callable[[str, int, Any], None]) -> Iterator[None]:
        recorder = self._recorder
        before = recorder.recording
        recorder.start(self._samples)
        recorder.sink = sink
        try:
            yield
        finally:
            recorder.sink = None
            recorder.stop()
            recorder.recording = before

    def _swapped(self, sample: int, donor: int) -> Iterator[Call]:
        """Yield the calls with the content of ``sample`` replaced by that of ``donor``."""
        changed: dict[int, Tensor] = {}

        def change(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or id(leaf) not in self._numbers:
                return leaf
            if id(leaf) not in changed:
                _, numbers = self._numbers[id(leaf)]
                own, other = numbers.eq(sample), numbers.eq(donor)
                new = leaf.clone()
                if own.any() and other.any():
                    content, size = leaf[other], int(own.sum())
                    new[own] = content.repeat(-(-size // len(content)))[:size]
                changed[id(leaf)] = new
            return changed[id(leaf)]

        for call in self._step.calls:
            yield replace(call, args=tree_map(change, call.args), kwargs=tree_map(change, call.kwargs))

    def _chosen(self, count: int, generator: torch.Generator) -> list[tuple[int, int]]:
        """Choose the samples to replace, and for each the one of a few others that differs most from it."""
        order = torch.randperm(self._samples, generator=generator).tolist()
        chosen: list[tuple[int, int]] = []
        for sample in order[:count]:
            others = torch.randperm(self._samples, generator=generator).tolist()[:_DONORS]
            scores = {other: self._difference(sample, other) for other in others if other != sample}
            if scores:
                chosen.append((sample, max(scores, key=lambda other: scores[other])))
        return chosen

    def _difference(self, sample: int, other: int) -> float:
        found = 0.0
        for tensor, numbers in self._numbers.values():
            own, others = tensor[numbers == sample], tensor[numbers == other]
            if len(own) and len(own) == len(others):
                found += float((own != others).float().mean())
            elif len(own) and len(others):
                found += 1.0
        return found

    def _is_shuffled(self, numbers: Tensor) -> bool:
        if bool((numbers == MIXED).any()):
            return True
        if numbers.dim() == 0 or len(numbers) != self._samples:
            return False
        rows = numbers.reshape(len(numbers), -1)
        is_one_sample_a_row = bool((rows == rows[:, :1]).all())
        own = torch.arange(self._samples, device=numbers.device)
        is_known = bool(((rows[:, 0] >= 0) & (rows[:, 0] < self._samples)).all())
        return is_one_sample_a_row and is_known and not torch.equal(rows[:, 0].long(), own)


def _copied(activation: Tensor | PackedSequence) -> Tensor | PackedSequence:
    if isinstance(activation, PackedSequence):
        return PackedSequence(activation.data.clone(), *activation[1:])
    return activation.detach().clone()


def other_weights(model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Draw weights with which a layer that is dead, or zero at the start, shows what it depends on.

    Matrices are drawn anew, by the number of their inputs; vectors are moved, so that scales and shifts stay near where
    they are. Buffers keep their values. Nothing is drawn from a global generator.
    """
    generator = torch.Generator().manual_seed(0)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    drawn: dict[int, Tensor] = {}
    found: dict[str, Tensor] = {}
    for name, weight in copy_of_weights(model).items():
        if name in parameters and weight.is_floating_point():
            if id(weight) not in drawn and weight.numel():
                is_matrix = weight.dim() > 1
                scale = 1.4 / max(weight[0].numel(), 1) ** 0.5 if is_matrix else 0.14
                noise = scale * torch.randn(weight.shape, generator=generator)
                keeps = not is_matrix and bool((weight.abs() < 3).all())
                drawn[id(weight)] = (noise.to(weight.dtype) + (weight if keeps else 0)).to(device)
            found[name] = drawn.get(id(weight), weight)
        else:
            found[name] = weight
    return found


def pair_first(
    network: LayerExtractor,
    step: RecordedStep | CannotRunAgainError | None,
    seen: LayerBatch | None,
    model: nn.Module,
    context: Context,
    ranks: Ranks,
    *,
    is_first: bool,
) -> LayerBatch | None:
    """Find out which row is of which sample if that is not known, several processes together with their first batch.

    Args:
        network: the layers, which learn what is found.
        step: what was recorded of the batch's step, or why it cannot be run again.
        seen: features of the batch; ``None`` if it has no labels.
        model: the network.
        context: makes the context that the network runs in.
        ranks: the processes.
        is_first: whether the batch is the first one of the data, in all processes.

    Returns:
        The features of the samples, ``None`` if the batch has no labels.
    """
    pairing = network.pairing
    is_due = seen is not None and not pairing.is_known
    if is_first and ranks.number > 1:
        # A module may wait for the other processes, so all of them run it or none.
        if all(ranks.gather(is_due)):
            assert seen is not None
            seen = pair(network, step, seen, model, context, ranks)
        elif not pairing.is_known:
            pairing.give_up("some process had no labels in its first batch")
        pairing.is_known = True
    elif is_due and seen is not None:
        seen = pair(network, step, seen, model, context, is_only=ranks.number == 1)
    return seen


def pair(
    network: LayerExtractor,
    step: RecordedStep | CannotRunAgainError | None,
    seen: LayerBatch,
    model: nn.Module,
    context: Context,
    ranks: Ranks | None = None,
    *,
    is_only: bool = True,
) -> LayerBatch:
    """Find out which rows are of which sample with the batch that ``network`` has just closed.

    Args:
        network: the layers, which learn what is found.
        step: what was recorded of the batch's step, or why it cannot be run again.
        seen: features of the step, with rows as shapes tell.
        model: the network.
        context: makes the context that the network runs in.
        ranks: processes that all do this at the same moment, and agree; ``None`` for one that does it by itself.
        is_only: whether there is no other process.

    Returns:
        The features of the batch, of the frozen network where they could be run again.
    """
    is_together, ranks = ranks is not None, ranks or Ranks()
    reason = "" if isinstance(step, RecordedStep) else f"the step cannot be run again ({step or 'it was not recorded'})"
    if reason := ranks.first(reason):
        network.pairing.give_up(reason)
        return seen
    samples = seen.samples
    if (fewest := min(ranks.gather(samples))) < 2:
        network.pairing.try_again("a batch of one sample cannot tell")
        return seen
    assert isinstance(step, RecordedStep)
    is_asked = False

    def goes_on(still: bool) -> bool:
        """Go on with other weights in all processes or in none; one by itself never, since modules may wait."""
        nonlocal is_asked
        is_asked = True
        return any(ranks.gather(still)) if is_together or is_only else False

    try:
        device = device_of(model)
        trial = Trial(network, model, device, context, step, samples, network.index, count=fewest, seed=ranks.rank)
        outcomes = trial.run(goes_on)
        is_shuffled = trial.is_shuffled
    except Exception as error:  # Whatever a module raises must not end a training run.
        reason = f"running the step again raised {type(error).__name__}: {error}"
        if not is_asked:
            goes_on(False)
    if reason := ranks.first(reason):
        network.pairing.give_up(reason)
        return seen
    if not is_shuffled and not any(found.arrangement for calls in outcomes.values() for found in calls.values()):
        telling = {found.reason for calls in outcomes.values() for found in calls.values()}
        network.pairing.try_again("; ".join(sorted(telling)) or "no layer was run again")
    else:
        network.pair(outcomes, is_shuffled=is_shuffled, not_run=step.reason)
        network.pairing.notes += [GUESSED] * step.is_guessed
    network.pairing.agree(ranks.gather)
    return network.read(trial.activations, seen)
