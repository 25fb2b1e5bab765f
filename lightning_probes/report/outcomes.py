"""Hold what each scored sample got from the probe of each layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Outcomes:
    """Hold what each scored unit (a sample; its views and positions are one unit) got from the probe of each layer."""

    layers: tuple[str, ...]
    losses: Tensor
    weights: Tensor
    is_binary: bool
