"""Find out what is worth saying of some curves, and say it in plain sentences, each with its numbers and its test."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_probes.options import first_of
from lightning_probes.report.evidence import UNPAIRED, p_of, row_evidence, unpaired_z
from lightning_probes.report.look import MARGIN, Curves, Look, percents
from lightning_probes.report.outcomes import Outcomes
from lightning_probes.report.paired import ALPHA, best_layers, in_words
from lightning_probes.tasks.task import Words

MOST = 7
"""Say at most this many sentences."""

_BYPASS = 0.05
"""Call a span worse than both sides only if it is so by five points: plain networks have smaller rises."""

_ALIKE = 1.25
"""Call nothing an absence where one error is more than a quarter higher than the other, however small both are."""

_SHORTEST = 3
"""Say of a span that it adds nothing only if it has at least so many layers, and a tenth of all."""


class Kind(Enum):
    """Tell apart what a finding is about; the most useful first."""

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
    FRONT = "front"
    """Mark layers through which learning moved."""
    NOTHING = "nothing"
    """Mark layers inside the network that add nothing."""
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
    notes: Sequence[str] = (),
) -> list[Finding]:
    """Find out what is worth saying of the errors of one stage, at most seven sentences, the most useful first.

    What claims a difference is tested for one. What claims an absence (knows no more, adds nothing, is where it was) is
    tested against a margin of one point of error, 0.01: that a layer is *not* better by the margin, or, where neither
    direction is meant, two such tests; and where one error is a quarter higher than the other nothing is called an
    absence. Layers are compared on the same samples where ``now`` is given, else by the intervals of their rows, as if
    each had samples of its own; so are moments. On the same samples errors rise and fall together, so that this finds
    too little, not too much.

    Looks are many, so all tests share a probability of .05 of any false sentence (which layers may be the best is a
    list of its own, see :func:`~lightning_probes.report.paired.best_layers`): the kinds of findings split it, in a
    table of this module, and layers share that of a kind by Holm's method; of kinds that go with depth, half of it is
    for layers tested in their order until one fails. Each p is corrected for all of this. At most 6 % of reports may
    have any false sentence, all kinds together; by ``tests/benchmarks/findings.py`` at most 1.3 % had, of 2 000 that
    were simulated without any difference, or with each absence wrong by the margin exactly, whatever layers share.

    Args:
        curves: ``{(epoch, step): {layer: row}}`` of metric ``error``, as
            :meth:`ProbeReport.curves <lightning_probes.ProbeReport.curves>` returns them, of stage ``val`` or ``test``.
            Of rows without intervals, as of stage ``train``, and of probes that are only trained along, only facts are
            told.
        words: what the task's numbers are called.
        baseline: error of the best constant answer; the labels are taken as they are, so that it is no estimate.
        now: what each sample got at the last moment.
        start: what the same samples got, in the same order, before training.
        notes: notes of the report, for the reason why a layer has no value.
    """
    if not curves:
        return []
    look = Look(curves, words, baseline, now, start, notes)
    found: list[Finding] = []
    if look.can_test:
        taken: set[str] = set()
        for kind in _KINDS:
            new = kind.find(look, kind.alpha, taken)
            found += new
            # What one finding says of a layer need not be said in other words.
            taken.update(layer for finding in new if kind.is_last_word for layer in finding.layers)
    return [*found, *_facts(look)][:MOST]


class _Kind(NamedTuple):
    """Hold how a kind of finding is found, and which part of the probability of a false sentence is its own."""

    find: Callable[[Look, float, set[str]], list[Finding]]
    alpha: float
    is_last_word: bool = False
    """Tell whether layers that are named need no other word of kinds that claim an absence."""


def _bypassed(look: Look, alpha: float, taken: set[str]) -> list[Finding]:
    """Find spans that are worse, by five points, than a layer before them and the layer right after.

    What a layer knows has passed all before it if there is no skip: errors may rise and fall then, but they hardly fall
    back at one stroke. So after a span three quarters of what it lost have to be back, half of it in one layer. Where
    the span has fewer features than both sides, that is reason enough, and no bypass is claimed.
    """
    errors, count = look.errors.tolist(), len(look.layers)
    p = (p_of(look.higher) * count * (count - 1)).clamp(max=1.0).tolist()
    best_before = look.errors.cummin(0).indices.tolist()
    spans: list[tuple[int, int, int, float]] = []
    after = count - 1
    while after > 1:
        begin, worst = after, 0.0
        while begin > 1:
            i, sides = begin - 1, (best_before[begin - 2], after)
            least_sure = max(p[i][side] for side in sides)
            if least_sure > alpha or errors[i] < max(errors[side] for side in sides) + _BYPASS:
                break
            begin, worst = i, max(worst, least_sure)
        if begin < after and _is_back(look, best_before[begin - 1], begin, after):
            spans.append((best_before[begin - 1], begin, after, worst))
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
            f"{_subject(look, range(begin, after), 'looks', 'look')} bypassed by a skip connection: "
            f"{'they know' if after - begin > 1 else 'it knows'} less than layers on both sides "
            f"({look.in_errors(range(begin, after))}, but {percents(errors[before])} at {look.layers[before]} and "
            f"{percents(errors[after])} at {look.layers[after]}; {look.evidence.test}, {in_words(sure)}).{more}",
            look.named(within),
            sure,
        )
    ]


def _is_back(look: Look, before: int, begin: int, after: int) -> bool:
    """Return whether the layer after a span takes back at once what the span lost, and not by more features."""
    errors, features = look.errors, look.features
    lost = float(errors[begin:after].max() - errors[before])
    has_features = 2 * max(features[begin:after]) > min(features[before], features[after])
    is_at_once = float(errors[after - 1] - errors[after]) >= lost / 2
    return has_features and is_at_once and float(errors[after] - errors[before]) <= lost / 4


def _at_baseline(look: Look, alpha: float, taken: set[str]) -> list[Finding]:
    """Find layers whose error is not below that of the best constant answer by the margin.

    To be above it, as probes are that were fitted to noise, is to know no more, too. The test is paired where the
    answers of the constant are known, whose error is then told, else by the intervals of the layers. It goes up from
    the last layer.
    """
    # Where a point is a good part of the baseline itself, being within one says nothing.
    if not look.baseline >= 4 * MARGIN:
        return []
    if look.now is not None and (constant := look.now.constant) is not None:
        z = row_evidence(look.now.losses, constant[None], look.now.weights, look.now.is_binary, -MARGIN)
        test, baseline = "paired", float(constant.double() @ look.now.weights.double() / look.now.weights.sum())
    else:
        z = (look.errors - look.baseline + MARGIN) / look.last.deviations
        test, baseline = "by the layers' intervals", look.baseline
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
            f"{percents(baseline)}; not better by one point, {test}, {in_words(sure)}).",
            look.named(found),
            sure,
        )
    ]


def _got_worse(look: Look, alpha: float, taken: set[str]) -> list[Finding]:
    """Find layers whose error is higher, by a point, than when two thirds of training were done.

    The moment to compare with is the last one by then. It has to lie in the second half.
    """
    moments = look.moments
    if len(moments) < 4:
        return []
    begin, end = moments[0].point[1], moments[-1].point[1]
    then = [moment for moment in moments if moment.point[1] <= begin + 2 / 3 * (end - begin)][-1]
    if then.point[1] < begin + (end - begin) / 2:
        return []
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
            f"from {percents(then.errors[most])} at step {then.point[1]:,} to {percents(last.errors[most])} at step "
            f"{last.point[1]:,} ({UNPAIRED}, {in_words(sure)}).",
            look.named(found),
            sure,
        )
    ]


def _best(look: Look, alpha: float, taken: set[str]) -> list[Finding]:
    """Say which layer has the lowest error, which others may be the best, and whether it beats the last layer."""
    errors, count = look.errors, len(look.layers)
    if count < 2:
        return []
    best, last = int(errors.argmin()), count - 1
    p = (p_of(look.higher[:, best]) * (count - 1)).clamp(max=1.0)
    if look.now is not None:
        alike = [look.layers.index(layer) for layer in best_layers(look.now)]
    else:
        alike = (p > ALPHA).nonzero().flatten().tolist()
    alike = sorted(set(alike) - {best})
    is_beaten = float(p[last]) <= alpha and last not in alike
    name, lowest = look.layers[best], percents(errors[best])
    if not is_beaten and (best == last or len(alike) > count / 3):
        # That the last layer is the best goes without saying, and so that many are as good.
        return []
    others = f"; not to be told from it: {look.spans(alike)}" if alike else ""
    if is_beaten:
        sure = _corrected(float(p[last]), alpha)
        gap = 100 * float(errors[last] - errors[best])
        sentence = (
            f"{name} has the lowest {look.error}, {lowest}: {gap:.1f} points lower than the last layer, "
            f"{look.layers[last]} ({percents(errors[last])}; {look.evidence.test}, {in_words(sure)}){others}."
        )
        return [Finding(Kind.BEST, sentence, look.named([best]), sure)]
    end = f"{look.layers[last]} ({percents(errors[last])}; {look.evidence.test})"
    # Between the level of this list and that of a finding nothing is claimed of the last layer.
    than = f"but is not surely better than the last layer, {end}" if last in alike else f"the last layer is {end}"
    sentence = f"{name} has the lowest {look.error}, {lowest}, {than}{others}."
    return [Finding(Kind.BEST, sentence, look.named([best]), None)]


def _early_exit(look: Look, alpha: float, taken: set[str]) -> list[Finding]:
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
    if cut >= int(errors.argmin()) and errors[cut] <= errors[last] - MARGIN:
        # That a layer up to here is better than all others is another finding.
        return []
    sure = _corrected(float(p[cut]), alpha)
    best = cut + 1 + int(errors[cut + 1 :].argmin())
    most = f"the best of the {last - cut} layers after it, {look.layers[best]}, has {percents(errors[best])}"
    final = f", the last, {look.layers[last]}, {percents(errors[last])}" if best != last else ", the last"
    return [
        Finding(
            Kind.EXIT,
            f"After {look.layers[cut]} nothing more is gained: a linear layer there has {look.in_errors([cut])}; "
            f"{most}{final} (none is better by one point; {look.evidence.test}, {in_words(sure)}). The network could "
            "stop there, where the probe is all that is asked of it.",
            look.named(range(cut, last + 1)),
            sure,
        )
    ]


def _adds_nothing(look: Look, alpha: float, taken: set[str]) -> list[Finding]:
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
            f"({percents(errors[before])} there, {percents(errors[end])} at the end of them; none better by one "
            f"point, {look.evidence.test}, {in_words(sure)}). Where a skip spans them they may be cut; where "
            f"none does, a network can need layers from which its probes gain nothing.{more}",
            look.named(within),
            sure,
        )
    ]


def _front(look: Look, alpha: float, taken: set[str]) -> list[Finding]:
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

    reached = [f"{look.layers[fronts[i] - 1]} at step {moments[i].point[1]:,}" for i in (middle, -1)]
    begun = f"were all layers up to {look.layers[first - 1]}" if first else "was no layer"
    return [
        Finding(
            Kind.FRONT,
            f"Learning moved through depth: below {percents(level)} {look.error}, half-way from the "
            f"{look.words.baseline} to the best, {begun} at step {start.point[1]:,}, all up to {reached[0]}, and all "
            f"up to {reached[1]} (each error between fell; {UNPAIRED}, {in_words(sure)}).",
            look.named(range(first, last)),
            sure,
        )
    ]


def _at_start(look: Look, alpha: float, taken: set[str]) -> list[Finding]:
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
    # A layer or two of many are not worth a sentence.
    if len(found) < max(1, len(learns) / 10) or set(look.named(found)) <= taken:
        return []
    sure = _corrected(float(p[found].max()), alpha)
    every = len(found) == len(learns) > 1
    who = "Training changed nothing of what any layer knows" if every else _changed(look, found)
    return [
        Finding(
            Kind.START,
            f"{who} ({look.in_errors(found)}, at the start {percents(was[found])}; equivalent within one point, "
            f"{test}, {in_words(sure)}).",
            look.named(found),
            sure,
        )
    ]


def _changed(look: Look, found: Sequence[int]) -> str:
    return f"Training changed nothing of what {look.spans(found)} know{'s' * (len(found) == 1)}"


_KINDS = (
    _Kind(_bypassed, 0.005, is_last_word=True),
    _Kind(_at_baseline, 0.01, is_last_word=True),
    _Kind(_got_worse, 0.005),
    _Kind(_best, 0.005),
    _Kind(_early_exit, 0.01, is_last_word=True),
    _Kind(_front, 0.002),
    _Kind(_adds_nothing, 0.005),
    _Kind(_at_start, 0.008),
)
"""List the kinds that are tested, the most useful first, and split .05 among them."""


def _facts(look: Look) -> list[Finding]:
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


def _subject(look: Look, indices: Sequence[int], one: str, many: str) -> str:
    """Return layers and the verb that follows: "Layers net.4 to net.9 know"."""
    return f"Layer{'s' * (len(indices) > 1)} {look.spans(indices)} {one if len(indices) == 1 else many}"
