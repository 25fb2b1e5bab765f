"""Train the probes of all layers along with the network, in one update, with the gradient in closed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor
from torch.optim.adam import adam

from lightning_probes.distributed import Ranks
from lightning_probes.probes.dataset import LayerBatch
from lightning_probes.probes.heads import BatchLabels, Run, Stack, StackedProbes, side_by_side
from lightning_probes.probes.standardise import moved_statistics, standardise_, without_rounding
from lightning_probes.tasks.task import Question

_LEAST_WEIGHT = 0.01
"""Weigh a batch by this in the running mean and variance, after the first hundred, which are averaged evenly."""


class OnlineProbes(StackedProbes):
    """Train a linear classifier for each layer on its standardised features, by one step on each batch.

    Features are standardised by a running mean and variance without an affine part, so that a probe stays linear. A
    layer joins with its first features, whose width is that of its probe.

    Args:
        layers: names of all layers, in the order of every vector over layers.
        question: what the probes are asked.
        learning_rate: step size of Adam (Kingma and Ba 2015), whose moments are the usual .9 and .999.
    """

    def __init__(self, layers: Sequence[str], question: Question, learning_rate: float = 3e-3) -> None:
        super().__init__(layers, question)
        self.learning_rate = learning_rate

    @torch.no_grad()
    def update(self, batch: LayerBatch) -> Tensor:
        """Make one step of Adam on the mean loss of every layer in ``batch``; leave the other probes untouched.

        With standardised features ``x`` of ``n`` samples and the derivative ``r`` of their mean loss by the scores the
        gradient is ``r x``. A layer whose features are not finite is never updated again.

        Args:
            batch: features and targets; the features may be written over.

        Returns:
            The tally ``(statistics, layers)`` *before* the step.
        """
        tallies: dict[str, Tensor] = {}
        labels = BatchLabels(self.question, batch)
        self._admit(batch.features)
        for run in self._runs(self._of_known_width(batch.features)):
            x = _track(run, _features_to_consume(run))
            own = labels.of(len(run.features[0]), run["weight"].dtype)
            tally, residual = self.question.tally_and_residual(run.scores(x), own)
            tallies |= run.by_layer(tally)
            gradients = [torch.bmm(residual, x), residual.sum(dim=2, keepdim=True)]
            # Adam moves by its momentum even at zero gradient, so the first moments of layers set aside are zeroed.
            for moment in ("weight_mean_gradient", "bias_mean_gradient"):
                run[moment].mul_(run["alive"])
            _adam_step(run, [torch.where(run["alive"], g, 0.0) for g in gradients], self.learning_rate)
        return side_by_side(self.question, self.layers, tallies, batch.targets.device)

    def lend(self, samples: int) -> dict[str, Tensor]:
        """Return memory ``{layer: (samples, width)}`` in which :meth:`update` finds features side by side.

        Features that lie there need not be copied, and are written over by the update.
        """
        memory: dict[str, Tensor] = {}
        for width, stack in self._stacks.items():
            whole = stack.tensors["weight"].new_empty(len(stack.layers), samples, width)
            stack.lent = whole, list(whole.unbind())
            memory |= zip(stack.layers, stack.lent[1], strict=True)
        return memory

    def release(self) -> None:
        """Release the memory that was lent."""
        for stack in self._stacks.values():
            stack.lent = None

    @torch.no_grad()
    def merge(self, ranks: Ranks) -> None:
        """Replace the probes of all processes by their mean, weighted by the updates of each process.

        A process that has not seen a layer has no weight in that layer's mean. Running means and variances become those
        of the samples of all processes; a layer that was not finite in one process is not finite in any.
        """
        known = ranks.gather(
            [(width, stack.dtype, stack.layers, stack.updates) for width, stack in self._stacks.items()]
        )
        updates: dict[str, int] = {}
        kinds: dict[int, torch.dtype] = {}
        widths: dict[str, int] = {}
        for width, dtype, layers, done in chain(*known):
            kinds.setdefault(width, dtype)
            for layer, n in zip(layers, done, strict=True):
                widths.setdefault(layer, width)
                updates[layer] = max(updates.get(layer, 0), n)
        self._width = widths
        for width, dtype in sorted(kinds.items()):
            same = [layer for layer in self.layers if widths.get(layer) == width]
            stack = self._stacks.get(width) or self._new_stack(width, torch.empty(0, dtype=dtype, device=ranks.device))
            stack.add([layer for layer in same if layer not in stack.layers])
            stack = self._stacks[width] = stack.take(same)
            stack.merge(ranks.total)
            stack.updates = [updates[layer] for layer in stack.layers]

    def _admit(self, features: Mapping[str, Tensor]) -> None:
        new: dict[int, list[str]] = {}
        for layer, x in features.items():
            if layer not in self._width:
                self._width[layer] = x.shape[1]
                new.setdefault(x.shape[1], []).append(layer)
        for width, layers in new.items():
            if width not in self._stacks:
                self._stacks[width] = self._new_stack(width, features[layers[0]])
            self._stacks[width].add(layers)

    def _new_stack(self, width: int, like: Tensor) -> Stack:
        weight = like.new_zeros(0, self.question.outputs, width)
        bias = like.new_zeros(0, self.question.outputs, 1)
        tensors = {"weight": weight, "bias": bias}
        tensors["mean"] = tensors["variance"] = like.new_zeros(0, 1, width)
        tensors["alive"] = torch.ones(0, 1, 1, dtype=torch.bool, device=like.device)
        for moment in ("mean_gradient", "mean_square"):
            tensors |= {f"weight_{moment}": weight, f"bias_{moment}": bias}
        return Stack([], [], tensors)


def _features_to_consume(run: Run) -> Tensor:
    """Return features ``(layers, samples, width)`` to write over; copy them unless they lie in lent memory."""
    if run.stack.lent is not None:
        whole, places = run.stack.lent
        if all(x is place for x, place in zip(run.features, places[run.rows], strict=True)):
            return whole[run.rows]
    return torch.stack(run.features).to(run["weight"].dtype)


def _track(run: Run, x: Tensor) -> Tensor:
    """Update the running statistics by a batch ``(layers, samples, width)``, and standardise the batch in place."""
    weight = max(1 / (run.stack.updates[run.rows.start] + 1), _LEAST_WEIGHT)
    mean, variance = moved_statistics(x, run["mean"], run["variance"], weight)
    alive = run["alive"].logical_and_(torch.isfinite(variance).all(dim=2, keepdim=True))
    run["mean"].copy_(torch.where(alive, mean, run["mean"]))
    run["variance"].copy_(torch.where(alive, without_rounding(mean, variance), run["variance"]))
    return standardise_(x, run["mean"], run["variance"])


def _adam_step(run: Run, gradients: list[Tensor], learning_rate: float) -> None:
    """Make one fused step of Adam (Kingma and Ba 2015) with the gradients of weight and bias."""
    done = run.stack.updates[run.rows.start]
    # The count of steps is filled in on the device: a tensor made from a number on the host would wait for the copy.
    steps = [torch.full((), float(done), device=g.device) for g in gradients]
    adam(
        [run["weight"], run["bias"]],
        gradients,
        [run["weight_mean_gradient"], run["bias_mean_gradient"]],
        [run["weight_mean_square"], run["bias_mean_square"]],
        [],
        steps,
        fused=True,
        amsgrad=False,
        beta1=0.9,
        beta2=0.999,
        lr=learning_rate,
        weight_decay=0.0,
        eps=1e-8,
        maximize=False,
    )
    run.stack.updates[run.rows] = [done + 1] * len(run.features)
