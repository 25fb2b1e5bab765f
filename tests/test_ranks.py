"""Several processes: the same probes in all of them, the same numbers as in one, and no waiting for ever."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from asked import ASKED
from lightning.pytorch.strategies import FSDPStrategy
from networks import Classifier, mlp

from lightning_probes import ProbeReport, probe
from lightning_probes.distributed import refuse
from lightning_probes.report.outcomes import Outcomes

pytestmark = pytest.mark.distributed

HERE = Path(__file__).parent
APART = ("fewer_training_batches", "met_again", "sharded", "labelled_sharded", "labelled_writing")
TOGETHER = [case for case in ranks.CASES if case not in APART]

Found = list[dict[str, Any]]
"""What each process found."""


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    return subprocess.Popen(
        [sys.executable, str(HERE / "ranks.py"), *arguments],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> None:
    try:
        output, _ = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 0, output[-4000:]


def run(folder: Path, number: int, *cases: str) -> dict[str, Found]:
    """The cases, one after the other, in so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(number):
        place = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        environment = {name: str(value) for name, value in {**place, **meeting}.items()}
        processes.append(start(str(folder / str(rank)), *cases, **environment))
    for process in processes:
        finish(process)
    found = [torch.load(folder / str(rank), weights_only=True) for rank in range(number)]
    return {case: [one[case] for one in found] for case in cases}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    return run(tmp_path_factory.mktemp("two"), 2, *TOGETHER)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    return run(tmp_path_factory.mktemp("three"), 3, "same", "padded", "labelled")


def values(rows: list[dict[str, Any]], metric: str = "error") -> dict[Any, float]:
    return {
        (row["stage"], row["epoch"], row["step"], row["layer"]): row["value"] for row in rows if row["metric"] == metric
    }


