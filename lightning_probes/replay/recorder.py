"""Record the outermost module calls of a step by hooks, with copies of their inputs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle as Handle

from lightning_probes.network.batches import tensors_in
from lightning_probes.network.hooks import HEARD_BY
from lightning_probes.network.torch_internals import (
    Interception,
    compiled_parts,
    is_in_backward,
    is_step,
    never_compiled,
    part_of_a_graph,
    tree_flatten,
    tree_leaves,
    tree_unflatten,
    version_of,
)
from lightning_probes.replay.calls import (
    Call,
    CannotRunAgainError,
    Link,
    View,
    Weight,
    is_plain,
    key_of,
    renumber,
    storage_of,
)
from lightning_probes.replay.reservoir import Budget


class CallRecorder:
    """Record, between :meth:`start` and :meth:`stop`, the calls that a step makes of its modules.

    The calls are run again in the place of the user's ``training_step``: an extra call of that would step manual
    optimisers, move queues and count metrics twice.

    Recorded are the outermost calls of the modules that are or hold a probed layer (the model itself included) and of
    the modules beside them that a step may call in between. Not recorded are calls inside backward (activation
    checkpointing) and those of a root whose ``forward`` stands for the training step at that moment (DDP).

    Limit: a value computed between two calls with its gradient cut, other than by ``.detach()`` alone, looks like data
    and is run again as it was.

    Args:
        budget: where copies of the inputs are kept.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._model: nn.Module | None = None
        self._names: dict[int, str] = {}
        self._weights: dict[int, tuple[str, Tensor]] = {}
        self._holders: set[int] = set()
        self._hooked: dict[int, nn.Module] = {}
        self._compiled: list[nn.Module] = []
        self._outside: list[nn.Module] = []
        self._lasting: list[Handle] = []
        self._hooks: list[Handle | Interception] = []
        self.clear()

    def __reduce__(self) -> Any:
        """Make a copy that knows no module, since hooks travel with a module that is copied or pickled."""
        return CallRecorder, (self._budget,)

    def clear(self) -> None:
        """Record no more, and discard what was recorded of a step."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._is_on = False
        self._calls: list[Call] = []
        self._reasons: dict[int, str] = {}
        self._raised: set[int] = set()
        self._open: nn.Module | None = None
        self._depth = 0
        # Detached aliases are held until the step ends, so that no graph is kept and no address is used a second time.
        self._outputs: dict[Any, tuple[Tensor, int, Link]] = {}
        self._inputs: dict[Any, tuple[Tensor, int, Tensor]] = {}
        self._computed: set[Any] = set()
        self._data: dict[Any, Tensor] | None = None

    def attach(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        """Find the modules to hook.

        Modules have hooks only while a step is recorded, so that other steps pay nothing. Modules in compiled code have
        hooks all the time, since each new hook would have the code compiled again.

        Args:
            model: the network.
            layers: its probed modules by name.
        """
        self.detach()
        probed = {id(layer) for layer in layers.values()}
        holders = [
            module
            for module in model.modules()
            if not isinstance(module, torch.jit.ScriptModule) and any(id(m) in probed for m in module.modules())
        ]
        self._hooked = {id(module): module for module in chain(holders, _children_called_by_steps(model))}
        self._model = model
        self._holders = {id(module) for module in holders}
        self._names = {id(module): name for name, module in model.named_modules()}
        # The tensors are held so that no other tensor gets their ids.
        self._weights = {id(t): (name, t) for name, t in chain(model.named_parameters(), model.named_buffers())}
        compiled, inside = compiled_parts(model)
        self._compiled = [module for module in compiled if id(module) in self._hooked]
        self._outside = [module for key, module in self._hooked.items() if key not in inside]
        self._lasting = [hook for key in inside & self._hooked.keys() for hook in self._on(self._hooked[key])]

    def detach(self) -> None:
        """Remove all hooks, release the model, and discard what was recorded."""
        self._hooks += self._lasting
        self.clear()
        self._lasting = []
        self._compiled = []
        self._outside = []
        self._hooked = {}
        self._model = None
        self._names = {}
        self._weights = {}
        self._holders = set()

    def start(self, batch: Any = None) -> None:
        """Start recording, whatever state an earlier step ended in.

        Args:
            batch: batch of a step without gradients, where values computed between modules cannot be told from data:
                once a module has been called, only tensors of the batch and outputs of modules may be inputs.
        """
        self.clear()
        self._data = None if batch is None else {storage_of(tensor): tensor for tensor in tensors_in(batch)}
        for module in self._outside:
            self._hooks += self._on(module)
        self._hooks += [Interception(module, self._before, self._after) for module in self._compiled]
        self._is_on = True

    def _on(self, module: nn.Module) -> list[Handle]:
        # The hook before a call comes first, to see the caller's inputs: in a replay other hooks change them again.
        before = module.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True)
        return [before, module.register_forward_hook(self._after, always_call=True)]

    def stop(self) -> list[Call]:
        """End the step.

        Returns:
            The calls that the probed layers need, in order.

        Raises:
            CannotRunAgainError: the calls cannot be run again; the message says why.
        """
        calls, reasons, raised = self._calls, self._reasons, self._raised
        self.clear()
        needed: set[int] = set()
        for i in reversed(range(len(calls))):
            if i not in raised and (i in needed or id(calls[i].module) in self._holders):
                leaves = tree_leaves((calls[i].args, calls[i].kwargs))
                needed |= {i} | {leaf.call for leaf in leaves if isinstance(leaf, Link)}
        if not needed:
            raise CannotRunAgainError(
                "no module that holds a probed layer was called from outside of backward and of compiled code"
            )
        if failed := sorted(needed & set(reasons)):
            raise CannotRunAgainError(reasons[failed[0]])
        order = {old: new for new, old in enumerate(sorted(needed))}
        return [renumber(calls[i], order) for i in order]

    @part_of_a_graph
    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        # This is asked first: nothing of the recorder's state may become part of a graph that a compiler traces.
        if torch.compiler.is_compiling() or not self._is_on or HEARD_BY in vars(module):
            return
        if self._open is not None:
            self._depth += module is self._open  # Most calls, inside a recorded one, end here.
        elif id(module) in self._hooked and not is_in_backward():
            self._try(self._enter, module, args, kwargs)

    @part_of_a_graph
    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling() and module is self._open and HEARD_BY not in vars(module):
            self._try(self._leave, module, output)

    @never_compiled
    def _try(self, step: Callable[..., None], module: nn.Module, *args: Any) -> None:
        """Keep an exception as a reason, since none of this package's own may reach the user's forward."""
        try:
            step(module, *args)
        except Exception as error:
            name = self._names.get(id(module)) or "the model"
            reason = str(error) if isinstance(error, CannotRunAgainError) else f"a call of {name!r} raised {error!r}"
            self._reasons.setdefault(max(len(self._calls) - 1, 0), reason)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module is self._model and is_step(module):
            return
        self._open = module
        self._depth = 1
        self._calls.append(Call(module, (), {}))
        name = self._names[id(module)] or "the model"
        leaves, spec = tree_flatten((args, kwargs))
        kept = tree_unflatten([self._keep(leaf, name) for leaf in leaves], spec)
        self._calls[-1] = Call(module, *kept)

    def _leave(self, module: nn.Module, output: Any) -> None:
        self._depth -= 1
        if self._depth:
            return
        self._open = None
        index = len(self._calls) - 1
        if output is None and sys.exc_info()[0] is not None:
            self._raised.add(index)
            return
        self._remember(index, output)

    def _remember(self, index: int, output: Any) -> None:
        """Remember the tensors of ``output``, to recognise them as inputs of later calls."""
        data = {storage_of(held) for held, _, _ in self._inputs.values()}
        for position, tensor in enumerate(tensors_in(output)):
            alias = tensor.detach()
            self._outputs[key_of(tensor)] = alias, version_of(tensor), Link(index, position)
            if storage_of(alias) not in data:
                self._computed.add(storage_of(alias))

    def _keep(self, leaf: Any, name: str) -> Any:
        """Return what is kept of an argument: a copy, or a marker of where it came from."""
        if not isinstance(leaf, Tensor):
            if is_plain(leaf):
                return leaf
            raise CannotRunAgainError(f"an argument of {name!r} is a {type(leaf).__name__}, which cannot be copied")
        if id(leaf) in self._weights:
            return Weight(self._weights[id(leaf)][0])
        key, version = key_of(leaf), version_of(leaf)
        if (found := self._outputs.get(key)) is not None and found[1] == version:
            return found[2]
        if (link := self._view_of_an_output(leaf, version)) is not None:
            return link
        is_computed = leaf.grad_fn is not None or found is not None or storage_of(leaf) in self._computed
        if self._data is not None and self._computed:
            is_computed |= storage_of(leaf) not in self._data
        if is_computed or isinstance(leaf, nn.Parameter):
            raise CannotRunAgainError(
                f"the input of {name!r} is computed from the output of other layers or from weights outside of any "
                "module; move that code into a forward()"
            )
        if (seen := self._inputs.get(key)) is None or seen[1] != version:
            # Under one key only the newest tensor matters; calls hold the copies of older ones themselves.
            seen = self._inputs[key] = leaf.detach(), version, self._budget.copy(leaf)
        return seen[2]

    def _view_of_an_output(self, leaf: Tensor, version: int) -> Link | None:
        for output, its_version, link in reversed(self._outputs.values()):
            # The views of a storage have one count of changes.
            shares = storage_of(output) == storage_of(leaf) and its_version == version
            if shares and (view := View.of(leaf, output)) is not None:
                return replace(link, view=view)
        return None


def _children_called_by_steps(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the children of ``module``, and also those of a container that cannot be called, such as a ModuleList."""
    for child in module.children():
        if isinstance(child, torch.jit.ScriptModule):
            continue  # TorchScript takes no such hooks.
        yield child
        if type(child).forward is nn.Module.forward:
            yield from _children_called_by_steps(child)
