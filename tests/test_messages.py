"""What is said where something cannot be done: what was given, why not, and what to write instead."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.cli import LightningArgumentParser
from networks import QUIET, Classifier, images, loader, mlp
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_probes import LinearProbeCallback, probe
from lightning_probes.cli import ProbeCLI
from lightning_probes.network.batches import as_tensor, pick
from lightning_probes.network.labels import find_num_classes
from lightning_probes.tasks.classification import Classification

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
        "model: expected a LightningModule or another torch module, found the class Classifier; give an instance of "
        "it: Classifier(...)",
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
    text = f"{argument}: expected a pattern or a list of patterns, found ('net.1', 'net.3'); write ['net.1', 'net.3']"
    message = f"^{re.escape(text)}$"
    with pytest.raises(TypeError, match=message):
        LinearProbeCallback(**given)
    with pytest.raises(TypeError, match=message):
        probe(small(), loader(), loader(), **given)
    for accepted in ("net.1", ["net.1", "net.3"]):
        given = {argument: accepted}
        assert LinearProbeCallback(**given).selection[argument] == accepted
        assert from_yaml(**given).selection[argument] == accepted
    with pytest.raises(ValueError, match="log_metrics: expected a list of some of "):
        LinearProbeCallback(log_metrics=("lag",))  # type: ignore[arg-type]


# Labels


def of_float(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


NAN = float("nan")
LABELS: dict[str, tuple[Any, int, str]] = {
    "ids stored as floats": (
        of_float(0, 3, 2),
        4,
        "(3,) are torch.float32; expected integers, or rows of probabilities; they are whole numbers, which .long() "
        "makes integers: target=lambda batch: batch[1].long()",
    ),
    "ids in a column": (of_float(0, 3, 2).double().unsqueeze(1), 4, "batch[1].long()"),
    "measurements": (
        of_float(0.5, 3.2, 2),
        4,
        "they are no whole numbers: task='regression'; or intervals",
    ),
    "infinite measurements": (of_float(1, float("inf")), 4, "task='regression'"),
    "missing": (
        of_float(0, NAN, NAN, 1),
        4,
        "; 2 of the 4 are NaN, the first at 1: leave such samples out of the data",
    ),
    "missing rows": (
        torch.tensor([[0.0, 1.0], [NAN, 1.0]]),
        2,
        "; 1 of the 2 are NaN, the first at 1: leave such samp",
    ),
    "several ones": (
        torch.tensor([[1, 0, 0], [1, 0, 1]]),
        3,
        "target: row 1 of the labels [2, 3] is no distribution: [1, 0, 1]"
        "; several classes in a row are labels of their own: task='multilabel'",
    ),
    "several ones, as booleans": (
        torch.tensor([[True, True]]),
        2,
        "; several classes in a row are labels of their own",
    ),
    "several ones of another width": (
        of_float(1, 0, 1, 1).unsqueeze(0),
        3,
        "; several classes in a row are labels of their own",
    ),
    "no one": (
        torch.tensor([[1, 0], [0, 0]]),
        2,
        "; a row of zeros names no class; integers leave a sample out with -1",
    ),
    "scores": (
        torch.tensor([[1.5, -2.0]]),
        2,
        "has no negative ones and sums to 1; .softmax(dim=1) makes some of scores",
    ),
    "one-hot of another width": (torch.eye(4), 3, "; these are rows of 4 probabilities: num_classes=4"),
    "of tokens": (
        torch.tensor([[3, 1, 3, 2]]),
        10,
        "target: labels have shape (1, 4); expected (batch,), (batch, 1) or (batch, num_classes=10); labels of their "
        "own for each token: positions=16, so many of a sample; or a function makes one of them, say the most "
        "frequent, target=lambda batch: batch[1].flatten(1).mode(dim=1).values",
    ),
    "of pixels": (torch.full((2, 8, 8), 3), 10, "; labels of their own for each pixel: positions=16, "),
    "several numbers": (
        torch.full((2, 5), 0.7),
        10,
        "; several numbers for a sample are no classes: task='regression'",
    ),
    "words": (["cat", "dog"], 10, "found list of str (the first: 'cat'); number the classes in the dataset: 0, 1, ..."),
    "a list": ([3, 1], 10, "found list; a function makes one of it: target=lambda batch: torch.tensor(batch[1])"),
    "a dict": ({"fine": torch.tensor([1])}, 10, "found dict: dict {'fine': int64[1]}; the labels could be its 'fine'"),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels_that_are_not_offered_are_told_with_what_to_write_instead(case: str) -> None:
    labels, num_classes, message = LABELS[case]
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        Classification(num_classes).check(as_tensor(labels))


@pytest.mark.parametrize(
    ("labels", "num_classes", "advice"),
    [
        (of_float(0, 3, 2), 4, lambda batch: batch[1].long()),
        (of_float(0.5, 3.2, 2), 3, lambda batch: torch.bucketize(batch[1], torch.tensor([1.0, 2.0]))),
        (torch.tensor([[1, 0], [0, 0]]), 2, lambda batch: torch.where(batch[1].sum(1) > 0, batch[1].argmax(1), -100)),
        (torch.tensor([[3, 1, 3, 2]]), 10, lambda batch: batch[1].flatten(1).mode(dim=1).values),
        (torch.full((2, 8, 8), 3), 10, lambda batch: batch[1].flatten(1).mode(dim=1).values),
        ([3, 1], 10, lambda batch: torch.tensor(batch[1])),
    ],
)
def test_what_is_advised_gives_labels_that_can_be_used(labels: Any, num_classes: int, advice: Any) -> None:
    Classification(num_classes).check(as_tensor(advice((None, labels))))


@dataclass
class Sample:
    pixels: torch.Tensor
    identity: torch.Tensor


X, Y = torch.zeros(4, 3), torch.tensor([0, 1, 2, 1])


@pytest.mark.parametrize(
    ("batch", "where", "places"),
    [
        ({"pixels": X, "label": Y}, 1, ["'label'"]),
        ({"id": Y, "labels": Y.clone(), "length": Y.clone()}, 1, ["'labels'", "'id'", "'length'"]),
        ({"x": X, "info": {"target": Y}}, 1, ["'target'"]),
        ({"x": X, "a": {"b": {"y": Y}}}, 1, ["lambda batch: batch['a']['b']['y']"]),
        ({"x": X, "label": X[:, 0]}, 1, ["'label'"]),  # of floats: the next message is about them
        ((X, Y), 2, ["1"]),
        ((X, {"y": Y}), "label", ["'y'"]),
        ((X, (Y,)), 2, ["lambda batch: batch[1][0]"]),
        ([X, Sample(X, Y)], "label", ["'identity'"]),
        ((X, {"deep": Sample(X, Y)}), "label", ["lambda batch: batch[1]['deep'].identity"]),
    ],
)
def test_batch_without_what_target_names_is_told_with_the_keys_that_could_be_it(
    batch: Any, where: Any, places: list[str]
) -> None:
    with pytest.raises(LookupError) as error:
        pick(batch, where, "target")
    assert str(error.value).endswith("; its labels could be " + " or ".join(f"target={place}" for place in places))
    assert torch.equal(pick(batch, eval(places[0]), "target").long(), pick_first(batch).long())


def pick_first(batch: Any) -> torch.Tensor:
    """Of what these batches hold, the labels: the only tensors of one dimension."""
    found: list[torch.Tensor] = tree_leaves(plain(batch))
    return next(leaf for leaf in found if leaf.dim() == 1)


def plain(value: Any) -> Any:
    if isinstance(value, Sample):
        return [value.pixels, value.identity]
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def test_batch_without_anything_like_labels_is_only_described() -> None:
    with pytest.raises(LookupError, match=r"it is dict \{'pixels': float32\[4, 3\]\}'?$"):
        pick({"pixels": X}, 1, "target")


RUNS: dict[str, Any] = {
    "callback": lambda *given: make_trainer(LinearProbeCallback(), num_sanity_val_steps=0).fit(*given),
    "probe": probe,
}


@pytest.mark.parametrize("run", RUNS)
def test_defaults_on_a_batch_of_keys_name_the_key_of_the_labels(run: str) -> None:
    data: Any = [{"image": x, "label": y} for x, y in zip(*images(32).tensors, strict=True)]
    batches: DataLoader[Any] = DataLoader(data, batch_size=16)
    with pytest.raises(LookupError, match=r"target=1: the batch has no such index; .*could be target='label'"):
        RUNS[run](small(), batches, batches)


# The number of classes


class Unsaid(Classifier):
    """Nobody is told how many classes there are."""

    def __init__(self, net: nn.Module | None = None) -> None:
        seed_everything(3, verbose=False)
        super().__init__(net or mlp(depth=1))
        del self.num_classes


def rows(samples: int, soft: float = 0.0, seed: int = 0, classes: int = 10) -> DataLoader[Any]:
    x, y = images(samples, seed=seed).tensors
    one_hot = torch.eye(classes)[y] * (1 - soft) + soft / classes
    return DataLoader(TensorDataset(x, one_hot), batch_size=16)


class Configured(nn.Module):
    """A network with a configuration as Hugging Face's have one."""

    def __init__(self, num_labels: Any, *, has_head: bool = False) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_labels=num_labels)
        if has_head:
            self.num_labels = num_labels


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ([Configured(7, has_head=True)], 7),
        ([Configured(7, has_head=True), Configured(7, has_head=True)], 7),
        ([Configured(2, has_head=True)], 2),
        ([MulticlassAccuracy(5), Configured(7, has_head=True)], 5),
        ([Configured(1000), Configured(7, has_head=True)], 7),  # a network without a head has that of another task
        ([Configured(2)], None),
        ([Configured(1000)], None),
        ([Configured("ten", has_head=True)], None),
        ([Configured(True, has_head=True)], None),
    ],
)
def test_number_of_classes_is_that_of_a_hugging_face_configuration(modules: Any, expected: int | None) -> None:
    owner = Unsaid(nn.Sequential(*modules))
    if expected is None:
        with pytest.raises(ValueError, match="pass num_classes="):
            find_num_classes(owner)
    else:
        assert find_num_classes(owner) == expected


