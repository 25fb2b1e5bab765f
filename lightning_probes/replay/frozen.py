"""Freeze a network so that running it leaves no trace: eval mode, no gradients, and everything put back afterwards."""

from __future__ import annotations

import copy
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_probes.network.hooks import HEARD_BY, ActivationRecorder
from lightning_probes.network.torch_internals import HOOK_ATTRIBUTES, run_eagerly

_MANY = 1000
"""Bound the items of a container that are copied with it: a container of more is a data set, not a state."""

_MOST = 10_000
"""Bound the objects among which random generators are looked for."""


@contextmanager
def _isolated() -> Iterator[None]:
    """Restore the states of the global random generators, also after an exception; CUDA's only if it has any yet."""
    # isolate_rng restores the states only if nothing is raised inside of it, so it is closed here and not left by an
    # exception.
    rng = ExitStack()
    rng.enter_context(isolate_rng(include_cuda=torch.cuda.is_initialized()))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        rng.close()


@contextmanager
def seeded() -> Iterator[None]:
    """Seed the global random generators alike in all processes, and restore their states, also after an exception."""
    with _isolated():
        torch.default_generator.manual_seed(0)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.manual_seed_all(0)
        random.seed(0)
        if (numpy := sys.modules.get("numpy")) is not None:
            numpy.random.seed(0)
        yield


@contextmanager
def unmoved(*objects: Any) -> Iterator[None]:
    """Restore, also after an exception, the random generators that objects hold, down through their attributes."""
    generators = [restore for value in _held_by(objects) for restore in _restoring(value)]
    try:
        yield
    finally:
        for restore in generators:
            restore()


def _held_by(objects: Any) -> list[Any]:
    """Return what objects hold, down through attributes and containers, but not what large containers hold."""
    found: dict[int, Any] = {}
    waiting = deque([objects])  # What is near comes first.
    while waiting and len(found) < _MOST:
        value = waiting.popleft()
        if id(value) in found or isinstance(value, (type, ModuleType, Tensor, str, bytes, int, float, type(None))):
            continue
        found[id(value)] = value
        if isinstance(value, Mapping) and len(value) <= _MANY:
            waiting += value.values()
        elif isinstance(value, (list, tuple, set)) and len(value) <= _MANY:
            waiting += value
        elif isinstance(value, partial):
            waiting += [value.func, *value.args, *value.keywords.values()]
        else:
            waiting += getattr(value, "__dict__", {}).values()
            waiting.append(getattr(value, "__self__", None))
    return list(found.values())


@contextmanager
def frozen(model: nn.Module, heard_by: ActivationRecorder | None = None) -> Iterator[None]:
    """Keep the network in eval mode without gradients; restore it afterwards, also after an exception.

    Restored are the ``training`` flag of each submodule; the states of the random generators (torch on the CPU and
    CUDA, numpy, python, and those that modules hold); and the attributes of modules, with their contents for buffers,
    other tensors, arrays and containers. Modules in lists and dicts that are not registered are restored as well. Hooks
    that are added or removed inside stay so. ``self.log`` of a LightningModule does nothing inside; compiled submodules
    run eagerly, so that hooks in them fire.

    Parameters are guarded by :class:`~lightning_probes.replay.replayer.Replay`, and are not guarded if the network is
    called in another way.

    Args:
        model: the network.
        heard_by: the only recorder that listens to what is run inside, for a run outside of all steps.
    """
    with _isolated():
        modules = _all_modules(model)
        saved = [(vars(module), dict(vars(module))) for module in modules]
        generators = [restore for module in modules for value in vars(module).values() for restore in _restoring(value)]
        try:
            memo: dict[int, Any] = {}
            with torch.no_grad():
                for module in modules:
                    _stand_in(module, memo)
                    if heard_by is not None:
                        vars(module)[HEARD_BY] = heard_by
                yield
        finally:
            for restore in generators:
                restore()
            for own, attributes in saved:
                own.update(attributes)
                for name in own.keys() - attributes.keys():
                    del own[name]


def _stand_in(module: nn.Module, memo: dict[int, Any]) -> None:
    """Put copies in the place of a module's attributes that its forward may write to."""
    own = vars(module)
    for name, value in own.items():
        if name not in HOOK_ATTRIBUTES:
            own[name] = _copied(value, memo)
    # The flag is written into the dict, since users override train(), eval() and setattr.
    own["training"] = False
    if hasattr(type(module), "log_dict"):
        own["log"] = own["log_dict"] = _do_nothing
    run_eagerly(module, own)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """Copy what a forward may write to, down through containers; return everything else as it is."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, Tensor):
        if isinstance(value, nn.Parameter) or is_lazy(value):
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
    """Return the modules of ``model`` and those in containers among their attributes, which are not registered."""
    found: dict[int, nn.Module] = {}
    waiting: list[Any] = [model]
    while waiting:
        value = waiting.pop()
        if isinstance(value, nn.Module):
            if id(value) not in found:
                found[id(value)] = value
                waiting += [part for name, part in vars(value).items() if name not in HOOK_ATTRIBUTES]
        elif type(value) in (list, tuple, dict):
            parts = value.values() if type(value) is dict else value
            waiting += [part for part in parts if isinstance(part, (nn.Module, list, tuple, dict))]
    return list(found.values())


def _restoring(value: Any) -> list[Callable[[], Any]]:
    """Return functions that restore the present state of a random generator; none for other values."""
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
