"""Select the layers to probe from a network's module tree, by patterns or by a default rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import chain
from typing import NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torchmetrics import Metric, MetricCollection

from lightning_probes.network.torch_internals import DROPOUTS, LOSSES, WRAPPERS

MAX_DEFAULT_LAYERS = 40
"""Limit how many layers are probed when the user names none."""

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_SILENT = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_LEFT_OUT = (
    *LOSSES,
    Metric,
    MetricCollection,
    *DROPOUTS,
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.ParameterList,
    nn.ParameterDict,
)


def clean(path: str) -> str:
    """Return ``path`` without the segments that wrappers insert."""
    return ".".join(part for part in path.split(".") if part not in WRAPPERS)


def kind_of(module: nn.Module) -> type[nn.Module]:
    """Return the class of ``module`` as its user wrote it: parametrization puts a class of its own in the place."""
    return parametrize.type_before_parametrizations(module)


def children_of(module: nn.Module) -> dict[str, nn.Module]:
    """Return the children of ``module`` by name, without its parametrizations, which put out weights."""
    is_parametrized = parametrize.is_parametrized(module)
    children = module.named_children()
    return {name: child for name, child in children if not (is_parametrized and name == "parametrizations")}


class Selection(NamedTuple):
    """Hold the layers of a network that are candidates, and what is still open among them.

    Attributes:
        layers: the layers as ``{path: module}`` in tree order, each module once, under its first path.
        note: what a user should know of the selection; empty unless default layers were thinned.
        runs: paths of layers of which one a run will stay, in tree order: those before, between and after the blocks.
    """

    layers: dict[str, nn.Module]
    note: str = ""
    runs: Sequence[list[str]] = ()

    def settled(self, called: Sequence[str] = ()) -> list[str]:
        """Return the layers that stay, in tree order: in each run the one that was called last.

        What feeds a block is what was called before it, wherever it is registered: position tables and rotary
        embeddings are often registered last. So a run here is what was called between two blocks.

        Args:
            called: layers that have features of the samples, in the order of their calls. Of a run in which there is
                none, the layer that is registered last stays.
        """
        shared = set(chain(*self.runs))
        ends = {path for path, after in zip(called, [*called[1:], ""], strict=False) if after not in shared}
        unseen = {run[-1] for run in self.runs if not set(run) & set(called)}
        return [path for path in self.layers if path not in shared or path in ends | unseen]


def select_layers(
    model: nn.Module,
    layers: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> Selection:
    """Select the layers to probe, and say in a note if a default selection was thinned.

    Args:
        model: the network, which is never a layer itself.
        layers: globs over ``named_modules()`` paths (``*`` within a segment, ``**`` across segments). A pattern that
            matches no path is matched against class names. ``None`` selects :func:`default_layers`, thinned evenly to
            at most 40, where a run of candidates counts as one.
        exclude: globs as for ``layers``; the modules they match are left out, with all modules below them.

    Raises:
        ValueError: a pattern matches nothing (the message names the nearest paths), or no layer is left.
    """
    names = _paths(model)
    first = {module: path for path, module in reversed(names.items())}
    runs: list[list[str]] = []
    if layers is None:
        chosen, runs = default_layers(model)
    else:
        chosen = {first[module]: module for module in _match(names, layers, "layers").values()}
        chosen = {path: module for path, module in names.items() if path in chosen}
    if exclude is not None:
        gone = {below for module in _match(names, exclude, "exclude").values() for below in module.modules()}
        kept = {path: module for path, module in chosen.items() if names[path] not in gone}
        if not kept:
            raise ValueError(
                f"exclude={exclude!r} leaves no layer to probe of the {len(chosen)} selected: {_few(chosen)}"
            )
        chosen = kept
        runs = [left for run in runs if (left := [path for path in run if path in kept])]
    if not chosen:
        raise ValueError(f"{type(model).__name__} holds no layer to probe; its modules: {_few(names) or 'none'}")
    return _thinned(Selection(chosen, "", runs)) if layers is None else Selection(chosen)


def default_layers(model: nn.Module) -> tuple[dict[str, nn.Module], list[list[str]]]:
    """Select a sensible few layers by one rule over the module tree.

    A *block* is a module with children whose class occurs at least twice in the tree. Only the outermost blocks count,
    and a module that holds several blocks of one class in a container is searched for layers instead of being one. In
    a network with blocks, the layers are the blocks and one of each run of other modules before, between and after them
    (such as the stem and the head); which one shows when the network runs. In a network without blocks, every module
    without children is a layer. Losses, metrics, dropout and modules that only reshape are left out.

    Args:
        model: the network, which is never a layer itself.

    Returns:
        The layers and candidates as ``{path: module}`` in tree order, each module once, under its first path; and the
        runs as in :class:`Selection`.
    """
    repeated = _blocks(model)
    found: dict[str, nn.Module] = {}
    seen: set[nn.Module] = set()
    runs: list[list[str]] = [[]]

    def visit(module: nn.Module, path: str) -> None:
        if module in seen or _is_left_out(module):
            return
        seen.add(module)
        if not path or _opens(module, repeated):
            for name, child in children_of(module).items():
                visit(child, f"{path}.{name}" if path else name)
        elif not isinstance(module, _SILENT):
            found[clean(path)] = module
            if kind_of(module) in repeated:
                runs.append([])
            else:
                runs[-1].append(clean(path))

    visit(model, "")
    return found, [run for run in runs if run] if repeated else []


def _opens(module: nn.Module, repeated: set[type[nn.Module]]) -> bool:
    """Return whether the default rule searches ``module`` for layers instead of probing it."""
    if _is_leaf(module) or not repeated:
        return not _is_leaf(module)
    if isinstance(module, _CONTAINERS):
        # In a network with blocks, a Sequential of modules without children is a stem or a head, which is one layer.
        return not isinstance(module, nn.Sequential) or not all(map(_is_leaf, module))
    holders = [below for below in _modules_of(module) if isinstance(below, _CONTAINERS)]
    if any(_repeats(children_of(holder).values(), repeated) for holder in holders):
        return True
    below = (inner for inner in _modules_of(module) if inner is not module)
    return kind_of(module) not in repeated and _repeats(below, repeated)


def _blocks(model: nn.Module) -> set[type[nn.Module]]:
    """Return the classes of composite modules that occur at least twice in ``model``.

    Classes whose modules hold several weights (parameters with at least two dimensions) take precedence: where there
    are any, only they are returned, so that a convolution with its normalisation does not pass for a block.
    """
    modules = [module for module in _modules_of(model) if _is_composite(module)]
    repeated = {kind for kind, count in Counter(map(kind_of, modules)).items() if count > 1}
    large = {kind_of(module) for module in modules if sum(_is_weight(*one) for one in module.named_parameters()) > 1}
    return repeated & large or repeated


def is_any_lazy(model: nn.Module) -> bool:
    """Return whether a parameter or buffer of a model has no shape yet."""
    return any(map(is_lazy, chain(model.parameters(), model.buffers())))


def _is_weight(name: str, parameter: nn.Parameter) -> bool:
    """Return whether a parameter has at least two dimensions; of one without a shape its name tells."""
    return name.endswith("weight") if is_lazy(parameter) else parameter.dim() > 1


def _repeats(modules: Iterable[nn.Module], blocks: set[type[nn.Module]]) -> bool:
    """Return whether at least two of ``modules`` are of one class in ``blocks``."""
    kinds = map(kind_of, modules)
    return max(Counter(kind for kind in kinds if kind in blocks).values(), default=0) > 1


def _modules_of(model: nn.Module) -> list[nn.Module]:
    """Return ``model`` and all modules below it, each once."""
    return list(dict.fromkeys(module for _, module in _walk(model)))


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield what ``named_modules(remove_duplicate=False)`` does, without parametrizations and what is below them."""
    parametrized, hidden = set[str](), set[str]()
    for path, module in model.named_modules(remove_duplicate=False):
        above, _, name = path.rpartition(".")
        if above in hidden or (name == "parametrizations" and above in parametrized):
            hidden.add(path)
            continue
        if parametrize.is_parametrized(module):
            parametrized.add(path)
        yield path, module


