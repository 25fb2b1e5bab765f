"""The first point of each curve: the network as it was found, whose weights are kept until it is scored."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_probes.distributed import Ranks
from lightning_probes.probes.tasks import count_classes
from lightning_probes.replay.calls import CannotRunAgainError
from lightning_probes.replay.replayer import copy_of_weights
from lightning_probes.report.curves import Curve, Points
from lightning_probes.training.fitted import Fitted
from lightning_probes.training.fitting import Context, KeptBatch, ProbeFitter, device_of


class StartingPoint:
    """Fits and scores probes on an older state of the network.

    Args:
        fitter: has the batches of training, and runs those of validation again.
        points: where its scores go, as ``start``.
        ranks: the processes that train together.

    Attributes:
        fitted: its probes, while they are scored.
    """

    def __init__(self, fitter: ProbeFitter, points: Points, ranks: Ranks) -> None:
        self.fitted: Fitted | None = None
        self._fitter = fitter
        self._points = points
        self._ranks = ranks
        self._weights: dict[str, Tensor] | None = None
        self._fault = ""

    @property
    def is_due(self) -> bool:
        """Whether its point is still to come."""
        return self._weights is not None

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights."""
        sizes = {id(tensor): tensor.numel() * tensor.element_size() for tensor in (self._weights or {}).values()}
        return sum(sizes.values())

    def keep(self, model: nn.Module) -> str:
        """Copy the weights as they are now; returns why that cannot be, if so."""
        if any(is_lazy(tensor) for tensor in model.parameters()):
            return "no starting point: before the first step the network had parameters without a shape"
        if self._fitter.refusal:
            return "no starting point: training cannot be run again"
        self._weights = copy_of_weights(model)
        return ""

    def drop(self) -> None:
        """It will not come."""
        self.fitted = self._weights = None
        self._fault = ""
        self._points.clear(["start"])

    def fit(self, model: nn.Module, context: Context) -> str:
        """Fit its probes; returns why that cannot be, if so."""
        assert self._weights is not None
        device = device_of(model)
        # There until the point is published: each batch of validation is run again on them.
        self._weights = {name: tensor.to(device) for name, tensor in self._weights.items()}
        self.fitted = self._fitter.fit(model, context, weights=self._weights)
        if self.fitted is not None:
            return ""
        reason, self._fitter.refusal = self._fitter.refusal, ""
        self.drop()
        return f"training cannot be run again on the first weights: {reason}"

    def score(self, batch: KeptBatch | str, curve: Curve, model: nn.Module, context: Context) -> None:
        """Score its probes on a batch of validation."""
        if self.fitted is None or self._fault:
            return
        try:
            if isinstance(batch, str):
                raise CannotRunAgainError(batch)
            for seen in self._fitter.run_again([batch], model, context, self._weights):
                self._points.add("start", *curve, self.fitted.bank.score(*seen), count_classes(seen[1]))
        except Exception as error:  # whatever a module raises: a probe never ends a training run
            reason = str(error) if isinstance(error, CannotRunAgainError) else f"{type(error).__name__}: {error}"
            self._fault = f"validation cannot be run again: {reason}"

    def missed(self) -> str:
        """Why some process could not score it, if so; it is dropped then."""
        if self.fitted is not None and (reason := self._ranks.first(self._fault)):
            self.drop()
            return reason
        return ""

    def conclude(self) -> dict[str, dict[str, Any]]:
        """All samples have been scored; returns :attr:`Fitted.about`, if it was due."""
        if self.fitted is None:
            return {}
        about, self.fitted, self._weights = self.fitted.about, None, None
        return about
