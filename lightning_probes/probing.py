"""One network under probes: a batch goes in, the labels and every layer's features of that batch come out."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_probes.activations import ActivationRecorder, is_channels_first
from lightning_probes.arguments import Layout, Patterns, layouts, patterns, where, whole
from lightning_probes.layers import match_layers, select_layers
from lightning_probes.targets import Where, check_labels, distributions, find_num_classes, pick

INPUT = "input"
"""The name of the raw input among the layers: the probe at depth 0."""


class ProbedNetwork:
    """The layers of a network, their hooks, and what a batch says about them.

    The arguments are those of :class:`~lightning_probes.LinearProbeCallback`; :meth:`attach` begins, :meth:`open` and
    :meth:`close` stand around each batch, :meth:`detach` ends.

    Attributes:
        layers: the names of all layers, ``input`` first, in tree order until the first batch, then in order of calls.
        modules: the module of each layer but ``input``; empty once detached.
        notes: what a user should know about how the layers were chosen.
        trains_without_labels: whether the batches of training have no labels while those of validation have.
        has_input: whether the raw input is one of the layers.
    """

    def __init__(
        self,
        layers: Patterns | None = None,
        exclude: Patterns | None = None,
        *,
        num_classes: int | None = None,
        input: Where | None = 0,
        target: Where = 1,
        max_features: int = 1024,
        layout: Mapping[str, Layout] | None = None,
    ) -> None:
        self._patterns = patterns("layers", layers)
        self._exclude = patterns("exclude", exclude)
        self._layout = layouts(layout or {})
        self._given_classes = None if num_classes is None else whole("num_classes", num_classes)
        self._input = None if input is None else where("input", input)
        self._target = where("target", target)
        self.recorder = ActivationRecorder(whole("max_features", max_features))
        self.num_classes = self._given_classes or 0
        self.layers: list[str] = []
        self.modules: dict[str, nn.Module] = {}
        self.trains_without_labels = False
        self._validates_with_labels = False
        self.notes: list[str] = []
        self.has_input = False
        self._is_checked = self._is_ordered = False
        self._targets: Tensor | None = None

    def attach(self, model: nn.Module, *owners: Any, order: Sequence[str] | None = None) -> None:
        """Select the layers of ``model`` and hook them.

        Args:
            model: the network.
            owners: who else may know the number of classes, asked before the model (a datamodule).
            order: of the layers that were probed before: nothing is checked or left out any more.

        Raises:
            ValueError: the patterns or the number of classes cannot be resolved.
        """
        self.num_classes = self._given_classes or find_num_classes(*owners, model)
        modules, note = select_layers(model, self._patterns, self._exclude)
        self.notes = [note] if note else []
        parents = {child: parent for parent in model.modules() for child in parent.children()}
        channels = {layer: is_channels_first(module, parents) for layer, module in modules.items()}
        for pattern, kind in self._layout.items():
            named = [INPUT] if pattern == INPUT else match_layers(model, pattern, "layout")
            channels |= dict.fromkeys(named, kind == "channels")
        self._input_channels_first = channels.get(INPUT, False)
        if self._input is not None and INPUT in modules:
            self.notes.append("raw input skipped: a module has the name 'input'")
        self.has_input = self._input is not None and INPUT not in modules
        self.layers = [INPUT] * self.has_input + list(modules)
        self._is_checked, self._is_ordered = order is not None, False
        if order is not None:
            self.restore(order)
        self.modules = modules
        self.trains_without_labels = self._validates_with_labels = False
        self.recorder.attach(modules, channels)

    def restore(self, order: Sequence[str]) -> None:
        """The layers of an earlier run, in its order, which stays as it is."""
        self.layers, self.has_input, self._is_ordered = list(order), INPUT in order and self.has_input, True

    def detach(self) -> None:
        """Remove all hooks."""
        self.recorder.detach()
        self.modules = {}
        self._targets = None

    def preview(self, batch: Any) -> None:
        """A batch of validation before training begins: if it has usable labels, those of training need none."""
        try:
            check_labels(pick(batch, self._target, "target"), self.num_classes)
            self._validates_with_labels = True
        except Exception:  # whatever a user's function raises; a mistake will show in training
            pass

    def open(self, batch: Any, only: Container[str] | None = None) -> None:
        """Take the labels and the raw input of ``batch``, before the step can change them, and begin to record.

        Args:
            batch: as Lightning's hooks get it.
            only: the layers to record, if not all.

        Raises:
            LookupError, TypeError, ValueError: the first batch has no usable labels, and none that was previewed.
                Later ones are passed over.
        """
        self._targets = None
        try:
            labels = pick(batch, self._target, "target")
            if not self._is_checked:
                check_labels(labels, self.num_classes)
            self._targets = distributions(labels, self.num_classes)
        except Exception as error:  # whatever a user's function raises
            if not self._is_checked and not self.trains_without_labels:
                if not self._validates_with_labels:
                    raise
                self.trains_without_labels = True
                self.notes.append(f"batches of training have no usable labels ({error})")
            return
        self.recorder.start(len(self._targets), only)
        if self.has_input:
            self._record_input(batch)

    def observe(self, samples: int, run: Callable[[], None]) -> dict[str, Tensor]:
        """What the layers say in a ``run`` of theirs outside of all steps, on ``samples``; in memory of their own."""
        memory, self.recorder.memory = self.recorder.memory, {}
        ActivationRecorder.alone = self.recorder
        self.recorder.start(samples)
        try:
            run()
        finally:
            ActivationRecorder.alone = None
            self.recorder.memory, features = memory, self.recorder.stop()
        return features

    def check(self) -> None:
        """In the first step, once its activations are there: raise if a layer asked for by name cannot be probed.

        Raises:
            ValueError: naming layer, shape and number of labels.
        """
        if not self._is_checked and self._patterns is not None and not self.trains_without_labels:
            for layer, reason in self.recorder.misfits.items():
                if layer != INPUT and layer not in self.recorder.features:
                    raise ValueError(f"layers: {layer!r} cannot be probed: {reason}")

    def close(self) -> tuple[dict[str, Tensor], Tensor] | None:
        """What the batch showed, if anything: ``{layer: (samples, features)}`` and targets ``(batch, classes)``."""
        if self._targets is None:
            return None
        targets, self._targets = self._targets, None
        self.check()
        misfits = dict(self.recorder.misfits)
        features = self.recorder.stop()
        if not self._is_checked:
            self._settle(features, misfits)
        # A function of the user's may make labels on another device.
        devices = {x.device for x in features.values()}
        return features, targets.to(devices.pop()) if len(devices) == 1 else targets

    def _record_input(self, batch: Any) -> None:
        assert self._input is not None
        try:
            value = pick(batch, self._input, "input")
        except Exception as error:  # whatever a user's function raises
            if not self._is_checked and not isinstance(error, LookupError):
                raise
            value = None
        if isinstance(value, Tensor):
            self.recorder.record(INPUT, value, channels_first=self._input_channels_first)

    def _settle(self, features: Mapping[str, Tensor], misfits: Mapping[str, str]) -> None:
        """After the first batch: the order of the calls, and no layer that nobody asked for and that does not fit."""
        self._is_checked = True
        if self._is_ordered:
            return
        if self.has_input and INPUT not in features:
            self.notes.append("raw input skipped: the batch has no such float tensor")
            self.layers.remove(INPUT)
            self.has_input = False
        if self._patterns is None:
            unfit = [layer for layer in self.layers if layer not in features]
            for layer in unfit:
                self.recorder.detach(layer)
            if unfit:
                reason = (
                    "did not run or do not fit the batch" if len(unfit) > 1 else misfits.get(unfit[0], "did not run")
                )
                self.notes.append(f"left out: {', '.join(unfit)} ({reason})")
            self.layers = [layer for layer in self.layers if layer not in unfit]
        calls = {layer: order for order, layer in enumerate(features)}
        self.layers.sort(key=lambda layer: calls.get(layer, len(calls)))
