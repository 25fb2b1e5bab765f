from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from networks import GAN, Block, Classifier, ResNet, ViT, convnet, mlp
from omegaconf import OmegaConf
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_probes.network.extractor import LayerExtractor
from lightning_probes.network.layers import select_layers
from lightning_probes.options import checked


class Embeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(50, 8)
        self.position_embeddings = nn.Embedding(16, 8)
        self.LayerNorm = nn.LayerNorm(8)
        self.dropout = nn.Dropout(0.1)


class Encoder(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList([Block(8, 2) for _ in range(depth)])


class Pooler(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(8, 8)
        self.activation = nn.Tanh()


class Backbone(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.embeddings = Embeddings()
        self.encoder = Encoder(depth)
        self.pooler = Pooler()


class Bert(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.bert = Backbone(depth)
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Linear(8, 2)


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(block, 3, norm=nn.LayerNorm(8))
        self.head = nn.Linear(8, 2)


class ConvBN(nn.Module):
    def __init__(self, channels_in: int, channels: int, kernel: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(channels)


class Inception(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch1 = ConvBN(channels, 4)
        self.branch2 = nn.Sequential(ConvBN(channels, 4), ConvBN(4, 4, 3))
        self.branch3 = nn.Sequential(nn.MaxPool2d(3, 1, 1), ConvBN(channels, 4))


class GoogLeNet(nn.Module):
    """Blocks as attributes, blocks inside blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = ConvBN(3, 12, 3)
        self.maxpool1 = nn.MaxPool2d(2)
        self.inception3a = Inception(12)
        self.inception3b = Inception(12)
        self.maxpool3 = nn.MaxPool2d(2)
        self.inception4a = Inception(12)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(12, 10)


class InvertedResidual(nn.Module):
    """A block that is itself a list of smaller repeated pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(ConvBN(4, 8), ConvBN(8, 8, 3), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))


class MobileNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        blocks = [InvertedResidual() for _ in range(4)]
        self.features = nn.Sequential(ConvBN(3, 4, 3), *blocks, ConvBN(4, 16))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(16, 10))


class SwinStage(nn.Module):
    """A repeated module that only lines up blocks."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(8, 2) for _ in range(depth)])
        self.downsample = nn.Linear(8, 8)


class Swin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 4, 4)
        self.layers = nn.ModuleList([SwinStage(2), SwinStage(3)])
        self.head = nn.Linear(8, 10)


class VGG(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3))
        self.avgpool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 10))


class Furnished(nn.Module):
    """What stands beside the layers in many a module."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.1)
        self.drop_map = nn.Dropout2d(0.1)
        self.skip = nn.Identity()
        self.flatten = nn.Flatten()
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(1))])
        self.head = nn.Linear(8, 3)
        self.criterion = nn.CrossEntropyLoss()
        self.other_loss = FocalLoss()
        self.accuracy = MulticlassAccuracy(3)
        self.metrics = MetricCollection({"top1": MulticlassAccuracy(3), "top2": MulticlassAccuracy(3, top_k=2)})


class FocalLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.CrossEntropyLoss()


class Tied(nn.Module):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.backbone = self.encoder
        self.head = nn.Linear(4, 2)


ARCHITECTURES: list[tuple[Callable[[], nn.Module], list[str]]] = [
    (
        lambda: Classifier(ResNet(width=4)),
        ["net.relu", *[f"net.layer{i}.{j}" for i in range(1, 5) for j in range(2)], "net.fc"],
    ),
    (lambda: ViT(width=8, depth=4), ["patch_embed", *[f"blocks.{i}" for i in range(4)], "head"]),
    (Bert, ["bert.embeddings", *[f"bert.encoder.layer.{i}" for i in range(3)], "classifier"]),
    (Translator, ["embed", *[f"encoder.layers.{i}" for i in range(3)], "head"]),
    (lambda: mlp(depth=2, dropout=0.1), ["1", "2", "4", "5", "7"]),
    (convnet, ["0", "1", "2", "3", "4", "5", "6", "9"]),
    (GoogLeNet, ["maxpool1", "inception3a", "inception3b", "maxpool3", "inception4a", "fc"]),
    (MobileNet, ["features.0", *[f"features.{i}" for i in range(1, 5)], "classifier"]),
    (
        Swin,
        [
            "patch_embed",
            *[f"layers.0.{name}" for name in ("blocks.0", "blocks.1", "downsample")],
            *[f"layers.1.{name}" for name in ("blocks.0", "blocks.1", "blocks.2")],
            "head",
        ],
    ),
    (GAN, [*[f"generator.{i}" for i in range(3)], *[f"discriminator.{i}" for i in range(1, 4)]]),
    (VGG, [*[f"features.{i}" for i in range(4)], "avgpool", "classifier.1", "classifier.2", "classifier.4"]),
    (Furnished, ["hidden", "head"]),
    (Tied, ["encoder.0", "encoder.1", "head"]),
]


@pytest.mark.parametrize(("build", "expected"), ARCHITECTURES, ids=lambda value: getattr(value, "__name__", ""))
def test_default_layers_are_blocks_with_stem_and_head_or_else_elements(
    build: Callable[[], nn.Module], expected: list[str]
) -> None:
    model = build()
    layers, note, runs = selection = select_layers(model)
    assert selection.settled() == expected
    assert note == ""
    assert set(layers) == {*expected, *(path for run in runs for path in run)}
    assert all(model.get_submodule(path) is module for path, module in layers.items())


@pytest.mark.parametrize("depth", [39, 40, 41, 100, 301])
def test_above_forty_default_layers_are_first_last_and_evenly_spaced(depth: int) -> None:
    layers, note, _ = select_layers(nn.Sequential(*[nn.Linear(1, 1) for _ in range(depth)]))
    places = [int(path) for path in layers]
    if depth <= 40:
        assert places == list(range(depth))
        assert note == ""
        return
    gaps = [after - before for before, after in pairwise(places)]
    assert (len(places), places[0], places[-1]) == (40, 0, depth - 1)
    assert max(gaps) - min(gaps) <= 1
    assert note == f"40 of {depth} layers, evenly spaced"


def test_named_layers_are_never_thinned_out() -> None:
    layers, note, _ = select_layers(nn.Sequential(*[nn.Linear(1, 1) for _ in range(50)]), "*")
    assert (len(layers), note) == (50, "")


RESNET_BLOCKS = [f"layer{i}.{j}" for i in range(1, 5) for j in range(2)]
BLOCK_WITHOUT_NORMS = ["", ".conv1", ".relu", ".conv2", ".downsample"]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("layer1.0.conv1", ["layer1.0.conv1"]),
        ("layer*", ["layer1", "layer2", "layer3", "layer4"]),
        ("layer*.*", RESNET_BLOCKS),
        ("layer[12].1", ["layer1.1", "layer2.1"]),
        ("layer1.*.conv?", ["layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv2"]),
        ("**.fc", ["fc"]),
        ("layer1.**.conv1", ["layer1.0.conv1", "layer1.1.conv1"]),
        ("layer2.0.downsample.**", ["layer2.0.downsample", "layer2.0.downsample.0", "layer2.0.downsample.1"]),
        ("BasicBlock", RESNET_BLOCKS),
        ("Basic*", RESNET_BLOCKS),
        (["fc", "layer1.0", "conv1"], ["conv1", "layer1.0", "fc"]),
        (["layer1.*", "layer1.0", "Linear"], ["layer1.0", "layer1.1", "fc"]),
        (OmegaConf.create(["conv1", "layer4.*"]), ["conv1", "layer4.0", "layer4.1"]),
    ],
)
def test_globs_match_paths_or_else_class_names_in_tree_order(patterns: str | list[str], expected: list[str]) -> None:
    assert list(select_layers(ResNet(width=4), patterns)[0]) == expected


