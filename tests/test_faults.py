"""A mistake of configuration raises before the first step; after that a probe never ends a training run."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from networks import Classifier, images, loader, mlp
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_probes import LinearProbeCallback

EITHER_WAY = pytest.mark.parametrize("fit_samples", [0, 8192], ids=["online", "converged"])


def make_trainer(folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(
        **{"max_epochs": 1, "accelerator": "cpu", "default_root_dir": folder, **quiet, **options},
        callbacks=list(callbacks),
    )


class Beside(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class WithSide(Classifier):
    """Calls a layer ``side`` beside the network, whose output nobody uses; ``None``: does not call it."""

    def __init__(self, function: Callable[[Tensor], Any] | None = None) -> None:
        seed_everything(3, verbose=False)
        super().__init__(mlp(depth=1))
        self.side = Beside(function or (lambda x: x))
        self.calls_side = function is not None

    def forward(self, x: Tensor) -> Tensor:
        if self.calls_side:
            self.side(x)
        return super().forward(x)


def has_hooks(model: nn.Module) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# Arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layers": 3}, TypeError, "layers: expected a pattern or a list of patterns, found 3"),
        ({"layers": ["net", 3]}, TypeError, r"layers: .* found \['net', 3\]"),
        ({"layers": []}, ValueError, "layers: an empty list selects nothing"),
        ({"exclude": 3}, TypeError, "exclude: expected a pattern or a list of patterns, found 3"),
        ({"num_classes": "10"}, TypeError, "num_classes: expected a positive integer, found '10'"),
        ({"num_classes": 2.5}, TypeError, "num_classes: expected a positive integer, found 2.5"),
        ({"num_classes": True}, TypeError, "num_classes: expected a positive integer, found True"),
        ({"num_classes": 0}, ValueError, "num_classes: expected a positive integer, found 0"),
        ({"num_classes": -1}, ValueError, "num_classes: expected a positive integer, found -1"),
        ({"input": 0.5}, TypeError, "input: expected an index, a key or a callable, found 0.5"),
        (
            {"target": None},
            TypeError,
            "target: expected an index, a key or a callable or {name: one of these}, found None",
        ),
        (
            {"target": True},
            TypeError,
            "target: expected an index, a key or a callable or {name: one of these}, found True",
        ),
        ({"max_features": 2.5}, TypeError, "max_features: expected a positive integer, found 2.5"),
        ({"max_features": 0}, ValueError, "max_features: expected a positive integer, found 0"),
        ({"name": 3}, TypeError, "name: expected a non-empty string, found 3"),
        ({"name": ""}, TypeError, "name: expected a non-empty string, found ''"),
        ({"layout": {"net.0": "rows"}}, ValueError, r"layout: expected .*'tokens', 'channels', .*'rows'"),
        ({"layout": {"net.0": ["tokens"]}}, (TypeError, ValueError), "layout: "),
        ({"layout": "tokens"}, (TypeError, ValueError), "layout: "),
        ({"layout": 3}, (TypeError, ValueError), "layout: "),
        ({"learning_rate": "fast"}, TypeError, "learning_rate: expected a positive number, found 'fast'"),
        ({"learning_rate": 0}, ValueError, "learning_rate: expected a positive number, found 0"),
        ({"learning_rate": -1e-3}, ValueError, "learning_rate: expected a positive number, found -0.001"),
        ({"learning_rate": math.nan}, ValueError, "learning_rate: expected a positive number, found nan"),
        ({"learning_rate": math.inf}, ValueError, "learning_rate: expected a positive number, found inf"),
        ({"fit_samples": -1}, ValueError, "fit_samples: expected .*, found -1"),
        ({"fit_samples": 2.5}, TypeError, "fit_samples: expected .*, found 2.5"),
        ({"fit_samples": 0.0}, TypeError, "fit_samples: expected .*, found 0.0"),
        ({"fit_samples": False}, TypeError, "fit_samples: expected .*, found False"),
        ({"fit_on_device": "cpu"}, TypeError, "fit_on_device: expected true or false, found 'cpu'"),
        ({"fit_bytes": 0}, ValueError, "fit_bytes: expected a positive integer, found 0"),
        ({"fit_bytes": "4 GiB"}, TypeError, "fit_bytes: expected a positive integer, found '4 GiB'"),
        ({"every_n_epochs": 0}, ValueError, "every_n_epochs: expected a positive integer or 'auto', found 0"),
        ({"every_n_epochs": True}, TypeError, "every_n_epochs: expected a positive integer or 'auto', found True"),
        ({"every_n_epochs": "atuo"}, ValueError, "every_n_epochs: expected a positive integer or 'auto', found 'atuo'"),
        ({"log_metrics": ["accuracy"]}, ValueError, r"log_metrics: expected .*found \['accuracy'\]"),
        ({"log_metrics": [3, "accuracy"]}, (TypeError, ValueError), "log_metrics: "),
        # Not its letters.
        ({"log_metrics": "cross_entropy"}, (TypeError, ValueError), "log_metrics: .*found 'cross_entropy'"),
        ({"log_metrics": 3}, (TypeError, ValueError), "log_metrics: "),
    ],
    ids=str,
)
def test_argument_that_cannot_be_meant_is_refused_by_name(arguments: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        LinearProbeCallback(**arguments)


# Before the first step


def classless() -> Classifier:
    model = Classifier(mlp(depth=1))
    del model.num_classes
    return model


SHAPES = r"list \{0: float32\[16, 1, 8, 8\], 1: int64\[16\]\}"

MISTAKES: dict[str, tuple[Callable[[], LightningModule], dict[str, Any], type[Exception], str]] = {
    "pattern that matches nothing": (
        WithSide,
        {"layers": "nett.*"},
        ValueError,
        r"layers: 'nett\.\*' matches no layer path and no class name; nearest: .*net\.1",
    ),
    "exclude that matches nothing": (WithSide, {"exclude": "nett"}, ValueError, "exclude: 'nett' matches no layer"),
    "exclude that leaves nothing": (
        WithSide,
        {"layers": "net.*", "exclude": "net"},
        ValueError,
        r"exclude=\['net'\] leaves no layer to probe of the 4 selected: net\.0, net\.1",
    ),
    "layout that matches nothing": (
        WithSide,
        {"layout": {"nett": "tokens"}},
        ValueError,
        "layout: 'nett' matches no layer",
    ),
    "layout of a layer that is not probed": (
        WithSide,
        {"layers": "net.1", "layout": {"net.3": "tokens"}},
        ValueError,
        r"layout: 'net\.3' has no effect, since none of net\.3 is probed; probed are input, net\.1",
    ),
    "layout of an input that is not probed": (
        WithSide,
        {"input": None, "layout": {"input": "channels"}},
        ValueError,
        r"layout: 'input' has no effect, since none of input is probed",
    ),
    "layout of vectors": (
        WithSide,
        {"layout": {"net.*": "channels_last"}},
        ValueError,
        r"layout: 'net\.\*' has no effect: 'channels_last' is about three dimensions or more, found net\.1 \(16, 32\)",
    ),
    "no number of classes": (
        classless,
        {},
        ValueError,
        "num_classes is not given and Classifier has no `num_classes`.*; pass num_classes=",
    ),
    "labels out of range": (
        WithSide,
        {"num_classes": 4},
        ValueError,
        r"target: label [4-9] is outside \[0, num_classes=4\)",
    ),
    "negative labels": (
        WithSide,
        {"target": lambda batch: batch[1] - 10},
        ValueError,
        r"target: label -\d+ is outside \[0, num_classes=10\)",
    ),
    "float labels": (
        WithSide,
        {"target": lambda batch: batch[1].float()},
        TypeError,
        r"target: labels of shape \(16,\) are torch.float32; expected integers, or rows of probabilities",
    ),
    "rows that are no distribution": (
        WithSide,
        {"target": lambda batch: torch.ones(16, 10)},
        ValueError,
        r"target: row 0 of the labels \[16, 10\] is no distribution: \[1.0",
    ),
    "images for labels": (
        WithSide,
        {"target": 0},
        ValueError,
        r"target: labels have shape \(16, 1, 8, 8\); expected \(batch,\), \(batch, 1\) or \(batch, num_classes=10\)",
    ),
    "no tensor of labels": (
        WithSide,
        {"target": lambda batch: batch[1].tolist()},
        TypeError,
        "target: expected a tensor of labels, found list",
    ),
    "index that the batch lacks": (
        WithSide,
        {"target": 2},
        LookupError,
        f"target=2: the batch has no such index; it is {SHAPES}",
    ),
    "key that the batch lacks": (
        WithSide,
        {"target": "label"},
        LookupError,
        f"target='label': the batch has no such key; it is {SHAPES}",
    ),
    "named layer that does not fit the batch": (
        lambda: WithSide(lambda x: x.flatten(1)[:7, :30]),
        {"layers": ["net.*", "side"]},
        ValueError,
        r"layers: 'side' cannot be probed: its activation has shape \[7, 30\], whose first dimension is not that of "
        "the 16 labels of the batch",
    ),
    "named layer without floats": (
        lambda: WithSide(lambda x: x.flatten(1).argmax(dim=1)),
        {"layers": ["net.*", "side"]},
        ValueError,
        "layers: 'side' cannot be probed: its output holds no floating-point tensor",
    ),
    "named layer without an output": (
        lambda: WithSide(lambda x: None),
        {"layers": "side"},
        ValueError,
        "layers: 'side' cannot be probed: its output holds no floating-point tensor but NoneType",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_raises_before_the_first_optimiser_step(mistake: str, tmp_path: Path) -> None:
    make_model, arguments, error, message = MISTAKES[mistake]
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = make_trainer(tmp_path, LinearProbeCallback(**arguments))
    with pytest.raises(error, match=message):
        trainer.fit(model, loader(), loader(32))
    assert trainer.global_step == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not has_hooks(model)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x.flatten(1)[:7], "the rows of its output [7, 64]"),
        (lambda x: x.flatten(1).argmax(dim=1), "its output holds no floating-point tensor"),
    ],
    ids=["shape", "integers"],
)
def test_layer_that_nobody_named_and_that_does_not_fit_is_left_out_and_the_start_says_so(
    function: Callable[[Tensor], Any] | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("lightning_probes.progress.rank_zero_info", said.append)
    make_trainer(tmp_path, probes := LinearProbeCallback()).fit(WithSide(function), loader())
    line, end = said
    assert f"; left out: side ({reason}" in line
    assert "left out" not in end
    assert {row["layer"] for row in probes.report.rows} == {"input", "net.1", "net.2", "net.3"}


SAME = {None: "no name", "same": "the name 'same'"}


@pytest.mark.parametrize("run", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("name", [None, "same"])
def test_two_callbacks_of_one_name_are_refused_before_anything_runs(name: str | None, run: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, LinearProbeCallback(name=name), LinearProbeCallback(name=name))
    with pytest.raises(ValueError, match=f"two LinearProbeCallbacks have {SAME[name]}; give each its own: Linear"):
        getattr(trainer, run)(Classifier(mlp(depth=1)), loader())
    assert trainer.global_step == 0


@pytest.mark.parametrize("name", [None, "same"])
def test_two_callbacks_of_one_name_from_the_module_are_refused_in_fit(name: str | None, tmp_path: Path) -> None:
    class Bringing(Classifier):
        def configure_callbacks(self) -> Any:
            return [LinearProbeCallback("net.1", name=name), LinearProbeCallback("net.3", name=name)]

    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match=f"two LinearProbeCallbacks have {SAME[name]}; give each its own"):
        trainer.fit(Bringing(mlp(depth=1)), loader())
    assert trainer.global_step == 0


# During the run


class InEpoch(Callback):
    """Does something at the start of an epoch, counted from 1."""

    def __init__(self, epoch: int, action: Callable[[], None]) -> None:
        self.epoch, self.action = epoch, action

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self.epoch - 1:
            self.action()


def fit_with_fault(
    folder: Path, width: int, fault: float, *, in_training: bool, fit_samples: int
) -> tuple[LinearProbeCallback, Trainer, list[Any]]:
    """Three epochs; from the second on the side layer's last feature is ``fault``, in training or in validation."""
    model = WithSide(lambda x: x.flatten(1)[:, :width])

    def begin() -> None:
        def broken(x: Tensor) -> Tensor:
            features = x.flatten(1)[:, :width].clone()
            if model.training == in_training and not math.isfinite(fault):
                features[0, -1] = fault
            return features

        model.side.function = broken

    probes = LinearProbeCallback(fit_samples=fit_samples)
    trainer = make_trainer(folder, probes, InEpoch(2, begin), max_epochs=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, loader(), loader(40, seed=1))
    return probes, trainer, [str(warning.message) for warning in caught if "aside" in str(warning.message)]


