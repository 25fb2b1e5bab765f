"""What is said where something cannot be done: what was given, why not, and what to write instead."""

from __future__ import annotations

import ast
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from networks import QUIET, Classifier, images, loader, mlp
from torch import nn

from lightning_probes import LinearProbeCallback, probe
from lightning_probes.activations import ActivationRecorder
from lightning_probes.recording import CallRecorder

ROOT = Path(__file__).parent.parent


def small() -> Classifier:
    seed_everything(3, verbose=False)
    return Classifier(mlp(depth=1))


def make_trainer(*callbacks: Any, **options: Any) -> Trainer:
    return Trainer(**{"max_epochs": 1, **QUIET, "callbacks": list(callbacks), **options})


def points(probes: LinearProbeCallback) -> list[tuple[int, int]]:
    return list(dict.fromkeys((row["epoch"], row["step"]) for row in probes.report.select(stage="val")))


# Arguments


class Data(LightningDataModule):
    pass


KINDS: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "a class": (
        (Classifier, loader(), loader()),
        {},
        "model: expected a LightningModule or another torch module, found the class Classifier; give an instance of it: "
        "Classifier(...)",
    ),
    "a Trainer": (
        (make_trainer(), small(), loader()),
        {},
        "model: expected a LightningModule or another torch module, found a Trainer; it belongs elsewhere: "
        "probe(model, ..., trainer=trainer)",
    ),
    "a path": (
        ("last.ckpt", loader(), loader()),
        {},
        "model: expected a LightningModule or another torch module, found 'last.ckpt'; it belongs elsewhere: "
        "probe(model, ..., ckpt_path=path)",
    ),
    "a list": (
        ([small()], loader(), loader()),
        {},
        "model: expected a LightningModule or another torch module, found a list",
    ),
    "nothing": ((None,), {}, "model: expected a LightningModule or another torch module, found None"),
    "a loader for a model": (
        (loader(), small()),
        {},
        "model: expected a LightningModule or another torch module, found a DataLoader; it belongs elsewhere: "
        "probe(model, train_dataloader, val_dataloader)",
    ),
    "a datamodule for loaders": (
        (small(), Data()),
        {},
        "train_dataloaders: expected a loader or a list of them, found a Data; it belongs elsewhere: "
        "probe(model, datamodule=datamodule)",
    ),
    "a model for loaders": (
        (small(), loader(), small()),
        {},
        "val_dataloaders: expected a loader or a list of them, found a Classifier; the model comes first: "
        "probe(model, train_dataloaders, val_dataloaders)",
    ),
    "a loader for a datamodule": (
        (small(),),
        {"datamodule": [loader(), loader()]},
        "datamodule: expected a LightningDataModule, found a list; loaders are given as train_dataloaders and "
        "val_dataloaders",
    ),
    "the class of a datamodule": (
        (small(),),
        {"datamodule": Data},
        "datamodule: expected a LightningDataModule, found the class Data; give an instance of it: Data(...)",
    ),
    "another package's Trainer": (
        (small(), loader(), loader()),
        {"trainer": pytorch_lightning.Trainer(**QUIET)},
        "trainer: expected a Trainer of lightning.pytorch, found a Trainer",
    ),
    "a model for a Trainer": (
        (small(), loader(), loader()),
        {"trainer": small()},
        "trainer: expected a Trainer of lightning.pytorch, found a Classifier",
    ),
}


@pytest.mark.parametrize("case", KINDS)
def test_argument_of_probe_that_is_of_anothers_kind_is_told_where_it_belongs(case: str) -> None:
    given, named, message = KINDS[case]
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        probe(*given, **named)


def from_yaml(**arguments: Any) -> Any:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(LinearProbeCallback, "probes")
    return parser.instantiate_classes(parser.parse_object({"probes": arguments})).probes


