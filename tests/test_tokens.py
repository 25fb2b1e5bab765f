"""Which tokens become features: the mean, the first or the last, whatever the padding, in whatever container."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from networks import QUIET, Classifier, loader, mlp
from states import differences, rng_states
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader

from lightning_probes import LinearProbeCallback, ProbeReport, probe
from lightning_probes.network.arrangement import Arrangement, packed_ends
from lightning_probes.network.extractor import LayerExtractor
from lightning_probes.network.pairing import Pairing
from lightning_probes.network.pooling import Reducer, nested_ends, reduce
from lightning_probes.options import Tokens, checked

TOKENS, WIDTH = 9, 12
ENDS: tuple[Tokens, ...] = ("first", "last")


def by_hand(x: Tensor, mask: Tensor, which: str) -> Tensor:
    """One sample after another; each view has the mask of its batch, and nothing left is 0."""
    rows = [x[i][mask[i % len(mask)] != 0] for i in range(len(x))]
    return torch.stack([row[0 if which == "first" else -1] if len(row) else torch.zeros(x.shape[2]) for row in rows])


# One activation


@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("views", [1, 2])
def test_the_token_is_an_end_of_those_that_the_mask_leaves(which: Tokens, views: int) -> None:
    mask = torch.rand(6, TOKENS, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[0], mask[1], mask[2] = True, False, torch.arange(TOKENS) == 4
    x = torch.randn(6 * views, TOKENS, WIDTH)
    x[~mask.repeat(views, 1)] = torch.nan  # padding, whatever it is
    expected = by_hand(x, mask, which)
    out = torch.empty(6 * views, WIDTH)
    assert torch.equal(reduce(x, 4, mask=mask, tokens=which), expected)
    assert reduce(x, 4, mask=mask, tokens=which, out=out) is out
    assert torch.equal(out, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reduce(x.bfloat16(), 4, mask=mask, tokens=which), by_hand(x.bfloat16().float(), mask, which))


@pytest.mark.parametrize(("which", "place"), [("first", 0), ("last", -1)])
def test_without_a_mask_it_is_an_end_of_all_dimensions_in_order(which: Tokens, place: int) -> None:
    for shape in ((5, 7, 4), (5, 3, 7, 4), (5, 2, 3, 7, 4)):
        x = torch.randn(shape)
        found = reduce(x, 2, axes="tokens", tokens=which)
        assert torch.equal(found, x.flatten(1, -2)[:, place])
        x.zero_()
        assert found.abs().sum() > 0
    vector, image = torch.randn(5, 7), torch.randn(5, 3, 8, 8)
    assert torch.equal(reduce(vector, 4, tokens=which), vector)
    assert torch.equal(reduce(image, 27, tokens=which), reduce(image, 27))
    assert reduce(torch.zeros(2, 0, 4), 4, tokens=which).isnan().all()  # as the mean of nothing


@pytest.mark.parametrize("kind", ["subset", "projection"])
def test_a_draw_is_of_the_values_of_the_token(kind: Any) -> None:
    x, mask = torch.randn(3, 5, 20), torch.tensor([[0, 1, 1, 1, 0]] * 3).bool()
    reducer = Reducer(kind, 6)
    assert torch.equal(reducer("a", x, mask=mask, tokens="first"), reducer("a", x[:, 1]))
    assert torch.equal(reducer("a", x, mask=mask, tokens="last"), reducer("a", x[:, 3]))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize(("which", "place"), [("first", 0), ("last", -1)])
def test_each_component_of_a_nested_tensor_has_its_own_end(which: Tokens, place: int, layout: Any) -> None:
    for lengths, inner in (((3, 1, 0, 7), ()), ((2, 3), (4,)), ((0, 0), ())):
        parts = [torch.randn(n, *inner, 5) for n in lengths]
        found = nested_ends(torch.nested.nested_tensor(parts, layout=layout), which)
        expected = [part.flatten(0, -2)[place] if len(part) else torch.zeros(5) for part in parts]
        assert torch.equal(found, torch.stack(expected))


@pytest.mark.parametrize("lengths", [[4, 4, 4], [5, 3, 1], [1, 5, 2, 5, 3]])
def test_each_packed_sequence_has_its_own_end(lengths: list[int]) -> None:
    x = torch.randn(len(lengths), 5, 3)
    packed = pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=False)
    assert torch.equal(packed_ends(packed, "first"), x[:, 0])
    assert torch.equal(
        packed_ends(packed, "last"), torch.stack([row[n - 1] for row, n in zip(x, lengths, strict=True)])
    )
    if lengths == sorted(lengths, reverse=True):
        packed = pack_padded_sequence(x, torch.tensor(lengths), batch_first=True)
        assert torch.equal(packed_ends(packed, "first"), x[:, 0])


# Whole networks


class Encoder(nn.Module):
    """As BERT; in eval mode its blocks put out nested tensors, without the padding."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.blocks(x, src_key_padding_mask=mask == 0)[:, 0])  # type: ignore[no-any-return]


