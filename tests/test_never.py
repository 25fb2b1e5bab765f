"""A fault of the probes' own never ends a training run: it costs the layers that it concerns, and one warning."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from asked import ASKED
from faults import EPOCHS, ONE, SETTINGS, Arming, Fault, Memory, Run, probes_of, run, undisturbed, without

from lightning_probes import ProbeReport
from lightning_probes.loggers import Logs
from lightning_probes.network.hooks import ActivationRecorder
from lightning_probes.probes import fit
from lightning_probes.probes.dataset import LayerSamples
from lightning_probes.probes.heads import StackedProbes
from lightning_probes.probes.online import OnlineProbes
from lightning_probes.replay.recorder import CallRecorder
from lightning_probes.replay.replayer import Replay
from lightning_probes.replay.reservoir import Reservoir
from lightning_probes.report.curves import Curves
from lightning_probes.tasks.classification import Classification
from lightning_probes.training.refit import Refit


def is_one(recorder: Any, layer: str, *args: Any, **kwargs: Any) -> bool:
    return layer == ONE


def is_input(recorder: Any, layer: str, *args: Any, **kwargs: Any) -> bool:
    return layer == "input"


def is_fit_of_one(task: Any, samples: LayerSamples, *args: Any, **kwargs: Any) -> bool:
    return samples.layer == ONE


def is_in_training(*args: Any, **kwargs: Any) -> bool:
    return torch.is_grad_enabled()


def is_in_validation(*args: Any, **kwargs: Any) -> bool:
    return not torch.is_grad_enabled()


EVERYWHERE = ["convolutions", "MLP without validation", "MLP, online", "convolutions without validation, online"]
CONVERGED, MIXED, CROSSED = EVERYWHERE[:2], EVERYWHERE[1:3], ["MLP, cross-fitted"]
OTHERS = [name for name in ASKED if name != "classification"]
BOTH, ONCE, ALWAYS = [False, True], [False], [True]


class Case(NamedTuple):
    """What raises, in which settings, once or always (or both), and what it costs."""

    owner: Any
    attribute: str
    settings: list[str]
    often: list[bool] = BOTH
    concerns: Callable[..., bool] = lambda *args, **kwargs: True
    layer: str | None = None  # all


NAN = {
    "the activation of one": Case(ActivationRecorder, "record", [*EVERYWHERE, *CROSSED], BOTH, is_one, ONE),
    "the input": Case(ActivationRecorder, "record", EVERYWHERE, BOTH, is_input, "input"),
    "the fit of one": Case(fit, "fit_samples", CONVERGED, BOTH, is_fit_of_one, ONE),
    "the fit of one, whatever is asked": Case(fit, "fit_samples", OTHERS, ALWAYS, is_fit_of_one, ONE),
    "scoring, whatever is asked": Case(StackedProbes, "score", OTHERS, ALWAYS),
    "the cross-fit of one": Case(fit, "fit_samples", CROSSED, BOTH, is_fit_of_one, ONE),
    "all activations": Case(ActivationRecorder, "record", MIXED, ALWAYS),
    "all fits": Case(LayerSamples, "fingerprint", CONVERGED, ALWAYS),
    "all cross-fits": Case(fit, "fit_samples", CROSSED, ALWAYS),
    "features to cross-fit": Case(Refit, "_keep", CROSSED),
    "the update": Case(OnlineProbes, "update", EVERYWHERE),
    "counting classes in training": Case(Classification, "target_sums", MIXED, ONCE, is_in_training),
    "counting classes in validation": Case(Classification, "target_sums", ["convolutions"], ONCE, is_in_validation),
    "scoring": Case(StackedProbes, "score", [*CONVERGED, "MLP, online"]),
    "the end of recording": Case(CallRecorder, "stop", CONVERGED),
    "choosing batches": Case(Reservoir, "wants", CONVERGED, ONCE),
    "keeping batches": Case(Reservoir, "add", CONVERGED),
    "adding scores": Case(Curves, "add", MIXED, ONCE),
    "summing up scores": Case(Curves, "_summed", EVERYWHERE),
}
WITHOUT_ROWS = {
    "entering rows": Case(ProbeReport, "enter", MIXED),
    "publishing": Case(Curves, "publish", MIXED),
    "adding scores for good": Case(Curves, "add", MIXED, ALWAYS),
}
ANOTHER_WAY = {
    "running batches again": Case(Replay, "run", CONVERGED),
    "hooks for recording": Case(CallRecorder, "start", CONVERGED),
}
FEWER_BATCHES = {
    "the beginning of a call": Case(CallRecorder, "_enter", CONVERGED),
    "the end of a call": Case(CallRecorder, "_leave", CONVERGED),
    "labels": Case(Classification, "encode", MIXED, ONCE),
}
LOGGING = {"logging": Case(Logs, "_write", MIXED)}


def each(cases: dict[str, Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("case", "name", "is_lasting"),
        [
            pytest.param(case, name, lasts, id=f"{fault}, {'always' if lasts else 'once'}, {name}")
            for fault, case in cases.items()
            for name in case.settings
            for lasts in case.often
        ],
    )


@pytest.fixture
def disturbed(case: Case, name: str, is_lasting: bool, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run with a fault, whose training is what it is without the callback."""
    assert undisturbed(name).report.rows
    fault = Fault(case.concerns, is_lasting)
    monkeypatch.setattr(case.owner, case.attribute, fault.put_before(getattr(case.owner, case.attribute)))
    found = run(name, probes_of(name), Arming(fault))
    assert fault.raised
    check_that_training_is_the_same(found, name)
    return found