@EITHER_WAY
@pytest.mark.parametrize("in_training", [True, False], ids=["in training", "in validation"])
@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("width", [32, 64])  # beside two layers as wide, and beside the input
def test_layer_that_is_not_finite_is_set_aside_with_one_warning_and_the_others_never_notice(
    width: int, fault: float, in_training: bool, fit_samples: int, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"in_training": in_training, "fit_samples": fit_samples}
    healthy, _, silence = fit_with_fault(tmp_path, width, 0.0, **options)
    probes, trainer, (warning,) = fit_with_fault(tmp_path, width, fault, **options)
    assert silence == []
    # What is wrong in eval mode is wrong in the samples to fit on too: they are run again in it.
    first = "train" if in_training or fit_samples else "val"
    assert re.search(rf"layer 'side' is set aside at epoch 2, step 12: .*\({first}\)", warning)
    assert trainer.current_epoch == 3
    others = [row for row in healthy.report.rows if row["layer"] != "side"]
    assert [row for row in probes.report.rows if row["layer"] != "side"] == others
    assert len(others) == (3 * 3 + 2 if fit_samples else 3 * 2) * 2 * 4
    for stage in ("train", "val"):
        rows = probes.report.select(layer="side", stage=stage)
        is_nan = {(row["epoch"], math.isnan(row["value"])) for row in rows}
        second = first == "train" or stage == "val"
        assert is_nan - {(0, False)} == {(1, False), (2, second), (3, True)}
        assert ((0, False) in is_nan) == (fit_samples > 0)
        assert math.isnan(trainer.callback_metrics[f"probe_error_{stage}/side"].item())
        assert not math.isnan(trainer.callback_metrics[f"probe_error_{stage}/net.1"].item())


