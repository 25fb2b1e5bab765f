"""Call the ``forward`` of a module on a batch: on its input, and on what it takes of the batch by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from lightning_probes.network.batches import describe, parts_of, pick
from lightning_probes.options import Where


class Caller:
    """Call a module on batches.

    An input that is a mapping is given as keywords if the module's ``forward`` has parameters of such names. Any other
    input comes with the parts beside it, such as an ``attention_mask``, that ``forward`` has parameters for, but
    without the targets: a network without its mask would be another network.

    Args:
        model: the module.
        input: where in a batch the module's input is; ``None`` if it is nowhere.
        target: where in a batch the targets are, or those of each of several tasks by name.

    Attributes:
        given: names of the parts of batches that came with the input, in the order of the batch.
    """

    def __init__(self, model: nn.Module, input: Where | None, target: Where | Mapping[str, Where]) -> None:
        self.given: dict[str, None] = {}
        self._model = model
        self._input = input
        self._places = list(target.values()) if isinstance(target, Mapping) else [target]
        self._names, self._takes_any = _parameters(model)

    @property
    def note(self) -> str:
        """Return which parts of batches came with the input, as a note for the report; empty if none did."""
        return f"{type(self._model).__name__} is given {', '.join(self.given)} of the batch too" if self.given else ""

    def __call__(self, batch: Any) -> None:
        """Call the module on a batch.

        Raises:
            Exception: as for :meth:`arguments`, and whatever the module raises.
        """
        args, kwargs = self.arguments(batch)
        self._model(*args, **kwargs)

    def arguments(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the positional and keyword arguments with which the module is called on a batch.

        Raises:
            TypeError: no input was named.
            LookupError: the batch has no such input.
        """
        if self._input is None:
            raise TypeError(
                f"input: {type(self._model).__name__} is called on its input, and None says of no part of the batch "
                f"that it is the input; the batch is {describe(batch)}"
            )
        value = pick(batch, self._input, "input")
        if isinstance(value, Mapping):
            has_names = all(isinstance(key, str) for key in value)
            if has_names and (self._takes_any or any(key in self._names for key in value)):
                return (), dict(value)
            return (value,), {}  # It takes a mapping as it is.
        beside = self._beside(value, batch)
        name = next((key for key, part in beside.items() if part is value and key in self._names), None)
        # Without a parameter of its name the input is the first argument.
        args = () if name is not None else (value,)
        taken = {name, *self._names[: len(args)]}
        targets = self._targets_of(batch)
        further = {
            key: part
            for key, part in beside.items()
            if key in self._names
            and key not in taken
            and key not in self._places
            and not any(_shares(part, x) for x in targets)
        }
        self.given |= dict.fromkeys(further)
        return args, {**further, **({} if name is None else {name: value})}

    def _beside(self, value: Any, batch: Any) -> dict[str, Any]:
        """Return the named parts of the batch, or of the part of it, that the input is one of."""
        for part in (batch, *parts_of(batch).values()):
            named = {key: inner for key, inner in parts_of(part).items() if isinstance(key, str)}
            if any(inner is value for inner in named.values()):
                return named
        return {}

    def _targets_of(self, batch: Any) -> list[Any]:
        found = []
        for where in self._places:
            with suppress(Exception):  # The reader of labels tells of it, if it is a mistake.
                found.append(pick(batch, where, "target"))
        return found


def objection(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Say why the ``forward`` of a module cannot be called with some arguments; empty if its signature allows it."""
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        return f"{type(model).__name__}.forward cannot be called on the input of a batch: {error}"
    except ValueError:  # TorchScript has no signature.
        pass
    return ""


def _parameters(model: nn.Module) -> tuple[list[str], bool]:
    """Return the names that a module's ``forward`` takes arguments by, and whether it takes keywords of any name."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # TorchScript has no signature.
        return [], False
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in parameters if p.kind in named], any(p.kind is p.VAR_KEYWORD for p in parameters)


def _shares(part: Any, target: Any) -> bool:
    """Return whether a part of a batch is the targets, or holds them in its memory."""
    if not (isinstance(part, Tensor) and isinstance(target, Tensor)) or part.is_nested or target.is_nested:
        return part is target
    address = part.untyped_storage().data_ptr()
    return address != 0 and address == target.untyped_storage().data_ptr()
