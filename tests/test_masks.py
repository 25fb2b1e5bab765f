"""Masks of tokens: which layers each belongs to, to which length it is brought, and what is said of those not used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from networks import QUIET
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_probes import LinearProbeCallback, ProbeReport, probe
from lightning_probes.network.extractor import LayerExtractor
from lightning_probes.options import checked

SAMPLES, TOKENS = 8, 12


def mask_of(*lengths: int, tokens: int = TOKENS) -> Tensor:
    """The first few tokens of each sample."""
    return (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long()


WORDS, ANSWERS = mask_of(3, 12, 5, 7, 1, 12, 9, 4), mask_of(12, 2, 8, 1, 6, 12, 3, 5)


def mean_by_hand(x: Tensor, mask: Tensor) -> Tensor:
    return torch.stack([row[keep != 0].mean(dim=0) for row, keep in zip(x, mask, strict=True)]).detach()


class Translator(nn.Module):
    """An encoder and a decoder beside it, as T5 and BART have them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.decoder = nn.Sequential(nn.Linear(6, 6), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x).flip(1))  # type: ignore[no-any-return]


def features(
    model: nn.Module, batch: dict[str, Tensor], x: Tensor, layers: str = "**", **reading: Any
) -> tuple[dict[str, Tensor], list[str]]:
    """What a model that is called on ``x`` has of each layer, and what is said of the masks."""
    read = checked({"num_classes": 2, "input": None, "target": "y", **reading}, "here")
    network = LayerExtractor(layers, None, read)
    network.attach(model)
    network.open({"y": torch.arange(len(x)) % 2, **batch})
    model(x)
    seen = network.close()
    network.detach()
    assert seen is not None
    return seen.features, network.mask_reader.notes


def outputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What each module puts out, by hooks of the test's own."""
    found: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: found.__setitem__(name, output))
        for name, module in model.named_modules()
        if name
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return found


def check(found: dict[str, Tensor], out: dict[str, Tensor], masks: dict[str, Tensor]) -> None:
    """Every layer is the mean over the tokens of its mask; of all tokens where it has none."""
    assert found.keys() == out.keys()
    for layer, x in found.items():
        mask = masks.get(layer, torch.ones(x.shape[0], out[layer].shape[1]))
        torch.testing.assert_close(x, mean_by_hand(out[layer], mask))


ENCODER, DECODER = ("encoder", "encoder.0", "encoder.1"), ("decoder", "decoder.0", "decoder.1")
PLACES: dict[str, tuple[Any, dict[str, Tensor], tuple[str, ...]]] = {
    "by layer": (
        {"encoder.**": "words", "decoder.**": lambda batch: batch["answers"].float()},
        dict.fromkeys(ENCODER, WORDS) | dict.fromkeys(DECODER, ANSWERS),
        (),
    ),
    "of one layer alone": ({"decoder.0": "answers"}, {"decoder.0": ANSWERS}, ()),
    "the later pattern counts": (
        {"**": "words", "decoder.1": "answers"},
        dict.fromkeys((*ENCODER, *DECODER), WORDS) | {"decoder.1": ANSWERS},
        (),
    ),
    "classes too": ({"Tanh": "words"}, dict.fromkeys(("encoder.1", "decoder.1"), WORDS), ()),
    "one for all": (
        "words",
        dict.fromkeys(ENCODER, WORDS),
        (
            "token_mask not applied to decoder.0, decoder.1, decoder: it is taken for the encoder's; "
            "token_mask={layer pattern: place} gives the decoder one",
        ),
    ),
    "a function for all": (
        lambda batch: batch["words"],
        dict.fromkeys(ENCODER, WORDS),
        (
            "token_mask not applied to decoder.0, decoder.1, decoder: it is taken for the encoder's; "
            "token_mask={layer pattern: place} gives the decoder one",
        ),
    ),
    "one for the decoder in the batch": (
        "attention_mask",
        dict.fromkeys(ENCODER, ANSWERS) | dict.fromkeys(DECODER, WORDS),
        ("token_mask: decoder.0, decoder.1, decoder of the decoder have the mask 'decoder_attention_mask'",),
    ),
    "none": (None, {}, ()),
}


