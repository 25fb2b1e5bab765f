"""Forward hooks: a layer's output -> detached float features ``(samples, features)``, reduced inside the hook."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_probes.network.batches import describe
from lightning_probes.network.pooling import OtherSizeError, Reducer
from lightning_probes.network.torch_internals import leave, listen, never_compiled, part_of_a_graph, tell
from lightning_probes.options import Calls

_LENGTH_MODULES = (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, nn.InstanceNorm1d)
_NOT_HEARD = "it never ran, or in code that was compiled before the probes came: call torch.compiler.reset() before fit"


def first_float_tensor(output: Any) -> Tensor | None:
    """The first floating-point tensor with a batch dimension in a tensor, sequence, mapping or dataclass."""
    if isinstance(output, Tensor):
        # Padded batches can come as nested tensors, which have no shape.
        is_dense = not output.is_nested and output.layout == torch.strided
        return output if is_dense and output.is_floating_point() and output.dim() else None
    if isinstance(output, Mapping):
        parts = list(output.values())
    elif isinstance(output, (list, tuple)):
        parts = list(output)
    elif is_dataclass(output) and not isinstance(output, type):
        parts = [getattr(output, field.name) for field in fields(output)]
    else:
        return None
    return next((found for part in parts if (found := first_float_tensor(part)) is not None), None)


def is_channels_first(module: nn.Module, siblings: Mapping[nn.Module, nn.Module]) -> bool:
    """Whether three dimensions out of ``module`` mean ``(batch, channels, length)`` and not ``(batch, tokens, width)``.

    They do if the module is or holds a Conv1d or BatchNorm1d, or is an element without parameters (an activation, a
    pooling) directly beside one. ``siblings`` maps a module to its parent.
    """
    if any(isinstance(below, _LENGTH_MODULES) for below in module.modules()):
        return True
    parent = siblings.get(module)
    is_element = next(module.parameters(), None) is None
    return is_element and parent is not None and any(isinstance(child, _LENGTH_MODULES) for child in parent.children())


class ActivationRecorder:
    """Hooks on the selected layers that, while recording, keep each layer's reduced features of one step.

    Attributes:
        features: ``{layer: (samples, features)}`` of the step being recorded, in the order of the calls.
        reducer: makes features of activations.
        calls: which of several calls of a layer counts, of those whose first dimension is a multiple of the batch: the
            last, the first, or the mean of all that have as many samples as the first.
        misfits: ``{layer: what was wrong}`` of the calls that could not be used, in the step being recorded.
        faults: ``{layer: what was raised}`` by hooks since somebody asked.
        widths: ``{layer: features}`` of every layer seen so far.
        totals: ``{layer: values per sample before reduction}`` of every layer seen so far.
        memory: ``{layer: (samples, features)}``, lent by whoever uses the features: where to put those that fit.
        compiled: the layers inside of compiled code: if it is older than their hooks it does not call them.
        alone: the one for which a network is run at present outside of all steps; the others do not listen.
    """

    alone: ClassVar[ActivationRecorder | None] = None

    def __init__(self, reducer: Reducer, calls: Calls = "last") -> None:
        self.reducer = reducer
        self.calls = calls
        self.features: dict[str, Tensor] = {}
        self.misfits: dict[str, str] = {}
        self.faults: dict[str, Exception] = {}
        self.totals: dict[str, int] = {}
        self.memory: dict[str, Tensor] = {}
        self.compiled: set[str] = set()
        self._samples: int | None = None
        self._mask: Tensor | None = None
        self._counts: dict[str, int] = {}
        self._places: dict[str, int] = {}
        self._only: Container[str] | None = None
        self._unhookable: dict[str, str] = {}
        self.widths: dict[str, int] = {}
        self._hooks: dict[str, torch.utils.hooks.RemovableHandle] = {}

    @property
    def reasons(self) -> dict[str, str]:
        """Why layers may have no features, as far as is known: :attr:`misfits`, and what may be of compiled code."""
        return dict.fromkeys(self.compiled, _NOT_HEARD) | self.misfits

    def attach(
        self, layers: Mapping[str, nn.Module], channels_first: Mapping[str, bool], compiled: Container[int] = ()
    ) -> None:
        """Register one hook a layer; the modules stay as they are but for it. ``compiled``: ids of such modules."""
        self.detach()
        self.compiled = {layer for layer, module in layers.items() if id(module) in compiled}
        self.widths, self.totals, self._unhookable = {}, {}, {}
        for layer, module in layers.items():
            if isinstance(module, torch.jit.ScriptModule):
                self._unhookable[layer] = "it is a TorchScript module, which takes no hooks"
                continue
            self._hooks[layer] = module.register_forward_hook(self._hook(layer, module, channels_first[layer]))

    def detach(self, layer: str | None = None) -> None:
        """Remove the hook of ``layer``, or all of them, and what was recorded."""
        for name in [layer] if layer is not None else list(self._hooks):
            if name in self._hooks:
                self._hooks.pop(name).remove()
                leave(self._places.pop(name))
            self.features.pop(name, None)
            self.misfits.pop(name, None)
            self.memory.pop(name, None)
        if layer is None:
            self._samples = self._mask = None
            # The raw input has memory too, but no hook.
            self.memory = {}

    def start(self, samples: int, only: Container[str] | None = None, mask: Tensor | None = None) -> None:
        """Record from now on, ``only`` some layers or all.

        ``samples`` is the number of labels of the batch, ``mask`` says which of its tokens count.
        """
        self.features, self.misfits, self._samples, self._only = {}, dict(self._unhookable), samples, only
        self._mask, self._counts = mask, {}

    def stop(self) -> dict[str, Tensor]:
        """End the step; returns its features and lets go of them."""
        features, self.features, self._samples, self._mask = self.features, {}, None, None
        return features

    def take(self, layer: str, output: Any, *, channels_first: bool = False) -> None:
        """As :meth:`record`, in the midst of training: what that raises goes to ``faults``."""
        try:
            self.record(layer, output, channels_first=channels_first)
        except Exception as error:
            self.misfits[layer] = f"{type(error).__name__}: {error}"
            self.faults[layer] = error.with_traceback(None)  # whose frames hold the activation

    def record(self, layer: str, output: Any, *, channels_first: bool = False) -> None:
        """Reduce and keep one output of a layer; what does not fit the batch is noted in ``misfits``."""
        if self._samples is None or (self._only is not None and layer not in self._only):
            return
        activation = first_float_tensor(output)
        if activation is None:
            self.misfits[layer] = f"its output holds no floating-point tensor but {describe(output)}"
        elif not len(activation) or not activation.numel() or len(activation) % self._samples:
            self.misfits[layer] = (
                f"its activation has shape {tuple(activation.shape)}, whose first dimension is no multiple "
                f"of the {self._samples} labels of the batch"
            )
        elif self.calls != "first" or layer not in self.features:
            self._add(layer, activation, channels_first)

    def _add(self, layer: str, activation: Tensor, channels_first: bool) -> None:
        so_far = self.features.get(layer) if self.calls == "mean" else None
        if so_far is not None and len(so_far) != len(activation):
            self.misfits[layer] = f"its calls have {len(so_far)} and {len(activation)} samples, which have no mean"
            return
        # The memory that is lent is where the mean of the earlier calls is.
        memory = self.memory.get(layer) if so_far is None else None
        try:
            features = self.reducer(layer, activation, channels_first=channels_first, out=memory, mask=self._mask)
        except OtherSizeError as error:
            self.misfits[layer] = str(error)
            return
        width = self.widths.setdefault(layer, features.shape[1])
        if features.shape[1] != width:
            self.misfits[layer] = f"it has {features.shape[1]} features where it had {width} before"
            return
        self.totals[layer] = activation.numel() // len(activation)
        self._counts[layer] = self._counts.get(layer, 0) + 1
        self.features[layer] = features if so_far is None else so_far.add_((features - so_far) / self._counts[layer])

    def _hook(self, layer: str, module: nn.Module, channels_first: bool) -> Any:
        def heard(output: Any) -> None:
            # Activation checkpointing runs a layer again inside backward: the same samples a second time.
            if torch._C._current_graph_task_id() == -1 and ActivationRecorder.alone in (None, self):
                self.take(layer, output, channels_first=channels_first)

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            # Asked first: of what changes from step to step nothing may become a condition of compiled code.
            if torch.compiler.is_compiling():
                found = first_float_tensor(output)
                tell(None if found is None else found.detach(), place)
            # Of many layers most are not asked for in a step: they leave here.
            elif self._samples is not None and (self._only is None or layer in self._only):
                take(output)

        # Nor is what happens here compiled on its own, where a compiler leaves a module to python.
        take = never_compiled(heard)
        place = self._places[layer] = listen(module, take)
        return part_of_a_graph(hook)
