"""Run recorded calls again on the frozen network, without a call of the user's step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lightning_probes.network.batches import tensors_in
from lightning_probes.network.torch_internals import is_shared_out, tree_leaves, tree_map, version_of
from lightning_probes.replay.calls import Call, Link, Weight, with_objects


def copy_of_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copy parameters and buffers to the host under all their names, to be the ``weights`` of a :class:`Replay`."""
    copies: dict[int, Tensor] = {}
    found: dict[str, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, tensor in _tensors_of(module, prefix):
            if id(tensor) not in copies:
                copies[id(tensor)] = tensor.detach().to("cpu", copy=True)
            found[name] = copies[id(tensor)]
    return found


class Replay:
    """Run recorded calls of ``model`` without a trace in its parameters and buffers.

    Make and use a replay inside :func:`~lightning_probes.replay.frozen.frozen`. For mixed precision as in training,
    enter the strategy's forward context around it. Weights that are shared out among processes are gathered by the
    modules themselves, so that no copy can stand in for them:
    :func:`~lightning_probes.replay.sharded.shares_kept` guards those.

    Args:
        model: the network whose calls were recorded.
        device: device on which the model runs.
        weights: older state of the whole model by name, like that of ``state_dict()``, which replaces the present state
            during the calls. Buffers that it lacks (non-persistent ones) are the present ones. Weights that are on
            ``device`` cost no transfer.

    Raises:
        KeyError: ``weights`` lacks a parameter.
        ValueError: there are ``weights``, and those of the model are shared out among processes.
    """

    def __init__(
        self, model: nn.Module, *, device: torch.device | str, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        self._device = torch.device(device)
        self._writes: dict[int, bool] = {}
        self._slots: dict[int, list[tuple[str, Tensor]]] = {}
        self._named: dict[str, Tensor] = {}
        self._copies: dict[int, tuple[Tensor, int]] = {}
        self._values: dict[int, Tensor] = {}
        self._is_shared_out = is_shared_out(model)
        if self._is_shared_out and weights is not None:
            raise ValueError("weights: those of the model are shared out among processes")
        # A tensor in two places has two names in a state dict, either of which will do.
        for prefix, module in model.named_modules(remove_duplicate=False):
            for name, tensor in _tensors_of(module, prefix):
                self._named[name] = tensor
                if weights is not None and name in weights:
                    self._values[id(tensor)] = weights[name].detach().to(self._device)
        if weights is not None:
            for name, tensor in self._named.items():
                if isinstance(tensor, nn.Parameter) and id(tensor) not in self._values:
                    raise KeyError(f"weights: no {name!r}")

    def run(self, calls: list[Call], skip_to: Callable[[Mapping[str, int]], None] | None = None) -> None:
        """Run the calls of a step in their order; hooks see what the layers put out.

        Args:
            calls: the calls.
            skip_to: takes, before each call, how often each layer had been called in the step by then.

        Raises:
            Exception: whatever a module raises.
        """
        leaves = tree_leaves([(call.args, call.kwargs) for call in calls])
        linked = {leaf.call for leaf in leaves if isinstance(leaf, Link)}
        outputs: dict[int, list[Tensor]] = {}
        inputs: dict[int, Tensor] = {}

        def resolve(leaf: Any) -> Any:
            if isinstance(leaf, Link):
                output = outputs[leaf.call][leaf.position]
                return output if leaf.view is None else leaf.view.on(output)
            if isinstance(leaf, Weight):
                return self._value(self._named[leaf.name]).detach().clone()
            if isinstance(leaf, Tensor):
                # Inputs are copied, since a network may write into them. A tensor that is given twice is copied once.
                if id(leaf) not in inputs:
                    inputs[id(leaf)] = leaf.to(self._device, copy=True)
                return inputs[id(leaf)]
            return leaf

        for i, call in enumerate(calls):
            if skip_to is not None:
                skip_to(call.heard)
            output = self._call(call.module, *with_objects(tree_map(resolve, (call.args, call.kwargs))))
            if i in linked:
                outputs[i] = list(tensors_in(output))

    def _value(self, tensor: Tensor) -> Tensor:
        """Return the value of a parameter or buffer: the older one from ``weights``, or else the present one."""
        return self._values.get(id(tensor), tensor)

    def _held(self, tensor: Tensor) -> Tensor:
        """Return a copy of a tensor's value, which is kept and made anew only if the network wrote to it."""
        held, version = self._copies.get(id(tensor), (None, 0))
        if held is None or version_of(held) != version:
            held = self._value(tensor).detach().clone()
            self._copies[id(tensor)] = held, version_of(held)
        return held

    def _call(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self._is_shared_out:
            return module(*args, **kwargs)
        if id(module) not in self._slots:
            # Each place is named once, by the first path to its module: functional_call could not restore a place that
            # it filled twice. Tied tensors stay tied, since each of their places gets the same tensor.
            slots = (slot for path, below in module.named_modules() for slot in _tensors_of(below, path))
            self._slots[id(module)] = list(slots)
        copies: dict[int, Tensor] = {}
        state: dict[str, Tensor] = {}
        # Some networks write to parameters in forward (a momentum encoder). The first call shows whether this one does.
        is_careful = self._writes.get(id(module), True)
        for name, tensor in self._slots[id(module)]:
            if (is_careful or not isinstance(tensor, nn.Parameter)) and id(tensor) not in copies:
                copies[id(tensor)] = self._value(tensor).detach().clone()
            # A call never gets the network's own memory: another input may take a path on which that is written to.
            state[name] = copies[id(tensor)] if id(tensor) in copies else self._held(tensor)
        given = dict(state)
        output = torch.func.functional_call(module, state, args, kwargs, tie_weights=False)
        if id(module) not in self._writes:
            self._writes[id(module)] = not all(
                torch.equal(given[name], self._value(tensor)) and state[name] is given[name]
                for name, tensor in self._slots[id(module)]
                if isinstance(tensor, nn.Parameter)
            )
        return output


def _tensors_of(module: nn.Module, path: str) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of the parameters and buffers that a module holds itself, with names below ``path``."""
    # The methods are called unbound, since users override them with fewer arguments.
    parameters = nn.Module.named_parameters(module, path, recurse=False, remove_duplicate=False)
    yield from chain(parameters, nn.Module.named_buffers(module, path, recurse=False, remove_duplicate=False))
