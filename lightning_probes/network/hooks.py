"""Hook layers, and reduce what each layer puts out to detached float features inside the hook."""

from __future__ import annotations

import weakref
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_probes.network.batches import describe, parts_of
from lightning_probes.network.pooling import OtherSizeError, Reducer
from lightning_probes.network.torch_internals import (
    is_in_backward,
    leave,
    listen,
    never_compiled,
    part_of_a_graph,
    tell,
)
from lightning_probes.options import Calls

HEARD_BY = "_lightning_probes_heard_by"
"""Name the attribute set on all modules during a replay: the recorder that alone listens."""

_LENGTH_MODULES = (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, nn.InstanceNorm1d)
_NOT_HEARD = "it never ran, or in code that was compiled before the probes came: call torch.compiler.reset() before fit"


def first_float_tensor(output: Any) -> Tensor | None:
    """Return the first floating-point tensor with a batch dimension in nested containers; ``None`` if there is none."""
    if isinstance(output, Tensor):
        # Padded batches can come as nested tensors, which have no shape.
        is_dense = not output.is_nested and output.layout == torch.strided
        return output if is_dense and output.is_floating_point() and output.dim() else None
    for part in parts_of(output).values():
        if (found := first_float_tensor(part)) is not None:
            return found
    return None


def is_channels_first(module: nn.Module, parents: Mapping[nn.Module, nn.Module]) -> bool:
    """Return whether three dimensions of a module's output mean ``(batch, channels, length)``, not tokens and width.

    That is so if the module is or holds a Conv1d or BatchNorm1d, or is an element without parameters (an activation, a
    pooling) directly beside one.

    Args:
        module: a module of a network.
        parents: the parent of each module of the network.
    """
    if any(isinstance(below, _LENGTH_MODULES) for below in module.modules()):
        return True
    parent = parents.get(module)
    is_element = next(module.parameters(), None) is None
    return is_element and parent is not None and any(isinstance(child, _LENGTH_MODULES) for child in parent.children())


@dataclass
class Recording:
    """Hold what the layers put out in one step.

    Attributes:
        samples: number of labels of the batch.
        only: layers to record; ``None`` for all.
        mask: which tokens of each sample count, ``(batch, tokens)``; ``None`` for all.
        features: ``{layer: (rows, features)}`` in the order of the calls.
        misfits: ``{layer: reason}`` of the calls that could not be used.
        faults: ``{layer: exception}`` of the hooks that raised.
        counts: ``{layer: number of calls that were used}``.
    """

    samples: int
    only: Container[str] | None = None
    mask: Tensor | None = None
    features: dict[str, Tensor] = field(default_factory=dict)
    misfits: dict[str, str] = field(default_factory=dict)
    faults: dict[str, Exception] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


