"""Define ``probe()``, which probes networks that are trained already, or not at all, and checkpoints."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.utils.data import DataLoader

from lightning_probes.checkpoints import CheckpointError
from lightning_probes.network.extractor import LayerExtractor
from lightning_probes.network.layers import is_any_lazy
from lightning_probes.network.pairing import notes_of
from lightning_probes.network.torch_internals import original_of
from lightning_probes.options import Reading, checked, first_of, takes_reading, whole
from lightning_probes.posthoc.networks import Network, copied, networks_to_probe
from lightning_probes.posthoc.passes import Pass, needs_building
from lightning_probes.posthoc.runner import Runner
from lightning_probes.probes.dataset import LayerBatch
from lightning_probes.probes.fit import FittedProbes, fit_layers, fitted_on_of
from lightning_probes.probes.linear import LayerProbes
from lightning_probes.report.curves import Curves, Kind, LayerFacts
from lightning_probes.report.label_counts import LabelCounts
from lightning_probes.report.layer_metrics import LayerMetrics
from lightning_probes.report.report import ProbeReport
from lightning_probes.tasks.kinds import kinds_of
from lightning_probes.training.two_passes import TwoPasses

if TYPE_CHECKING:
    from typing_extensions import Unpack


@takes_reading
def probe(
    model: nn.Module,
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    datamodule: LightningDataModule | None = None,
    *,
    ckpt_path: str | Path | Sequence[str | Path] | None = None,
    untrained: bool = False,
    layers: str | list[str] | None = None,
    exclude: str | list[str] | None = None,
    max_bytes: int = 4 * 2**30,
    weights_only: bool = True,
    trainer: Trainer | None = None,
    **reading: Unpack[Reading],
) -> ProbeReport:
    """Say what each layer of a network that is not being trained knows: its probe, fitted on all training data.

    One pass over the training data in eval mode keeps the reduced features, the probes are brought to their optimum,
    and one pass over the validation data scores them. The model is given batches by its own ``validation_step``. A
    module without one is called on ``input``, as keywords if that is a mapping, and on what its ``forward`` takes by
    name of the parts of the batch beside it (masks), but not on the targets. Nothing in the model changes: weights,
    buffers, flags, its trainer; nor do the random states.

    Args:
        model: a LightningModule, or any module.
        train_dataloaders: loader, or list of loaders, of the data that probes are fitted on. Not given: those of the
            datamodule or the LightningModule.
        val_dataloaders: loader, or list of loaders, of the data that probes are scored on. Not given: the same.
        datamodule: datamodule that has both.
        ckpt_path: checkpoints whose weights are probed in the place of the model's own: a path, a glob, or a list.
            A checkpoint that cannot be probed is named in ``report.notes``, and the others are probed.
        untrained: whether to probe also a copy with its parameters initialised anew, as epoch 0, step 0.
        layers: layers to probe, as for :class:`~lightning_probes.LinearProbeCallback`.
        exclude: layers to take away, named in the same way, with everything below them.
        {reading}
        max_bytes: greatest number of bytes of features in memory; further features go to temporary files (in the folder
            that TMPDIR names).
        weights_only: whether to read nothing but tensors and plain types from checkpoints. With ``False`` a checkpoint
            can run any code.
        trainer: the Lightning Trainer that runs the model: device, precision, strategy. Its callbacks and loggers are
            set aside while it runs. Default: one device, the fastest there is.

    Returns:
        The report; ``epoch`` and ``step`` of a row are those of its checkpoint, of the model's own trainer for the
        model as it is, and 0 if they are unknown (checkpoints without them are counted: steps 1, 2, ...); ``network``
        names the network. ``report.probe(layer)`` gives the classifiers of the last network. After Ctrl-C the report
        holds the networks that were probed.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: there is nothing to fit or score on, fewer samples than classes, a layer that was named never runs,
            a metric does not score the probes, or no checkpoint can be probed.
        TypeError: the model cannot be called, or an argument has a wrong type; the message says which.
        LookupError: the batches have no labels where ``target`` says.
        OSError: there is no space for features.
        Exception: whatever else the model raises. Once a network is probed, this and all of the above become notes.
        KeyboardInterrupt: the user pressed Ctrl-C before a network was probed.
    """
    _check_kinds(model, {"train": train_dataloaders, "val": val_dataloaders}, datamodule, trainer)
    read = checked(reading, "probe()", inspect.signature(probe).parameters)
    network = LayerExtractor(layers, exclude, read)
    model = original_of(model) or model  # Code that is compiled already calls no new hooks.
    networks = list(networks_to_probe(model, ckpt_path, untrained, weights_only))
    # A checkpoint needs a model of its own to be loaded into.
    own = model if all(one.is_given for one in networks) else copied(model)

    loaders = {"train": train_dataloaders, "val": val_dataloaders}
    builds = needs_building(model)

    @cache
    def stand_in(is_given: bool) -> Pass:
        net = model if is_given else own
        return Pass(
            net, network, read["input"], read["target"], loaders, datamodule, builds=builds, is_copy=not is_given
        )

    return _Posthoc(network, Runner(trainer), whole("max_bytes", max_bytes)).probe_all(networks, stand_in)


def _check_kinds(model: Any, loaders: dict[str, Any], datamodule: Any, trainer: Any) -> None:
    """Refuse arguments of the kind of another argument, and say where they belong."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a LightningModule or another torch module, found {_kind(model)}{_hint(model)}"
        )
    for stage, loader in loaders.items():
        if isinstance(loader, (type, str, Path, nn.Module, Trainer, LightningDataModule)):
            hint = _hint(loader) or "; the model comes first: probe(model, train_dataloaders, val_dataloaders)"
            raise TypeError(f"{stage}_dataloaders: expected a loader or a list of them, found {_kind(loader)}{hint}")
    if datamodule is not None and not isinstance(datamodule, LightningDataModule):
        hint = _hint(datamodule) or "; loaders are given as train_dataloaders and val_dataloaders"
        raise TypeError(f"datamodule: expected a LightningDataModule, found {_kind(datamodule)}{hint}")
    if trainer is not None and not isinstance(trainer, Trainer):
        raise TypeError(f"trainer: expected a Trainer of lightning.pytorch, found {_kind(trainer)}{_hint(trainer)}")


