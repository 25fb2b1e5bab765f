"""Which dimension of an activation holds features: told by the modules that run, in a run and without one."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import Block
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from lightning_probes.network.axes import FeatureAxes, ModuleCall, Treatment, place_of
from lightning_probes.network.hooks import ActivationRecorder, first_float_tensor
from lightning_probes.network.pooling import Reducer
from lightning_probes.options import Axes
from lightning_probes.replay.frozen import frozen


class Apply(nn.Module):
    """An operation without a module, between modules."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def turned() -> nn.Module:
    return Apply(lambda x: x.transpose(1, 2))


class Mamba(nn.Module):
    """A state space mixer: a causal Conv1d between two Linears, in the order in which it registers them."""

    def __init__(self, width: int, *, is_fused: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv1d = nn.Conv1d(2 * width, 2 * width, 3, padding=2, groups=2 * width)
        self.in_proj = nn.Linear(width, 2 * width)
        self.out_proj = nn.Linear(2 * width, width)
        self.is_fused = is_fused

    def forward(self, x: Tensor) -> Tensor:
        if self.is_fused:
            return F.linear(F.linear(x, self.in_proj.weight), self.out_proj.weight)
        mixed = self.conv1d(self.in_proj(self.norm(x)).transpose(1, 2))[..., : x.shape[1]]
        return x + self.out_proj(F.silu(mixed).transpose(1, 2))  # type: ignore[no-any-return]


class Conformer(nn.Module):
    """The convolution module of a Conformer ends with a Conv1d, and puts out tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.depthwise = nn.Conv1d(width, width, 3, padding=1, groups=width)
        self.batch_norm = nn.BatchNorm1d(width)
        self.pointwise = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        inside = self.batch_norm(self.depthwise(self.norm(x).transpose(1, 2)))
        return x + self.pointwise(F.silu(inside)).transpose(1, 2)  # type: ignore[no-any-return]


class ConvNeXt(nn.Module):
    """Channels first outside, channels last inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.pwconv1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        inside = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        return x + self.pwconv2(self.act(self.pwconv1(inside))).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


class Mixer(nn.Module):
    """Mixes rows, columns and channels of (batch, height, width, channels)."""

    def __init__(self, height: int, width: int, channels: int) -> None:
        super().__init__()
        self.rows = nn.Linear(height, height)
        self.columns = nn.Linear(width, width)
        self.norm = nn.LayerNorm(channels)
        self.channels = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.rows(x.transpose(1, 3)).transpose(1, 3)
        x = x + self.columns(x.transpose(2, 3)).transpose(2, 3)
        return x + self.channels(self.norm(x))  # type: ignore[no-any-return]


class ChannelNorm(nn.LayerNorm):
    data_format = "channels_first"

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class TurningNorm(nn.LayerNorm):
    """Norms channels that are first, without saying so, as that of SqueezeBERT."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Formatted(nn.Module):
    output_fmt = "NHWC"

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).relu()


class UserNorm(nn.Module):
    """RMSNorm as language models bring it along."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class UserRMSNorm(UserNorm): ...


def chain(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*modules)


Case = tuple[nn.Module, tuple[int, ...], dict[str, Axes]]

CASES: dict[str, Callable[[], Case]] = {
    "convolutions over length": lambda: (
        chain(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.MaxPool1d(2), nn.AdaptiveAvgPool1d(1), nn.Flatten()),
        (2, 3, 20),
        {**dict.fromkeys("01234", "channels")},
    ),
    "a transformer": lambda: (
        chain(nn.Linear(5, 8), nn.GELU(), Block(8, 2), nn.LayerNorm(8)),
        (2, 11, 5),
        dict.fromkeys("0123", "tokens"),
    ),
    "torch's encoder layer": lambda: (
        chain(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Tanh()),
        (2, 11, 8),
        dict.fromkeys("01", "tokens"),
    ),
    "recurrent": lambda: (chain(nn.GRU(5, 4, bidirectional=True, batch_first=True)), (2, 11, 5), {"0": "tokens"}),
    "Mamba": lambda: (chain(Mamba(32), Mamba(32)), (2, 16, 32), {"0": "tokens", "1": "tokens", "0.conv1d": "channels"}),
    "a square Mamba": lambda: (chain(Mamba(32), Mamba(32)), (2, 32, 32), {"0": "tokens", "1": "tokens"}),
    "a fused Mamba": lambda: (chain(Mamba(32, is_fused=True)), (2, 16, 32), {"0": "tokens"}),
    "a Mamba inside a Sequential": lambda: (chain(chain(Mamba(32), nn.Dropout())), (2, 16, 32), {"0": "tokens"}),
    "Conformer": lambda: (
        chain(Conformer(8), nn.LayerNorm(8)),
        (2, 11, 8),
        {"0": "tokens", "1": "tokens", "0.pointwise": "channels", "0.batch_norm": "channels"},
    ),
    "a square Conformer": lambda: (
        chain(Conformer(8), Conformer(8), nn.Linear(8, 3)),
        (2, 8, 8),
        {"0": "tokens", "1": "tokens", "0.pointwise": "channels"},
    ),
    "a block that ends with a Linear and turns": lambda: (
        chain(chain(nn.Linear(5, 8), turned())),
        (2, 11, 5),
        {"0": "channels", "0.0": "tokens"},
    ),
    "an activation beside a nested convolution": lambda: (
        chain(chain(nn.Conv1d(3, 6, 3)), nn.ReLU()),
        (2, 3, 20),
        {"0": "channels", "1": "channels"},
    ),
    "norms without weights": lambda: (
        chain(Apply(torch.cos), nn.LayerNorm(8, elementwise_affine=False), nn.RMSNorm(8, elementwise_affine=False)),
        (2, 11, 8),
        dict.fromkeys("012", "tokens"),
    ),
    "a norm that turns": lambda: (
        chain(chain(nn.Conv1d(3, 6, 3), nn.Dropout(), TurningNorm(6)), nn.Conv1d(6, 4, 1)),
        (2, 3, 20),
        {"0": "channels", "0.1": "channels", "0.2": "channels", "1": "channels"},
    ),
    "a pooler of tokens": lambda: (
        chain(nn.LayerNorm(8), turned(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 3)),
        (2, 11, 8),
        {"0": "tokens", "2": "channels"},
    ),
    "convolutions over space": lambda: (
        chain(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), nn.ConvTranspose2d(6, 5, 2)),
        (2, 3, 9, 7),
        dict.fromkeys("0123", "channels"),
    ),
    "ConvNeXt": lambda: (
        chain(nn.Conv2d(3, 8, 3), ChannelNorm(8), ConvNeXt(8), ConvNeXt(8)),
        (2, 3, 9, 7),
        {
            **dict.fromkeys(["0", "1", "2", "3", "2.dwconv"], "channels"),
            **dict.fromkeys(["2.norm", "2.pwconv1", "2.act", "2.pwconv2"], "channels_last"),
        },
    ),
    "a square ConvNeXt": lambda: (
        chain(ConvNeXt(8), ConvNeXt(8), nn.BatchNorm2d(8)),
        (2, 8, 8, 8),
        {"0": "channels", "1": "channels", "0.pwconv1": "channels_last"},
    ),
    "a mixer with channels last": lambda: (
        chain(nn.Linear(3, 8), nn.GELU(), Mixer(5, 7, 8), nn.LayerNorm(8)),
        (2, 5, 7, 3),
        dict.fromkeys("0123", "channels_last"),
    ),
    "video with channels last": lambda: (
        chain(nn.Linear(3, 8), nn.GELU()),
        (2, 4, 5, 7, 3),
        dict.fromkeys("01", "channels_last"),
    ),
    "volumes": lambda: (chain(nn.Conv3d(2, 4, 2), nn.ReLU()), (2, 2, 4, 5, 6), dict.fromkeys("01", "channels")),
    "a module that names its format": lambda: (
        chain(nn.Conv2d(3, 6, 3), Formatted()),
        (2, 3, 9, 7),
        {"0": "channels", "1": "channels_last"},
    ),
    "a norm of the user's": lambda: (
        chain(Apply(torch.cos), UserRMSNorm(8)),
        (2, 11, 8),
        {"0": "tokens", "1": "tokens"},
    ),
    "a spectral norm": lambda: (
        chain(spectral_norm(nn.Conv1d(3, 6, 3)), nn.ReLU(), turned(), spectral_norm(nn.Linear(6, 4)), nn.Tanh()),
        (2, 3, 20),
        {"0": "channels", "1": "channels", "3": "tokens", "4": "tokens"},
    ),
}