@pytest.mark.parametrize(
    ("layers", "exclude", "expected"),
    [
        (None, ["layer2", "layer3", "layer4"], ["relu", "layer1.0", "layer1.1", "fc"]),
        (None, "layer*.1", ["relu", *[f"layer{i}.0" for i in range(1, 5)], "fc"]),
        (None, "BasicBlock", ["relu", "fc"]),
        ("layer1.**", ["layer1.0", "layer1.1.bn?"], ["layer1", *[f"layer1.1{end}" for end in BLOCK_WITHOUT_NORMS]]),
        ("layer*", OmegaConf.create(["layer1", "layer2"]), ["layer3", "layer4"]),
    ],
)
def test_exclude_takes_away_everything_below(layers: str | None, exclude: str | list[str], expected: list[str]) -> None:
    assert select_layers(ResNet(width=4), layers, exclude).settled() == expected


@pytest.mark.parametrize("name", ["encoder.0", "backbone.0", "*.0", ["encoder.0", "backbone.0"]])
def test_module_under_two_names_appears_once_and_answers_to_both(name: str | list[str]) -> None:
    model = Tied()
    layers = select_layers(model, name).layers
    assert list(layers.items()) == [("encoder.0", model.encoder[0])]


def test_module_under_two_names_is_excluded_by_either() -> None:
    assert list(select_layers(Tied(), exclude="backbone")[0]) == ["head"]


