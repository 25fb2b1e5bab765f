"""A layer that is called several times in a step, or again, or under two names: what counts, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from networks import QUIET, Classifier, images, loader
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_probes import LinearProbeCallback, probe
from lightning_probes.network.hooks import ActivationRecorder
from lightning_probes.network.pooling import Reducer
from lightning_probes.options import Calls

CALLS = pytest.mark.parametrize("calls", ["last", "first", "mean"])


def recorder(layer: nn.Module, calls: Calls) -> ActivationRecorder:
    made = ActivationRecorder(Reducer("pool", 64), calls)
    made.attach({"layer": layer})
    return made


@CALLS
@pytest.mark.parametrize("is_lent", [False, True])
def test_the_last_the_first_or_the_mean_of_all_calls_that_fit(calls: Calls, is_lent: bool) -> None:
    layer = nn.Linear(3, 5)
    found = recorder(layer, calls)
    memory = torch.full((4, 5), 7.0)
    for _ in range(2):  # nothing of a step is left for the next
        if is_lent:
            found.memory = {"layer": memory}
        found.start(4)
        x = torch.randn(3, 4, 3)
        outs = [layer(x[i]) for i in range(3)]
        layer(torch.randn(7, 3))
        expected = {"last": outs[2], "first": outs[0], "mean": torch.stack(outs).mean(dim=0)}[calls]
        features = found.stop().features["layer"]
        torch.testing.assert_close(features, expected.detach())
        assert (features.data_ptr() == memory.data_ptr()) == is_lent


@pytest.mark.parametrize("given", ["second", None, 1])
def test_another_word_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=rf"calls: expected 'first', 'last' or 'mean', found {given!r}"):
        LinearProbeCallback(calls=given)


class Counted(nn.Module):
    """Calls a body several times, and says what each way to count them should see."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.mean = nn.Identity(), nn.Identity(), nn.Identity()
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        outs = self.outs(x)
        for module, out in ((self.first, outs[0]), (self.last, outs[-1]), (self.mean, torch.stack(outs).mean(dim=0))):
            module(out)
        return self.head(sum(outs))  # type: ignore[no-any-return]

    def outs(self, x: Tensor) -> list[Tensor]:
        raise NotImplementedError