def _paths(model: nn.Module) -> dict[str, nn.Module]:
    """Return ``{path: module}`` for all callable modules below ``model``, with every path of a shared module."""
    return {clean(path): module for path, module in _walk(model) if clean(path) and not isinstance(module, _SILENT)}


def match_layers(model: nn.Module, patterns: str | Sequence[str], argument: str) -> dict[str, nn.Module]:
    """Return the modules that at least one pattern matches, with every path of a shared module.

    Args:
        model: the network, which is never matched itself.
        patterns: globs as for ``layers`` of :func:`select_layers`.
        argument: name of the user's argument that the patterns come from, for the error message.

    Returns:
        The matched modules as ``{path: module}``.

    Raises:
        ValueError: a pattern matches nothing; the message names ``argument`` and the nearest paths.
    """
    return _match(_paths(model), patterns, argument)


def match_paths(paths: Sequence[str], patterns: str | Sequence[str], argument: str) -> list[str]:
    """Return those of some paths that at least one pattern matches, in their order.

    Args:
        paths: paths of layers.
        patterns: globs, or paths as they are.
        argument: name of the user's argument that the patterns come from, for the error message.

    Raises:
        ValueError: a pattern matches nothing; the message names ``argument`` and the nearest paths.
    """
    matched: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        # A path may hold characters that mean something in a glob.
        is_path = pattern in paths
        hits = {pattern} if is_path else {path for path in paths if _globs(pattern.split("."), path.split("."))}
        if not hits:
            near = get_close_matches(pattern, paths, n=5, cutoff=0.4) or list(paths[:5])
            raise ValueError(f"{argument}: {pattern!r} matches no layer; nearest: {', '.join(near) or 'none'}")
        matched |= hits
    return [path for path in paths if path in matched]


