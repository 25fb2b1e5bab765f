"""Keep some batches of training with the calls that they made, and runs them again on the frozen network."""

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
"""Name what the network runs in, the strategy's mixed precision say; entered anew for each use."""


@dataclass(frozen=True)
class RecordedBatch:
    """Hold copies of all that it takes to run a batch through the network again.

    Attributes:
        calls: calls of the network's modules, in order.
        targets: ``(batch, outputs)``.
        raw: ``{"input": features}`` of the raw input, which no call gives; empty where it is not probed.
        mask: which tokens count, ``(batch, tokens)``; ``None`` for all.
    """

    calls: list[Call]
    targets: Tensor
    raw: dict[str, Tensor]
    mask: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Return the bytes of what is given to the network, and of the mask."""
        return num_bytes(self.calls) + (0 if self.mask is None else self.mask.numel())


class RecordedBatches:
    """Keep a fair sample of the batches of training, and runs batches again when it is asked.

    Args:
        network: hooked. It opens each batch; :meth:`open` and :meth:`close` stand around that.
        budget: bounds what is kept: the inputs, and the features that they will become.

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
        """Let go of the model and of everything that is kept."""
        self._recorder.detach()
        self.kept.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run would find out anew, perhaps in another way, as plain types."""
        return {"has_kept": self._has_kept, "unrecorded": self._unrecorded}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self._has_kept = state["has_kept"]
        self._unrecorded = state["unrecorded"]
        self.refusal = CannotRunAgainError(self._unrecorded) if self._unrecorded else None

    def refuse(self, reason: str) -> None:
        """Keep and run nothing from now on, for this reason."""
        self.refusal = CannotRunAgainError(reason)

    def open(self) -> bool:
        """Decide before a training step whether its batch is kept; if so, record its calls from now on."""
        self._is_open = False
        if self.refusal is None and self.kept.wants():
            self._start()
        return self._is_open

    def watch(self, batch: Any) -> None:
        """Record the calls of a step outside of training, whose batch this is."""
        self._is_open = False
        if self.refusal is None:
            self._start(batch)

    def _start(self, batch: Any = None) -> None:
        try:
            self._recorder.start(batch)
            self._is_open = True
        except Exception as error:  # a module that takes no hooks
            self.refuse(f"hooks cannot be registered: {error}")

    def abandon(self) -> None:
        """Record no more of a step that did not end."""
        if self._is_open:
            self._is_open = False
            self._recorder.abandon()

    def close(self, seen: LayerBatch | None) -> None:
        """Keep what a training step showed, if anything and if its batch was wanted."""
        try:
            batch = self.take(seen)
        except CannotRunAgainError as error:
            # A step now and then may differ; a network that never could be run again is not asked any more.
            self._unrecorded = "" if self._has_kept else str(error)
            self.refusal = None if self._has_kept else error.with_traceback(None)  # its frames would hold the batch
            return
        if batch is not None and seen is not None:
            # As many rows as the layer with most views has; some layers may not have had their turn.
            rows = max(len(x) for x in seen.features.values())
            values = rows * sum(self._network.recorder.widths.values()) + batch.targets.numel()
            self.kept.add(len(batch.targets), batch, batch.num_bytes + 4 * values)
            self._has_kept = self._has_kept or self.kept.samples > 0

    def take(self, seen: LayerBatch | None) -> RecordedBatch | None:
        """Return copies of a step that was opened or watched; ``None`` if it was neither, or showed nothing.

        Raises:
            CannotRunAgainError: why the calls of the step cannot be run again.
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
        """Run each of ``batches`` through the frozen network, and give what its layers say now.

        Args:
            batches: what to run.
            model: the network as it is now.
            context: what it runs in.
            weights: weights to run with in the place of its own, as for
            :class:`~lightning_probes.replay.replayer.Replay`.

        Raises:
            CannotRunAgainError: a module raises something, whatever it is: a probe never ends a training run.
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
    """Return the device of a model's parameters; the host for a model without any."""
    return next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
