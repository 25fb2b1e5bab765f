"""Compare layers on the same samples: two by a test and an interval, all by which of them may be the best."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_probes.report.evidence import p_of, row_evidence, sum_over_units
from lightning_probes.report.outcomes import Outcomes
from lightning_probes.tasks.intervals import NORMAL

ALPHA = 0.05
"""Bound the probability of a false statement."""

_RESAMPLES = 4_000
_MOST_GROUPS = 4096
"""Put units together into this many groups before they are drawn again and again, which bounds time and memory."""
_MOST_DRAWS = 1 << 22
"""Draw at most this many groups at a time."""


@dataclass(frozen=True)
class Comparison:
    """Hold how much higher one error is than another on the same units.

    Attributes:
        difference: error of the first minus error of the second.
        low: lower end of the 95 % interval of the difference; NaN where nothing tells it.
        high: upper end.
        p: two-sided p of the hypothesis that the errors are equal.
        units: number of units (samples) that both were scored on.
        discordant: number of units of which exactly one of both is right; ``None`` where losses are not right or wrong.
        test: name of the test.
        names: what was compared.
    """

    difference: float
    low: float
    high: float
    p: float
    units: int
    discordant: int | None
    test: str
    names: tuple[str, str] = ("the first", "the second")

    def __str__(self) -> str:
        """Return one sentence, in points: hundredths of error."""
        first, second = self.names
        gap, way = 100 * abs(self.difference), "higher" if self.difference > 0 else "lower"
        claim = f"The error of {first} is {gap:.2f} points {way} than that of {second}"
        if not self.difference:
            claim = f"The errors of {first} and {second} are equal"
        ends = f"{100 * self.low:+.2f} to {100 * self.high:+.2f}" if math.isfinite(self.low) else "unknown"
        only = f"; {self.discordant:,} are right in one of both only" if self.discordant is not None else ""
        verdict = "; the difference may be chance" if self.difference and self.p > ALPHA else ""
        return (
            f"{claim} (95 % interval of the difference {ends}; {in_words(self.p)}, {self.test} on the same "
            f"{self.units:,} sample{'s' * (self.units != 1)}{only}){verdict}."
        )


def compare_losses(
    first: Tensor,
    second: Tensor,
    weights: Tensor,
    is_binary: bool,
    names: tuple[str, str] = ("the first", "the second"),
) -> Comparison:
    """Compare two layers on the same units. No global random state is used.

    Right and wrong answers are compared by the mid-p McNemar test (Fagerland, Lydersen and Laake 2013), and the
    interval is the adjusted Wald interval of Bonett and Price (2012). Other losses are compared by a bootstrap over
    units, 4 000 times from a fixed seed, of the difference in units of its standard error, |t| (Hall 1988), so that p
    and interval agree. Of more than 4 096 units it draws random groups of as many each.

    Args:
        first: losses of the first, ``(units,)``; 0 or 1 if ``is_binary``.
        second: losses of the second, ``(units,)``.
        weights: number of answers of each unit, ``(units,)``; an error is the weighted mean of losses.
        is_binary: whether each unit has one answer, right or wrong.
        names: what the sentence calls them.

    Raises:
        ValueError: the sizes differ, or there are no units.
    """
    units = len(weights)
    if not units or first.shape != second.shape or first.shape != weights.shape:
        sizes = f"{tuple(first.shape)}, {tuple(second.shape)} and {tuple(weights.shape)}"
        raise ValueError(f"compare: expected losses and weights of the same units, at least one, found {sizes}")
    if not is_binary:
        difference, low, high, p = _bootstrap(first, second, weights)
        return Comparison(difference, low, high, p, units, None, "bootstrap of |t|", names)
    only = [int(((a > 0.5) & (b <= 0.5)).sum()) for a, b in ((first, second), (second, first))]
    p = float(mid_p(*(torch.tensor([count]) for count in only)))
    low, high = bonett_price(only[0], only[1], units)
    return Comparison((only[0] - only[1]) / units, low, high, p, units, sum(only), "mid-p McNemar", names)


def best_layers(outcomes: Outcomes, alpha: float = ALPHA) -> list[str]:
    """Return the layer with the lowest error, then, by error, those that cannot be told from it.

    Of k layers one is dropped if a one-sided test on the same units says, at ``alpha / (k - 1)``, that its error is
    higher than the lowest: of right and wrong answers the exact test of McNemar, else Student's t of a weighted ratio.
    The layer that is truly best is dropped only if some other layer beats it at that level, and of k - 1 others some
    does so by chance with probability at most ``alpha``. So it is in the list with probability at least 95 %, whatever
    the layers share: of answers exactly, of other losses as nearly as t holds.
    """
    layers, losses, weights = list(outcomes.layers), outcomes.losses, outcomes.weights
    if not layers or not len(weights):
        return layers
    errors = sum_over_units(lambda a, w: a @ w, losses, weights) / weights.double().sum()
    order = errors.argsort(stable=True).tolist()
    best = losses[order[:1]]
    if outcomes.is_binary:
        both = sum_over_units(lambda a, b: (a * b).sum(1), losses, best)
        wrong = sum_over_units(lambda a: a.sum(1), losses)
        worse, better = (wrong - both).long(), (wrong[order[0]] - both).long()
        p = binomial_tail(worse, worse + better)[0]
    else:
        p = p_of(row_evidence(losses, best, weights, False, 0.0))
    level = alpha / max(len(layers) - 1, 1)
    return [layers[i] for i in order if i == order[0] or p[i] > level]


def smallest_difference(outcomes: Outcomes) -> float:
    """Return how far apart two errors must be to differ surely: the median over layers and the next in depth.

    It is the half-width of the 95 % interval of a difference of weighted ratios; NaN of a single layer.
    """
    pairs = outcomes.losses[1:], outcomes.losses[:-1], outcomes.weights[None]
    if not len(pairs[0]):
        return math.nan
    answers = outcomes.weights.sum(dtype=torch.float64)
    ratios = sum_over_units(lambda a, b, w: ((a - b) * w).sum(1), *pairs) / answers
    squares = sum_over_units(lambda a, b, w: ((a - b - ratios[:, None]) * w).square().sum(1), *pairs)
    return NORMAL * float((squares.sqrt() / answers).quantile(0.5))


def mid_p(first_only: Tensor, second_only: Tensor) -> Tensor:
    """Return the two-sided mid-p of McNemar's test, float64, of how many units only one of both gets wrong."""
    more = torch.maximum(first_only, second_only)
    tail, point = binomial_tail(more, first_only + second_only)
    return (2 * tail - point).clamp(max=1.0)