def test_configurations_that_disagree_are_an_error_listing_their_numbers() -> None:
    with pytest.raises(ValueError, match=re.escape("(its `config.num_labels` disagree: [3, 7]); pass num_classes=...")):
        find_num_classes(Unsaid(nn.Sequential(Configured(3, has_head=True), Configured(7, has_head=True))))


@pytest.mark.parametrize("soft", [0.0, 0.2])
@pytest.mark.parametrize("sanity", [0, 2])
def test_width_of_the_labels_is_the_number_of_classes_where_nobody_else_knows(
    soft: float, sanity: int, tmp_path: Path
) -> None:
    reports = []
    for number in (None, 10):
        trainer = make_trainer(probes := LinearProbeCallback(num_classes=number), num_sanity_val_steps=sanity)
        trainer.fit(SoftUnsaid(), rows(96, soft), rows(32, soft, seed=1))
        reports.append(probes.report)
    told, given = reports
    assert told.rows == given.rows != []
    assert told.notes == ["num_classes is 10, the width of the labels"]
    trainer = make_trainer(probes := LinearProbeCallback())
    trainer.fit(SoftUnsaid(), rows(96, soft), rows(32, soft, seed=1))
    trainer.save_checkpoint(path := tmp_path / "last.ckpt")
    resumed = LinearProbeCallback()
    make_trainer(resumed, max_epochs=2).fit(SoftUnsaid(), rows(96, soft), rows(32, soft, seed=1), ckpt_path=str(path))
    assert points(resumed) == [(0, 0), (1, 6), (2, 12)]
    alone = LinearProbeCallback()
    make_trainer(alone).validate(SoftUnsaid(), rows(32, soft, seed=1), ckpt_path=str(path), verbose=False)
    assert points(alone) == [(1, 6)]
    assert {row["baseline"] for row in alone.report.rows if "baseline" in row} <= {told.baseline["val"]}


