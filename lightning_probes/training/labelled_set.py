"""Read the labelled set that a user gave as ``data``, and leave no trace in its loaders and its datamodule."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, Sampler

from lightning_probes.network.batches import unrepeated
from lightning_probes.network.torch_internals import another_reader, tree_leaves
from lightning_probes.options import is_list
from lightning_probes.replay.frozen import seeded, unmoved

STAGES = ("train", "val")

_EXPECTED = "expected a LightningDataModule, or a pair (train loader, val loader), to fit probes on and to score them"


class LabelledSet:
    """Hold a labelled set to probe on.

    Args:
        data: a LightningDataModule; or a pair of loaders, or of lists of them, to fit probes on and to score them on.

    Raises:
        TypeError, ValueError: ``data`` is something else; the message says what was given and what is expected.
    """

    def __init__(self, data: Any) -> None:
        self._loaders: dict[str, Any] = {}
        self._datamodule: Any = None
        self._trainer: Any = None
        if _is_datamodule(data):
            self._datamodule = data
            for name in (f"{stage}_dataloader" for stage in STAGES):
                if not _overrides(data, name):
                    raise ValueError(f"data: {type(data).__name__} has no {name}; {_EXPECTED}")
        else:
            self._loaders = dict(zip(STAGES, _pair(data), strict=True))

    def __getstate__(self) -> dict[str, Any]:
        """Leave the Trainer out: it belongs to one process."""
        return {**self.__dict__, "_trainer": None}

    @property
    def owners(self) -> tuple[Any, ...]:
        """Return what may know the number of classes: the datamodule, if there is one."""
        return () if self._datamodule is None else (self._datamodule,)

    @property
    def context(self) -> Callable[[], Any]:
        """Return what makes the context that the network runs in: the mixed precision of the Trainer."""
        return self._trainer.precision_plugin.forward_context  # type: ignore[no-any-return]

    def set_up(self, trainer: Any) -> None:
        """Prepare and set up the datamodule as a Trainer does before ``fit``, unless it is the Trainer's own.

        Raises:
            Exception: whatever the datamodule raises.
        """
        self._trainer = trainer
        if self._datamodule is not None:
            self._loaders = {}
        if self._datamodule is None or self._datamodule is trainer.datamodule:
            return
        with seeded(), self._known_to_trainer():
            rank = trainer.local_rank if self._datamodule.prepare_data_per_node else trainer.global_rank
            try:
                if not rank:
                    self._datamodule.prepare_data()
            finally:
                trainer.strategy.barrier("prepare_data")
            self._datamodule.setup("fit")

    def described(self) -> str:
        """Say how much will be read at each point, as far as the loaders tell."""
        # Incomplete batches are read too, which loaders of training may leave out.
        lengths = [_length(share(loader, 0, 1)) for stage in STAGES for loader in self.loaders(stage)]
        number = f" of {sum(lengths):,} batches" if all(lengths) else ""
        return f"reads the labelled set{number} at each point"

    def loaders(self, stage: str) -> list[Any]:
        """Return the loaders of a stage; those of a datamodule are made once for a run.

        Raises:
            ValueError: there is no loader.
            Exception: whatever the datamodule raises.
        """
        if stage not in self._loaders:
            self._loaders[stage] = getattr(self._datamodule, f"{stage}_dataloader")()
        given = self._loaders[stage]
        # A CombinedLoader has its loaders there.
        found = [loader for loader in tree_leaves(getattr(given, "iterables", given)) if loader is not None]
        if not found:
            raise ValueError(f"data: there is no {stage} loader; {_EXPECTED}")
        return found

    @contextmanager
    def reading(self, loader: Any, rank: int, number: int) -> Iterator[tuple[Iterator[tuple[Any, int | None]], int]]:
        """Yield what a process reads of a loader: batches, how many samples of each count, and the number of batches.

        Each sample is read by one process. What random generators draw is the same each time, and in all processes;
        their states are restored afterwards, also of those that the loader and its data set hold.

        Args:
            loader: one of :meth:`loaders`.
            rank: number of this process.
            number: number of processes.
        """
        own = share(loader, rank, number)
        with unmoved(loader), seeded():
            _seed_generators(loader)
            yield ((batch, unrepeated(own, 0, i)) for i, batch in enumerate(own)), _length(own)

    def moved(self, batch: Any, dataloader: int, module: Any, device: torch.device) -> Any:
        """Convert and move a batch as the Trainer does, by the datamodule's own hooks, else by those of the module."""
        batch = self._trainer.precision_plugin.convert_input(batch)
        batch = self._hook("on_before_batch_transfer", module)(batch, dataloader)
        batch = self._hook("transfer_batch_to_device", module)(batch, device, dataloader)
        return self._hook("on_after_batch_transfer", module)(batch, dataloader)

    def _hook(self, name: str, module: Any) -> Any:
        return getattr(next((owner for owner in self.owners if _overrides(owner, name)), module), name)

    @contextmanager
    def in_validation(self) -> Iterator[None]:
        """Let network and datamodule find the Trainer as in a validation, also where it trains."""
        trainer = self._trainer
        stage = trainer.state.stage
        trainer.validating = True
        try:
            with self._known_to_trainer():
                yield
        finally:
            trainer.state.stage = stage

    @contextmanager
    def _known_to_trainer(self) -> Iterator[None]:
        """Let the datamodule know the Trainer inside, as its methods may ask for it."""
        before = [(owner, owner.trainer) for owner in self.owners]
        for owner in self.owners:
            owner.trainer = self._trainer
        try:
            yield
        finally:
            for owner, known in before:
                owner.trainer = known