class Causal(nn.Module):
    """Each token knows itself and a little of those before."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({"layers": nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())})
        nn.init.eye_(self.blocks["layers"][0].weight)  # type: ignore[index]
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        before = (x * mask[..., None]).cumsum(dim=1) - x * mask[..., None]
        x = self.blocks["layers"](x + 0.01 * before)
        return self.head(x.mean(dim=1))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """Puts out packed sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({"layers": nn.LSTM(WIDTH, 16, batch_first=True)})
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, mask.sum(dim=1).cpu(), batch_first=True, enforce_sorted=False)
        _, (last, _) = self.blocks["layers"](packed)
        return self.head(last[0])  # type: ignore[no-any-return]


class Model(LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch["x"], batch["mask"]), batch["y"])

    def validation_step(self, batch: Any) -> None:
        self.training_step(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-3)


def batches(samples: int, place: str, padding: str = "right") -> DataLoader[Any]:
    """The label is written in the first or last token that counts; the others are loud, and padding is louder."""
    generator = torch.Generator().manual_seed(samples)
    y = torch.randint(2, (samples,), generator=generator)
    lengths = torch.randint(4, TOKENS + 1, (samples, 1), generator=generator)
    mask = torch.arange(TOKENS) < lengths
    mask = mask if padding == "right" else mask.flip(1)
    at = mask.int().argmax(dim=1) if place == "first" else TOKENS - 1 - mask.flip(1).int().argmax(dim=1)
    x = torch.randn(samples, TOKENS, WIDTH, generator=generator)
    x[torch.arange(samples), at, :4] = 3.0 * (2 * y[:, None] - 1) + torch.randn(samples, 4, generator=generator)
    x[..., :4] += (
        4 * torch.randn(samples, TOKENS, 1, generator=generator) * (torch.arange(TOKENS) != at[:, None])[..., None]
    )
    x = x + 50 * torch.randn(x.shape, generator=generator) * ~mask[..., None]
    rows = [{"x": a, "mask": b, "y": c} for a, b, c in zip(x, mask.long(), y, strict=True)]
    return DataLoader(rows, batch_size=40)  # type: ignore[arg-type]


READING: dict[str, Any] = {"input": "x", "target": "y", "token_mask": "mask", "num_classes": 2}

CASES: dict[str, tuple[Callable[[], nn.Module], Tokens, str, str, str]] = {
    "encoder": (Encoder, "first", "right", "net.blocks.layers.0", "first token"),
    "encoder, padded left": (Encoder, "first", "left", "net.blocks.layers.1", "first token"),
    "causal": (Causal, "last", "right", "net.blocks.layers", "last token of those that a mask leaves"),
    "causal, padded left": (Causal, "last", "left", "net.blocks.layers", "last token of those that a mask leaves"),
    "packed": (Recurrent, "last", "right", "net.blocks.layers", "last step of each sample"),
}


def make(net: Callable[[], nn.Module]) -> Model:
    seed_everything(5, verbose=False)
    return Model(net())


def errors(report: ProbeReport, layer: str) -> float:
    rows = report.select(layer=layer, stage="val", metric="error")
    return float(rows[-1]["value"])


