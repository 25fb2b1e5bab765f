"""A network that leaves no trace of having been run: eval mode, no gradients, and everything as it was afterwards."""

from __future__ import annotations

import copy
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_HOOKS = {name for name in vars(nn.Module()) if "hooks" in name}

_MANY = 1000
"""Things in a container beyond which it is copied, but not what is in it: a data set, not a state."""


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The network in eval mode without gradients; afterwards as it was before, also after an exception.

    What comes back: every submodule's ``training`` flag, one by one; the states of the random generators (torch on the
    CPU and CUDA, numpy, python, and those that modules hold); the modules' attributes, what they were and, for buffers,
    other tensors, arrays and containers, what was in them. Modules that are held in lists and dicts without being
    registered count as well. Hooks that are added or removed inside stay so. ``self.log`` of a LightningModule does
    nothing inside; compiled submodules run eagerly, so that hooks in them fire.

    Parameters are guarded by :class:`~lightning_probes.replay.replayer.Replay`, and by nothing when the network is
    called in another way.
    """
    rng = _rng_states()
    modules = _all_modules(model)
    saved = [(vars(module), dict(vars(module))) for module in modules]
    generators = [restore for module in modules for value in vars(module).values() for restore in _restoring(value)]
    try:
        memo: dict[int, Any] = {}
        with torch.no_grad():
            for module in modules:
                _stand_in(module, memo)
            yield
    finally:
        for restore in generators:
            restore()
        for own, attributes in saved:
            own.update(attributes)
            for name in own.keys() - attributes.keys():
                del own[name]
        _set_rng_states(rng)


def _stand_in(module: nn.Module, memo: dict[int, Any]) -> None:
    """Put copies in the place of a module's attributes that its forward may write to. Undone from a saved dict."""
    own = vars(module)
    for name, value in own.items():
        # A handle finds its hook in the dict that it was given: the hooks' dicts stay what they are.
        if name not in _HOOKS:
            own[name] = _copied(value, memo)
    # Into the dict and not by train(), eval() or setattr, which users override.
    own["training"] = False
    if hasattr(type(module), "log_dict"):
        own["log"] = own["log_dict"] = _do_nothing
    if "_compiled_call_impl" in own:
        own["_compiled_call_impl"] = None
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and isinstance(module, dynamo.OptimizedModule):
        own["forward"] = module._orig_mod.__call__


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """A copy of what a forward may write to, down through containers; everything else as it is."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, Tensor):
        if isinstance(value, nn.Parameter):
            return value
        memo[id(value)] = found = value.clone()
        return found
    if isinstance(value, (list, dict, set, deque)) or type(value).__name__ == "ndarray":
        # Shallow copies keep the kind: a defaultdict, the length of a deque, the order of an OrderedDict.
        memo[id(value)] = found = copy.copy(value)
        if len(value) > _MANY:
            return found
        if isinstance(found, dict):
            for key, part in value.items():
                found[key] = _copied(part, memo)
        elif isinstance(found, (list, deque)):
            for i, part in enumerate(value):
                found[i] = _copied(part, memo)
        return found
    return value


def _all_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of ``model`` and those in containers among their attributes, which are not registered."""
    found: dict[int, nn.Module] = {}
    waiting: list[Any] = [model]
    while waiting:
        value = waiting.pop()
        if isinstance(value, nn.Module):
            if id(value) not in found:
                found[id(value)] = value
                waiting += [part for name, part in vars(value).items() if name not in _HOOKS]
        elif type(value) in (list, tuple):
            waiting += [part for part in value if isinstance(part, (nn.Module, list, tuple, dict))]
        elif type(value) is dict:
            waiting += [part for part in value.values() if isinstance(part, (nn.Module, list, tuple, dict))]
    return list(found.values())


def _restoring(value: Any) -> list[Callable[[], Any]]:
    """What puts a random generator back into the state that it has now."""
    if isinstance(value, torch.Generator):
        return [partial(value.set_state, value.get_state())]
    if isinstance(value, random.Random):
        return [partial(value.setstate, value.getstate())]
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.random.RandomState):
        return [partial(value.set_state, value.get_state())]
    if numpy is not None and isinstance(value, numpy.random.Generator):
        return [partial(setattr, value.bit_generator, "state", value.bit_generator.state)]
    return []


def _do_nothing(*args: Any, **kwargs: Any) -> None: ...


def _rng_states() -> dict[str, Any]:
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["cuda"] = torch.cuda.get_rng_state_all()
    if (numpy := sys.modules.get("numpy")) is not None:
        states["numpy"] = numpy.random.get_state()
    return states


def _set_rng_states(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])
    if "numpy" in states:
        sys.modules["numpy"].random.set_state(states["numpy"])
