"""Networks that build their modules late: in ``setup``, in ``configure_model``, lazily; and Fabric's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from networks import QUIET, Classifier, mlp
from states import differences
from test_checkpoints import BATCHES, errors, run, small
from torch import Tensor, nn

from lightning_probes import probe
from lightning_probes.checkpoints import CheckpointError


def net() -> nn.Sequential:
    return mlp(inputs=16, width=12, depth=1)


class Late(Classifier):
    """Builds its network when a Trainer begins."""

    def __init__(self, how: str) -> None:
        super().__init__(nn.Identity())
        del self.net
        self.how = how
        self.calls: list[str] = []

    def setup(self, stage: str) -> None:
        self.calls.append(f"setup {stage}")
        if self.how == "setup":  # Again and again, as many do.
            self.net = net()
        if self.how == "both":
            assert self.trainer is not None
            self.classes = 10

    def configure_model(self) -> None:
        self.calls.append("configure_model")
        if self.how == "configure_model" and not hasattr(self, "net"):
            self.net = net()
        if self.how == "both" and not hasattr(self, "net"):
            self.net = mlp(inputs=16, width=12, depth=1, classes=self.classes)


class Lazy(Classifier):
    def __init__(self, how: str = "") -> None:
        layers = [nn.Flatten(), nn.LazyLinear(12), nn.LeakyReLU(), nn.LazyBatchNorm1d(), nn.LazyLinear(10)]
        super().__init__(nn.Sequential(*layers))


class LateAndLazy(Late):
    def configure_model(self) -> None:
        self.calls.append("configure_model")
        if not hasattr(self, "net"):
            self.net = Lazy().net


WAYS = {"setup": Late, "configure_model": Late, "both": Late, "lazy": Lazy, "late and lazy": LateAndLazy}


def made(how: str) -> Any:
    seed_everything(4, verbose=False)
    return WAYS[how](how)


def trained(how: str, folder: Path, epochs: int = 2) -> tuple[Any, list[Path]]:
    """A model that a Trainer has trained, and its checkpoints."""
    model, paths = made(how), list[Path]()
    for epoch in range(1, epochs + 1):
        trainer = Trainer(**{**QUIET, "enable_checkpointing": True}, max_epochs=epoch, default_root_dir=folder)
        trainer.fit(model, *BATCHES, ckpt_path=paths[-1] if paths else None)
        paths.append(folder / f"{epoch}.ckpt")
        trainer.save_checkpoint(paths[-1])
    return model, paths


@pytest.mark.parametrize("how", WAYS)
def test_checkpoints_of_networks_that_are_built_late_are_probed(how: str, tmp_path: Path) -> None:
    model, paths = trained(how, tmp_path)
    untouched = made(how)
    before = torch.get_rng_state()
    report = run(untouched, ckpt_path=paths, layers="net.*")
    assert torch.equal(torch.get_rng_state(), before)
    assert errors(report, network=str(paths[1])) == errors(run(model, layers="net.*"))
    assert errors(report, network=str(paths[0])) != errors(report, network=str(paths[1]))
    assert getattr(untouched, "calls", []) == []
    assert hasattr(untouched, "net") == (how == "lazy")
    assert untouched._trainer is None


@pytest.mark.parametrize("how", ["setup", "configure_model", "both"])
def test_a_network_that_is_built_late_is_probed_as_a_trainer_would_find_it(how: str) -> None:
    model = made(how)
    report = run(model, layers="net.*")
    assert not hasattr(model, "net")
    # It has weights: they stay, whatever setup does.
    model.net = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert errors(run(model, layers="net.*")) == errors(run(Classifier(model.net), layers="net.*"))
    assert errors(report) != errors(run(model, layers="net.*"))
    assert differences(before, model.state_dict()) == []
    assert model.calls == []


class Planning(Late):
    """Plans its training in a setup that nothing but training can give what it asks for."""

    def setup(self, stage: str) -> None:
        raise RuntimeError("no plan")


@pytest.mark.parametrize("with_checkpoint", [False, True])
def test_a_network_that_its_setup_did_not_build_is_probed_without_it(with_checkpoint: bool, tmp_path: Path) -> None:
    seed_everything(4, verbose=False)
    model = Planning("configure_model")
    model.net = net()
    torch.save(model.state_dict(), tmp_path / "a.pt")
    arguments: dict[str, Any] = {"layers": "net.*", "ckpt_path": tmp_path / "a.pt" if with_checkpoint else None}
    report = run(model, **arguments)
    assert errors(report) == errors(run(Classifier(model.net), layers="net.*"))
    assert "setup of Planning raised RuntimeError: no plan; probed without it" in report.notes


class Held(Late):
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("too large for a copy")


def test_a_network_that_is_built_late_is_not_copied_unless_it_has_to_be() -> None:
    seed_everything(4, verbose=False)
    assert errors(run(Held("setup"), layers="net.*")) == errors(run(made("setup"), layers="net.*"))


def test_after_training_setup_is_not_called_again(tmp_path: Path) -> None:
    model, _ = trained("setup", tmp_path, 1)
    calls = list(model.calls)
    assert errors(run(model, layers="net.*")) == errors(run(Classifier(model.net), layers="net.*"))
    assert model.calls == calls


class WithLoaders(Late):
    """Needs its setup for its data too, and builds its network anew in each."""

    def train_dataloader(self) -> Any:
        return BATCHES[0]

    def val_dataloader(self) -> Any:
        return BATCHES[1]


def test_a_network_with_loaders_of_its_own_keeps_its_weights(tmp_path: Path) -> None:
    seed_everything(4, verbose=False)
    model = WithLoaders("setup")
    trainer = Trainer(**QUIET, max_epochs=1)
    trainer.fit(model)
    expected = errors(run(Classifier(model.net), layers="net.*"))
    assert errors(probe(model, layers="net.*", trainer=Trainer(**QUIET))) == expected
    torch.save({"state_dict": model.state_dict(), "epoch": 1, "global_step": 5}, tmp_path / "a.ckpt")
    late = probe(WithLoaders("setup"), layers="net.*", trainer=Trainer(**QUIET), ckpt_path=tmp_path / "a.ckpt")
    assert errors(late) == expected


def test_setup_finds_the_datamodule_set_up(tmp_path: Path) -> None:
    class Data(LightningDataModule):
        def setup(self, stage: str) -> None:
            self.inputs = 16

        def train_dataloader(self) -> Any:
            return BATCHES[0]

        def val_dataloader(self) -> Any:
            return BATCHES[1]

    class Sized(Classifier):
        def __init__(self) -> None:
            super().__init__(nn.Identity())

        def setup(self, stage: str) -> None:
            self.net = mlp(inputs=self.trainer.datamodule.inputs, width=12, depth=1)  # type: ignore[attr-defined]

    model = Sized()
    Trainer(**QUIET, max_epochs=1).fit(model, datamodule=Data())
    torch.save(model.state_dict(), tmp_path / "a.pt")
    arguments: dict[str, Any] = {"layers": "net.*", "datamodule": Data(), "trainer": Trainer(**QUIET)}
    assert errors(probe(Sized(), ckpt_path=tmp_path / "a.pt", **arguments)) == errors(probe(model, **arguments))


def test_a_checkpoint_of_another_network_is_still_told_of(tmp_path: Path) -> None:
    torch.save(mlp(inputs=16, width=13, depth=1).state_dict(), tmp_path / "a.pt")
    for how in ("setup", "lazy"):
        with pytest.raises(CheckpointError, match="another architecture"):
            run(made(how), ckpt_path=tmp_path / "a.pt")


@pytest.mark.parametrize("untrained", [False, True])
def test_without_a_checkpoint_lazy_parameters_have_no_shape(untrained: bool) -> None:
    model = Lazy()
    with pytest.raises(ValueError, match="parameters without a shape; run a batch through it first"):
        run(model, untrained=untrained)
    assert model(torch.zeros(2, 1, 4, 4)).shape == (2, 10)


# Checkpoints of Fabric and of parallel networks


def fabric_of(model: nn.Module) -> tuple[Fabric, Any]:
    fabric = Fabric(accelerator="cpu", devices=1)
    return fabric, fabric.setup(model)


FORMS: dict[str, Any] = {
    "fabric": lambda model, path: fabric_of(model)[0].save(path, {"model": fabric_of(model)[1], "step": 3}),
    "fabric with an optimiser": lambda model, path: torch.save(
        {
            "network": model.state_dict(),
            "optimizer": torch.optim.Adam(model.parameters()).state_dict(),
            "iteration": 3,
        },
        path,
    ),
    "forward module": lambda model, path: torch.save(
        {"model": {f"_forward_module.{name}": x for name, x in model.state_dict().items()}}, path
    ),
    "compiled in parallel": lambda model, path: torch.save(
        {f"module._orig_mod.{name}": x for name, x in model.state_dict().items()}, path
    ),
    "parallel": lambda model, path: torch.save(nn.DataParallel(model).state_dict(), path),
    "parallel in lightning": lambda model, path: torch.save(
        {"state_dict": nn.DataParallel(model).state_dict(), "epoch": 0, "global_step": 1}, path
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_checkpoints_of_other_tools_are_read(form: str, tmp_path: Path) -> None:
    model, other = small(4).net, small(5).net
    FORMS[form](model, tmp_path / "a.ckpt")
    expected = errors(run(model, num_classes=10))
    assert errors(run(other, num_classes=10, ckpt_path=tmp_path / "a.ckpt")) == expected
    assert errors(run(other, num_classes=10)) != expected


def test_of_several_state_dicts_none_is_guessed(tmp_path: Path) -> None:
    states = {"generator": small(4).net.state_dict(), "discriminator": small(5).net.state_dict()}
    torch.save(states, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="weights of one network, but several state dicts: generator, discrim"):
        run(small().net, num_classes=10, ckpt_path=tmp_path / "a.ckpt")


def test_a_network_whose_own_names_begin_with_module_keeps_them(tmp_path: Path) -> None:
    class Holder(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.module = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)  # type: ignore[no-any-return]

    one, other = Holder(small(4).net), Holder(small(5).net)
    torch.save(one.state_dict(), tmp_path / "a.pt")
    expected = errors(run(one, num_classes=10))
    assert errors(run(other, num_classes=10, ckpt_path=tmp_path / "a.pt")) == expected


@pytest.mark.parametrize("is_lightning", [False, True])
def test_a_network_that_fabric_has_set_up_is_probed(is_lightning: bool, tmp_path: Path) -> None:
    model = small(4)
    inner = model if is_lightning else model.net
    _, wrapped = fabric_of(inner)
    assert errors(run(wrapped, num_classes=10)) == errors(run(inner, num_classes=10))
    torch.save(inner.state_dict(), tmp_path / "a.pt")
    _, other = fabric_of(small(5) if is_lightning else small(5).net)
    expected = errors(run(inner, num_classes=10))
    assert errors(run(other, num_classes=10, ckpt_path=tmp_path / "a.pt")) == expected
