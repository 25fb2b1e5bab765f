"""Score the probes of all layers by metrics of torchmetrics, each layer and loader by copies of its own."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_probes.distributed import Ranks
from lightning_probes.network.torch_internals import mark_as_fed, states_of
from lightning_probes.options import first_of
from lightning_probes.probes.heads import Hand
from lightning_probes.replay.frozen import seeded
from lightning_probes.tasks.task import Labels, Question, Task

Key = tuple[Any, Any]
"""Identify what is scored by the kind of the probes and the curve."""

_TRIED = 100
"""Bound the outputs of which a made-up sample is tried, since each sample has a value for all outputs."""

_Name = tuple[str, str]
"""Identify a metric by the name of the target and its own."""

_Scored = dict[_Name, Metric | str]
"""Map metrics to what was fed, or to what a metric raised."""

_States = list[dict[str, Any]]
"""Hold the states of a metric, and of the metrics inside it, on the host."""


class LayerMetrics:
    """Feed copies of metrics with what the probes predict, and compute them at a publication.

    Of several targets each has the metrics that score it. The metrics that the user gave are never changed, and copies
    live until the next publication. A metric that raises has NaN for that layer at that point, and :meth:`pop_notes`
    says why.

    Args:
        asked: ``{name: metric}``; a metric given by name is a class, which is made with what the task says.
    """

    def __init__(self, asked: Mapping[str, Metric | type[Metric]]) -> None:
        self._asked = dict(asked)
        self._made: dict[_Name, Metric] | None = None
        self._numbers: dict[_Name, list[str]] = {}
        self._fed: dict[Key, dict[str, _Scored]] = {}
        self._notes: list[str] = []

    @property
    def is_asked(self) -> bool:
        """Return whether any metric was asked for."""
        return bool(self._asked)

    @property
    def nothing(self) -> dict[str, dict[str, float]]:
        """Return ``{target: {metric: NaN}}`` of all rows of a layer, in their order; empty if no metric was made."""
        found: dict[str, dict[str, float]] = {}
        for (target, _), names in self._numbers.items():
            found.setdefault(target, {}).update(dict.fromkeys(names, math.nan))
        return found

    def try_out(self, question: Question) -> None:
        """Make the metrics, and feed a copy of each with made-up predictions; do it once the outputs are known.

        Raises:
            ValueError: a metric cannot be made, raises when it is fed, or computes something other than numbers; of
                several targets for all of them.
        """
        if not self._asked or self._made is not None or not question.outputs:
            return
        made: dict[_Name, Metric] = {}
        faults: dict[_Name, str] = {}
        with seeded(), torch.no_grad(), torch.inference_mode(False):
            for target, task in question.parts.items():
                targets = torch.eye(min(task.outputs, _TRIED), task.outputs).repeat(2, 1)
                given = task.for_metrics(2 * targets.T, task.prepare(targets, targets.dtype))
                for name, metric in self._asked.items():
                    try:
                        own = _made(metric, task).set_dtype(given[0].dtype)
                        self._numbers[target, name] = list(_try_out(name, own, given))
                        made[target, name] = own
                    except Exception as error:  # A metric may raise anything.
                        fed = " and ".join(f"{'x'.join(map(str, part.shape))} {part.dtype}" for part in given)
                        faults[target, name] = (
                            f"metrics: {name!r} does not score {f'those of {target!r}' if target else 'these probes'}, "
                            f"of {task.outputs} outputs; tried with predictions and targets of {fed}, it raised "
                            f"{_said(error)}"
                        )
        for name in self._asked:
            if not any(name == known for _, known in made):
                raise ValueError(next(fault for (_, known), fault in faults.items() if known == name))
        self._notes += faults.values()
        self._made = made

    def hand(self, key: Key, question: Question) -> Hand | None:
        """Return what feeds the metrics with the scores of probes; ``None`` if no metric was asked for.

        What a metric raises is not raised there.
        """
        if not self._asked:
            return None
        self.make(question)
        return partial(self._feed_all, key, question)

    def make(self, question: Question) -> None:
        """Make the metrics as :meth:`try_out` does, and note what it raises: a run may be under way."""
        try:
            self.try_out(question)
        except ValueError as error:
            self._made = {}
            # Their rows are there all the same.
            self._numbers = {(target, name): [name] for target in question.parts for name in self._asked}
            self._notes.append(f"{error}; the values of all metrics are NaN")

    def _feed_all(self, key: Key, question: Question, layers: Sequence[str], scores: Tensor, labels: Labels) -> None:
        with seeded():
            for layer, own in zip(layers, scores, strict=True):
                self._feed(key, question, layer, own, labels)

    def _feed(self, key: Key, question: Question, layer: str, scores: Tensor, labels: Labels) -> None:
        scored = self._fed.setdefault(key, {}).setdefault(layer, {})
        for target, (task, own, known) in question.answers(scores, labels).items():
            predictions, targets = task.for_metrics(own, known)
            if len(targets) < int(known.total):
                gaps = f"metrics{f' of {target!r}' if target else ''} are of samples without a missing entry"
                self._notes += [gaps] * (gaps not in self._notes)
            for name in self._asked if len(targets) else ():
                template, metric = (self._made or {}).get((target, name)), scored.get((target, name))
                if template is None or isinstance(metric, str):
                    continue
                try:
                    if metric is None:
                        metric = template.clone().to(predictions.device)
                    metric.update(predictions, targets)
                    scored[target, name] = metric
                except Exception as error:  # A metric may raise anything, and must not end a run.
                    scored[target, name] = _said(error)

    def compute(self, key: Key, layers: Iterable[str], ranks: Ranks) -> dict[str, dict[str, dict[str, float]]]:
        """Return ``{layer: {target: {metric: value}}}`` over the samples of all processes, of layers that were fed.

        Every process calls this with the same layers. The states are exchanged here and not by torchmetrics, which
        would wait for ever for a process whose copy was not fed, or send through the group of the network.
        """
        fed = self._fed.get(key, {})
        found: dict[str, dict[str, dict[str, float]]] = {}
        faults: dict[str, list[str]] = {}
        with seeded(), torch.no_grad():
            for layer in layers if self._asked else ():
                scored = fed.get(layer, {})
                if ranks.number > 1:
                    scored = self._joined(scored, ranks)
                if scored:
                    found[layer] = self.nothing
                for (target, name), metric in scored.items():
                    try:
                        values = metric if isinstance(metric, str) else _numbers(name, metric.compute())
                    except Exception as error:
                        values = _said(error)
                    if isinstance(values, str):
                        of = f" of target {target!r}" if target else ""
                        faults.setdefault(f"metric {name!r}{of} raised {values}", []).append(layer)
                    else:
                        found[layer][target] |= values
        self._notes += [f"{fault}; its value is NaN for {first_of(same)}" for fault, same in faults.items()]
        return found

    def _joined(self, scored: _Scored, ranks: Ranks) -> _Scored:
        """Return the metrics of a layer with the states of all processes."""
        own = {name: metric if isinstance(metric, str) else _states(metric) for name, metric in scored.items()}
        every = ranks.gather(own)
        joined: _Scored = {}
        for name, template in (self._made or {}).items():
            parts = [one[name] for one in every if name in one]
            if reason := next((part for part in parts if isinstance(part, str)), ""):
                joined[name] = reason
            elif parts:
                try:
                    joined[name] = _with_states(template.clone(), [part for part in parts if not isinstance(part, str)])
                    joined[name].to(ranks.device)  # type: ignore[union-attr]
                except Exception as error:
                    joined[name] = _said(error)
        return joined

    def pop_notes(self) -> list[str]:
        """Return and forget what was raised since the last call."""
        notes, self._notes = self._notes, []
        return notes

    def clear(self, *kinds: Any) -> None:
        """Discard what was fed with the predictions of some kinds of probes, or of all."""
        self._fed = {key: fed for key, fed in self._fed.items() if kinds and key[0] not in kinds}


def _made(metric: Metric | type[Metric], task: Task) -> Metric:
    """Return a copy of a metric, that has seen nothing, or make one with what it takes of the task's arguments."""
    if isinstance(metric, Metric):
        made = metric.clone().cpu()
        made.reset()
    else:
        takes = inspect.signature(metric).parameters
        made = metric(**{name: value for name, value in task.metric_arguments.items() if name in takes})
    for part in _metrics_in(made):
        part.distributed_available_fn = _alone
    return made


