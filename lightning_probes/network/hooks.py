"""Hook layers, and reduce what each layer puts out to detached float features inside the hook."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_probes.network.arrangement import PLAIN, Arrangement, ContradictionError, packed_ends, values_of
from lightning_probes.network.batches import describe, parts_of
from lightning_probes.network.masks import Masks
from lightning_probes.network.pooling import OtherSizeError, Reducer, assumed_axes, nested_features
from lightning_probes.network.positions import NoPositionsError, Positions
from lightning_probes.network.torch_internals import (
    is_in_backward,
    leave,
    listen,
    never_compiled,
    part_of_a_graph,
    tell,
)
from lightning_probes.options import Axes, Calls, Tokens

HEARD_BY = "_lightning_probes_heard_by"
"""Name the attribute set on all modules during a replay: the recorder that alone listens."""

AxesOf = Callable[[str, Sequence[int]], Axes]
"""Take the name of a layer and the shape of its activation, and tell which dimension holds features."""

_NOT_HEARD = "it never ran, or in code that was compiled before the probes came: call torch.compiler.reset() before fit"


def first_float_tensor(output: Any) -> Tensor | None:
    """Return the first floating-point tensor with a batch dimension in nested containers; ``None`` if there is none."""
    if isinstance(output, Tensor):
        # Padded batches can come as nested tensors.
        is_dense = output.is_nested or output.layout == torch.strided
        return output if is_dense and output.is_floating_point() and output.dim() else None
    for part in parts_of(output).values():
        if (found := first_float_tensor(part)) is not None:
            return found
    return None


def first_activation(output: Any) -> Tensor | PackedSequence | None:
    """Return the first packed sequence or :func:`first_float_tensor` in nested containers; ``None`` without any."""
    if isinstance(output, PackedSequence):
        return output if output.data.is_floating_point() else None
    if isinstance(output, Tensor):
        return first_float_tensor(output)
    for part in parts_of(output).values():
        if (found := first_activation(part)) is not None:
            return found
    return None


@dataclass
class Recording:
    """Hold what the layers put out in one step.

    Attributes:
        samples: number of labels of the batch.
        only: layers to record; ``None`` for all.
        masks: which tokens of each sample count, by layer; ``None`` for all.
        index: sample of each row of layers that have as many rows of a sample as the batch says; ``None`` without.
        positions: where in each sample the labels are; ``None`` for one label a sample.
        features: ``{layer: (rows, features)}`` in the order of the calls.
        misfits: ``{layer: reason}`` of the calls that could not be used.
        contradictions: ``{layer: reason}`` of the calls that are not arranged as the first batch showed.
        faults: ``{layer: exception}`` of the hooks that raised.
        counts: ``{layer: number of calls that were used}``.
        heard: ``{layer: number of its calls so far}``, in the order of the first calls.
        shapes: ``{layer: shape of its activation in the last call that counts}``.
    """

    samples: int
    only: Container[str] | None = None
    masks: Masks | None = None
    index: Tensor | None = None
    positions: Positions | None = None
    features: dict[str, Tensor] = field(default_factory=dict)
    misfits: dict[str, str] = field(default_factory=dict)
    contradictions: dict[str, str] = field(default_factory=dict)
    faults: dict[str, Exception] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    heard: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


class ActivationRecorder:
    """Hook layers, and keep the reduced features of each while a step is recorded.

    Args:
        reducer: reduces activations to features.
        calls: which of several calls of a layer counts, of those whose rows are of samples: the first, the last, or the
            mean of all that have as many rows as the first.

    Attributes:
        recording: what is recorded in the step under way; after :meth:`stop` only the reasons why layers are missing.
        widths: ``{layer: features}`` of every layer seen so far.
        totals: ``{layer: values per sample before reduction}`` of every layer seen so far.
        shapes: ``{layer: shape of its last activation, with rows in dimension 0}`` of every layer seen so far.
        memory: ``{layer: (samples, features)}``, lent by the probes that use the features; features of this shape are
            written there.
        compiled: layers in compiled code, which does not call hooks that are newer than the code.
        arrangements: ``{layer: which rows of its activation are of which sample}``. A layer without an entry is taken
            to have one row a sample if its first dimension is that of the batch.
        refused: ``{layer: why}`` of the layers in whose activations no row is of one sample.
        tokens: ``{layer: how its tokens become features}``; a layer without an entry has their mean.
        units: ``{layer: what a sample has of its own number}``, ``token`` for layers that put out nested tensors and
            ``step`` for those that put out packed sequences.
        sink: takes layer, number of the call and output in the place of :meth:`record`; ``None`` for none.
    """

    def __init__(self, reducer: Reducer, calls: Calls = "first") -> None:
        self.recording = Recording(0)
        self.widths: dict[str, int] = {}
        self.totals: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.memory: dict[str, Tensor] = {}
        self.compiled: set[str] = set()
        self.arrangements: Mapping[str, Arrangement] = {}
        self.refused: Mapping[str, str] = {}
        self.tokens: Mapping[str, Tokens] = {}
        self.units: dict[str, str] = {}
        self.sink: Callable[[str, int, Any], None] | None = None
        self._reducer = reducer
        self._calls = calls
        self._axes: AxesOf = _assumed
        self._is_on = False
        self._places: dict[str, int] = {}
        self._unhookable: dict[str, str] = {}
        self._hooked: dict[str, nn.Module] = {}
        self._hooks: dict[str, torch.utils.hooks.RemovableHandle] = {}

    @property
    def reasons(self) -> dict[str, str]:
        """Return ``{layer: reason}`` why layers may have no features, as the last step and compiled code tell."""
        return dict.fromkeys(self.compiled, _NOT_HEARD) | self.recording.misfits

    def attach(
        self, layers: Mapping[str, nn.Module], axes: AxesOf | None = None, compiled: Container[int] = ()
    ) -> None:
        """Register one hook on each layer, and change nothing else in the modules.

        Args:
            layers: the modules by layer.
            axes: tells which dimension of a layer's activation holds features; ``None`` goes by their number.
            compiled: ids of modules in compiled code.
        """
        self.detach()
        self.compiled = {layer for layer, module in layers.items() if id(module) in compiled}
        self.widths = {}
        self.totals = {}
        self.shapes = {}
        self.units = {}
        self._axes = axes or _assumed
        self._unhookable = {}
        for layer, module in layers.items():
            if isinstance(module, torch.jit.ScriptModule):
                self._unhookable[layer] = "it is a TorchScript module, which takes no hooks"
                continue
            self._hooked[layer] = module
        self.hook()

    def hook(self) -> None:
        """Register the hooks that :meth:`unhook` removed."""
        for layer, module in self._hooked.items():
            if layer not in self._hooks:
                self._hooks[layer] = module.register_forward_hook(self._hook(layer, module))

    def unhook(self) -> None:
        """Remove all hooks until :meth:`hook`, and keep what is known of the layers."""
        for layer, handle in self._hooks.items():
            handle.remove()
            leave(self._places.pop(layer))
        self._hooks = {}

    def detach(self, layer: str | None = None) -> None:
        """Remove the hook of ``layer``, or all hooks, and discard what was recorded."""
        for name in [layer] if layer is not None else list(self._hooked):
            if name in self._hooks:
                self._hooks.pop(name).remove()
                leave(self._places.pop(name))
            self._hooked.pop(name, None)
            self.recording.features.pop(name, None)
            self.recording.misfits.pop(name, None)
            self.memory.pop(name, None)
            if layer is not None:
                for known in (self.widths, self.totals, self.shapes, self.units):
                    known.pop(name, None)
        if layer is None:
            self._is_on = False
            # The raw input has features and memory too, but no hook.
            self.recording = Recording(0)
            self.memory = {}

    def start(
        self,
        samples: int,
        only: Container[str] | None = None,
        masks: Masks | None = None,
        index: Tensor | None = None,
        positions: Positions | None = None,
    ) -> None:
        """Start recording a step; the arguments are those of :class:`Recording`."""
        self.recording = Recording(samples, only, masks, index, positions, misfits=dict(self._unhookable))
        self._is_on = True

    def stop(self) -> Recording:
        """Stop recording and return the recording; keep only the reasons for missing layers."""
        found = self.recording
        self._is_on = False
        self.recording = Recording(0, misfits=dict(found.misfits))
        return found

    def skip_to(self, heard: Mapping[str, int]) -> None:
        """Count the calls of layers as if they had been called so often in the step under way."""
        self.recording.heard.update(heard)

    def take(self, layer: str, output: Any) -> None:
        """Record an output as :meth:`record` does; store exceptions in the recording, do not raise."""
        try:
            self.record(layer, output)
        except Exception as error:
            self.recording.misfits[layer] = f"{type(error).__name__}: {error}"
            self.recording.faults[layer] = error.with_traceback(None)  # The frames of a traceback would hold it.

    def record(self, layer: str, output: Any) -> None:
        """Reduce and keep one output of a layer; note in ``misfits`` what does not fit the batch."""
        if not self._is_on:
            return
        found = self.recording
        number = found.heard.get(layer, 0)
        found.heard[layer] = number + 1
        if not self._is_asked_for(layer):
            return
        if self.sink is not None:
            self.sink(layer, number, output)
            return
        activation, arrangement = self.activation_of(layer, output), self.arrangements.get(layer)
        if activation is None:
            found.misfits[layer] = f"its output holds no floating-point tensor but {describe(output)}"
        elif layer in self.refused:
            found.misfits[layer] = self.refused[layer]
        elif arrangement is not None and arrangement.calls and number not in arrangement.calls:
            pass
        elif self._calls != "first" or layer not in found.features:
            self._add(layer, activation, arrangement)

    def activation_of(self, layer: str, output: Any) -> Tensor | PackedSequence | None:
        """Return what :func:`first_activation` finds in an output of a layer; a nested tensor as features.

        A component of a nested tensor is a sample of its own length: its features are ``(samples, width)``.
        """
        found = first_activation(output)
        if isinstance(found, PackedSequence):
            self.units[layer] = "step"
        elif found is not None and found.is_nested:
            self.units[layer] = "token"
            found = nested_features(found, self.tokens.get(layer, "mean"))
        return found

    def _is_asked_for(self, layer: str) -> bool:
        return self._is_on and (self.recording.only is None or layer in self.recording.only)

    def _add(self, layer: str, activation: Tensor | PackedSequence, arrangement: Arrangement | None) -> None:
        found = self.recording
        packed = activation if isinstance(activation, PackedSequence) else None
        found.shapes[layer] = tuple(values_of(activation).shape)
        try:
            rows = self._rows(layer, activation, arrangement)
        except ContradictionError as error:
            found.misfits[layer] = str(error)
            if found.samples > 1:  # A network may drop a dimension of a single sample.
                found.contradictions[layer] = str(error)
            return
        except ValueError as error:
            found.misfits[layer] = str(error)
            return
        arrangement, tokens = arrangement or PLAIN, self.tokens.get(layer, "mean")
        so_far = found.features.get(layer) if self._calls == "mean" else None
        # Lent memory already holds the mean of earlier calls, so a later call is not written there.
        memory = self.memory.get(layer) if so_far is None and arrangement.is_as_it_is else None
        try:
            axes = self._axes(layer, rows.shape)
            mask = None
            if found.masks is not None and rows.dim() == 3 and axes == "tokens":
                mask = found.masks.of(layer, rows.shape[1], is_repeated=arrangement.is_batch_after_batch)
            if found.positions is None:
                features = self._reducer(layer, rows, axes=axes, out=memory, mask=mask, tokens=tokens)
                if packed is None or tokens == "mean":
                    features = arrangement.join(features, found.samples, found.index, packed)
            elif arrangement.is_as_it_is:
                features = self._reducer(layer, found.positions.features(rows, axes), out=memory)
            else:
                raise NoPositionsError("its rows are parts of samples, in which the positions of labels are unknown")
        except (OtherSizeError, NoPositionsError) as error:
            found.misfits[layer] = str(error)
            return
        if so_far is not None and len(so_far) != len(features):
            found.misfits[layer] = f"its calls have {len(so_far)} and {len(features)} samples, which have no mean"
            return
        width = self.widths.setdefault(layer, features.shape[1])
        if features.shape[1] != width:
            found.misfits[layer] = f"it has {features.shape[1]} features where it had {width} before"
            return
        self.shapes[layer] = tuple(rows.shape)
        self.totals[layer] = rows.numel() // len(rows)
        found.counts[layer] = found.counts.get(layer, 0) + 1
        found.features[layer] = features if so_far is None else so_far.add_((features - so_far) / found.counts[layer])

    def _rows(self, layer: str, activation: Tensor | PackedSequence, arrangement: Arrangement | None) -> Tensor:
        """Return an activation with the rows of samples in dimension 0, of a packed sequence those that count.

        Raises:
            ContradictionError, ValueError: the activation does not fit its arrangement or, without any, the batch.
        """
        found = self.recording
        if arrangement is not None:
            rows, tokens = arrangement.rows(activation, found.samples, found.index), self.tokens.get(layer, "mean")
            if tokens == "mean" or not isinstance(activation, PackedSequence):
                return rows
            if len(ends := packed_ends(activation, tokens)) != found.samples:
                raise ContradictionError(f"it puts out {len(ends)} packed sequences for {found.samples} labels")
            return ends
        if isinstance(activation, PackedSequence) or not activation.numel() or len(activation) != found.samples:
            shape = "a packed sequence" if isinstance(activation, PackedSequence) else list(activation.shape)
            raise ValueError(
                f"its activation has shape {shape}, whose first dimension is not that of the {found.samples} labels of "
                "the batch"
            )
        return activation

    def _hook(self, layer: str, module: nn.Module) -> Any:
        known = weakref.ref(module)  # The place where this listens outlives a module that nobody detaches.

        def heard(output: Any) -> None:
            # Activation checkpointing runs a layer again inside backward, where the same samples come a second time.
            module = known()
            if module is not None and vars(module).get(HEARD_BY, self) is self and not is_in_backward():
                self.take(layer, output)

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            # This is asked first: nothing that changes from step to step may become a condition of compiled code.
            if torch.compiler.is_compiling():
                found = first_float_tensor(output)
                tell(None if found is None or found.is_nested else found.detach(), place)
            # Most of many layers are not asked for in a step, and leave here.
            elif self._is_asked_for(layer):
                take(output)

        # A compiler that leaves a module to python may compile its hooks on their own, so `heard` is kept from it.
        take = never_compiled(heard)
        place = self._places[layer] = listen(module, take)
        return part_of_a_graph(hook)


def _assumed(layer: str, shape: Sequence[int]) -> Axes:
    return assumed_axes(len(shape))
