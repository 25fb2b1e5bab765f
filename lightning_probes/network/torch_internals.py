"""Reach what torch and Lightning do not promise to keep: all of it is here, and only here.

Each entry says why nothing public serves, and what is lost in a version without it: a feature, never a run.
``tests/test_torch_internals.py`` names each of them, so that an upgrade shows what it took.
"""

from __future__ import annotations

import copy
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node as register_tree_node

# Nothing public walks over containers. Lightning imports this private module too, and would break before this package.
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.data import DataLoader

__all__ = ["register_tree_node", "tree_flatten", "tree_leaves", "tree_map", "tree_unflatten"]

F = TypeVar("F", bound=Callable[..., Any])

Listener = Callable[[Tensor | None], None]
"""Take the first floating-point tensor of a module's output, or ``None`` if it has none."""

# Modules

LOSSES: tuple[type, ...] = tuple(filter(None, [getattr(nn.modules.loss, "_Loss", None)]))
"""List the base classes of torch's losses. Without them losses are known by their names, which end in "Loss"."""

DROPOUTS: tuple[type, ...] = tuple(filter(None, [getattr(nn.modules.dropout, "_DropoutNd", None)]))
"""List the base classes of torch's dropout. Without them dropout is known by its names, which begin with "Drop"."""

HOOK_ATTRIBUTES = frozenset(name for name in vars(nn.Module()) if "hooks" in name)
"""List the attributes in which a module keeps its hooks. They are never copied: a handle finds its hook in the dict
that it was given."""


WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
"""Name the path segments that compilation, FSDP, activation checkpointing and Lightning's strategies insert. Where a
wrapper has another name, that name is part of the names of layers."""


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was written to, as far as torch counts it.

    Without it, a tensor changed between two calls of a step counts as unchanged.
    """
    return 0 if tensor.is_inference() else getattr(tensor, "_version", 0)


_RESHAPING = re.compile(r"(Clone|View|UnsafeView|ReshapeAlias|Squeeze|Unsqueeze)Backward\d*")
"""Match the names of the nodes of autograd whose outputs have the values of their input in the same order."""

Origin = tuple[int, int]
"""Tell outputs of a step's operations apart, without holding the graph that they are in."""


def origin_of(tensor: Tensor) -> Origin | None:
    """Return which output of which operation a tensor is, as autograd numbers them; ``None`` if autograd does not say.

    Without it, a value that was copied between two calls counts as computed there, which autograd could tell apart.
    """
    return _origin(tensor.grad_fn, tensor.output_nr)


def is_reshaped(tensor: Tensor, origin: Origin) -> bool:
    """Return whether autograd shows that a tensor is the output ``origin``, only copied and in another shape."""
    node: Any = tensor.grad_fn
    output = tensor.output_nr
    while (found := _origin(node, output)) is not None and found != origin:
        if not _RESHAPING.fullmatch(node.name()) or len(node.next_functions) != 1:
            return False
        node, output = node.next_functions[0]
    return found == origin


def _origin(node: Any, output: int) -> Origin | None:
    number = getattr(node, "_sequence_nr", None)
    return None if number is None else (number(), output)


def is_in_backward() -> bool:
    """Return whether autograd is running: activation checkpointing calls layers a second time there.

    Without it, the second call of a layer counts, which has the same samples.
    """
    current = getattr(torch._C, "_current_graph_task_id", None)
    return current is not None and current() != -1


# Compiled code


def original_of(module: nn.Module) -> nn.Module | None:
    """Return the module that ``torch.compile(module)`` wrapped; ``None`` if ``module`` is no such wrapper.

    The class of wrappers has moved before. Where it is not found, wrappers are known by their attribute ``_orig_mod``.
    """
    wrapper = getattr(getattr(torch, "_dynamo", None), "OptimizedModule", None)
    original = getattr(module, "_orig_mod", None)
    is_wrapper = isinstance(module, wrapper) if isinstance(wrapper, type) else original is not None
    return original if is_wrapper else None


