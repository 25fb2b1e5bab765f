"""The probe itself, as a ``torch.nn.Linear``: its answers are those that were published, and it is a copy."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from networks import QUIET, Classifier, ViT, convnet, loader, mlp
from states import differences, rng_states
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_probes import LinearProbeCallback, ProbeReport, probe
from lightning_probes.network.arrangement import Arrangement, LayerReduction
from lightning_probes.network.pooling import Reducer
from lightning_probes.probes.linear import LayerProbe, folded
from lightning_probes.probes.standardise import standardise_
from lightning_probes.tasks.classification import Classification

TRAIN, VAL = loader(320), loader(200, seed=1)

Give = Callable[[str], LayerProbe]


def small() -> Classifier:
    seed_everything(3, verbose=False)
    return Classifier(mlp(depth=1))


def outputs(model: LightningModule, layer: str) -> tuple[Tensor, Tensor]:
    """What a layer puts out in eval mode for all of validation, and the labels."""
    x, y = VAL.dataset.tensors  # type: ignore[attr-defined]
    if layer == "input":
        return x, y
    found: list[Tensor] = []
    with torch.no_grad():
        handle = model.get_submodule(layer).register_forward_hook(lambda module, args, out: found.append(out.clone()))
        training = model.training
        model.eval()(x)
        model.train(training)
        handle.remove()
    return found[0], y


def check(give: Give, report: ProbeReport, model: LightningModule) -> None:
    """Every layer's probe errs on validation as the last point of the report says, but for rounding in one sample."""
    step = max(row["step"] for row in report.rows)
    rows = report.select(stage="val", metric="error", step=step)
    assert len(rows) > 2
    for row in rows:
        one = give(row["layer"])
        activation, y = outputs(model, row["layer"])
        features = one.reduction(activation)
        assert features.shape == (len(y), one.in_features) == (200, row["features"])
        wrong = (one(features).argmax(dim=1) != y).sum().item()
        assert abs(wrong - row["value"] * row["samples"]) <= 1.01, row["layer"]
        assert one.fitted_on == row["fitted_on"]
        assert (one.layer, one.training, one.weight.requires_grad) == (row["layer"], False, False)


