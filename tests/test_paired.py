"""Layers compared on the same samples, beside scipy and statsmodels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from benchmarks.findings import apart, coverage_of_answers, coverage_of_best, coverage_of_numbers
from scipy import optimize, stats
from torch import Tensor

from lightning_probes.report.evidence import Paired, normal_of_student, p_of, row_evidence, score_z
from lightning_probes.report.outcomes import Outcomes
from lightning_probes.report.paired import best_layers, binomial_tail, bonett_price, compare_losses, mid_p

COUNTS = [(0, 0), (0, 1), (1, 7), (5, 5), (12, 3), (40, 60), (310, 250), (5_000, 5_400), (500_000, 502_000), (900, 100)]
"""How many units only the first gets wrong, and only the second."""


def answers(*only: int, units: int) -> tuple[Tensor, Tensor]:
    """Two rows of answers, of which so many are wrong in the first only and in the second only."""
    losses = torch.zeros(2, units)
    losses[0, : only[0]] = 1
    losses[1, only[0] : sum(only)] = 1
    losses[:, -units // 10 :] = 1
    return losses[0], losses[1]


@pytest.mark.parametrize("only", COUNTS)
def test_mid_p_is_that_of_the_binomial_distribution(only: tuple[int, int]) -> None:
    least, total = min(only), sum(only)
    expected = min(2 * stats.binom.cdf(least, total, 0.5) - stats.binom.pmf(least, total, 0.5), 1.0)
    found = mid_p(*(torch.tensor([count]) for count in only))
    assert float(found) == pytest.approx(expected, rel=1e-6, abs=1e-300)


def test_mid_p_of_the_example_of_its_authors() -> None:
    first, second = answers(1, 7, units=40)
    found = compare_losses(first, second, torch.ones(40), True)
    assert found.p == pytest.approx(0.039, abs=5e-4)
    assert (found.discordant, found.units, found.difference) == (8, 40, -6 / 40)


@pytest.mark.parametrize("only", COUNTS)
def test_tests_of_mcnemar_are_those_of_statsmodels(only: tuple[int, int]) -> None:
    from statsmodels.stats.contingency_tables import mcnemar

    table = [[50, only[0]], [only[1], 100]]
    more, total = torch.tensor([max(only)]), torch.tensor([sum(only)])
    exact = min(2 * float(binomial_tail(more, total)[0]), 1.0)
    assert exact == pytest.approx(mcnemar(table, exact=True).pvalue, rel=1e-6)
    if sum(only):
        z = score_z(torch.tensor(only[0]), torch.tensor(only[1]), sum(only) + 150, 0.0)
        expected = mcnemar(table, exact=False, correction=False).statistic
        assert float(z) ** 2 == pytest.approx(expected)


@pytest.mark.parametrize("threshold", [-0.01, 0.05, -0.2])
@pytest.mark.parametrize("only", [(0, 0), (3, 10), (40, 10), (0, 12)])
def test_the_score_test_has_the_likeliest_variance_at_the_threshold(only: tuple[int, int], threshold: float) -> None:
    units = 200
    same = units - sum(only)

    def unlikely(second: float) -> float:
        cells = np.array([second + threshold, second, 1 - 2 * second - threshold])
        return -float(np.sum(np.array([*only, same]) * np.log(np.maximum(cells, 1e-300))))

    lowest, highest = max(0.0, -threshold), (1 - threshold) / 2
    second = optimize.minimize_scalar(unlikely, bounds=(lowest, highest), method="bounded", options={"xatol": 1e-12}).x
    variance = (2 * second + threshold - threshold**2) / units
    expected = ((only[0] - only[1]) / units - threshold) / math.sqrt(variance)
    found = score_z(torch.tensor(only[0]), torch.tensor(only[1]), units, threshold)
    assert float(found) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("freedom", [10, 50, 5_000])
def test_student_becomes_normal(freedom: int) -> None:
    t = torch.tensor([-5.0, -1.0, 0.0, 0.5, 2.0, 4.0, 6.0], dtype=torch.float64)
    found = p_of(normal_of_student(t, freedom))
    assert found.numpy() == pytest.approx(stats.t.sf(t.numpy(), freedom), rel=0.05)


def numbers(layers: int, units: int) -> tuple[Tensor, Tensor]:
    """Losses ``(layers, units)`` that hang together, and weights."""
    generator = torch.Generator().manual_seed(3)
    common = torch.rand(units, generator=generator)
    losses = common + torch.rand(layers, units, generator=generator) + 0.05 * torch.arange(layers)[:, None]
    return losses, torch.randint(1, 5, (units,), generator=generator).float()


def test_all_pairs_are_compared_as_by_the_paired_t_test() -> None:
    from statsmodels.stats.weightstats import ttost_paired

    losses, _ = numbers(4, 300)
    paired = Paired(Outcomes(tuple("abcd"), losses, torch.ones(300), False))
    higher, not_lower = p_of(paired.above(0.0)), p_of(paired.above(-0.1))
    for i in range(4):
        for j in set(range(4)) - {i}:
            a, b = losses[i].double().numpy(), losses[j].double().numpy()
            assert float(higher[i, j]) == pytest.approx(stats.ttest_rel(a, b, alternative="greater").pvalue, rel=2e-2)
            p, *_ = ttost_paired(a, b, -0.1, 0.1)
            assert float(torch.maximum(not_lower[i, j], not_lower[j, i])) == pytest.approx(p, rel=2e-2)


@pytest.mark.parametrize("is_binary", [True, False])
def test_all_pairs_are_compared_as_each_by_itself(is_binary: bool) -> None:
    losses, weights = numbers(5, 70_000)
    if is_binary:
        losses, weights = (losses > 1).float(), torch.ones(70_000)
    paired = Paired(Outcomes(tuple("abcde"), losses, weights, is_binary))
    assert paired.errors.numpy() == pytest.approx(np.average(losses.double().numpy(), axis=1, weights=weights.numpy()))
    for threshold in (0.0, -0.01):
        alone = row_evidence(losses, losses[2:3], weights, is_binary, threshold)
        assert paired.above(threshold)[:, 2].numpy() == pytest.approx(alone.numpy(), rel=1e-6)


def test_equal_losses_are_no_difference_and_no_certainty() -> None:
    for is_binary in (True, False):
        losses = torch.ones(2, 50) if is_binary else torch.rand(50).expand(2, -1)
        paired = Paired(Outcomes(("a", "b"), losses, torch.ones(50), is_binary))
        assert bool((paired.above(0.0) == 0).all())
        # Of 50 samples none differs; one in a hundred may.
        assert float(p_of(paired.above(-0.01)).min()) > 0.2


@pytest.mark.parametrize("units", [60, 400, 4_500])
def test_the_bootstrap_is_near_the_t_test(units: int) -> None:
    losses, _ = numbers(2, units)
    a, b = (row.double().numpy() for row in losses)
    for shift in (0.0, 0.05):
        found = compare_losses(losses[0] + shift, losses[1], torch.ones(units), False)
        expected = stats.ttest_rel(a + shift, b)
        low, high = expected.confidence_interval()
        assert found.difference == pytest.approx(float((a + shift - b).mean()), abs=1e-6)
        assert (found.low, found.high) == pytest.approx((low, high), abs=0.06 * (high - low))
        assert found.p == pytest.approx(expected.pvalue, abs=0.02)
        assert found.discordant is None


def test_the_bootstrap_of_weighted_losses_is_near_that_of_scipy() -> None:
    losses, weights = numbers(2, 400)
    a, b, w = (row.double().numpy() for row in (*losses, weights))

    def difference(a: np.ndarray, b: np.ndarray, w: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.asarray(((a - b) * w).sum(axis) / w.sum(axis))

    expected = stats.bootstrap((a, b, w), difference, paired=True, vectorized=True, n_resamples=5_000, rng=0)
    found = compare_losses(losses[0], losses[1], weights, False)
    low, high = expected.confidence_interval
    assert found.difference == pytest.approx(float(difference(a, b, w)))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.08 * (high - low))


def test_p_and_interval_of_the_bootstrap_agree() -> None:
    losses, weights = numbers(2, 80)
    for shift in torch.linspace(-0.1, 0.2, 25):
        found = compare_losses(losses[0] + shift, losses[1], weights, False)
        assert (found.p <= 0.05) == (not found.low <= 0 <= found.high)


def test_a_comparison_draws_nothing_from_global_generators_and_is_the_same_again() -> None:
    losses, weights = numbers(2, 5_000)
    before = torch.get_rng_state()
    first, second = (compare_losses(losses[0], losses[1], weights, False) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first == second


def test_odd_comparisons_are_answered() -> None:
    equal = compare_losses(torch.ones(30), torch.ones(30), torch.ones(30), False)
    assert (equal.difference, equal.low, equal.high, equal.p) == (0, 0, 0, 1)
    one = compare_losses(torch.tensor([0.5]), torch.tensor([0.2]), torch.ones(1), False)
    assert math.isnan(one.low)
    assert one.p == 1
    # Few units of a hundred differ, so that some resamples have none of them, and no spread.
    for number in (1, 2, 5):
        few = torch.zeros(100)
        few[:number] = 1
        found = compare_losses(few, torch.zeros(100), torch.ones(100), False)
        assert -0.02 <= found.low <= found.difference <= found.high < 0.15
        assert found.p > 0.05 or number == 5
    with pytest.raises(ValueError, match=r"compare: .*\(3,\), \(2,\) and \(3,\)"):
        compare_losses(torch.zeros(3), torch.zeros(2), torch.ones(3), True)
    with pytest.raises(ValueError, match="at least one"):
        compare_losses(torch.zeros(0), torch.zeros(0), torch.ones(0), True)


def test_a_comparison_is_a_sentence() -> None:
    first, second = answers(200, 80, units=10_000)
    said = str(compare_losses(first, second, torch.ones(10_000), True, ("net.3", "net.5")))
    assert said.startswith(
        "The error of net.3 is 1.20 points higher than that of net.5 (95 % interval of the difference"
    )
    assert "p < .001, mid-p McNemar on the same 10,000 samples; 280 are right in one of both only)." in said
    chance = str(compare_losses(*answers(41, 40, units=1_000), torch.ones(1_000), True))
    assert chance.endswith("the difference may be chance.")
    equal = compare_losses(torch.ones(1), torch.ones(1), torch.ones(1), False, ("a", "b"))
    assert str(equal) == (
        "The errors of a and b are equal (95 % interval of the difference unknown; p = 1, bootstrap of |t| on the same "
        "1 sample)."
    )


def test_intervals_of_answers_hold_the_difference() -> None:
    low, high = bonett_price(200, 80, 10_000)
    assert low < 0.012 < high
    held, there, often = coverage_of_answers((0.02, 0.01), 2_000, 400)
    assert often > 0.99
    assert 0.92 <= held <= 0.985
    assert 0.92 <= there <= 0.985
    assert coverage_of_answers((0.002, 0.001), 1_000, 400)[0] >= 0.92


def test_intervals_of_numbers_hold_the_difference() -> None:
    assert 0.90 <= coverage_of_numbers(60, 0.5, 0.1, 150) <= 0.99


def test_the_best_layers_are_listed_by_error() -> None:
    for is_binary in (True, False):
        wrong = [0.30, 0.10, 0.101, 0.20, 0.104]
        losses = torch.stack([(torch.arange(4_000) < 4_000 * share).float() for share in wrong])
        if not is_binary:
            generator = torch.Generator().manual_seed(0)
            losses = losses * torch.rand(5, 4_000, generator=generator).add(0.5)
        listed = best_layers(Outcomes(tuple("abcde"), losses, torch.ones(4_000), is_binary))
        errors = dict(zip("abcde", losses.mean(1).tolist(), strict=True))
        assert listed[0] == min(errors, key=lambda layer: errors[layer])
        assert listed == sorted(listed, key=lambda layer: errors[layer])
        assert "b" in listed
        assert not {"a", "d"} & set(listed)


def test_one_layer_is_the_best_and_none_is_no_layer() -> None:
    assert best_layers(Outcomes(("a",), torch.zeros(1, 30), torch.ones(30), True)) == ["a"]
    assert best_layers(Outcomes((), torch.zeros(0, 30), torch.ones(30), True)) == []
    assert best_layers(Outcomes(("a", "b"), torch.zeros(2, 0), torch.ones(0), True)) == ["a", "b"]


def test_a_layer_is_dropped_as_by_scipys_exact_test_at_the_corrected_level() -> None:
    units = 500
    for extra in range(30):
        losses = torch.zeros(6, units)
        losses[1:, :20] = 1
        losses[0, 20:40] = 1
        losses[1, 100 : 100 + extra] = 1
        losses[2:] = 1
        listed = best_layers(Outcomes(tuple("abcdef"), losses, torch.ones(units), True))
        p = stats.binomtest(20 + extra, 40 + extra, alternative="greater").pvalue
        assert ("b" in listed) == (p > 0.05 / 5)


@pytest.mark.parametrize("is_binary", [True, False])
def test_the_best_layer_is_in_the_list_of_nineteen_in_twenty(is_binary: bool) -> None:
    for share in (0.0, 0.7):
        held, _ = coverage_of_best(apart(6, 0.3), 300, share, is_binary, 200)
        assert held >= 0.92