def share(loader: Any, rank: int, number: int) -> Any:
    """Return a loader of the samples that one of several processes reads, and leave the given loader alone.

    Samples are dealt out one by one, or in batches where a batch sampler of the user's own makes those; incomplete
    batches count too. A loader whose samples are shared out already is read as it is, and so is one without samplers:
    an ``IterableDataset``, or anything else that has batches.
    """
    if not isinstance(loader, DataLoader):
        return loader
    sampler, batches = loader.sampler, loader.batch_sampler
    if isinstance(loader.dataset, IterableDataset):
        return another_reader(loader, sampler, batches)
    number = 1 if isinstance(sampler, DistributedSampler) else number
    # Samplers may count how often they are read, so that training's own are not.
    if type(batches) is BatchSampler:
        sampler = _part(copy.copy(batches.sampler), rank, number)
        batches = BatchSampler(sampler, batches.batch_size, drop_last=False)
    elif batches is not None:
        batches = _part(copy.copy(batches), rank, number)
    else:
        sampler = _part(copy.copy(sampler), rank, number)
    return another_reader(loader, sampler, batches)


def _part(items: Any, rank: int, number: int) -> Any:
    return items if number == 1 else _Part(items, rank, number)


class _Part(Sampler[Any]):
    """Yield every ``number``-th item of another sampler, beginning with item ``rank``."""

    def __init__(self, items: Any, rank: int, number: int) -> None:
        self._items = items
        self._rank = rank
        self._number = number

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self._items), self._rank, None, self._number)

    def __len__(self) -> int:
        return len(range(self._rank, len(self._items), self._number))


def _seed_generators(loader: Any) -> None:
    """Seed the random generators that decide the order of a loader's samples."""
    holders = [loader, *(getattr(loader, name, None) for name in ("sampler", "batch_sampler"))]
    holders.append(getattr(holders[-1], "sampler", None))
    for holder in holders:
        if isinstance(generator := getattr(holder, "generator", None), torch.Generator):
            generator.manual_seed(0)


def _length(loader: Any) -> int:
    """Return the number of batches of a loader; 0 if it does not tell."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return 0


def _is_datamodule(data: Any) -> bool:
    """Return whether ``data`` is a datamodule, of ``lightning.pytorch`` or of ``pytorch_lightning``."""
    names = [kind.__name__ for kind in type(data).__mro__]
    return "LightningDataModule" in names


def _pair(data: Any) -> tuple[Any, Any]:
    """Return ``data`` if it is a pair of loaders, or of lists of loaders."""
    if isinstance(data, type):
        raise TypeError(f"data: {_EXPECTED}; found the class {data.__name__}, of which it takes an instance")
    if not isinstance(data, tuple) and not is_list(data):
        raise TypeError(f"data: {_EXPECTED}; found a {type(data).__name__}")
    if len(data) != len(STAGES):
        raise ValueError(f"data: {_EXPECTED}; found {len(data)} part{'s' * (len(data) != 1)}")
    for stage, part in zip(STAGES, data, strict=True):
        loaders = tree_leaves(part)
        if not loaders or any(loader is None for loader in loaders):
            raise ValueError(f"data: the {stage} loader is missing; {_EXPECTED}")
        for loader in loaders:
            if isinstance(loader, (str, bytes, Tensor, nn.Module)) or not hasattr(loader, "__iter__"):
                raise TypeError(f"data: expected a {stage} loader, found a {type(loader).__name__}")
            if hasattr(loader, "__next__"):
                raise TypeError(
                    f"data: expected a {stage} loader that can be read again at each point, found an iterator, "
                    f"{type(loader).__name__}"
                )
    return data[0], data[1]


def _overrides(owner: Any, name: str) -> bool:
    """Return whether an owner has its own version of a hook of Lightning's, whichever package its base class is of."""
    kind = next((kind for kind in type(owner).__mro__ if name in vars(kind)), None)
    return name in vars(owner) or (kind is not None and kind.__name__ != "DataHooks")
