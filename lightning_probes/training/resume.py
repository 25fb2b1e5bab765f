"""What of a checkpoint fits the run that resumes from it."""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping
from typing import Any

from torch import Tensor
from torchmetrics.utilities import rank_zero_warn

from lightning_probes.options import first_of
from lightning_probes.probes.online import ProbeBank

_NAMED = 8
"""Layers that a message names."""


class Restored:
    """The probes of a checkpoint, until the first batch of the run has shown the layers' order and widths.

    Args:
        bank: those that may go on.
        strict: all of them must.

    Attributes:
        is_unchecked: whether the first batch is still to come.
    """

    def __init__(self, bank: ProbeBank | None = None, *, strict: bool = True) -> None:
        self._bank = bank
        self._is_strict = strict
        self._widths = bank.widths if bank is not None else {}
        self.is_unchecked = bool(self._widths)

    def check(self, features: Mapping[str, Tensor]) -> set[str]:
        """Leave out the probes of other widths than ``features`` have; returns their layers.

        Raises:
            ValueError: there are some, and there must not be.
        """
        if self._bank is None or not self.is_unchecked:
            return set()
        found = {layer: x.shape[1] for layer, x in features.items()}
        layers = [layer for layer, width in found.items() if self._widths.get(layer, width) != width]
        if layers:
            widths = [f"{x!r} has {self._widths[x]} features in the checkpoint and {found[x]} here" for x in layers]
            refuse(first_of(widths, _NAMED), strict=self._is_strict)
            self._widths = {layer: width for layer, width in self._widths.items() if layer not in layers}
            self._bank.load_state_dict(only(self._bank.state_dict(), self._widths))
        return set(layers)

    def accept(self, features: Mapping[str, Tensor], due: Container[str] | None) -> dict[str, Tensor]:
        """The first batch has been checked: of its features those that are due."""
        self.is_unchecked = False
        return {layer: x for layer, x in features.items() if due is None or layer in due}

    def go_on(self, bank: ProbeBank) -> ProbeBank:
        """``bank``, which is new, with the probes that it shares with the checkpoint."""
        if self._bank is not None:
            bank.load_state_dict(only(self._bank.state_dict(), bank.layers))
        return bank


def differing(
    saved: Mapping[str, Any], selected: Collection[str], num_classes: int, reduced: str, reduction: str
) -> str:
    """How the probes of a checkpoint differ from those of this run in classes and layers; empty if they do not.

    Args:
        saved: the state of a session.
        selected: the layers of this run as they were selected, before any was left out.
        num_classes: of this run.
        reduced: how features were reduced in that of the checkpoint.
        reduction: how they are in this one.
    """
    if saved["num_classes"] != num_classes:
        return f"num_classes is {saved['num_classes']} in the checkpoint and {num_classes} here"
    if reduced != reduction:
        return f"reduction is {reduced!r} in the checkpoint and {reduction!r} here"
    here, there = set(selected), set(saved["selected"])
    gone = [layer for layer in saved["selected"] if layer not in here]
    new = [layer for layer in selected if layer not in there]
    parts = [("only in the checkpoint", gone), ("only here", new)]
    found = "; ".join(f"{where}: {first_of([repr(x) for x in layers], _NAMED)}" for where, layers in parts if layers)
    return f"layers {found}" if found else ""


def refuse(difference: str, *, strict: bool) -> None:
    """Raise, or warn that the probes that differ are started afresh.

    Raises:
        ValueError: if ``strict``.
    """
    if strict:
        raise ValueError(
            f"the probes of the checkpoint are not those of this run: {difference}. Resume with the arguments of "
            "that run, or with LinearProbeCallback(strict=False), which starts the probes that differ afresh"
        )
    rank_zero_warn(f"LinearProbeCallback: probes that differ from those of the checkpoint start afresh: {difference}")


def only(bank: Mapping[str, Mapping[str, Any]], layers: Collection[str]) -> dict[str, dict[str, Any]]:
    """The probes of some layers out of the state of a :class:`~lightning_probes.probes.online.ProbeBank`."""
    kept: dict[str, dict[str, Any]] = {}
    for width, stack in bank.items():
        rows = [i for i, layer in enumerate(stack["layers"]) if layer in layers]
        if rows:
            kept[width] = {
                "layers": [stack["layers"][i] for i in rows],
                "updates": [stack["updates"][i] for i in rows],
                "tensors": {name: tensor[rows] for name, tensor in stack["tensors"].items()},
            }
    return kept