class SoftUnsaid(Unsaid):
    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))


@pytest.mark.parametrize("sanity", [0, 2])
def test_many_classes_that_only_the_labels_tell_are_fitted_on_as_many_samples(sanity: int) -> None:
    probes, data = LinearProbeCallback("net.1"), rows(96, classes=100)
    make_trainer(probes, num_sanity_val_steps=sanity).fit(SoftUnsaid(mlp(depth=1, classes=100)), data, data)
    assert probes._session.refit.budget.samples == 200 * 100


def test_probe_takes_the_width_of_the_labels_too() -> None:
    told = probe(SoftUnsaid(), rows(96), rows(32, seed=1))
    given = probe(SoftUnsaid(), rows(96), rows(32, seed=1), num_classes=10)
    assert told.rows == given.rows != []
    assert "num_classes is 10, the width of the labels" in told.notes
    assert not any("num_classes" in note for note in given.notes)


@pytest.mark.parametrize("run", RUNS)
def test_integer_labels_that_nobody_knows_the_number_of_are_an_error_with_the_highest(run: str) -> None:
    message = (
        r"^num_classes is not given and Unsaid has no .*; pass num_classes=\.\.\. \(the highest label of the first ba"
    )
    with pytest.raises(ValueError, match=message):
        RUNS[run](Unsaid(), loader(), loader(32))


@pytest.mark.parametrize("labels", [torch.rand(16), torch.zeros(16, 8, 8).long(), torch.ones(16, 10)])
def test_labels_that_are_none_are_told_of_before_their_number(labels: torch.Tensor) -> None:
    probes = LinearProbeCallback(target=lambda batch: labels)
    with pytest.raises((TypeError, ValueError), match=r"^target: (?!.*num_classes=0)"):
        make_trainer(probes).fit(Unsaid(), loader(), loader(32))


