"""All probes of a model as stacked tensors, one update for all of them, the gradient written out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lightning_probes.distributed import Ranks
from lightning_probes.probes.solver import Solution
from lightning_probes.probes.stacks import Run, Stack, adam_step
from lightning_probes.probes.standardise import standardise_
from lightning_probes.probes.tasks import BatchLabels, no_tally, tally

_CHUNKS = 4


class ProbeBank:
    """A softmax regression on the standardised features of each layer.

    The features are standardised by a running mean and variance without an affine part, so that a probe stays linear.
    A layer joins with its first features; its width is that of those. Layers of one width are stacked.

    Args:
        layers: the names of all layers; their order is that of every vector over layers.
        num_classes: K.
        learning_rate: of Adam (Kingma and Ba 2015, with its usual moments .9 and .999).
    """

    def __init__(self, layers: Sequence[str], num_classes: int, learning_rate: float = 3e-3) -> None:
        self.layers = list(layers)
        self.num_classes = num_classes
        self.learning_rate = learning_rate
        self._index = {layer: i for i, layer in enumerate(self.layers)}
        self._stacks: dict[int, Stack] = {}
        self._width: dict[str, int] = {}
        # Where the sums of layers in the order of the stacks belong; kept, since making one waits for the device.
        self._places: dict[tuple[str, ...], Tensor] = {}

    @classmethod
    def of(cls, layers: Sequence[str], num_classes: int, solutions: Mapping[str, Solution]) -> ProbeBank:
        """A bank to score with, of probes that were found elsewhere; it has no optimiser and cannot be updated."""
        state: dict[str, Any] = {}
        for layer, found in solutions.items():
            new = {
                "weight": found.weight,
                "bias": found.bias[:, None],
                "mean": found.mean[None],
                "variance": found.variance[None],
                "alive": found.variance.isfinite().all().view(1, 1),
            }
            stack = state.setdefault(str(len(found.mean)), {"layers": [], "updates": [], "tensors": {}})
            stack["layers"].append(layer)
            stack["updates"].append(0)
            for name, tensor in new.items():
                stack["tensors"].setdefault(name, []).append(tensor)
        for stack in state.values():
            stack["tensors"] = {name: torch.stack(parts) for name, parts in stack["tensors"].items()}
        bank = cls(layers, num_classes)
        bank.load_state_dict(state)
        return bank

    @property
    def widths(self) -> dict[str, int]:
        """``{layer: features}`` of the layers that have been seen."""
        return dict(self._width)

    @property
    def num_bytes(self) -> int:
        """Bytes of the probes, their statistics and their optimiser state."""
        return sum(t.numel() * t.element_size() for s in self._stacks.values() for t in s.tensors.values())

    @torch.no_grad()
    def update(self, features: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        """One Adam step on the mean cross-entropy of every layer in ``features``; the other probes stay untouched.

        With standardised features ``x``, probabilities ``p`` and targets ``y`` of ``n`` samples the gradient is
        ``(p - y)^T x / n``. A layer whose features are not finite is never updated again.

        Args:
            features: ``{layer: (samples, width)}``, samples a multiple of the targets' (several views); not to be used
                again.
            targets: ``(batch, num_classes)``, distributions; zero rows are left out.

        Returns:
            The ``(3, layers)`` sums of :func:`~lightning_probes.probes.tasks.tally` *before* the step.
        """
        parts: dict[tuple[str, ...], Tensor] = {}
        batch = BatchLabels(targets)
        self._admit(features)
        for run in self._runs(self._fitting(features)):
            labels = batch.of(len(run.features[0]), run["weight"].dtype)
            x = run.track(run.features_to_consume())
            log_p = run.log_probabilities(x)
            parts[run.names] = tally(log_p, labels)
            # A sample that is left out has no gradient.
            residual = log_p.exp_().mul_(labels.counted).sub_(labels.rows.T).div_(labels.total.clamp(min=1))
            gradients = [torch.bmm(residual, x), residual.sum(dim=2, keepdim=True)]
            # Without a gradient Adam would still coast on its momentum.
            for moment in ("weight_mean_gradient", "bias_mean_gradient"):
                run[moment].mul_(run["alive"])
            adam_step(run, [torch.where(run["alive"], g, 0.0) for g in gradients], self.learning_rate)
        return self._gather(parts, targets.device)

    def lend(self, samples: int) -> dict[str, Tensor]:
        """Memory ``{layer: (samples, width)}`` in which :meth:`update` finds the layers side by side and need not copy.

        Features that are put there are written over by the update.
        """
        memory: dict[str, Tensor] = {}
        for width, stack in self._stacks.items():
            whole = stack.tensors["weight"].new_empty(len(stack.layers), samples, width)
            stack.lent = whole, list(whole.unbind())
            memory |= zip(stack.layers, stack.lent[1], strict=True)
        return memory

    def release(self) -> None:
        """Let go of the memory that was lent."""
        for stack in self._stacks.values():
            stack.lent = None

    @torch.no_grad()
    def score(self, features: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        """The ``(3, layers)`` sums of :func:`~lightning_probes.probes.tasks.tally`; nothing is updated."""
        parts: dict[tuple[str, ...], Tensor] = {}
        batch = BatchLabels(targets)
        for run in self._runs(self._fitting(features)):
            x = torch.stack(run.features).to(run["weight"].dtype)
            x = standardise_(x, run["mean"], run["variance"])
            parts[run.names] = tally(run.log_probabilities(x), batch.of(x.shape[1], x.dtype))
        return self._gather(parts, targets.device)

    @torch.no_grad()
    def merge(self, ranks: Ranks) -> None:
        """Make the probes of all processes the same: means over the samples that each was trained on.

        A layer that a process has not seen counts there for nothing. Means and variances become those of all samples;
        a layer that was not finite in one process is not finite.
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
            stack = self._stacks.setdefault(
                width, Stack(self.num_classes, width, torch.empty(0, dtype=dtype, device=ranks.device))
            )
            stack.arrange([layer for layer in self.layers if widths.get(layer) == width])
            stack.merge(ranks.total)
            stack.updates = [updates[layer] for layer in stack.layers]

    def finite(self) -> dict[str, bool]:
        """Whether all features that a layer was updated on were finite (host sync)."""
        return {
            layer: ok
            for stack in self._stacks.values()
            for layer, ok in zip(stack.layers, stack.tensors["alive"].flatten().tolist(), strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        """Probes, statistics and optimiser state: tensors and plain types only."""
        return {
            str(width): {"layers": list(s.layers), "updates": list(s.updates), "tensors": dict(s.tensors)}
            for width, s in self._stacks.items()
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]], device: torch.device | str | None = None) -> None:
        """Take over what :meth:`state_dict` gave, on ``device`` or where it is."""
        self._stacks, self._width = {}, {}
        for width, saved in state.items():
            tensors: dict[str, Tensor] = {name: t.to(device, copy=True) for name, t in saved["tensors"].items()}
            stack = self._stacks[int(width)] = Stack(self.num_classes, int(width), tensors["weight"])
            stack.layers, stack.updates, stack.tensors = list(saved["layers"]), list(saved["updates"]), tensors
            self._width.update(dict.fromkeys(stack.layers, int(width)))

    def _admit(self, features: Mapping[str, Tensor]) -> None:
        new: dict[int, list[str]] = {}
        for layer, x in features.items():
            if layer not in self._width:
                self._width[layer] = x.shape[1]
                new.setdefault(x.shape[1], []).append(layer)
        for width, layers in new.items():
            if width not in self._stacks:
                self._stacks[width] = Stack(self.num_classes, width, features[layers[0]])
            self._stacks[width].add(layers)

    def _fitting(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {layer: x for layer, x in features.items() if self._width.get(layer) == x.shape[1]}

    def _runs(self, features: Mapping[str, Tensor]) -> Iterator[Run]:
        """The layers in ``features`` as slices of their stacks.

        On the host a quarter of the layers at a time, so that copies stay small beside the features themselves and in
        the cache; elsewhere all at once, since there each further kernel costs more than memory does.
        """
        present = len(features)
        for stack in self._stacks.values():
            longest = math.ceil(present / _CHUNKS) if stack.tensors["weight"].device.type == "cpu" else present
            start = 0
            while start < len(stack.layers):
                stop = start
                while (
                    stop < len(stack.layers)
                    and stop - start < longest
                    and (x := features.get(stack.layers[stop])) is not None
                    and len(x) == len(features[stack.layers[start]])
                    and stack.updates[stop] == stack.updates[start]
                ):
                    stop += 1
                if stop > start:
                    yield Run(stack, slice(start, stop), [features[layer] for layer in stack.layers[start:stop]])
                start = max(stop, start + 1)

    def _gather(self, parts: Mapping[tuple[str, ...], Tensor], device: torch.device) -> Tensor:
        """``(3, layers)`` out of the sums of the runs, zero for the layers in none."""
        order = tuple(layer for run in parts for layer in run)
        if order not in self._places:
            self._places[order] = torch.tensor([self._index[layer] for layer in order], dtype=torch.long, device=device)
        found = torch.cat([*parts.values()], dim=1) if parts else no_tally(device)
        return found.new_zeros(3, len(self.layers)).index_copy_(1, self._places[order], found)