def compiled_parts(model: nn.Module) -> tuple[list[nn.Module], set[int]]:
    """Return the outermost modules that are compiled in place, and the ids of all that are called in compiled code.

    Modules are called in compiled code if a compiled module holds them, if they were compiled in place, or if a Trainer
    compiled the steps of the model. Without what is read here, layers in compiled code may not be heard, which the
    report says.
    """
    outermost: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        is_wrapper = original_of(module) is not None
        is_in_place = getattr(module, "_compiled_call_impl", None) is not None
        if is_in_place and id(module) not in inside:
            outermost.append(module)
        if is_wrapper or is_in_place or vars(module).get("_compiler_ctx") is not None:
            inside |= {id(below) for below in module.modules() if below is not module or not is_wrapper}
    return outermost, inside


def run_eagerly(module: nn.Module, attributes: dict[str, Any]) -> None:
    """Change the ``attributes`` of a module so that it runs in python; change nothing if it is not compiled."""
    if "_compiled_call_impl" in attributes:
        attributes["_compiled_call_impl"] = None
    if isinstance(steps := attributes.get("_compiler_ctx"), Mapping) and "original_forward" in steps:
        attributes["forward"] = steps["original_forward"]
    if (original := original_of(module)) is not None:
        attributes["forward"] = original.__call__


class Interception:
    """Call functions before and after a module that is compiled in place, whose own hooks are part of its code.

    Args:
        module: a module that was compiled by its ``compile()``.
        before: called before it, with module, args and kwargs.
        after: called after it, also after an exception, with module, args and output.
    """

    def __init__(self, module: nn.Module, before: Callable[..., None], after: Callable[..., None]) -> None:
        compiled = module._compiled_call_impl
        assert compiled is not None

        def call(*args: Any, **kwargs: Any) -> Any:
            output = None
            before(module, args, kwargs)
            try:
                output = compiled(*args, **kwargs)
                return output
            finally:
                after(module, args, output)

        self._module = module
        self._compiled = compiled
        self._call = call
        module._compiled_call_impl = call

    def remove(self) -> None:
        """Restore the compiled call of the module."""
        if self._module._compiled_call_impl is self._call:
            self._module._compiled_call_impl = self._compiled


def part_of_a_graph(hook: F) -> F:
    """Stop torch.compile from compiling the hook on its own.

    A compiler that leaves a module to python may compile the module's hook alone. The hook asks first whether it is
    compiled, and cannot tell that from being part of the compiled module. Without this the hook may be compiled on its
    own, which costs time.
    """
    evaluation = getattr(getattr(torch, "_dynamo", None), "eval_frame", None)
    if (skip := getattr(evaluation, "skip_code", None)) is not None:
        skip(hook.__code__)
    return hook


def never_compiled(function: F) -> F:
    """Run ``function`` in python wherever it is called."""
    return torch.compiler.disable(function)  # type: ignore[no-any-return, no-untyped-call]


# In compiled code a hook calls one operator that no compiler looks into, so that it causes no graph break and no guard.

_LISTENERS: list[Listener | None] = []
_PLACES: WeakKeyDictionary[nn.Module, list[int]] = WeakKeyDictionary()


def listen(module: nn.Module, listener: Listener) -> int:
    """Register a listener of ``module``, and return its place, which :data:`tell` takes.

    Code that was compiled with an earlier hook of the module still tells the place of that hook, so a place that was
    left is used again.
    """
    places = _PLACES.setdefault(module, [])
    place = next((place for place in places if _LISTENERS[place] is None), None)
    if place is None:
        place = len(_LISTENERS)
        _LISTENERS.append(None)
        places.append(place)
    _LISTENERS[place] = listener
    return place


def leave(place: int) -> None:
    """Remove the listener at ``place``."""
    _LISTENERS[place] = None


def _tell(activation: Tensor | None, place: int) -> None:
    # A CUDA graph writes to the memory that it recorded at each replay, whatever that memory holds by then.
    is_captured = activation is not None and activation.is_cuda and torch.cuda.is_current_stream_capturing()
    if (listener := _LISTENERS[place]) is not None and not is_captured:
        listener(activation)


tell: Any = torch.library.custom_op(
    "lightning_probes::tell", _tell, mutates_args=(), schema="(Tensor? activation, int place) -> ()"
)
"""Give an activation to the listener at a place."""
tell.register_fake(lambda activation, place: None)
# The operator has no result: without this it would be left out as dead code.
torch.fx.node.has_side_effect(torch.ops.lightning_probes.tell.default)


# Loaders and sharded weights


