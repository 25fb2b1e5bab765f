"""The networks to probe one after the other: a model as it is, untrained, or with the weights of checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_probes.checkpoints import CheckpointError, find_checkpoints, load_weights, read_checkpoint
from lightning_probes.options import first_of

AS_GIVEN, UNTRAINED = "as given", "untrained"


@dataclass(frozen=True)
class Network:
    """One of those to probe: its name, when in training it is from, and what puts its weights into a model."""

    name: str
    point: tuple[int, int]
    prepare: Callable[[nn.Module], str] = field(repr=False)
    """Returns what a reader should know of it."""


def series(model: nn.Module, ckpt_path: Any, untrained: bool, weights_only: bool) -> Iterator[Network]:
    """In order of time."""
    if untrained:
        yield Network(UNTRAINED, (0, 0), _initialise)
    if ckpt_path is None:
        trainer = getattr(model, "_trainer", None)
        now = (trainer.current_epoch, trainer.global_step) if trainer is not None else (0, 0)
        # Where nobody knows when it is from it is at least later than the untrained one.
        yield Network(AS_GIVEN, now if any(now) or not untrained else (0, 1), lambda _: "")
        return
    found = [_written(path, weights_only) for path in find_checkpoints(ckpt_path)]
    known = {point for point, _ in found}
    # Those that do not say when they were written are counted: they come first, in the order of their names.
    free = ((0, i) for i in count(1) if (0, i) not in known)
    for point, path in sorted(found, key=lambda item: (item[0] or (0, 0))[::-1]):
        load = partial(_load, source=model, path=path, weights_only=weights_only)
        yield Network(str(path), point or next(free), load)


def _written(path: Path, weights_only: bool) -> tuple[tuple[int, int] | None, Path]:
    try:
        return read_checkpoint(path, weights_only=weights_only)[0], path
    except CheckpointError:  # told of when it is its turn
        return None, path


def _load(model: nn.Module, source: nn.Module, path: Path, weights_only: bool) -> str:
    _take_weights(model, source)
    load_weights(model, path, read_checkpoint(path, weights_only=weights_only)[1])
    return ""


def copied(model: nn.Module) -> nn.Module:
    """A deep copy; the trainer that LightningModules know is no part of it, nor is a graph that a tensor is from."""
    modules = list(model.modules())
    known = [(vars(module), vars(module)["_trainer"]) for module in modules if "_trainer" in vars(module)]
    held = [value for module in modules for value in (*vars(module).values(), *module.buffers(recurse=False))]
    memo = {id(value): value.detach().clone() for value in held if isinstance(value, Tensor) and not value.is_leaf}
    try:
        for own, _ in known:
            own["_trainer"] = None
        return copy.deepcopy(model, memo)
    finally:
        for own, trainer in known:
            own["_trainer"] = trainer


def _take_weights(model: nn.Module, source: nn.Module) -> None:
    """Give a copy the parameters and buffers of what it is a copy of: not every checkpoint has all of them."""
    with torch.no_grad():
        for own, others in ((model.parameters(), source.parameters()), (model.buffers(), source.buffers())):
            for tensor, other in zip(own, others, strict=True):
                tensor.copy_(other)


def _initialise(model: nn.Module) -> str:
    """Draw all parameters anew, by each module's own ``reset_parameters``, and leave the random states as they were."""
    drawn: set[int] = set()
    with torch.random.fork_rng(devices={p.device for p in model.parameters() if p.device.type == "cuda"}):
        torch.default_generator.manual_seed(0)
        for module in model.modules():
            reset = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
            if callable(reset):
                reset()
                drawn |= {id(parameter) for parameter in module.parameters(recurse=False)}
    left = [name for name, parameter in model.named_parameters() if id(parameter) not in drawn]
    if not left:
        return ""
    return f"in the untrained network {first_of(left)} stay as they are: their modules have no reset_parameters"
