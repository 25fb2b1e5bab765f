"""Hand out the probe of one layer as a ``torch.nn.Linear`` on the layer's features as they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_probes.precision import accumulator
from lightning_probes.probes.heads import StackedProbes
from lightning_probes.probes.standardise import inverse_deviation
from lightning_probes.tasks.task import Task

_ROUNDING = 1e-3
"""Keep a probe in float64 where the rounding of float32 could change its scores by more than this."""


class FeatureReduction(Protocol):
    """Make features of what a layer puts out, as the layer's probe was given them."""

    def __call__(self, activation: Any, mask: Tensor | None = None, index: Tensor | None = None) -> Tensor:
        """Return features ``(batch, features)`` of an activation ``(batch, ...)``; a mask leaves tokens out."""


class LayerProbe(nn.Linear):
    """Score the features of one layer, ``(rows, features)``, and return ``(rows, outputs)``: logits, or numbers.

    They are logits of a softmax over the classes, logits of each of several labels, or predictions in the targets' own
    units.

    Standardisation is part of the weights; a feature that was constant where the probe was fitted has weight 0. The
    weights are copies, in eval mode and without a gradient, on the device on which the probe was fitted. They are in
    float32, but in float64 where features vary so little beside their mean that float32 could not tell, or were in
    float64 themselves; features of another precision are converted. ``state_dict`` is that of a ``torch.nn.Linear``.

    Args:
        weight: ``(outputs, features)``.
        bias: ``(outputs,)``.
        layer: name of the layer.
        reduction: makes features of what the layer puts out.
        fitted_on: as in the rows of a report.

    Attributes:
        layer: as given.
        reduction: as given: ``probe(probe.reduction(activation))`` scores an activation ``(batch, ...)`` of the layer,
            ``probe.reduction(activation, mask)`` one of which a mask ``(batch, tokens)`` leaves tokens out.
        fitted_on: ``{"data", "samples"}``, what and how many samples the probe was fitted on.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, layer: str, reduction: FeatureReduction, fitted_on: Mapping[str, Any]
    ) -> None:
        # On this device nothing is drawn from a random generator.
        super().__init__(weight.shape[1], weight.shape[0], device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.layer = layer
        self.reduction = reduction
        self.fitted_on = dict(fitted_on)
        self.eval()

    def forward(self, input: Tensor) -> Tensor:
        """Return the scores ``(..., outputs)`` of features ``(..., features)``."""
        return F.linear(input.to(self.weight.dtype), self.weight, self.bias)

    def extra_repr(self) -> str:
        """Return what the text of the module says of it."""
        return f"layer={self.layer!r}, {super().extra_repr()}"


@dataclass(frozen=True)
class LayerProbes:
    """Hold the probes of all layers of a network, and hand them out one by one.

    Attributes:
        probes: the probes.
        reductions: ``{layer: what makes features of its activation}``.
        fitted_on: ``{layer: {target: {"data", "samples"}}}``, as in the rows of a report.
        missing: ``{layer: why it has no probe}`` of the layers that were left out.
    """

    probes: StackedProbes
    reductions: Mapping[str, FeatureReduction]
    fitted_on: Mapping[str, Mapping[str, Mapping[str, Any]]]
    missing: Mapping[str, str] = field(default_factory=dict)

    def probe(self, layer: str, target: str | None = None) -> LayerProbe:
        """Return a copy of the probe of a layer for a target, by default the first; draw nothing.

        Raises:
            ValueError: no such layer or target was probed (the message has the nearest names), or it has no probe (the
                message has the reason).
        """
        if layer in self.missing:
            raise ValueError(f"probe: {layer!r} has no probe: {self.missing[layer]}")
        if layer not in self.probes.widths:
            raise ValueError(unknown(layer, self.probes.widths))
        question = self.probes.question
        names = list(question.parts)
        target = names[0] if target is None else target
        if target not in names:
            there = ", ".join(map(repr, names)) if any(names) else "one without a name"
            raise ValueError(f"target: no target {target!r} is probed; there is {there}")
        found = self.probes.tensors(layer)
        place = question.columns()[target]
        found |= {name: found[name][place] for name in ("weight", "bias")}
        weight, bias = folded(question.parts[target], **found)
        if not bool(weight.isfinite().all() and bias.isfinite().all()):
            raise ValueError(f"probe: {layer!r} has no probe: its features were not finite")
        fitted_on = self.fitted_on[layer]
        return LayerProbe(weight, bias, layer, self.reductions[layer], fitted_on.get(target, fitted_on.get("", {})))


def unknown(layer: str, known: Iterable[str]) -> str:
    """Return a message that no such layer was probed, with the nearest names."""
    known = list(known)
    near = get_close_matches(str(layer), known, 5, 0.4) or known[:5]
    return f"probe: no layer {layer!r} is probed; nearest: {', '.join(near) or 'none'}"


@torch.no_grad()
def folded(task: Task, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Fold standardisation into a probe: return weight and bias for features and targets as they are, as copies.

    Args:
        task: what the probe is asked.
        weight: ``(outputs, features)``, on standardised features.
        bias: ``(outputs,)``.
        mean: mean of each feature, ``(features,)``.
        variance: variance of each feature, ``(features,)``.
    """
    wide = accumulator(weight.device)
    # Which features are constant depends on the precision of the statistics.
    scaled = weight.to(wide) * inverse_deviation(mean, variance).to(wide)
    shift = scaled * mean.to(wide)
    moved = bias.to(wide) - shift.sum(dim=1)
    rounding = shift.abs().sum(dim=1).max() * torch.finfo(weight.dtype).eps
    dtype = wide if bool(rounding > _ROUNDING) else weight.dtype
    dtype = wide if task.offset * torch.finfo(weight.dtype).eps > _ROUNDING else dtype
    own_weight, own_bias = task.unscaled(scaled, moved)
    return own_weight.to(dtype, copy=True), own_bias.to(dtype, copy=True)
