"""The strength of L2 against that of a dense grid by scikit-learn, on folds that are drawn by hand."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from classified import fit_probes
from exact import held_out_loss, parts_of
from torch import Tensor
from torch.nn.functional import one_hot

from lightning_probes.distributed import Ranks
from lightning_probes.probes import fit, strength
from lightning_probes.probes.dataset import FeatureDataset, LayerBatch, LayerSamples, MemoryStore, draw_folds
from lightning_probes.probes.fit import FittedProbes, fit_layers, fit_probe
from lightning_probes.probes.remaining import REMAINING
from lightning_probes.probes.rows import Parts
from lightning_probes.probes.solver import Problems, Solution
from lightning_probes.probes.standardise import standardise_
from lightning_probes.probes.strength import STRONGEST, WEAKEST
from lightning_probes.tasks.classification import Classification

Sample = Callable[[torch.Generator], tuple[Tensor, Tensor]]


def planted(samples: int, width: int, classes: int, noise: float, spread: float = 0.0) -> Sample:
    """Scores of a random linear map, with noise of this deviation; the features differ in size by ``10 ** spread``."""

    def draw(g: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(samples, width, generator=g, dtype=torch.float64)
        truth = torch.randn(width, classes, generator=g, dtype=torch.float64) / width**0.5
        scores = x @ truth + noise * torch.randn(samples, classes, generator=g, dtype=torch.float64)
        rotation = torch.linalg.qr(torch.randn(width, width, generator=g, dtype=torch.float64))[0]
        return (x * torch.logspace(0, -spread, width, dtype=torch.float64)) @ rotation, scores.argmax(dim=1)

    return draw


def clusters(samples: int, width: int, classes: int) -> Sample:
    """Clusters far apart, in more dimensions than there are samples of a class."""

    def draw(g: torch.Generator) -> tuple[Tensor, Tensor]:
        labels = torch.arange(samples) % classes
        middles = torch.randn(classes, width, generator=g, dtype=torch.float64)
        return middles[labels] + 0.7 * torch.randn(samples, width, generator=g, dtype=torch.float64), labels

    return draw


TABLE: dict[str, Sample] = {
    "few noisy samples of many features": planted(200, 150, 2, 1.0),
    "fewer samples than features": planted(120, 300, 3, 0.5),
    "no signal": planted(200, 60, 2, 1e6),
    "no noise": planted(300, 10, 3, 0.0),
    "clusters apart": clusters(100, 60, 4),
    "collinear": planted(400, 40, 3, 0.3, spread=2),
    "many classes": planted(900, 30, 20, 0.3),
    "many samples": planted(3000, 20, 4, 0.5),
}


def standardised(x: Tensor) -> Any:
    mean, variance = x.mean(dim=0), x.var(dim=0, unbiased=False)
    return standardise_(x[None].clone(), mean[None, None], variance[None, None])[0].numpy()


@pytest.mark.parametrize("name", TABLE)
def test_the_strength_is_the_best_of_all_half_decades_by_five_folds(name: str) -> None:
    """To within a thousandth of the constant probe's loss, which is what trials cannot tell."""
    raw, labels = TABLE[name](torch.Generator().manual_seed(5))
    found = fit_probes({"a": raw}, one_hot(labels).double())["a"]
    z, part = standardised(raw), parts_of(len(raw)).numpy()
    losses = {step: held_out_loss(z, labels.numpy(), part, 10 ** (step / 2)) for step in range(WEAKEST, STRONGEST + 1)}
    share = one_hot(labels).double().mean(dim=0)
    constant = -(share * share.log()).nansum().item()
    assert losses[round(2 * math.log10(found.l2))] <= min(losses.values()) + 1e-3 * constant
    assert found.converged


def test_of_strengths_that_are_as_good_the_strongest_is_chosen() -> None:
    labels = torch.arange(60) % 3
    found = fit_probe(Classification(3), torch.full((60, 4), 2.5), one_hot(labels).double())
    assert found.l2 == 10 ** (STRONGEST / 2)


def test_the_edges_of_three_decades_are_no_edges() -> None:
    """Where the grid of 1e-2, 1e-3 and 1e-4 ended, on either side."""
    strong, weak = (TABLE[name](torch.Generator().manual_seed(5)) for name in ("no signal", "no noise"))
    assert fit_probe(Classification(2), strong[0], one_hot(strong[1]).double()).l2 > 0.5
    assert fit_probe(Classification(3), weak[0], one_hot(weak[1]).double()).l2 < 1e-3


