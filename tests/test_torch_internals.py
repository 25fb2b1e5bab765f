"""What torch and Lightning do not promise to keep: that it is there, and what is lost without it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from faults import probes_of, run, undisturbed
from fits import make_trainer, small
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import launchers
from networks import Classifier, convnet, loader
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torchmetrics import MeanMetric

from lightning_probes import LinearProbeCallback, probe
from lightning_probes.network import torch_internals
from lightning_probes.network.layers import select_layers
from lightning_probes.network.torch_internals import (
    OperationMode,
    compiled_parts,
    is_reshaped,
    origin_of,
    original_of,
)

PACKAGE = Path(__file__).parent.parent / "lightning_probes"

OWN = ("self", "cls", "probes")


def private_names(path: Path) -> set[str]:
    """Attributes and imports of others that begin with an underscore."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr):
            owner = ast.unparse(node.value)
            if owner not in OWN:
                found.add(f"{owner}.{node.attr}")
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("lightning_probes"):
            names = [*(node.module or "").split("."), *(name.name for name in node.names)]
            found |= {name for name in names if re.match(r"_[a-z]", name) and name != "__future__"}
    return found


def test_nothing_private_of_others_is_used_anywhere_else() -> None:
    elsewhere = {
        path.relative_to(PACKAGE).as_posix(): names
        for path in PACKAGE.rglob("*.py")
        if path.name != "torch_internals.py" and (names := private_names(path))
    }
    assert elsewhere == {
        "callback.py": {"callback._logs"},  # of another callback of the same class
        "network/batches.py": {"value._asdict"},  # documented, so that it cannot be a field's name
        # Only a subclass can override them; without them `--untrained` needs a value, and the first of several
        # checkpoints gives no hyperparameters.
        "cli.py": {"super()._prepare_subcommand_parser", "super()._parse_ckpt_path", "parser._actions"},
    }


# What is there


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (torch._C, "_current_graph_task_id"),
        (torch._dynamo, "OptimizedModule"),
        (torch._dynamo.eval_frame, "skip_code"),
        (torch.Tensor, "_version"),
        (torch.utils, "_pytree"),
        (torch.utils, "_python_dispatch"),
        (torch.ops.aten.add.Tensor, "_schema"),
        (torch._dynamo.eval_frame, "cached_backends"),
        (torch.utils._pytree, "register_pytree_node"),
        (torch.zeros(1, requires_grad=True).exp().grad_fn, "_sequence_nr"),
        (nn.modules.loss, "_Loss"),
        (nn.modules.dropout, "_DropoutNd"),
        (nn.Module, "_compiled_call_impl"),
        (loader(), "_iterator"),
        (FSDPModule, "reshard"),
        (FSDPModule, "set_reshard_after_backward"),
        (launchers, "_MultiProcessingLauncher"),
        (LightningModule(), "_trainer"),
        (LightningModule(), "_compiler_ctx"),
        (Trainer(logger=False, enable_checkpointing=False).fit_loop, "restarted_mid_epoch"),
        (Trainer(logger=False, enable_checkpointing=False).fit_loop.epoch_loop, "restarted_on_train_batch_end"),
        (Trainer(logger=False, enable_checkpointing=False).fit_loop.epoch_loop, "_batches_that_stepped"),
        (LightningCLI, "_prepare_subcommand_parser"),
        (LightningCLI, "_parse_ckpt_path"),
        (TQDMProgressBar(), "_train_progress_bar"),
        (TQDMProgressBar(), "_val_progress_bar"),
        (TQDMProgressBar(), "_predict_progress_bar"),
        (RichProgressBar(), "_init_progress"),
        (RichProgressBar(), "_stop_progress"),
        (RichProgressBar(), "_progress_stopped"),
        (MeanMetric(), "_reductions"),
        (MeanMetric(), "_update_count"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_this_version_has_it(owner: Any, name: str) -> None:
    assert hasattr(owner, name)


def test_this_version_has_the_shape_of_a_live_display() -> None:
    from rich.live import Live

    assert hasattr(Live()._live_render, "_shape")


def test_wrappers_hold_what_they_wrap() -> None:
    net = nn.Linear(2, 2)
    wrapped = torch.compile(net, backend="eager")
    assert original_of(wrapped) is net  # type: ignore[arg-type]
    assert original_of(net) is None
    assert {"_forward_hooks", "_forward_pre_hooks", "_backward_hooks"} <= torch_internals.HOOK_ATTRIBUTES


def test_autograd_tells_copies_and_shapes_from_values_that_were_computed() -> None:
    x = torch.randn(2, 3, 4, requires_grad=True).exp().to(memory_format=torch.contiguous_format)
    origin = origin_of(x)
    assert origin is not None
    for same in (x, x.flatten(1), x.reshape(6, 4), x.clone(), x[None].squeeze(0), x.unsqueeze(1).flatten()):
        assert is_reshaped(same, origin)
    for other in (x * 1, x.mT, x.mT.reshape(2, 12), x[:1], x.exp(), x.detach(), torch.stack([x, x]).view(4, 3, 4)):
        assert not is_reshaped(other, origin)
    parts = x.unbind()
    assert origin_of(parts[0]) != origin_of(parts[1])
    assert origin_of(x.detach()) is None


# What is lost without it


def test_without_the_numbers_of_autograd_a_copy_counts_as_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, requires_grad=True).exp()
    origin = origin_of(x)
    assert origin is not None
    monkeypatch.setattr(torch_internals, "_origin", lambda node, output: None)
    assert origin_of(x) is None
    assert not is_reshaped(x.clone(), origin)