@EITHER_WAY
def test_named_layer_that_never_runs_is_told_of_once(fit_samples: int, tmp_path: Path) -> None:
    probes = LinearProbeCallback(["net.*", "side"], fit_samples=fit_samples)
    trainer = make_trainer(tmp_path, probes, max_epochs=3)
    with pytest.warns() as caught:
        trainer.fit(WithSide(), loader(), loader(32))
    (warning,) = (str(w.message) for w in caught if "LinearProbeCallback" in str(w.message))
    assert re.search(r"no train values for 'side' \(it never ran\)$", warning)
    assert probes.report.select(layer="side") == []
    assert len(probes.report.select(layer="net.1")) == (3 * 3 + 2 if fit_samples else 3 * 2) * 2


@EITHER_WAY
def test_layer_that_runs_in_some_steps_is_scored_on_those(fit_samples: int, tmp_path: Path) -> None:
    class Sometimes(WithSide):
        def forward(self, x: Tensor) -> Tensor:
            # By the data, so that a batch that is run again takes the same way.
            self.calls_side = is_bright(x)
            return super().forward(x)

    def is_bright(x: Tensor) -> bool:
        return x.mean().item() > -0.1

    bright = sum(len(x) for x, _ in loader(96) if is_bright(x))
    assert is_bright(next(iter(loader(96)))[0])  # or the layer would be left out
    assert 16 < bright < 80
    probes = LinearProbeCallback(["net.*", "side"], fit_samples=fit_samples)
    make_trainer(tmp_path, probes, max_epochs=2).fit(Sometimes(lambda x: x.flatten(1)), loader(96))
    assert {row["samples"] for row in probes.report.select(layer="side")} == {bright}
    assert {row["samples"] for row in probes.report.select(layer="net.1")} == {96}