@pytest.mark.parametrize(("samples", "fold", "is_strong"), [(5000, 4, True), (5000, 0, False), (4995, 4, False)])
def test_of_five_thousand_samples_the_last_fold_alone_chooses(samples: int, fold: int, is_strong: bool) -> None:
    """One fold has labels that nothing is known of: what it would choose is next to no weights."""
    raw, labels = planted(samples, 15, 3, 0.2)(torch.Generator().manual_seed(2))
    is_spoiled = parts_of(samples) == fold
    labels[is_spoiled] = labels[is_spoiled].roll(1)
    assert (fit_probe(Classification(3), raw, one_hot(labels).double()).l2 > 0.5) == is_strong


def test_views_of_a_sample_are_in_one_fold() -> None:
    """Ten views that differ by next to nothing: held out one by one they would call the weakest penalty the best."""
    raw, labels = planted(60, 100, 2, 1.0)(torch.Generator().manual_seed(1))
    task, alone = Classification(2), Ranks()
    y = one_hot(labels).double()
    views = torch.cat(
        [raw + 1e-3 * torch.randn(raw.shape, generator=torch.Generator().manual_seed(i)) for i in range(10)]
    )
    dataset = FeatureDataset(task, MemoryStore())
    dataset.add(LayerBatch({"a": views}, y))
    found = fit_layers(
        task, dataset, ["a"], "train", ranks=alone, device=alone.device, track=lambda name, items, total: items
    )
    assert found is not None
    one_by_one = fit_probe(task, views, y.repeat(10, 1))
    assert found.known["a"]["l2"] >= 0.3
    assert one_by_one.l2 <= 0.01


def fitted(features: dict[str, Tensor], y: Tensor, before: FittedProbes | None = None) -> FittedProbes:
    task, alone = Classification(y.shape[1]), Ranks()
    dataset = FeatureDataset(task, MemoryStore())
    dataset.add(LayerBatch(dict(features), y))
    shown: Any = lambda name, items, total: items  # noqa: E731
    found = fit_layers(
        task, dataset, list(features), "train", ranks=alone, device=alone.device, track=shown, before=before
    )
    assert found is not None
    return found


def test_a_layer_is_given_the_probe_of_another_only_if_it_has_its_samples() -> None:
    raw, labels = planted(200, 8, 3, 1.0)(torch.Generator().manual_seed(2))
    signs, y = raw.float().sign(), one_hot(labels).float()
    features = {
        "a": signs,
        "of another order": signs[:, torch.tensor([1, 0, 2, 3, 4, 5, 6, 7])],
        "padded": torch.cat([signs, torch.zeros(200, 2)], dim=1),
        "dead": torch.zeros(200, 8),
        "dead and wider": torch.zeros(200, 16),
        "again": signs,
    }
    found = fitted(features, y)
    assert found.probes.widths == {layer: x.shape[1] for layer, x in features.items()}
    for layer, x in features.items():
        by_itself = fit_probe(Classification(3), x, y, folds=draw_folds(200))
        torch.testing.assert_close(found.probes.tensors(layer)["weight"], by_itself.weight, rtol=0, atol=1e-3)
    later = fitted(features, y, found)
    assert later.known == found.known
    for layer in features:
        for name, tensor in later.probes.tensors(layer).items():
            assert torch.equal(tensor, found.probes.tensors(layer)[name]), (layer, name)


def test_a_layer_that_could_not_be_fitted_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    raw, labels = planted(200, 8, 3, 1.0)(torch.Generator().manual_seed(2))
    features, y = {"a": raw.float(), "b": raw.float().exp()}, one_hot(labels).float()

    def raises(task: Any, samples: LayerSamples, *args: Any) -> Any:
        if samples.layer == "a":
            raise MemoryError("no room")
        return fit_samples(task, samples, *args)

    fit_samples = fit.fit_samples
    monkeypatch.setattr(fit, "fit_samples", raises)
    first = fitted(features, y)
    monkeypatch.setattr(fit, "fit_samples", fit_samples)
    assert list(first.faults) == ["a"]
    second = fitted(features, y, first)
    assert second.faults == {}
    assert list(second.known) == ["a", "b"]


