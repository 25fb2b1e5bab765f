"""The callback out of a configuration file and from the command line."""

from __future__ import annotations

import csv
import inspect
import os
import re
import runpy
import subprocess
import sys
from argparse import ArgumentError
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningCLI
from omegaconf import OmegaConf

from lightning_probes import LinearProbeCallback, probe
from lightning_probes.options import Option, Reading, checked, takes_reading, whole
from lightning_probes.replay.reservoir import Budget
from lightning_probes.tasks.classification import Classification
from lightning_probes.tasks.multilabel import Multilabel
from lightning_probes.tasks.regression import Regression

CLI = Path(__file__).parent.parent / "examples" / "cli"
README = Path(__file__).parent.parent / "README.md"
CLASS = "lightning_probes.LinearProbeCallback"
ARGUMENTS = inspect.signature(LinearProbeCallback).parameters
SHORT = [
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=3",
    "--trainer.limit_val_batches=1",
    "--trainer.log_every_n_steps=1",
    "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
    "--trainer.logger.save_dir=.",
]


def build(*arguments: str) -> LinearProbeCallback:
    """What the program of the example makes of these arguments."""
    program = runpy.run_path(str(CLI / "main.py"))
    cli = LightningCLI(
        program["Perceptron"],
        program["Digits"],
        args=["--config", str(CLI / "config.yaml"), *arguments],
        run=False,
        save_config_callback=None,
    )
    callbacks: list[Any] = cli.trainer.callbacks  # type: ignore[attr-defined]
    (probes,) = (callback for callback in callbacks if isinstance(callback, LinearProbeCallback))
    return probes


@pytest.mark.slow
def test_example_trains_as_the_file_and_the_command_line_say(tmp_path: Path) -> None:
    command = [sys.executable, str(CLI / "main.py"), "fit", "--config", str(CLI / "config.yaml"), *SHORT]
    run = subprocess.run(
        [*command, "--trainer.callbacks.exclude=[net.0, net.4]"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        names = {name for name in csv.DictReader(file).fieldnames or [] if "probe_" in name}
    # Of the file: `layers: ["net.*", Linear]`, `log_metrics: [cross_entropy]`.
    assert names == {
        f"probe_{metric}_{stage}/{layer}"
        for metric in ("error", "cross_entropy")
        for stage in ("train", "val")
        for layer in ("input", "net.1", "net.2", "net.3", "net.5", "net.6")
    } | {"probe_best_error_val"}


def test_command_line_replaces_one_argument_and_keeps_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    network = build("--trainer.callbacks.layers=Linear", "--trainer.callbacks.max_features=64")._network
    assert network._patterns == ["Linear"]
    assert network.reducer.max_features == 64
    assert network._exclude == ["net.1"]
    assert network._reading["num_classes"] == 10


def test_command_line_adds_an_entry_to_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert build("--trainer.callbacks.layers+=net.1")._network._patterns == ["net.*", "Linear", "net.1"]


def test_help_shows_every_argument_with_its_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        build(f"--trainer.callbacks.help={CLASS}")
    assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    documented = inspect.getdoc(LinearProbeCallback) or ""
    section = documented.split("Args:\n")[1].split("\n\n")[0]
    # Of lists it shows `--x X, --x+ X`.
    shown = re.sub(r"(--[\w.]+ [A-Z_]+), --[\w.]+\+ [A-Z_]+", r"\1", shown)
    texts = dict(re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, flags=re.MULTILINE))
    assert list(texts) == list(ARGUMENTS)
    for name, text in texts.items():
        said = " ".join(text.split())
        value = rf"(?:{name.upper()}|\{{(?:\w+,)+\w+\}})"
        assert re.search(rf"--trainer\.callbacks\.{name} {value} {re.escape(said)} \(type: ", shown), name


def test_the_readme_has_a_line_for_each_argument() -> None:
    table = README.read_text().split("## All arguments")[1].split("\n## ")[0]
    lines = [line.split("|")[1:4] for line in table.splitlines() if line.startswith("| `")]
    written = {name: shared.strip() == "yes" for names, shared, _ in lines for name in re.findall(r"`(\w+)`", names)}
    both = inspect.signature(probe).parameters
    assert written == {name: name in both for name in ARGUMENTS}


def from_yaml(init_args: Any) -> LinearProbeCallback:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LinearProbeCallback, "probes")
    config = parser.parse_object({"probes": {"class_path": CLASS, "init_args": init_args}})
    return parser.instantiate_classes(config).probes  # type: ignore[no-any-return]