def activations_of(model: nn.Module, shape: tuple[int, ...]) -> tuple[FeatureAxes, FeatureAxes, dict[str, Tensor]]:
    """Axes with and without a run, and what each module puts out in it."""
    layers = {path: module for path, module in model.named_modules() if path}
    watching, unwatched = FeatureAxes(model, layers), FeatureAxes(model, layers)
    found: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensor = first_float_tensor(output)
            assert tensor is not None
            found[path] = tensor

        return hook

    handles = [module.register_forward_hook(keep(path)) for path, module in layers.items()]
    with frozen(model), watching.watch(model):
        model(torch.randn(shape))
    for handle in handles:
        handle.remove()
    return watching, unwatched, found


@pytest.mark.parametrize("case", CASES)
def test_a_run_tells_which_dimension_holds_features(case: str) -> None:
    model, shape, expected = CASES[case]()
    watching, _, found = activations_of(model, shape)
    assert {path: watching.of(path, found[path].shape) for path in expected} == expected
    assert not watching.assumed.keys() & expected.keys()


ONLY_IN_A_RUN = {"a square Conformer", "a square ConvNeXt"}
"""Their sizes say nothing, and what reads their outputs shows in a run only."""


@pytest.mark.parametrize("case", sorted(CASES.keys() - ONLY_IN_A_RUN))
def test_without_a_run_the_order_of_registration_tells(case: str) -> None:
    model, shape, expected = CASES[case]()
    _, unwatched, found = activations_of(model, shape)
    assert {path: unwatched.of(path, found[path].shape) for path in expected} == expected


