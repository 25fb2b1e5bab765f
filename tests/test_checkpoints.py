"""``probe(ckpt_path=...)``: which checkpoints, from when, with whose weights, and what is said of those that fail."""

from __future__ import annotations

import signal
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from networks import QUIET, Classifier, convnet, loader, mlp
from states import differences
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_probes import LinearProbeCallback, ProbeReport, probe
from lightning_probes.checkpoints import CheckpointError, find_checkpoints

BATCHES = loader(80, 16, size=4, seed=1), loader(60, 16, size=4, seed=2)


def run(model: nn.Module, **arguments: Any) -> ProbeReport:
    """Without a progress bar; the warnings are those of the notes."""
    trainer = Trainer(**QUIET)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="probe: ")
        return probe(model, *BATCHES, **{"trainer": trainer, **arguments})


def small(seed: int = 3) -> Classifier:
    seed_everything(seed, verbose=False)
    return Classifier(mlp(inputs=16, width=12, depth=1))


def networks(report: ProbeReport) -> dict[str, tuple[int, int]]:
    """By name: epoch and step, in the order of the rows."""
    return {row["network"]: (row["epoch"], row["step"]) for row in report.rows}


def errors(report: ProbeReport, **conditions: Any) -> list[float]:
    return [row["value"] for row in report.select(metric="error", **conditions)]


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ProbeReport]:
    """Checkpoints of three epochs, and what the callback published in them."""
    folder = tmp_path_factory.mktemp("training")
    probes = LinearProbeCallback(fit_samples=80)
    each = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    Trainer(
        **{**QUIET, "enable_checkpointing": True}, max_epochs=3, callbacks=[probes, each], default_root_dir=folder
    ).fit(small(), *BATCHES)
    return folder, probes.report


def checkpoint_of(model: Classifier, path: Path, **more: Any) -> Path:
    """As Lightning writes it, as far as it is read."""
    torch.save({"state_dict": model.state_dict(), "epoch": 0, "global_step": 7, **more}, path)
    return path


# Which, and from when


@pytest.mark.parametrize("how", ["glob", "list", "list of globs", "recursive"])
def test_checkpoints_are_probed_in_order_of_time_where_the_callback_was(
    how: str, training: tuple[Path, ProbeReport]
) -> None:
    folder, published = training
    paths = [folder / f"epoch={epoch}.ckpt" for epoch in range(3)]
    given: Any = {
        "glob": str(folder / "*.ckpt"),
        "list": [paths[2], str(paths[0]), paths[1], paths[2]],
        "list of globs": [str(folder / "epoch=[12].ckpt"), str(folder / "*0.ckpt")],
        "recursive": str(folder / "**" / "epoch=*.ckpt"),
    }[how]
    report = run(small(seed=4), ckpt_path=given)
    assert networks(report) == {str(path): (epoch + 1, 5 * epoch + 5) for epoch, path in enumerate(paths)}
    points = {(row["epoch"], row["step"]) for row in published.rows} - {(0, 0)}
    assert {(row["epoch"], row["step"]) for row in report.rows} == points
    for epoch in (1, 2, 3):
        pairs = zip(errors(report, epoch=epoch), errors(published, epoch=epoch), strict=True)
        # Another fifth chooses the strength.
        assert max(abs(one - other) for one, other in pairs) <= 0.1
    assert [note for note in report.notes if "checkpoint" in note] == []


def test_one_checkpoint_gives_the_numbers_of_a_model_with_its_weights(training: tuple[Path, ProbeReport]) -> None:
    path = training[0] / "epoch=1.ckpt"
    loaded = small(seed=4)
    loaded.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    other = small(seed=5)
    for given in (path, str(path)):
        report = run(other, ckpt_path=given)
        assert errors(report) == errors(run(loaded)) != errors(run(other))
        assert networks(report) == {str(path): (2, 10)}


def test_untrained_comes_first_and_is_the_same_each_time(training: tuple[Path, ProbeReport]) -> None:
    folder, _ = training
    reports = [run(model, ckpt_path=str(folder / "*.ckpt"), untrained=True) for model in (small(), small(seed=4))]
    assert next(iter(networks(reports[0]).items())) == ("untrained", (0, 0))
    assert len(networks(reports[0])) == 4
    assert reports[0].rows == reports[1].rows
    assert "untrained" in reports[0].table().splitlines()[1]
    # Not one of its weights is left of the model.
    alone = run(small(seed=6), untrained=True)
    assert errors(alone, network="untrained") == errors(reports[0], network="untrained")


