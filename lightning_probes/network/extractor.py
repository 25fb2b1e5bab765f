"""Extract from a network what probes need: a batch goes in, targets and every layer's features come out."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lightning_probes.network.arrangement import PLAIN, Arrangement, LayerReduction, by_layout
from lightning_probes.network.axes import FeatureAxes
from lightning_probes.network.batches import pick, pick_index, tensors_in
from lightning_probes.network.hooks import ActivationRecorder, Recording
from lightning_probes.network.labels import LabelReader, find_question
from lightning_probes.network.layers import Selection, match_layers, select_layers
from lightning_probes.network.masks import MaskReader, Masks
from lightning_probes.network.pairing import TRAINING, Outcome, Pairing, choose, may_fit_batch
from lightning_probes.network.pooling import Reducer
from lightning_probes.network.positions import Positions, bit_sums
from lightning_probes.network.provenance import Provenance
from lightning_probes.network.tokens import TokenChoice
from lightning_probes.network.torch_internals import compiled_parts
from lightning_probes.options import Axes, Reading, RowLayout, Tokens, first_of, patterns
from lightning_probes.probes.dataset import LayerBatch, mark_rows
from lightning_probes.tasks.task import Question

INPUT = "input"
"""Name the raw input among the layers; its probe is at depth 0."""


@dataclass(frozen=True)
class OpenedBatch:
    """Hold what has to be known of a batch to read the features of its samples again.

    Attributes:
        samples: number of samples.
        data: name of the data that the batch comes from.
        masks: which tokens of each sample count; ``None`` for all.
        index: sample of each row, if the batch has such a vector; ``None`` if it has none.
        positions: where in each sample the labels are; ``None`` for one label a sample.
    """

    samples: int
    data: str = TRAINING
    masks: Masks | None = None
    index: Tensor | None = None
    positions: Positions | None = None


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
        axes: knows which dimension of each layer's activation holds features.
        metrics: metrics of torchmetrics that the user asked for, by name.
        row_layout: what the user said of the rows of layers: ``time_first``, ``parts`` or ``views``.
        absent: layers that were waited for in vain; see :meth:`leave_absent`.
        has_input: whether the raw input is one of the layers.
        mask_reader: reads the masks of each batch, and knows how they were used.
        tokens: knows how the tokens of each layer become features.
        masks: which tokens of the last opened batch count; ``None`` if that batch has no mask.
        index: sample of each row, if the last opened batch has such a vector; ``None`` if it has none.
        is_ordered: whether the layers and their order are fixed, in all processes.
        pairings: ``{data: what is known of its rows}``, where data are those of one loader, such as ``val/0``.
        pairing: the one of the last opened batch.
    """

    def __init__(self, layers: Any, exclude: Any, reading: Reading) -> None:
        if reading["positions"] is not None:
            _refuse_with_positions(reading)
        self.layers: list[str] = []
        self.selected: list[str] = []
        self.modules: dict[str, nn.Module] = {}
        self.notes: list[str] = []
        mask = reading["token_mask"]
        self.labels = LabelReader(
            reading["target"],
            find_question(reading),
            reading["positions"],
            token_mask=None if isinstance(mask, Mapping) else mask,
        )
        self.mask_reader = MaskReader(reading["token_mask"])
        self.tokens = TokenChoice(reading["tokens"])
        self.reducer = Reducer(reading["reduction"], reading["max_features"])
        self.axes = FeatureAxes(nn.Module(), {})
        self.metrics: Mapping[str, Any] = reading["metrics"]  # type: ignore[assignment]  # It is checked by now.
        self.row_layout: dict[str, str] = {}
        self.absent: list[str] = []
        self.recorder = ActivationRecorder(self.reducer, reading["calls"])
        self.has_input = False
        self.index: Tensor | None = None
        self.masks: Masks | None = None
        self.is_ordered = False
        self.pairings: dict[str, Pairing] = {}
        self.pairing = Pairing()
        self._patterns = patterns("layers", layers)
        self._exclude = patterns("exclude", exclude)
        self._reading = reading
        self._selection = Selection({})
        self._layout: dict[str, list[str]] = {}
        self._unfit: dict[str, str] = {}
        self._targets: Tensor | None = None
        self._marks: Tensor | None = None
        self._found = Recording(0)
        self._counting = 0

    @property
    def question(self) -> Question:
        """Return what the probes are asked; its number of outputs is 0 before the first batch if only labels tell."""
        return self.labels.question

    @property
    def left_out(self) -> dict[str, str]:
        """Return ``{layer: reason}`` of the layers that the first batch does not fit, so that they are not probed."""
        return dict(self._unfit)

    @property
    def why_missing(self) -> dict[str, str]:
        """Return ``{layer: reason}`` of the selected layers that have no probe: those left out, and those absent."""
        return self.left_out | {layer: self.recorder.reasons.get(layer, "it did not run") for layer in self.absent}

    def learn_question(self, state: Mapping[str, Any]) -> None:
        """Take from a checkpoint what the labels of its run had shown of the question, if it is the same one."""
        if state["outputs"]:
            self.labels.question = self.question.restored(state)

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
        # For layers that were probed before, labels or a checkpoint may have told what else there is to know.
        is_known = order is not None and self.question.outputs
        question = self.question if is_known else find_question(self._reading, *owners, model)
        self._selection = select_layers(model, self._patterns, self._exclude)
        modules = self._selection.layers
        self.notes = [self._selection.note] if self._selection.note else []
        self.notes += [self.reducer.note] if self.reducer.note else []
        takes_input = self._reading["input"] is not None
        if takes_input and INPUT in modules:
            self.notes.append("raw input skipped: a module has the name 'input'")
        self.has_input = takes_input and INPUT not in modules
        self.layers = [INPUT] * self.has_input + list(modules)
        self.selected = [INPUT] * self.has_input + self._selection.settled()
        axes = self._read_layout(model, is_checked=order is not None)
        self.labels.begin(question, is_checked=order is not None)
        self.is_ordered = False
        self._unfit = {}
        self.modules = modules
        self.mask_reader.attach(model, modules, INPUT)
        self.pairings = self.pairings if order is not None else {}
        if order is None or not self.axes.is_watched:
            self.axes = FeatureAxes(model, modules, axes)
        self.tokens.attach(
            self.layers,
            {x: self._probed(model, x, "tokens", is_checked=order is not None) for x in self.tokens.patterns},
        )
        self.recorder.attach(modules, self.axes.of, compiled_parts(model)[1])
        self.recorder.tokens = self.tokens.kinds
        if order is None:
            self.absent = []
        else:
            self.restore(order)

    def _read_layout(self, model: nn.Module, *, is_checked: bool) -> dict[str, Axes]:
        """Resolve the patterns of ``layout``, and return the axes that it gives, by layer.

        Raises:
            ValueError: a pattern names no layer that is probed.
        """
        axes: dict[str, Axes] = {}
        self.row_layout, self._layout = {}, {}
        for pattern, kind in (self._reading["layout"] or {}).items():
            self._layout[pattern] = probed = self._probed(model, pattern, "layout", is_checked=is_checked)
            if kind == "tokens" or kind == "channels" or kind == "channels_last":
                axes |= dict.fromkeys(probed, kind)
            else:
                self.row_layout |= dict.fromkeys(probed, kind)
        return axes

    def _probed(self, model: nn.Module, pattern: str, argument: str, *, is_checked: bool) -> list[str]:
        """Return the probed layers that a pattern of an argument names.

        Raises:
            ValueError: it names no layer, or none that is probed; the latter does not count if that was checked before.
        """
        is_input = pattern == INPUT and INPUT not in self._selection.layers
        named = [INPUT] if is_input else list(match_layers(model, pattern, argument))
        probed = [layer for layer in named if layer in self.layers]
        if not probed and not is_checked:
            raise ValueError(
                f"{argument}: {pattern!r} has no effect, since none of {first_of(named)} is probed; probed are "
                f"{first_of(self.layers, 8)}"
            )
        return probed

    def heard(self) -> dict[str, int]:
        """Return how often each layer has been called so far in the step under way."""
        return self.recorder.recording.heard

    def restore(self, order: Sequence[str]) -> None:
        """Keep to the layers of an earlier run, in their order; remove the hooks of other layers."""
        self.layers = list(order)
        self.has_input = INPUT in order and self.has_input
        self.is_ordered = True
        for layer in self.modules.keys() - set(self.layers) | set(self.absent):
            self.recorder.detach(layer)

    def detach(self) -> None:
        """Remove all hooks."""
        self.recorder.detach()
        self.modules = {}
        self._targets = None
        self.masks = None

    def open(self, batch: Any, only: Container[str] | None = None, data: str = TRAINING) -> Provenance | None:
        """Take the labels and the raw input of ``batch``, before the step can change them, and start recording.

        Args:
            batch: a batch as Lightning's hooks get it.
            only: layers to record; ``None`` for all.
            data: name of the data that the batch comes from, each with rows of its own.

        Returns:
            What follows the samples of the batch through the step, if it is not known yet which row is of which sample;
            else ``None``.

        Raises:
            LookupError, TypeError, ValueError: the first batch has no usable labels, nor had a previewed one; or it has
                no usable mask where the user said. Later batches like this are passed over.
        """
        self._targets = self.labels.read(batch, self._salt_of(batch) if self.labels.has_positions else None)
        self._marks = None if data == TRAINING or self._targets is None else self._marks_of(batch)
        self._found = Recording(0)
        self.pairing = self.pairings.setdefault(data, Pairing(data))
        self.masks = None
        self.index = None
        if self._targets is None:
            return None
        self._counting = len(self._targets)
        samples = len(self._targets) // self._each
        self.masks = self.mask_reader.read(batch, samples, is_first=not self.labels.is_checked)
        self.index = pick_index(batch)
        # All layers are needed while it is not known which rows are of which sample.
        self._start(samples, only if self.pairing.is_known else None)
        value = self._picked_input(batch)
        if self.has_input and isinstance(value, Tensor):
            self._record_input(value, samples)
        if self.pairing.is_known:
            return None
        if self.index is not None and (len(self.index) == 0 or int(self.index.max()) >= samples):
            self.index = None
        rows = self._rows_of_input(value, samples)
        labels = self.labels.where(batch)
        try:
            return Provenance(
                batch, labels, samples, value, index=self.index, rows=rows, may_trace=not self.recorder.compiled
            )
        except Exception as error:  # A batch may hold any kind of tensor.
            self.pairing.give_up(f"following the batch raised {type(error).__name__}: {error}")
            return None

    def _start(self, samples: int, only: Container[str] | None = None) -> None:
        self.recorder.arrangements = self.pairing.arrangements
        self.recorder.refused = self.pairing.refused
        self.recorder.start(samples, only, self.masks, self.index, self.labels.positions)

    def abandon(self) -> None:
        """Discard an opened batch whose step did not end."""
        self._targets = None
        self.recorder.stop()

    def count_only(self, samples: int | None) -> None:
        """Count only the first ``samples`` samples of the open batch; count all with ``None``."""
        if samples is not None and self._targets is not None:
            self._counting = min(samples * self._each, len(self._targets))
            self._targets = self._targets.clone()
            self.question.leave_out_(self._targets[self._counting :])

    def opened(self, samples: int, copy: Callable[[Tensor], Tensor]) -> OpenedBatch:
        """Return what has to be known of the last opened batch, with copies of its tensors made by ``copy``."""
        masks = None if self.masks is None else self.masks.copied(copy)
        index = None if self.index is None else copy(self.index)
        positions = None if self.labels.positions is None else self.labels.positions.copied(copy)
        return OpenedBatch(samples, self.pairing.data, masks, index, positions)

    @property
    def _each(self) -> int:
        """Return how many targets a sample of the last opened batch has."""
        return 1 if self.labels.positions is None else self.labels.positions.each

    def observe(self, batch: OpenedBatch, run: Callable[[], None]) -> Recording:
        """Record the layers while ``run`` runs them outside of a step, without lent memory.

        Args:
            batch: what is known of the batch that is run.
            run: runs the layers.
        """
        recorder = self.recorder
        before = recorder.memory, recorder.recording, recorder.arrangements, recorder.refused
        recorder.memory = {}
        pairing = self.pairings.get(batch.data, Pairing(batch.data))
        recorder.arrangements, recorder.refused = pairing.arrangements, pairing.refused
        recorder.start(batch.samples, masks=batch.masks, index=batch.index, positions=batch.positions)
        try:
            run()
        finally:
            found = recorder.stop()
            recorder.memory, recorder.recording, recorder.arrangements, recorder.refused = before
        return found

    def check(self) -> None:
        """Raise if what the user wrote of layers does not fit the activations of the first batch.

        Raises:
            ValueError: a layer that the user named cannot be probed, or ``layout`` or ``tokens`` have no effect; the
                message names the layer and its shape.
        """
        is_first = not self.labels.is_checked and self._targets is not None
        if is_first and not self.is_ordered and not self.labels.absent_in_training:
            self._check_layout()
            self.tokens.check(self._has_tokens(), self.recorder.shapes | self.recorder.recording.shapes)
        if not self.labels.is_checked and self._patterns is not None and not self.labels.absent_in_training:
            found = self.recorder.recording
            for layer, reason in found.misfits.items():
                is_open = not self.pairing.is_known and layer in found.shapes
                may_fit = is_open and (layer not in self._patterns or may_fit_batch(found.shapes[layer], found.samples))
                if layer != INPUT and layer not in found.features and not may_fit:
                    raise ValueError(f"layers: {layer!r} cannot be probed: {reason}")

    def _check_layout(self) -> None:
        shapes = self.recorder.shapes
        for pattern, layers in self._layout.items():
            kind = (self._reading["layout"] or {})[pattern]
            seen = [layer for layer in layers if layer in shapes]
            raw = self.recorder.recording.shapes
            rows = [layer for layer in layers if layer in raw]
            samples = self.recorder.recording.samples
            if kind in get_args(RowLayout) and rows and not any(by_layout(kind, raw[x], samples) for x in rows):
                found = ", ".join(f"{layer} {list(raw[layer])}" for layer in rows[:3])
                expected = "as second dimension" if kind == "time_first" else "several times as first dimension"
                raise ValueError(
                    f"layout: {pattern!r} has no effect: {kind!r} is about the {samples} samples {expected}, found "
                    f"{found}"
                )
            if kind in get_args(Axes) and seen and all(len(shapes[layer]) < 3 for layer in seen):
                found = ", ".join(f"{layer} {shapes[layer]}" for layer in seen[:3])
                raise ValueError(
                    f"layout: {pattern!r} has no effect: {kind!r} is about three dimensions or more, found {found}"
                )

    def _has_tokens(self) -> dict[str, bool]:
        """Return ``{layer: whether its activation has tokens}`` of the layers of which that is known by now."""
        recorder, found = self.recorder, dict[str, bool]()
        for layer in self.layers:
            shape, raw = recorder.shapes.get(layer), recorder.recording.shapes.get(layer)
            if layer in recorder.units:
                found[layer] = True
            elif shape is not None:
                found[layer] = len(shape) > 2 and self.axes.of(layer, shape) == "tokens"
            elif raw is not None and len(raw) < 3:
                found[layer] = False
        return found

    @property
    def ways_of_tokens(self) -> dict[str, Tokens]:
        """Return ``{layer: how its tokens become features}`` of the layers that are known to have tokens."""
        layers = dict.fromkeys([*self.axes.with_tokens, *self.recorder.units])
        return {layer: self.tokens.kinds.get(layer, "mean") for layer in layers}

    @property
    def notes_on_tokens(self) -> list[str]:
        """Return what a reader of the report should know of masks and tokens that were not simply read."""
        arranged: dict[str, Arrangement] = {}
        for pairing in self.pairings.values():
            arranged = {**pairing.arrangements, **arranged}
        return [*self.mask_reader.notes, *self.tokens.notes(self._has_tokens(), arranged)]

    def reduction_of(self, layer: str) -> LayerReduction:
        """Return what makes features of an activation of a layer, as they were made for its probe."""
        return LayerReduction(
            layer,
            self.reducer.of_layer(layer),
            self.axes.of_layer(layer),
            self.tokens.kinds.get(layer, "mean"),
            self._arrangement_of(layer) or PLAIN,
            self.labels.has_positions,
        )

    def _arrangement_of(self, layer: str) -> Arrangement | None:
        return next((x for pairing in self.pairings.values() if (x := pairing.arrangements.get(layer))), None)

    def close(self) -> LayerBatch | None:
        """Stop recording, and return the features and targets of the batch; ``None`` if it had no usable labels."""
        if self._targets is None:
            return None
        self.check()
        targets, self._targets = self._targets, None
        self._found = found = self.recorder.stop()
        if found.contradictions and not found.features:
            # Where nothing fits any more, the number of labels is to blame, and not every layer.
            self.labels.pass_over(f"{len(targets)} labels, and {next(iter(found.contradictions.values()))}")
            found.contradictions = {}
            return None
        count = self.labels.count(targets, self._counting)
        # A function of the user's may make labels on another device.
        devices = {x.device for x in found.features.values()}
        targets = targets.to(devices.pop()) if len(devices) == 1 else targets
        return LayerBatch(found.features, targets, found.faults, count, self._each, self._marks)

    def _salt_of(self, batch: Any) -> Tensor | None:
        """Return a number for each sample that depends on its input; ``None`` without such a tensor."""
        with suppress(Exception):  # A user's function may raise anything, and an input may be any kind of tensor.
            return bit_sums(pick(batch, self._reading["input"], "input"), 1)  # type: ignore[arg-type]
        return None

    def _marks_of(self, batch: Any) -> Tensor | None:
        """Return a number for each sample that only its input has, or else what there is of it in the batch.

        It is ``None`` without any such tensor.
        """
        samples = len(self._targets) // self._each if self._targets is not None else 0
        with suppress(Exception):  # As above.
            where = self._reading["input"]
            value = None if where is None else pick(batch, where, "input")
            inputs = [value] if isinstance(value, Tensor) else tensors_in(batch)
            marks = []
            for tensor in inputs:
                if tensor.dim() and len(tensor) % samples == 0:
                    marks.append(mark_rows(tensor.detach().reshape(samples, -1)))
            return torch.stack(marks).sum(dim=0) if marks else None
        return None

    def _picked_input(self, batch: Any) -> Any:
        where = self._reading["input"]
        if where is None:
            return None
        try:
            return pick(batch, where, "input")
        except Exception as error:  # A user's function may raise anything.
            if not self.labels.is_checked and not isinstance(error, LookupError):
                raise
            return None

    def _rows_of_input(self, value: Any, samples: int) -> Tensor | None:
        """Return the sample of each row of the input if the user says that a sample has several."""
        layout = self.row_layout.get(INPUT)
        if layout not in ("parts", "views") or not isinstance(value, Tensor):
            return None
        if (found := by_layout(layout, value.shape, samples)) is None:
            return None
        rows = torch.arange(len(value), device=value.device)
        return rows // found.each if layout == "parts" else rows % samples

    def _record_input(self, value: Tensor, samples: int) -> None:
        if INPUT not in self.pairing.arrangements and (found := self._arranged_input(value, samples)) is not None:
            self.pairing.arrangements[INPUT] = found
        self.recorder.take(INPUT, value)

    def _arranged_input(self, value: Tensor, samples: int) -> Arrangement | None:
        if (layout := self.row_layout.get(INPUT)) is not None:
            return by_layout(layout, value.shape, samples)
        if self.index is not None and value.dim() and len(value) == len(self.index):
            return Arrangement("indexed")
        places = [dim for dim, size in enumerate(value.shape[:2]) if size == samples]
        return Arrangement("rows", places[0]) if places else None

    def pair(self, outcomes: Mapping[str, Mapping[int, Outcome]], *, is_shuffled: bool, not_run: str) -> None:
        """Take in what an experiment with the last closed batch found.

        Args:
            outcomes: ``{layer: {number of the call: what was found}}`` of the layers that could be run again.
            is_shuffled: whether the step mixed samples before the network saw them.
            not_run: why some of the step could not be run again; empty if all could.
        """
        found = self._found
        # A layer that was not run again may have one row a sample by its shape.
        ordered: dict[str, Mapping[int, Outcome]] = {
            layer: outcomes.get(layer, {}) for layer in found.heard if layer in outcomes or layer in found.features
        }
        ordered |= {layer: calls for layer, calls in outcomes.items() if layer not in ordered}
        ordered.pop(INPUT, None)
        wanted = {layer: meaning for layer, meaning in self.row_layout.items() if meaning != "time_first"}
        ones = {layer for layer, x in found.features.items() if len(x) == found.samples * self._each}
        found_out = choose(ordered, self._reading["calls"], ones=ones, wanted=wanted)
        training = self.pairings.get(TRAINING)
        for layer, outcome in found_out.items():
            # A process that may make no further passes takes what training has shown of a layer that stays still.
            if outcome.is_still and training is not None and layer in training.arrangements:
                found_out[layer] = Outcome(training.arrangements[layer])
        self.pairing.learn(found_out, is_shuffled=is_shuffled)
        guessed = [x for x in found.features if x not in found_out and x != INPUT]
        if not_run and guessed:
            self.pairing.notes.append(f"rows of {first_of(guessed)}: one a sample is assumed, since {not_run}")
        for layer, layout in self.row_layout.items():
            known = self.pairing.arrangements.get(layer)
            is_said = layout != "time_first" and known is not None and known.rows_in_a_sample > 1
            shape = found.shapes.get(layer)
            if shape and not is_said and (forced := by_layout(layout, shape, found.samples)) is not None:
                self.pairing.arrangements[layer] = forced
                self.pairing.refused.pop(layer, None)

    def read(self, activations: Mapping[tuple[str, int], Any], seen: LayerBatch) -> LayerBatch:
        """Return the features of a batch from the activations of all calls of its layers, as they are arranged now.

        Args:
            activations: ``{(layer, number of the call): activation}``.
            seen: features of the batch as they were read in the step, which stay where there is no activation.
        """

        def take_all() -> None:
            for (layer, number), activation in activations.items():
                self.recorder.skip_to({layer: number})
                self.recorder.take(layer, activation)

        for layer, _ in activations:
            # The width that was seen in the step may be that of another call.
            self.recorder.widths.pop(layer, None)
        # Compiled code that does not call its hooks will not call them in later steps either.
        unheard = self.recorder.compiled - self._found.heard.keys()
        found = self.observe(self.opened(seen.samples, lambda part: part), take_all)
        found.features = {layer: x for layer, x in found.features.items() if layer not in unheard}
        again = {layer for layer, _ in activations}
        kept = {layer: x for layer, x in seen.features.items() if layer not in again}
        self._found.features = kept | found.features
        self._found.misfits = {
            layer: reason for layer, reason in self._found.misfits.items() if layer not in again
        } | found.misfits
        # Run again, a network also calls the layers that its step skipped by chance.
        order = dict.fromkeys([INPUT, *(layer for layer, _ in activations), *self._found.heard])
        heard = self._found.heard | dict.fromkeys(again - self._found.heard.keys(), 1)
        self._found.heard = {layer: heard[layer] for layer in order if layer in heard}
        return replace(seen, features=self._found.features, faults=seen.faults | found.faults)

    def settle(self) -> None:
        """Order the layers as the last closed batch, the first one, called them; leave out misfits.

        Nothing is done for a later batch.
        """
        found = self._found
        if self.labels.is_checked or not found.samples:
            return
        self.labels.is_checked = True
        if self.is_ordered:
            return
        if self.has_input and INPUT not in found.features:
            reason = found.misfits.get(INPUT, "")
            reason = reason if "shape" in reason else "the batch has no such float tensor"
            self.notes.append(f"raw input skipped: {reason}")
            self.layers.remove(INPUT)
            self.has_input = False
        # Where a step mixes samples, validation may tell more of the layers.
        refused = {} if self.pairing.is_shuffled else self.pairing.refused
        belongs = (
            found.features.keys() | self.pairing.arrangements.keys() | self.pairing.refused.keys() - refused.keys()
        )
        called = [layer for layer in found.heard if layer in belongs]
        self._unfit = {layer: reason for layer, reason in refused.items() if layer in self.layers}
        if self._patterns is None:
            # Compiled code may not call the hooks of its layers, which are called when the batch is run again. A layer
            # that did not run may have been skipped by chance: it keeps its place until the first publication. So does
            # one that a later batch may show to fit.
            if not self.pairing.is_known:
                belongs |= {x for x, shape in found.shapes.items() if may_fit_batch(shape, found.samples)}
            stays = {INPUT, *self._selection.settled(called)}
            for layer in [layer for layer in self.layers if layer not in stays]:
                self.recorder.detach(layer)
                found.features.pop(layer, None)
            fit = belongs | self.recorder.compiled
            misfits = {layer: reason for layer, reason in found.misfits.items() if layer not in fit}
            self._unfit = {layer: reason for layer, reason in (misfits | self._unfit).items() if layer in stays}
            self.layers = [layer for layer in self.layers if layer in stays]
        if self.labels.positions is not None:
            # Whether a layer has the positions of labels shows at once.
            self._unfit |= {x: found.misfits[x] for x in self.layers if x in found.misfits and x not in found.features}
        self.layers = [layer for layer in self.layers if layer not in self._unfit]
        self._order(called)
        self._note_assumed()

    def _note_assumed(self) -> None:
        """Note whose axes are assumed, where another choice would have given other features."""
        # An image is taken for what it is, and without pooling a map has the same features in whatever order.
        unpooled = {layer for layer, values in self.recorder.totals.items() if values <= self.reducer.max_features}
        assumed = {layer: axes for layer, axes in self.axes.assumed.items() if layer in self.layers}
        for kind in get_args(Axes):
            plain = set[str]() if kind == "tokens" else unpooled | {INPUT}
            if layers := [layer for layer, axes in assumed.items() if axes == kind and layer not in plain]:
                self.notes.append(f"assumed to be {kind}, since no module tells (see layout): {first_of(layers, 8)}")

    def _order(self, called: list[str]) -> None:
        """Order the layers by their calls; a layer that was not called comes after the one before it in the tree."""
        calls = {layer: order for order, layer in enumerate(called)}
        places: dict[str, int] = {}
        place = -1
        for layer in self.layers:
            places[layer] = place = calls.get(layer, place)
        self.layers.sort(key=places.__getitem__)

    def leave_absent(self, ran: Container[str]) -> None:
        """Leave out the default layers that are not among those that ``ran``, with a note; a run has one such moment.

        Vectors over layers keep the place of such a layer, which has no samples.

        Args:
            ran: layers that have had features, in any process.
        """
        if self._patterns is not None:
            return
        # Compiled code may not call hooks: layers there may have run.
        known = {INPUT, *self.recorder.compiled}
        self.absent = [layer for layer in self.layers if layer not in ran and layer not in known]
        by_reason: dict[str, list[str]] = {}
        for layer in self.absent:
            by_reason.setdefault(self.recorder.reasons.get(layer, "did not run"), []).append(layer)
            self.recorder.detach(layer)
        self.notes += [f"left out: {', '.join(layers)} ({reason})" for reason, layers in by_reason.items()]

    def how(self, layer: str) -> dict[str, Any]:
        """Return what a layer is and how its activation became features.

        The keys are ``module``, its class, ``shape`` of the activation without its first dimension, ``rows``: which of
        them are of a sample, and ``reduction``.
        """
        shape = self.recorder.shapes.get(layer)
        module = self.modules.get(layer)
        what = {"module": "" if module is None else type(module).__name__, "shape": list(shape or ())[1:]}
        return {**what, **self._how(layer, shape)}

    def _how(self, layer: str, shape: tuple[int, ...] | None) -> dict[str, str]:
        known, tokens = self._arrangement_of(layer), self.tokens.kinds.get(layer, "mean")
        rows = "" if known is None else known.described(tokens)
        if self.labels.positions is not None:
            axes = None if shape is None else self.axes.of(layer, shape)
            reduction = "" if axes is None else self.labels.positions.described(shape or (), axes)
            return {"rows": rows or f"{self._each} positions a sample", "reduction": reduction}
        reduction = ""
        if shape is not None:
            is_masked = self.mask_reader.is_applied(layer)
            unit = "" if tokens == "mean" else self.recorder.units.get(layer, "")
            axes = self.axes.of(layer, shape)
            reduction = self.reducer.described(shape, axes, is_masked=is_masked, tokens=tokens, unit=unit)
        return {"rows": rows or "one row a sample", "reduction": reduction}

    def pop_contradictions(self) -> dict[str, str]:
        """Return why layers of the last closed batch are not arranged as the first one showed, and refuse them."""
        found, self._found.contradictions = self._found.contradictions, {}
        for layer, reason in found.items():
            self.pairing.drop(layer, reason)
        return found

    def check_layers(self) -> None:
        """Raise if a layer that the user named by its path cannot be probed, or none is left.

        Raises:
            ValueError: the message has the reason of each layer.
        """
        if not self.labels.is_checked:
            return
        named = [layer for layer in self._unfit if layer in (self._patterns or [])]
        if named or (self._unfit and not set(self.layers) - {INPUT}):
            reasons = [f"{layer!r} cannot be probed: {self._unfit[layer]}" for layer in named or self._unfit]
            raise ValueError(f"layers: {'; '.join(reasons)}")

    def agree(self, gather: Callable[[Any], list[Any]]) -> None:
        """Make all processes probe, after the first step, the layers that any process probes, in one order.

        The hooks of other layers are removed.

        Args:
            gather: returns the values that all processes give to it.
        """
        if self.is_ordered:
            return
        known = gather((self.labels.is_checked, self.layers, self.question, self.recorder.widths))
        self.labels.question = max((asked for *_, asked, _ in known), key=lambda asked: asked.outputs)
        if found := [layers for is_settled, layers, *_ in known if is_settled]:
            self.labels.is_checked = True
            layers = list(dict.fromkeys(chain(*found)))
            widths = {layer: {own[layer] for *_, own in known if layer in own} for layer in layers}
            differing = [layer for layer in layers if len(widths[layer]) > 1]
            self.restore([layer for layer in layers if layer not in differing])
            if differing:
                self.notes.append(f"left out: {', '.join(differing)} (of other widths in other processes)")
            for reason in dict.fromkeys(self._unfit.values()):
                unfit = [layer for layer, why in self._unfit.items() if why == reason and layer not in layers]
                if unfit:
                    self.notes.append(f"left out: {', '.join(unfit)} ({reason})")


def _refuse_with_positions(reading: Reading) -> None:
    """Refuse options on means over tokens and space where each labelled position is a row of its own.

    Raises:
        ValueError: one is given.
    """
    given = {
        "tokens": reading["tokens"] != "mean",
        "token_mask": isinstance(reading["token_mask"], Mapping),
        "max_features": reading["reduction"] == "pool" and reading["max_features"] != 1024,
    }
    for name in (name for name, is_given in given.items() if is_given):
        what = "a mask by layer has" if name == "token_mask" else "it has"
        raise ValueError(
            f"{name}: {what} no effect with positions, of which each is a row by itself; leave one of the two out"
        )
