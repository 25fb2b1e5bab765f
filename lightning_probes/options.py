"""Define and check what users may write: an option is one entry here for callback, ``probe()`` and command line."""

from __future__ import annotations

import difflib
import inspect
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypedDict, TypeVar, get_args, get_type_hints

import torchmetrics
from torchmetrics import Metric

T = TypeVar("T")

Where = int | Callable[[Any], Any] | str
"""Locate a part of a batch by an index, a key or attribute (one level of nesting is searched) or a function of it."""
Axes = Literal["tokens", "channels", "channels_last"]
"""Say which dimension of an activation holds features, and whether it is averaged over the others or pooled."""
RowLayout = Literal["time_first", "parts", "views"]
"""Say which rows of an activation belong to which sample."""
Layout = Literal[Axes, RowLayout]
Calls = Literal["first", "last", "mean"]
Reduction = Literal["pool", "subset", "projection"]
TaskKind = Literal["classification", "multilabel", "regression"]
Tokens = Literal["mean", "first", "last"]
"""Say how the tokens of a sample become its features: their mean, or one of them."""

EveryNEpochs = int | Literal["auto"]

ATTENTION_MASK = "attention_mask"
"""Name the key of the token mask in batches of Hugging Face; other batches may lack it."""


def whole(argument: str, value: Any, least: int = 1, *, also: str = "") -> int:
    """Return ``value`` if it is an integer of at least ``least``, which is 1 or 0.

    Args:
        argument: name of the user's argument, for the message.
        value: what was given.
        least: smallest integer that is allowed.
        also: word that the caller takes as well, for the message; empty if there is none.

    Raises:
        TypeError, ValueError: ``value`` is something else; the message names the argument and what was given.
    """
    expected = ("a positive integer" if least else "an integer of at least 0") + (f" or {also!r}" if also else "")
    if also and isinstance(value, str):
        raise ValueError(f"{argument}: expected {expected}, found {value!r}")
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{argument}: expected {expected}, found {value!r}")
    if value < least:
        raise ValueError(f"{argument}: expected {expected}, found {value}")
    return value


def flag(argument: str, value: Any) -> bool:
    """Return ``value`` if it is true or false.

    Raises:
        TypeError: ``value`` is something else; the message names the argument and what was given.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{argument}: expected true or false, found {value!r}")
    return value


def positive_float(argument: str, value: Any) -> float:
    """Return ``value`` if it is a positive finite number.

    Raises:
        TypeError, ValueError: ``value`` is something else; the message names the argument and what was given.
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{argument}: expected a positive number, found {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"{argument}: expected a positive number, found {value}")
    return float(value)


def patterns(argument: str, value: Any) -> list[str] | None:
    """Return ``value`` as a list of patterns; ``None`` stays ``None``.

    Raises:
        TypeError, ValueError: ``value`` is something else; the message names the argument and what was given.
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
    """Return whether ``value`` is a list, which may be omegaconf's; a tuple is no list, as in type hints and YAML."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, tuple))


def layouts(argument: str, value: Any) -> dict[str, Layout]:
    """Return ``value`` as ``{pattern: kind}``; empty for ``None``.

    Raises:
        ValueError: ``value`` is something else; the message has what was given.
    """
    kinds = get_args(Layout)
    value = {} if value is None else value
    if not isinstance(value, Mapping) or not all(isinstance(k, str) and v in kinds for k, v in value.items()):
        raise ValueError(f"{argument}: expected {{pattern: {_or(kinds)}}}, found {value!r}")
    return dict(value)


def token_kinds(argument: str, value: Any) -> Tokens | dict[str, Tokens]:
    """Return ``value`` if it is a way to reduce tokens, or a mapping of layer patterns to these.

    Raises:
        ValueError: ``value`` is something else; the message names the argument and what was given.
    """
    if not isinstance(value, Mapping):
        return one_of(argument, value, get_args(Tokens))  # type: ignore[return-value]
    for pattern, kind in value.items():
        if not isinstance(pattern, str):
            raise ValueError(f"{argument}: expected layer patterns as keys, found {pattern!r}")
        one_of(f"{argument}[{pattern!r}]", kind, get_args(Tokens))
    return dict(value)


