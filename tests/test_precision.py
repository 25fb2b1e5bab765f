"""What a user allows for training has no part in fits and features, and is the same after them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lightning_probes.network.pooling import reduce
from lightning_probes.precision import in_full_precision
from lightning_probes.probes.fit import fit_probe
from lightning_probes.probes.standardise import standardise_
from lightning_probes.tasks.classification import Classification

NEW: dict[str, Any] = {
    "all": torch.backends,
    "cuda": torch.backends.cuda.matmul,
    "mkldnn": getattr(torch.backends.mkldnn, "matmul", None),
}
ALLOWED = [
    "nothing",
    "legacy high",
    "legacy medium",
    *(["all tf32", "cuda tf32", "mkldnn bf16"] if hasattr(NEW["mkldnn"], "fp32_precision") else []),
]


def state() -> dict[str, Any]:
    found = {name: getattr(setting, "fp32_precision", None) for name, setting in NEW.items()}
    try:
        return {**found, "legacy": torch.get_float32_matmul_precision()}
    except RuntimeError:  # What torch says of settings by the newer way.
        return found


@pytest.fixture(params=ALLOWED)
def allowed(request: pytest.FixtureRequest) -> Iterator[str]:
    name, precision = f"{request.param} ".split(" ")[:2]
    before = {key: getattr(setting, "fp32_precision", None) for key, setting in NEW.items()}
    legacy = torch.get_float32_matmul_precision()
    if name == "legacy":
        torch.set_float32_matmul_precision(precision)
    elif precision:
        NEW[name].fp32_precision = precision
    yield request.param
    torch.set_float32_matmul_precision(legacy)
    for key, known in before.items():
        if known is not None:
            NEW[key].fp32_precision = known


def test_products_are_precise_inside_and_settings_are_the_same_outside(allowed: str) -> None:
    x = torch.randn(64, 300, generator=torch.Generator().manual_seed(0))
    before = state()
    with in_full_precision(x.device):
        found = x @ x.T
    assert state() == before
    torch.testing.assert_close(found.double(), x.double() @ x.double().T, rtol=1e-5, atol=1e-4)


def test_settings_are_the_same_after_an_exception(allowed: str) -> None:
    before = state()
    with suppress(ZeroDivisionError), in_full_precision(torch.device("cpu")):
        raise ZeroDivisionError
    assert state() == before


def test_fits_and_features_ask_for_nothing_and_change_nothing(allowed: str) -> None:
    generator = torch.Generator().manual_seed(0)
    maps, labels = torch.randn(90, 4, 9, 9, generator=generator), torch.arange(90) % 3
    before = state()
    features = reduce(maps, 64, axes="channels")
    torch.testing.assert_close(features, F.adaptive_avg_pool2d(maps, 4).flatten(1), rtol=0, atol=1e-6)
    assert fit_probe(Classification(3), features, F.one_hot(labels, 3).double()).converged
    assert state() == before


@pytest.mark.parametrize("samples", [1, 5, 37, 61, 64])
def test_a_constant_channel_is_constant_wherever_its_map_is_in_the_batch(samples: int) -> None:
    features = reduce(torch.full((samples, 3, 8, 8), 0.1), 3, axes="channels")
    mean, variance = features.mean(dim=0), features.var(dim=0, unbiased=False)
    assert not standardise_(features[None].clone(), mean[None, None], variance[None, None]).any()
