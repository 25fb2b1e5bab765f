"""Keep some batches of training with the calls that they made, and run them again on the frozen network."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_probes.network.extractor import INPUT, LayerExtractor
from lightning_probes.probes.dataset import LayerBatch
from lightning_probes.replay.calls import Call, CannotRunAgainError, num_bytes
from lightning_probes.replay.frozen import frozen
from lightning_probes.replay.recorder import CallRecorder
from lightning_probes.replay.replayer import Replay
from lightning_probes.replay.reservoir import Budget, Reservoir

Context = Callable[[], AbstractContextManager[Any]]
"""Make the context that the network runs in, such as the strategy's mixed precision; each use makes a new one."""


@dataclass(frozen=True)
class RecordedBatch:
    """Hold copies of all that it takes to run a batch through the network again.

    Attributes:
        calls: calls of the network's modules, in order.
        targets: ``(batch, outputs)``.
        raw: ``{"input": features}`` of the raw input, which is in no call; empty if the input is not probed.
        mask: which tokens count, ``(batch, tokens)``; ``None`` for all.
    """

    calls: list[Call]
    targets: Tensor
    raw: dict[str, Tensor]
    mask: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the inputs of the calls, and of the mask."""
        return num_bytes(self.calls) + (0 if self.mask is None else self.mask.numel())


class RecordedBatches:
    """Keep a fair sample of the batches of training, and run batches again on the frozen network.

    Args:
        network: extractor whose layers are hooked. Call :meth:`open` before the extractor opens a batch, and
            :meth:`close` after the extractor has closed it.
        budget: limits on what is kept: the inputs, and the features that will be computed from them.

    Attributes:
        refusal: why the calls of training cannot be run again; ``None`` as long as they can.
        kept: the batches that are kept.
    """

    def __init__(self, network: LayerExtractor, budget: Budget) -> None:
        self.refusal: CannotRunAgainError | None = None
        self.kept = Reservoir[RecordedBatch](budget)
        self._network = network
        self._budget = budget
        self._recorder = CallRecorder(budget)
        self._is_open = False
        self._has_kept = False
        self._unrecorded = ""

    def attach(self, model: nn.Module) -> None:
        """Find the modules of ``model`` whose calls will be recorded."""
        self._recorder.attach(model, self._network.modules)

    def detach(self) -> None:
        """Release the model, and discard everything that is kept."""
        self._recorder.detach()
        self.kept.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return whether batches could be recorded so far, and why not, as plain types."""
        return {"has_kept": self._has_kept, "unrecorded": self._unrecorded}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._has_kept = state["has_kept"]
        self._unrecorded = state["unrecorded"]
        self.refusal = CannotRunAgainError(self._unrecorded) if self._unrecorded else None

    def refuse(self, reason: str) -> None:
        """Keep and run no batch from now on, because of ``reason``."""
        self.refusal = CannotRunAgainError(reason)

    def open(self) -> bool:
        """Decide before a training step whether its batch is kept; if so, record its calls from now on."""
        self._is_open = False
        if self.refusal is None and self.kept.wants():
            self._start()
        return self._is_open

    def watch(self, batch: Any) -> None:
        """Start recording the calls of a step outside of training, which runs on ``batch``."""
        self._is_open = False
        if self.refusal is None:
            self._start(batch)

    def _start(self, batch: Any = None) -> None:
        try:
            self._recorder.start(batch)
            self._is_open = True
        except Exception as error:  # A module may take no hooks.
            self.refuse(f"hooks cannot be registered: {error}")

    def abandon(self) -> None:
        """Discard the recording of a step that did not end."""
        if self._is_open:
            self._is_open = False
            self._recorder.clear()

    def close(self, seen: LayerBatch | None) -> None:
        """Keep the batch of a training step that has ended, if it was wanted and has features."""
        try:
            batch = self.take(seen)
        except CannotRunAgainError as error:
            # One odd step is tolerated once a batch has been kept. Before that it is taken for the rule.
            self._unrecorded = "" if self._has_kept else str(error)
            # The frames of a traceback would hold the batch.
            self.refusal = None if self._has_kept else error.with_traceback(None)
            return
        if batch is not None and seen is not None:
            # The features of a replay are estimated with the most rows that any layer had: a replay has all layers, and
            # this step may have recorded only some of them.
            rows = max(len(x) for x in seen.features.values())
            values = rows * sum(self._network.recorder.widths.values()) + batch.targets.numel()
            self.kept.add(len(batch.targets), batch, batch.num_bytes + 4 * values)
            self._has_kept = self._has_kept or self.kept.samples > 0

    def take(self, seen: LayerBatch | None) -> RecordedBatch | None:
        """Return a copy of the batch of an opened or watched step; ``None`` if it was neither, or has no features.

        Raises:
            CannotRunAgainError: the calls of the step cannot be run again; the message says why.
        """
        if not self._is_open:
            return None
        self._is_open = False
        calls = self._recorder.stop()
        if seen is None or not seen.features:
            return None
        raw = {INPUT: self._budget.copy(seen.features[INPUT])} if INPUT in seen.features else {}
        mask = self._network.mask
        return RecordedBatch(
            calls, self._budget.copy(seen.targets), raw, None if mask is None else self._budget.copy(mask)
        )

    def run_again(
        self,
        batches: Iterable[RecordedBatch],
        model: nn.Module,
        context: Context,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Generator[LayerBatch, None, None]:
        """Run each of ``batches`` through the frozen network, and yield the features of its layers as they are now.

        Args:
            batches: batches to run.
            model: the network as it is now.
            context: makes the context that the network runs in.
            weights: weights to run with in the place of the network's own, as for
                :class:`~lightning_probes.replay.replayer.Replay`.

        Raises:
            CannotRunAgainError: a module raised any exception, which must not end a training run.
        """
        device = device_of(model)
        try:
            with frozen(model, self._network.recorder):
                replay = Replay(model, device=device, weights=weights)
                for batch in batches:
                    with context():
                        run = partial(replay.run, batch.calls)
                        seen = self._network.observe(len(batch.targets), run, batch.mask)
                    raw = {layer: x.to(device) for layer, x in batch.raw.items()}
                    yield LayerBatch(raw | seen.features, batch.targets.to(device), seen.faults)
        except Exception as error:
            raised = f"running them again raised {type(error).__name__}: {error}"
            raise CannotRunAgainError(raised) from error.with_traceback(None)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's parameters; the CPU for a model without parameters."""
    return next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