def one_of(argument: str, value: Any, choices: Sequence[str]) -> str:
    """Return ``value`` if it is one of ``choices``.

    Raises:
        ValueError: ``value`` is something else; the message names the argument, what was given and all choices, the
            nearest among them.
    """
    if value in choices:
        return str(value)
    near = difflib.get_close_matches(str(value), choices, 1, 0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{argument}: expected one of {', '.join(map(repr, choices))}, found {value!r}{hint}")


def where(argument: str, value: Any, alternative: str = "") -> Where:
    """Return ``value`` if it is an index, a key or a function.

    Args:
        argument: name of the user's argument, for the message.
        value: what was given.
        alternative: what else the argument takes, for the message.

    Raises:
        TypeError: ``value`` is something else; the message names the argument and what was given.
    """
    if isinstance(value, bool) or not (isinstance(value, (int, str)) or callable(value)):
        raise TypeError(f"{argument}: expected an index, a key or a callable{alternative}, found {value!r}")
    return value  # type: ignore[no-any-return]


def mask_places(argument: str, value: Any) -> Where | dict[str, Where]:
    """Return ``value`` if it is an index, a key, a function or a mapping of layer patterns to these.

    Raises:
        TypeError: ``value`` is something else; the message names the argument and what was given.
    """
    if not isinstance(value, Mapping):
        return where(argument, value, " or {layer pattern: one of these}")
    for pattern in value:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument}: expected layer patterns as keys, found {pattern!r}")
    return {pattern: where(f"{argument}[{pattern!r}]", place) for pattern, place in value.items()}


def metrics_by_name(argument: str, value: Any) -> dict[str, Metric | type[Metric]]:
    """Return ``{name: metric}`` of a list of names of torchmetrics metrics, which become classes, and of objects.

    An object has the name of its class; of several with one name the second gets ``-2``, the third ``-3``. For ``None``
    the result is empty.

    Raises:
        TypeError, ValueError: ``value`` is something else, or torchmetrics has no such metric; the message names the
            argument, what was given and the nearest right thing.
    """
    if not is_list([] if value is None else value):
        hint = f"; write [{value!r}]" if isinstance(value, (str, Metric)) else ""
        hint = "; write list(collection.values())" if isinstance(value, torchmetrics.MetricCollection) else hint
        raise TypeError(
            f"{argument}: expected a list of names or objects of torchmetrics metrics, found {value!r}{hint}"
        )
    known = _torchmetrics()
    found: dict[str, Metric | type[Metric]] = {}
    for metric in value or ():
        if isinstance(metric, str) and metric not in known:
            near = difflib.get_close_matches(metric.rpartition(".")[2], known, 3, 0.5)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            raise ValueError(f"{argument}: torchmetrics has no metric {metric!r}{hint}")
        if not isinstance(metric, (str, Metric)):
            hint = f"; give an instance of it: {metric.__name__}(...)" if isinstance(metric, type) else ""
            raise TypeError(f"{argument}: expected names or objects of torchmetrics metrics, found {metric!r}{hint}")
        name = metric if isinstance(metric, str) else type(metric).__name__
        number = 1 + sum(other.split("-")[0] == name for other in found)
        found[f"{name}-{number}" if number > 1 else name] = known[metric] if isinstance(metric, str) else metric
    return found


@cache
def _torchmetrics() -> dict[str, type[Metric]]:
    """Return ``{name: class}`` of the metrics that torchmetrics has at its top, for classification and regression."""
    rooms = torchmetrics.regression, torchmetrics.classification, torchmetrics
    kinds = {name: kind for room in rooms for name, kind in vars(room).items() if isinstance(kind, type)}
    # In torchmetrics 1.0 a class that makes the metric of a task, such as Accuracy, is no metric itself.
    is_metric = {name: issubclass(kind, Metric) or "__new__" in vars(kind) for name, kind in kinds.items()}
    return {name: kind for name, kind in kinds.items() if is_metric[name] and kind is not Metric}


def first_of(keys: Sequence[str], most: int = 3) -> str:
    """Return the names of the first few keys, and how many more there are, as text."""
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def _or(choices: Sequence[str]) -> str:
    return f"{', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}"


def _choice(kind: Any) -> Callable[[str, Any], Any]:
    """Make a check that a value is one of those of a ``Literal``."""
    choices = get_args(kind)
    expected = _or(choices)

    def check(argument: str, value: Any) -> Any:
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{argument}: expected {expected}, found {value!r}{hint}")
        return value

    return check