def test_the_last_call_counts_and_not_the_last_module_that_is_registered() -> None:
    class Late(nn.Module):
        """Registers its convolution last, and calls it first."""

        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(6, 6)
            self.conv = nn.Conv1d(6, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.conv(x.transpose(1, 2)).transpose(1, 2))  # type: ignore[no-any-return]

    watching, unwatched, found = activations_of(chain(Late()), (2, 6, 6))
    assert (watching.of("0", found["0"].shape), unwatched.of("0", found["0"].shape)) == ("tokens", "channels")
    assert (watching.sources["0"], unwatched.sources["0"]) == ("calls", "registration")


def test_the_raw_input_is_what_the_first_module_takes_it_for() -> None:
    for model, shape, expected in (
        (chain(nn.Linear(3, 8)), (2, 5, 7, 3), "channels_last"),
        (chain(nn.Conv2d(3, 8, 3)), (2, 3, 5, 7), "channels"),
        (chain(nn.Conv1d(3, 8, 3)), (2, 3, 5), "channels"),
        (chain(nn.Linear(3, 8)), (2, 5, 3), "tokens"),
    ):
        watching, unwatched, _ = activations_of(model, shape)
        assert watching.of("input", shape) == expected
        # Without a run only a convolution tells: a Linear may read what the network made of the input first.
        assert unwatched.of("input", shape) == ("channels" if expected == "channels_last" else expected)
        assert ("input" in unwatched.assumed) is isinstance(model[0], nn.Linear)


def test_what_no_module_tells_is_assumed_and_said() -> None:
    model = chain(Apply(torch.cos), Apply(lambda x: x.flatten(1)))
    for shape, expected in (((2, 5, 7), "tokens"), ((2, 5, 7, 3), "channels"), ((2, 5, 1), "channels")):
        watching, _, found = activations_of(model, shape)
        assert watching.of("0", found["0"].shape) == expected
        assert watching.assumed == {"0": expected}
        watching.of("1", found["1"].shape)
        assert watching.sources == {"0": "assumed"}


def test_what_the_user_says_holds_whatever_the_modules_tell() -> None:
    model = chain(nn.Linear(3, 8))
    axes = FeatureAxes(model, dict(model.named_children()), {"0": "channels"})
    with frozen(model), axes.watch(model):
        model(torch.randn(2, 5, 3))
    assert axes.of("0", (2, 5, 8)) == "channels"
    assert axes.sources == {"0": "layout"}


def test_what_was_found_goes_through_a_checkpoint_and_the_user_can_still_say_otherwise() -> None:
    model, shape, expected = CASES["a square ConvNeXt"]()
    watching, _, found = activations_of(model, shape)
    for path in expected:
        watching.of(path, found[path].shape)
    restored = FeatureAxes(model, dict(model.named_modules()), {"1": "channels_last"})
    restored.load_state_dict(watching.state_dict())
    now = {path: restored.of(path, found[path].shape) for path in expected}
    assert now == expected | {"1": "channels_last"}
    assert restored.sources == dict.fromkeys(expected, "calls") | {"1": "layout"}


def call(start: int, end: int, place: Any = None, size: int = 0, given: tuple[int, ...] | None = None) -> ModuleCall:
    treatment = None if place is None else Treatment(place, size, size)
    return ModuleCall(str(start), start, end, treatment, given)