def another_reader(loader: DataLoader[Any], sampler: Any, batch_sampler: Any) -> DataLoader[Any]:
    """Return a copy of a loader that reads the same data set with other samplers.

    The copy starts workers of its own, which end with each pass, so that an iterator of the loader that is under way,
    and workers that stay, are left alone. Without the private part, workers that stay would be shared.
    """
    own = copy.copy(loader)
    # Set as attributes, these would be refused.
    vars(own).update(sampler=sampler, batch_sampler=batch_sampler, persistent_workers=False, _iterator=None)
    return own


def is_shared_out(model: nn.Module) -> bool:
    """Return whether the weights of a model are shared out among processes (FSDP2), as its parameters show."""
    return any(type(parameter).__name__ == "DTensor" for parameter in model.parameters())


def share_of(parameter: Tensor) -> Tensor:
    """Return what this process holds of a parameter: all of it, or the share of one that is shared out."""
    own = parameter.detach()
    return own.to_local() if hasattr(own, "to_local") else own


def share_out(model: nn.Module) -> None:
    """Give the gathered weights of a model up again, of which each process then holds its share only (FSDP2).

    The outermost module keeps them gathered after a forward without a backward.
    """
    for module in model.modules():
        if callable(reshard := getattr(module, "reshard", None)) and hasattr(module, "set_reshard_after_backward"):
            reshard()


# Lightning


def is_step(module: nn.Module) -> bool:
    """Return whether the ``forward`` of a module stands for the training step at this moment, as under DDP.

    An attribute ``forward`` that is the class's own does not count: Lightning leaves it behind after a step.
    """
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def batches_that_stepped(trainer: Any) -> int | None:
    """Return the step under which loggers show what is logged now; without it, rows have no ``logged_step``.

    The step is the number of batches that stepped; the last batch counts only once its validation is over.
    """
    step = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", None)
    return step if isinstance(step, int) else None


def was_restarted(trainer: Any) -> tuple[bool, bool]:
    """Return whether training was resumed inside an epoch, and whether this was between last batch and validation.

    Without it, a report does not say which point a resumed run lacks.
    """
    loop = trainer.fit_loop
    is_inside = bool(getattr(loop, "restarted_mid_epoch", False))
    return is_inside, is_inside and bool(getattr(loop.epoch_loop, "restarted_on_train_batch_end", False))


def starts_processes(trainer: Any) -> bool:
    """Return whether a Trainer runs a model in processes that it starts itself, as ``ddp_spawn`` does.

    Without it, ``probe()`` ends in an error of Lightning's there, which does not say what to do.
    """
    try:
        from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
    except ImportError:
        return False
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def hide_override(method: F, of: Any) -> F:
    """Hide from Lightning that ``method`` overrides the method ``of`` of a base class.

    A Trainer refuses callbacks with equal state keys before their ``setup`` can say what to do about it. Without this
    Lightning's own message is shown.
    """
    method.__wrapped__ = of  # type: ignore[attr-defined]
    return method


def trainer_of(model: nn.Module) -> Any:
    """Return the Trainer of a LightningModule; ``None`` if it has none, for which its property raises."""
    return getattr(model, "_trainer", None)


@contextmanager
def without_trainers(model: nn.Module) -> Iterator[None]:
    """Hide the Trainers of LightningModules inside this context, so that a copy of a model has no copy of a Trainer."""
    known = [(vars(m), vars(m)["_trainer"]) for m in model.modules() if "_trainer" in vars(m)]
    try:
        for own, _ in known:
            own["_trainer"] = None
        yield
    finally:
        for own, trainer in known:
            own["_trainer"] = trainer


# The public parts of progress bars raise while there is no bar. Callers of these functions catch whatever they raise:
# without the private parts no fit is shown in a bar.


def is_tqdm_bar(callback: Any) -> bool:
    """Return whether a callback has the parts of a ``TQDMProgressBar``."""
    return _has(callback, "is_enabled", "process_position", "init_train_tqdm")


def tqdm_lines(callback: Any) -> list[Any]:
    """Return the existing lines of a ``TQDMProgressBar``; tqdm sets the ``disable`` of a line when it closes it."""
    lines = (callback._train_progress_bar, callback._val_progress_bar, callback._predict_progress_bar)
    return [line for line in lines if line is not None]


def has_tqdm_main_line(callback: Any) -> bool:
    """Return whether a ``TQDMProgressBar`` shows the line of training."""
    line = callback._train_progress_bar
    return line is not None and not line.disable


