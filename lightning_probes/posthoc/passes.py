"""A stand-in for a model that is not trained, in Lightning's prediction loop: what its layers say to each batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.data import BatchSampler, DataLoader

from lightning_probes.network.batches import Where, describe, pick
from lightning_probes.network.extractor import ProbedNetwork
from lightning_probes.training.fitting import Seen

Take = Callable[[int, int, Seen], None]
"""What is done with a batch: index of the loader, samples of the pass before it (of this process), what it showed."""


class Pass(LightningModule):
    """Stands in for a model in Lightning's prediction loop, whose batches no sample is repeated or left out of.

    A batch is given to the model's own ``validation_step``; a model without one is called on the batch's input.

    Args:
        model: a LightningModule or any module.
        network: probes it; hooked while a pass runs.
        input: where in a batch the model's input is.
        loaders: ``{"train", "val"}``; ``None`` for those of the datamodule or of the model.
        datamodule: whose loaders and hooks for batches are used, if given.

    Raises:
        TypeError: there is no way to run the model.
        ValueError: nobody has a loader.
    """

    def __init__(
        self,
        model: nn.Module,
        network: ProbedNetwork,
        input: Where | None,
        loaders: Mapping[str, Any],
        datamodule: LightningDataModule | None,
    ) -> None:
        super().__init__()
        self.model = model
        self._take: Take = _leave
        self._loaders = loaders
        self._stage = "train"
        self._network = network
        self._input = input
        self._owners = [owner for owner in (datamodule, model) if owner is not None]
        self._is_ready = False
        self._samples = 0
        self._step = _step_of(model)
        self._restore: list[Callable[[], Any]] = []
        for stage, loader in loaders.items():
            if loader is None and not any(self._with(f"{stage}_dataloader")):
                raise ValueError(
                    f"{stage}_dataloaders: not given, and neither a datamodule nor {type(model).__name__} has a "
                    f"{stage}_dataloader"
                )

    def begin(self, stage: str, take: Take) -> None:
        """The next pass is over the data of ``stage``, and ``take`` gets what its batches show."""
        self._stage, self._take, self._samples = stage, take, 0

    def end(self) -> None:
        """The pass is over, however it ended: no hooks, and the loaders' generators as they were."""
        self._take = _leave
        self._network.detach()
        self._network.recorder.faults = {}
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
            owner.setup("fit")
        self._is_ready = True

    def predict_dataloader(self) -> Any:
        given, name = self._loaders[self._stage], f"{self._stage}_dataloader"
        loaders = given if given is not None else getattr(next(self._with(name)), name)()
        return tree_map(self._as_it_is, loaders)

    def _as_it_is(self, loader: Any) -> Any:
        for holder in (loader, getattr(loader, "sampler", None)):
            if isinstance(generator := getattr(holder, "generator", None), torch.Generator):
                self._restore.append(partial(generator.set_state, generator.get_state()))
        # For predictions Lightning makes batch samplers anew, which those of a user's own kind do not survive.
        is_own = isinstance(loader, DataLoader) and type(loader.batch_sampler) not in (BatchSampler, type(None))
        return _AsItIs(loader) if is_own and self.trainer.world_size == 1 else loader

    def _to_set_up(self, name: str) -> Iterator[Any]:
        if any(loader is None for loader in self._loaders.values()):
            # What the model sets up in itself is gone after each pass, like all that a pass changes in it.
            yield from (owner for owner in self._with(name) if owner is self.model or not self._is_ready)

    def on_predict_start(self) -> None:
        order = self._network.layers or None
        self._network.attach(self.model, *self._owners, order=order)
        for name in ("on_validation_start", "on_validation_epoch_start"):
            # A validation_step counts on what they set up.
            if self._step is not None and is_overridden(name, self.model):
                getattr(self.model, name)()

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> int:
        self._network.open(batch)
        if self._step is not None:
            self._step(batch, batch_idx, dataloader_idx)
        else:
            self.model(self._input_of(batch))
        # Lightning runs in inference mode; what is kept will be used outside of it. Nor are probes in mixed precision.
        with torch.inference_mode(False), torch.autocast(self.device.type, enabled=False):
            seen = self._network.close()
            for layer, error in self._network.recorder.faults.items():
                raise RuntimeError(
                    f"layers: taking the activation of {layer!r} raised {type(error).__name__}: {error}"
                ) from error
            if seen is not None:
                features, targets = seen
                seen = {layer: x.clone() for layer, x in features.items()}, targets.clone()
                before, self._samples = self._samples, self._samples + len(targets)
                self._take(dataloader_idx, before, seen)
        return batch_idx  # of no use, but Lightning warns of a step that returns nothing

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

    def _input_of(self, batch: Any) -> Any:
        if self._input is None:
            raise TypeError(
                f"{type(self.model).__name__} has no validation_step, and input=None says of no part of the batch that "
                f"it is what the model is called on; the batch is {describe(batch)}"
            )
        return pick(batch, self._input, "input")


class _AsItIs:
    """The batches of a loader, and no more of it."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)

    def __len__(self) -> int:
        return len(self._loader)


def _step_of(model: nn.Module) -> Callable[[Any, int, int], Any] | None:
    """The model's own ``validation_step``, called with as many arguments as it takes; ``None`` if it has none.

    Raises:
        TypeError: nor has it a ``forward``.
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


def _leave(dataloader: int, before: int, seen: Seen) -> None: ...