@pytest.mark.parametrize("case", PLACES)
def test_a_mask_belongs_to_layers(case: str) -> None:
    token_mask, masks, notes = PLACES[case]
    model, x = Translator(), torch.randn(SAMPLES, TOKENS, 4)
    batch = {"words": WORDS, "answers": ANSWERS, "attention_mask": ANSWERS, "decoder_attention_mask": WORDS}
    found, said = features(model, batch, x, token_mask=token_mask)
    check(found, outputs(model, x), masks)
    assert tuple(said) == notes


def test_a_decoder_without_an_encoder_has_the_mask() -> None:
    model, x = nn.ModuleDict({"decoder": nn.Linear(4, 3)}), torch.randn(SAMPLES, TOKENS, 4)
    model.forward = lambda x: model["decoder"](x)
    found, said = features(model, {"attention_mask": WORDS}, x)
    check(found, outputs(model, x), {"decoder": WORDS})
    assert said == []


def test_the_raw_input_has_the_mask_of_its_pattern() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(SAMPLES, TOKENS, 4)
    found, _ = features(model, {"x": x, "words": WORDS}, x, input="x", token_mask={"input": "words"})
    check(found, {"input": x, **outputs(model, x)}, {"input": WORDS})


class Speech(nn.Module):
    """A front end that makes one frame of four samples, and layers after it."""

    def __init__(self, *, is_padded: bool = True) -> None:
        super().__init__()
        width = 3 if is_padded else 4
        self.front = nn.Sequential(*[nn.Conv1d(c, 5, width, stride=2, padding=int(is_padded)) for c in (1, 5)])
        self.frames = nn.Linear(5, 6)

    def forward(self, sound: Tensor) -> Tensor:
        return self.frames(self.front(sound[:, None]).transpose(1, 2))  # type: ignore[no-any-return]


def test_a_mask_in_samples_is_brought_to_frames() -> None:
    sound, words = torch.randn(SAMPLES, 4 * TOKENS), mask_of(1, 4, 5, 8, 48, 47, 30, 9, tokens=48)
    model = Speech()
    found, said = features(model, {"attention_mask": words}, sound, "frames")
    frames = mask_of(1, 1, 2, 2, 12, 12, 8, 3)
    check(found, {"frames": outputs(model, sound)["frames"]}, {"frames": frames})
    assert said == ["token_mask of 48 brought to the 12 tokens of frames: a token counts if any of its 4 places does"]


def test_a_mask_that_fits_no_layer_is_told_of_and_a_function_gives_it() -> None:
    sound, words = torch.randn(SAMPLES, 48), mask_of(*[20] * 4, *[48] * 4, tokens=48)
    model = Speech(is_padded=False)
    out = {"frames": outputs(model, sound)["frames"]}
    assert out["frames"].shape[1] == 10
    found, said = features(model, {"attention_mask": words}, sound, "frames")
    check(found, out, {})
    assert said == ["token_mask of 48 not applied to frames of 10 tokens"]
    frames = mask_of(*[3] * 4, *[10] * 4, tokens=10)
    found, said = features(model, {}, sound, "frames", token_mask={"frames": lambda batch: frames})
    check(found, out, {"frames": frames})
    assert said == []


class Prompted(nn.Module):
    """Tokens of its own before those of the batch; or fewer that read them, whose number divides that of the mask."""

    def __init__(self, tokens: int, *, is_latent: bool) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(tokens, 4))
        self.is_latent = is_latent
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        own = self.own.expand(len(x), -1, -1)
        own = own + x.mean(dim=1, keepdim=True) if self.is_latent else torch.cat([own, x], dim=1)
        return self.layer(own)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("own", "is_latent", "tokens"), [(5, False, 17), (12, False, 24), (4, True, 4)])
