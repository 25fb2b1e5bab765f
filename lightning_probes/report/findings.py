"""Find out what is worth saying of some curves, and say it in plain sentences, each with its numbers and its test."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_probes.options import first_of
from lightning_probes.report.evidence import (
    LEAST_UNITS,
    UNPAIRED,
    Evidence,
    Paired,
    Unpaired,
    p_of,
    row_evidence,
    unpaired_z,
)
from lightning_probes.report.method import ONLINE
from lightning_probes.report.outcomes import Outcomes
from lightning_probes.report.paired import ALPHA, best_layers, in_words
from lightning_probes.tasks.intervals import NORMAL
from lightning_probes.tasks.task import Words

MARGIN = 0.01
"""Take errors for equal, where an absence is claimed, if they differ by less than this: one point."""

MOST = 7
"""Say at most this many sentences."""

_BYPASS = 0.05
"""Call a span worse than both sides only if it is so by five points: plain networks have smaller rises."""

_ALIKE = 1.25
"""Call nothing an absence where one error is more than a quarter higher than the other, however small both are."""

_SHORTEST = 3
"""Say of a span that it adds nothing only if it has at least so many layers, and a tenth of all."""

Row = Mapping[str, Any]
Curves = Mapping[tuple[int, int], Mapping[str, Row]]


class Kind(Enum):
    """Tell apart what a finding is about."""

    BYPASS = "bypass"
    """Mark layers that are worse than layers on both sides."""
    BASELINE = "baseline"
    """Mark layers that know no more than the best constant answer."""
    WORSE = "worse"
    """Mark layers that got worse in the last third of training."""
    BEST = "best"
    """Mark the layer with the lowest error."""
    EXIT = "exit"
    """Mark layers after which nothing is gained, from the last that gains."""
    NOTHING = "nothing"
    """Mark layers inside the network that add nothing."""
    FRONT = "front"
    """Mark layers through which learning moved."""
    START = "start"
    """Mark layers whose errors are what they were before training."""
    UNCONVERGED = "unconverged"
    """Mark layers whose probes are not at their optimum."""
    LEFT_OUT = "left out"
    """Mark layers without a value."""
    LAGGING = "lagging"
    """Mark probes that were only trained along, of which nothing can be claimed."""


@dataclass(frozen=True)
class Finding:
    """Hold one thing worth knowing of a network.

    Attributes:
        kind: what it is about.
        sentence: it, in plain words, with its numbers and its test.
        layers: the layers that it is about, in order of depth.
        p: probability of evidence as strong by chance, corrected for all that :func:`find` looks at, so that at most
            .05; ``None`` for a fact without a test.
    """

    kind: Kind
    sentence: str
    layers: tuple[str, ...]
    p: float | None = None

    def __str__(self) -> str:
        """Return the sentence."""
        return self.sentence


def find(
    curves: Curves,
    *,
    words: Words,
    baseline: float | None = None,
    now: Outcomes | None = None,
    start: Outcomes | None = None,
    constant: Tensor | None = None,
    notes: Sequence[str] = (),
) -> list[Finding]:
    """Find out what is worth saying of the errors of one stage, at most seven sentences, the most useful first.

    What claims a difference is tested for one. What claims an absence (knows no more, adds nothing, is where it was) is
    tested against a margin of one point of error, 0.01: that a layer is *not* better by the margin, or, where neither
    direction is meant, two such tests; and where one error is a quarter higher than the other nothing is called an
    absence. Layers are compared on the same samples where ``now`` is given, else by the intervals of their rows, as if
    each had samples of its own; so are moments. On the same samples errors rise and fall together, so that this finds
    too little, not too much.

    Looks are many, so all tests share a probability of .05 of any false sentence: the kinds of findings split it, in a
    table of this module, and layers share that of a kind by Holm's method; of kinds that go with depth, half of it is
    for layers tested in their order until one fails. Each p is corrected for all of this. By
    ``tests/benchmarks/findings.py``, over 2 000 simulations without any difference, or with every absence wrong by the
    margin exactly, at most 6 % have any false sentence, all kinds together.

    Args:
        curves: ``{(epoch, step): {layer: row}}`` of metric ``error``, as
            :meth:`ProbeReport.curves <lightning_probes.ProbeReport.curves>` returns them, of stage ``val`` or ``test``.
            Of rows without intervals, as of stage ``train``, and of probes that are only trained along, only facts are
            told.
        words: what the task's numbers are called.
        baseline: error of the best constant answer; the labels are taken as they are, so that it is no estimate.
        now: what each sample got at the last moment.
        start: what the same samples got, in the same order, before training.
        constant: what the best constant answer gets from the same samples, ``(units,)``; needs ``now``.
        notes: notes of the report, for the reason why a layer has no value.
    """
    if not curves:
        return []
    look = _Look(curves, words, baseline, now, start, constant, notes)
    found: list[Finding] = []
    if look.can_test:
        taken: set[str] = set()
        for kind in _KINDS:
            new = [replace(finding, kind=kind.kind) for finding in kind.find(look, kind.alpha, taken)]
            found += new
            # What one finding says of a layer need not be said in other words.
            taken.update(layer for finding in new if kind.is_last_word for layer in finding.layers)
    return [*found, *_facts(look)][:MOST]


class _Moment(NamedTuple):
    """Hold the errors of the layers at one moment, and how sure they are."""

    point: tuple[int, int]
    errors: Tensor
    deviations: Tensor


class _Look:
    """Hold what all kinds of findings look at: the layers with a value at the last moment, in order of depth."""

    def __init__(
        self,
        curves: Curves,
        words: Words,
        baseline: float | None,
        now: Outcomes | None,
        start: Outcomes | None,
        constant: Tensor | None,
        notes: Sequence[str],
    ) -> None:
        self.words, self.notes = words, notes
        self.baseline = math.nan if baseline is None else baseline
        self.last_point = list(curves)[-1]
        self.rows = sorted(curves[self.last_point].values(), key=lambda row: row["depth"])
        valued = [row for row in self.rows if math.isfinite(row["value"])]
        self.layers = [row["layer"] for row in valued]
        self.now = _of_layers(now, self.layers)
        self.start = _of_layers(start, self.layers) if self.now is not None else None
        self.constant = constant if self.now is not None else None
        self._curves, self._valued = curves, valued

    @property
    def can_test(self) -> bool:
        """Tell whether errors have intervals, of probes that do not lag, on enough samples."""
        return bool(
            self._valued
            and not self.is_lagging
            and all(row.get("low") is not None for row in self._valued)
            and min(row["samples"] for row in self._valued) >= LEAST_UNITS
            and (self.now is None or len(self.now.weights) >= LEAST_UNITS)
        )

    @property
    def is_lagging(self) -> bool:
        return any(_fitted_on(row) == ONLINE for row in self._valued)

    @property
    def features(self) -> list[int]:
        return [row.get("features") or 0 for row in self._valued]

    @cached_property
    def evidence(self) -> Evidence:
        """Hold how the layers compare now."""
        return Paired(self.now) if self.now is not None else Unpaired(self.last.errors, self.last.deviations)

    @property
    def errors(self) -> Tensor:
        """Return the errors of the rows, which what was kept of the samples may be a part of."""
        return self.last.errors

    @cached_property
    def not_lower(self) -> Tensor:
        """Hold z for "the error of i is not lower than that of j by the margin", ``(layers i, layers j)``."""
        return self.evidence.above(-MARGIN)

    @cached_property
    def higher(self) -> Tensor:
        """Hold z for "the error of i is higher than that of j", ``(layers i, layers j)``."""
        return self.evidence.above(0.0)

    @cached_property
    def last(self) -> _Moment:
        return self._moment(self.last_point)

    @cached_property
    def moments(self) -> list[_Moment]:
        """Hold the moments at which errors were measured as at the last, in order of time."""
        kind = _fitted_on(self._valued[0])
        return [
            self._moment(point)
            for point, rows in self._curves.items()
            if point == self.last_point or any(_fitted_on(row) == kind for row in rows.values())
        ]

    @property
    def first(self) -> _Moment | None:
        """Return the moment before training, if it is there and is not the only one."""
        begin = self.moments[0]
        return begin if begin.point[1] == 0 and len(self.moments) > 1 else None

    def _moment(self, point: tuple[int, int]) -> _Moment:
        rows = [self._curves[point].get(layer, {}) for layer in self.layers]
        errors = torch.tensor([row.get("value", math.nan) for row in rows], dtype=torch.float64)
        deviations = torch.tensor([_deviation(row) for row in rows], dtype=torch.float64)
        return _Moment(point, errors, deviations)

    def named(self, indices: Iterable[int]) -> tuple[str, ...]:
        """Return the names of some layers."""
        return tuple(self.layers[i] for i in indices)

    @property
    def error(self) -> str:
        """Name the error as the task does."""
        return self.words.error.partition(" (")[0]

    def in_errors(self, indices: Iterable[int]) -> str:
        """Return "errors 8.1 to 8.6 %" of some layers."""
        some = self.errors[list(indices)]
        return f"{self.error}{'s' * (len(some) > 1 and self.error == 'error')} {_percents(some)}"

    def spans(self, indices: Sequence[int]) -> str:
        """Name layers by their spans, at most the three longest: "net.2, net.4 to net.9 and net.12"."""
        spans: list[tuple[int, int]] = []
        for i in indices:
            begin = spans.pop()[0] if spans and i == spans[-1][1] + 1 else i
            spans.append((begin, i))
        shown = sorted(sorted(spans, key=lambda span: span[0] - span[1])[:3])
        names: list[str] = []
        for a, b in shown:
            ends = [self.layers[a], self.layers[b]][: b - a + 1]
            names += ends if b - a < 2 else [" to ".join(ends)]
        if more := len(indices) - sum(b - a + 1 for a, b in shown):
            names.append(f"{more} more")
        return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


class _Kind(NamedTuple):
    """Hold a kind of finding: how it is found, and which part of the probability of a false sentence is its own."""

    kind: Kind
    find: Callable[[_Look, float, set[str]], list[Finding]]
    alpha: float
    is_last_word: bool = False
    """Tell whether layers that are named need no other word of kinds that claim an absence."""


def _bypassed(look: _Look, alpha: float, taken: set[str]) -> list[Finding]:
    """Find spans that are worse, by five points, than a layer before them and the layer right after.

    What a layer knows has passed all before it if there is no skip: errors may rise and fall then, but they hardly fall
    back at one stroke. So after a span three quarters of what it lost have to be back, half of it in one layer. Where
    the span has fewer features than both sides, that is reason enough, and no bypass is claimed.
    """
    errors, count = look.errors, len(look.layers)
    pairs = count * (count - 1)
    p = (p_of(look.higher) * pairs).clamp(max=1.0)
    best_before = errors.cummin(0).indices.tolist()
    spans: list[tuple[int, int, int, float]] = []
    after = count - 1
    while after > 1:
        begin, worst = after, 0.0
        while begin > 1:
            i, sides = begin - 1, (best_before[begin - 2], after)
            surest = max(float(p[i, side]) for side in sides)
            if surest > alpha or errors[i] < max(float(errors[side]) for side in sides) + _BYPASS:
                break
            begin, worst = i, max(worst, surest)
        before = best_before[begin - 1]
        if begin < after and _is_back(look, before, begin, after):
            spans.append((before, begin, after, worst))
            after = begin
        else:
            after -= 1
    if not spans:
        return []
    spans.sort(key=lambda span: span[1] - span[2])
    before, begin, after, _ = spans[0]
    within = sorted(i for _, a, b, _ in spans for i in range(a, b))
    others = sorted(set(within) - set(range(begin, after)))
    sure = _corrected(max(worst for *_, worst in spans), alpha)
    more = f" The same holds of {look.spans(others)}." if others else ""
    return [
        Finding(
            Kind.BYPASS,
            f"{_subject(look, range(begin, after), 'knows', 'know')} less than layers on both sides ("
            f"{look.in_errors(range(begin, after))}, but {_percents(errors[before])} at {look.layers[before]} and "
            f"{_percents(errors[after])} at {look.layers[after]}; {look.evidence.test}, {in_words(sure)}): the mark of "
            f"a skip connection that bypasses them.{more}",
            look.named(within),
            sure,
        )
    ]


def _is_back(look: _Look, before: int, begin: int, after: int) -> bool:
    """Return whether the layer after a span takes back at once what the span lost, and not by more features."""
    errors, features = look.errors, look.features
    lost = float(errors[begin:after].max() - errors[before])
    has_features = 2 * max(features[begin:after]) > min(features[before], features[after])
    is_at_once = float(errors[after - 1] - errors[after]) >= lost / 2
    return has_features and is_at_once and float(errors[after] - errors[before]) <= lost / 4


def _at_baseline(look: _Look, alpha: float, taken: set[str]) -> list[Finding]:
    """Find layers whose error is not below that of the best constant answer by the margin.

    To be above it, as probes are that were fitted to noise, is to know no more, too. The test is paired where the
    answers of the constant are known, else by the intervals of the layers. It goes up from the last layer.
    """
    # Where a point is a good part of the baseline itself, being within one says nothing.
    if not look.baseline >= 4 * MARGIN:
        return []
    if look.constant is not None and look.now is not None:
        z = row_evidence(look.now.losses, look.constant[None], look.now.weights, look.now.is_binary, -MARGIN)
        test = "paired"
    else:
        z = (look.errors - look.baseline + MARGIN) / look.last.deviations
        test = "by the layers' intervals"
    p = _shared(p_of(z).flip(0), in_order=True).flip(0)
    found = (p <= alpha).nonzero().flatten().tolist()
    if not found:
        return []
    every = len(found) == len(look.layers) > 1
    who = "No layer knows" if every else _subject(look, found, "knows no", "know no")
    sure = _corrected(float(p[found].max()), alpha)
    return [
        Finding(
            Kind.BASELINE,
            f"{who} more than the {look.words.baseline} ({look.in_errors(found)}, baseline "
            f"{_percents(look.baseline)}; less than one point better, {test}, {in_words(sure)}).",
            look.named(found),
            sure,
        )
    ]


def _got_worse(look: _Look, alpha: float, taken: set[str]) -> list[Finding]:
    """Find layers whose error is higher, by a point, than when two thirds of training were done."""
    moments = look.moments
    if len(moments) < 4:
        return []
    begin, end = moments[0].point[1], moments[-1].point[1]
    then = [moment for moment in moments if moment.point[1] <= begin + 2 / 3 * (end - begin)][-1]
    last = look.last
    p = _shared(p_of(unpaired_z(last.errors - then.errors, last.deviations, then.deviations)))
    found = ((p <= alpha) & (last.errors - then.errors >= MARGIN)).nonzero().flatten().tolist()
    if not found:
        return []
    most = max(found, key=lambda i: float(last.errors[i] - then.errors[i]))
    sure = _corrected(float(p[found].max()), alpha)
    which = f", most of all {look.layers[most]}:" if len(found) > 1 else ":"
    return [
        Finding(
            Kind.WORSE,
            f"{_subject(look, found, 'has', 'have')} got worse in the last third of training{which} "
            f"from {_percents(then.errors[most])} at step {then.point[1]:,} to {_percents(last.errors[most])} at step "
            f"{last.point[1]:,} ({UNPAIRED}, {in_words(sure)}).",
            look.named(found),
            sure,
        )
    ]


def _best(look: _Look, alpha: float, taken: set[str]) -> list[Finding]:
    """Say which layer has the lowest error, which others may be the best, and whether it beats the last layer."""
    errors, count = look.errors, len(look.layers)
    if count < 2:
        return []
    best, last = int(errors.argmin()), count - 1
    p = (p_of(look.higher[:, best]) * (count - 1)).clamp(max=1.0)
    if look.now is not None:
        alike = [look.layers.index(layer) for layer in best_layers(look.now)[1:]]
    else:
        alike = [i for i in errors.argsort().tolist() if i != best and p[i] > ALPHA]
    is_beaten = float(p[last]) <= alpha and last not in alike
    name, lowest = look.layers[best], _percents(errors[best])
    if not is_beaten and (best == last or len(alike) > count / 2):
        # That the last layer is the best goes without saying, and so that most are as good.
        return []
    others = f"; not to be told from it: {look.spans(sorted(alike))}" if alike else ""
    if is_beaten:
        sure = _corrected(float(p[last]), alpha)
        gap = 100 * float(errors[last] - errors[best])
        sentence = (
            f"{name} has the lowest {look.error}, {lowest}: {gap:.1f} points lower than the last layer, "
            f"{look.layers[last]} ({_percents(errors[last])}; {look.evidence.test}, {in_words(sure)}){others}."
        )
        return [Finding(Kind.BEST, sentence, look.named([best]), sure)]
    sentence = (
        f"{name} has the lowest {look.error}, {lowest}, but is not surely better than the last layer, "
        f"{look.layers[last]} ({_percents(errors[last])}; {look.evidence.test}){others}."
    )
    return [Finding(Kind.BEST, sentence, look.named([best]), None)]


def _early_exit(look: _Look, alpha: float, taken: set[str]) -> list[Finding]:
    """Find the first layer on which no later one improves by the margin; the tests go up from the last layer.

    The probe is a linear layer at the cut, so its error is that of a network that stops there.
    """
    errors, last = look.errors, len(look.layers) - 1
    if last < _SHORTEST or look.layers[last] in taken:
        return []
    # That no later layer is better is sure if it is of each of them.
    p = p_of(look.not_lower).tril(-1).max(0).values[:last]
    p = _shared(p.flip(0), in_order=True).flip(0)
    lowest = errors.flip(0).cummin(0).values.flip(0)[1:]
    found = ((p <= alpha) & (errors[:last] <= _ALIKE * lowest)).nonzero().flatten().tolist()
    if not found or last - found[0] < max(_SHORTEST, last / 10):
        return []
    cut = found[0]
    if cut == int(errors.argmin()) and errors[cut] <= errors[last] - MARGIN:
        # That this layer is better than all others is another finding.
        return []
    sure = _corrected(float(p[cut]), alpha)
    best = cut + 1 + int(errors[cut + 1 :].argmin())
    most = f"the best of the {last - cut} layers after it, {look.layers[best]}, has {_percents(errors[best])}"
    final = f", the last, {look.layers[last]}, {_percents(errors[last])}" if best != last else ", the last"
    return [
        Finding(
            Kind.EXIT,
            f"After {look.layers[cut]} nothing more is gained: a linear layer there has {look.in_errors([cut])}; "
            f"{most}{final} (none is better by one point; {look.evidence.test}, {in_words(sure)}). The network could "
            "stop there.",
            look.named(range(cut, last + 1)),
            sure,
        )
    ]


def _adds_nothing(look: _Look, alpha: float, taken: set[str]) -> list[Finding]:
    """Find long spans inside the network of which no layer improves by the margin on the layer before the span."""
    errors, count = look.errors, len(look.layers)
    shortest = max(_SHORTEST, math.ceil(count / 10))
    p = p_of(look.not_lower) * (count * (count - 1) / 2)
    row, column = torch.arange(count)[:, None], torch.arange(count)[None]
    is_alike = (p <= alpha) & (errors[None] <= _ALIKE * errors[:, None])
    # From a layer on, how many in a row add nothing to it?
    lengths = (is_alike | (row <= column)).cumprod(0).sum(0) - torch.arange(count) - 1
    spans, free = [], 0
    while free < count:
        longest = int(lengths[free])
        names = set(look.named(range(free + 1, free + 1 + longest)))
        # What goes on to the last layer is an early exit.
        if longest >= shortest and free + longest < count - 1 and not names & taken:
            spans.append((free, free + longest))
            free += longest
        else:
            free += 1
    if not spans:
        return []
    spans.sort(key=lambda span: span[0] - span[1])
    before, end = spans[0]
    within = sorted(i for a, b in spans for i in range(a + 1, b + 1))
    others = sorted(set(within) - set(range(before + 1, end + 1)))
    sure = _corrected(max(float(p[a + 1 : b + 1, a].max()) for a, b in spans), alpha)
    more = f" The same holds of {look.spans(others)}." if others else ""
    return [
        Finding(
            Kind.NOTHING,
            f"{_subject(look, range(before + 1, end + 1), 'adds', 'add')} nothing to {look.layers[before]} "
            f"({_percents(errors[before])} there, {_percents(errors[end])} at the end of them; each less than one "
            f"point better, {look.evidence.test}, {in_words(sure)}). Where a skip spans them they may be cut; where "
            f"none does, a network can need layers from which its probes gain nothing.{more}",
            look.named(within),
            sure,
        )
    ]


def _front(look: _Look, alpha: float, taken: set[str]) -> list[Finding]:
    """Find learning that moves through depth: ever more layers, from the first on, err less than half-way.

    Half-way is the middle between the baseline and the lowest error at the end. The front is the last layer of which,
    as of all before it, the error is below. It moved if it is found at three places, the error of each layer that it
    passed fell meanwhile, and most of that fall came while the front passed: else all layers learn at the same time.
    """
    moments, count = look.moments, len(look.layers)
    if len(moments) < 3 or not math.isfinite(look.baseline):
        return []
    level = (look.baseline + float(look.last.errors.min())) / 2
    fronts = [int((moment.errors < level).cumprod(0).sum()) for moment in moments]
    first, last = fronts[0], fronts[-1]
    least = max(2, count / 10)
    between = [
        i for i in range(1, len(moments) - 1) if fronts[i] - first >= least / 2 and last - fronts[i] >= least / 2
    ]
    if last - first < least or not between:
        return []
    middle = min(between, key=lambda i: abs(fronts[i] - (first + last) / 2))
    steps = [(moments[a], moments[b], slice(fronts[a], fronts[b])) for a, b in ((0, middle), (middle, -1))]
    falls = torch.cat(
        [
            p_of(unpaired_z(a.errors - b.errors, a.deviations, b.deviations))[passed] * 2 * count * len(moments)
            for a, b, passed in steps
        ]
    )
    (start, mid, early), (_, end, late) = steps
    by_then = (start.errors - mid.errors) / (start.errors - end.errors)
    if float(falls.max()) > alpha or not by_then[early].median() > 0.5 > by_then[late].median():
        return []
    sure = _corrected(float(falls.max()), alpha)

    def place(front: int) -> str:
        return look.layers[front - 1] if front else "none"

    reached = f"{place(fronts[middle])} at step {mid.point[1]:,} and {place(last)} at step {end.point[1]:,}"
    return [
        Finding(
            Kind.FRONT,
            f"Learning moved through depth: below {_percents(level)} {look.error}, half-way from the "
            f"{look.words.baseline} to the best, were all layers up to {place(first)} at step {start.point[1]:,}, up "
            f"to {reached} (the errors of all between fell; {UNPAIRED}, {in_words(sure)}).",
            look.named(range(first, last)),
            sure,
        )
    ]


def _at_start(look: _Look, alpha: float, taken: set[str]) -> list[Finding]:
    """Find layers whose errors differ from those before training by less than the margin, from the first on."""
    if look.first is None:
        return []
    if look.start is not None and look.now is not None:
        weights, is_binary = look.now.weights, look.now.is_binary
        each = ((look.now.losses, look.start.losses), (look.start.losses, look.now.losses))
        z = torch.minimum(*(row_evidence(a, b, weights, is_binary, -MARGIN) for a, b in each))
        test = look.evidence.test
    else:
        a, b = look.last, look.first
        gaps = MARGIN - (a.errors - b.errors).abs()
        z, test = unpaired_z(gaps, a.deviations, b.deviations), UNPAIRED
    was, has = look.first.errors, look.last.errors
    # The data themselves do not learn.
    learns = [i for i, layer in enumerate(look.layers) if layer != "input"]
    if not learns:
        return []
    p = torch.ones_like(was)
    p[learns] = _shared(p_of(z[learns]), in_order=True)
    is_alike = torch.maximum(was, has) <= _ALIKE * torch.minimum(was, has)
    found = ((p <= alpha) & is_alike).nonzero().flatten().tolist()
    if not found or set(look.named(found)) <= taken:
        return []
    sure = _corrected(float(p[found].max()), alpha)
    every = len(found) == len(learns) > 1
    who = "Training changed nothing of what any layer knows" if every else _changed(look, found)
    return [
        Finding(
            Kind.START,
            f"{who} ({look.in_errors(found)}, at the start {_percents(was[found])}; equivalent within one point, "
            f"{test}, {in_words(sure)}).",
            look.named(found),
            sure,
        )
    ]


def _changed(look: _Look, found: Sequence[int]) -> str:
    return f"Training changed nothing of what {look.spans(found)} know{'s' * (len(found) == 1)}"


_KINDS = (
    _Kind(Kind.BYPASS, _bypassed, 0.005, is_last_word=True),
    _Kind(Kind.BASELINE, _at_baseline, 0.01, is_last_word=True),
    _Kind(Kind.WORSE, _got_worse, 0.005),
    _Kind(Kind.BEST, _best, 0.005),
    _Kind(Kind.EXIT, _early_exit, 0.01, is_last_word=True),
    _Kind(Kind.FRONT, _front, 0.002),
    _Kind(Kind.NOTHING, _adds_nothing, 0.005),
    _Kind(Kind.START, _at_start, 0.008),
)
"""List the kinds that are tested, the most useful first, and split .05 among them."""


def _facts(look: _Look) -> list[Finding]:
    """Tell, without a test, of probes that are not at their optimum, and of layers without a value."""
    found = []
    if look.is_lagging:
        found.append(
            Finding(
                Kind.LAGGING,
                "Probes were only trained along with the network and lag behind it: their errors are upper bounds, "
                "from which nothing more is concluded.",
                tuple(look.layers),
            )
        )
    index = {layer: i for i, layer in enumerate(look.layers)}
    late = [index[row["layer"]] for row in look.rows if row.get("converged") is False and row["layer"] in index]
    if late:
        found.append(
            Finding(
                Kind.UNCONVERGED,
                f"The probe{'s' * (len(late) > 1)} of {look.spans(late)} did not reach the optimum: the error"
                f"{'s' * (len(late) > 1)} there may be too high.",
                look.named(late),
            )
        )
    left = [row["layer"] for row in look.rows if row["layer"] not in index]
    if left:
        why = next((note for note in look.notes if any(repr(layer) in note for layer in left)), "")
        names = first_of(left)
        found.append(
            Finding(
                Kind.LEFT_OUT,
                f"{names} {'has' if len(left) == 1 else 'have'} no error{f' ({why})' if why else ''}.",
                tuple(left),
            )
        )
    return found


def _shared(p: Tensor, *, in_order: bool = False) -> Tensor:
    """Return p corrected for how many there are, by Holm's method (1979).

    Args:
        p: one p for each layer, ``(layers,)``.
        in_order: also test the layers one by one, without further correction until one fails; for this as for Holm's
            method p is doubled, and the smaller counts.
    """
    count = len(p)
    ordered, order = p.sort()
    steps = (ordered * torch.arange(count, 0, -1)).cummax(0).values
    holm = torch.empty_like(p).scatter_(0, order, steps)
    return (torch.minimum(2 * holm, 2 * p.cummax(0).values) if in_order else holm).clamp(max=1.0)


def _corrected(p: float, alpha: float) -> float:
    """Correct a p, which is right for a kind that may err with probability ``alpha``, for all kinds together."""
    return min(p * ALPHA / alpha, 1.0)


def _of_layers(outcomes: Outcomes | None, layers: Sequence[str]) -> Outcomes | None:
    """Return what these layers got, in this order; ``None`` if it is not known of all of them."""
    if outcomes is None or not set(layers) <= set(outcomes.layers):
        return None
    places = [outcomes.layers.index(layer) for layer in layers]
    losses = outcomes.losses if places == list(range(len(outcomes.layers))) else outcomes.losses[places]
    return replace(outcomes, layers=tuple(layers), losses=losses) if bool(losses.isfinite().all()) else None


def _fitted_on(row: Row) -> str:
    return str((row.get("fitted_on") or {}).get("data", ""))


def _deviation(row: Row) -> float:
    """Return the standard error that a row's interval tells, by its longer half; NaN without an interval."""
    low, high, value = row.get("low"), row.get("high"), row.get("value", math.nan)
    return math.nan if low is None or high is None else max(high - value, value - low) / NORMAL


def _subject(look: _Look, indices: Sequence[int], one: str, many: str) -> str:
    """Return layers and the verb that follows: "Layers net.4 to net.9 know"."""
    return f"Layer{'s' * (len(indices) > 1)} {look.spans(indices)} {one if len(indices) == 1 else many}"


def _percents(errors: Tensor | float) -> str:
    """Write one error, or the range of several, in per cent."""
    some = torch.as_tensor(errors, dtype=torch.float64).flatten() * 100
    low, high = f"{float(some.min()):.1f}", f"{float(some.max()):.1f}"
    return f"{low} %" if low == high else f"{low} to {high} %"
