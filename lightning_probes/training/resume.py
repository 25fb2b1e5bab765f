"""Decide what of a checkpoint's probes fits the run that resumes from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor
from torchmetrics.utilities import rank_zero_warn

from lightning_probes.options import first_of
from lightning_probes.probes.online import OnlineProbes
from lightning_probes.tasks.task import Question

_NAMED = 8
"""Limit the layers that a message names."""


class Restored:
    """Hold the probes of a checkpoint until the first batch of the run has shown the layers' order and widths.

    Args:
        probes: probes that may go on; ``None`` for none.
        strict: whether all probes must go on.

    Attributes:
        is_unchecked: whether the first batch is still to come.
    """

    def __init__(self, probes: OnlineProbes | None = None, *, strict: bool = True) -> None:
        self._probes = probes
        self._is_strict = strict
        self._widths = probes.widths if probes is not None else {}
        self.is_unchecked = bool(self._widths)

    def check(self, features: Mapping[str, Tensor]) -> set[str]:
        """Leave out probes whose widths differ from those of ``features``; return their layers.

        Raises:
            ValueError: widths differ, and all probes must go on.
        """
        if self._probes is None or not self.is_unchecked:
            return set()
        found = {layer: x.shape[1] for layer, x in features.items()}
        layers = [layer for layer, width in found.items() if self._widths.get(layer, width) != width]
        if layers:
            widths = [f"{x!r} has {self._widths[x]} features in the checkpoint and {found[x]} here" for x in layers]
            refuse(first_of(widths, _NAMED), strict=self._is_strict)
            self._widths = {layer: width for layer, width in self._widths.items() if layer not in layers}
            self._probes.load_state_dict(only(self._probes.state_dict(), self._widths))
        return set(layers)

    def go_on(self, probes: OnlineProbes) -> OnlineProbes:
        """Return new ``probes``, with the state of the checkpoint for the layers that both have."""
        if self._probes is not None:
            probes.load_state_dict(only(self._probes.state_dict(), probes.layers))
        return probes


def question_in(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the state of a session says was asked; the first release knew one task only."""
    return dict(saved.get("question") or {"kind": "classification", "outputs": saved["num_classes"]})


def differing(
    saved: Mapping[str, Any], selected: Collection[str], question: Question, reduced: str, reduction: str
) -> str:
    """Say how probes of a checkpoint differ from those of this run in task, reduction or layers; empty if in none.

    Args:
        saved: state of a session.
        selected: layers of this run as they were selected, before any was left out.
        question: what the probes of this run are asked.
        reduced: how features were reduced in the run of the checkpoint.
        reduction: how features are reduced in this run.
    """
    if told := question.differs(question_in(saved)):
        return told
    if reduced != reduction:
        return f"reduction is {reduced!r} in the checkpoint and {reduction!r} here"
    here, there = set(selected), set(saved["selected"])
    gone = [layer for layer in saved["selected"] if layer not in here]
    new = [layer for layer in selected if layer not in there]
    parts = [("only in the checkpoint", gone), ("only here", new)]
    found = "; ".join(f"{where}: {first_of([repr(x) for x in layers], _NAMED)}" for where, layers in parts if layers)
    return f"layers {found}" if found else ""


def refuse(difference: str, *, strict: bool) -> None:
    """Raise, or warn that probes that differ start afresh.

    Raises:
        ValueError: ``strict`` is true.
    """
    if strict:
        raise ValueError(
            f"the probes of the checkpoint are not those of this run: {difference}. Resume with the arguments of "
            "that run, or with LinearProbeCallback(strict=False), which starts the probes that differ afresh"
        )
    rank_zero_warn(f"LinearProbeCallback: probes that differ from those of the checkpoint start afresh: {difference}")


def only(probes: Mapping[str, Mapping[str, Any]], layers: Collection[str]) -> dict[str, dict[str, Any]]:
    """Return the probes of some layers from the state of :class:`~lightning_probes.probes.heads.StackedProbes`."""
    kept: dict[str, dict[str, Any]] = {}
    for width, stack in probes.items():
        rows = [i for i, layer in enumerate(stack["layers"]) if layer in layers]
        if rows:
            kept[width] = {
                "layers": [stack["layers"][i] for i in rows],
                "updates": [stack["updates"][i] for i in rows],
                "tensors": {name: tensor[rows] for name, tensor in stack["tensors"].items()},
            }
    return kept
