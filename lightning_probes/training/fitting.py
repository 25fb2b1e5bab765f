"""Training batches that are kept and run again on the frozen network: every layer's probe at its optimum."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_probes.distributed import Ranks
from lightning_probes.network.extractor import INPUT, ProbedNetwork
from lightning_probes.probes.fit import fit_probes
from lightning_probes.probes.online import ProbeBank
from lightning_probes.probes.samples import Samples
from lightning_probes.probes.solver import Solution
from lightning_probes.probes.tasks import count_classes
from lightning_probes.progress import Progress
from lightning_probes.replay.calls import Call, CannotRunAgainError, num_bytes
from lightning_probes.replay.frozen import frozen
from lightning_probes.replay.recorder import CallRecorder
from lightning_probes.replay.replayer import Replay
from lightning_probes.replay.reservoir import KeptBatches, Room
from lightning_probes.training.fitted import Fitted, at_the_cost_of, fitted

Seen = tuple[dict[str, Tensor], Tensor]
"""``{layer: (samples, features)}`` and targets ``(batch, classes)`` of one batch."""

Context = Callable[[], AbstractContextManager[Any]]
"""What the network runs in, the strategy's mixed precision say; entered anew for each use."""


@dataclass(frozen=True)
class KeptBatch:
    """What runs a batch through the network again; all of it copies."""

    calls: list[Call]
    targets: Tensor
    raw: dict[str, Tensor]  # features of the raw input, which no call gives
    mask: Tensor | None = None  # which tokens count

    @property
    def num_bytes(self) -> int:
        """Of what is given to the network, and of the mask."""
        return num_bytes(self.calls) + (0 if self.mask is None else self.mask.numel())


