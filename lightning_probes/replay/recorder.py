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

from lightning_probes.network.batches import storage_of, tensors_in
from lightning_probes.network.hooks import HEARD_BY
from lightning_probes.network.provenance import NOBODY, Provenance
from lightning_probes.network.torch_internals import (
    Interception,
    Origin,
    compiled_parts,
    is_in_backward,
    is_reshaped,
    is_step,
    never_compiled,
    origin_of,
    part_of_a_graph,
    tree_flatten,
    tree_leaves,
    tree_unflatten,
    version_of,
)
from lightning_probes.replay.calls import (
    Call,
    CannotRunAgainError,
    Copied,
    Link,
    RecordedStep,
    Reshaped,
    View,
    Weight,
    is_plain,
    key_of,
    renumber,
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
        heard: returns ``{layer: number of its calls so far}`` in the step under way.
    """

    def __init__(self, budget: Budget, heard: Callable[[], Mapping[str, int]] = dict) -> None:
        self._budget = budget
        self._heard = heard
        self._model: nn.Module | None = None
        self._names: dict[int, str] = {}
        self._weights: dict[int, tuple[str, Tensor]] = {}
        self._holders: set[int] = set()
        self._hooked: dict[int, nn.Module] = {}
        self._compiled: list[nn.Module] = []
        self._outside: list[nn.Module] = []
        self._lasting: list[Handle] = []
        self._hooks: list[Handle | Interception] = []
        self._provenance: Provenance | None = None
        self.clear()

    def __reduce__(self) -> Any:
        """Make a copy that knows no module, since hooks travel with a module that is copied or pickled."""
        return CallRecorder, (self._budget, self._heard)

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
        self._outputs: dict[Any, tuple[Tensor, int, Link, Origin | None]] = {}
        self._inputs: dict[Any, tuple[Tensor, int, Tensor]] = {}
        self._computed: set[Any] = set()
        self._data: dict[Any, Tensor] | None = None
        if self._provenance is not None:
            self._provenance.stop()
        self._provenance = None
        self._numbers: dict[int, tuple[Tensor, Tensor]] = {}
        self._is_guessed = False
        self._from_batch: set[int] = set()

    @property
    def is_on(self) -> bool:
        """Return whether a step is recorded at the moment."""
        return self._is_on

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

    def start(self, batch: Any = None, provenance: Provenance | None = None) -> None:
        """Start recording, whatever state an earlier step ended in.

        Args:
            provenance: follows the samples of the batch to the inputs of calls; ``None`` if they need not be known.
            batch: batch of a step without gradients, where values computed between modules cannot be told from data:
                once a module has been called, only tensors of the batch and outputs of modules may be inputs.
        """
        self.clear()
        self._data = None if batch is None else {storage_of(tensor): tensor for tensor in tensors_in(batch)}
        for module in self._outside:
            self._hooks += self._on(module)
        self._hooks += [Interception(module, self._before, self._after) for module in self._compiled]
        self._is_on = True
        if provenance is not None:
            self._provenance = provenance
            provenance.start()

    def _on(self, module: nn.Module) -> list[Handle]:
        # The hook before a call comes first, to see the caller's inputs: in a replay other hooks change them again.
        before = module.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True)
        return [before, module.register_forward_hook(self._after, always_call=True)]

    def stop(self) -> RecordedStep:
        """End the step.

        Returns:
            The calls that the probed layers need and that can be run again, in order.

        Raises:
            CannotRunAgainError: no call can be run again; the message says why.
        """
        calls, reasons, raised = self._calls, self._reasons, self._raised
        numbers, is_guessed = self._numbers, self._is_guessed
        self.clear()
        links = [{leaf.call for leaf in tree_leaves((c.args, c.kwargs)) if isinstance(leaf, Link)} for c in calls]
        needed: set[int] = set()
        for i in reversed(range(len(calls))):
            if i not in raised and (i in needed or id(calls[i].module) in self._holders):
                needed |= {i} | links[i]
        if not needed:
            raise CannotRunAgainError(
                "no module that holds a probed layer was called from outside of backward and of compiled code"
            )
        able: list[int] = []
        for i in sorted(needed - reasons.keys()):
            if links[i] <= set(able):
                able.append(i)
        # What only a call needs that cannot be run is not run for nothing.
        used: set[int] = set()
        for i in reversed(able):
            if i in used or id(calls[i].module) in self._holders:
                used |= {i} | links[i]
        failed = sorted(needed & reasons.keys())
        if not used:
            raise CannotRunAgainError(reasons[failed[0]])
        order = {old: new for new, old in enumerate(sorted(used))}
        reason = reasons[failed[0]] if failed else ""
        return RecordedStep([renumber(calls[i], order) for i in order], reason, numbers, is_guessed)

    def pause_following(self) -> None:
        """Follow no operation of the step until :meth:`go_on_following`."""
        if self._provenance is not None:
            self._provenance.pause()

    def go_on_following(self) -> None:
        """Follow operations again."""
        if self._provenance is not None:
            self._provenance.go_on()

    @part_of_a_graph
    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        # This is asked first: nothing of the recorder's state may become part of a graph that a compiler traces.
        if torch.compiler.is_compiling() or not self._is_on or HEARD_BY in vars(module):
            return
        if self._open is not None:
            self._depth += module is self._open  # Most calls, inside a recorded one, end here.
        elif id(module) in self._hooked and not is_in_backward():
            # Neither a module, whose code may be compiled, nor the copies that are taken here are followed.
            self.pause_following()
            self._try(self._enter, module, args, kwargs)
            if self._open is None:
                self.go_on_following()

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
        heard = dict(self._heard())
        self._calls.append(Call(module, (), {}, heard))
        name = self._names[id(module)] or "the model"
        leaves, spec = tree_flatten((args, kwargs))
        kept = tree_unflatten([self._keep(leaf, name) for leaf in leaves], spec)
        args, kwargs = kept
        self._calls[-1] = Call(module, args, kwargs, heard)
        leaves = tree_leaves(self._calls[-1].args) + tree_leaves(self._calls[-1].kwargs)
        if any(self._is_from_batch(leaf) for leaf in leaves):
            self._from_batch.add(len(self._calls) - 1)

    def _leave(self, module: nn.Module, output: Any) -> None:
        self._depth -= 1
        if self._depth:
            return
        self._open = None
        index = len(self._calls) - 1
        if self._provenance is not None and index in self._from_batch:
            self._provenance.remember(output)
        self.go_on_following()
        if output is None and sys.exc_info()[0] is not None:
            self._raised.add(index)
            return
        self._remember(index, output)

    def _is_from_batch(self, leaf: Any) -> bool:
        if isinstance(leaf, Link):
            return leaf.call in self._from_batch
        return id(leaf) in self._numbers and bool((self._numbers[id(leaf)][1] != NOBODY).any())

    def _remember(self, index: int, output: Any) -> None:
        """Remember the tensors of ``output``, to recognise them as inputs of later calls."""
        data = {storage_of(held) for held, _, _ in self._inputs.values()}
        for position, tensor in enumerate(tensors_in(output)):
            alias = tensor.detach()
            made = Link(index, position)
            self._outputs[key_of(tensor)] = alias, version_of(tensor), made, origin_of(tensor)
            if storage_of(alias) not in data:
                self._computed.add(storage_of(alias))

    def _keep(self, leaf: Any, name: str) -> Any:
        """Return what is kept of an argument: a copy, or a marker of where it came from."""
        if not isinstance(leaf, Tensor):
            return leaf if is_plain(leaf) else self._keep_object(leaf, name)
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
        if (link := self._copy_of_an_output(leaf)) is not None:
            return link
        if is_computed or isinstance(leaf, nn.Parameter):
            raise CannotRunAgainError(
                f"the input of {name!r} is computed from the output of other layers or from weights outside of any "
                "module; move that code into a forward()"
            )
        if (seen := self._inputs.get(key)) is None or seen[1] != version:
            # Under one key only the newest tensor matters; calls hold the copies of older ones themselves.
            seen = self._inputs[key] = leaf.detach(), version, self._budget.copy(leaf)
            if self._provenance is not None:
                numbers, is_guessed = self._provenance.of(leaf)
                self._is_guessed |= is_guessed
                if numbers is not None:
                    self._numbers[id(seen[2])] = seen[2], numbers.to(seen[2].device)
        return seen[2]

    def _keep_object(self, value: Any, name: str) -> Copied:
        try:
            return Copied.of(value, lambda tensor: self._keep(tensor, name))
        except CannotRunAgainError:
            raise
        except Exception as error:  # An object may refuse to be copied by any exception.
            what = f"an argument of {name!r} is a {type(value).__name__}, which cannot be copied"
            raise CannotRunAgainError(f"{what}: {error}") from error

    def _view_of_an_output(self, leaf: Tensor, version: int) -> Link | None:
        for output, its_version, link, _ in reversed(self._outputs.values()):
            # The views of a storage have one count of changes.
            shares = storage_of(output) == storage_of(leaf) and its_version == version
            if shares and (view := View.of(leaf, output)) is not None:
                return replace(link, view=view)
        return None

    def _copy_of_an_output(self, leaf: Tensor) -> Link | None:
        """Return a link to the output that ``leaf`` has the values of, as ``flatten`` copies it from another layout.

        Autograd tells. Where it has no part, values are compared, which waits for the device: only in a step that is
        recorded, and if ``leaf`` can be such a copy.
        """
        if leaf.is_nested or leaf.layout != torch.strided:
            return None
        for output, version, link, origin in reversed(self._outputs.values()):
            if (output.numel(), output.dtype, output.device) != (leaf.numel(), leaf.dtype, leaf.device):
                continue
            if version_of(output) != version:
                continue
            if leaf.grad_fn is not None:
                is_copy = origin is not None and is_reshaped(leaf, origin)
            else:
                may_be = leaf.is_contiguous() and not output.is_contiguous()
                is_copy = may_be and torch.equal(output.reshape(leaf.shape), leaf)
                # Equal constants, such as zeros that a state begins with, are no evidence.
                is_copy = is_copy and bool((leaf != leaf.flatten()[:1]).any())
            if is_copy:
                return replace(link, view=Reshaped(tuple(leaf.shape)))
        return None


def _children_called_by_steps(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the children of ``module``, and also those of a container that cannot be called, such as a ModuleList."""
    for child in module.children():
        if isinstance(child, torch.jit.ScriptModule):
            continue  # TorchScript takes no such hooks.
        yield child
        if type(child).forward is nn.Module.forward:
            yield from _children_called_by_steps(child)