def check_same_everywhere(found: Found) -> None:
    first = found[0]
    for other in found[1:]:
        assert str(other["rows"]) == str(first["rows"])  # NaN equals NaN
        assert other["notes"] == first["notes"]
        assert other["outcomes"] == first["outcomes"]
        assert other["probes"].keys() == first["probes"].keys()
        for name, tensor in other["probes"].items():
            torch.testing.assert_close(tensor, first["probes"][name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", [case for case in TOGETHER if "harmless" not in case])
def test_all_processes_publish_and_save_the_same(case: str, two: dict[str, Found]) -> None:
    check_same_everywhere(two[case])


@pytest.mark.parametrize(
    ("case", "number"), [("same", 2), ("same", 3), ("cross_fitted", 2), ("labelled", 2), ("labelled", 3)]
)
def test_several_processes_find_what_one_finds(
    case: str, number: int, two: dict[str, Found], three: dict[str, Found]
) -> None:
    one, several = ranks.CASES[case](), {2: two, 3: three}[number][case][0]
    for name, weight in one["weights"].items():  # or nothing could be the same
        torch.testing.assert_close(several["weights"][name], weight, rtol=1e-5, atol=1e-6)
    assert values(several["rows"]) == values(one["rows"])
    for key, value in values(one["rows"], "cross_entropy").items():
        # Five solutions for each layer stop at the solver's tolerance, wherever rounding has led them.
        off = 1e-5 if case == "same" else 5e-3
        assert values(several["rows"], "cross_entropy")[key] == pytest.approx(value, abs=off)
    assert several["baseline"] == one["baseline"]
    assert [(row["labels"], row["l2"]) for row in several["rows"]] == [
        (row["labels"], row["l2"]) for row in one["rows"]
    ]
    held_out = len(ranks.labelled_set()[1].dataset) if case == "labelled" else ranks.HELD_OUT  # type: ignore[arg-type]
    assert {row["samples"] for row in several["rows"] if row["stage"] == "val"} == {held_out}


@pytest.mark.parametrize("case", ASKED)
def test_several_processes_find_what_one_finds_whatever_is_asked(case: str, two: dict[str, Found]) -> None:
    one, several = ranks.CASES[case](), two[case][0]
    assert several["baseline"] == pytest.approx(one["baseline"])
    for row, other in zip(one["rows"], several["rows"], strict=True):
        if row["metric"] == "error":
            # A sample at the edge of a decision may be on its other side; numbers have no edge.
            off = 2e-3 if case == "regression" else 1.01 / row["samples"]
            assert other["value"] == pytest.approx(row["value"], abs=off), row
            assert (other["samples"], other["labels"], other["l2"]) == (row["samples"], row["labels"], row["l2"])
    assert [saved["units"] for saved in several["outcomes"]] == [saved["units"] for saved in one["outcomes"]]
    for alone, together in zip(one["outcomes"], several["outcomes"], strict=True):
        mine, theirs = Outcomes.unpacked(alone), Outcomes.unpacked(together)
        assert mine.layers == theirs.layers
        assert (mine.weights.sort().values == theirs.weights.sort().values).all()
        # Process after process, in the order of the sampler; each loss is that of one process.
        order = torch.cat([torch.arange(len(mine.weights))[rank::2] for rank in range(2)])
        differ = (mine.losses[:, order] - theirs.losses).abs() > 2e-3 * (1 + mine.losses[:, order])
        assert (differ.sum(dim=1) <= 1).all()
    assert len({saved["samples"] for saved in several["outcomes"]}) == 1


def test_metrics_are_those_of_the_samples_of_all_processes(two: dict[str, Found]) -> None:
    one, several = ranks.metrics(), two["metrics"][0]
    names = {row["metric"] for row in one["rows"]} - {"error", "cross_entropy", "lag"}
    assert len(names) == 4 + 10
    for name in names:
        for dataloader, samples in ((0, ranks.HELD_OUT), (1, 24)):
            found, expected = (
                {
                    (row["epoch"], row["layer"], row["samples"]): row["value"]
                    for row in run["rows"]
                    if row["metric"] == name and row["dataloader"] == dataloader and row["layer"] != "side"
                }
                for run in (several, one)
            )
            assert {key[2] for key in expected} == {samples}
            # Probabilities differ in their last places, and so do the bins of the calibration error.
            off = 5e-3 if name == "CalibrationError" else 1e-6
            assert found == pytest.approx(expected, abs=off, nan_ok=True)
    of_side = [row for row in several["rows"] if row["layer"] == "side" and row["metric"] in names]
    assert {row["samples"] for row in of_side} == {ranks.HELD_OUT // 2}
    assert all(math.isfinite(row["value"]) for row in of_side)


@pytest.mark.parametrize("case", ["harmless", "labelled_harmless"])
def test_training_together_is_bit_identical_with_and_without_the_callback(case: str, two: dict[str, Found]) -> None:
    for found in two[case]:
        assert found["with"].keys() == found["without"].keys()
        for name, value in found["with"].items():
            assert torch.equal(value, found["without"][name]), name


@pytest.mark.parametrize("number", [2, 3])
def test_samples_that_a_sampler_repeats_count_once(number: int, two: dict[str, Found], three: dict[str, Found]) -> None:
    rows = {2: two, 3: three}[number]["padded"][0]["rows"]
    assert {row["samples"] for row in rows if row["stage"] == "val"} == {ranks.HELD_OUT}
    assert {row["samples"] for row in rows if row["stage"] == "test"} == {ranks.HELD_OUT}
    # What a sampler repeats is neither used nor left out.
    counts = [row["labels"] for row in rows if row["stage"] != "train"]
    assert counts == [{"used": ranks.HELD_OUT, "left_out": 0, "unusable": 0}] * len(counts)


def test_online_probes_are_published_as_the_mean_of_all_processes(two: dict[str, Found]) -> None:
    rows = two["online"][0]["rows"]
    assert {row["fitted_on"]["data"] for row in rows} == {"online"}
    found = values(rows)
    assert all(0 <= value <= 1 for value in found.values())
    # In the first epoch the last layers' probes have seen little more than nothing.
    assert max(value for key, value in found.items() if key[1] == 2) < 0.85


def test_a_layer_that_runs_in_one_process_is_probed_on_the_samples_of_that_one(two: dict[str, Found]) -> None:
    rows = [row for row in two["one_sided"][0]["rows"] if row["stage"] == "val"]
    assert {row["samples"] for row in rows if row["layer"] == "side"} == {ranks.HELD_OUT // 2}
    assert {row["samples"] for row in rows if row["layer"] != "side"} == {ranks.HELD_OUT}
    assert all(math.isfinite(row["value"]) for row in rows)


def test_a_layer_that_is_not_finite_in_one_process_is_set_aside_in_all(two: dict[str, Found]) -> None:
    found = values(two["not_finite"][1]["rows"])
    last = {key: value for key, value in found.items() if key[1] == 2}
    assert {key[3] for key, value in last.items() if math.isnan(value)} == {"side"}
    assert all(math.isfinite(value) for key, value in found.items() if key[1] < 2)


def test_what_one_process_cannot_run_again_is_cross_fitted_in_all(two: dict[str, Found]) -> None:
    found = two["raising"][0]
    assert {row["fitted_on"]["data"] for row in found["rows"]} == {"val, cross-fitted"}
    assert any("process 1: " in note and "not a second time" in note for note in found["notes"])


def test_a_process_without_a_batch_of_validation_keeps_nobody_waiting(two: dict[str, Found]) -> None:
    rows = two["no_validation_batch"][1]["rows"]
    assert {row["samples"] for row in rows if row["stage"] == "val"} == {24}
    assert {row["fitted_on"]["samples"] for row in rows} == {64}


def test_batches_that_run_out_in_one_process_cost_the_probes_and_not_the_run(tmp_path: Path) -> None:
    # Lightning tells the processes of a signal in each step: they cannot wait for one another at an epoch's end.
    for found in run(tmp_path, 2, "fewer_training_batches")["fewer_training_batches"]:
        after = [value for key, value in values(found["rows"]).items() if key[1] == 2]
        assert after
        assert all(math.isnan(value) for value in after)
        assert any("went on without the others: " in note for note in found["notes"])


def test_a_process_that_was_alone_in_one_run_is_not_in_the_next(tmp_path: Path) -> None:
    found = run(tmp_path, 2, "met_again")["met_again"]
    for rank, one in enumerate(found):
        assert any(f"process {rank} went on without the others: " in note for note in one["first"]["notes"])
        assert all(math.isnan(value) for value in values(one["first"]["rows"]).values())
    check_same_everywhere(found)
    assert not any("without the others" in note for note in found[0]["notes"])
    assert {row["samples"] for row in found[0]["rows"] if row["stage"] == "val"} == {ranks.HELD_OUT}
    assert values(found[0]["rows"]) == values(ranks.same()["rows"])


def test_a_process_can_evaluate_alone_after_training_together(two: dict[str, Found]) -> None:
    known = two["scored_alone"][0]
    together = {key[3]: value for key, value in values(known["rows"]).items() if key[:2] == ("val", 2)}
    assert known["alone"] == pytest.approx(together["input"], abs=1e-6)  # loggers get float32


def test_a_layer_of_other_widths_in_other_processes_is_left_out(two: dict[str, Found]) -> None:
    found = two["other_widths"][0]
    assert "left out: side (of other widths in other processes)" in found["notes"]
    assert "side" not in {row["layer"] for row in found["rows"]}
    assert all(math.isfinite(value) for value in values(found["rows"]).values())


def test_several_processes_resume_with_the_curves_of_the_run_that_was_never_stopped(two: dict[str, Found]) -> None:
    for found in two["resumed"]:
        assert found["rows"] == found["expected"]["rows"]
        for name, tensor in found["expected"]["probes"].items():
            assert torch.equal(found["probes"][name], tensor), name


def test_the_first_process_alone_saves_the_report(two: dict[str, Found]) -> None:
    assert [one["files"] for one in two["kept"]] == [["probe_report.html", "probe_report.json"], []]


def test_sharded_weights_are_cross_fitted(tmp_path: Path) -> None:
    found = run(tmp_path, 2, "sharded")["sharded"]
    check_same_everywhere(found)
    assert {row["fitted_on"]["data"] for row in found[0]["rows"]} == {"val, cross-fitted"}
    assert {row["samples"] for row in found[0]["rows"]} == {ranks.HELD_OUT}
    assert all(math.isfinite(value) for value in values(found[0]["rows"]).values())


def check_probed(rows: list[dict[str, Any]], weights: dict[str, torch.Tensor]) -> None:
    """As probe() does it on the same weights, by itself."""
    model = Classifier(mlp(inputs=16, width=12, depth=2))
    model.load_state_dict(weights)
    last = max(row["epoch"] for row in rows)
    for row in probe(model, *ranks.labelled_set(), layers="net.*").select(metric="error"):
        same = {key: row[key] for key in ("layer", "stage", "metric", "samples", "labels")}
        (own,) = (one for one in rows if one["epoch"] == last and same.items() <= one.items())
        assert own["value"] == pytest.approx(row["value"], abs=0.003)


def test_errors_on_a_labelled_set_are_those_of_probe_on_the_same_weights(two: dict[str, Found]) -> None:
    found = two["labelled"][0]
    check_probed(found["rows"], found["weights"])
    assert {row["fitted_on"]["samples"] for row in found["rows"]} == {131}


def test_a_set_that_fails_in_one_process_is_given_up_in_all(two: dict[str, Found]) -> None:
    for found in two["labelled_failing"]:
        after = [value for key, value in values(found["rows"]).items() if key[:2] == ("val", 2)]
        assert after
        assert all(math.isnan(value) for value in after)
        assert any("the disk is gone" in note for note in found["notes"])
        # All of them know, so that none waits for another.
        assert not any("without the others" in note for note in found["notes"])


def test_sharded_weights_are_probed_on_a_labelled_set(tmp_path: Path) -> None:
    found = run(tmp_path, 2, "labelled_sharded")["labelled_sharded"]
    check_same_everywhere(found)
    assert {(row["fitted_on"]["data"], row["fitted_on"]["samples"]) for row in found[0]["rows"]} == {("data", 131)}
    assert {row["epoch"] for row in found[0]["rows"]} == {0, 1, 2, 3}
    assert found[0]["notes"] == []
    check_probed(found[0]["rows"], found[0]["with"]["weights"])
    for one in found:
        for name, weight in one["without"]["weights"].items():
            assert torch.equal(one["with"]["weights"][name], weight), name
        assert torch.equal(one["with"]["random"], one["without"]["random"])


def test_sharded_weights_that_forward_writes_to_are_restored_and_probed_no_more(tmp_path: Path) -> None:
    found = run(tmp_path, 2, "labelled_writing")["labelled_writing"]
    for one in found:
        assert one["gain"] == 1
        found_out = values(one["rows"])
        assert all(math.isfinite(value) == (key[1] < 2) for key, value in found_out.items() if key[0] == "val")
        assert any("writes to 'gain' in forward" in note and "at epoch 2" in note for note in one["notes"])


def test_the_callback_travels_to_processes_that_are_spawned(tmp_path: Path) -> None:
    finish(start(str(tmp_path / "report.json"), "spawned"))
    report = ProbeReport.load(tmp_path / "report.json")
    assert {row["samples"] for row in report.select(stage="val")} == {ranks.HELD_OUT}


@pytest.mark.parametrize("strategy", [FSDPStrategy(), type("DeepSpeedStrategy", (), {})()])
def test_strategies_that_hide_the_weights_are_refused(strategy: Any) -> None:
    with pytest.raises(ValueError, match=f"^strategy: .*{type(strategy).__name__}; expected ddp"):
        refuse(strategy)