def _each(check: Callable[[str, Any], T]) -> Callable[[str, Any], T | dict[str, T]]:
    """Make a check that gives a value, or each value of a mapping by target, to ``check``."""

    def checked(argument: str, value: Any) -> T | dict[str, T]:
        if not isinstance(value, Mapping):
            return check(argument, value)
        return {name: check(f"{argument}[{name!r}]", one) for name, one in value.items()}

    return checked


def _targets(argument: str, value: Any) -> Where | dict[str, Where]:
    """Return ``value`` if it is an index, a key, a function or a mapping of names to these.

    Raises:
        TypeError, ValueError: ``value`` is something else; the message names the argument and what was given.
    """
    if not isinstance(value, Mapping):
        return where(argument, value, " or {name: one of these}")
    for name in value:
        if not isinstance(name, str) or not name or "/" in name:
            raise ValueError(f"{argument}: expected names without '/' as keys, found {name!r}")
    if not value:
        raise ValueError(f"{argument}: an empty mapping names no target")
    return {name: where(f"{argument}[{name!r}]", place) for name, place in value.items()}


def _unless_none(check: Callable[[str, Any], T]) -> Callable[[str, Any], T | None]:
    """Make a check that lets ``None`` pass and gives other values to ``check``."""
    return lambda argument, value: None if value is None else check(argument, value)


@dataclass(frozen=True)
class Option:
    """Hold the default of an option, the check of its value, and the help that users read."""

    default: Any
    check: Callable[[str, Any], Any]
    help: str


class Reading(TypedDict, total=False):
    """List the options on how a network and its batches are read, which callback and ``probe()`` share."""

    num_classes: Annotated[
        int | dict[str, int] | None,
        Option(
            None,
            _unless_none(_each(whole)),
            "number of classes of the labels, or {target: its number}. Not given: the ``num_classes`` of the "
            "datamodule or module, its ``config.num_labels``, or the width of one-hot or soft labels.",
        ),
    ]
    # The types are in this order because jsonargparse tries one after the other.
    input: Annotated[
        int | Callable[[Any], Any] | str | None,
        Option(
            0,
            _unless_none(where),
            "where in the batch the network's input is (index, function or key), probed as depth 0; null: not probed.",
        ),
    ]
    target: Annotated[
        int | Callable[[Any], Any] | dict[str, int | Callable[[Any], Any] | str] | str,
        Option(
            1,
            _targets,
            "where in the batch the labels are: index, key or function; or {name: one of these}, several targets of "
            "the same features, each with its curves.",
        ),
    ]
    task: Annotated[
        TaskKind | dict[str, TaskKind],
        Option(
            "classification",
            _each(_choice(TaskKind)),
            "what probes are asked: ``classification``, by softmax regression; ``multilabel``, by a logistic "
            "regression for each label, of rows of 0 and 1 (NaN or -100 leaves an entry out); or ``regression``, by "
            "ridge regression, of floats (batch,) or (batch, outputs) (NaN leaves an entry out), its error is 1 - R^2. "
            "Or {target: one of these}.",
        ),
    ]
    positions: Annotated[
        int | None,
        Option(
            None,
            _unless_none(whole),
            "labels of their own for tokens, (batch, tokens), or pixels, (batch, height, width): how many labelled "
            "positions of a sample are probed, drawn once a sample; each is a row, with the features that a layer has "
            "there. Several labels a position: (batch, ..., labels); several numbers: (batch, height, width, outputs), "
            "for tokens of height 1. Not given: one label a sample.",
        ),
    ]
    max_features: Annotated[
        int,
        Option(
            1024,
            whole,
            "a map (channels, ...) with more values is averaged over space to the largest grid with at most this many; "
            "vectors keep their width.",
        ),
    ]
    reduction: Annotated[
        Reduction,
        Option(
            "pool",
            _choice(Reduction),
            "``pool``, as above; or ``subset``: maps and vectors with more keep that many values, drawn once; or "
            "``projection``: they are dealt out, once, to that many sums with random signs.",
        ),
    ]
    layout: Annotated[
        dict[str, Layout] | None,
        Option(
            None,
            layouts,
            "what an activation means, by layer pattern, where what is found out is wrong. Its dimensions: ``tokens``, "
            "(batch, ..., width), averaged over all between; ``channels``, (batch, channels, space ...), pooled over "
            "space; ``channels_last``, (batch, space ..., channels), pooled likewise. Its rows: ``time_first``; "
            "``parts`` of a sample, averaged; or ``views`` of a sample, each with its label.",
        ),
    ]
    calls: Annotated[
        Calls,
        Option(
            "first",
            _choice(Calls),
            "of several calls of a layer in one step, which counts of those whose rows are of samples with labels: the "
            "``first``, the ``last`` or the ``mean`` of all; where it can be the same call for all layers.",
        ),
    ]
    tokens: Annotated[
        Tokens | dict[str, Tokens],
        Option(
            "mean",
            token_kinds,
            "how the tokens of a sample become its features: their ``mean``, or the ``first`` or ``last`` of those "
            "that the mask leaves; or {layer pattern: one of these}, where other layers have the mean. Vectors and "
            "maps of channels have no tokens.",
        ),
    ]
    token_mask: Annotated[
        int | Callable[[Any], Any] | Mapping[str, int | Callable[[Any], Any] | str] | str | None,
        Option(
            ATTENTION_MASK,
            _unless_none(mask_places),
            "where in the batch the mask of tokens is, which leaves those where it is 0 out of means; or {layer "
            "pattern: where}, masks that belong to some of the layers each; null: none.",
        ),
    ]
    metrics: Annotated[
        list[str | Metric] | None,
        Option(
            None,
            metrics_by_name,
            "metrics of torchmetrics that score the probes too, on evaluation only: names, made for the task with "
            "torchmetrics' defaults (``F1Score`` averages over samples, ``MulticlassF1Score`` over classes), or "
            "objects, of which copies are fed. Each layer has copies: one that keeps all predictions, as ``AUROC`` "
            "does without ``thresholds``, takes samples x classes x 4 bytes for each of them.",
        ),
    ]


