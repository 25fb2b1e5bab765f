"""One network under probes: a batch goes in, the labels and every layer's features of that batch come out."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor, nn

from lightning_probes.network.batches import UnknownClassesError, Where, find_num_classes, pick
from lightning_probes.network.hooks import ActivationRecorder, is_channels_first
from lightning_probes.network.labels import ATTENTION_MASK, LabelReader
from lightning_probes.network.layers import match_layers, select_layers
from lightning_probes.network.pooling import Reducer
from lightning_probes.network.torch_internals import compiled_parts
from lightning_probes.options import (
    Calls,
    Layout,
    Patterns,
    Reduction,
    calls_of,
    layouts,
    patterns,
    reduction_of,
    where,
    whole,
)

INPUT = "input"
"""The name of the raw input among the layers: the probe at depth 0."""


class ProbedNetwork:
    """The layers of a network, their hooks, and what a batch says about them.

    The arguments are those of :class:`~lightning_probes.LinearProbeCallback`; :meth:`attach` begins, :meth:`open` and
    :meth:`close` stand around each batch, :meth:`detach` ends.

    Attributes:
        layers: the names of all layers, ``input`` first, in tree order until the first batch, then in order of calls.
        selected: those that were selected, before the first batch showed which do not fit.
        modules: the module of each layer but ``input``; empty once detached.
        notes: what a user should know about how the layers were chosen.
        labels: reads those of each batch.
        reducer: makes features of activations.
        has_input: whether the raw input is one of the layers.
        mask: which tokens of the batch that was opened last count; ``None`` if that batch does not say.
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
        reduction: Reduction = "pool",
        layout: Mapping[str, Layout] | None = None,
        calls: Calls = "last",
        token_mask: Where | None = ATTENTION_MASK,
    ) -> None:
        self._patterns = patterns("layers", layers)
        self._exclude = patterns("exclude", exclude)
        self._layout = layouts(layout or {})
        self._given_classes = None if num_classes is None else whole("num_classes", num_classes)
        self._input = None if input is None else where("input", input)
        mask = None if token_mask is None else where("token_mask", token_mask)
        self.labels = LabelReader(where("target", target), mask)
        self.reducer = Reducer(reduction_of(reduction), whole("max_features", max_features))
        self.recorder = ActivationRecorder(self.reducer, calls_of(calls))
        self.mask: Tensor | None = None
        self.num_classes = self._given_classes or 0
        self.layers: list[str] = []
        self.selected: list[str] = []
        self.modules: dict[str, nn.Module] = {}
        self.notes: list[str] = []
        self.has_input = False
        self._is_ordered = False
        self._targets: Tensor | None = None

    def attach(self, model: nn.Module, *owners: Any, order: Sequence[str] | None = None) -> None:
        """Select the layers of ``model`` and hook them.

        Args:
            model: the network.
            owners: who else may know the number of classes, asked before the model (a datamodule).
            order: of the layers that were probed before: nothing is checked or left out any more.

        Raises:
            ValueError: the patterns cannot be resolved.
        """
        # Of layers that were probed before it may have been told by the labels, or by a checkpoint.
        num_classes, unknown = self.num_classes if order is not None else 0, ""
        try:
            num_classes = self._given_classes or num_classes or find_num_classes(*owners, model)
        except UnknownClassesError as error:
            unknown = str(error)
        modules, note = select_layers(model, self._patterns, self._exclude)
        self.notes = [note] if note else []
        if self.reducer.kind != "pool":
            self.notes.append(f"features: a random {self.reducer.kind} of at most {self.reducer.max_features} values")
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
        self.selected = list(self.layers)
        self.labels.begin(num_classes, is_checked=order is not None, unknown=unknown)
        self._is_ordered = False
        self._unfit: dict[str, str] = {}
        if order is not None:
            self.restore(order)
        self.modules = modules
        self.recorder.attach(modules, channels, compiled_parts(model)[1])

    @property
    def num_classes(self) -> int:
        """Return how many classes there are; 0 before the first batch where only its labels tell."""
        return self.labels.num_classes

    @num_classes.setter
    def num_classes(self, num_classes: int) -> None:
        self.labels.num_classes = num_classes

    def restore(self, order: Sequence[str]) -> None:
        """The layers of an earlier run, in its order, which stays as it is; the hooks of others are removed."""
        self.layers, self.has_input, self._is_ordered = list(order), INPUT in order and self.has_input, True
        for layer in self.modules.keys() - set(self.layers):
            self.recorder.detach(layer)

    def detach(self) -> None:
        """Remove all hooks."""
        self.recorder.detach()
        self.modules = {}
        self._targets = self.mask = None

    def open(self, batch: Any, only: Container[str] | None = None) -> None:
        """Take the labels and the raw input of ``batch``, before the step can change them, and begin to record.

        Args:
            batch: as Lightning's hooks get it.
            only: the layers to record, if not all.

        Raises:
            LookupError, TypeError, ValueError: the first batch has no usable labels, and none that was previewed; or
                no usable mask where the user said. Later ones are passed over.
        """
        self._targets, self.mask = self.labels.read(batch), None
        if self._targets is None:
            return
        self.mask = self.labels.read_mask(batch, len(self._targets))
        self.recorder.start(len(self._targets), only, self.mask)
        if self.has_input:
            self._record_input(batch)

    def count_only(self, samples: int | None) -> None:
        """Of the batch that is open leave out all samples but the first so many; ``None``: none."""
        if samples is not None and self._targets is not None:
            self._targets = self._targets.clone()
            self._targets[samples:] = 0

    def observe(self, samples: int, run: Callable[[], None], mask: Tensor | None = None) -> dict[str, Tensor]:
        """What the layers say in a ``run`` of theirs outside of all steps, on ``samples``; in memory of their own."""
        memory, self.recorder.memory = self.recorder.memory, {}
        misfits = self.recorder.misfits
        ActivationRecorder.alone = self.recorder
        self.recorder.start(samples, mask=mask)
        try:
            run()
        finally:
            ActivationRecorder.alone = None
            self.recorder.memory, features = memory, self.recorder.stop()
            self.recorder.misfits = misfits
        return features

    def check(self) -> None:
        """In the first step, once its activations are there: raise if a layer asked for by name cannot be probed.

        Raises:
            ValueError: naming layer, shape and number of labels.
        """
        if not self.labels.is_checked and self._patterns is not None and not self.labels.absent_in_training:
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
        if not self.labels.is_checked:
            self._settle(features, misfits)
        # A function of the user's may make labels on another device.
        devices = {x.device for x in features.values()}
        return features, targets.to(devices.pop()) if len(devices) == 1 else targets

    def _record_input(self, batch: Any) -> None:
        assert self._input is not None
        try:
            value = pick(batch, self._input, "input")
        except Exception as error:  # whatever a user's function raises
            if not self.labels.is_checked and not isinstance(error, LookupError):
                raise
            value = None
        if isinstance(value, Tensor):
            self.recorder.take(INPUT, value, channels_first=self._input_channels_first)

    def _settle(self, features: Mapping[str, Tensor], misfits: Mapping[str, str]) -> None:
        """After the first batch: the order of the calls, and no layer that nobody asked for and that does not fit."""
        self.labels.is_checked = True
        if self._is_ordered:
            return
        if self.has_input and INPUT not in features:
            self.notes.append("raw input skipped: the batch has no such float tensor")
            self.layers.remove(INPUT)
            self.has_input = False
        if self._patterns is None:
            # Compiled code may know nothing of its layers: they are heard when it is run again.
            fit = features.keys() | self.recorder.compiled
            self._unfit = {layer: misfits.get(layer, "did not run") for layer in self.layers if layer not in fit}
            self.layers = [layer for layer in self.layers if layer in fit]
        calls = {layer: order for order, layer in enumerate(features)}
        self.layers.sort(key=lambda layer: calls.get(layer, len(calls)))

    def agree(self, gather: Callable[[Any], list[Any]]) -> None:
        """After the first step: what any process probes all do, in one order; the hooks of other layers are removed.

        Args:
            gather: gives what each process has.
        """
        if self._is_ordered:
            return
        known = gather((self.labels.is_checked, self.layers, self.num_classes, self.recorder.widths))
        self.num_classes = max(number for *_, number, _ in known)
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
