"""``probe()`` leaves a model, a trainer and a process as it found them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from networks import QUIET, Classifier, FrozenBackbone, ViT, images, loader, mlp
from states import Contrast, Quirks, differences, rng_states
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Metric

from lightning_probes import ProbeReport, probe

BATCHES = loader(60, 16), loader(40, 16, seed=1)


def run(model: nn.Module, *args: Any, **arguments: Any) -> ProbeReport:
    return probe(model, *(args or BATCHES), **{"trainer": Trainer(**QUIET), **arguments})


def everything(model: nn.Module) -> dict[str, Any]:
    """All there is to a model and to the process that could have been changed, in copies."""
    modules = dict(model.named_modules())
    return {
        "parameters": {name: p.detach().clone() for name, p in model.named_parameters()},
        "where they are": [p.data_ptr() for p in model.parameters()],
        "gradients": {n: p.grad.clone() if p.grad is not None else None for n, p in model.named_parameters()},
        "requires grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
        "flags": {name: module.training for name, module in modules.items()},
        "hooks": {
            name: {key: len(value) for key, value in vars(module).items() if "hooks" in key and hasattr(value, "keys")}
            for name, module in modules.items()
        },
        "metrics": {
            name: {state: getattr(module, state).clone() for state in module._defaults} | {"n": module._update_count}
            for name, module in modules.items()
            if isinstance(module, Metric)
        },
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "steps": getattr(model, "steps", {}),
        "random states": rng_states(),
        "signal": str(signal.getsignal(signal.SIGINT)),
    }


MODELS: dict[str, Callable[[], LightningModule]] = {
    "frozen submodule and BatchNorm": FrozenBackbone,
    "queues, counts and a metric": Contrast,
    "states in odd places": Quirks,
    "transformer": lambda: Classifier(ViT(width=16, depth=1, size=8, channels=1)),
}


def trained(name: str, folder: Path) -> LightningModule:
    """After an epoch: with gradients, with a trainer, with submodules in eval mode."""
    seed_everything(3, verbose=False)
    model = MODELS[name]()
    Trainer(**QUIET, max_epochs=1, default_root_dir=folder).fit(model, *BATCHES)
    model.train()
    next(model.children()).eval()
    model(images(8).tensors[0]).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # an embedding with a greatest norm rewrites its weight the next time
    return model


@pytest.mark.parametrize("name", MODELS)
def test_nothing_in_the_model_changes(name: str, tmp_path: Path) -> None:
    model = trained(name, tmp_path)
    before, trainer = everything(model), model._trainer
    assert any(grad is not None for grad in before["gradients"].values())
    report = run(model, untrained=True)
    assert {row["network"] for row in report.rows} == {"untrained", "as given"}
    assert differences(before, everything(model)) == []
    assert model._trainer is trainer is not None


class Failing(Contrast):
    """Fails in the middle of a pass, in eval mode after it changed itself."""

    def __init__(self, at: int, error: type[BaseException] = RuntimeError) -> None:
        super().__init__()
        self.at, self.error = at, error

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)
        self.accuracy.update(self(batch[0]), batch[1])
        self.net.train()
        if self.steps["validation"] == self.at:
            raise self.error("on purpose")


# The training pass has four batches, that of validation three.
@pytest.mark.parametrize("at", [1, 3])
def test_nothing_changes_where_the_model_fails(at: int) -> None:
    seed_everything(3, verbose=False)
    model = Failing(at)
    before = everything(model)
    with pytest.raises(RuntimeError, match="on purpose"):
        run(model)
    assert differences(before, everything(model)) == []


def test_nothing_changes_where_a_loader_fails() -> None:
    class Broken(TensorDataset):
        def __getitem__(self, i: Any) -> Any:
            if i == 20:
                raise OSError("torn")
            return super().__getitem__(i)  # type: ignore[no-untyped-call]

    seed_everything(3, verbose=False)
    model = Contrast()
    before = everything(model)
    with pytest.raises(OSError, match="torn"):
        run(model, BATCHES[0], DataLoader(Broken(*images(40).tensors), 16))
    assert differences(before, everything(model)) == []


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_before_anything_is_done_is_passed_on_and_the_next_one_is_heard() -> None:
    model = Failing(2, KeyboardInterrupt)
    before, handler = everything(model), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(model)
    assert signal.getsignal(signal.SIGINT) is handler
    assert differences(before, everything(model)) == []
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_it_runs_beside_the_main_thread() -> None:
    found: list[Any] = []

    def beside() -> None:
        try:
            found.append(run(Classifier(mlp(depth=1))).rows)
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=beside)
    thread.start()
    thread.join()
    assert isinstance(found[0], list), found[0]


class Drawing(Classifier):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self(batch[0] + torch.randn_like(batch[0]))


def test_a_pass_that_draws_is_the_same_each_time() -> None:
    def shuffled() -> DataLoader[Any]:
        return DataLoader(images(60), 16, shuffle=True)

    model = Drawing(mlp(depth=1))
    one = run(model, shuffled(), BATCHES[1])
    torch.randn(3)
    assert run(model, shuffled(), BATCHES[1]).rows == one.rows


def test_half_precision_is_of_the_pass_alone(tmp_path: Path) -> None:
    model, seen = trained("frozen submodule and BatchNorm", tmp_path), set()
    assert isinstance(model, FrozenBackbone)
    model.backbone.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    before = everything(model)
    report = run(model, trainer=Trainer(**QUIET, precision="bf16-true"))
    assert seen == {torch.bfloat16}
    assert all(row["converged"] for row in report.rows)
    assert differences(before, everything(model)) == []


# The user's trainer


class Events(Callback):
    """Writes down whatever happens; every hook of a callback."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith(("on_", "setup", "teardown", "state_dict")):
            object.__getattribute__(self, "seen").append(name)
        return super().__getattribute__(name)