NETWORKS: dict[str, tuple[Callable[[], LightningModule], dict[str, Any]]] = {
    "mlp": (small, {}),
    "maps, pooled": (lambda: Classifier(convnet(width=4)), {"max_features": 40}),
    "maps, a subset": (lambda: Classifier(convnet(width=4)), {"max_features": 40, "reduction": "subset"}),
    "tokens": (
        lambda: Classifier(ViT(width=16, depth=2, patch=2, size=8, channels=1)),
        {"tokens": {"net.blocks.*": "first"}, "reduction": "projection", "max_features": 10},
    ),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_its_answers_are_those_that_were_published(network: str, tmp_path: Path) -> None:
    make, arguments = NETWORKS[network]
    seed_everything(3, verbose=False)
    model, probes = make(), LinearProbeCallback(**arguments)
    saving = ModelCheckpoint(tmp_path, filename="{epoch}")
    trainer = Trainer(**{**QUIET, "enable_checkpointing": True}, max_epochs=1, callbacks=[probes, saving])
    trainer.fit(model, TRAIN, VAL)
    check(probes.probe, probes.report, model)
    report = probe(model, TRAIN, VAL, trainer=Trainer(**QUIET), **arguments)
    check(report.probe, report, model)
    # From a checkpoint, before any Trainer has seen the callback.
    restored = LinearProbeCallback(**arguments)
    path = next(tmp_path.glob("*.ckpt"))
    restored.load_state_dict(torch.load(path, weights_only=True)["callbacks"][restored.state_key])
    check(restored.probe, probes.report, model)
    with pytest.raises(RuntimeError, match="numbers only"):
        probes.report.probe("input")


def test_it_is_a_linear_layer_of_its_own_that_draws_nothing() -> None:
    report = probe(model := small(), TRAIN, VAL, trainer=Trainer(**QUIET))
    before = rng_states()
    one = report.probe("net.1")
    assert differences(rng_states(), before) == []
    assert isinstance(one, nn.Linear)
    assert repr(one) == "LayerProbe(layer='net.1', in_features=32, out_features=10, bias=True)"
    features = one.reduction(outputs(model, "net.1")[0])
    plain = nn.Linear(one.in_features, one.out_features)
    plain.load_state_dict(one.state_dict())
    assert torch.equal(plain(features), one(features))
    saved = io.BytesIO()
    torch.save(one.state_dict(), saved)
    saved.seek(0)
    other = report.probe("net.2")
    other.load_state_dict(torch.load(saved, weights_only=True))
    assert torch.equal(other(features), one(features))
    assert torch.equal(copy.deepcopy(one)(features), one(features))
    with torch.no_grad():
        one.weight.zero_()
    assert report.probe("net.1").weight.abs().sum() > 0


@pytest.mark.parametrize(("offset", "dtype"), [(5, torch.float32), (50_000, torch.float64)])
def test_standardisation_is_folded_in_and_constants_do_not_count(offset: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    # Beside the greater offset features vary by a few units in the last place of float32.
    x = torch.randn(50, 6, generator=generator) * torch.tensor([1.0, 3.0, 0.1, 1.0, 0.0, 1.0]) + offset
    mean, variance = x.mean(dim=0), x.var(dim=0, unbiased=False)
    variance[4] = 0
    weight, bias = torch.randn(3, 6, generator=generator), torch.randn(3, generator=generator)
    expected = standardise_(x.clone()[None], mean[None, None], variance[None, None])[0] @ weight.T + bias
    one = LayerProbe(
        *folded(Classification(3), weight, bias, mean, variance),
        "a",
        lambda activation, mask=None, index=None: activation,
        {},
    )
    assert (one.weight[:, 4] == 0).all()
    assert one.weight.dtype == dtype
    torch.testing.assert_close(one(x).float(), expected, rtol=1e-4, atol=1e-3)


def test_of_several_networks_it_is_that_of_the_last(tmp_path: Path) -> None:
    model = small()
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    Trainer(**{**QUIET, "enable_checkpointing": True}, max_epochs=2, callbacks=[saving]).fit(model, TRAIN, VAL)
    paths = [str(tmp_path / f"epoch={i}.ckpt") for i in (1, 0)]
    report = probe(model, TRAIN, VAL, ckpt_path=paths, untrained=True, trainer=Trainer(**QUIET))
    check(report.probe, report, model)
    file = tmp_path / "report.json"
    report.save(file)
    assert "_probes" not in file.read_text()
    loaded = ProbeReport.load(file)
    assert loaded == report
    with pytest.raises(
        RuntimeError, match=r"probe: this report has numbers only; the one that lightning_probes\.probe"
    ):
        loaded.probe("net.1")


def test_without_a_fit_it_is_the_probe_trained_along() -> None:
    model, probes = small(), LinearProbeCallback(fit_samples=0)
    Trainer(**QUIET, max_epochs=1, callbacks=[probes]).fit(model, TRAIN, VAL)
    restored = LinearProbeCallback(fit_samples=0)
    restored.load_state_dict(probes.state_dict())
    for one in (probes, restored):
        assert one.probe("net.1").fitted_on == {"data": "online", "samples": 320}
        check(one.probe, probes.report, model)


def test_of_a_cross_fitted_point_it_is_fitted_on_all_folds() -> None:
    class Bare(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return F.cross_entropy(F.linear(x.flatten(1), self.net[1].weight)[:, :10], y)  # type: ignore[index]

    seed_everything(3, verbose=False)
    model, probes = Bare(mlp(depth=1)), LinearProbeCallback(input=None)
    with pytest.warns(UserWarning, match="cross-fitted on validation"):
        Trainer(**QUIET, max_epochs=1, callbacks=[probes]).fit(model, TRAIN, VAL)
    (row,) = probes.report.select(layer="net.1", stage="train", metric="error")
    one = probes.probe("net.1")
    assert one.fitted_on == row["fitted_on"] == {"data": "val, cross-fitted", "samples": 200}
    activation, y = outputs(model, "net.1")
    wrong = (one(one.reduction(activation)).argmax(dim=1) != y).sum().item()
    assert abs(wrong - row["value"] * 200) <= 1.01  # on the samples that it was fitted on


def test_a_labelled_set_of_its_own_gives_its_probes() -> None:
    model, probes = small(), LinearProbeCallback(data=(TRAIN, VAL), num_classes=10)
    Trainer(**QUIET, max_epochs=1, callbacks=[probes]).fit(model, loader(64, seed=5))
    check(probes.probe, probes.report, model)


# What makes features of an activation


def reduction(arrangement: Arrangement, tokens: Any = "mean") -> LayerReduction:
    return LayerReduction("a", Reducer(), {3: "tokens"}, tokens, arrangement)


def test_rows_are_brought_to_their_samples() -> None:
    x = torch.randn(6, 5, 4)
    cases: list[tuple[Arrangement, Tensor]] = [
        (Arrangement(), x.mean(dim=1)),
        (Arrangement("rows", 1), x.mean(dim=0)),
        (Arrangement("blocks", each=2, at=(0, 4), of=(8, 4)), x.mean(dim=1)),
        (Arrangement("consecutive", each=3, is_mean=True), x.mean(dim=1).view(2, 3, 4).mean(dim=1)),
    ]
    for arrangement, expected in cases:
        torch.testing.assert_close(reduction(arrangement)(x), expected)
    index = torch.tensor([0, 0, 1, 1, 1, 1])
    nodes = x[:, 0]
    expected = torch.stack([nodes[:2].mean(dim=0), nodes[2:].mean(dim=0)])
    torch.testing.assert_close(reduction(Arrangement("indexed"))(nodes, index=index), expected)
    packed = pack_padded_sequence(x, torch.tensor([5, 2, 3, 1, 4, 5]), batch_first=True, enforce_sorted=False)
    lengths = [5, 2, 3, 1, 4, 5]
    means = torch.stack([row[:n].mean(dim=0) for row, n in zip(x, lengths, strict=True)])
    torch.testing.assert_close(reduction(Arrangement("packed"))(packed), means)
    nested = torch.nested.nested_tensor([row[:n] for row, n in zip(x, lengths, strict=True)])
    torch.testing.assert_close(reduction(Arrangement())(nested), means)
    last = torch.stack([row[n - 1] for row, n in zip(x, lengths, strict=True)])
    assert torch.equal(reduction(Arrangement(), "last")(nested), last)


def test_a_mask_that_does_not_fit_is_no_mask() -> None:
    x = torch.randn(6, 5, 4)
    with pytest.raises(ValueError, match=r"^mask: expected \(6, 5\), \(batch, tokens\) of a, found \(6, 4\)$"):
        reduction(Arrangement())(x, torch.ones(6, 4))
    with pytest.raises(ValueError, match=r"^mask: a has no tokens"):
        reduction(Arrangement())(x[:, 0], torch.ones(6, 5))
    with pytest.raises(ValueError, match=r"^index: expected the sample of each row"):
        reduction(Arrangement("indexed"))(x[:, 0])


# Mistakes


class Impatient(Callback):
    """Asks for probes during the first epoch."""

    def __init__(self, probes: LinearProbeCallback) -> None:
        self.probes = probes
        self.said: list[str] = []

    def on_train_batch_end(self, *args: Any) -> None:
        for layer in ("net.1", "net.9"):
            try:
                self.probes.probe(layer)
            except (RuntimeError, ValueError) as error:
                self.said.append(f"{type(error).__name__}: {error}")


WHEN = "probes are fitted when a point is published, first after epoch 2, at its validation if it has one"


def test_what_is_not_there_is_told() -> None:
    probes = LinearProbeCallback(every_n_epochs=2)
    with pytest.raises(RuntimeError) as early:
        probes.probe("net.1")
    assert str(early.value) == f"probe: before fit no layer is known, and 'net.1' has no probe: {WHEN}"
    impatient = Impatient(probes)
    trainer = Trainer(**QUIET, max_epochs=2, callbacks=[probes, impatient], limit_train_batches=1)
    trainer.fit(model := small(), TRAIN, VAL)
    assert impatient.said[0] == f"RuntimeError: probe: 'net.1' has no fitted probe yet: {WHEN}"
    assert impatient.said[1].startswith("ValueError: probe: no layer 'net.9' is probed; nearest: net.3, net.2, net.1")
    assert isinstance(probes.probe("net.1"), LayerProbe)
    report = probe(model, TRAIN, VAL, trainer=Trainer(**QUIET))
    with pytest.raises(ValueError, match=r"^probe: no layer 'net\.11' is probed; nearest: net\.1, "):
        report.probe("net.11")


def test_a_layer_that_was_set_aside_has_none() -> None:
    class Broken(nn.Tanh):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 0

    seed_everything(3, verbose=False)
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.ModuleDict({"a": Broken()})["a"]))
    probes = LinearProbeCallback()
    with pytest.warns(UserWarning, match="set aside"):
        Trainer(**QUIET, max_epochs=1, callbacks=[probes]).fit(model, TRAIN, VAL)
    assert probes.probe("input").in_features == 64
    with pytest.raises(ValueError, match=r"^probe: 'net\.2' has no probe: it was set aside, see report\.notes$"):
        probes.probe("net.2")
