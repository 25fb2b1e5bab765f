"""Extract from a network what probes need: a batch goes in, targets and every layer's features come out."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from itertools import chain
from typing import Any

from torch import Tensor, nn

from lightning_probes.network.batches import LabelReader, find_task, pick
from lightning_probes.network.hooks import ActivationRecorder, Recording, is_channels_first
from lightning_probes.network.layers import match_layers, select_layers
from lightning_probes.network.pooling import Reducer
from lightning_probes.network.torch_internals import compiled_parts
from lightning_probes.options import Reading, patterns
from lightning_probes.probes.dataset import LayerBatch
from lightning_probes.probes.tasks import Task

INPUT = "input"
"""Name the raw input among the layers; its probe is at depth 0."""


class LayerExtractor:
    """Hook the layers of a network, and extract their features and the targets of each batch.

    Call :meth:`attach` first, :meth:`open` before and :meth:`close` after the step of each batch, and :meth:`detach` at
    the end.

    Args:
        layers: layers to probe, as for :class:`~lightning_probes.LinearProbeCallback`.
        exclude: layers to take away.
        reading: the checked options on how batches and activations are read.

    Attributes:
        layers: names of all layers, ``input`` first. They are in tree order before the first batch, and in the order of
            their calls after it.
        selected: names of the layers that were selected, also of those that do not fit the first batch.
        modules: the module of each layer but ``input``; empty once detached.
        notes: what a user should know about how the layers were chosen.
        labels: reads the labels of each batch.
        recorder: holds the hooks.
        reducer: reduces activations to features.
        has_input: whether the raw input is one of the layers.
        mask: which tokens of the last opened batch count; ``None`` if that batch has no mask.
        is_ordered: whether the layers and their order are fixed, in all processes.
    """

    def __init__(self, layers: Any, exclude: Any, reading: Reading) -> None:
        self.layers: list[str] = []
        self.selected: list[str] = []
        self.modules: dict[str, nn.Module] = {}
        self.notes: list[str] = []
        self.labels = LabelReader(reading["target"], reading["token_mask"])
        self.reducer = Reducer(reading["reduction"], reading["max_features"])
        self.recorder = ActivationRecorder(self.reducer, reading["calls"])
        self.has_input = False
        self.mask: Tensor | None = None
        self.is_ordered = False
        self._patterns = patterns("layers", layers)
        self._exclude = patterns("exclude", exclude)
        self._reading = reading
        self._input_channels_first = False
        self._unfit: dict[str, str] = {}
        self._targets: Tensor | None = None

    @property
    def task(self) -> Task:
        """Return what the probes are asked; its number of outputs is 0 before the first batch if only labels tell."""
        return self.labels.task

    def learn_outputs(self, outputs: int) -> None:
        """Take the number of outputs from a checkpoint, unless it is known already."""
        if outputs and not self.task.outputs:
            self.labels.task = find_task(outputs)

    def attach(self, model: nn.Module, *owners: Any, order: Sequence[str] | None = None) -> None:
        """Select the layers of ``model`` and hook them.

        Args:
            model: the network.
            owners: other objects that may know the number of classes, such as a datamodule; they are asked before the
                model.
            order: layers that were probed before, in their order; if given, nothing is checked or left out any more.

        Raises:
            ValueError: the patterns cannot be resolved.
        """
        # For layers that were probed before, labels or a checkpoint may have told the number of outputs.
        known = self._reading["num_classes"] or (self.task.outputs if order is not None else 0)
        task = find_task(known or None, *owners, model)
        modules, note = select_layers(model, self._patterns, self._exclude)
        self.notes = [note] if note else []
        self.notes += [self.reducer.note] if self.reducer.note else []
        parents = {child: parent for parent in model.modules() for child in parent.children()}
        channels = {layer: is_channels_first(module, parents) for layer, module in modules.items()}
        for pattern, kind in (self._reading["layout"] or {}).items():
            named = [INPUT] if pattern == INPUT else match_layers(model, pattern, "layout")
            channels |= dict.fromkeys(named, kind == "channels")
        self._input_channels_first = channels.get(INPUT, False)
        takes_input = self._reading["input"] is not None
        if takes_input and INPUT in modules:
            self.notes.append("raw input skipped: a module has the name 'input'")
        self.has_input = takes_input and INPUT not in modules
        self.layers = [INPUT] * self.has_input + list(modules)
        self.selected = list(self.layers)
        self.labels.begin(task, is_checked=order is not None)
        self.is_ordered = False
        self._unfit = {}
        self.modules = modules
        self.recorder.attach(modules, channels, compiled_parts(model)[1])
        if order is not None:
            self.restore(order)

    def restore(self, order: Sequence[str]) -> None:
        """Keep to the layers of an earlier run, in their order; remove the hooks of other layers."""
        self.layers = list(order)
        self.has_input = INPUT in order and self.has_input
        self.is_ordered = True
        for layer in self.modules.keys() - set(self.layers):
            self.recorder.detach(layer)

    def detach(self) -> None:
        """Remove all hooks."""
        self.recorder.detach()
        self.modules = {}
        self._targets = None
        self.mask = None

    def open(self, batch: Any, only: Container[str] | None = None) -> None:
        """Take the labels and the raw input of ``batch``, before the step can change them, and start recording.

        Args:
            batch: a batch as Lightning's hooks get it.
            only: layers to record; ``None`` for all.

        Raises:
            LookupError, TypeError, ValueError: the first batch has no usable labels, nor had a previewed one; or it has
                no usable mask where the user said. Later batches like this are passed over.
        """
        self._targets = self.labels.read(batch)
        self.mask = None
        if self._targets is None:
            return
        self.mask = self.labels.read_mask(batch, len(self._targets))
        self.recorder.start(len(self._targets), only, self.mask)
        if self.has_input:
            self._record_input(batch)

    def abandon(self) -> None:
        """Discard an opened batch whose step did not end."""
        self._targets = None
        self.recorder.stop()

    def count_only(self, samples: int | None) -> None:
        """Count only the first ``samples`` samples of the open batch; count all with ``None``."""
        if samples is not None and self._targets is not None:
            self._targets = self._targets.clone()
            self._targets[samples:] = self.task.left_out

    def observe(self, samples: int, run: Callable[[], None], mask: Tensor | None = None) -> Recording:
        """Record the layers while ``run`` runs them outside of a step, without lent memory.

        Args:
            samples: number of samples that are run.
            run: runs the layers.
            mask: which tokens of each sample count.
        """
        recorder = self.recorder
        memory, before = recorder.memory, recorder.recording
        recorder.memory = {}
        recorder.start(samples, mask=mask)
        try:
            run()
        finally:
            found = recorder.stop()
            recorder.memory, recorder.recording = memory, before
        return found

    def check(self) -> None:
        """Raise if a layer that the user named cannot be probed; check the activations of the first batch only.

        Raises:
            ValueError: a layer cannot be probed; the message names layer, shape and number of labels.
        """
        if not self.labels.is_checked and self._patterns is not None and not self.labels.absent_in_training:
            for layer, reason in self.recorder.recording.misfits.items():
                if layer != INPUT and layer not in self.recorder.recording.features:
                    raise ValueError(f"layers: {layer!r} cannot be probed: {reason}")

    def close(self) -> LayerBatch | None:
        """Stop recording, and return the features and targets of the batch; ``None`` if it had no usable labels."""
        if self._targets is None:
            return None
        targets, self._targets = self._targets, None
        self.check()
        found = self.recorder.stop()
        if not self.labels.is_checked:
            self._settle(found)
        # A function of the user's may make labels on another device.
        devices = {x.device for x in found.features.values()}
        targets = targets.to(devices.pop()) if len(devices) == 1 else targets
        return LayerBatch(found.features, targets, found.faults)

    def _record_input(self, batch: Any) -> None:
        where = self._reading["input"]
        assert where is not None
        try:
            value = pick(batch, where, "input")
        except Exception as error:  # A user's function may raise anything.
            if not self.labels.is_checked and not isinstance(error, LookupError):
                raise
            value = None
        if isinstance(value, Tensor):
            self.recorder.take(INPUT, value, channels_first=self._input_channels_first)

    def _settle(self, found: Recording) -> None:
        """Order the layers as the first batch called them; leave out misfits unless the user named them."""
        self.labels.is_checked = True
        if self.is_ordered:
            return
        if self.has_input and INPUT not in found.features:
            self.notes.append("raw input skipped: the batch has no such float tensor")
            self.layers.remove(INPUT)
            self.has_input = False
        if self._patterns is None:
            # Compiled code may not call the hooks of its layers, which are called when the batch is run again.
            fit = found.features.keys() | self.recorder.compiled
            misfits = found.misfits
            self._unfit = {layer: misfits.get(layer, "did not run") for layer in self.layers if layer not in fit}
            self.layers = [layer for layer in self.layers if layer in fit]
        calls = {layer: order for order, layer in enumerate(found.features)}
        self.layers.sort(key=lambda layer: calls.get(layer, len(calls)))

    def agree(self, gather: Callable[[Any], list[Any]]) -> None:
        """Make all processes probe, after the first step, the layers that any process probes, in one order.

        The hooks of other layers are removed.

        Args:
            gather: returns the values that all processes give to it.
        """
        if self.is_ordered:
            return
        known = gather((self.labels.is_checked, self.layers, self.task, self.recorder.widths))
        self.labels.task = max((task for *_, task, _ in known), key=lambda task: task.outputs)
        if found := [layers for is_settled, layers, *_ in known if is_settled]:
            self.labels.is_checked = True
            layers = list(dict.fromkeys(chain(*found)))
            widths = {layer: {own[layer] for *_, own in known if layer in own} for layer in layers}
            differing = [layer for layer in layers if len(widths[layer]) > 1]
            self.restore([layer for layer in layers if layer not in differing])
            if differing:
                self.notes.append(f"left out: {', '.join(differing)} (of other widths in other processes)")
            if unfit := [layer for layer in self._unfit if layer not in layers]:
                reason = self._unfit[unfit[0]] if len(unfit) == 1 else "did not run or do not fit the batch"
                self.notes.append(f"left out: {', '.join(unfit)} ({reason})")