@pytest.mark.parametrize("argument", ["layers", "exclude"])
def test_patterns_are_a_string_or_a_list_by_type_in_yaml_and_when_it_runs(argument: str) -> None:
    given: dict[str, Any] = {argument: ("net.1", "net.3")}
    message = f"^{argument}: expected a pattern or a list of patterns, found \\('net.1', 'net.3'\\); write \\['net.1', 'net.3'\\]$"
    with pytest.raises(TypeError, match=message):
        LinearProbeCallback(**given)
    with pytest.raises(TypeError, match=message):
        probe(small(), loader(), loader(), **given)
    for accepted in ("net.1", ["net.1", "net.3"]):
        assert LinearProbeCallback(**{argument: accepted}).selection[argument] == accepted
        assert from_yaml(**{argument: accepted}).selection[argument] == accepted
    with pytest.raises(ValueError, match="log_metrics: expected a list of some of "):
        LinearProbeCallback(log_metrics=("lag",))  # type: ignore[arg-type]


# Callbacks of one Trainer


@pytest.mark.parametrize("package", [Trainer, pytorch_lightning.Trainer], ids=["lightning", "pytorch_lightning"])
def test_a_trainer_leaves_it_to_the_callbacks_to_refuse_one_another(package: Any) -> None:
    same = LinearProbeCallback()
    for callbacks in ([same, same], [LinearProbeCallback(), LinearProbeCallback()]):
        trainer = package(**QUIET, callbacks=callbacks)
        with pytest.raises(
            ValueError, match=r"^two LinearProbeCallbacks have the name None; give each its own: Linear"
        ):
            callbacks[0].setup(trainer, small(), "fit")
    assert same.state_key == LinearProbeCallback().state_key == "LinearProbeCallback{'name': None}"


# Runs


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluation_alone_names_what_probes_a_trained_network(stage: str) -> None:
    with pytest.warns(
        UserWarning, match=r"nothing to score: .*lightning_probes\.probe\(model, train_dataloaders, val_"
    ):
        getattr(make_trainer(LinearProbeCallback()), stage)(small(), loader(32), verbose=False)


def test_a_second_fit_says_where_it_goes_on_and_one_with_a_new_trainer_has_a_start() -> None:
    trainer, model = make_trainer(probes := LinearProbeCallback()), small()
    trainer.fit(model, loader(), loader(32))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, loader(), loader(32))
    assert points(probes) == [(2, 12)]
    assert probes.report.notes == [
        "no starting point: this fit goes on at epoch 1, step 6, where the Trainer's last one ended"
    ]
    make_trainer(probes).fit(model, loader(), loader(32))
    assert points(probes) == [(0, 0), (1, 6)]
    assert probes.report.notes == []


@pytest.mark.parametrize("how", ["resumed", "fitted again"])
def test_a_fault_before_the_first_step_of_a_run_that_goes_on_is_told_with_its_epoch_and_step(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("injected")

    trainer, model = make_trainer(LinearProbeCallback()), small()
    trainer.fit(model, loader(), loader(32))
    trainer.save_checkpoint(path := tmp_path / "last.ckpt")
    named: dict[str, Any] = {}
    if how == "resumed":
        trainer, named = make_trainer(LinearProbeCallback(), max_epochs=2), {"ckpt_path": str(path)}
    else:
        trainer.fit_loop.max_epochs = 2
    monkeypatch.setattr("lightning_probes.fitting.KeptBatches.wants", broken)
    with pytest.warns(UserWarning, match="set aside at epoch 1, step 6, since recording it raised RuntimeError: inj"):
        trainer.fit(model, loader(), loader(32), **named)


# The map


def test_contributing_lists_the_modules_that_import_lightning() -> None:
    importing = set()
    for module in (ROOT / "lightning_probes").glob("*.py"):
        for node in ast.walk(ast.parse(module.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            if any(name.split(".")[0] in ("lightning", "pytorch_lightning") for name in names):
                importing.add(module.name)
    said = " ".join((ROOT / ".github" / "CONTRIBUTING.md").read_text().split())
    sentence = re.search(r"; only (.*?) import Lightning\.", said)
    assert sentence is not None
    assert set(re.findall(r"`(\w+\.py)`", sentence[1])) == importing