Wrap = Callable[[nn.Module], Any]


class Wrapped(nn.Module):
    """Every block inside a wrapper, as activation checkpointing, FSDP and compilation of blocks leave it."""

    def __init__(self, wrap: Wrap) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([wrap(Block(8, 2)) for _ in range(3)])
        self.head = nn.Linear(8, 2)


WRAPPERS: list[Wrap] = [checkpoint_wrapper, lambda module: torch.compile(module)]


@pytest.mark.parametrize("wrap", WRAPPERS, ids=["checkpoint", "compile"])
def test_wrapped_blocks_are_found_under_the_paths_that_the_user_wrote(wrap: Wrap) -> None:
    model = Wrapped(wrap)
    assert list(select_layers(model)[0]) == ["stem", "blocks.0", "blocks.1", "blocks.2", "head"]
    assert list(select_layers(model, "blocks.*")[0]) == ["blocks.0", "blocks.1", "blocks.2"]
    assert list(select_layers(model, "blocks.0.attn.**")[0]) == [f"blocks.0.attn{n}" for n in ("", ".qkv", ".proj")]


@pytest.mark.parametrize("wrap", WRAPPERS, ids=["checkpoint", "compile"])
def test_wrapped_blocks_can_be_excluded(wrap: Wrap) -> None:
    model = Wrapped(wrap)
    assert list(select_layers(model, exclude="blocks.1")[0]) == ["stem", "blocks.0", "blocks.2", "head"]
    assert list(select_layers(model, exclude="Block")[0]) == ["stem", "head"]


def test_compiled_network_has_the_paths_of_the_network() -> None:
    model = ResNet(width=4)
    compiled: Any = torch.compile(model)
    assert list(select_layers(compiled)[0]) == list(select_layers(model)[0])


def test_pattern_that_matches_nothing_names_the_nearest_paths() -> None:
    message = r"^layers: 'layer1.2' matches no layer path and no class name; nearest: "
    with pytest.raises(ValueError, match=message) as error:
        select_layers(ResNet(width=4), ["conv1", "layer1.2"])
    nearest = str(error.value).partition("nearest: ")[2].split(", ")
    assert {"layer1.0", "layer1.1"} <= set(nearest)


def test_class_name_with_a_typing_mistake_is_answered_with_the_class() -> None:
    with pytest.raises(ValueError, match=r"nearest: .*\bBasicBlock\b"):
        select_layers(ResNet(width=4), "BasicBlok")


