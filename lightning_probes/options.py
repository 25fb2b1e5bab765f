"""What may be written for an argument, and what is said where something else was."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lightning_probes.network.batches import Where

Patterns = str | list[str]
Layout = Literal["tokens", "channels"]
Calls = Literal["last", "first", "mean"]
Reduction = Literal["pool", "subset", "projection"]


def whole(argument: str, value: Any, least: int = 1) -> int:
    """``value`` if it is an integer of at least ``least``, 1 or 0.

    Raises:
        TypeError, ValueError: naming the argument and what was given.
    """
    expected = "a positive integer" if least else "an integer of at least 0"
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{argument}: expected {expected}, found {value!r}")
    if value < least:
        raise ValueError(f"{argument}: expected {expected}, found {value}")
    return value


def flag(argument: str, value: Any) -> bool:
    """``value`` if it is true or false.

    Raises:
        TypeError: naming the argument and what was given.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{argument}: expected true or false, found {value!r}")
    return value


def positive_float(argument: str, value: Any) -> float:
    """``value`` if it is a positive finite number.

    Raises:
        TypeError, ValueError: naming the argument and what was given.
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{argument}: expected a positive number, found {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"{argument}: expected a positive number, found {value}")
    return float(value)


def patterns(argument: str, value: Any) -> list[str] | None:
    """``value`` as a list, or ``None``.

    Raises:
        TypeError, ValueError: naming the argument and what was given.
    """
    if value is None:
        return None
    found = [value] if isinstance(value, str) else list(value) if is_list(value) else None
    if found is None or not all(isinstance(pattern, str) for pattern in found):
        hint = f"; write {list(value)!r}" if isinstance(value, tuple) else ""
        raise TypeError(f"{argument}: expected a pattern or a list of patterns, found {value!r}{hint}")
    if not found and argument == "layers":
        raise ValueError("layers: an empty list selects nothing; None selects a sensible few")
    return found


def is_list(value: Any) -> bool:
    """Return whether ``value`` is a list, also one of omegaconf; a tuple is none, as types and YAML have it."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, tuple))


def layouts(value: Any) -> dict[str, Layout]:
    """``value`` as a dict of patterns and kinds.

    Raises:
        ValueError: naming what was given.
    """
    kinds = ("tokens", "channels")
    if not isinstance(value, Mapping) or not all(isinstance(k, str) and v in kinds for k, v in value.items()):
        raise ValueError(f"layout: expected {{pattern: 'tokens' or 'channels'}}, found {value!r}")
    return dict(value)


def calls_of(value: Any) -> Calls:
    """``value`` if it says which of several calls of a layer counts.

    Raises:
        ValueError: naming what was given.
    """
    if value not in ("last", "first", "mean"):
        raise ValueError(f"calls: expected 'last', 'first' or 'mean', found {value!r}")
    return value  # type: ignore[no-any-return]


def reduction_of(value: Any) -> Reduction:
    """``value`` if it says how activations become features.

    Raises:
        ValueError: naming what was given.
    """
    if value not in ("pool", "subset", "projection"):
        raise ValueError(f"reduction: expected 'pool', 'subset' or 'projection', found {value!r}")
    return value  # type: ignore[no-any-return]


def one_of(argument: str, value: Any, choices: Sequence[str]) -> str:
    """Return ``value`` if it is one of ``choices``.

    Raises:
        ValueError: naming the argument, what was given, the nearest choice and all of them.
    """
    if value in choices:
        return str(value)
    near = difflib.get_close_matches(str(value), choices, 1, 0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{argument}: expected one of {', '.join(map(repr, choices))}, found {value!r}{hint}")


def where(argument: str, value: Any) -> Where:
    """``value`` if it is an index, a key or a function.

    Raises:
        TypeError: naming the argument and what was given.
    """
    if isinstance(value, bool) or not (isinstance(value, (int, str)) or callable(value)):
        raise TypeError(f"{argument}: expected an index, a key or a callable, found {value!r}")
    return value  # type: ignore[no-any-return]


def first_of(keys: Sequence[str], most: int = 3) -> str:
    """The first few, and how many more there are."""
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")