def fail() -> Any:
    raise AssertionError("no such thing here")


BAD_BATCHES: dict[str, Callable[[Any], Any]] = {
    "too large": lambda batch: batch[1] + 1000,
    "negative": lambda batch: batch[1] - 50,
    "float": lambda batch: batch[1] + 0.5,
    "None": lambda batch: None,
    "a list": lambda batch: batch[1].tolist(),
    "a missing key": lambda batch: {"image": batch[0]}["label"],
    "another shape": lambda batch: batch[0],
    "one label": lambda batch: batch[1][0],
    "no labels": lambda batch: batch[1][:0],
    "too few": lambda batch: batch[1][:7],
    "an exception": lambda batch: fail(),
}


WITHOUT_A_SAMPLE = {"too large", "negative", "float"}
"""Batches whose labels can be read, and none of which counts."""


@EITHER_WAY
@pytest.mark.parametrize("bad", BAD_BATCHES)
def test_bad_labels_in_the_second_epoch_are_left_out_and_do_not_end_the_run(
    bad: str, fit_samples: int, tmp_path: Path
) -> None:
    is_bad: list[bool] = []

    def labels(batch: Any) -> Any:
        return BAD_BATCHES[bad](batch) if is_bad else batch[1]

    begin, end = InEpoch(2, lambda: is_bad.append(True)), InEpoch(3, is_bad.clear)
    probes = LinearProbeCallback(target=labels, fit_samples=fit_samples)
    trainer = make_trainer(tmp_path, probes, begin, end, max_epochs=3)
    trainer.fit(WithSide(), loader(), loader(32))
    assert trainer.current_epoch == 3
    start = {0} if fit_samples else set()
    assert {row["epoch"] for row in probes.report.select(stage="val")} == {1, 3} | start
    # Batches without labels are not kept: the epoch is fitted on those of the epoch before.
    kept = {2} if fit_samples and bad not in WITHOUT_A_SAMPLE else set()
    assert {row["epoch"] for row in probes.report.select(stage="train")} == {1, 3} | start | kept
    assert {row["samples"] for row in probes.report.rows} == {96, 32}
    assert not any(math.isnan(row["value"]) for row in probes.report.rows)


