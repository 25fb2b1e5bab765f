"""Findings of reports whose errors are chosen: each kind where it is there, and silence where it is not."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from benchmarks.findings import WORLDS, false_findings
from torch import Tensor

from lightning_probes.report.findings import Finding, Kind, find
from lightning_probes.report.look import Curves
from lightning_probes.report.outcomes import Outcomes
from lightning_probes.tasks.intervals import wilson_interval
from lightning_probes.tasks.kinds import words_of

UNITS = 10_000

E3 = """
7.4 7.0 7.2 7.2 7.9 8.6 8.5 8.8 9.4 9.7 9.9 10.7 11.5 12.5 13.3 14.0 14.3 15.0 15.7 16.0 16.9 17.5 18.3 18.9 20.2
20.7 21.2 21.9 22.4 22.8 23.6 24.2 25.0 25.9 26.4 27.6 28.3 28.9 30.4 30.7 31.6 32.3 32.7 33.7 34.5 34.9 34.8 36.1
36.7 37.5 37.9 39.0 39.1 40.4 41.3 41.9 43.5 43.9 44.9 45.8 45.8 46.4 46.9 47.0 6.7 6.4 5.9 5.7 5.8 5.6 5.5 5.6 5.6
5.6 5.5 5.5 5.6 5.6 5.7 5.6 5.7 5.6 5.7 5.6 5.6 5.7 5.7 5.8 5.8 5.8 5.7 5.8 5.9 6.0 5.9 6.1 6.2 6.1 6.1 5.9 6.1 6.0
6.0 5.9 6.1 6.0 6.1 6.0 6.1 6.0 6.0 6.1 6.1 6.1 6.1 6.2 6.2 6.2 6.2 6.3 6.2 6.2 6.2 6.2 6.2 6.2 6.2 6.2"""
"""Errors of 128 layers, in per cent, with a bridge from layer 0 to layer 64: those of a run of E3 in examples/paper."""

E8_PLAIN = """
12.4 12.9 12.9 13.4 13.8 13.8 15.5 15.3 16.4 16.5 17.0 17.1 17.2 16.9 17.2 18.2 18.5 17.8 18.9 19.0 19.2 19.3 19.7
20.1 19.8 20.1 20.6 21.1 21.1 21.3 21.6 21.5 22.2 22.8 22.6 22.7 22.6 23.3 23.1 23.3 23.4 23.2 23.9 23.8 23.9 24.1
24.2 24.5 24.3 24.5 24.7 24.5 24.5 24.8 24.9 25.0 25.2 25.2 25.4 25.7 25.9 25.5 25.7 25.7"""
"""The same of 64 layers without a bridge (E8)."""


def per_cent(text: str) -> list[float]:
    return [float(error) / 100 for error in text.split()]


def name(layer: int) -> str:
    return f"net.{layer}"


def row(layer: int, error: float, **other: Any) -> dict[str, Any]:
    low, high = wilson_interval(min(error, 1.0) * UNITS, UNITS)
    return {
        **{"layer": name(layer), "depth": layer, "value": error, "low": low, "high": high, "samples": UNITS},
        **{"features": 64, "converged": True, "fitted_on": {"data": "train", "samples": 9_000}, **other},
    }


def curves(*moments: Sequence[float], first_step: int = 0, **other: Any) -> Curves:
    """Curves of some moments, a hundred steps from one to the next."""
    return {
        (i, first_step + 100 * i): {name(j): row(j, error, **other) for j, error in enumerate(errors)}
        for i, errors in enumerate(moments)
    }


def outcomes(errors: Sequence[float], units: int = UNITS) -> Outcomes:
    """Answers with these errors, the harder samples wrong first: layers hang together as much as they can."""
    losses = torch.stack([(torch.arange(units) < round(error * units)).float() for error in errors])
    return Outcomes(tuple(map(name, range(len(errors)))), losses, torch.ones(units), True)


def found(*moments: Sequence[float], is_paired: bool = True, baseline: float = 0.9, **other: Any) -> list[Finding]:
    """What is found of errors at some moments."""
    known: dict[str, Any] = {"baseline": baseline, "words": words_of("classification"), **other}
    if is_paired:
        now = replace(outcomes(moments[-1]), constant=outcomes([baseline]).losses[0])
        known = {"now": now, "start": outcomes(moments[0]), **known}
    known.setdefault("curves", curves(*moments))
    all_of_them = find(**known)
    depth = {layer: i for i, layer in enumerate(known["curves"][list(known["curves"])[-1]])}
    assert len(all_of_them) <= 7
    for finding in all_of_them:
        assert str(finding) == finding.sentence
        assert finding.sentence.endswith((".", ")"))
        assert finding.p is None or 0 <= finding.p <= 0.05
        assert list(finding.layers) == sorted(finding.layers, key=lambda layer: depth[layer])
        assert not re.search(r"\bnan\b|\binf\b", finding.sentence)
    return all_of_them


def one(kind: Kind, findings: Sequence[Finding]) -> Finding:
    (finding,) = (finding for finding in findings if finding.kind is kind)
    return finding


def kinds(findings: Sequence[Finding]) -> set[Kind]:
    return {finding.kind for finding in findings}


def names(*ends: int) -> tuple[str, ...]:
    return tuple(map(name, range(ends[0], ends[1] + 1)))


PAIRED = pytest.mark.parametrize("is_paired", [True, False])


@PAIRED
def test_the_bridge_of_e3_is_named_and_nothing_else_as_such(is_paired: bool) -> None:
    finding = one(Kind.BYPASS, found(per_cent(E3), is_paired=is_paired))
    assert finding.layers == names(13, 63)
    assert finding.sentence.startswith("Layers net.13 to net.63 look bypassed by a skip connection: they know less ")
    assert "less than layers on both sides (errors 12.5 to 47.0 %" in finding.sentence
    assert "7.0 % at net.1 and 6.7 % at net.64" in finding.sentence
    assert "skip connection" in finding.sentence


@PAIRED
@pytest.mark.parametrize(
    "errors",
    [
        per_cent(E8_PLAIN),
        # E2: small rises, however sure.
        [0.075, 0.077, 0.015, 0.017, 0.010, 0.009, 0.010, 0.0101, 0.008, 0.009],
        # A hump that falls layer by layer, as layers without a skip may.
        [0.08, 0.20, 0.40, 0.55, 0.48, 0.40, 0.33, 0.26, 0.20, 0.15],
        # It falls at one stroke, but not back to where it was.
        [0.08, 0.20, 0.40, 0.55, 0.40, 0.35],
        [0.50, 0.40, 0.30, 0.20, 0.10],
        [0.08, 0.30, 0.40, 0.50],
    ],
)
def test_plain_networks_are_not_called_bypassed(errors: list[float], is_paired: bool) -> None:
    assert Kind.BYPASS not in kinds(found(errors, is_paired=is_paired))


def test_a_bottleneck_is_no_bypass() -> None:
    errors = [0.05, 0.05, 0.40, 0.06, 0.05]
    narrow = curves(errors)
    assert Kind.BYPASS in kinds(found(errors, curves=narrow))
    narrow[0, 0][name(2)]["features"] = 2  # type: ignore[index]
    assert Kind.BYPASS not in kinds(found(errors, curves=narrow))


def test_several_bypassed_spans_are_one_sentence() -> None:
    errors = [0.1, 0.3, 0.3, 0.3, 0.1, 0.09, 0.3, 0.09, 0.08]
    finding = one(Kind.BYPASS, found(errors))
    assert finding.layers == (*names(1, 3), name(6))
    assert finding.sentence.endswith("The same holds of net.6.")


def test_layers_at_the_baseline_are_named() -> None:
    errors = [0.10, 0.30, 0.86, 0.897, 0.90, 0.91, 0.90]
    finding = one(Kind.BASELINE, found(errors))
    assert finding.layers == names(3, 6)
    assert finding.sentence == (
        "Layers net.3 to net.6 know no more than the majority class (errors 89.7 to 91.0 %, baseline 90.0 %; not "
        "better by one point, paired, p < .001)."
    )
    every = one(Kind.BASELINE, found([0.899, 0.90, 0.90]))
    assert every.sentence.startswith("No layer knows more than the majority class")
    # Without what each sample got, intervals have to do.
    assert one(Kind.BASELINE, found(errors, is_paired=False)).layers == names(4, 6)


def test_no_layer_is_at_the_baseline_where_all_are_better_or_it_is_as_small_as_the_margin() -> None:
    assert Kind.BASELINE not in kinds(found([0.10, 0.30, 0.88, 0.889]))
    assert Kind.BASELINE not in kinds(found([0.02, 0.019, 0.02], baseline=0.02))
    assert Kind.BASELINE not in kinds(found([0.5, 0.9, 0.9], baseline=math.nan, is_paired=False))


def test_what_is_at_the_baseline_is_not_also_said_to_add_nothing_or_to_be_where_it_was() -> None:
    errors = [0.10, 0.60, 0.90, 0.90, 0.90, 0.90, 0.90]
    assert kinds(found([0.5, 0.8, *errors[2:]], errors)) == {Kind.BASELINE, Kind.BEST}


@PAIRED
def test_layers_that_got_worse_at_the_end_are_named(is_paired: bool) -> None:
    steady, late = [0.3, 0.2, 0.15], [0.3, 0.2, 0.25]
    finding = one(Kind.WORSE, found([0.5] * 3, steady, steady, steady, late, is_paired=is_paired))
    assert finding.layers == ("net.2",)
    assert "Layer net.2 has got worse in the last third of training: from 15.0 % at step 200 to 25.0 %" in str(finding)
    both = one(Kind.WORSE, found([0.5] * 3, steady, steady, steady, [0.35, 0.2, 0.25], is_paired=is_paired))
    assert "Layers net.0 and net.2 have got worse in the last third of training, most of all net.2: from" in str(both)


@PAIRED
def test_layers_that_got_worse_before_or_by_little_are_not(is_paired: bool) -> None:
    early, half_a_point = [[0.5], [0.2], [0.4], [0.4], [0.4]], [[0.5], [0.2], [0.2], [0.2], [0.205]]
    for moments in (early, half_a_point, [[0.2], [0.4]]):
        both = [[0.1, *moment] for moment in moments]
        assert Kind.WORSE not in kinds(found(*both, is_paired=is_paired))


@PAIRED
def test_the_best_layer_beats_the_last(is_paired: bool) -> None:
    finding = one(Kind.BEST, found([0.5, 0.2, 0.1, 0.101, 0.2], is_paired=is_paired))
    assert finding.layers == ("net.2",)
    assert finding.p is not None
    assert "net.2 has the lowest error, 10.0 %: 10.0 points lower than the last layer, net.4 (20.0 %" in str(finding)
    assert ("not to be told from it: net.3" in str(finding)) == (not is_paired)


@PAIRED
def test_the_best_layer_that_may_be_no_better_than_the_last_is_a_fact_without_a_test(is_paired: bool) -> None:
    errors = [0.5, 0.4, 0.3, 0.1000, 0.1002]
    finding = one(Kind.BEST, found(errors, is_paired=is_paired))
    assert finding.p is None
    assert "but is not surely better than the last layer, net.4" in finding.sentence
    assert Kind.BEST not in kinds(found([0.5, 0.4, 0.3, 0.2, 0.1], is_paired=is_paired))


@PAIRED
def test_layers_after_which_nothing_is_gained_are_named_with_the_error_of_the_cut(is_paired: bool) -> None:
    errors = [0.5, 0.3, 0.021, 0.022, 0.3, 0.0205, 0.02]
    finding = one(Kind.EXIT, found(errors, is_paired=is_paired))
    assert finding.layers == names(2, 6)
    assert finding.sentence.startswith(
        "After net.2 nothing more is gained: a linear layer there has error 2.1 %; the best of the 4 layers after it, "
        "net.6, has 2.0 %, the last (none is better by one point;"
    )


@PAIRED
@pytest.mark.parametrize(
    "errors",
    [
        [0.5, 0.3, 0.12, 0.115, 0.112, 0.10],
        # Less than a point each, but half of all mistakes.
        [0.5, 0.3, 0.014, 0.013, 0.012, 0.007],
        # That all are worse than the first is another finding.
        [0.1, 0.2, 0.2, 0.2, 0.2, 0.2],
        [0.3, 0.1, 0.1],
    ],
)
def test_a_network_that_gains_to_its_end_could_not_stop(errors: list[float], is_paired: bool) -> None:
    assert Kind.EXIT not in kinds(found(errors, is_paired=is_paired))


def test_spans_inside_that_add_nothing_are_named_with_a_warning() -> None:
    errors = [0.5, 0.3, 0.3, 0.299, 0.3, 0.3, 0.2, 0.1]
    finding = one(Kind.NOTHING, found(errors))
    assert finding.layers == names(2, 5)
    assert "Layers net.2 to net.5 add nothing to net.1 (30.0 % there, 30.0 % at the end of them" in finding.sentence
    assert "a network can need layers from which its probes gain nothing" in finding.sentence
    assert Kind.NOTHING not in kinds(found([0.5, 0.3, 0.295, 0.29, 0.285, 0.28, 0.2, 0.1]))
    # Two layers are no span, and what is bypassed is not said twice.
    assert Kind.NOTHING not in kinds(found([0.5, 0.3, 0.3, 0.3, 0.2, 0.1]))
    assert Kind.NOTHING not in kinds(found([0.2, 0.4, 0.4, 0.4, 0.1, 0.05]))


@PAIRED
def test_a_front_of_learning_that_moves_is_named(is_paired: bool) -> None:
    def at(front: int) -> list[float]:
        return [0.1] * front + [0.88] * (12 - front)

    finding = one(Kind.FRONT, found(at(2), at(2), at(5), at(8), at(12), is_paired=is_paired))
    assert finding.layers == names(2, 11)
    path = "were all layers up to net.1 at step 0, all up to net.7 at step 300, and all up to net.11 at step 400"
    assert path in finding.sentence
    new = one(Kind.FRONT, found(at(0), at(5), at(8), at(12), is_paired=is_paired))
    assert "was no layer at step 0, all up to net.4 at step 100" in new.sentence


@PAIRED
def test_layers_that_learn_together_or_at_once_are_no_front(is_paired: bool) -> None:
    ramp = torch.linspace(0.1, 0.8, 12)
    together = [(ramp * share).clamp(0.05).tolist() for share in (1.0, 0.8, 0.6, 0.4, 0.2)]
    bad, good = [0.1] * 2 + [0.88] * 10, [0.1] * 12
    backward = [[0.88] * (12 - front) + [0.1] * front for front in (1, 3, 6, 9)]
    for moments in (together, [bad, bad, good], backward, [bad, good], [bad] * 4):
        assert Kind.FRONT not in kinds(found(*moments, is_paired=is_paired))


@PAIRED
def test_layers_that_are_where_they_were_are_named(is_paired: bool) -> None:
    first, last = [0.2, 0.2, 0.2, 0.5, 0.6], [0.2, 0.2, 0.201, 0.3, 0.1]
    findings = found(first, [0.2, 0.2, 0.2, 0.4, 0.3], last, is_paired=is_paired)
    if not is_paired:
        # Unpaired, 10 000 samples at this error are too few for one point.
        assert Kind.START not in kinds(findings)
        return
    finding = one(Kind.START, findings)
    assert finding.layers == names(0, 2)
    assert finding.sentence == (
        "Training changed nothing of what net.0 to net.2 know (errors 20.0 to 20.1 %, at the start 20.0 %; equivalent "
        "within one point, paired, p < .001)."
    )


def test_layers_that_learnt_or_of_an_unknown_start_are_not_where_they_were() -> None:
    assert Kind.START not in kinds(found([0.3, 0.3], [0.285, 0.2]))
    assert Kind.START not in kinds(found([0.012, 0.3], [0.008, 0.2]))
    late = curves([0.3, 0.3], [0.3, 0.2], first_step=50)
    assert Kind.START not in kinds(found([0.3, 0.3], [0.3, 0.2], curves=late))
    # The data are where they were, of course.
    raw = curves([0.3, 0.3], [0.3, 0.2])
    for moment in raw.values():
        moment["input"] = {**moment.pop("net.0"), "layer": "input"}  # type: ignore[attr-defined, index]
    now = outcomes([0.3, 0.2])
    named = Outcomes(("input", "net.1"), now.losses, now.weights, True)
    start = replace(outcomes([0.3, 0.3]), layers=named.layers)
    assert Kind.START not in kinds(found([0.3, 0.3], [0.3, 0.2], curves=raw, now=named, start=start))


def test_facts_are_told_without_a_test() -> None:
    errors = [0.3, 0.2, 0.1, 0.3]
    known = curves(errors)
    known[0, 0][name(1)]["converged"] = False  # type: ignore[index]
    known[0, 0][name(3)] |= dict.fromkeys(("value", "low", "high"), math.nan)  # type: ignore[operator, index]
    findings = found(errors, curves=known, now=outcomes(errors[:3]), start=None, notes=["'net.3' is set aside: NaN"])
    late, left = one(Kind.UNCONVERGED, findings), one(Kind.LEFT_OUT, findings)
    assert str(late) == "The probe of net.1 did not reach the optimum: the error there may be too high."
    assert str(left) == "net.3 has no error ('net.3' is set aside: NaN)."
    assert (late.layers, left.layers, late.p, left.p) == (("net.1",), ("net.3",), None, None)


def test_of_the_stage_train_and_of_probes_that_lag_only_facts_are_told() -> None:
    errors = [0.05, 0.4, 0.4, 0.05, 0.05]
    assert found(errors, curves=curves(errors, low=None, high=None)) == []
    lagging = found(errors, curves=curves(errors, fitted_on={"data": "online", "samples": 0}, converged=None))
    assert kinds(lagging) == {Kind.LAGGING}


@PAIRED
def test_earlier_moments_that_were_measured_otherwise_are_no_comparison(is_paired: bool) -> None:
    moments = [[0.3, 0.2], [0.3, 0.2], [0.3, 0.2], [0.3, 0.2], [0.3, 0.4]]
    known = curves(*moments)
    for point in list(known)[:-1]:
        for layer in known[point].values():
            layer["fitted_on"] = {"data": "online", "samples": 0}  # type: ignore[index]
    assert Kind.WORSE in kinds(found(*moments, is_paired=is_paired))
    assert Kind.WORSE not in kinds(found(*moments, is_paired=is_paired, curves=known))


@PAIRED
def test_odd_reports_are_answered(is_paired: bool) -> None:
    assert find({}, words=words_of("classification")) == []
    assert found([0.3], is_paired=is_paired) == []
    assert found([0.9], is_paired=is_paired)[0].sentence.startswith("Layer net.0 knows no more than the majority class")
    assert found([0.3], [0.2], [0.1], is_paired=is_paired) == []
    nothing = curves([math.nan] * 3)
    assert kinds(find(nothing, words=words_of("classification"))) == {Kind.LEFT_OUT}
    many = torch.linspace(0.8, 0.1, 500).tolist()
    assert kinds(found([0.8] * 500, many, is_paired=is_paired)) <= {Kind.EXIT, Kind.START}
    new_layer = curves([0.3, 0.2], [0.3, 0.2, 0.1])
    assert found([0.3, 0.2, 0.1], curves=new_layer, start=None, is_paired=is_paired) is not None


def test_what_is_known_of_too_few_samples_or_other_layers_is_not_used() -> None:
    errors = [0.5, 0.3, 0.1, 0.2]
    unpaired = found(errors, is_paired=False)
    assert found(errors, now=outcomes(errors[:3]), start=None) == unpaired
    broken = outcomes(errors)
    broken.losses[1, 3] = math.inf
    assert found(errors, now=broken, start=None) == unpaired
    assert found(errors, now=outcomes(errors, units=10), start=None) == []


@pytest.mark.parametrize("kind", ["regression", "multilabel"])
def test_numbers_and_labels_have_their_own_words(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    words, baseline = words_of(kind), {"regression": 1.0, "multilabel": 0.3}[kind]
    means = torch.tensor([0.2, 1.0, 1.3, 0.15, 0.15, 0.15, 0.15]) * baseline
    noise = torch.rand(UNITS, generator=generator) + 0.5
    losses = means[:, None] * noise / noise.mean()
    weights = torch.ones(UNITS)
    now = Outcomes(names(0, 6), losses, weights, False, constant=baseline * noise / noise.mean())
    known = curves(means.tolist())
    for layer in known[0, 0].values():
        layer |= {"low": layer["value"] - 0.001, "high": layer["value"] + 0.001}  # type: ignore[operator]
    for outcomes in (now, None):
        findings = find(known, words=words, baseline=baseline, now=outcomes)
        at_baseline = one(Kind.BASELINE, findings)
        assert at_baseline.layers == names(1, 2)
        measure = {"regression": "1 - R2 100.0 to 130.0 %", "multilabel": "errors 30.0 to 39.0 %"}[kind]
        assert f"know no more than the {words.baseline} ({measure}" in at_baseline.sentence
        assert Kind.BYPASS in kinds(findings)
        assert one(Kind.EXIT, findings).layers[0] == "net.3"


def test_findings_are_few_and_in_order_of_use() -> None:
    last = [0.05, 0.4, 0.4, 0.05, 0.30, 0.30, 0.30, 0.30, 0.30, 0.9, 0.9, 0.2]
    first = [0.05, *[0.9] * 11]
    known = curves(first, last, last, last, [*last[:-1], 0.3])
    known[4, 400][name(5)]["converged"] = False  # type: ignore[index]
    findings = found(first, last, last, last, [*last[:-1], 0.3], curves=known)
    order = list(Kind)
    assert [finding.kind for finding in findings] == sorted(kinds(findings), key=order.index)
    assert findings[0].kind is Kind.BYPASS
    assert findings[-1].kind is Kind.UNCONVERGED


def test_findings_are_false_less_often_than_one_in_twenty() -> None:
    for world in WORLDS:
        for is_binary in (True, False):
            for counts in false_findings(world, 25, 600, 5, 0.5, is_binary).values():
                assert counts["any"] <= 4


def test_nothing_is_drawn_from_global_generators() -> None:
    before: Tensor = torch.get_rng_state()
    found(per_cent(E3))
    assert torch.equal(torch.get_rng_state(), before)