def test_exclude_that_matches_nothing_is_an_error_naming_the_argument() -> None:
    with pytest.raises(ValueError, match=r"^exclude: 'layer9' matches no layer path .*nearest: .*layer1"):
        select_layers(ResNet(width=4), exclude="layer9")


def test_exclude_that_leaves_nothing_is_an_error_naming_what_was_selected() -> None:
    message = r"^exclude='layer1' leaves no layer to probe of the 2 selected: layer1.0, layer1.1$"
    with pytest.raises(ValueError, match=message):
        select_layers(ResNet(width=4), "layer1.*", "layer1")


@pytest.mark.parametrize(("model", "modules"), [(nn.Linear(2, 2), "none"), (nn.Sequential(nn.Dropout()), "0")])
def test_network_without_layers_is_an_error_listing_its_modules(model: nn.Module, modules: str) -> None:
    with pytest.raises(ValueError, match=rf"^{type(model).__name__} holds no layer to probe; its modules: {modules}$"):
        select_layers(model)


def test_the_stem_is_what_was_called_last_before_the_first_block_of_what_has_features() -> None:
    class Llama(nn.Module):
        """Registers its rotary embedding after its norm, and calls it before its blocks."""

        def __init__(self) -> None:
            super().__init__()
            self.embed_tokens = nn.Embedding(50, 8)
            self.layers = nn.ModuleList([Block(8, 2) for _ in range(2)])
            self.norm = nn.LayerNorm(8)
            self.rotary_emb = nn.Linear(8, 8)

    selection = select_layers(Llama())
    blocks = ["layers.0", "layers.1"]
    assert selection.runs == [["embed_tokens"], ["norm", "rotary_emb"]]
    assert list(selection.layers) == ["embed_tokens", *blocks, "norm", "rotary_emb"]
    assert selection.settled(["embed_tokens", *blocks, "norm"]) == ["embed_tokens", *blocks, "norm"]
    # If nothing tells that it is the same for all samples, what was called last is taken for the stem.
    assert selection.settled(["embed_tokens", "rotary_emb", *blocks, "norm"]) == [*blocks, "norm", "rotary_emb"]
    assert selection.settled() == ["embed_tokens", *blocks, "rotary_emb"]
    # A run that was not seen keeps its last.
    assert selection.settled(["embed_tokens", *blocks]) == ["embed_tokens", *blocks, "rotary_emb"]


def test_a_run_counts_as_one_of_forty_layers_and_keeps_its_candidates() -> None:
    stem, head = [nn.Linear(8, 8), nn.Tanh()], [nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2)]
    net = nn.Sequential(*stem, *[Block(8, 2) for _ in range(60)], *head)
    layers, note, runs = selection = select_layers(net)
    assert note == "40 of 62 layers, evenly spaced"
    assert runs == [["0", "1"], ["62", "63", "64"]]
    assert len(layers) == 38 + 2 + 3
    assert len(selection.settled()) == len(selection.settled(list(layers))) == 40
    assert len(selection.settled(["0", *[path for path in layers if path not in ("0", "1")]])) == 40


def test_excluding_the_last_of_a_run_leaves_the_one_before() -> None:
    selection = select_layers(ViT(width=8, depth=2), exclude="head")
    assert selection.settled() == ["patch_embed", "blocks.0", "blocks.1", "norm"]