def test_tokens_of_the_network_s_own_have_no_mask(own: int, is_latent: bool, tokens: int) -> None:
    model, x = Prompted(own, is_latent=is_latent), torch.randn(SAMPLES, TOKENS, 4)
    found, said = features(model, {"attention_mask": WORDS}, x)
    check(found, outputs(model, x), {})
    assert said == [f"token_mask of 12 not applied to layer of {tokens} tokens"]


def test_one_token_has_nothing_to_leave_out() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(SAMPLES, 1, 4)
    found, said = features(model, {"attention_mask": WORDS}, x)
    check(found, outputs(model, x), {})
    assert said == []


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"token_mask: 'encode\.0' matches no layer path .* nearest: encoder\.0"):
        features(Translator(), {}, torch.randn(SAMPLES, TOKENS, 4), token_mask={"encode.0": "words"})


@pytest.mark.parametrize("token_mask", [{1: "words"}, {"encoder": 2.5}, {"encoder": {"a": 1}}, {"encoder": None}])
def test_places_of_masks_are_checked(token_mask: Any) -> None:
    with pytest.raises(TypeError, match=r"token_mask.*: expected "):
        LinearProbeCallback(token_mask=token_mask)


def test_batches_of_other_lengths_make_one_note_of_a_layer() -> None:
    model = Prompted(5, is_latent=False)
    network = LayerExtractor("**", None, checked({"num_classes": 2, "input": None, "target": "y"}, "here"))
    network.attach(model)
    for tokens in (12, 9, 7):
        mask = mask_of(*[3] * SAMPLES, tokens=tokens)
        network.open({"y": torch.arange(SAMPLES) % 2, "attention_mask": mask})
        model(torch.randn(SAMPLES, tokens, 4))
        network.close()
    network.detach()
    assert network.mask_reader.notes == ["token_mask of 12 not applied to layer of 17 tokens"]


# Whole runs


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Translator()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]


def batches(samples: int = 160) -> DataLoader[Any]:
    """The class is in the words; what stands where the mask is 0 hides it."""
    generator = torch.Generator().manual_seed(samples)
    labels = torch.randint(2, (samples,), generator=generator)
    lengths = torch.randint(2, 5, (samples,), generator=generator)
    mask = torch.arange(TOKENS) < lengths[:, None]
    x = torch.randn(samples, TOKENS, 4, generator=generator) * (5 - 4.9 * mask[..., None].float())
    x[..., 0] += mask * (2.0 * labels[:, None] - 1)
    rows = [{"x": a, "mask": b, "turned": b.flip(0), "y": c} for a, b, c in zip(x, mask.long(), labels, strict=True)]
    return DataLoader(rows, batch_size=32)  # type: ignore[arg-type]


def errors(report: ProbeReport) -> dict[str, float]:
    return {row["layer"]: row["value"] for row in report.select(stage="val", metric="error")}


def test_probe_reads_each_layer_with_its_mask() -> None:
    arguments: dict[str, Any] = {"layers": ["net.encoder.0", "net.decoder.0"], "input": "x", "target": "y"}
    arguments |= {"num_classes": 2, "trainer": Trainer(**QUIET)}
    both = {"net.encoder.*": "mask", "net.decoder.*": "turned", "input": "mask"}
    report = probe(Small(), batches(), batches(120), token_mask=both, **arguments)
    assert max(errors(report).values()) < 0.05
    assert not any("token_mask" in note for note in report.notes)
    report = probe(Small(), batches(), batches(120), token_mask="mask", **arguments)
    assert errors(report)["net.encoder.0"] < 0.05 < 0.2 < errors(report)["net.decoder.0"]
    (note,) = (note for note in report.notes if "token_mask" in note)
    assert note.startswith("token_mask not applied to net.decoder.0: it is taken for the encoder's")