@EITHER_WAY
@pytest.mark.parametrize("error", [RuntimeError, KeyError, AssertionError, ZeroDivisionError])
def test_input_that_cannot_be_had_in_the_second_epoch_does_not_end_the_run(
    error: type[Exception], fit_samples: int, tmp_path: Path
) -> None:
    is_bad: list[bool] = []

    def pixels(batch: Any) -> Any:
        if is_bad:
            raise error("no such thing here")
        return batch[0]

    probes = LinearProbeCallback(input=pixels, fit_samples=fit_samples)
    trainer = make_trainer(tmp_path, probes, InEpoch(2, lambda: is_bad.append(True)), max_epochs=2)
    trainer.fit(WithSide(), loader(), loader(32))
    assert trainer.current_epoch == 2
    start = {0} if fit_samples else set()
    assert {row["epoch"] for row in probes.report.select(layer="input")} == {1} | start
    assert {row["epoch"] for row in probes.report.select(layer="net.1")} == {1, 2} | start


@EITHER_WAY
def test_layer_that_changes_its_width_is_scored_where_it_has_its_own(fit_samples: int, tmp_path: Path) -> None:
    model = WithSide(lambda x: x.flatten(1) if len(x) == 16 else x.flatten(1)[:, :5])
    trainer = make_trainer(tmp_path, probes := LinearProbeCallback(fit_samples=fit_samples))
    trainer.fit(model, DataLoader(images(88), batch_size=16))
    assert {row["samples"] for row in probes.report.select(layer="side")} == {80}
    assert {row["samples"] for row in probes.report.select(layer="net.1")} == {88}


# The end


class Fails(Callback):
    """Raises at one of Lightning's events, after the probes have seen it; remembers whether there were hooks."""

    def __init__(self, event: str, error: BaseException) -> None:
        self.had_hooks = False

        def raise_error(trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            self.had_hooks = has_hooks(pl_module)
            raise error

        setattr(self, event, raise_error)


def ends_of(error: BaseException) -> tuple[type[BaseException], ...]:
    """What comes out of ``fit``: Lightning ends the process on Ctrl-C."""
    return (SystemExit, KeyboardInterrupt) if isinstance(error, KeyboardInterrupt) else (type(error),)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("error", [RuntimeError("stop here"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
@pytest.mark.parametrize(
    "event",
    [
        "on_fit_start",
        "on_train_start",
        "on_train_batch_start",
        "on_before_backward",
        "on_train_batch_end",
        "on_validation_batch_end",
        "on_train_epoch_end",
    ],
)
def test_hooks_are_gone_after_an_exception_anywhere(event: str, error: BaseException, tmp_path: Path) -> None:
    model = WithSide()
    fails = Fails(event, error)
    trainer = make_trainer(tmp_path, LinearProbeCallback(), fails, num_sanity_val_steps=0)
    with pytest.raises(ends_of(error)):
        trainer.fit(model, loader(), loader(32))
    assert fails.had_hooks
    assert not has_hooks(model)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("error", [RuntimeError("stop here"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
@pytest.mark.parametrize("step", ["training_step", "validation_step", "again"])
def test_hooks_are_gone_after_an_exception_in_a_step(step: str, error: BaseException, tmp_path: Path) -> None:
    had_hooks: list[bool] = []

    class Failing(WithSide):
        def forward(self, x: Tensor) -> Tensor:
            if self.training == (step == "training_step") and self.global_step > 1:
                had_hooks.append(has_hooks(self))
                raise error
            return super().forward(x)

    model = Failing()
    # Where batches are run again, that is what calls forward in eval mode first.
    probes = LinearProbeCallback(fit_samples=8192 if step == "again" else 0)
    with pytest.raises(ends_of(error)):
        make_trainer(tmp_path, probes).fit(model, loader(), loader(32))
    assert all(had_hooks)
    # An error when run again ends nothing; the validation step that follows it does.
    assert len(had_hooks) == (2 if step == "again" and isinstance(error, RuntimeError) else 1)
    assert not has_hooks(model)


def test_hooks_are_gone_after_fit_and_after_test(tmp_path: Path) -> None:
    model = WithSide()
    trainer = make_trainer(tmp_path, LinearProbeCallback())
    trainer.fit(model, loader(), loader(32))
    assert not has_hooks(model)
    trainer.test(model, loader(32), verbose=False)
    assert not has_hooks(model)
