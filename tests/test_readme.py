"""What the README shows runs, and what it names exists."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import yaml  # type: ignore[import-untyped]
from networks import Classifier, loader, mlp

import lightning_probes
from lightning_probes import LinearProbeCallback

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_every_python_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(mpl.rcParams, "backend", "agg")
    names: dict[str, Any] = {
        "model": Classifier(mlp()),
        "train_loader": loader(),
        "val_loader": loader(32, seed=1),
        "other_loader": loader(32, seed=2),
    }
    assert len(blocks("python")) >= 3
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert {row["stage"] for row in names["probes"].report.rows} == {"train", "val"}
    assert (tmp_path / "error_by_depth.png").stat().st_size > 0


def test_every_yaml_block_configures_the_callback() -> None:
    assert blocks("yaml")
    for block in blocks("yaml"):
        for callback in yaml.safe_load(block)["trainer"]["callbacks"]:
            package, name = callback["class_path"].rsplit(".", 1)
            assert package == "lightning_probes"
            assert isinstance(getattr(lightning_probes, name)(**callback["init_args"]), LinearProbeCallback)


def test_every_path_that_is_named_exists() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    tops = "|".join(["examples", "tests", "lightning_probes", r"\.github", r"\.ci"])
    written = re.findall(rf"(?<![\w/.-])(?:{tops})/[\w./-]*\w/?", README)
    assert len(links) >= 3
    assert len(written) >= 5
    assert [path for path in {*links, *written} if not (ROOT / path).exists()] == []


def test_every_logged_name_and_argument_is_documented() -> None:
    for stage in ("train", "val", "test"):
        assert f"`probe_error_{stage}/{{layer}}`" in README
    assert "`probe_cross_entropy_{stage}/{layer}`" in README


def test_nothing_is_left_to_be_filled_in() -> None:
    assert re.findall(r"^(?:[A-Z]{4,}|TODO.*|TBD.*)$", README, flags=re.MULTILINE) == []


def test_gate_finds_exactly_two_commands_that_install_the_pinned_versions() -> None:
    gate = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    finding = [line for line in gate if line.startswith(("commands=", "test "))]
    assert len(finding) == 2
    found = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join([*finding, 'echo "$commands"'])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert len(found) == 2
    assert [command in README for command in found] == [True, True]
    for command in found:
        assert "-c tests/constraints.txt -e" in command
    assert found[0].endswith("examples/mnist.py")
    assert found[1].endswith('-m pytest --quiet -n 2 --dist loadfile -m "not slow"')