class Recurrent(Counted):
    """The rows of an image one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.RNNCell(8, 12)

    def outs(self, x: Tensor) -> list[Tensor]:
        states = [self.body(x[:, 0, 0])]
        for row in x[:, 0, 1:].unbind(dim=1):
            states.append(self.body(row, states[-1]))
        return states


class TwoViews(Counted):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh())

    def outs(self, x: Tensor) -> list[Tensor]:
        return [self.body(x), self.body(x.flip(3))]


def fit(model: Classifier, *probes: LinearProbeCallback) -> dict[tuple[Any, ...], float]:
    """What the first callback reports."""
    Trainer(**QUIET, max_epochs=2, callbacks=list(probes)).fit(model, loader(), loader(32, seed=1))
    return values(probes[0].report) if probes else {}


def values(report: Any, layer: str | None = None) -> dict[tuple[Any, ...], float]:
    rows = report.rows if layer is None else report.select(layer=layer)
    keys = ("stage", "epoch", "metric") if layer is not None else ("layer", "stage", "epoch", "metric")
    return {tuple(row[key] for key in keys): row["value"] for row in rows}


def made(network: Callable[[], nn.Module], model: Callable[[nn.Module], Classifier] = Classifier) -> Classifier:
    seed_everything(0, verbose=False)
    return model(network())


@CALLS
@pytest.mark.parametrize("network", [Recurrent, TwoViews])
def test_a_callback_counts_the_calls_that_it_is_told_to(network: Any, calls: Calls) -> None:
    probes = LinearProbeCallback(["net.body", f"net.{calls}"], calls=calls, log_metrics=["lag"])
    fit(made(network), probes)
    found, expected = (values(probes.report, f"net.{name}") for name in ("body", calls))
    # Means are rounded in two ways, and Adam makes more of it: probes trained along may differ in one of 32 samples.
    off = {key: 1 / 32 if key[2] == "lag" and calls == "mean" else 1e-4 for key in expected}
    assert found == {key: pytest.approx(value, rel=1e-4, abs=off[key]) for key, value in expected.items()}
    assert {epoch for _, epoch, _ in found} == {0, 1, 2}
    assert {row["fitted_on"]["data"] for row in probes.report.rows} == {"train"}


@CALLS
def test_probe_counts_the_calls_that_it_is_told_to(calls: Calls) -> None:
    report = probe(
        made(TwoViews),
        loader(),
        loader(32, seed=1),
        layers=["net.body", f"net.{calls}"],
        calls=calls,
        trainer=Trainer(**QUIET),
    )
    found, expected = (values(report, f"net.{name}") for name in ("body", calls))
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)


class Contrastive(Classifier):
    """Two forward passes in one step, of two views that are in the batch."""

    views: tuple[int, ...] = (0, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return torch.stack([F.cross_entropy(out, batch[1]) for out in self.seen(batch)]).sum()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen(batch)

    def seen(self, batch: Any) -> list[Tensor]:
        return [self(batch[view]) for view in self.views]


class FirstView(Contrastive):
    views = (0,)


class SecondView(Contrastive):
    views = (2,)


class MeanView(Contrastive):
    def seen(self, batch: Any) -> list[Tensor]:
        return [self((batch[0] + batch[2]) / 2)]


def two_views(samples: int, seed: int) -> DataLoader[Any]:
    x, y = images(samples, seed=seed).tensors
    return DataLoader(TensorDataset(x, y, x.flip(3)), batch_size=16)


def seen_by(model: Callable[[nn.Module], Classifier], **options: Any) -> dict[tuple[Any, ...], float]:
    """What is reported of the network; not trained, or it would be trained on what it sees."""
    contrastive, probes = made(Flat, model), LinearProbeCallback("net.*", input=None, **options)
    contrastive.learning_rate = 0.0
    trainer = Trainer(**QUIET, max_epochs=1, callbacks=[probes])
    trainer.fit(contrastive, two_views(96, 0), two_views(32, 1))
    assert probes.report.notes == []
    return values(probes.report)


@pytest.mark.parametrize(("calls", "one"), [("first", FirstView), ("last", SecondView)])
def test_of_two_forward_passes_in_a_step_one_counts(calls: Calls, one: Any) -> None:
    found = seen_by(Contrastive, calls=calls)
    assert found == seen_by(one)
    assert {layer for layer, *_ in found} == {f"net.{i}" for i in range(4)}


def test_of_two_forward_passes_in_a_step_the_mean_counts() -> None:
    found, expected = seen_by(Contrastive, calls="mean"), seen_by(MeanView)
    # Deeper, the features of the mean are not the mean of the features. Rounding can turn an online probe's answer.
    linear = {key: x for key, x in expected.items() if key[0] in ("net.0", "net.1") and key[-1] != "lag"}
    assert {key: found[key] for key in linear} == pytest.approx(linear, rel=1e-4, abs=1e-4)
    assert found != expected


class Flat(nn.Sequential):
    def __init__(self, *, is_in_place: bool = False) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(inplace=is_in_place), nn.Linear(12, 10))


class Checkpointed(Flat):
    use_reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        x = self[0](x).requires_grad_()
        hidden = checkpoint(lambda y: self[2](self[1](y)), x, use_reentrant=self.use_reentrant)
        return self[3](hidden)  # type: ignore[no-any-return]


class Reentrant(Checkpointed):
    use_reentrant = True


def check_harmless(network: Callable[[], nn.Module], probes: LinearProbeCallback) -> dict[tuple[Any, ...], float]:
    """Parameters are the same with the callback and without it; what it reported."""
    alone, probed = made(network), made(network)
    fit(alone)
    found = fit(probed, probes)
    state = probed.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in alone.state_dict().items())
    return found


@CALLS
@pytest.mark.parametrize("network", [Checkpointed, Reentrant])
def test_activation_checkpointing_changes_nothing(network: Callable[[], nn.Module], calls: Calls) -> None:
    found = check_harmless(network, LinearProbeCallback("net.*", calls=calls))
    assert found == fit(made(Flat), LinearProbeCallback("net.*", calls=calls))
    assert len({layer for layer, *_ in found}) == 5


def test_an_operation_in_place_after_a_layer_changes_nothing() -> None:
    found = check_harmless(lambda: Flat(is_in_place=True), LinearProbeCallback("net.*"))
    assert found == fit(made(Flat), LinearProbeCallback("net.*"))
    # Before and after it are not the same.
    before, after = ({key[1:]: value for key, value in found.items() if key[0] == f"net.{i}"} for i in (1, 2))
    assert before != after


class Tied(nn.Module):
    """One module under two names, and called under both."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.decoder = self.encoder
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.decoder(self.encoder(x.flatten(1, 2))).flatten(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("layers", [None, "net.**", ["net.encoder.*", "net.decoder.*", "net.head"]])
def test_a_module_under_two_names_is_probed_once_under_the_first(layers: Any) -> None:
    found = check_harmless(Tied, probes := LinearProbeCallback(layers))
    names = {layer for layer, *_ in found} - {"net", "net.encoder"}
    assert names == {"input", "net.encoder.0", "net.encoder.1", "net.head"}
    assert [probes._network.layers.count(layer) for layer in names] == [1] * 4


def test_a_module_under_two_names_can_be_named_by_either() -> None:
    one, other = (LinearProbeCallback(f"net.{name}.0", input=None) for name in ("encoder", "decoder"))
    found = [fit(made(Tied), probes) for probes in (one, other)]
    assert found[0] == found[1]
    assert {layer for layer, *_ in found[0]} == {"net.encoder.0"}


def test_hooks_are_gone_after_all_of_it() -> None:
    model = made(TwoViews)
    fit(model, LinearProbeCallback("net.**", calls="mean"))
    assert [len(module._forward_hooks) for module in model.modules()] == [0] * len(list(model.modules()))
    outs = [model(images(4).tensors[0]) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in pairwise(outs))
