"""Find out which dimension of a layer's activation holds its features: the last one or, as in convolutions, the second.

A shape does not tell: ``(batch, channels, length)`` and ``(batch, tokens, width)`` look alike. What decides is the last
module inside a layer that treats a dimension as features; without one, what the next module does with it; else the
module before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from lightning_probes.network.hooks import first_float_tensor
from lightning_probes.network.layers import children_of, clean, kind_of
from lightning_probes.network.pooling import assumed_axes
from lightning_probes.options import Axes

Place = Literal["last", "second"]
"""Name the dimension that holds features."""
Source = Literal["layout", "format", "calls", "registration", "assumed"]
"""Say what told the dimension of features: the user's ``layout``, the ``output_fmt`` of a module, the order in which
modules were called, that in which they are registered, or only the number of dimensions."""

_INDEX: dict[Place, int] = {"last": -1, "second": 1}
_OTHER: dict[Place, Place] = {"last": "second", "second": "last"}

_CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
_MAP_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
_POOLS = ("AvgPool", "MaxPool", "LPPool", "MaxUnpool", "FractionalMaxPool")


@dataclass(frozen=True)
class Treatment:
    """Describe how a module treats a dimension as features.

    Attributes:
        place: the dimension.
        read: number of features of its input; 0 if it reads no features, ``None`` if any number, which tells nothing.
        made: number of features of its output; ``None`` if any number.
    """

    place: Place
    read: int | None
    made: int | None


@dataclass(frozen=True)
class ModuleCall:
    """Describe one call of a module, or its place in the order of registration.

    Attributes:
        module: path of the module.
        start: when it began.
        end: when it ended, counted on from ``start`` over the calls inside.
        treatment: how it treats a dimension as features; ``None`` if it does not.
        given: shape of its input; ``None`` if it did not run.
        output: shape of its output; ``None`` if it did not run.
    """

    module: str
    start: int
    end: int
    treatment: Treatment | None = None
    given: tuple[int, ...] | None = None
    output: tuple[int, ...] | None = None


def treatment_of(module: nn.Module) -> Treatment | None:
    """Return how ``module`` itself treats a dimension as features; ``None`` for a module that treats none so."""
    name = kind_of(module).__name__
    # A weight is not asked for as an attribute: that of a spectral norm is computed then, and training it changes.
    weight = dict(nn.Module.named_parameters(module, recurse=False)).get("weight")
    of_map: Place = "second" if name.endswith(("1d", "2d", "3d")) or _is_first(module) else "last"
    shape = getattr(module, "normalized_shape", None)
    found: Treatment | None = None
    if isinstance(module, nn.Linear):
        found = Treatment("last", module.in_features, module.out_features)
    elif isinstance(module, _CONVOLUTIONS):
        found = Treatment("second", module.in_channels, module.out_channels)
    elif isinstance(module, _MAP_NORMS):
        found = Treatment("second", module.num_features, module.num_features)
    elif isinstance(module, nn.GroupNorm):
        found = Treatment("second", module.num_channels, module.num_channels)
    elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        found = Treatment("last", 0, module.embedding_dim)
    elif isinstance(module, nn.RNNBase):
        made = (module.proj_size or module.hidden_size) * (1 + module.bidirectional)
        found = Treatment("last", module.input_size, made)
    elif isinstance(module, nn.MultiheadAttention):
        found = Treatment("last", module.embed_dim, module.embed_dim)
    elif any(part in name for part in _POOLS) and not children_of(module):
        found = Treatment("second", None, None)
    elif name == "Conv1D" and weight is not None and weight.dim() == 2:  # A Linear by another name, in GPT-2.
        found = Treatment("last", *weight.shape)
    elif name.endswith(("Norm", "Norm2d")) and weight is not None and weight.dim() == 1:  # Also of users.
        found = Treatment(of_map, len(weight), len(weight))
    elif isinstance(shape, tuple) and len(shape) == 1:  # LayerNorm and RMSNorm may have no weight.
        found = Treatment(of_map, shape[0], shape[0])
    return found


def _is_first(module: nn.Module) -> bool:
    """Return whether a norm says that its channels are first, as that of ConvNeXt does."""
    return getattr(module, "data_format", None) == "channels_first"


def registered_calls(model: nn.Module) -> list[ModuleCall]:
    """Return the modules of ``model`` as if each was called once, in the order of their registration."""
    found: list[ModuleCall] = []
    seen: set[nn.Module] = set()
    clock = 0

    def visit(module: nn.Module, path: str) -> None:
        nonlocal clock
        seen.add(module)
        start, clock = clock, clock + 1
        for name, child in children_of(module).items():
            if child not in seen:
                visit(child, f"{path}.{name}" if path else name)
        found.append(ModuleCall(clean(path), start, clock, treatment_of(module)))
        clock += 1

    visit(model, "")
    return found


@contextmanager
def calls_of(model: nn.Module) -> Iterator[list[ModuleCall]]:
    """Write down the calls of the modules of ``model`` while this context lasts, and keep no activation.

    Args:
        model: a network that runs in python inside this context, such as a frozen one.
    """
    found: list[ModuleCall] = []
    open_calls: list[tuple[nn.Module, int, tuple[int, ...] | None]] = []
    names: dict[nn.Module, str] = {}
    clock = 0

    def tick() -> int:
        nonlocal clock
        clock += 1
        return clock

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        open_calls.append((module, tick(), _shape_of((args, kwargs))))

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        # A call that raised never came here: those that it was inside of have ended too, or go on.
        while open_calls and open_calls[-1][0] is not module:
            open_calls.pop()
        if open_calls:
            _, start, given = open_calls.pop()
            made = _shape_of(output)
            treatment = _as_called(treatment_of(module), given, made)
            found.append(ModuleCall(names[module], start, tick(), treatment, given, made))

    hooks = []
    try:
        for path, module in model.named_modules():
            names[module] = clean(path)
            if not isinstance(module, torch.jit.ScriptModule):
                hooks.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
                hooks.append(module.register_forward_hook(after, with_kwargs=True))
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _shape_of(value: Any) -> tuple[int, ...] | None:
    tensor = first_float_tensor(value)
    return None if tensor is None or tensor.is_nested else tuple(tensor.shape)


def _as_called(
    treatment: Treatment | None, given: tuple[int, ...] | None, output: tuple[int, ...] | None
) -> Treatment | None:
    """Return a treatment with the sizes that a call had, in the dimension in which it had them."""
    if treatment is None or given is None or output is None or min(len(given), len(output)) < 2:
        return treatment
    place = treatment.place
    if len(output) == 2:
        place = "last"  # It is the second too, but rows that are brought into three dimensions are mostly tokens.
    elif treatment.made not in (None, output[_INDEX[place]]) and treatment.made == output[_INDEX[_OTHER[place]]]:
        place = _OTHER[place]  # A class of the user's may transpose around what it inherits.
    read = given[_INDEX[place]] if treatment.read != 0 else 0
    return Treatment(place, read, output[_INDEX[place]])


def place_of(shape: Sequence[int], own: ModuleCall, calls: Sequence[ModuleCall]) -> Place | None:
    """Return which dimension of a layer's activation holds features; ``None`` if no call tells.

    Args:
        shape: shape of the activation, with three dimensions or more.
        own: the call of the layer.
        calls: the calls of all modules, the layer's own may be among them.
    """
    inside = [call for call in calls if own.start <= call.start and call.end <= own.end and call.treatment]
    before = [call for call in calls if call.end < own.start and call.treatment]
    after = [call for call in calls if call.start > own.end and call.treatment and call.treatment.read != 0]
    reader = min(after, key=lambda call: call.start, default=None)
    read = None if reader is None else _read_by(reader, shape)
    for call in sorted(inside, key=lambda call: call.end, reverse=True):
        if (found := _made_by(call, shape)) is not None:
            # The size does not show whether a block transposes a square output at its end; its reader does.
            is_unclear = shape[1] == shape[-1] and call.end != own.end
            return read or found if is_unclear else found
    made = _made_by(max(before, key=lambda call: call.end), shape) if before else None
    return read or made or (None if reader is None else _read_by(reader, shape, is_turned=True))


def _made_by(call: ModuleCall, shape: Sequence[int]) -> Place | None:
    """Return where ``shape`` has the features that a call made: in its place, or where a transposition put them."""
    assert call.treatment is not None
    places = (call.treatment.place, _OTHER[call.treatment.place])
    return next((place for place in places if call.treatment.made in (None, shape[_INDEX[place]])), None)


def _read_by(call: ModuleCall, shape: Sequence[int], *, is_turned: bool = False) -> Place | None:
    """Return where ``shape`` has the features that a call reads, in its place or transposed; ``None`` if in neither."""
    assert call.treatment is not None
    given, place = call.given, call.treatment.place
    if given is not None and len(given) != len(shape):
        return None
    if is_turned:
        place = _OTHER[place]
        if given is None or sorted(given[1:]) != sorted(shape[1:]):
            return None
    return place if call.treatment.read == shape[_INDEX[place]] else None


class FeatureAxes:
    """Tell which dimension of each layer's activation holds features, and what that is known from.

    Until a run of the network was watched, the order in which modules are registered stands for the order of calls.

    Args:
        model: the network; it is not kept.
        layers: the modules by layer.
        given: what the user said, by layer.

    Attributes:
        is_watched: whether the order of calls is known.
        sources: ``{layer: what its axes are known from}`` of every layer with three to five dimensions seen so far.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, nn.Module], given: Mapping[str, Axes] | None = None
    ) -> None:
        self.sources: dict[str, Source] = {}
        self.is_watched = False
        self._given = dict(given or {})
        self._ends_with_channels = {
            layer for layer, module in layers.items() if getattr(module, "output_fmt", None) == "NHWC"
        }
        self._registered = registered_calls(model)
        self._called: list[ModuleCall] = []
        self._known: dict[tuple[str, int], Axes] = {}

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        """Learn the order of calls from what runs inside this context; what was told before is decided anew."""
        with calls_of(model) as calls:
            yield
        self.is_watched = True
        self._called = calls
        self._known = {}
        self.sources = {}

    def of(self, layer: str, shape: Sequence[int]) -> Axes:
        """Return the axes of an activation ``(samples, ...)`` of a layer; only their number may decide."""
        key = layer, len(shape)
        if key not in self._known:
            axes, source = self._decided(layer, shape)
            if 2 < len(shape) < 6:
                self.sources[layer] = source
            self._known[key] = axes
        return self._known[key]

    def of_layer(self, layer: str) -> dict[int, Axes]:
        """Return the axes of a layer's activations that were told so far, by the number of their dimensions."""
        return {dimensions: axes for (known, dimensions), axes in self._known.items() if known == layer}

    @property
    def with_tokens(self) -> list[str]:
        """Return the layers that were told to have tokens."""
        return [layer for (layer, dimensions), axes in self._known.items() if dimensions > 2 and axes == "tokens"]

    @property
    def assumed(self) -> dict[str, Axes]:
        """Return the axes of the layers for which only the number of dimensions told."""
        return {layer: axes for (layer, _), axes in self._known.items() if self.sources.get(layer) == "assumed"}

    def state_dict(self) -> dict[str, Any]:
        """Return what was decided, as plain types."""
        known = [[layer, dimensions, axes] for (layer, dimensions), axes in self._known.items()]
        return {"known": known, "sources": dict(self.sources)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, but for layers for which the user says something now."""
        self.is_watched = True
        self._known = {(layer, n): axes for layer, n, axes in state["known"] if layer not in self._given}
        self.sources = {layer: x for layer, x in state["sources"].items() if layer not in self._given}

    def _decided(self, layer: str, shape: Sequence[int]) -> tuple[Axes, Source]:
        if layer in self._given:
            return self._given[layer], "layout"
        if layer in self._ends_with_channels and len(shape) == 4:
            return "channels_last", "format"
        if not 2 < len(shape) < 6:
            return assumed_axes(len(shape)), "assumed"
        place, source = self._found(layer, shape)
        if place is None:
            # A vector that a one-dimensional pooling left a last dimension of 1 would become a single number.
            return ("channels" if shape[-1] == 1 else assumed_axes(len(shape))), "assumed"
        at_end: Axes = "tokens" if len(shape) == 3 else "channels_last"
        return ("channels" if place == "second" else at_end), source

    def _found(self, layer: str, shape: Sequence[int]) -> tuple[Place | None, Source]:
        own = [call for call in self._called if call.module == layer]
        registered = next((call for call in self._registered if call.module == layer), None)
        if registered is None:  # The raw input is put out by no module.
            return self._found_before_all(shape)
        if own:
            # The activation is that of the last call with as many dimensions.
            alike = [call for call in own if call.output is not None and len(call.output) == len(shape)]
            return self._found_by_calls((alike or own)[-1], registered, shape)
        return place_of(shape, registered, self._registered), "registration"

    def _found_by_calls(
        self, own: ModuleCall, registered: ModuleCall, shape: Sequence[int]
    ) -> tuple[Place | None, Source]:
        # A fused implementation uses the weights of modules without calling them.
        is_fused = not any(own.start <= call.start and call.end <= own.end and call.treatment for call in self._called)
        if is_fused:
            inside = [c for c in self._registered if registered.start <= c.start and c.end <= registered.end]
            if (place := place_of(shape, registered, inside)) is not None:
                return place, "registration"
        return place_of(shape, own, self._called), "calls"

    def _found_before_all(self, shape: Sequence[int]) -> tuple[Place | None, Source]:
        """Find what the first module does with the raw input."""
        own = ModuleCall("", -1, -1)
        if self._called:
            return place_of(shape, own, self._called), "calls"
        # A network may reshape its input, and widths agree by chance; convolutions do not take what is no map.
        place = place_of(shape, own, self._registered)
        return (place if place == "second" else None), "registration"