def check_that_training_is_the_same(found: Run, name: str) -> None:
    expected = without(name)
    assert found.steps == expected.steps == 4 * EPOCHS
    assert found.logged == expected.logged
    assert found.hooks == 0
    assert all(torch.equal(found.weights[key], tensor) for key, tensor in expected.weights.items())


def new_warnings(found: Run, name: str) -> list[str]:
    return [text for text in found.warnings if text not in undisturbed(name).warnings]


def values(found: Run) -> dict[tuple[Any, ...], float]:
    keys = ("layer", "stage", "epoch", "metric", "target")
    # The lag needs both probes: of a layer that one of them has lost there may be none.
    return {tuple(row.get(key) for key in keys): row["value"] for row in found.report.rows if row["metric"] != "lag"}


@each(NAN | WITHOUT_ROWS)
def test_fault_costs_the_values_of_its_layers_from_then_on_and_one_warning(
    case: Case, name: str, is_lasting: bool, disturbed: Run
) -> None:
    expected = values(undisturbed(name))
    layers = {case.layer} if case.layer else {layer for layer, *_ in expected}
    (warning,) = new_warnings(disturbed, name)
    assert "RuntimeError: injected: " in warning
    named = warning.removesuffix("; their values are NaN from now on").split("injected: ")[1].split(", ")
    assert sorted(named) == sorted(map(repr, layers))
    after = {key: math.nan if key[0] in layers and key[2] > 1 else value for key, value in expected.items()}
    if case in WITHOUT_ROWS.values():
        after = {key: value for key, value in after.items() if key[2] < 2 or (key[2] > 2 and not is_lasting)}
    # Fewer layers side by side in one product are rounded in another way.
    assert values(disturbed) == pytest.approx(after, abs=1e-5, nan_ok=True)


@each(ANOTHER_WAY | FEWER_BATCHES)
def test_fault_of_what_can_be_had_in_another_way_costs_no_value(
    case: Case, name: str, is_lasting: bool, disturbed: Run
) -> None:
    said = new_warnings(disturbed, name)
    data = {row["fitted_on"]["data"] for row in disturbed.report.rows if row["epoch"] > 1}
    if case in FEWER_BATCHES.values():
        assert said == []
        told = [
            note for note in disturbed.report.notes if "labels cannot be used are passed over (the first: inj" in note
        ]
        assert len(told) == (case.attribute == "encode")
        assert data == {row["fitted_on"]["data"] for row in undisturbed(name).report.rows}
    else:
        assert len(said) == 1
        assert re.search(r"training cannot be run again \(.*injected\): the probes are ", said[0])
        assert data == {"val, cross-fitted" if SETTINGS[name].validates else "online"}
    assert values(disturbed).keys() == values(undisturbed(name)).keys()
    assert all(math.isfinite(value) for value in values(disturbed).values())


@each(LOGGING)
def test_fault_of_logging_costs_what_would_have_been_logged(
    case: Case, name: str, is_lasting: bool, disturbed: Run
) -> None:
    assert new_warnings(disturbed, name) == [
        "LinearProbeCallback: logging raised RuntimeError: injected; everything is in the report"
    ]
    assert disturbed.report == undisturbed(name).report


class Refusing(Memory):
    """Takes no values of the network as it was found."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if step == 0 and any("probe_" in name for name in metrics):
            raise RuntimeError("refused")
        super().log_metrics(metrics, step)


@pytest.mark.parametrize("name", CONVERGED)
def test_logger_that_refuses_the_starting_point_gets_the_later_ones(name: str) -> None:
    logger = Refusing()
    found = run(name, probes_of(name), logger=logger)
    check_that_training_is_the_same(found, name)
    assert new_warnings(found, name) == [
        "LinearProbeCallback: logging raised RuntimeError: refused; everything is in the report"
    ]
    assert sum(f"probe_error_train/{ONE}" in seen for _, seen in logger.seen) == EPOCHS
    assert found.report == undisturbed(name).report
