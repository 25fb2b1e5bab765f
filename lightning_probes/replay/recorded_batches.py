"""Keep some batches of training with the calls that they made, and run them again on the frozen network."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_probes.network.extractor import INPUT, LayerExtractor, OpenedBatch
from lightning_probes.network.provenance import Provenance
from lightning_probes.probes.dataset import LayerBatch
from lightning_probes.replay.calls import Call, CannotRunAgainError, RecordedStep, num_bytes
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
        opened: what has to be known to read features of samples.
    """

    calls: list[Call]
    targets: Tensor
    raw: dict[str, Tensor]
    opened: OpenedBatch

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the inputs of the calls, and of mask and index."""
        index, masks = self.opened.index, self.opened.masks
        num = num_bytes(self.calls) + (0 if masks is None else masks.num_bytes)
        return num + (0 if index is None else index.numel() * index.element_size())


class RecordedBatches:
    """Keep a fair sample of the batches of training, and run batches again on the frozen network.

    Args:
        network: extractor whose layers are hooked. Call :meth:`open` before the extractor opens a batch, and
            :meth:`close` after the extractor has closed it.
        budget: limits on what is kept: the inputs, and the features that will be computed from them.

    Attributes:
        refusal: why the calls of training cannot be run again; ``None`` as long as they can.
        partly: why some calls of training cannot be run again, while others can; empty if all can.
        kept: the batches that are kept.
        recorder: records the calls of the step under way.
    """

    def __init__(self, network: LayerExtractor, budget: Budget) -> None:
        self.refusal: CannotRunAgainError | None = None
        self.kept = Reservoir[RecordedBatch](budget)
        self._network = network
        self._budget = budget
        self.partly = ""
        self.recorder = CallRecorder(budget, network.heard)
        self._is_wanted = False
        self._has_kept = False
        self._unrecorded = ""

    def attach(self, model: nn.Module) -> None:
        """Find the modules of ``model`` whose calls will be recorded."""
        self.recorder.attach(model, self._network.modules)

    def detach(self) -> None:
        """Release the model, and discard everything that is kept."""
        self.recorder.detach()
        self.kept.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return whether batches could be recorded so far, and why not, as plain types."""
        return {"has_kept": self._has_kept, "unrecorded": self._unrecorded, "partly": self.partly}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._has_kept = state["has_kept"]
        self._unrecorded = state["unrecorded"]
        self.partly = state.get("partly", "")
        self.refusal = CannotRunAgainError(self._unrecorded) if self._unrecorded else None

    def refuse(self, reason: str) -> None:
        """Keep and run no batch from now on, because of ``reason``."""
        self.refusal = CannotRunAgainError(reason)

    def wants(self) -> bool:
        """Decide before a training step whether its batch is kept, and return that."""
        self._is_wanted = self.refusal is None and self._budget.samples > 0 and self.kept.wants()
        return self._is_wanted

    def record(self, provenance: Provenance | None = None) -> None:
        """Start recording the calls of a training step if its batch is wanted, or if its samples are to be followed.

        Args:
            provenance: follows the samples of the batch; ``None`` if they need not be followed.
        """
        if self._is_wanted or provenance is not None:
            self._start(provenance=provenance)

    def watch(self, batch: Any, provenance: Provenance | None = None) -> None:
        """Start recording the calls of a step outside of training, which runs on ``batch``."""
        self._is_wanted = False
        if self.refusal is None or provenance is not None:
            self._start(batch, provenance)

    def _start(self, batch: Any = None, provenance: Provenance | None = None) -> None:
        try:
            self.recorder.start(batch, provenance)
        except Exception as error:  # A module may take no hooks.
            self._is_wanted = False
            self.refuse(f"hooks cannot be registered: {error}")

    def abandon(self) -> None:
        """Discard the recording of a step that did not end."""
        self._is_wanted = False
        if self.recorder.is_on:
            self.recorder.clear()

    def stop(self) -> RecordedStep | None:
        """Return the calls of an opened or watched step that has ended; ``None`` if it was not recorded.

        Raises:
            CannotRunAgainError: no call of the step can be run again; the message says why.
        """
        return self.recorder.stop() if self.recorder.is_on else None

    def close(self, step: RecordedStep | CannotRunAgainError | None, seen: LayerBatch | None) -> None:
        """Keep the batch of a training step that has ended, if it was wanted and has labels.

        Args:
            step: what was recorded of the step, or why it cannot be run again.
            seen: features and targets of its batch.
        """
        if not self._is_wanted:
            return
        self._is_wanted = False
        if isinstance(step, CannotRunAgainError):
            # One odd step is tolerated once a batch has been kept. Before that it is taken for the rule.
            self._unrecorded = "" if self._has_kept else str(step)
            # The frames of a traceback would hold the batch.
            self.refusal = None if self._has_kept else step.with_traceback(None)
            return
        batch = self.taken(step, seen)
        if step is None or batch is None or seen is None:
            return
        if self._has_kept and bool(step.reason) != bool(self.partly):
            return  # An odd step, with calls that other steps lack or have.
        self.partly = step.reason
        # The features of a replay are estimated with the most rows that any layer had: a replay has all layers, and
        # this step may have recorded only some of them.
        rows = max((len(x) for x in seen.features.values()), default=len(batch.targets))
        values = rows * sum(self._network.recorder.widths.values()) + batch.targets.numel()
        self.kept.add(len(batch.targets), batch, batch.num_bytes + 4 * values)
        self._has_kept = self._has_kept or self.kept.samples > 0

    def taken(self, step: RecordedStep | None, seen: LayerBatch | None) -> RecordedBatch | None:
        """Return a copy of a batch that can be run again; ``None`` if it was not recorded, or has no labels."""
        if step is None or seen is None:
            return None
        raw = {INPUT: self._budget.copy(seen.features[INPUT])} if INPUT in seen.features else {}
        opened = self._network.opened(seen.samples, self._budget.copy)
        return RecordedBatch(step.calls, self._budget.copy(seen.targets), raw, opened)

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
                        run = partial(replay.run, batch.calls, self._network.recorder.skip_to)
                        seen = self._network.observe(batch.opened, run)
                    raw = {layer: x.to(device) for layer, x in batch.raw.items()}
                    each = len(batch.targets) // batch.opened.samples
                    yield LayerBatch(raw | seen.features, batch.targets.to(device), seen.faults, each=each)
        except Exception as error:
            raised = f"running them again raised {type(error).__name__}: {error}"
            raise CannotRunAgainError(raised) from error.with_traceback(None)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's parameters; the CPU for a model without parameters."""
    return next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