EVERYTHING = """
layers: ["encoder.*", Linear]
exclude: [encoder.0, Dropout]
num_classes: 7
input: pixels
target: labels
task: classification
positions: null
max_features: 256
reduction: subset
layout:
  "encoder.*": channels
  input: tokens
calls: mean
tokens: {"encoder.*": first, input: last}
token_mask: {"encoder.*": mask, input: 2}
metrics: [Accuracy, MulticlassF1Score]
data: null
name: digit
learning_rate: 1.0e-2
fit_samples: 1000
fit_bytes: 2000000
fit_on_device: true
every_n_epochs: 3
strict: false
log_metrics: [cross_entropy]
findings: true
"""


def test_every_argument_can_be_written_in_yaml() -> None:
    written = yaml.safe_load(EVERYTHING)
    assert list(written) == list(ARGUMENTS)
    probes = from_yaml(written)
    network = probes._network
    assert network._patterns == written["layers"]
    assert network._exclude == written["exclude"]
    assert network._reading["num_classes"] == 7
    assert network._reading["input"] == "pixels"
    assert network.labels._places == {"": "labels"}
    assert (network.question, network.labels.most_positions) == (Classification(7), None)
    assert (network.reducer.kind, network.reducer.max_features) == ("subset", 256)
    assert probes.state_key == LinearProbeCallback(name="digit").state_key
    assert network._reading["layout"] == written["layout"]
    assert network.recorder._calls == "mean"
    assert network._reading["tokens"] == {"encoder.*": "first", "input": "last"}
    assert network.mask_reader._token_mask == {"encoder.*": "mask", "input": 2}
    assert list(network.metrics) == written["metrics"]
    assert probes._new_session().refit.budget == Budget(1000, 2_000_000, on_device=True)
    assert (probes._learning_rate, probes._schedule._every_n_epochs) == (0.01, 3)
    assert from_yaml({"every_n_epochs": "auto"})._schedule._every_n_epochs is None
    assert (probes._is_strict, probes._has_findings) == (False, True)
    assert probes._logs.metrics == ["error", "cross_entropy"]


def of_network(probes: LinearProbeCallback, attribute: str) -> Any:
    """What became of an argument."""
    if attribute.startswith("_reading."):
        return probes._network._reading[attribute.removeprefix("_reading.")]  # type: ignore[literal-required]
    return attrgetter(attribute)(probes._network)


@pytest.mark.parametrize(
    ("init_args", "attribute", "expected"),
    [
        ("{}", "_patterns", None),
        ("layers: Linear", "_patterns", ["Linear"]),
        ("layers: null", "_patterns", None),
        ("exclude: Dropout", "_exclude", ["Dropout"]),
        ("input: null", "_reading.input", None),
        ("input: 2", "_reading.input", 2),
        ("target: 2", "labels._places", {"": 2}),
        ("target: -1", "labels._places", {"": -1}),
        ("target: operator.length_hint", "labels._places", {"": __import__("operator").length_hint}),
        ("num_classes: null", "_reading.num_classes", None),
        ("task: regression", "question", Regression()),
        ("task: multilabel", "question", Multilabel()),
        ("positions: 8", "labels.most_positions", 8),
        ("{}", "_reading.tokens", "mean"),
        ("tokens: last", "_reading.tokens", "last"),
        ("tokens: {'*.1': first}", "_reading.tokens", {"*.1": "first"}),
        ("{}", "mask_reader._token_mask", "attention_mask"),
        ("token_mask: null", "mask_reader._token_mask", None),
        ("token_mask: 2", "mask_reader._token_mask", 2),
        ("token_mask: {'*.1': operator.index}", "mask_reader._token_mask", {"*.1": __import__("operator").index}),
        ("token_mask: operator.length_hint", "mask_reader._token_mask", __import__("operator").length_hint),
    ],
)
def test_argument_in_yaml_means_what_it_means_in_python(init_args: str, attribute: str, expected: Any) -> None:
    assert of_network(from_yaml(yaml.safe_load(init_args)), attribute) == expected