def _table() -> dict[str, tuple[Any, Option]]:
    """Return ``{name: (type, option)}`` of the options in :class:`Reading`."""
    hints = get_type_hints(Reading, include_extras=True)
    return {name: (get_args(hint)[0], hint.__metadata__[0]) for name, hint in hints.items()}


def checked(given: Mapping[str, Any], called: str, others: Iterable[str] = ()) -> Reading:
    """Check the options that are given, and return all options of :class:`Reading`, with defaults for the others.

    Args:
        given: what the user wrote.
        called: name of the function or class that was called, for the message.
        others: names of the other arguments of what was called.

    Raises:
        TypeError, ValueError: an option has a wrong type or value, or an unknown name; the message names it.
    """
    table = _table()
    for name in given.keys() - table.keys():
        known = list(dict.fromkeys([*others, *table]))
        near = difflib.get_close_matches(name, known, 3, 0.4) or known
        raise TypeError(f"{called} has no argument {name!r}; nearest: {', '.join(near)}")
    found = {name: option.check(name, given.get(name, option.default)) for name, (_, option) in table.items()}
    return found  # type: ignore[return-value]


def takes_reading(taker: T) -> T:
    """Write the options of :class:`Reading` into the signature and docstring of a function that takes ``**reading``.

    In the signature they replace ``**reading``, and in the docstring a line ``{reading}``. For a class the signature is
    that of its constructor.
    """
    table = _table()
    function: Any = taker.__init__ if isinstance(taker, type) else taker  # type: ignore[misc]
    own = inspect.signature(function)
    new = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=kind)
        for name, (kind, option) in table.items()
    ]
    written = [parameter for parameter in own.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    written = [parameter.replace(annotation=_evaluated(parameter.annotation, function)) for parameter in written]
    before = [parameter for parameter in written if parameter.kind is not parameter.KEYWORD_ONLY]
    parameters = [*before, *new, *written[len(before) :]]
    function.__signature__ = own.replace(parameters=parameters)
    # typing.get_type_hints reads the annotations and not the signature.
    function.__annotations__ = {p.name: p.annotation for p in parameters if p.annotation is not p.empty}
    function.__annotations__["return"] = _evaluated(own.return_annotation, function)
    if taker.__doc__ is not None and (line := next((x for x in taker.__doc__.splitlines() if "{reading}" in x), "")):
        indent = line[: len(line) - len(line.lstrip())]
        entries = [
            textwrap.fill(f"{name}: {option.help}", 120, initial_indent=indent, subsequent_indent=f"{indent}    ")
            for name, (_, option) in table.items()
        ]
        taker.__doc__ = taker.__doc__.replace(line, "\n".join(entries))
    return taker


def _evaluated(annotation: Any, function: Any) -> Any:
    """Return an annotation of ``function``, evaluated if it is a string."""
    return eval(annotation, function.__globals__) if isinstance(annotation, str) else annotation