@pytest.mark.parametrize("case", CASES)
def test_a_label_in_one_token_is_found_there_and_not_in_the_mean(case: str) -> None:
    net, which, padding, layer, said = CASES[case]
    train, held_out = batches(320, which, padding), batches(200, which, padding)
    found: dict[str, float] = {}
    for tokens in (which, "mean"):
        probes = LinearProbeCallback(layer, tokens=tokens, **READING)
        Trainer(**QUIET, max_epochs=1, callbacks=[probes]).fit(model := make(net), train, held_out)
        assert {row["fitted_on"]["data"] for row in probes.report.rows} == {"train"}
        found[tokens] = errors(probes.report, layer)
        # Once more, in one pass: the same features.
        again = probe(model, train, held_out, layers=layer, tokens=tokens, trainer=Trainer(**QUIET), **READING)
        assert errors(again, layer) == pytest.approx(found[tokens], abs=0.015)
        for report in (probes.report, again):
            (row,) = report.select(layer=layer, stage="val", metric="error", step=report.rows[-1]["step"])
            assert row["reduction"].startswith(said if tokens == which else ("mean", "vector"))
    assert found[which] < 0.08
    assert found["mean"] > found[which] + 0.12


@pytest.mark.parametrize("case", CASES)
def test_features_are_those_of_plain_indexing(case: str) -> None:
    net, which, padding, layer, _ = CASES[case]
    model, (batch, *_) = make(net), batches(80, which, padding)
    outputs: list[Any] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda module, args, output: outputs.append(output))
    network = LayerExtractor(layer, None, checked({**READING, "tokens": {layer: which}}, "here"))
    network.attach(model)
    if net is Recurrent:
        network.pairings["train"] = Pairing("train", {layer: Arrangement("packed")}, is_known=True)
    network.open(batch)
    with torch.no_grad():
        model.net(batch["x"], batch["mask"])
    handle.remove()
    seen = network.close()
    network.detach()
    assert seen is not None
    mask = batch["mask"]
    if isinstance(outputs[0], Tensor):
        expected = by_hand(outputs[0], mask, which)
        assert torch.equal(network.reduction_of(layer)(outputs[0], mask), expected)
    else:
        padded, lengths = pad_packed_sequence(outputs[0][0], batch_first=True)
        expected = torch.stack([row[n - 1] for row, n in zip(padded, lengths.tolist(), strict=True)])
        assert torch.equal(network.reduction_of(layer)(outputs[0][0]), expected)
    assert torch.equal(seen.features[layer], expected)


def test_training_is_what_it_was_bit_by_bit() -> None:
    ends = []
    for callbacks in ([], [LinearProbeCallback(tokens="last", **READING)]):
        model = make(Encoder)
        model.net.blocks.layers[0].dropout.p = 0.3  # type: ignore[union-attr, index]
        trainer = Trainer(**QUIET, max_epochs=2, callbacks=callbacks)  # type: ignore[arg-type]
        trainer.fit(model, batches(160, "last"), batches(80, "last"))
        ends.append((model.state_dict(), rng_states()))
    assert differences(ends[0], ends[1]) == []