def test_features_that_are_not_finite_are_so_without_another_fit() -> None:
    raw, labels = planted(60, 4, 3, 1.0)(torch.Generator().manual_seed(2))
    x = raw.float()
    x[3, 1] = torch.nan
    found = fitted({"a": x}, one_hot(labels).float())
    for each in (found, fitted({"a": x}, one_hot(labels).float(), found)):
        known = {"fitted_on": {"data": "train", "samples": 0}, "converged": False, "l2": None}
        assert each.known["a"] == known | dict.fromkeys(REMAINING)
        assert each.probes.finite() == {"a": False}


def test_features_read_in_parts_choose_the_same_strength() -> None:
    raw, labels = TABLE["few noisy samples of many features"](torch.Generator().manual_seed(3))
    y = one_hot(labels).double()
    parts = Parts([70, 0, 130], lambda i: raw[:70] if i == 0 else raw[70:] if i == 2 else raw[:0])
    whole, read = (fit_probe(Classification(2), x, y) for x in (raw, parts))
    assert whole.l2 == read.l2
    torch.testing.assert_close(whole.weight, read.weight, rtol=0, atol=1e-3)


def test_few_samples_take_the_strength_one() -> None:
    raw, labels = planted(19, 30, 2, 1.0)(torch.Generator().manual_seed(3))
    assert fit_probe(Classification(2), raw, one_hot(labels).double()).l2 == 1.0


@pytest.mark.parametrize("is_small", [False, True])
@pytest.mark.parametrize("sizes", [(150, 150), (300, 0), (0, 199, 101), (297, 3)])
def test_processes_make_the_same_decisions_whatever_their_shares(
    sizes: tuple[int, ...], is_small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads stand for processes, and each sum waits for all of them and compares their shapes."""
    # Between the product of all samples and that of the larger shares.
    monkeypatch.setattr(strength, "_SMALL", 5 * 301 * 3 * 11 if is_small else 5 * 299 * 3 * 11)
    raw, labels = planted(300, 10, 3, 0.3)(torch.Generator().manual_seed(4))
    x, y, folds = (torch.split(part, list(sizes)) for part in (raw, one_hot(labels).double(), parts_of(300)))
    barrier = threading.Barrier(len(sizes), timeout=60)
    given: list[Tensor] = [torch.empty(0)] * len(sizes)

    def fit(i: int) -> Solution:
        def total(own: Tensor) -> Tensor:
            given[i] = own
            barrier.wait()
            assert {tensor.shape for tensor in given} == {own.shape}
            found = torch.stack(given).sum(dim=0)
            barrier.wait()
            return found

        return fit_probe(Classification(3), x[i], y[i], folds=folds[i], total=total, is_crossed=True)

    with ThreadPoolExecutor(len(sizes)) as threads:
        found = list(threads.map(fit, range(len(sizes))))
    alone = fit_probe(Classification(3), raw, one_hot(labels).double(), folds=parts_of(300), is_crossed=True)
    crossed = [each.crossed_tally for each in found if each.crossed_tally is not None]
    assert alone.crossed_tally is not None
    torch.testing.assert_close(torch.stack(crossed).sum(dim=0), alone.crossed_tally, rtol=1e-6, atol=0)
    for each in found:
        assert each.l2 == alone.l2
        torch.testing.assert_close(each.weight, alone.weight, rtol=0, atol=1e-6)


def test_many_classes_are_fitted_with_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few at a time find what all side by side find."""
    raw, labels = TABLE["many classes"](torch.Generator().manual_seed(5))
    y = one_hot(labels).double()
    whole = fit_probe(Classification(20), raw, y, is_crossed=True)
    sizes: list[int] = []
    minimise = Problems.minimise

    def measured(problems: Problems, *args: Any) -> Any:
        sizes.append(len(problems.l2) * len(problems.samples))
        return minimise(problems, *args)

    monkeypatch.setattr(Problems, "minimise", measured)
    # Room for two problems of 20 classes, 31 values each.
    monkeypatch.setattr(strength, "_LARGEST", 2 * 20 * 60 * 31)
    few = fit_probe(Classification(20), raw, y, is_crossed=True)
    assert max(sizes) == 2
    assert few.l2 == whole.l2
    assert few.crossed_tally is not None
    assert whole.crossed_tally is not None
    torch.testing.assert_close(few.crossed_tally, whole.crossed_tally, rtol=0.01, atol=0)
