"""Select the layers to probe from a network's module tree, by patterns or by a default rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn
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


def select_layers(
    model: nn.Module,
    layers: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> tuple[dict[str, nn.Module], str]:
    """Select the layers to probe, and say in a note if a default selection was thinned.

    Args:
        model: the network, which is never a layer itself.
        layers: globs over ``named_modules()`` paths (``*`` within a segment, ``**`` across segments). A pattern that
            matches no path is matched against class names. ``None`` selects :func:`default_layers`, thinned evenly to
            at most 40.
        exclude: globs as for ``layers``; the modules they match are left out, with all modules below them.

    Returns:
        The layers as ``{path: module}`` in tree order, each module once, under its first path; and the note, which is
        empty unless the default layers were thinned.

    Raises:
        ValueError: a pattern matches nothing (the message names the nearest paths), or no layer is left.
    """
    names = _paths(model)
    first = {module: path for path, module in reversed(names.items())}
    if layers is None:
        chosen = default_layers(model)
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
    if not chosen:
        raise ValueError(f"{type(model).__name__} holds no layer to probe; its modules: {_few(names) or 'none'}")
    if layers is None and len(chosen) > MAX_DEFAULT_LAYERS:
        return _thin(chosen), f"{MAX_DEFAULT_LAYERS} of {len(chosen)} layers, evenly spaced"
    return chosen, ""


def default_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Select a sensible few layers by one rule over the module tree.

    A *block* is a module with children whose class occurs at least twice in the tree. Only the outermost blocks count,
    and a module that holds several blocks of one class in a container is searched for layers instead of being one. In
    a network with blocks, the layers are the blocks and the last module of each run of other modules before, between
    and after them (such as the stem and the head). In a network without blocks, every module without children is a
    layer. Losses, metrics, dropout and modules that only reshape are left out.

    Args:
        model: the network, which is never a layer itself.

    Returns:
        The layers as ``{path: module}`` in tree order, each module once, under its first path.
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
            for name, child in module.named_children():
                visit(child, f"{path}.{name}" if path else name)
        elif not isinstance(module, _SILENT):
            found[clean(path)] = module
            if type(module) in repeated:
                runs.append([])
            else:
                runs[-1].append(clean(path))

    visit(model, "")
    passed = {path for run in runs for path in run[:-1]} if repeated else set()
    return {path: module for path, module in found.items() if path not in passed}


def _opens(module: nn.Module, repeated: set[type[nn.Module]]) -> bool:
    """Return whether the default rule searches ``module`` for layers instead of probing it."""
    if _is_leaf(module) or not repeated:
        return not _is_leaf(module)
    if isinstance(module, _CONTAINERS):
        # In a network with blocks, a Sequential of modules without children is a stem or a head, which is one layer.
        return not isinstance(module, nn.Sequential) or not all(map(_is_leaf, module))
    holders = [below for below in module.modules() if isinstance(below, _CONTAINERS)]
    if any(_repeats(holder.children(), repeated) for holder in holders):
        return True
    below = (inner for inner in module.modules() if inner is not module)
    return type(module) not in repeated and _repeats(below, repeated)


def _blocks(model: nn.Module) -> set[type[nn.Module]]:
    """Return the classes of composite modules that occur at least twice in ``model``.

    Classes whose modules hold several weights (parameters with at least two dimensions) take precedence: where there
    are any, only they are returned, so that a convolution with its normalisation does not pass for a block.
    """
    modules = [module for module in model.modules() if _is_composite(module)]
    repeated = {kind for kind, count in Counter(map(type, modules)).items() if count > 1}
    large = {type(module) for module in modules if sum(p.dim() > 1 for p in module.parameters()) > 1}
    return repeated & large or repeated


def _repeats(modules: Iterable[nn.Module], blocks: set[type[nn.Module]]) -> bool:
    """Return whether at least two of ``modules`` are of one class in ``blocks``."""
    return max(Counter(type(module) for module in modules if type(module) in blocks).values(), default=0) > 1


def _paths(model: nn.Module) -> dict[str, nn.Module]:
    """Return ``{path: module}`` for all callable modules below ``model``, with every path of a shared module."""
    return {
        clean(path): module
        for path, module in model.named_modules(remove_duplicate=False)
        if clean(path) and not isinstance(module, _SILENT)
    }


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


def _match(names: dict[str, nn.Module], patterns: str | Sequence[str], argument: str) -> dict[str, nn.Module]:
    matched: dict[str, nn.Module] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = {path: module for path, module in names.items() if _globs(pattern.split("."), path.split("."))}
        hits = hits or {path: m for path, m in names.items() if fnmatchcase(type(m).__name__, pattern)}
        if not hits:
            known = [*names, *{type(module).__name__: None for module in names.values()}]
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


def _thin(layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    paths, last = list(layers), len(layers) - 1
    kept = {paths[round(i * last / (MAX_DEFAULT_LAYERS - 1))] for i in range(MAX_DEFAULT_LAYERS)}
    return {path: module for path, module in layers.items() if path in kept}


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _is_composite(module: nn.Module) -> bool:
    return not _is_leaf(module) and type(module) not in _CONTAINERS and not _is_left_out(module)


def _is_left_out(module: nn.Module) -> bool:
    name = type(module).__name__
    return isinstance(module, _LEFT_OUT) or name.endswith("Loss") or name.startswith("Drop")


def _few(names: dict[str, nn.Module]) -> str:
    return ", ".join(list(names)[:8]) + (", ..." if len(names) > 8 else "")