class Windows(nn.Module):
    """Two windows of three tokens each, folded into the batch, and brought together."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(WIDTH, 6)
        self.each = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        inside = self.inside(x[:, :6].reshape(-1, 3, WIDTH))
        return self.head(self.each(inside.mean(dim=1)).view(len(x), 2, 6).mean(dim=1))  # type: ignore[no-any-return]


def test_parts_of_a_sample_have_their_own_token_and_a_note_says_so() -> None:
    class Folding(Model):
        def training_step(self, batch: Any) -> Tensor:
            return F.cross_entropy(self.net(batch["x"]), batch["y"])

    seed_everything(5, verbose=False)
    model = Folding(Windows())
    report = probe(
        model, batches(80, "first"), batches(40, "first"), layers=["net.inside", "net.each", "net.head"], tokens="last",
        trainer=Trainer(**QUIET), **{**READING, "token_mask": None, "input": None},
    )  # fmt: skip
    x = torch.randn(4, 6, WIDTH)
    inside = model.net.inside(x.reshape(-1, 3, WIDTH)).detach()  # type: ignore[operator]
    found = report.probe("net.inside").reduction(inside)
    torch.testing.assert_close(found, inside[:, -1].view(4, 2, 6).mean(dim=1))
    said = [note for note in report.notes if note.startswith("tokens=")]
    assert said == [
        "tokens='last': of net.inside it is that of each part of a sample, then their mean",
        "tokens='last' is not about the parts of a sample of net.each: their mean is taken",
    ]


# Mistakes


def refused(callback: LinearProbeCallback, model: LightningModule, *loaders: Any) -> str:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="tokens: ") as raised:
        Trainer(**QUIET, max_epochs=1, callbacks=[callback]).fit(model, *loaders)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return str(raised.value)


NONE = "has no effect, since none of the probed layers that it is for has tokens, (batch, ..., width); found"

MISTAKES: dict[str, tuple[Any, str]] = {
    "no layer has tokens": (
        "first",
        f"tokens: 'first' {NONE} input (16, 1, 8, 8), net.1 (16, 32), net.2 (16, 32) and 1 more; "
        "layout={layer pattern: 'tokens'} says which have",
    ),
    "a pattern of layers without": (
        {"net.1": "last"},
        f"tokens: 'net.1' {NONE} net.1 (16, 32); layout={{layer pattern: 'tokens'}} says which have",
    ),
    "a pattern of nothing": (
        {"nett.1": "last"},
        "tokens: 'nett.1' matches no layer path and no class name; nearest: net.1",
    ),
    "a pattern of what is not probed": (
        {"net.0": "last"},
        "tokens: 'net.0' has no effect, since none of net.0 is probed; probed are input, net.1, net.2, net.3",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_has_no_effect_is_refused_before_the_first_step(mistake: str) -> None:
    tokens, message = MISTAKES[mistake]
    model = partial(Classifier, mlp(depth=1))
    said = refused(LinearProbeCallback(tokens=tokens), model(), loader(), loader(32))
    assert said.startswith(message)
    own = LinearProbeCallback(tokens=tokens, num_classes=10, data=(loader(), loader(32)))
    assert refused(own, model(), loader()).startswith(message)
    with pytest.raises(ValueError, match="tokens: ") as raised:
        probe(model(), loader(), loader(32), tokens=tokens, trainer=Trainer(**QUIET))
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ("frist", "tokens: expected one of 'mean', 'first', 'last', found 'frist'; did you mean 'first'?"),
        (None, "tokens: expected one of 'mean', 'first', 'last', found None"),
        (
            {"net.*": "end"},
            "tokens['net.*']: expected one of 'mean', 'first', 'last', found 'end'; did you mean 'mean'?",
        ),
        ({3: "last"}, "tokens: expected layer patterns as keys, found 3"),
    ],
)
def test_ways_are_checked(tokens: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r"^tokens") as raised:
        LinearProbeCallback(tokens=tokens)
    assert str(raised.value) == message


def test_resuming_goes_on_with_the_same_tokens_only(tmp_path: Path) -> None:
    def fit(epochs: int, folder: str, ckpt_path: str | None = None, **options: Any) -> LinearProbeCallback:
        probes = LinearProbeCallback("net.blocks.layers.*", **{"tokens": "first", **options}, **READING)
        saving = ModelCheckpoint(tmp_path / folder, filename="{epoch}", save_top_k=-1)
        trainer = Trainer(**{**QUIET, "enable_checkpointing": True}, max_epochs=epochs, callbacks=[probes, saving])
        trainer.fit(make(Encoder), batches(160, "first"), batches(80, "first"), ckpt_path=ckpt_path)
        return probes

    whole = fit(2, "whole")
    path = str(tmp_path / "whole" / "epoch=0.ckpt")
    assert fit(2, "again", path).report == whole.report
    # Another way of saying the same.
    assert fit(2, "pattern", path, tokens={"input": "first", "**": "first"}).report == whole.report
    with pytest.raises(ValueError, match="tokens of 'input' is 'first' in the checkpoint and 'mean' here"):
        fit(2, "other", path, tokens={"net.*.*.*": "first"})
    with pytest.warns(UserWarning, match="start afresh: tokens of 'input' is"):
        fit(2, "afresh", path, tokens="mean", strict=False)