def _match(names: dict[str, nn.Module], patterns: str | Sequence[str], argument: str) -> dict[str, nn.Module]:
    matched: dict[str, nn.Module] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = {path: module for path, module in names.items() if _globs(pattern.split("."), path.split("."))}
        hits = hits or {path: m for path, m in names.items() if fnmatchcase(kind_of(m).__name__, pattern)}
        if not hits:
            known = [*names, *{kind_of(module).__name__: None for module in names.values()}]
            near = get_close_matches(pattern, known, n=5, cutoff=0.4) or known[:5]
            raise ValueError(
                f"{argument}: {pattern!r} matches no layer path and no class name; nearest: {', '.join(near) or 'none'}"
            )
        matched.update(hits)
    return matched


def _globs(pattern: list[str], path: list[str]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_globs(pattern[1:], path[start:]) for start in range(len(path) + 1))
    return bool(path) and fnmatchcase(path[0], pattern[0]) and _globs(pattern[1:], path[1:])


def _thinned(selection: Selection) -> Selection:
    """Return at most 40 of the layers, evenly spaced, where a run counts as one."""
    units = selection.settled()
    if (last := len(units) - 1) < MAX_DEFAULT_LAYERS:
        return selection
    kept = {units[round(i * last / (MAX_DEFAULT_LAYERS - 1))] for i in range(MAX_DEFAULT_LAYERS)}
    runs = [run for run in selection.runs if run[-1] in kept]
    kept.update(*runs)
    layers = {path: module for path, module in selection.layers.items() if path in kept}
    return Selection(layers, f"{MAX_DEFAULT_LAYERS} of {len(units)} layers, evenly spaced", runs)


def _is_leaf(module: nn.Module) -> bool:
    return not children_of(module)


def _is_composite(module: nn.Module) -> bool:
    return not _is_leaf(module) and kind_of(module) not in _CONTAINERS and not _is_left_out(module)


def _is_left_out(module: nn.Module) -> bool:
    name = kind_of(module).__name__
    return isinstance(module, _LEFT_OUT) or name.endswith("Loss") or name.startswith("Drop")


def _few(names: dict[str, nn.Module]) -> str:
    return ", ".join(list(names)[:8]) + (", ..." if len(names) > 8 else "")