def _kind(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    # Other values may be long as text, or show no more than their address.
    return repr(value) if isinstance(value, (str, Path, int, float, type(None))) else f"a {type(value).__name__}"


def _hint(value: Any) -> str:
    if isinstance(value, type):
        return f"; give an instance of it: {value.__name__}(...)"
    for kind, belongs in (
        (Trainer, "probe(model, ..., trainer=trainer)"),
        (LightningDataModule, "probe(model, datamodule=datamodule)"),
        (DataLoader, "probe(model, train_dataloader, val_dataloader)"),
        ((str, Path), "probe(model, ..., ckpt_path=path)"),
    ):
        if isinstance(value, kind):
            return f"; it belongs elsewhere: {belongs}"
    return ""


class Interruption(str):
    """Note in a report of :func:`probe` that the user interrupted it, in a type that tells this note from others."""


class _Posthoc:
    """Fit and score the probes of one network after the other."""

    def __init__(self, network: LayerExtractor, runner: Runner, max_bytes: int) -> None:
        cost = {"seconds": 0.0, "share": 0.0, "kept_bytes": 0, "weights_bytes": 0}
        self.report = ProbeReport(cost=cost, tasks=kinds_of(network.question))
        self._network = network
        self._facts = LayerFacts(network)
        self._runner = runner
        self._max_bytes = max_bytes
        self._begun = time.perf_counter()
        self._done: dict[tuple[int, int], str] = {}
        self._fitted: FittedProbes | None = None

    def probe_all(self, networks: Sequence[Network], stand_in: Callable[[bool], Pass]) -> ProbeReport:
        """Probe one network after the other; once one is probed, note exceptions instead of raising them.

        With several processes, an exception that may be of one process only is raised, since the others would wait.
        """
        for number, one in enumerate(networks):
            if len(networks) > 1:
                rank_zero_info(f"probe: {one.name} ({number + 1} of {len(networks)})")
            try:
                self._probe(stand_in(one.is_given), one)
            except KeyboardInterrupt:
                if not self._done:
                    raise
                missing = ", ".join(other.name for other in networks[number:])
                self._tell(Interruption(f"interrupted; not probed: {missing}"))
                break
            except CheckpointError as error:
                self._tell(str(error))
            except Exception as error:
                if not self._done or self._runner.ranks.number > 1:
                    raise
                self._tell(f"{one.name} is not probed: {type(error).__name__}: {error}")
        if not self._done:
            raise CheckpointError("; ".join(self.report.notes))
        return self.report

    def _tell(self, reason: str) -> None:
        self.report.notes.append(reason)
        rank_zero_warn(f"probe: {reason}")

    def _probe(self, model: Pass, one: Network) -> None:
        """Probe a network, and enter its points in the report."""
        self._runner.build(model)
        if note := one.prepare(model.model):
            self._tell(note)
        if is_any_lazy(model.model):
            raise ValueError("model: it has parameters without a shape; run a batch through it first")
        if one.point in self._done:
            raise CheckpointError(f"{one.name} is of the same epoch and step as {self._done[one.point]}: left out")
        labels, metrics = LabelCounts(self._network.labels), LayerMetrics(self._network.metrics)
        passes = TwoPasses(self._network, labels, self._max_bytes)
        store = passes.store
        try:
            found = self._fit(model, passes, metrics)
        finally:
            store.close()
        assert found.target_sums is not None
        question, ranks = self._network.question, self._runner.ranks
        curves = Curves(self._network, ranks, labels, metrics)
        curves.add(Kind.PUBLISHED, ("train", 0), found.share_of(ranks), found.target_sums)
        self._runner.run(model, "val", partial(passes.score, probes=found.probes, curves=curves))
        if not ranks.total(passes.scored):
            raise ValueError("val_dataloaders: no batch with labels came out of it; there is nothing to score on")
        curves.agree(len(self._facts.layers))
        self._facts.agree(ranks)
        known = {layer: {**row, "network": one.name} for layer, row in found.known.items()}
        about = self._facts.about(known, found.probes.widths)
        curves.publish(Kind.PUBLISHED, self.report, about, point=one.point)
        scored = self.report.select(stage="val", metric="error", network=one.name)
        if lost := [row["layer"] for row in scored if math.isnan(row["value"])]:
            self._tell(f"no values of {first_of(lost)} in {one.name}: NaN or Inf in what they put out")
        share = self.report.cost["seconds"] / (time.perf_counter() - self._begun)
        self.report.cost |= {"share": share}
        where = f"{store.memory_bytes / 2**20:,.0f} MiB of features in memory"
        where += f", {store.file_bytes / 2**20:,.0f} MiB in temporary files" * (store.file_bytes > 0)
        notes = [
            *notes_of(self._network.pairings, self._network.tokens.kinds),
            *self._network.labels.notes,
            *self._network.notes_on_tokens,
            question.doubts(found.target_sums.tolist()),
            *curves.notes,
            where,
        ]
        self.report.notes = list(dict.fromkeys(filter(None, [*self.report.notes, *notes])))
        labels.tell(self.report)
        known_on = {layer: fitted_on_of(row) for layer, row in found.known.items()}
        reductions = {layer: self._network.reduction_of(layer) for layer in found.known}
        self.report.hold(LayerProbes(found.probes, reductions, known_on, self._network.why_missing))
        self._done[one.point] = one.name

    def _fit(self, model: Pass, passes: TwoPasses, metrics: LayerMetrics) -> FittedProbes:
        def keep(dataloader: int, batch: LayerBatch) -> None:
            metrics.try_out(self._network.question)  # A mistake should be known before hours of work.
            passes.keep(dataloader, batch)

        self._runner.run(model, "train", keep)
        ranks, begun = self._runner.ranks, time.perf_counter()
        self._network.agree(ranks.gather)
        dataset, store = passes.dataset, passes.store
        layers = self._network.layers
        seen = [dataset.labelled, *(layer in dataset.layers for layer in layers)]
        labelled, *ran = ranks.total(torch.tensor(seen)).tolist()
        if labelled and not self._done:
            self._network.leave_absent([layer for layer, n in zip(layers, ran, strict=True) if n])
            ran = [n for layer, n in zip(layers, ran, strict=True) if layer not in self._network.absent]
            layers = [layer for layer in layers if layer not in self._network.absent]
            self._network.restore(layers)
        self._check(labelled, [layer for layer, n in zip(layers, ran, strict=True) if n < ranks.number])
        progress = self._runner.progress
        with progress.during("Fitting probes"):
            found = fit_layers(
                self._network.question,
                dataset,
                layers,
                "train",
                ranks=ranks,
                device=self._runner.device,
                track=progress.track,
                before=self._fitted,
                share=1.0,
                is_strict=True,
            )
        assert found is not None
        self._fitted = found
        self.report.cost["seconds"] += time.perf_counter() - begun
        self.report.cost["kept_bytes"] = max(self.report.cost["kept_bytes"], store.memory_bytes + store.file_bytes)
        told = [*model.notes, *self._network.notes, *self._network.labels.notes, *self._network.notes_on_tokens]
        self.report.notes = list(dict.fromkeys([*self.report.notes, *told]))
        return found

    def _check(self, samples: int, silent: list[str]) -> None:
        if not samples:
            raise ValueError("train_dataloaders: no batch with labels came out of it; there is nothing to fit on")
        if objection := self._network.question.objection(samples):
            raise ValueError(f"train_dataloaders: {objection}")
        if not self._network.layers:
            told = "; ".join(f"{layer}: {reason}" for layer, reason in self._network.left_out.items())
            raise ValueError(f"layers: nothing is left to probe: {told or 'the network has no layer that is probed'}")
        if silent:
            raise ValueError(
                f"layers: {', '.join(map(repr, silent))} never ran on the training data, or had no features"
            )
