"""The networks to probe one after the other: a model as it is, untrained, or with the weights of checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_probes.checkpoints import Checkpoint, CheckpointError, find_checkpoints, load_weights, read_checkpoint

AS_GIVEN, UNTRAINED = "as given", "untrained"


@dataclass(frozen=True)
class Network:
    """One of those to probe: its name, when in training it is from, and what puts its weights into a model."""

    name: str
    point: tuple[int, int]
    prepare: Callable[[nn.Module], Any] = field(repr=False)


def series(model: nn.Module, ckpt_path: Any, untrained: bool, weights_only: bool) -> Iterator[Network]:
    """In order of time."""
    if untrained:
        yield Network(UNTRAINED, (0, 0), _initialise)
    if ckpt_path is None:
        trainer = getattr(model, "_trainer", None)
        point = (trainer.current_epoch, trainer.global_step) if trainer is not None else (0, 0)
        # Where nobody knows when it is from it is at least later than the untrained one.
        yield Network(AS_GIVEN, point if any(point) or not untrained else (0, 1), lambda _: None)
        return
    found: list[tuple[int, int, Network]] = []
    for i, path in enumerate(find_checkpoints(ckpt_path)):
        try:
            known, _ = read_checkpoint(path, weights_only=weights_only)
        except CheckpointError:  # told of when it is its turn
            known = Checkpoint(path, 0, 0)
        load = partial(_load, path=path, weights_only=weights_only)
        found.append((known.step, i, Network(str(path), (known.epoch, known.step), load)))
    yield from (one for _, _, one in sorted(found, key=lambda item: item[:2]))


def _load(model: nn.Module, path: Path, weights_only: bool) -> None:
    load_weights(model, path, read_checkpoint(path, weights_only=weights_only)[1])


def copied(model: nn.Module) -> nn.Module:
    """A deep copy; the trainer that a LightningModule knows is no part of it."""
    trainer = getattr(model, "_trainer", None)
    if isinstance(model, LightningModule):
        model._trainer = None
    try:
        return copy.deepcopy(model)
    finally:
        if isinstance(model, LightningModule):
            model._trainer = trainer


def _initialise(model: nn.Module) -> None:
    """Draw all parameters anew, by each module's own ``reset_parameters``, and leave the random states as they were."""
    drawn: set[int] = set()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for module in model.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
                drawn |= {id(parameter) for parameter in module.parameters(recurse=False)}
    if left := [name for name, parameter in model.named_parameters() if id(parameter) not in drawn]:
        some = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
        rank_zero_warn(
            f"probe: in the untrained network {some} stay as they are: their modules have no reset_parameters"
        )