class TestParametrized:
    """A parametrised module is a leaf: what is below it puts out weights."""

    def test_networks_have_the_layers_that_they_have_without(self) -> None:
        plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        expected = ["0", "1", "2", "3", "4"]
        assert list(select_layers(plain).layers) == expected
        spectral_norm(plain[0])
        spectral_norm(plain[2])
        weight_norm(plain[4])
        assert list(select_layers(plain).layers) == expected
        assert list(select_layers(plain, "**").layers) == expected
        assert list(select_layers(plain, "Linear").layers) == ["0", "2", "4"]
        with pytest.raises(ValueError, match=r"^layers: '\*\*.original0' matches no layer path"):
            select_layers(plain, "**.original0")

    def test_their_outputs_are_features_and_their_weights_are_not(self) -> None:
        net = nn.Sequential(spectral_norm(nn.Linear(4, 8)), nn.ReLU(), weight_norm(nn.Linear(8, 3)))
        network = LayerExtractor(None, None, checked({"num_classes": 3}, "a test"))
        network.attach(net)
        batch = torch.randn(3, 4), torch.tensor([0, 1, 2])
        network.open(batch)
        expected = net(batch[0])
        seen = network.close()
        network.agree(lambda own: [own])
        assert seen is not None
        assert network.layers == ["input", "0", "1", "2"]
        assert torch.equal(seen.features["2"], expected)
        assert network.notes == []

    def test_blocks_are_recognised_though_only_some_are_parametrised(self) -> None:
        model = ViT(width=8, depth=3)
        expected = select_layers(model).settled()
        orthogonal(model.blocks[0].get_submodule("attn.proj"))
        spectral_norm(model.head)
        assert select_layers(model).settled() == expected

    def test_a_block_with_a_parametrised_weight_of_its_own_keeps_its_children(self) -> None:
        class Scaled(Block):
            def __init__(self) -> None:
                super().__init__(8, 2)
                self.scale = nn.Parameter(torch.ones(8, 8))

        model = nn.Sequential(nn.Linear(8, 8), *[Scaled() for _ in range(3)], nn.Linear(8, 2))
        expected = list(select_layers(model, "**").layers)
        parametrize.register_parametrization(model[2], "scale", nn.Identity())
        assert type(model[2]) is not type(model[1])
        assert list(select_layers(model, "**").layers) == expected
        assert select_layers(model).settled() == ["0", "1", "2", "3", "4"]
        assert list(select_layers(model, "Scaled").layers) == ["1", "2", "3"]


class TestStemsOfRealModels:
    """Tiny ones of Hugging Face, on a batch of four."""

    def layers_of(self, model: nn.Module) -> list[str]:
        network = LayerExtractor(None, None, checked({"num_classes": 3, "input": None}, "a test"))
        network.attach(model)
        ids = torch.arange(24).view(4, 6)
        network.open((ids, torch.tensor([0, 1, 2, 0])))
        model.eval()(input_ids=ids)
        network.close()
        network.settle()
        network.agree(lambda own: [own])
        assert network.notes == []
        return network.layers

    def test_rotary_embeddings_do_not_push_the_norm_out(self) -> None:
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
        model = transformers.LlamaModel(transformers.LlamaConfig(**sizes, vocab_size=50, num_hidden_layers=2))
        assert self.layers_of(model) == ["embed_tokens", "layers.0", "layers.1", "norm"]

    def test_position_tables_do_not_push_the_embeddings_out(self) -> None:
        transformers = pytest.importorskip("transformers")
        model = transformers.GPT2Model(transformers.GPT2Config(vocab_size=50, n_embd=8, n_layer=2, n_head=2))
        assert self.layers_of(model) == ["wte", "h.0", "h.1", "ln_f"]

    def test_what_feeds_an_encoder_and_a_decoder_is_their_stem(self) -> None:
        transformers = pytest.importorskip("transformers")
        halves = {f"{half}_{name}": n for half in ("encoder", "decoder") for name, n in _BART_SIZES.items()}
        model = transformers.BartModel(transformers.BartConfig(vocab_size=50, d_model=8, pad_token_id=1, **halves))
        expected = [
            f"{half}.{name}"
            for half in ("encoder", "decoder")
            for name in ("layernorm_embedding", "layers.0", "layers.1")
        ]
        assert self.layers_of(model) == expected


_BART_SIZES = {"layers": 2, "attention_heads": 2, "ffn_dim": 16}
