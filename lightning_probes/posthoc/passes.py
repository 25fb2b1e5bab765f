"""Run batches through a model in Lightning's prediction loop and hand on the features of its layers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import BatchSampler, DataLoader

from lightning_probes.network.batches import unrepeated
from lightning_probes.network.extractor import LayerExtractor
from lightning_probes.network.pairing import TRAINING
from lightning_probes.network.torch_internals import trainer_of, tree_map
from lightning_probes.options import Where
from lightning_probes.probes.dataset import LayerBatch
from lightning_probes.replay.calling import Caller
from lightning_probes.replay.calls import CannotRunAgainError, RecordedStep
from lightning_probes.replay.recorder import CallRecorder
from lightning_probes.replay.reservoir import Budget
from lightning_probes.replay.trial import pair

Take = Callable[[int, LayerBatch], None]
"""Take the index of a batch's loader, and the features and targets of the batch."""


class Pass(LightningModule):
    """Stand in for a model in Lightning's prediction loop, which neither repeats nor leaves out a sample.

    Each batch is given to the model's own ``validation_step``; a model without one is called as a
    :class:`~lightning_probes.replay.calling.Caller` does it.

    Args:
        model: a LightningModule or any other module.
        network: the layers to take features from; they have hooks while a pass runs.
        input: where in a batch the model's input is; ``None`` if it is nowhere.
        target: where in a batch the targets are.
        loaders: the loaders of the stages ``train`` and ``val``; ``None`` for a stage takes those of the datamodule,
            else those of the model.
        datamodule: its loaders and its hooks for batches are used, if given.
        builds: whether the model has yet to build modules in ``setup`` and ``configure_model``.
        is_copy: whether the model is a copy of the user's, in which what it builds may stay.

    Attributes:
        model: as given.
        is_due: whether the model is a copy that has yet to build its modules, in a loop of its own before any other.
            The user's own model is restored after each pass, so it builds them in each.
        notes: what a reader of the report should know of how the model was built.

    Raises:
        TypeError: the model has neither a ``validation_step`` nor a ``forward``.
        ValueError: a stage has no loader, neither given nor from the datamodule or the model.
    """

    def __init__(
        self,
        model: nn.Module,
        network: LayerExtractor,
        input: Where | None,
        target: Where | Mapping[str, Where],
        loaders: Mapping[str, Any],
        datamodule: LightningDataModule | None,
        *,
        builds: bool = False,
        is_copy: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self._builds = builds
        self._sets_up = not self._builds
        self.is_due = self._builds and is_copy
        self.notes: list[str] = []
        self._take: Take = _leave
        self._loaders = loaders
        self._stage = "train"
        self._network = network
        budget = Budget(0, 0, on_device=True)
        self._recorder = CallRecorder(budget, network.heard)
        self._owners = [owner for owner in (datamodule, model) if owner is not None]
        self._is_ready = False
        self._step = _step_of(model)
        self._call = Caller(model, input, target)
        self._restore: list[Callable[[], Any]] = []
        for stage, loader in loaders.items():
            if loader is None and not any(self._with(f"{stage}_dataloader")):
                raise ValueError(
                    f"{stage}_dataloaders: not given, and neither a datamodule nor {type(model).__name__} has a "
                    f"{stage}_dataloader"
                )

    def begin(self, stage: str, take: Take) -> None:
        """Prepare a pass over the ``train`` or ``val`` data that gives every labelled batch to ``take``."""
        self._stage = stage
        self._take = take

    def begin_building(self) -> None:
        """Prepare a loop that reads no batch, in which the model builds its modules."""
        self._take = _leave

    def end(self) -> None:
        """Remove the hooks and restore the loaders' generators and the datamodule's trainer, however the pass ended."""
        self._take = _leave
        self._network.detach()
        self._recorder.detach()
        for restore in self._restore:
            restore()
        self._restore = []

    def prepare_data(self) -> None:
        for owner in self._to_set_up("prepare_data"):
            owner.prepare_data()

    def setup(self, stage: str) -> None:
        for owner in self._hosts():
            if isinstance(owner, LightningDataModule):
                self._restore.append(partial(setattr, owner, "trainer", owner.trainer))
                owner.trainer = self.trainer
        for owner in self._to_set_up("setup"):
            if owner is not self.model or self._sets_up:
                self._set_up_by(owner, "setup", "fit")
        self._is_ready = True
        self._build("setup", "fit")

    def configure_model(self) -> None:
        self._build("configure_model")

    def _build(self, name: str, *args: Any) -> None:
        if not self._builds or not is_overridden(name, self.model):
            return
        try:
            self._set_up_by(self.model, name, *args)
        except Exception as error:
            if any(loader is None for loader in self._loaders.values()):
                raise
            # It may have been meant for training, in which case the network does without.
            note = f"{name} of {type(self.model).__name__} raised {type(error).__name__}: {error}; probed without it"
            if note not in self.notes:
                self.notes.append(note)
                rank_zero_warn(f"probe: {note}")

    def _set_up_by(self, owner: Any, name: str, *args: Any) -> None:
        """Call a method that sets up the model or the datamodule, in which the Trainer knows the datamodule."""
        trainer: Any = self.trainer
        known = trainer.datamodule
        # A datamodule that the Trainer knew for longer would be torn down with the first loop.
        trainer.datamodule = next((host for host in self._owners if isinstance(host, LightningDataModule)), known)
        try:
            with _weights_kept(self.model):
                getattr(owner, name)(*args)
        finally:
            trainer.datamodule = known

    def predict_dataloader(self) -> Any:
        if self.is_due:
            # What was built stays.
            self.is_due = self._builds = False
            return []
        given, name = self._loaders[self._stage], f"{self._stage}_dataloader"
        loaders = given if given is not None else getattr(next(self._with(name)), name)()
        return tree_map(self._as_it_is, loaders)

    def _as_it_is(self, loader: Any) -> Any:
        for holder in (loader, getattr(loader, "sampler", None)):
            if isinstance(generator := getattr(holder, "generator", None), torch.Generator):
                self._restore.append(partial(generator.set_state, generator.get_state()))
        # Lightning rebuilds the batch sampler for predictions, which fails for a class of the user's own.
        is_own = isinstance(loader, DataLoader) and type(loader.batch_sampler) not in (BatchSampler, type(None))
        return _AsItIs(loader) if is_own and self.trainer.world_size == 1 else loader

    def _to_set_up(self, name: str) -> Iterator[Any]:
        if any(loader is None for loader in self._loaders.values()):
            # The model is restored after each pass, its own setup included, so only a datamodule's setup lasts.
            yield from (owner for owner in self._with(name) if owner is self.model or not self._is_ready)

    def on_predict_start(self) -> None:
        order = self._network.layers or None
        self._network.attach(self.model, *self._owners, order=order)
        # Which row is of which sample is found out anew in each pass: networks differ.
        known = self._network.pairings.items()
        self._network.pairings = {data: pairing for data, pairing in known if data.split("/")[0] != self._stage}
        self._recorder.attach(self.model, self._network.modules)
        for name in ("on_validation_start", "on_validation_epoch_start"):
            # The model's validation_step may rely on what these hooks set up.
            if self._step is not None and is_overridden(name, self.model):
                getattr(self.model, name)()

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> int:
        provenance = self._network.open(batch, data=self._data(dataloader_idx))
        # A sampler of the user's may repeat samples; Lightning's own does not while it predicts.
        self._network.count_only(unrepeated(self.trainer.predict_dataloaders, dataloader_idx, batch_idx))
        if provenance is not None:
            self._recorder.start(batch, provenance)
        if self._step is not None:
            self._step(batch, batch_idx, dataloader_idx)
        else:
            self._call(batch)
            if self._call.note and self._call.note not in self._network.notes:
                self._network.notes.append(self._call.note)
        # Operations are followed in the mode in which that began, which is left below.
        step = self._recorded() if provenance is not None else None
        # Lightning predicts in inference mode, perhaps in mixed precision; probes use the features outside of both.
        with torch.inference_mode(False), torch.autocast(self.device.type, enabled=False):
            seen = self._network.close()
            if seen is not None and provenance is not None:
                seen = pair(self._network, step, seen, self.model, self.trainer.precision_plugin.forward_context)
                self._network.settle()
                self._network.check_layers()
            if seen is not None:
                if found := self._network.pop_contradictions():
                    layer, reason = next(iter(found.items()))
                    raise RuntimeError(f"layers: {layer!r} cannot be probed: {reason}")
                for layer, error in seen.faults.items():
                    raise RuntimeError(
                        f"layers: taking the activation of {layer!r} raised {type(error).__name__}: {error}"
                    ) from error
                features = {layer: x.clone() for layer, x in seen.features.items()}
                self._take(dataloader_idx, replace(seen, features=features, targets=seen.targets.clone()))
        # Lightning warns of a step that returns nothing.
        return batch_idx

    def _data(self, dataloader: int) -> str:
        return TRAINING if self._stage == "train" else f"{self._stage}/{dataloader}"

    def _recorded(self) -> RecordedStep | CannotRunAgainError:
        try:
            return self._recorder.stop()
        except CannotRunAgainError as error:
            return error

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self._hook("on_before_batch_transfer")(batch, dataloader_idx)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return self._hook("transfer_batch_to_device")(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self._hook("on_after_batch_transfer")(batch, dataloader_idx)

    def _hook(self, name: str) -> Any:
        owner = next(self._with(name), None)
        return getattr(owner if owner is not None else super(), name)

    def _hosts(self) -> list[Any]:
        return [owner for owner in self._owners if isinstance(owner, (LightningModule, LightningDataModule))]

    def _with(self, name: str) -> Iterator[Any]:
        return (owner for owner in self._hosts() if is_overridden(name, owner))


def needs_building(model: nn.Module) -> bool:
    """Return whether a model has methods in which it may build modules, and no Trainer has called them yet."""
    if not isinstance(model, LightningModule) or trainer_of(model) is not None:
        return False
    return is_overridden("setup", model) or is_overridden("configure_model", model)


@contextmanager
def _weights_kept(model: nn.Module) -> Iterator[None]:
    """Keep the weights of modules that are built anew inside, as if those of a checkpoint were loaded into them."""
    before = model.state_dict(keep_vars=True)
    yield
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            old = before.get(name)
            if old is tensor or not isinstance(old, Tensor) or is_lazy(old) or is_lazy(tensor):
                continue
            if old.shape == tensor.shape:
                tensor.copy_(old)


class _AsItIs:
    """Give Lightning the batches of a loader and hide its samplers, so that Lightning does not rebuild them."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)

    def __len__(self) -> int:
        return len(self._loader)


def _step_of(model: nn.Module) -> Callable[[Any, int, int], Any] | None:
    """Return the model's ``validation_step``, called with as many arguments as it takes; ``None`` if it has none.

    Raises:
        TypeError: the model has no ``forward`` either.
    """
    if isinstance(model, LightningModule) and is_overridden("validation_step", model):
        step = model.validation_step
        names = list(inspect.signature(step).parameters.values())
        takes = len(names) if all(p.kind is not p.VAR_POSITIONAL for p in names) else 3
        return lambda *given: step(*given[:takes])
    if type(model).forward in (nn.Module.forward, LightningModule.forward):
        raise TypeError(
            f"{type(model).__name__} has no validation_step that consumes a batch and no forward that could be called "
            "on its input: there is no way to run it"
        )
    return None


def _leave(dataloader: int, seen: LayerBatch) -> None: ...
