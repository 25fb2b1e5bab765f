"""Reach what torch and Lightning do not promise to keep: all of it is here, and only here.

Each entry says why nothing public serves, and what is lost where a version no longer has it: a feature, never a run.
``tests/test_torch_internals.py`` names each of them, so that an upgrade shows what it took.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

# Lightning imports the same module: the day it goes, Lightning goes first. There is no public walker over containers.
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

__all__ = ["tree_flatten", "tree_leaves", "tree_map", "tree_unflatten"]

F = TypeVar("F", bound=Callable[..., Any])

Listener = Callable[[Tensor | None], None]
"""Name what is told the first floating-point tensor of a module's output, or ``None`` if it has none."""

# Modules

LOSSES: tuple[type, ...] = tuple(filter(None, [getattr(nn.modules.loss, "_Loss", None)]))
"""List the base classes of torch's losses. Without them losses are known by their names, which end in "Loss"."""

DROPOUTS: tuple[type, ...] = tuple(filter(None, [getattr(nn.modules.dropout, "_DropoutNd", None)]))
"""List the base classes of torch's dropout. Without them dropout is known by its names, which begin with "Drop"."""

HOOK_ATTRIBUTES = frozenset(name for name in vars(nn.Module()) if "hooks" in name)
"""List the attributes in which a module keeps its hooks: a handle finds its hook in the dict that it was given."""


WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
"""Name the path segments that compilation, FSDP, activation checkpointing and Lightning's strategies insert. Where a
wrapper has another name it stands in the names of layers."""


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was written to, as far as that is counted.

    Without the count a tensor that was written to between two calls of a step is taken for the one that it was.
    """
    return 0 if tensor.is_inference() else getattr(tensor, "_version", 0)


def is_in_backward() -> bool:
    """Return whether autograd is running: activation checkpointing calls layers a second time there.

    Without it the second call of a layer counts, which has the same samples.
    """
    current = getattr(torch._C, "_current_graph_task_id", None)
    return current is not None and current() != -1


# Compiled code


def original_of(module: nn.Module) -> nn.Module | None:
    """Return the module that ``torch.compile(module)`` wrapped; ``None`` if ``module`` is no such wrapper.

    The class of wrappers has moved before; where it is not found, they are known by what they hold, ``_orig_mod``.
    """
    wrapper = getattr(getattr(torch, "_dynamo", None), "OptimizedModule", None)
    original = getattr(module, "_orig_mod", None)
    is_wrapper = isinstance(module, wrapper) if isinstance(wrapper, type) else original is not None
    return original if is_wrapper else None


def compiled_parts(model: nn.Module) -> tuple[list[nn.Module], set[int]]:
    """Return the outermost modules that are compiled in place, and the ids of all that are called in compiled code.

    In compiled code are what a compiled module holds, itself too if it was compiled in place, and all of a model whose
    steps a Trainer compiled. Where torch or Lightning keep it elsewhere, layers in compiled code may not be heard,
    which the report says.
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
    """Change the own ``attributes`` of a compiled module so that it runs in python; nothing if it is not compiled."""
    if "_compiled_call_impl" in attributes:
        attributes["_compiled_call_impl"] = None
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
        """Put back what the module had."""
        if self._module._compiled_call_impl is self._call:
            self._module._compiled_call_impl = self._compiled


def part_of_a_graph(hook: F) -> F:
    """Keep a compiler from taking up a hook alone where it leaves the hook's module to python.

    The hook asks first whether it is compiled, and could not tell one from the other. Without this it may be compiled
    on its own, which costs time.
    """
    evaluation = getattr(getattr(torch, "_dynamo", None), "eval_frame", None)
    if (skip := getattr(evaluation, "skip_code", None)) is not None:
        skip(hook.__code__)
    return hook


def never_compiled(function: F) -> F:
    """Run ``function`` in python wherever it is called."""
    return torch.compiler.disable(function)  # type: ignore[no-any-return, no-untyped-call]


# One operator that no compiler looks into stands in compiled code for a hook, in the place of a graph break or a guard.

_LISTENERS: list[Listener | None] = []
_PLACES: WeakKeyDictionary[nn.Module, list[int]] = WeakKeyDictionary()