def test_without_the_class_of_wrappers_they_are_known_by_what_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    net = convnet()
    model = Classifier(torch.compile(net, backend="eager"))  # type: ignore[arg-type]
    expected = compiled_parts(model)
    monkeypatch.delattr(torch._dynamo, "OptimizedModule")
    assert original_of(model.net) is net
    assert original_of(net) is None
    assert compiled_parts(model) == expected
    assert expected == ([], {id(module) for module in net.modules()})


def test_without_the_classes_of_losses_and_dropout_their_names_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_probes.network import layers

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Dropout2d())
            self.loss = nn.CrossEntropyLoss()

    known = tuple(kind for kind in layers._LEFT_OUT if kind not in torch_internals.LOSSES + torch_internals.DROPOUTS)
    assert len(known) < len(layers._LEFT_OUT)
    expected = select_layers(Model())[0]
    monkeypatch.setattr(layers, "_LEFT_OUT", known)
    assert list(select_layers(Model())[0]) == list(expected) == ["net.0"]


@pytest.mark.parametrize("name", ["convolutions", "MLP, online"])
def test_without_the_graph_task_a_run_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_current_graph_task_id")
    assert run(name, probes_of(name)).report == undisturbed(name).report


def test_without_the_count_of_steps_rows_have_no_logged_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(trainer: Any) -> None:
        return None

    monkeypatch.setattr("lightning_probes.training.schedule.batches_that_stepped", without)
    probes, logger = LinearProbeCallback("net.1"), CSVLogger(tmp_path)
    make_trainer(tmp_path, probes, max_epochs=1, logger=logger).fit(small(), loader(32), loader(32))
    assert {row["logged_step"] for row in probes.report.rows} == {None}
    assert torch_internals.batches_that_stepped(SimpleNamespace(fit_loop=SimpleNamespace(epoch_loop=None))) is None
    assert torch_internals.was_restarted(SimpleNamespace(fit_loop=SimpleNamespace(epoch_loop=None))) == (False, False)


def test_without_the_launcher_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp_spawn", logger=False, enable_checkpointing=False)
    assert torch_internals.starts_processes(trainer)
    monkeypatch.delattr(launchers, "_MultiProcessingLauncher")
    assert not torch_internals.starts_processes(trainer)


def test_without_versions_and_skipping_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bare:
        def is_inference(self) -> bool:
            return False

    bare: Any = Bare()
    assert torch_internals.version_of(bare) == 0
    assert torch_internals.version_of(torch.zeros(2).add_(1)) == 1
    monkeypatch.delattr(torch._dynamo.eval_frame, "skip_code")

    def hook() -> None: ...

    assert torch_internals.part_of_a_graph(hook) is hook


def test_a_model_with_a_trainer_is_copied_without_it(tmp_path: Path) -> None:
    model = small()
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(model, loader(32))
    with torch_internals.without_trainers(model):
        assert torch_internals.trainer_of(model) is None
    assert torch_internals.trainer_of(model) is trainer
    assert torch_internals.trainer_of(nn.Linear(1, 1)) is None
    assert probe(model, loader(64), loader(32), untrained=True).rows


def test_a_bar_whose_parts_are_gone_shows_no_fit_and_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(callback: Any) -> Any:
        raise AttributeError("_train_progress_bar")

    monkeypatch.setattr("lightning_probes.progress.tqdm_lines", gone)
    bar: Any = TQDMProgressBar()
    probes = LinearProbeCallback("net.1")
    trainer = make_trainer(tmp_path, probes, bar, max_epochs=1, enable_progress_bar=True)
    trainer.fit(small(), loader(32), loader(32))
    assert probes.report.rows


def test_a_method_that_is_no_override_is_taken_for_none() -> None:
    from lightning.pytorch.utilities.model_helpers import is_overridden

    assert not is_overridden("state_dict", LinearProbeCallback(), parent=Callback)
    assert is_overridden("load_state_dict", LinearProbeCallback(), parent=Callback)


def test_every_operation_is_followed_and_none_is_changed() -> None:
    seen: list[str] = []
    mode = OperationMode(lambda name, *_: seen.append(name))
    x = torch.randn(3, 4)
    expected = (x * 2 + 1).flip(0)
    mode.start()
    try:
        found = (x * 2 + 1).flip(0)
    finally:
        mode.stop()
    (x * 2).sum()
    assert torch.equal(found, expected)
    assert seen == ["aten::mul", "aten::add", "aten::flip"]


def test_without_the_mode_contents_and_shapes_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_internals, "_DispatchMode", None)
    assert not OperationMode(lambda *_: None).is_known
    probes = probes_of("convolutions")
    run("convolutions", probes)
    assert {row["layer"] for row in probes.report.rows} > {"input"}
    assert not any(note.startswith("rows") for note in probes.report.notes)


def test_it_is_known_whether_anything_was_compiled() -> None:
    code = """
        import torch
        from lightning_probes.network.torch_internals import has_compiled
        torch.compiler.disable(lambda: None)
        assert not has_compiled()
        torch.compile(lambda x: x)
        assert has_compiled()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
