"""The solver against scikit-learn and scipy, its criterion against autograd, and data nobody would wish for."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from classified import fit_probes, score, solve
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from lightning_probes.probes.rows import Parts, statistics
from lightning_probes.probes.solver import Solution, _inverse
from lightning_probes.probes.standardise import inverse_deviation, moved_statistics, standardise_

TIGHTEST = 1e-7


def standardised(x: Tensor) -> Tensor:
    none = x.new_zeros(1, 1, x.shape[1])
    return standardise_(x[None].clone(), *moved_statistics(x[None], none, none, 1.0))[0]


def objective(weight: Tensor, bias: Tensor, x: Tensor, y: Tensor, l2: float) -> Tensor:
    loss = cross_entropy(x.double() @ weight.double().T + bias.double(), y.double())
    return loss + l2 / 2 * (weight.double() * weight.double()).sum()


def scipy_optimum(x: Tensor, y: Tensor, l2: float) -> float:
    classes, width = y.shape[1], x.shape[1]

    def both(flat: np.ndarray) -> tuple[float, np.ndarray]:
        v = torch.tensor(flat).view(classes, width + 1).requires_grad_()
        value = objective(v[:, :-1], v[:, -1], x, y, l2)
        (gradient,) = torch.autograd.grad(value, v)
        return value.item(), gradient.flatten().numpy()

    options = {"maxiter": 5000, "maxfun": 10000, "ftol": 1e-14, "gtol": 1e-9}
    found = minimize(both, np.zeros(classes * (width + 1)), jac=True, method="L-BFGS-B", options=options)
    return float(found.fun)


def sklearn_optimum(x: Tensor, labels: Tensor, classes: int, l2: float) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = LogisticRegression(C=1 / (len(x) * l2), tol=1e-8, max_iter=5000).fit(x.numpy(), labels.numpy())
    weight, bias = torch.tensor(fitted.coef_), torch.tensor(fitted.intercept_)
    return objective(weight, bias, x, one_hot(labels, classes), l2).item()


def data(seed: int, n: int, width: int, classes: int, spread: float = 0.0) -> tuple[Tensor, Tensor]:
    """Features of which some matter; their directions differ in size by ``10 ** spread``; every class occurs."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=g, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(width, width, generator=g, dtype=torch.float64))[0]
    truth = torch.randn(width, classes, generator=g, dtype=torch.float64)
    scores = x @ truth + torch.randn(n, classes, generator=g, dtype=torch.float64)
    labels = scores.argmax(dim=1)
    labels[:classes] = torch.arange(classes)
    return (x * torch.logspace(0, -spread, width, dtype=torch.float64)) @ rotation, labels


def check_gradient(found: Solution, x: Tensor, y: Tensor, tolerance: float) -> None:
    """The criterion as documented, by autograd, in float64."""
    x, y = x.double(), y.double()
    weight, bias = found.weight.double().requires_grad_(), found.bias.double().requires_grad_()
    grads = torch.autograd.grad(objective(weight, bias, x, y, found.l2), (weight, bias))
    norm = math.hypot(grads[0].norm().item(), grads[1].norm().item())
    pull = (y.mean(dim=0) - y).T @ torch.cat([x, torch.ones(len(x), 1)], dim=1) / len(x)
    scale = max(pull.norm().item(), 1e-3)
    assert found.converged
    assert norm / scale <= tolerance * 1.001 + 1e-9
    assert norm / scale == pytest.approx(found.gradient_norm, rel=0.05, abs=1e-6)


shapes = st.tuples(st.integers(0, 10**6), st.integers(25, 300), st.integers(1, 40), st.floats(0, 3))
strengths = st.sampled_from([1e-1, 1e-2, 1e-3, 1e-4])
scales = st.sampled_from([1e-8, 1e-3, 1.0, 1e3, 1e8])
quick = settings(max_examples=25, deadline=None, derandomize=True)