def _try_out(name: str, metric: Metric, given: tuple[Tensor, Tensor]) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of what was made up.
        trial = metric.clone()
        trial.update(*given)
        return _numbers(name, trial.compute())


def _numbers(name: str, value: Any) -> dict[str, float]:
    """Return what a metric has computed as ``{name: number}``, with a suffix for each entry of a vector or mapping.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(value, Mapping):
        return {k: v for key, part in value.items() for k, v in _numbers(f"{name}_{key}", part).items()}
    if isinstance(value, (int, float)):
        return {name: float(value)}
    if not isinstance(value, Tensor) or value.dim() > 1 or value.is_complex():
        kind = f"{'x'.join(map(str, value.shape))} numbers" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"it computes {kind}; expected a number, a vector or a dict of these")
    if value.dim():
        return {f"{name}_{i}": float(number) for i, number in enumerate(value.tolist())}
    return {name: float(value)}


def _metrics_in(metric: Metric) -> list[Metric]:
    """Return a metric and those inside it, which hold its states if it is a wrapper, in an order that never changes."""
    return [part for part in metric.modules() if isinstance(part, Metric)]


def _states(metric: Metric) -> _States:
    def on_host(state: Any) -> Any:
        return state.cpu() if isinstance(state, Tensor) else [tensor.cpu() for tensor in state]

    return [{name: on_host(getattr(part, name)) for name in states_of(part)} for part in _metrics_in(metric)]


def _with_states(metric: Metric, every: Sequence[_States]) -> Metric:
    """Give a metric the states of all processes that have fed theirs, reduced as torchmetrics reduces them."""
    for i, part in enumerate(_metrics_in(metric)):
        mark_as_fed(part)
        for name, reduce in states_of(part).items():
            states = [own[i][name] for own in every]
            joined = states[0]
            if len(states) > 1:
                # What is to be concatenated may be one tensor by now.
                is_list = any(isinstance(state, list) for state in states)
                lists = [state if isinstance(state, list) else [state] for state in states]
                joined = list(chain(*lists)) if is_list else torch.stack(states)
                if callable(reduce) and len(joined):
                    joined = reduce(joined)
            setattr(part, name, joined)
    return metric


def _alone() -> bool:
    return False


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
