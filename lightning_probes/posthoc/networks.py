"""List the networks to probe after training: a model as it is, untrained, or with the weights of checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, is_lazy

from lightning_probes.checkpoints import CheckpointError, find_checkpoints, load_weights, read_checkpoint
from lightning_probes.network.torch_internals import trainer_of, without_trainers
from lightning_probes.options import first_of


@dataclass(frozen=True)
class Network:
    """Hold one network to probe, as a way to put its weights into a model.

    Attributes:
        name: path of its checkpoint, ``as given`` or ``untrained``.
        point: epoch and step of its weights.
        prepare: changes a model in place to this network, and returns a note for the report, empty if there is none.
        is_given: whether it is the user's model as it is.
    """

    name: str
    point: tuple[int, int]
    prepare: Callable[[nn.Module], str] = field(repr=False)
    is_given: bool = False


def networks_to_probe(model: nn.Module, ckpt_path: Any, untrained: bool, weights_only: bool) -> Iterator[Network]:
    """Yield the networks to probe, in order of their steps.

    Args:
        model: the model as the user gave it.
        ckpt_path: checkpoints to probe in its place: a path, a glob, or a list of them; ``None`` probes ``model``.
        untrained: whether to begin with the model initialised anew, at epoch 0, step 0.
        weights_only: whether to read nothing but tensors and plain types from checkpoints.

    Raises:
        FileNotFoundError: a path in ``ckpt_path`` does not exist, or a glob matches nothing.
    """
    if untrained:
        yield Network("untrained", (0, 0), _initialise)
    if ckpt_path is None:
        trainer = trainer_of(model)
        now = (trainer.current_epoch, trainer.global_step) if trainer is not None else (0, 0)
        # A model without known progress is put after the untrained one, with which it must not share epoch and step.
        yield Network("as given", now if any(now) or not untrained else (0, 1), lambda _: "", is_given=True)
        return
    found = [_written(path, weights_only) for path in find_checkpoints(ckpt_path)]
    known = {point for point, _ in found}
    built: dict[str, Tensor] = {}
    # Checkpoints without epoch and step come first, as found, and are numbered to tell them apart.
    free = ((0, i) for i in count(1) if (0, i) not in known)
    for point, path in sorted(found, key=lambda item: (item[0] or (0, 0))[::-1]):
        load = partial(_load, source=model, built=built, path=path, weights_only=weights_only)
        yield Network(str(path), point or next(free), load)


def _written(path: Path, weights_only: bool) -> tuple[tuple[int, int] | None, Path]:
    try:
        return read_checkpoint(path, weights_only=weights_only)[0], path
    except CheckpointError:
        # The checkpoint is read again when its turn comes, and the error is reported then.
        return None, path


def _load(model: nn.Module, source: nn.Module, built: dict[str, Tensor], path: Path, weights_only: bool) -> str:
    """Load a checkpoint into ``model``, a copy of ``source``.

    Args:
        model: the copy.
        source: the model as the user gave it; a checkpoint may lack some of its weights.
        built: the weights by name that only the copy has, because it built further modules; empty before the first.
        path: the checkpoint.
        weights_only: as for :func:`networks_to_probe`.
    """
    own = _tensors_of(source)
    if not built:
        further = {name: x for name, x in _tensors_of(model).items() if name not in own and not is_lazy(x)}
        built |= {name: tensor.detach().clone() for name, tensor in further.items()}
    _take_weights(model, own | built)
    load_weights(model, path, read_checkpoint(path, weights_only=weights_only)[1])
    return ""


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy of ``model`` that refers neither to a trainer nor to the autograd graphs of its tensors."""
    modules = list(model.modules())
    held = [value for module in modules for value in (*vars(module).values(), *module.buffers(recurse=False))]
    memo: dict[int, Any] = {}
    memo |= {id(value): value.detach().clone() for value in held if isinstance(value, Tensor) and not value.is_leaf}
    # Lazy buffers, unlike lazy parameters, refuse to be copied.
    memo |= {
        id(value): UninitializedBuffer(device=value.data.device, dtype=value.data.dtype)  # type: ignore[call-arg]
        for value in held
        if isinstance(value, UninitializedBuffer)
    }
    with without_trainers(model):
        return copy.deepcopy(model, memo)


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _take_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy ``weights``, which may have been of another shape before modules were built, into ``model``."""
    with torch.no_grad():
        for name, tensor in _tensors_of(model).items():
            other = weights.get(name)
            if other is not None and not is_lazy(other) and not is_lazy(tensor) and other.shape == tensor.shape:
                tensor.copy_(other)


def _initialise(model: nn.Module) -> str:
    """Initialise all parameters anew by each module's own ``reset_parameters``, without a trace in the random states.

    Returns:
        A note on the parameters whose modules have no such method; empty if there are none.
    """
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