class ActivationRecorder:
    """Hook layers, and keep the reduced features of each while a step is recorded.

    Args:
        reducer: reduces activations to features.
        calls: which of several calls of a layer counts, of those whose first dimension is a multiple of the batch: the
            last, the first, or the mean of all that have as many rows as the first.

    Attributes:
        recording: what is recorded in the step under way; after :meth:`stop` only the reasons why layers are missing.
        widths: ``{layer: features}`` of every layer seen so far.
        totals: ``{layer: values per sample before reduction}`` of every layer seen so far.
        memory: ``{layer: (samples, features)}``, lent by the probes that use the features; features of this shape are
            written there.
        compiled: layers in compiled code, which does not call hooks that are newer than the code.
    """

    def __init__(self, reducer: Reducer, calls: Calls = "last") -> None:
        self.recording = Recording(0)
        self.widths: dict[str, int] = {}
        self.totals: dict[str, int] = {}
        self.memory: dict[str, Tensor] = {}
        self.compiled: set[str] = set()
        self._reducer = reducer
        self._calls = calls
        self._is_on = False
        self._places: dict[str, int] = {}
        self._unhookable: dict[str, str] = {}
        self._hooks: dict[str, torch.utils.hooks.RemovableHandle] = {}

    @property
    def reasons(self) -> dict[str, str]:
        """Return ``{layer: reason}`` why layers may have no features, as the last step and compiled code tell."""
        return dict.fromkeys(self.compiled, _NOT_HEARD) | self.recording.misfits

    def attach(
        self, layers: Mapping[str, nn.Module], channels_first: Mapping[str, bool], compiled: Container[int] = ()
    ) -> None:
        """Register one hook on each layer, and change nothing else in the modules.

        Args:
            layers: the modules by layer.
            channels_first: whether three dimensions of a layer's output mean ``(batch, channels, length)``, by layer.
            compiled: ids of modules in compiled code.
        """
        self.detach()
        self.compiled = {layer for layer, module in layers.items() if id(module) in compiled}
        self.widths = {}
        self.totals = {}
        self._unhookable = {}
        for layer, module in layers.items():
            if isinstance(module, torch.jit.ScriptModule):
                self._unhookable[layer] = "it is a TorchScript module, which takes no hooks"
                continue
            self._hooks[layer] = module.register_forward_hook(self._hook(layer, module, channels_first[layer]))

    def detach(self, layer: str | None = None) -> None:
        """Remove the hook of ``layer``, or all hooks, and discard what was recorded."""
        for name in [layer] if layer is not None else list(self._hooks):
            if name in self._hooks:
                self._hooks.pop(name).remove()
                leave(self._places.pop(name))
            self.recording.features.pop(name, None)
            self.recording.misfits.pop(name, None)
            self.memory.pop(name, None)
        if layer is None:
            self._is_on = False
            # The raw input has features and memory too, but no hook.
            self.recording = Recording(0)
            self.memory = {}

    def start(self, samples: int, only: Container[str] | None = None, mask: Tensor | None = None) -> None:
        """Start recording a step; the arguments are those of :class:`Recording`."""
        self.recording = Recording(samples, only, mask, misfits=dict(self._unhookable))
        self._is_on = True

    def stop(self) -> Recording:
        """Stop recording and return the recording; keep only the reasons for missing layers."""
        found = self.recording
        self._is_on = False
        self.recording = Recording(0, misfits=dict(found.misfits))
        return found

    def take(self, layer: str, output: Any, *, channels_first: bool = False) -> None:
        """Record an output as :meth:`record` does; store exceptions in the recording, do not raise."""
        try:
            self.record(layer, output, channels_first=channels_first)
        except Exception as error:
            self.recording.misfits[layer] = f"{type(error).__name__}: {error}"
            self.recording.faults[layer] = error.with_traceback(None)  # The frames of a traceback would hold it.

    def record(self, layer: str, output: Any, *, channels_first: bool = False) -> None:
        """Reduce and keep one output of a layer; note in ``misfits`` what does not fit the batch."""
        if not self._is_asked_for(layer):
            return
        found, activation = self.recording, first_float_tensor(output)
        if activation is None:
            found.misfits[layer] = f"its output holds no floating-point tensor but {describe(output)}"
        elif not len(activation) or not activation.numel() or len(activation) % found.samples:
            found.misfits[layer] = (
                f"its activation has shape {tuple(activation.shape)}, whose first dimension is no multiple "
                f"of the {found.samples} labels of the batch"
            )
        elif self._calls != "first" or layer not in found.features:
            self._add(layer, activation, channels_first)

    def _is_asked_for(self, layer: str) -> bool:
        return self._is_on and (self.recording.only is None or layer in self.recording.only)

    def _add(self, layer: str, activation: Tensor, channels_first: bool) -> None:
        found = self.recording
        so_far = found.features.get(layer) if self._calls == "mean" else None
        if so_far is not None and len(so_far) != len(activation):
            found.misfits[layer] = f"its calls have {len(so_far)} and {len(activation)} samples, which have no mean"
            return
        # Lent memory already holds the mean of earlier calls, so a later call is not written there.
        memory = self.memory.get(layer) if so_far is None else None
        try:
            features = self._reducer(layer, activation, channels_first=channels_first, out=memory, mask=found.mask)
        except OtherSizeError as error:
            found.misfits[layer] = str(error)
            return
        width = self.widths.setdefault(layer, features.shape[1])
        if features.shape[1] != width:
            found.misfits[layer] = f"it has {features.shape[1]} features where it had {width} before"
            return
        self.totals[layer] = activation.numel() // len(activation)
        found.counts[layer] = found.counts.get(layer, 0) + 1
        found.features[layer] = features if so_far is None else so_far.add_((features - so_far) / found.counts[layer])

    def _hook(self, layer: str, module: nn.Module, channels_first: bool) -> Any:
        known = weakref.ref(module)  # The place where this listens outlives a module that nobody detaches.

        def heard(output: Any) -> None:
            # Activation checkpointing runs a layer again inside backward, where the same samples come a second time.
            module = known()
            if module is not None and vars(module).get(HEARD_BY, self) is self and not is_in_backward():
                self.take(layer, output, channels_first=channels_first)

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            # This is asked first: nothing that changes from step to step may become a condition of compiled code.
            if torch.compiler.is_compiling():
                found = first_float_tensor(output)
                tell(None if found is None else found.detach(), place)
            # Most of many layers are not asked for in a step, and leave here.
            elif self._is_asked_for(layer):
                take(output)

        # A compiler that leaves a module to python may compile its hooks on their own, so `heard` is kept from it.
        take = never_compiled(heard)
        place = self._places[layer] = listen(module, take)
        return part_of_a_graph(hook)
