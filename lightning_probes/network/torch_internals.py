"""Hooks in compiled code: one operator that no compiler looks into, in the place of a graph break or a guard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

F = TypeVar("F", bound=Callable[..., Any])

Listener = Callable[[Tensor | None], None]
"""Gets the first float tensor of a module's output, if there is one."""

_LISTENERS: list[Listener | None] = []
_PLACES: WeakKeyDictionary[nn.Module, list[int]] = WeakKeyDictionary()


def listen(module: nn.Module, listener: Listener) -> int:
    """A place for a listener of ``module``, to be given to :func:`tell`.

    Code that was compiled with an earlier hook of the module goes on telling the place of that one: it is taken again.
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
    """Nobody listens there any more."""
    _LISTENERS[place] = None


def _tell(activation: Tensor | None, place: int) -> None:
    # What is recorded in a CUDA graph is written again at each replay, wherever that memory belongs then.
    is_captured = activation is not None and activation.is_cuda and torch.cuda.is_current_stream_capturing()
    if (listener := _LISTENERS[place]) is not None and not is_captured:
        listener(activation)


tell: Any = torch.library.custom_op(
    "lightning_probes::tell", _tell, mutates_args=(), schema="(Tensor? activation, int place) -> ()"
)
tell.register_fake(lambda activation, place: None)
# It has no result: without this it would be left out as dead code.
torch.fx.node.has_side_effect(tell._opoverload)


def part_of_a_graph(hook: F) -> F:
    """``hook``, which asks first whether it is compiled, and never is but as a part of a module's graph.

    Where a compiler leaves a module to python it would take up the hook alone, which could not tell one from the other.
    """
    if (skip := getattr(torch._dynamo.eval_frame, "skip_code", None)) is not None:
        skip(hook.__code__)
    return hook


def never_compiled(function: F) -> F:
    """``function``, run in python wherever it is called."""
    return torch.compiler.disable(function)  # type: ignore[no-any-return, no-untyped-call]


class Interception:
    """Calls of a module that is compiled in place, seen from outside: its own hooks are part of the compiled code.

    Args:
        module: compiled by its ``compile()``.
        before: called before, with module, args and kwargs.
        after: called after, also after an exception, with module, args and output.
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

        self._module, self._compiled, self._call = module, compiled, call
        module._compiled_call_impl = call

    def remove(self) -> None:
        """The module as it was."""
        if self._module._compiled_call_impl is self._call:
            self._module._compiled_call_impl = self._compiled


def compiled_parts(model: nn.Module) -> tuple[list[nn.Module], set[int]]:
    """The outermost modules that are compiled in place, and the ids of all whose calls are inside of compiled code.

    Inside are what a compiled module holds, itself too if it was compiled in place, and all of a model whose steps a
    Trainer compiled.
    """
    outermost: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        is_wrapper = isinstance(module, torch._dynamo.OptimizedModule)
        is_in_place = getattr(module, "_compiled_call_impl", None) is not None
        if is_in_place and id(module) not in inside:
            outermost.append(module)
        if is_wrapper or is_in_place or vars(module).get("_compiler_ctx") is not None:
            inside |= {id(below) for below in module.modules() if below is not module or not is_wrapper}
    return outermost, inside
