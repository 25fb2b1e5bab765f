"""All experiments in one go: real processes, results kept one by one, and the README says what they say."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import common
import pytest
import run_all

PAPER = Path(run_all.__file__).parent

TINY = f"""
import sys, time
sys.path.insert(0, {str(PAPER)!r})
import common
from matplotlib.figure import Figure
about = "A tiny one.\\n\\npython tiny.py\\n\\nIt does\\nlittle.\\n"
args = common.parser(about, "tiny", seeds=1).parse_args()
common.save(args, Figure(), {{}})
common.conclude(args, [common.Claim("It runs.", "yes", str(args.seeds), args.quiet)], time.monotonic(), about)
"""
"""An experiment in little: arguments, figure and claims like all the others'."""

RESULTS: dict[str, Any] = {
    "minutes": 61.6,
    "experiments": {
        "e1": {
            "title": "of one",
            "command": "python examples/paper/one.py",
            "measured": "a processor, 2 CPUs",
            "minutes": 1.3,
            "settings": "Both are tiny. The paper leaves open: the rate, 0.1 here.",
            "claims": [
                {"text": "It falls.", "paper": "8 %", "ours": "9 %", "holds": True, "verdict": "agrees"},
                {
                    "text": "It is |x|.",
                    "paper": "1",
                    "ours": "2\nor 3",
                    "holds": False,
                    "verdict": "differs: a: b",
                },
            ],
        },
        "e3": {
            "title": "of three",
            "command": "python examples/paper/three.py",
            "measured": "another, 4 CPUs",
            "minutes": 10,
            "claims": [{"text": "So.", "paper": "", "ours": "no", "holds": False, "verdict": "does not hold"}],
        },
    },
}

TABLE = r"""Measured, 2 experiments at a time with a thread each, on

- a processor, 2 CPUs (E1)
- another, 4 CPUs (E3)

All together took 62 minutes.

### E1: of one

`python examples/paper/one.py` (1.3 minutes)

Both are tiny. The paper leaves open: the rate, 0.1 here.

![E1: of one](figures/e1.png)

| claim | the paper | here | verdict |
|---|---|---|---|
| It falls. | 8 % | 9 % | agrees |
| It is \|x\|. | 1 | 2 or 3 | **differs**: a: b |

### E3: of three

`python examples/paper/three.py` (10.0 minutes)

![E3: of three](figures/e3.png)

| claim | the paper | here | verdict |
|---|---|---|---|
| So. | not in the paper | no | **does not hold** |"""


def test_table_is_made_of_the_results_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_text(json.dumps(RESULTS), encoding="utf-8")
    assert run_all.main(["--table", "--results", str(tmp_path / "results.json")]) == 0
    assert capsys.readouterr().out == TABLE + "\n"


@pytest.mark.paper
def test_one_that_fails_does_not_stop_the_others_and_only_what_was_run_changes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "kept" / "results.json"
    path.parent.mkdir()
    path.write_text(json.dumps(RESULTS), encoding="utf-8")
    tiny, broken = tmp_path / "tiny.py", tmp_path / "broken.py"
    tiny.write_text(TINY, encoding="utf-8")
    broken.write_text('raise ValueError("broken on purpose")', encoding="utf-8")
    experiments = [
        run_all.Experiment("e2", str(broken), "of two", data=""),
        run_all.Experiment("e1", str(tiny), "a tiny one", data="", options=("--seeds", "3")),
        run_all.Experiment("e3", str(broken), "of three", data=""),
    ]
    output = tmp_path / "runs"
    # What an earlier run left is not taken for this one's.
    (output / "e2").mkdir(parents=True)
    (output / "e2" / "result.json").write_text("{}", encoding="utf-8")
    places = ["--output", str(output), "--results", str(path)]
    assert run_all.main(["--only", "e1", "e2", *places], experiments) == 1

    results = json.loads(path.read_text(encoding="utf-8"))
    assert list(results["experiments"]) == ["e1", "e3"]
    assert results["experiments"]["e3"] == RESULTS["experiments"]["e3"]
    assert results["minutes"] == RESULTS["minutes"]
    entry = results["experiments"]["e1"]
    assert entry["command"].endswith("tiny.py --seeds 3")
    assert entry["title"] == "a tiny one"
    assert entry["settings"] == "It does little."
    assert "torch" in entry["measured"]
    own = json.loads((output / "e1" / "result.json").read_text(encoding="utf-8"))
    assert {key: entry[key] for key in own} == own
    assert (own["claims"][0]["ours"], own["claims"][0]["holds"]) == ("3", True)
    figure = (path.parent / "figures" / "e1.png").read_bytes()
    assert figure == (output / "e1" / "figure.png").read_bytes()
    assert "It runs." in (output / "e1" / "log.txt").read_text(encoding="utf-8")

    said = capfd.readouterr()
    assert "e2 failed with status 1" in said.err
    assert "ValueError: broken on purpose" in said.err
    assert "e1 starts" in said.out
    assert "e1 ends" in said.out
    assert "e3" not in said.out + said.err


def test_data_goes_to_those_that_take_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: dict[str, list[str]] = {}

    def pretend(command: list[str], **options: Any) -> Any:
        called[Path(command[1]).name] = command[2:]
        assert options["env"]["OMP_NUM_THREADS"] == "1"
        folder = Path(command[-1])
        (folder / "result.json").write_text('{"claims": [], "minutes": 1}', encoding="utf-8")
        (folder / "figure.png").write_bytes(b"")
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr("subprocess.run", pretend)
    places = ["--output", str(tmp_path), "--results", str(tmp_path / "results.json")]
    assert run_all.main(["--mnist", "/some/mnist.npz", "--fashion", "fashion.npz", *places]) == 0
    data = {script: words[words.index("--data") + 1] for script, words in called.items() if "--data" in words}
    mnist = {f"{name}.py" for name in ("e2_convnet", "e3_bridge", "e4_auxiliary", "e5_resnet", "e7_stages", "e8_skips")}
    assert data == dict.fromkeys(mnist, "/some/mnist.npz") | {"e6_inception.py": "fashion.npz"}
    assert "--data" not in called["e1_untrained.py"]
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    # Where the file lies here is nobody's business.
    assert results["experiments"]["e2"]["command"] == "python examples/paper/e2_convnet.py --seeds 3 --data mnist.npz"
    assert list(results["experiments"]) == [f"e{i}" for i in range(1, 9)]
    assert results["minutes"] >= 0


# The two that follow are about what is recorded: `run_all.py` at full size, then its `--table` into the README.


def test_all_experiments_are_recorded_with_their_figures() -> None:
    results = json.loads((PAPER / "results.json").read_text(encoding="utf-8"))
    assert set(results["experiments"]) == {experiment.name for experiment in run_all.EXPERIMENTS}
    for experiment in run_all.EXPERIMENTS:
        assert (PAPER / experiment.script).is_file()
        assert (PAPER / "figures" / f"{experiment.name}.png").stat().st_size > 10_000
        found = results["experiments"][experiment.name]
        assert found["title"] == experiment.title
        words = [f"python examples/paper/{experiment.script}", *experiment.options]
        assert found["command"].startswith(" ".join(words))
        assert found["settings"] == common.settings(importlib.import_module(Path(experiment.script).stem).__doc__)


def test_readme_says_what_the_results_say() -> None:
    readme = (PAPER / "README.md").read_text(encoding="utf-8")
    shown = readme.partition("<!-- results -->\n")[2].partition("\n<!-- end of results -->")[0]
    assert shown.strip() == run_all.table(json.loads((PAPER / "results.json").read_text(encoding="utf-8")))