@pytest.mark.parametrize(
    ("init_args", "argument"),
    [
        ("layers: 3", "layers"),
        ("num_classes: many", "num_classes"),
        ("max_features: 2.5", "max_features"),
        ("fit_samples: many", "fit_samples"),
        ("every_n_epochs: 0", "every_n_epochs"),
        ("every_n_epochs: often", "every_n_epochs"),
        ("layout: {input: rows}", "layout"),
        ("calls: second", "calls"),
        ("reduction: mean", "reduction"),
        ("tokens: cls", "tokens"),
        ("tokens: {net: cls}", "tokens"),
        ("tokens: null", "tokens"),
        ("token_mask: 2.5", "token_mask"),
        ("token_mask: {net: 2.5}", "token_mask"),
        ("metrics: Accuracy", "metrics"),
        ("metrics: [Acuracy]", "metrics"),
        ("log_metrics: cross_entropy", "log_metrics"),
        ("layer: net.0", "layer"),
    ],
)
def test_mistake_in_yaml_is_refused_by_name(init_args: str, argument: str) -> None:
    # The message ends with all that was given: it names the argument somewhere, whatever was wrong.
    named = rf'Parser key "{argument}"|Option .{argument}. is not accepted|{argument}: (expected|torchmetrics has no)'
    with pytest.raises((ArgumentError, ValueError), match=named):
        from_yaml(yaml.safe_load(init_args))


def test_lists_and_mappings_of_omegaconf_are_accepted() -> None:
    written = OmegaConf.create(EVERYTHING)
    probes, plain = LinearProbeCallback(**written), from_yaml(yaml.safe_load(EVERYTHING))  # type: ignore[arg-type]
    for attribute in (
        "_patterns",
        "_exclude",
        "_reading.layout",
        "_reading.num_classes",
        "_reading.input",
        "labels._places",
        "_reading.tokens",
        "mask_reader._token_mask",
    ):
        found, expected = of_network(probes, attribute), of_network(plain, attribute)
        assert found == expected
        assert type(found) is type(expected)
    assert probes._logs.metrics == plain._logs.metrics


# One entry for all


def options_of(taker: Any) -> dict[str, tuple[Any, Any]]:
    return {name: (p.default, p.annotation) for name, p in inspect.signature(taker).parameters.items()}


def test_an_entry_of_the_options_reaches_callback_probe_and_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = list(Reading.__annotations__)
    assert shared[0] == "num_classes"
    assert shared[-1] == "metrics"
    callback, function = options_of(LinearProbeCallback), options_of(probe)
    for name in shared:
        assert callback[name] == function[name]
        for doc in (LinearProbeCallback.__doc__, probe.__doc__):
            assert re.search(rf"^ {{4,8}}{name}: \S", doc or "", re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    # The command line takes what the callback was given.
    token_mask = "--trainer.callbacks.token_mask={net.1: words, net.3: 2}"
    tokens = "--trainer.callbacks.tokens={net.1: first}"
    others = "--trainer.callbacks.layout={net.1: tokens}", "--trainer.callbacks.calls=mean"
    given = build(*others, tokens, token_mask).selection
    assert given["tokens"] == {"net.1": "first"}
    assert build("--trainer.callbacks.tokens=last").selection["tokens"] == "last"
    assert given["token_mask"] == {"net.1": "words", "net.3": 2}
    assert given["layout"] == {"net.1": "tokens"}
    assert given["calls"] == "mean"


def test_a_new_entry_is_all_that_a_new_option_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    class More(Reading, total=False):
        pace: Annotated[int, Option(3, whole, "how fast probes are read.")]

    monkeypatch.setattr("lightning_probes.options.Reading", More)

    @takes_reading
    def taker(layers: str | None = None, *, name: str = "", **reading: Any) -> Any:
        """Take options.

        Args:
            layers: some.
            {reading}
            name: a name.
        """
        return checked(reading, "taker")

    assert list(inspect.signature(taker).parameters)[-2:] == ["pace", "name"]
    assert "        pace: how fast probes are read.\n" in (taker.__doc__ or "")
    assert taker()["pace"] == 3
    assert taker(pace=5)["pace"] == 5
    with pytest.raises(ValueError, match="pace: expected a positive integer, found 0"):
        taker(pace=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"token_masks": 1}, "LinearProbeCallback has no argument 'token_masks'; nearest: token_mask"),
        ({"targets": "y"}, "LinearProbeCallback has no argument 'targets'; nearest: target"),
        ({"layer": "net.*"}, "LinearProbeCallback has no argument 'layer'; nearest: layers"),
        ({"fit_sample": 3}, "LinearProbeCallback has no argument 'fit_sample'; nearest: fit_samples"),
    ],
)
def test_an_argument_that_does_not_exist_is_told_with_the_nearest(given: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        LinearProbeCallback(**given)