@pytest.mark.parametrize("run", ["callback", "cross-fitted", "online", "probe"])
def test_more_classes_than_the_labels_show_are_told_of_once(run: str) -> None:
    note = (
        "num_classes=30, but the labels that probes were fitted on are 0 to 9: if there are no others, num_classes=10 "
        "makes smaller probes and faster fits"
    )
    for number, expected in ((30, [note]), (10, [])):
        if run == "probe":
            report = probe(small(), loader(), loader(64, seed=1), num_classes=number)
        else:
            fit_samples = {"online": 0}.get(run)
            probes = LinearProbeCallback("net.1", num_classes=number, fit_samples=fit_samples)
            if run == "cross-fitted":
                probes._bounds = (1, False)
            make_trainer(probes, max_epochs=2).fit(small(), loader(), loader(64, seed=1))
            report = probes.report
        assert [found for found in report.notes if "num_classes" in found] == expected


@pytest.mark.parametrize(
    ("classes", "is_told"),
    [
        ([50.0, 50.0, 0.0], True),
        ([5.0, 5.0, 0.0], False),  # may be chance
        ([0.0, 500.0, 500.0], False),  # the number of classes is right
        ([500.0, 0.0, 500.0], False),
        ([14.0] * 999 + [0.0], True),
        ([0.0, 0.0], False),
        ([9.0], False),
        ([], False),
    ],
)
def test_classes_that_chance_may_have_left_out_are_not_told_of(classes: list[float], is_told: bool) -> None:
    assert bool(Classification(len(classes)).doubts(classes)) is is_told


# The command line


class Small(Classifier):
    def __init__(self) -> None:
        super().__init__(mlp(depth=1))


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
@pytest.mark.parametrize("subcommand", ["fit", "probe"])
@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("num_classes=many", "num_classes: expected a positive integer, found 'many'"),
        ("max_features=2.5", "max_features: expected a positive integer, found 2.5"),
        ("calls=second", "calls: expected 'first', 'last' or 'mean', found 'second'"),
        (
            "layout={input: rows}",
            "layout: expected {pattern: 'tokens', 'channels', 'channels_last', 'time_first', 'parts' or 'views'}, "
            "found {'input': 'rows'}",
        ),
        ("exclud=net.1", "LinearProbeCallback has no argument 'exclud'; nearest: exclude"),
    ],
)
def test_what_the_parser_refuses_for_a_callback_ends_in_the_callbacks_words(
    subcommand: str, argument: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--trainer.callbacks=lightning_probes.LinearProbeCallback", f"--trainer.callbacks.{argument}"]
    with pytest.raises(SystemExit) as end:
        ProbeCLI(Small, Data, args=[subcommand, *given], seed_everything_default=0)
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == message


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
@pytest.mark.parametrize("subcommand", ["fit", "probe"])
def test_what_a_callback_refuses_on_the_command_line_is_its_own_error(subcommand: str) -> None:
    given = ["--trainer.callbacks=lightning_probes.LinearProbeCallback", "--trainer.callbacks.num_classes=-1"]
    with pytest.raises(ValueError, match=r"^num_classes: expected a positive integer, found -1$") as raised:
        ProbeCLI(Small, Data, args=[subcommand, *given], seed_everything_default=0)
    assert raised.value.__suppress_context__


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
def test_other_errors_of_the_parser_stay_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    class Own(LightningArgumentParser):
        pass

    with pytest.raises(SystemExit):
        ProbeCLI(Small, Data, args=["fit", "--trainer.max_epochs=many"], parser_class=Own)
    assert "LinearProbeCallback" not in capsys.readouterr().err.splitlines()[-1]


# Callbacks of one Trainer


@pytest.mark.parametrize("package", [Trainer, pytorch_lightning.Trainer], ids=["lightning", "pytorch_lightning"])
def test_a_trainer_leaves_it_to_the_callbacks_to_refuse_one_another(package: Any) -> None:
    same = LinearProbeCallback()
    for callbacks in ([same, same], [LinearProbeCallback(), LinearProbeCallback()]):
        trainer = package(**QUIET, callbacks=callbacks)
        with pytest.raises(ValueError, match=r"^two LinearProbeCallbacks have no name; give each its own: Linear"):
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
    monkeypatch.setattr("lightning_probes.replay.reservoir.Reservoir.wants", broken)
    with pytest.warns(UserWarning, match="set aside at epoch 1, step 6, since recording it raised RuntimeError: inj"):
        trainer.fit(model, loader(), loader(32), **named)