def listen(module: nn.Module, listener: Listener) -> int:
    """Return a place for a listener of ``module``, to be given to :data:`tell`.

    Code that was compiled with an earlier hook of the module goes on telling the place of that hook: it is taken again.
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
    """Let nobody listen at ``place`` any more."""
    _LISTENERS[place] = None


def _tell(activation: Tensor | None, place: int) -> None:
    # What is recorded in a CUDA graph is written again at each replay, wherever that memory belongs then.
    is_captured = activation is not None and activation.is_cuda and torch.cuda.is_current_stream_capturing()
    if (listener := _LISTENERS[place]) is not None and not is_captured:
        listener(activation)


tell: Any = torch.library.custom_op(
    "lightning_probes::tell", _tell, mutates_args=(), schema="(Tensor? activation, int place) -> ()"
)
"""Tell the listener at a place an activation."""
tell.register_fake(lambda activation, place: None)
# The operator has no result: without this it would be left out as dead code.
torch.fx.node.has_side_effect(torch.ops.lightning_probes.tell.default)


# Lightning


def is_step(module: nn.Module) -> bool:
    """Return whether a module's ``forward`` stands for the training step at this moment, as under DDP.

    Lightning leaves the class's own forward behind as an attribute.
    """
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def batches_that_stepped(trainer: Any) -> int | None:
    """Return the step under which loggers show what is logged now; without it rows have no ``logged_step``.

    It counts batches that stepped, and counts the last one only once its validation is over.
    """
    step = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", None)
    return step if isinstance(step, int) else None


def was_restarted(trainer: Any) -> tuple[bool, bool]:
    """Return whether training was resumed inside an epoch, and whether between its last batch and its validation.

    Without it a report does not say which point a resumed run lacks.
    """
    loop = trainer.fit_loop
    is_inside = bool(getattr(loop, "restarted_mid_epoch", False))
    return is_inside, is_inside and bool(getattr(loop.epoch_loop, "restarted_on_train_batch_end", False))


def starts_processes(trainer: Any) -> bool:
    """Return whether a Trainer runs a model in processes that it starts itself, as ``ddp_spawn`` does.

    Without it ``probe()`` ends in an error of Lightning's there, not in one that says what to do.
    """
    try:
        from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
    except ImportError:
        return False
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def hide_override(method: F, of: Any) -> F:
    """Let Lightning take ``method`` for no override of the method ``of`` of a base class.

    A Trainer refuses callbacks with equal state keys before their ``setup`` can say what to do about it. Without this
    Lightning's own message is shown.
    """
    method.__wrapped__ = of  # type: ignore[attr-defined]
    return method


def trainer_of(model: nn.Module) -> Any:
    """Return the Trainer that a LightningModule knows; ``None`` if it knows none, where its property would raise."""
    return getattr(model, "_trainer", None)


@contextmanager
def without_trainers(model: nn.Module) -> Iterator[None]:
    """Take away the Trainer that LightningModules know meanwhile: a copy of a model must not hold a copy of it."""
    known = [(vars(m), vars(m)["_trainer"]) for m in model.modules() if "_trainer" in vars(m)]
    try:
        for own, _ in known:
            own["_trainer"] = None
        yield
    finally:
        for own, trainer in known:
            own["_trainer"] = trainer


# Progress bars: their public parts raise where there is no bar yet. Whatever these functions raise is caught by their
# caller: without the private parts no fit is shown in a bar.


def is_tqdm_bar(callback: Any) -> bool:
    """Return whether a callback has the parts of a ``TQDMProgressBar``."""
    return _has(callback, "is_enabled", "process_position", "init_train_tqdm")


def tqdm_lines(callback: Any) -> list[Any]:
    """Return the lines of a ``TQDMProgressBar`` that there are; tqdm sets their ``disable`` when it closes them."""
    lines = (callback._train_progress_bar, callback._val_progress_bar, callback._predict_progress_bar)
    return [line for line in lines if line is not None]


def has_tqdm_main_line(callback: Any) -> bool:
    """Return whether the line of training is shown by a ``TQDMProgressBar``."""
    line = callback._train_progress_bar
    return line is not None and not line.disable


def is_rich_bar(callback: Any) -> bool:
    """Return whether a callback has the parts of a ``RichProgressBar``."""
    return _has(callback, "is_enabled", "progress", "theme", "_init_progress", "_stop_progress")


def has_rich_display(callback: Any) -> bool:
    """Return whether a ``RichProgressBar`` displays something, which it does not between two stages of a Trainer."""
    return callback.progress is not None and not callback._progress_stopped


def start_rich_display(callback: Any) -> None:
    """Let a ``RichProgressBar`` display; the next stage of a Trainer begins a new display in any case."""
    callback._init_progress(callback.trainer)


def stop_rich_display(callback: Any) -> None:
    """End the display of a ``RichProgressBar``."""
    callback._stop_progress()


def forget_rich_height(live: Any) -> None:
    """Let a live display of rich begin where the cursor is."""
    live._live_render._shape = None


def _has(holder: Any, *parts: str) -> bool:
    return all(hasattr(holder, part) for part in parts)