def test_a_users_trainer_keeps_its_callbacks_and_loggers_and_these_hear_nothing(tmp_path: Path) -> None:
    logger, events = CSVLogger(tmp_path), Events()
    options: dict[str, Any] = {**QUIET, "logger": logger, "enable_checkpointing": True}
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints")
    trainer = Trainer(**options, callbacks=[events, checkpoint], default_root_dir=tmp_path)
    callbacks, loggers = list(trainer.callbacks), list(trainer.loggers)  # type: ignore[attr-defined]
    events.seen.clear()
    run(Classifier(mlp(depth=1)), trainer=trainer)
    assert events.seen == []
    assert [id(one) for one in trainer.callbacks] == [id(one) for one in callbacks]  # type: ignore[attr-defined]
    assert [id(one) for one in trainer.loggers] == [id(one) for one in loggers]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError, match="on purpose"):
        run(Failing(2), trainer=trainer)
    assert events.seen == []
    assert [id(one) for one in trainer.callbacks] == [id(one) for one in callbacks]  # type: ignore[attr-defined]
    # They do hear of what is the trainer's own, afterwards as before.
    trainer.validate(Classifier(mlp(depth=1)), BATCHES[1], verbose=False)
    assert "on_validation_start" in events.seen
    assert "val_loss" in (Path(logger.log_dir) / "metrics.csv").read_text()


def test_a_trainer_that_fitted_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    def fitted(probed: bool) -> dict[str, Any]:
        seed_everything(3, verbose=False)
        model = Contrast()
        trainer = Trainer(**QUIET, max_epochs=1, default_root_dir=tmp_path)
        trainer.fit(model, *BATCHES)
        if probed:
            report = run(model, trainer=trainer)
            assert {(row["epoch"], row["step"]) for row in report.rows} == {(1, 4)}
            assert trainer.lightning_module is model
            assert model.trainer is trainer
        trainer.save_checkpoint(tmp_path / "now.ckpt")
        saved = torch.load(tmp_path / "now.ckpt", weights_only=True)
        trainer.fit_loop.max_epochs = 2
        trainer.fit(model, *BATCHES)
        return {
            "saved": [saved[key] for key in ("state_dict", "optimizer_states", "epoch", "global_step")],
            "weights": model.state_dict(),
            "random states": rng_states(),
            "point": (trainer.current_epoch, trainer.global_step),
            "steps": model.steps,
        }

    assert differences(fitted(False), fitted(True)) == []


def test_what_the_model_logs_goes_nowhere() -> None:
    class Logging(Classifier):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("by log", self(batch[0]).mean(), on_step=True, prog_bar=True)
            self.log_dict({"by log_dict": batch[0].mean()})

        def forward(self, x: Tensor) -> Tensor:
            self.log("in forward", 1.0)
            return super().forward(x)

    trainer = Trainer(**QUIET)
    assert run(Logging(mlp(depth=1)), trainer=trainer).rows
    assert (trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics) == ({}, {}, {})


def test_the_order_in_which_a_loader_will_give_its_data_next_is_what_it_would_have_been() -> None:
    generator = torch.Generator().manual_seed(5)
    shuffling = DataLoader(images(40, size=4), batch_size=8, shuffle=True, generator=generator)
    before = generator.get_state()
    probe(Classifier(mlp(inputs=16)), shuffling, shuffling, trainer=Trainer(**QUIET))
    assert torch.equal(generator.get_state(), before)