def test_parameters_that_no_module_draws_are_told_of() -> None:
    class WithPosition(Classifier):
        def __init__(self) -> None:
            super().__init__(mlp(inputs=16, width=12, depth=1))
            self.position = nn.Parameter(torch.zeros(4))

    trainer = Trainer(**QUIET)
    with pytest.warns(UserWarning, match="untrained network position stay as they are"):
        probe(WithPosition(), *BATCHES, untrained=True, trainer=trainer)


def test_a_checkpoint_inside_an_epoch_counts_the_epochs_completed(tmp_path: Path) -> None:
    inside = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=2)
    Trainer(**{**QUIET, "enable_checkpointing": True}, max_epochs=2, callbacks=[inside], default_root_dir=tmp_path).fit(
        small(), *BATCHES
    )
    report = run(small(), ckpt_path=str(tmp_path / "*.ckpt"))
    assert list(networks(report).values()) == [(0, 2), (0, 4), (1, 6), (1, 8), (2, 10)]


def test_the_model_is_not_touched_by_checkpoints(training: tuple[Path, ProbeReport]) -> None:
    model = small(seed=4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    where = [parameter.data_ptr() for parameter in model.parameters()]
    run(model, ckpt_path=str(training[0] / "*.ckpt"), untrained=True)
    assert differences(before, dict(model.state_dict())) == []
    assert [parameter.data_ptr() for parameter in model.parameters()] == where
    assert model._trainer is None


class Uncopyable(TensorDataset):
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("a data set is no part of a model")


class Nested(Classifier):
    """A LightningModule in another knows the trainer too; and outputs are left where everyone can see them."""

    def __init__(self) -> None:
        super().__init__(Classifier(mlp(inputs=16, width=12, depth=1)))
        self.last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x)
        return self.last  # type: ignore[no-any-return]


def test_neither_a_trainer_nor_a_graph_is_copied_with_the_model(tmp_path: Path) -> None:
    model = Nested()
    data = DataLoader(Uncopyable(*BATCHES[0].dataset.tensors), 16)  # type: ignore[attr-defined]
    trainer = Trainer(**QUIET, max_epochs=1, default_root_dir=tmp_path)
    trainer.fit(model, data)
    assert isinstance(model.net, Classifier)
    known = model._trainer, model.net._trainer
    assert known == (trainer, trainer)
    path = checkpoint_of(model, tmp_path / "nested.ckpt")
    last = model(next(iter(data))[0])
    assert errors(run(model, ckpt_path=path)) == errors(run(model))
    assert (model._trainer, model.net._trainer) == known
    assert model.last is last
    assert last.grad_fn is not None