def is_rich_bar(callback: Any) -> bool:
    """Return whether a callback has the parts of a ``RichProgressBar``."""
    return _has(callback, "is_enabled", "progress", "theme", "_init_progress", "_stop_progress")


def has_rich_display(callback: Any) -> bool:
    """Return whether a ``RichProgressBar`` displays something, which it does not between two stages of a Trainer."""
    return callback.progress is not None and not callback._progress_stopped


def start_rich_display(callback: Any) -> None:
    """Start the display of a ``RichProgressBar``; the next stage of a Trainer starts a new one in any case."""
    callback._init_progress(callback.trainer)


def stop_rich_display(callback: Any) -> None:
    """End the display of a ``RichProgressBar``."""
    callback._stop_progress()


def forget_rich_height(live: Any) -> None:
    """Let a live display of rich begin where the cursor is."""
    live._live_render._shape = None


def _has(holder: Any, *parts: str) -> bool:
    return all(hasattr(holder, part) for part in parts)


# Operations


try:
    from torch.utils._python_dispatch import TorchDispatchMode as _DispatchMode
    from torch.utils._python_dispatch import _get_current_dispatch_mode as _current_mode
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as _modes_now
except ImportError:
    _DispatchMode = None  # type: ignore[assignment, misc]


class OperationMode:
    """Call a function after every operation of torch that runs inside this context, in this thread.

    The operations themselves run as ever. Where torch has no such mode, the function is never called. Several contexts
    may be left in any order: torch knows one mode for all of them, since modes can be left in one order only.

    Args:
        follow: takes the operation's name, whether it writes to its arguments, its arguments, keyword arguments and
            output, and the operation itself.
    """

    def __init__(self, follow: Callable[[str, bool, tuple[Any, ...], dict[str, Any], Any, Any], None]) -> None:
        self._follow = follow

    @property
    def is_known(self) -> bool:
        """Return whether this version of torch has such a mode."""
        return _DispatchMode is not None

    def start(self) -> None:
        """Enter the context."""
        if _DispatchMode is None:
            return
        _following.functions[self] = self._follow
        # Whoever leaves modes in another order than they were entered may have left this one too.
        if _following.mode is None or _following.mode not in _modes_now():
            _following.mode = _mode_of(_following.functions)
            _following.mode.__enter__()

    def stop(self) -> None:
        """Leave the context; below another mode, which alone can be left, torch's own goes on and calls nothing."""
        _following.functions.pop(self, None)
        if _following.mode is not None and not _following.functions and _current_mode() is _following.mode:
            _following.mode.__exit__(None, None, None)  # type: ignore[union-attr]
            _following.mode = None


class _Following(threading.local):
    """Hold what is called after an operation in this thread, and the mode of torch that calls it."""

    def __init__(self) -> None:
        self.functions: dict[OperationMode, Callable[..., None]] = {}
        self.mode: Any = None


_following = _Following()


def _mode_of(functions: Mapping[Any, Callable[..., None]]) -> Any:
    class Mode(_DispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            output = operation(*args, **kwargs)
            schema = getattr(operation, "_schema", None)
            if schema is not None:
                for follow in list(functions.values()):
                    follow(schema.name, schema.is_mutable, args, kwargs, output, operation)
            return output

    return Mode()  # type: ignore[no-untyped-call]


def has_compiled() -> bool:
    """Return whether anything was given to ``torch.compile`` in this process; true where that cannot be known.

    A function whose first call runs under an :class:`OperationMode` would never be compiled afterwards.
    """
    evaluation = getattr(sys.modules.get("torch._dynamo"), "eval_frame", None)
    if evaluation is None:
        return "torch._dynamo" in sys.modules
    backends = getattr(evaluation, "cached_backends", None)
    return backends is None or any(backend is not None for backend in backends.values())


# Metrics


def states_of(metric: Any) -> dict[str, Any]:
    """Return ``{state: how torchmetrics reduces it over processes}`` of a metric, without those of metrics inside it.

    Its own exchange is a collective that hangs where a process was not fed. Without this, metrics are of one process.
    """
    return dict(getattr(metric, "_reductions", {}))


def mark_as_fed(metric: Any) -> None:
    """Make a metric whose states were put in know that it has seen something, or it would warn when it computes."""
    metric._update_count = max(getattr(metric, "_update_count", 0), 1)