class ProbeFitter:
    """Keeps some batches of training, and fits all probes on what the network makes of them when it is asked.

    Args:
        network: hooked. It opens each batch; the fitter's :meth:`open` and :meth:`close` stand around it.
        room: for what is kept: the inputs, and the features that they will become.
        ranks: the processes whose samples the probes are fitted on together.
        progress: shows how far a fit is.

    Attributes:
        refusal: why the calls of training cannot be run again; empty as long as they can.
    """

    def __init__(self, network: ProbedNetwork, room: Room, ranks: Ranks, progress: Progress) -> None:
        self._network = network
        self._progress = progress
        self._room = room
        self._ranks = ranks
        self._kept = KeptBatches[KeptBatch](room)
        self._calls = CallRecorder(room)
        self._is_open = False
        self._has_kept = False
        self._unrecorded = ""
        self.refusal = ""

    @property
    def num_bytes(self) -> int:
        """Bytes of what is kept."""
        return self._kept.num_bytes

    def most(self, batches: float) -> tuple[int, int]:
        """Return how many of ``batches`` will be kept at most, and their bytes, if they are like the first one."""
        return self._kept.most(batches)

    def attach(self, model: nn.Module) -> None:
        """Find the modules of ``model`` whose calls will be recorded."""
        self._calls.attach(model, self._network.modules)

    def detach(self) -> None:
        """Let go of the model and of everything that is kept."""
        self._calls.detach()
        self._kept.clear()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run would find out anew, perhaps in another way: plain types."""
        return {"has_kept": self._has_kept, "unrecorded": self._unrecorded}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self._has_kept, self._unrecorded = state["has_kept"], state["unrecorded"]
        self.refusal = self._unrecorded

    def renew(self, epoch: int) -> None:
        """An epoch begins: its batches take the places of those of the epoch before."""
        self._kept.renew(epoch)

    def open(self) -> bool:
        """Before each training step: whether its batch is kept; if so, its calls are recorded from now on."""
        self._is_open = not self.refusal and self._kept.wants()
        if self._is_open:
            self._start()
        return self._is_open

    def watch(self, batch: Any) -> None:
        """Before a step outside of training: record its calls."""
        self._is_open = not self.refusal
        if self._is_open:
            self._start(batch)

    def _start(self, batch: Any = None) -> None:
        try:
            self._calls.start(batch)
        except Exception as error:  # a module that takes no hooks
            self.refusal, self._is_open = f"hooks cannot be registered: {error}", False

    def close(self, seen: Seen | None) -> None:
        """After the training step: keep what it showed, if anything and if it was wanted."""
        batch = self.take(seen)
        if isinstance(batch, str):
            # A step now and then may differ; a network that never could be run again is not asked any more.
            self.refusal = self._unrecorded = "" if self._has_kept else batch
        elif batch is not None:
            # As many rows as the layer with most views has; some layers may not have had their turn.
            rows = max(len(x) for x in seen[0].values()) if seen else 0
            values = rows * sum(self._network.recorder.widths.values()) + batch.targets.numel()
            self._kept.add(len(batch.targets), batch, batch.num_bytes + 4 * values)
            self._has_kept = self._has_kept or self._kept.samples > 0

    def take(self, seen: Seen | None) -> KeptBatch | str | None:
        """What a step showed that was opened or watched, or why it cannot be run again; ``None`` if it was neither."""
        if not self._is_open:
            return None
        self._is_open = False
        calls = self._calls.stop()
        if isinstance(calls, str):
            return calls
        if seen is None or not seen[0]:
            return None
        features, targets = seen
        raw = {INPUT: self._room.copy(features[INPUT])} if INPUT in features else {}
        mask = self._network.mask
        return KeptBatch(calls, self._room.copy(targets), raw, None if mask is None else self._room.copy(mask))

    def fit(
        self,
        model: nn.Module,
        context: Context,
        online: ProbeBank | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Fitted | None:
        """Fit all probes on the kept batches.

        Args:
            model: as it is now, or with ``weights`` in the place of its own.
            context: what it runs in.
            online: other probes, scored on the same features.
            weights: as for :class:`~lightning_probes.replay.replayer.Replay`.

        Returns:
            ``None`` if nothing is kept, or if it cannot be run again; :attr:`refusal` says why.
        """
        samples = Samples(self._ranks, self._room.copy)
        device = device_of(model)
        classes = torch.zeros(self._network.num_classes, device=device)
        sums: Tensor | None = None
        # All processes or none, for a module may wait for the others as well.
        self.refusal = self._ranks.first(self.refusal)
        try:
            if not self.refusal:
                kept = self._kept.items()
                shown = self._progress.track("batch", kept, len(kept))
                with closing(self.run_again(shown, model, context, weights)) as batches:
                    for seen, labels in batches:
                        classes = classes + count_classes(labels)
                        if online is not None:
                            own = online.score(seen, labels)
                            sums = own if sums is None else sums + own
                        samples.add(seen, labels)
        except CannotRunAgainError as error:
            self.refusal = str(error)
        # All processes or none: those that can would wait for those that cannot.
        self.refusal = self._ranks.first(self.refusal)
        if self.refusal:
            return None
        solutions: dict[str, Solution] = {}
        layers = self._network.layers
        for layer, x, y, folds in self._progress.track("layer", samples.by_layer(layers, device), len(layers)):
            with at_the_cost_of(layer, self._network, self._ranks):
                solutions |= fit_probes({layer: x}, y, folds=folds, total=self._ranks.total)
        return fitted(self._network, self._ranks, solutions, "train", classes, sums)

    def run_again(
        self,
        batches: Iterable[KeptBatch],
        model: nn.Module,
        context: Context,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Generator[Seen, None, None]:
        """What the layers of the frozen network say to each of ``batches`` now.

        Raises:
            CannotRunAgainError: a module raises something, whatever it is: a probe never ends a training run.
        """
        device = device_of(model)
        try:
            with frozen(model):
                replay = Replay(model, device=device, weights=weights)
                for batch in batches:
                    with context():
                        run = partial(replay.run, batch.calls)
                        seen = self._network.observe(len(batch.targets), run, batch.mask)
                    raw = {layer: x.to(device) for layer, x in batch.raw.items()}
                    yield raw | seen, batch.targets.to(device)
        except Exception as error:
            raised = f"running them again raised {type(error).__name__}: {error}"
            raise CannotRunAgainError(raised) from error.with_traceback(None)


def device_of(model: nn.Module) -> torch.device:
    """Where the parameters of ``model`` are; the host for a model without any."""
    return next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