@quick
@given(shapes, st.integers(3, 20), strengths, scales, st.sampled_from([torch.float32, torch.float64]))
def test_as_low_as_scikit_learn(
    shape: tuple[int, int, int, float], classes: int, l2: float, scale: float, dtype: torch.dtype
) -> None:
    seed, n, width, spread = shape
    raw, labels = data(seed, n, width, classes, spread)
    x, y = standardised((raw * scale).to(dtype)), one_hot(labels, classes).to(dtype)
    found = solve(x, y, l2, tolerance=TIGHTEST if dtype == torch.float64 else 1e-6, max_iterations=3000)
    assert objective(found.weight, found.bias, x, y, l2) <= 1.0001 * sklearn_optimum(x.double(), labels, classes, l2)
    check_gradient(found, x, y, TIGHTEST if dtype == torch.float64 else 1e-6)


@quick
@given(shapes, st.integers(2, 6), strengths)
def test_soft_labels_as_low_as_scipy(shape: tuple[int, int, int, float], classes: int, l2: float) -> None:
    seed, n, width, spread = shape
    raw, labels = data(seed, n, min(width, 15), classes, min(spread, 1))
    x, g = standardised(raw), torch.Generator().manual_seed(seed)
    y = 0.8 * one_hot(labels, classes) + 0.2 * torch.rand(n, classes, generator=g).softmax(dim=1).double()
    y = y / y.sum(dim=1, keepdim=True)
    found = solve(x, y, l2, tolerance=TIGHTEST, max_iterations=3000)
    assert objective(found.weight, found.bias, x, y, l2) <= 1.0001 * scipy_optimum(x, y, l2)
    check_gradient(found, x, y, TIGHTEST)


def test_far_fewer_samples_than_features() -> None:
    raw, labels = data(3, 40, 300, 4)
    x, y = standardised(raw), one_hot(labels, 4).double()
    found = solve(x, y, 1e-2, tolerance=TIGHTEST)
    assert objective(found.weight, found.bias, x, y, 1e-2) <= 1.0001 * scipy_optimum(x, y, 1e-2)
    check_gradient(found, x, y, TIGHTEST)


def test_planted_solution_is_found() -> None:
    """Soft labels that a known probe gives are answered by that probe."""
    x = standardised(data(5, 400, 12, 3)[0])
    planted, bias = torch.randn(3, 12, generator=torch.Generator().manual_seed(2)).double(), torch.tensor([0.5, 0, -1])
    y = (x @ planted.T + bias).softmax(dim=1)
    found = solve(x, y, 0.0, tolerance=1e-9, max_iterations=2000)
    torch.testing.assert_close(found.weight - found.weight.mean(0), planted - planted.mean(0), atol=1e-5, rtol=0)


def test_a_warm_start_from_the_solution_stops_at_once() -> None:
    raw, labels = data(7, 500, 30, 5)
    x, y = standardised(raw.float()), one_hot(labels, 5).float()
    found = solve(x, y, 1e-3)
    again = solve(x, y, 1e-3, start=(found.weight, found.bias))
    assert found.iterations > 0
    assert again.iterations == 0
    assert torch.equal(again.weight, found.weight)
    fresh = solve(x, y, 1e-3, start=(found.weight * math.nan, found.bias))
    assert torch.equal(fresh.weight, found.weight)


def test_float32_that_stalls_is_finished_in_float64() -> None:
    raw, labels = data(9, 600, 60, 4, spread=3)
    x, y = standardised(raw.float()), one_hot(labels, 4).float()
    found = solve(x, y, 1e-4, tolerance=1e-6, max_iterations=5000)
    assert found.weight.dtype == torch.float32
    check_gradient(found, x, y, 1e-6)
    # Asked for more than float32 can hold: what float64 found, rounded, whose own gradient says what is left.
    further = solve(x, y, 1e-4, tolerance=1e-9, max_iterations=5000)
    assert not further.converged
    assert further.gradient_norm < 1e-6
    exact = solve(x.double(), y.double(), 1e-4, tolerance=1e-9, max_iterations=5000)
    torch.testing.assert_close(further.weight.double(), exact.weight, rtol=1e-5, atol=1e-6)


def test_iterations_are_bounded_and_said() -> None:
    raw, labels = data(11, 300, 30, 5, spread=3)
    found = solve(standardised(raw), one_hot(labels, 5), 1e-4, tolerance=1e-9, max_iterations=3)
    assert (found.iterations, found.converged) == (3, False)