def test_plain_weights_are_loaded_into_a_plain_module(tmp_path: Path) -> None:
    nets = [small(seed).net for seed in (4, 5)]
    torch.save(nets[0].state_dict(), tmp_path / "new.pt")
    torch.save(nets[0].state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    expected = errors(run(nets[0], num_classes=10))
    for name in ("new.pt", "old.pt"):
        report = run(nets[1], num_classes=10, ckpt_path=tmp_path / name)
        assert errors(report) == expected != errors(run(nets[1], num_classes=10))


def test_plain_weights_that_do_not_say_when_they_are_from_are_all_there(tmp_path: Path) -> None:
    models = [small(seed) for seed in (4, 5)]
    for model, name in zip(models, "ab", strict=True):
        torch.save(model.net.state_dict(), tmp_path / name)
    report = run(small().net, num_classes=10, ckpt_path=[tmp_path / "a", tmp_path / "b"], untrained=True)
    assert list(networks(report)) == ["untrained", str(tmp_path / "a"), str(tmp_path / "b")]
    assert len({(row["epoch"], row["step"]) for row in report.rows}) == 3
    for model, name in zip(models, "ab", strict=True):
        assert errors(report, network=str(tmp_path / name)) == errors(run(model))


def test_no_checkpoint_takes_the_place_of_another_of_the_same_step(tmp_path: Path) -> None:
    paths = [good(tmp_path, "one.ckpt"), checkpoint_of(small(seed=5), tmp_path / "other.ckpt", global_step=5)]
    report = run(small(), ckpt_path=paths)
    assert errors(report, network=str(paths[0])) == errors(run(small(seed=4)))
    assert errors(report, network=str(paths[1])) == []
    assert f"{paths[1]} is of the same epoch and step as {paths[0]}: left out" in report.notes


def test_names_that_compiling_leaves_in_a_checkpoint_do_not_matter(tmp_path: Path) -> None:
    model = small(seed=4)
    weights = {name.replace("net.", "net._orig_mod."): tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": weights}, tmp_path / "compiled.ckpt")
    assert errors(run(small(seed=5), ckpt_path=tmp_path / "compiled.ckpt")) == errors(run(model))


def test_what_a_model_does_when_it_is_loaded_is_done(tmp_path: Path) -> None:
    class Renamed(Classifier):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {checkpoint["prefix"] + name[3:]: state[name] for name in state}

    model = small(seed=4)
    weights = {name.replace("net.", "old."): tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": weights, "prefix": "net"}, tmp_path / "renamed.ckpt")
    torch.save({"state_dict": weights}, tmp_path / "without.ckpt")
    other = Renamed(small(seed=5).net)
    report = run(other, ckpt_path=str(tmp_path / "*.ckpt"))
    assert errors(report) == errors(run(model))
    assert "without.ckpt cannot be loaded: on_load_checkpoint raised KeyError: 'prefix'" in str(report.notes)


# What is said of those that fail


def good(folder: Path, name: str = "good.ckpt", step: int = 5) -> Path:
    return checkpoint_of(small(seed=4), folder / name, global_step=step)


def damaged(folder: Path) -> Path:
    content = good(folder, "damaged.ckpt").read_bytes()
    (folder / "damaged.ckpt").write_bytes(content[: len(content) // 2])
    return folder / "damaged.ckpt"


def empty(folder: Path) -> Path:
    (folder / "empty.ckpt").write_bytes(b"")
    return folder / "empty.ckpt"


def text(folder: Path) -> Path:
    (folder / "text.ckpt").write_text("<html>404</html>")
    return folder / "text.ckpt"


def a_list(folder: Path) -> Path:
    torch.save([1, 2], folder / "list.ckpt")
    return folder / "list.ckpt"


def deeper(folder: Path) -> Path:
    return checkpoint_of(Classifier(mlp(inputs=16, width=12, depth=3)), folder / "deeper.ckpt")


def wider(folder: Path) -> Path:
    return checkpoint_of(Classifier(mlp(inputs=16, width=13, depth=1)), folder / "wider.ckpt")


def another(folder: Path) -> Path:
    return checkpoint_of(Classifier(convnet(width=4)), folder / "another.ckpt")


def with_an_object(folder: Path) -> Path:
    return checkpoint_of(small(seed=4), folder / "object.ckpt", hyper_parameters=Namespace(width=12))


BAD: dict[str, tuple[Any, str]] = {
    "damaged": (damaged, "damaged.ckpt cannot be read: RuntimeError: "),
    "empty": (empty, "empty.ckpt cannot be read: EOFError: "),
    "text": (text, "text.ckpt is no checkpoint$"),
    "list": (a_list, "list.ckpt is no checkpoint: it holds a list without any weights"),
    "deeper": (deeper, "another architecture than Classifier; unexpected: net.5.weight, .* and 1 more; .*net.3.weight"),
    "wider": (wider, r"another architecture .* of another shape: net.1.weight \[13, 16\], not \[12, 16\], net.1.bias"),
    "another": (another, r"another architecture .*missing: net.3.weight, net.3.bias; unexpected: net.0.weight"),
    "object": (
        with_an_object,
        r"more than tensors and plain types \(argparse.Namespace\): weights_only=False loads it",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_checkpoint_that_cannot_be_probed_is_told_of_and_the_others_go_on(case: str, tmp_path: Path) -> None:
    make, message = BAD[case]
    bad = make(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        run(small(), ckpt_path=bad)
    paths = [good(tmp_path), bad, good(tmp_path, "later.ckpt", 10)]
    trainer = Trainer(**QUIET)
    with pytest.warns(UserWarning, match=f"probe: .*{bad.name}"):
        report = probe(small(), *BATCHES, ckpt_path=paths, trainer=trainer)
    assert networks(report) == {str(paths[0]): (0, 5), str(paths[2]): (0, 10)}
    (note,) = (note for note in report.notes if bad.name in note)
    with pytest.raises(CheckpointError, match=message):
        raise CheckpointError(note)


def test_a_model_that_is_not_strict_takes_what_fits(tmp_path: Path) -> None:
    model, other = small(seed=5), small(seed=4)
    weights = other.net[1].state_dict()  # type: ignore[index]
    torch.save(
        {"net.1.weight": weights["weight"], "net.1.bias": weights["bias"], "more": torch.ones(1)}, tmp_path / "a"
    )
    with pytest.raises(CheckpointError, match=r"missing: net.3.weight, net.3.bias; unexpected: more"):
        run(model, ckpt_path=tmp_path / "a")
    model.strict_loading = False
    report = run(model, ckpt_path=tmp_path / "a")
    assert errors(report, layer="net.1") == errors(run(other), layer="net.1")
    assert errors(report, layer="net.3") != errors(run(other), layer="net.3")
    with pytest.raises(CheckpointError, match=r"of another shape: net\.1\.weight"):
        run(model, ckpt_path=wider(tmp_path))


def test_what_a_checkpoint_leaves_out_is_the_models_own(tmp_path: Path) -> None:
    model, heads = small(seed=5), [small(seed).net[3] for seed in (6, 7)]  # type: ignore[index]
    model.strict_loading = False
    expected = []
    for step, head in enumerate(heads, 1):
        weights = {f"net.3.{name}": tensor for name, tensor in head.state_dict().items()}
        torch.save({"state_dict": weights, "epoch": 0, "global_step": step}, tmp_path / f"{step}.ckpt")
        whole = small(seed=5)
        whole.load_state_dict(weights, strict=False)
        expected.append(errors(run(whole)))
    # A network of which nothing is left goes before them.
    report = run(model, ckpt_path=str(tmp_path / "*.ckpt"), untrained=True)
    assert [errors(report, step=step) for step in (1, 2)] == expected
    assert errors(report, step=0, layer="net.1") != errors(report, step=1, layer="net.1")


def test_objects_are_loaded_where_that_is_allowed(tmp_path: Path) -> None:
    report = run(small(seed=5), ckpt_path=with_an_object(tmp_path), weights_only=False)
    assert errors(report) == errors(run(small(seed=4)))


def test_what_is_not_there_is_told_with_what_is(tmp_path: Path) -> None:
    path = good(tmp_path, "epoch=1-step=5.ckpt")
    (tmp_path / "folder.ckpt").mkdir()
    for missing in ("epoch=1-step=6.ckpt", "*.pt", "no folder/*.ckpt", "folder.ckpt"):
        with pytest.raises(FileNotFoundError) as told:
            run(small(), ckpt_path=[path, tmp_path / missing])
        assert f"ckpt_path: no checkpoint {str(tmp_path / missing)!r}" in str(told.value)
        assert str(path) in str(told.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"under .*empty there is none"):
        run(small(), ckpt_path=tmp_path / "empty" / "last.ckpt")


def test_a_name_with_brackets_is_a_file_first(tmp_path: Path) -> None:
    path = good(tmp_path, "val[0].ckpt")
    assert find_checkpoints(str(path)) == [path]
    assert find_checkpoints([str(path), tmp_path / "*.ckpt"]) == [path]


def test_a_link_is_the_file_that_it_leads_to(tmp_path: Path) -> None:
    path = good(tmp_path)
    try:
        (tmp_path / "last.ckpt").symlink_to(path)
    except OSError:
        pytest.skip("no links here")
    assert find_checkpoints(tmp_path / "*.ckpt") == [path]
    assert find_checkpoints(tmp_path / "last.ckpt") == [tmp_path / "last.ckpt"]


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_keeps_what_was_done_and_names_what_was_not(tmp_path: Path) -> None:
    paths = [good(tmp_path, f"{step}.ckpt", step) for step in (5, 10, 15)]
    calls: list[int] = []

    class Interrupted(Classifier):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            calls.append(batch_idx)
            if len(calls) == 11:  # five batches of training, four of validation, then of the next network
                signal.raise_signal(signal.SIGINT)
            self(batch[0])

    model, handler = Interrupted(small().net), signal.getsignal(signal.SIGINT)
    report = run(model, ckpt_path=paths)
    assert networks(report) == {str(paths[0]): (0, 5)}
    assert errors(report) == errors(run(small(seed=4)))
    assert report.notes.count(f"interrupted; not probed: {paths[1]}, {paths[2]}") == 1
    assert signal.getsignal(signal.SIGINT) is handler
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_exception_in_a_later_checkpoint_does_not_lose_the_earlier_ones(tmp_path: Path) -> None:
    class Overflowing(Classifier):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            if not all(parameter.isfinite().all() for parameter in self.parameters()):
                raise ArithmeticError("no number")
            super().validation_step(batch, batch_idx, dataloader_idx)

    seed_everything(4, verbose=False)
    model = Overflowing(mlp(inputs=16, width=12, depth=1))
    paths = [checkpoint_of(model, tmp_path / "first.ckpt", global_step=5)]
    bad = Classifier(mlp(inputs=16, width=12, depth=1))
    nn.init.constant_(next(bad.parameters()), float("nan"))
    paths += [checkpoint_of(bad, tmp_path / "second.ckpt", global_step=6)]
    report = run(model, ckpt_path=paths)
    assert errors(report, network=str(paths[0])) == errors(run(model))
    assert f"{paths[1]} is not probed: ArithmeticError: no number" in report.notes
    with pytest.raises(ArithmeticError, match="no number"):
        run(model, ckpt_path=paths[1])