def test_calls_alone_decide() -> None:
    own = call(2, 7)
    linear, convolution = call(3, 4, "last", 8), call(5, 6, "second", 8)
    reader = call(8, 9, "second", 5, (2, 5, 8))
    assert place_of((2, 5, 8), own, [linear, own]) == "last"
    assert place_of((2, 8, 5), own, [linear, convolution, own]) == "second"
    assert place_of((2, 5, 8), own, [linear, convolution, own]) == "last"  # turned at the end
    assert place_of((2, 8, 5), own, [linear, own]) == "second"
    # What the layer holds comes before what reads its output, which comes before what it was made of.
    assert place_of((2, 5, 8), own, [linear, own, reader]) == "last"
    assert place_of((2, 5, 8), own, [call(0, 1, "last", 8), own, reader]) == "second"
    assert place_of((2, 5, 8), own, [call(0, 1, "last", 8), own]) == "last"
    # What reads something of another shape tells nothing.
    assert place_of((2, 5, 8), own, [own, call(8, 9, "second", 5, (2, 5, 4, 2))]) is None
    assert place_of((2, 5, 8), own, [own, call(8, 9, "last", 7, (2, 5, 7))]) is None
    assert place_of((2, 5, 8), own, [own, call(8, 9, "last", 5, (2, 8, 5))]) == "second"
    assert place_of((2, 5, 8), own, []) is None


def test_a_watched_run_leaves_no_hook_and_keeps_no_activation() -> None:
    model = chain(nn.Linear(3, 8), Apply(lambda x: x.repeat(1, 2)))
    axes = FeatureAxes(model, dict(model.named_children()))
    with axes.watch(model):
        output = model(torch.randn(2, 3))
        kept = weakref.ref(output)
        del output
        gc.collect()
        assert kept() is None
    with pytest.raises(RuntimeError), axes.watch(model):
        model(torch.randn(2, 4))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert axes.of("0", (2, 8)) == "channels"


def test_a_pooler_has_a_feature_for_each_channel() -> None:
    model = chain(nn.LayerNorm(8), turned(), nn.AdaptiveAvgPool1d(1))
    x = torch.randn(4, 11, 8)
    recorder = ActivationRecorder(Reducer("pool", 64))
    recorder.attach({"2": model[2]}, FeatureAxes(model, {"2": model[2]}).of)
    recorder.start(4)
    model(x)
    torch.testing.assert_close(recorder.stop().features["2"], model[0](x).mean(dim=1))


class TestRealModels:
    """Tiny ones of Hugging Face."""

    def test_swin_and_its_pooler(self) -> None:
        transformers = pytest.importorskip("transformers")
        config = transformers.SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 2])
        model = transformers.SwinModel(config).eval()
        watching, _, found = activations_of(model, (2, 3, 32, 32))
        assert found["pooler"].shape == (2, 16, 1)
        assert watching.of("pooler", found["pooler"].shape) == "channels"
        blocks = [path for path, module in model.named_modules() if type(module).__name__ == "SwinLayer"]
        assert {watching.of(path, found[path].shape) for path in blocks} == {"tokens"}
        assert watching.of("embeddings.patch_embeddings.projection", (2, 8, 16, 16)) == "channels"

    def test_convnext(self) -> None:
        transformers = pytest.importorskip("transformers")
        config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32)
        model = transformers.ConvNextModel(config)
        watching, _, found = activations_of(model, (2, 3, 32, 32))  # 8 channels of 8 times 8
        inside = {path: watching.of(path, x.shape) for path, x in found.items() if x.dim() == 4}
        last = {path for path, axes in inside.items() if axes == "channels_last"}
        named = {"pwconv1", "pwconv2", "act", "layernorm"}
        expected = {path for path in inside if ".layers." in path and path.rpartition(".")[2] in named}
        assert last == expected
        assert len(expected) == 8

    @pytest.mark.parametrize("tokens", [16, 32])
    def test_mamba(self, tokens: int) -> None:
        transformers = pytest.importorskip("transformers")
        config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, vocab_size=50)
        model = transformers.MambaModel(config).eval()
        layers = {path: module for path, module in model.named_modules() if path}
        axes = FeatureAxes(model, layers)
        with frozen(model), axes.watch(model):
            model(input_ids=torch.arange(tokens).expand(2, -1))
        assert {axes.of(f"layers.{i}", (2, tokens, 32)) for i in range(2)} == {"tokens"}
        assert axes.of("layers.0.mixer", (2, tokens, 32)) == "tokens"