def binomial_tail(least: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Return P(X >= least) and P(X = least) of heads among ``total`` tosses of a fair coin, both float64.

    Terms are summed from the greatest on, as far as float64 can tell, so that counts of millions take a few thousand
    terms and overflow nowhere.

    Args:
        least: numbers of heads, ``(cases,)``, at least half of ``total``.
        total: numbers of tosses, ``(cases,)``.
    """
    least, total = least.double(), total.double()
    # After s terms above the middle the next is less than exp(-2 s^2 / total) of the first.
    window = torch.arange(int(6 * math.sqrt(float(total.max()))) + 2, dtype=torch.float64, device=total.device)
    heads = least[:, None] + window
    tosses = total[:, None]
    ways = torch.lgamma(tosses + 1) - torch.lgamma(heads + 1) - torch.lgamma((tosses - heads).clamp_min(0) + 1)
    terms = (ways - tosses * math.log(2)).exp().masked_fill(heads > tosses, 0.0)
    return terms.sum(1).clamp(max=1.0), terms[:, 0]


def bonett_price(first_only: int, second_only: int, units: int) -> tuple[float, float]:
    """Return the 95 % interval of a difference of two errors on the same units (Bonett and Price 2012)."""
    a, b = (first_only + 1) / (units + 2), (second_only + 1) / (units + 2)
    half = NORMAL * math.sqrt((a + b - (a - b) ** 2) / (units + 2))
    return max(a - b - half, -1.0), min(a - b + half, 1.0)


def in_words(p: float) -> str:
    """Write a p as it is usually written."""
    return "p < .001" if p < 0.001 else f"p = {p:.3f}".replace("0.", ".") if p < 0.9995 else "p = 1"


def _bootstrap(first: Tensor, second: Tensor, weights: Tensor) -> tuple[float, float, float, float]:
    """Return the difference of two weighted means, its 95 % interval and its two-sided p."""
    weights = weights.double()
    answers = weights.sum()
    gaps = (first.double() - second.double()) * weights
    theta = gaps.sum() / answers
    if len(gaps) < 2:
        return theta.item(), math.nan, math.nan, 1.0
    generator = torch.Generator(device=gaps.device).manual_seed(0)
    if len(gaps) > _MOST_GROUPS:
        group = torch.randperm(len(gaps), generator=generator, device=gaps.device) % _MOST_GROUPS
        empty = gaps.new_zeros(_MOST_GROUPS)
        gaps, weights = (empty.index_add(0, group, values) for values in (gaps, weights))
    groups = len(gaps)
    # Around their mean, so that squares are of the size of what varies and float32 is enough.
    around = gaps - theta * weights
    scale = around.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    parts = [around / scale, weights / weights.max()]
    products = [parts[i] * parts[j] for i, j in ((0, 0), (0, 1), (1, 1))]
    sums = torch.stack([*parts, *products], dim=1)

    def moved_and_deviation(totals: Tensor) -> tuple[Tensor, Tensor]:
        moved, weight, squares, mixed, lengths = totals.unbind(-1)
        ratio = moved / weight
        spread = squares - 2 * ratio * mixed + ratio * ratio * lengths
        return ratio, spread.clamp_min(0).sqrt() / weight

    unit = (scale / weights.max()).item()
    deviation = moved_and_deviation(sums.sum(0))[1].item()
    if unit * deviation <= 1e-9 * abs(theta.item()):
        # No unit differs from another: that all agree by chance is a matter of signs.
        return theta.item(), theta.item(), theta.item(), min(0.5 ** (len(gaps) - 1), 1.0) if theta else 1.0
    distances, studentised = [], []
    at_once = max(_MOST_DRAWS // groups, 1)
    for begin in range(0, _RESAMPLES, at_once):
        number = min(at_once, _RESAMPLES - begin)
        drawn = torch.randint(groups, (number, groups), generator=generator, device=gaps.device)
        drawn += groups * torch.arange(number, device=gaps.device)[:, None]
        counts = torch.bincount(drawn.flatten(), minlength=number * groups).view(number, groups)
        moved, spread = moved_and_deviation(counts.float() @ sums.float())
        distances.append(moved.abs())
        # What is left of no spread is a rounding.
        studentised.append(torch.where(spread > 1e-3 * deviation, moved.abs() / spread, math.inf))
    far = torch.cat(studentised)
    # Where few units differ some resamples have no spread at all; then distances are taken as they are.
    if not bool(far.quantile(0.97).isfinite()):
        far, deviation = torch.cat(distances), 1.0
    half = float(far.quantile(1 - ALPHA)) * deviation * unit
    p = (1 + int((far * deviation * unit >= theta.abs()).sum())) / (1 + _RESAMPLES)
    return theta.item(), theta.item() - half, theta.item() + half, p