def test_draws_nothing_changes_nothing_repeats_exactly() -> None:
    raw, labels = data(13, 300, 20, 5)
    y = one_hot(labels, 5)
    y[::7] = 0
    before, state = raw.clone(), torch.get_rng_state()
    first, second = (fit_probes({"a": raw}, y)["a"] for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(raw, before)
    assert torch.equal(torch.get_rng_state(), state)
    counted = y.sum(dim=1) > 0
    third = fit_probes({"a": raw[counted]}, y[counted])["a"]
    assert torch.equal(first.weight, third.weight)
    assert first.tally[2] == counted.sum()
    x = standardise_(raw[None].clone(), first.mean[None, None], first.variance[None, None])[0][counted]
    wrong = ((x @ first.weight.T + first.bias).argmax(dim=1) != labels[counted]).sum()
    assert first.tally[0] == wrong


def on_features(found: Solution) -> tuple[Tensor, Tensor]:
    """Weight and bias of the same probe on features that are not standardised."""
    weight = found.weight * inverse_deviation(found.mean, found.variance)
    return weight, found.bias - weight @ found.mean


def test_an_order_of_the_labels_does_not_become_a_part() -> None:
    raw, _ = data(31, 300, 12, 5)
    labels = torch.arange(300) % 5
    raw = raw + 6 * one_hot(labels, 5).to(raw) @ data(32, 5, 12, 5)[0]
    found = fit_probes({"a": raw}, one_hot(labels, 5).double())["a"]
    # Held out by position, one class would be missing from the rest and the largest strength be the best.
    assert found.l2 < 1e-2
    assert found.tally[0] == 0


@pytest.mark.parametrize("counted", [200, 150])
def test_scores_on_other_samples_are_those_of_the_standardised_probe(counted: int) -> None:
    raw, labels = data(29, 500, 12, 4)
    raw, y = raw * 1e3 + 5, one_hot(labels, 4).double()
    found = fit_probes({"a": raw[:300]}, y[:300])["a"]
    y[300 + counted :] = 0
    before = raw.clone()
    wrong, loss, total = score(found, raw[300:], y[300:]).tolist()
    weight, bias = on_features(found)
    logits = raw[300 : 300 + counted] @ weight.T + bias
    known = labels[300 : 300 + counted]
    assert wrong == int((logits.argmax(dim=1) != known).sum())
    assert loss == pytest.approx(cross_entropy(logits, known, reduction="sum").item())
    assert total == counted
    assert torch.equal(raw, before)


def _bad(name: str) -> tuple[Tensor, Tensor]:
    raw, labels = data(23, 60, 8, 4)
    x, y = raw.float(), one_hot(labels, 4)
    apart = torch.cat([x, 50 * one_hot(labels, 4)], dim=1)
    table = {
        "fewer samples than classes": (x[:3], one_hot(labels[:3], 9)),
        "one sample": (x[:1], y[:1]),
        "a class absent": (x, one_hot(labels.clamp(max=2), 4)),
        "one single class": (x, one_hot(labels * 0 + 1, 4)),
        "only one class at all": (x, torch.ones(60, 1)),
        "constant features": (torch.full_like(x, 3.7), y),
        "a constant feature": (torch.cat([x, torch.full((60, 1), 1e6)], dim=1), y),
        "duplicated features": (x.repeat(1, 5), y),
        "tiny": (x * 1e-8, y),
        "huge": (x * 1e8, y),
        "far from zero": (x + 1e4, y),
        "separable": (apart, y),
        "fewer samples than features": (torch.cat([x] * 9, dim=1)[:24], y[:24]),
        "no usable samples": (x, y * 0),
        "no samples": (x[:0], y[:0]),
        "no features": (x[:, :0], y),
        "half precision": (x.half(), y),
        "outliers": (torch.cat([x[:-1], x[-1:] * 1e6]), y),
    }
    return table[name]


BAD = [
    "fewer samples than classes",
    "one sample",
    "a class absent",
    "one single class",
    "only one class at all",
    "constant features",
    "a constant feature",
    "duplicated features",
    "tiny",
    "huge",
    "far from zero",
    "separable",
    "fewer samples than features",
    "no usable samples",
    "no samples",
    "no features",
    "half precision",
    "outliers",
]


@pytest.mark.parametrize("l2", [None, 0.0])
@pytest.mark.parametrize("name", BAD)
def test_bad_data_have_a_finite_answer(name: str, l2: float | None) -> None:
    x, y = _bad(name)
    found = fit_probes({"a": x}, y, l2=l2)["a"]
    for t in (found.weight, found.bias, found.mean, found.variance, found.tally):
        assert t.isfinite().all()
    assert found.weight.shape == (y.shape[1], x.shape[1])
    assert found.converged
    assert found.gradient_norm <= 1e-3
    if len(x) < 20:
        assert found.l2 == (1.0 if l2 is None else l2)
    if name in ("one single class", "separable", "one sample"):
        assert found.tally[0] == 0
    if name.startswith("no ") and name != "no features":
        assert not found.weight.any()
        assert found.tally[2] == 0
    if name == "constant features":
        assert not found.weight.any()
        torch.testing.assert_close(found.bias.softmax(0), y.float().mean(0), atol=1e-3, rtol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_are_set_aside(value: float) -> None:
    x, y = _bad("tiny")
    spoiled = x.clone()
    spoiled[5, 2] = value
    found = fit_probes({"spoiled": spoiled, "whole": x}, y)
    assert not found["spoiled"].converged
    assert found["spoiled"].weight.isnan().all()
    assert found["spoiled"].tally.isnan().all()
    assert torch.equal(found["whole"].weight, fit_probes({"whole": x}, y)["whole"].weight)


def test_mistakes_of_the_caller_raise() -> None:
    with pytest.raises(ValueError, match="3 samples"):
        solve(torch.zeros(3, 2), torch.ones(4, 1), 0.0)
    with pytest.raises(ValueError, match="l2=-1"):
        solve(torch.zeros(3, 2), torch.ones(3, 1), -1.0)
    with pytest.raises(ValueError, match="l2=-2"):
        fit_probes({"layer": torch.zeros(3, 2)}, torch.ones(3, 1), l2=-2.0)
    with pytest.raises(ValueError, match="2 samples, 3 targets"):
        fit_probes({"layer": torch.zeros(2, 2)}, torch.ones(3, 1))


def test_what_differs_in_its_last_places_counts_and_a_constant_does_not() -> None:
    # The labels are in the last place of one feature, as deep in an untrained network; the others are constants.
    labels = torch.arange(300) % 3
    x = torch.tensor([0.1, 1e4, 0.3, 0.0]).repeat(300, 1)
    x[:, 2] += labels * 2 * torch.finfo(torch.float32).eps * 0.3
    _, variance = statistics(Parts([300], lambda _: x))
    assert (variance > 0).tolist() == [False, False, True, False]
    found = fit_probes({"a": x}, one_hot(labels, 3))["a"]
    assert (inverse_deviation(found.mean, found.variance) > 0).tolist() == [False, False, True, False]
    assert found.tally[0] == 0


def test_what_no_precision_reaches_ends_where_rounding_ends_all_progress() -> None:
    raw, labels = data(41, 200, 12, 4)
    x, y = standardised(raw), one_hot(labels, 4).double()
    found = solve(x, y, 1e-3, tolerance=0.0, max_iterations=10_000)
    assert not found.converged
    assert found.iterations < 10_000
    assert found.gradient_norm < 1e-10


@pytest.mark.parametrize("worst", [1.0, 1e30])
def test_a_matrix_that_is_not_positive_has_an_inverse_that_is(worst: float) -> None:
    # No Gram matrix: its eigenvalues are 1 + worst and 1 - worst.
    hessian = torch.tensor([[1.0, worst], [worst, 1.0]], dtype=torch.float64)
    inverse = _inverse(hessian.clone())
    assert inverse.isfinite().all()
    torch.testing.assert_close(inverse, inverse.T)
    assert (torch.linalg.eigvalsh(inverse) > 0).all()
