from __future__ import annotations

import gc
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from itertools import product
from math import ceil, floor, prod
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import BasicBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_probes.network.arrangement import Arrangement
from lightning_probes.network.hooks import HEARD_BY, ActivationRecorder, first_float_tensor
from lightning_probes.network.masks import MaskReader
from lightning_probes.network.pooling import Reducer, mean_by_sample, nested_means, reduce
from lightning_probes.options import Axes
from lightning_probes.replay.frozen import frozen


def pooled(activation: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Means over the cells of a grid: cell i of s over n places is [floor(i n / s), ceil((i + 1) n / s))."""
    x = activation.double().numpy()
    edges = [
        [slice(floor(i * n / s), ceil((i + 1) * n / s)) for i in range(s)]
        for n, s in zip(x.shape[2:], grid, strict=True)
    ]
    cells = [x[(slice(None), slice(None), *cell)].reshape(*x.shape[:2], -1).mean(axis=2) for cell in product(*edges)]
    return torch.from_numpy(np.stack(cells, axis=2).reshape(len(x), -1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("shape", "axes", "grid"),
    [
        ((6,), "tokens", None),
        ((6, 1), "tokens", None),
        ((6, 50), "tokens", None),
        ((6, 7, 5), "tokens", "mean"),
        ((6, 70, 50), "tokens", "mean"),
        ((6, 3, 7, 5), "tokens", "mean"),
        ((6, 2, 3, 4, 5), "tokens", "mean"),
        ((6, 4, 8), "channels", (8,)),
        ((6, 4, 30), "channels", (8,)),
        ((6, 3, 3, 3), "channels", (3, 3)),
        ((6, 8, 7, 5), "channels", (2, 2)),
        ((6, 2, 3, 9), "channels", (3, 5)),
        ((6, 2, 1, 40), "channels", (1, 16)),
        ((6, 64, 5, 5), "channels", (1, 1)),
        ((6, 4, 6, 6, 6), "channels", (2, 2, 2)),
        ((6, 2, 2, 5, 7), "channels", (2, 2, 2)),
        ((6, 2, 2, 2, 2, 3), "channels", None),
    ],
)
def test_reduce_gives_the_means_of_the_reference(
    shape: tuple[int, ...], axes: Axes, grid: tuple[int, ...] | str | None, dtype: torch.dtype
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = reduce(x, 32, axes=axes)
    if isinstance(grid, tuple):
        expected = pooled(x, grid)
    else:
        expected = x.double().reshape(6, -1)
        if grid == "mean":
            expected = x.double().reshape(6, -1, shape[-1]).mean(dim=1)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Rounding alone: pooling stays in the activation's type, means over tokens are taken in float32 at least.
    unit = torch.finfo(dtype if isinstance(grid, tuple) else found.dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=4 * unit, atol=4 * unit)


def masked_by_hand(x: Tensor, mask: Tensor) -> Tensor:
    """One sample after another, each view with the mask of its batch."""
    rows = [x[i][mask[i % len(mask)] != 0] for i in range(len(x))]
    return torch.stack([row.double().mean(dim=0) if len(row) else torch.zeros(x.shape[2]).double() for row in rows])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("views", [1, 3])
def test_tokens_that_are_masked_are_left_out_of_the_mean(views: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(4, 6, generator=generator) < 0.6
    mask[0], mask[1] = True, False
    x = torch.randn(4 * views, 6, 5, generator=generator).to(dtype)
    expected = masked_by_hand(x, mask)
    x[~mask.repeat(views, 1)] = torch.nan  # padding, whatever it is
    out = torch.empty(4 * views, 5)
    for found in (reduce(x, 32, mask=mask), reduce(x, 32, mask=mask, out=out)):
        unit = torch.finfo(torch.float32 if found is out else found.dtype).eps
        torch.testing.assert_close(found.double(), expected, rtol=4 * unit, atol=4 * unit)


@pytest.mark.parametrize(
    ("shape", "axes"), [((4, 7, 5), "tokens"), ((6, 6, 5), "tokens"), ((4, 6, 5), "channels"), ((4, 6), "tokens")]
)
def test_a_mask_of_something_else_changes_nothing(shape: tuple[int, ...], axes: Axes) -> None:
    mask = torch.arange(6).expand(4, 6) < 3
    x = torch.randn(shape)
    expected = reduce(x, 32, axes=axes)
    assert torch.equal(reduce(x, 32, axes=axes, mask=mask), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masked_means_are_not_taken_in_the_precision_of_autocast(dtype: torch.dtype) -> None:
    mask = torch.arange(300).expand(2, 300) < torch.tensor([[300], [257]])
    x = torch.randn(2, 300, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = reduce(x, 32, mask=mask)
    torch.testing.assert_close(found.double(), masked_by_hand(x, mask), rtol=1e-6, atol=1e-6)


def test_vectors_wider_than_max_features_keep_their_width() -> None:
    assert reduce(torch.randn(2, 5000), 10).shape == (2, 5000)
    assert reduce(torch.randn(2, 3, 5000), 10).shape == (2, 5000)


@given(channels=st.integers(1, 40), size=st.lists(st.integers(1, 9), min_size=1, max_size=3), most=st.integers(1, 1200))
@settings(deadline=None)
def test_maps_are_pooled_to_the_largest_grid_that_fits(channels: int, size: list[int], most: int) -> None:
    width = reduce(torch.zeros(1, channels, *size), most, axes="channels").shape[1]
    grids = [tuple(min(s, n) for n in size) for s in range(1, max(size) + 1)]
    fitting = [channels * prod(grid) for grid in grids if channels * prod(grid) <= most]
    assert width == max(fitting, default=channels)


@given(channels=st.integers(1, 6), size=st.lists(st.integers(1, 7), min_size=1, max_size=3), most=st.integers(1, 200))
@settings(deadline=None)
def test_every_pooled_grid_has_the_right_values(channels: int, size: list[int], most: int) -> None:
    x = torch.randn(2, channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(most))
    side = max([s for s in range(1, max(size) + 1) if channels * prod(min(s, n) for n in size) <= most], default=1)
    expected = pooled(x, tuple(min(side, n) for n in size))
    torch.testing.assert_close(reduce(x, most, axes="channels"), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(9,), (9, 11), (6, 5, 4), (70, 70)])
def test_pooling_has_the_same_precision_wherever_it_happens(size: tuple[int, ...]) -> None:
    """Products, which pool some maps, are rounded under autocast; what inference makes cannot be trained with."""
    x = torch.randn(3, 4, *size, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        seen = reduce(x, 40, axes="channels")
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim(), torch.contiguous_format)
    found = [seen, reduce(x, 40, axes="channels"), reduce(x.contiguous(memory_format=layout), 40, axes="channels")]
    side = max(s for s in range(1, 40) if 4 * prod(min(s, n) for n in size) <= 40)
    for features in found:
        assert not features.requires_grad
        torch.testing.assert_close(
            features.double(), pooled(x.detach(), tuple(min(side, n) for n in size)), rtol=0, atol=1e-6
        )


@given(channels=st.integers(1, 6), size=st.lists(st.integers(1, 7), min_size=1, max_size=3), most=st.integers(1, 200))
@settings(deadline=None)
def test_a_map_with_channels_last_has_the_features_of_one_with_channels_first(
    channels: int, size: list[int], most: int
) -> None:
    x = torch.randn(2, channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(most))
    kinds: list[Any] = ["pool", "subset", "projection"]
    for kind in kinds:
        reducer = Reducer(kind, most)
        found = reducer("layer", x.movedim(1, -1), axes="channels_last")
        torch.testing.assert_close(found, reducer("layer", x, axes="channels"), rtol=1e-12, atol=1e-12)


LAYOUTS = [torch.strided, torch.jagged]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_nested_tensor_is_averaged_over_each_components_own_length(layout: Any, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, 5, generator=generator).to(dtype) for n in (3, 1, 7, 3)]
    found = nested_means(torch.nested.nested_tensor(parts, layout=layout))
    expected = torch.stack([part.double().mean(dim=0) for part in parts])
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nested_tensors_may_have_an_empty_component_and_more_dimensions(layout: Any) -> None:
    parts = [torch.ones(0, 2, 5), torch.arange(20.0).view(2, 2, 5)]
    found = nested_means(torch.nested.nested_tensor(parts, layout=layout))
    assert torch.equal(found, torch.stack([torch.zeros(5), parts[1].flatten(0, 1).mean(dim=0)]))


def test_nested_components_without_a_width_in_common_are_refused_with_their_shapes() -> None:
    for parts, shapes in (
        ([torch.ones(3), torch.ones(4)], r"\[\(3,\), \(4,\)\]"),
        ([torch.ones(3, 2), torch.ones(3, 4)], r"\[\(3, 2\), \(3, 4\)\]"),
    ):
        with pytest.raises(ValueError, match=f"expected nested components .*, found {shapes}"):
            nested_means(torch.nested.nested_tensor(parts))


@given(st.lists(st.integers(0, 4), max_size=20))
@settings(deadline=None)
def test_rows_are_averaged_by_sample(index: list[int]) -> None:
    rows = torch.randn(len(index), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = mean_by_sample(rows, torch.tensor(index, dtype=torch.long), 5)
    for sample in range(5):
        own = [row for row, place in zip(rows, index, strict=True) if place == sample]
        expected = torch.stack(own).mean(dim=0) if own else torch.zeros(3, dtype=torch.float64)
        torch.testing.assert_close(found[sample], expected, rtol=1e-12, atol=1e-12)


def test_blocks_of_an_encoder_that_skips_padding_have_the_means_of_the_tokens_that_count() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    lengths = [6, 2, 4]
    x, is_padding = torch.randn(3, 6, 8), torch.arange(6).expand(3, 6) >= torch.tensor(lengths).unsqueeze(1)
    found = recorder(encoder, "layers.0", "layers.1")
    found.start(3)
    with torch.no_grad():
        encoder(x, src_key_padding_mask=is_padding)
        features = found.stop().features
        alone = [sample[:length].unsqueeze(0) for sample, length in zip(x, lengths, strict=True)]
        for i in range(2):
            alone = [encoder.layers[i](sample) for sample in alone]
            expected = torch.cat([sample.mean(dim=1) for sample in alone])
            torch.testing.assert_close(features[f"layers.{i}"], expected, rtol=1e-5, atol=1e-5)


def test_a_layer_that_puts_out_a_nested_tensor_has_a_row_of_features_for_each_component() -> None:
    class Packing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nested.nested_tensor([x[0], x[1, :2], x[2, :4]])

    model = nn.ModuleDict({"packing": Packing()})
    x = torch.randn(3, 6, 8)
    found = recorder(model, "packing")
    found.memory = {"packing": torch.zeros(3, 8)}
    found.start(3)
    model["packing"](x)
    features = found.stop().features["packing"]
    assert features is found.memory["packing"]
    torch.testing.assert_close(features, torch.stack([x[0].mean(0), x[1, :2].mean(0), x[2, :4].mean(0)]))
    found.start(4)  # as many labels as there are not
    model["packing"](x)
    assert "first dimension is not that of the 4 labels" in found.stop().misfits["packing"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(4,), (4, 5), (4, 1, 5), (4, 5, 1), (4, 2, 3, 3), (4, 9, 9, 9), (4, 32, 1, 1)])
@pytest.mark.parametrize("axes", get_args(Axes))
def test_reduce_never_shares_memory_with_the_activation(shape: tuple[int, ...], dtype: torch.dtype, axes: Axes) -> None:
    x = torch.randn(shape).to(dtype)
    found = reduce(x, 32, axes=axes)
    before = found.clone()
    x.zero_()
    assert torch.equal(found, before)
    assert found.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@dataclass
class Output:
    indices: Tensor
    hidden: Tensor


class ModelOutput(OrderedDict[str, Any]):
    """As Hugging Face's: a mapping with its values as attributes too."""


INDICES, HIDDEN = torch.arange(3), torch.randn(3, 2)


@pytest.mark.parametrize(
    "output",
    [
        HIDDEN,
        (INDICES, HIDDEN),
        [INDICES, [None, "x", (HIDDEN,)]],
        {"ids": INDICES, "hidden": HIDDEN, "later": torch.randn(3, 4)},
        Output(INDICES, HIDDEN),
        ModelOutput(loss=torch.tensor(0.5), last_hidden_state=HIDDEN, hidden_states=(torch.randn(3, 2),)),
        (torch.tensor(1.5), {"deep": Output(INDICES, HIDDEN)}),
    ],
)
def test_first_float_tensor_is_found_wherever_it_is(output: Any) -> None:
    assert first_float_tensor(output) is HIDDEN


@pytest.mark.parametrize("output", [None, 3.0, "text", INDICES, torch.tensor(0.5), (), {}, [INDICES, None], Output])
def test_outputs_without_a_float_tensor_give_none(output: Any) -> None:
    assert first_float_tensor(output) is None


def recorder(model: nn.Module, *layers: str, max_features: int = 64) -> ActivationRecorder:
    made = ActivationRecorder(Reducer("pool", max_features))
    made.attach({layer: model.get_submodule(layer) for layer in layers})
    return made


def test_only_what_runs_between_start_and_stop_is_recorded() -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    found = recorder(model, "0")
    before, during, after = torch.randn(3, 5, 3)
    model(before)
    assert found.recording.features == {}
    found.start(5)
    expected = model(during)
    features = found.stop().features
    model(after)
    assert list(features) == ["0"]
    assert torch.equal(features["0"], expected)
    assert found.recording.features == {}
    assert found.stop().features == {}


def test_features_come_in_the_order_of_the_calls() -> None:
    model = nn.ModuleDict({"late": nn.Linear(2, 2), "early": nn.Linear(2, 2)})
    found = recorder(model, "late", "early")
    found.start(3)
    model["late"](model["early"](torch.randn(3, 2)))
    assert list(found.stop().features) == ["early", "late"]


def test_operation_in_place_after_a_layer_does_not_change_its_features() -> None:
    model = nn.Sequential(nn.Linear(3, 64), nn.ReLU(inplace=True))
    x = torch.randn(5, 3)
    found = recorder(model, "0")
    found.start(5)
    model(x)
    assert torch.equal(found.stop().features["0"], model[0](x))
    assert (model[0](x) < 0).any()


def test_no_graph_is_kept() -> None:
    model = nn.Sequential(BasicBlock(2, 2), nn.Flatten(), nn.Linear(32, 2))
    found = recorder(model, "0", "2", max_features=8)
    found.start(5)
    out = model(torch.randn(5, 2, 4, 4))
    graph = weakref.ref(out)
    del out
    gc.collect()
    assert graph() is None
    features = found.stop().features
    assert {x.shape[1] for x in features.values()} == {2, 8}
    assert not any(x.requires_grad or x.grad_fn for x in features.values())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_of_activation_checkpointing_is_ignored(use_reentrant: bool) -> None:
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(3, 3), nn.Tanh())
    found = recorder(model, "0")
    x = torch.randn(5, 3, requires_grad=True)
    expected = layer(x).detach()
    calls: list[int] = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    found.start(5)
    out = checkpoint(model, x, use_reentrant=use_reentrant)
    with torch.no_grad():
        layer.weight.mul_(2)  # so that the second time cannot be taken for the first
    out.sum().backward()
    assert len(calls) == 2
    assert torch.equal(found.stop().features["0"], expected)


def test_of_several_calls_the_first_that_fits_the_batch_counts() -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    found = recorder(model, "0")
    found.start(4)
    _, expected, _, _ = (model(torch.randn(samples, 3)) for samples in (7, 4, 8, 4))
    assert torch.equal(found.stop().features["0"], expected)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_of_several_calls_the_arranged_one_counts(number: int) -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    found = recorder(model, "0")
    found.arrangements = {"0": Arrangement(calls=(number,))}
    found.start(4)
    outputs = [model(torch.randn(4, 3)) for _ in range(3)]
    assert torch.equal(found.stop().features["0"], outputs[number])


@pytest.mark.parametrize("views", [1, 2, 5])
def test_activations_of_several_views_of_a_batch_are_kept_whole(views: int) -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    found = recorder(model, "0")
    found.arrangements = {"0": Arrangement("blocks", each=views, at=tuple(range(0, 4 * views, 4)), of=(4 * views, 4))}
    found.start(4)
    out = model(torch.randn(4 * views, 3))
    assert torch.equal(found.stop().features["0"], out)


@pytest.mark.parametrize("rows", [6, 8])
def test_call_that_does_not_fit_is_noted_with_its_shape(rows: int) -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    found = recorder(model, "0")
    found.start(4)
    model(torch.randn(rows, 3))
    expected = f"its activation has shape [{rows}, 4], whose first dimension is not that of the 4 labels of the batch"
    assert found.recording.misfits == {"0": expected}
    assert found.stop().features == {}


def test_output_without_floats_is_noted_with_its_type() -> None:
    class Ids(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"ids": x.argmax(dim=1)}

    model = nn.Sequential(Ids())
    found = recorder(model, "0")
    found.start(4)
    model(torch.randn(4, 3))
    assert found.recording.misfits == {"0": "its output holds no floating-point tensor but dict {'ids': int64[4]}"}


def test_layer_that_changes_its_width_is_noted_and_passed_over() -> None:
    model = nn.Sequential(nn.ReLU())
    found = recorder(model, "0")
    found.start(4)
    model(torch.randn(4, 3))
    found.stop()
    found.start(4)
    model(torch.randn(4, 5))
    assert found.recording.misfits == {"0": "it has 5 features where it had 3 before"}
    assert found.stop().features == {}


def test_totals_are_the_values_before_reduction() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Flatten())
    found = recorder(model, "0", "1", max_features=16)
    found.start(4)
    model(torch.randn(4, 2, 6, 6))
    assert found.totals == {"0": 144, "1": 144}
    assert [x.shape[1] for x in found.stop().features.values()] == [16, 144]


def test_the_mask_is_that_of_the_step() -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    found = recorder(model, "0")
    x, mask = torch.randn(2, 5, 3), torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    reader = MaskReader(0)
    reader.attach(model, {"0": model[0]}, "input")
    for own in (mask, None):
        found.start(2, masks=None if own is None else reader.read([own], 2, is_first=True))
        out = model(x)
        expected = masked_by_hand(out, mask if own is not None else torch.ones(2, 5)).float()
        torch.testing.assert_close(found.stop().features["0"], expected.detach())


def test_hooks_are_gone_after_detach() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    found = recorder(model, "0", "1")
    assert [len(module._forward_hooks) for module in model] == [1, 1]
    found.start(4)
    model(torch.randn(4, 3))
    found.detach("0")
    assert [len(module._forward_hooks) for module in model] == [0, 1]
    assert list(found.recording.features) == ["1"]
    found.detach()
    assert [len(module._forward_hooks) for module in model] == [0, 0]
    assert found.recording.features == {}


def test_attaching_again_leaves_one_hook() -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    found = recorder(model, "0")
    found.attach({"0": model[0]})
    assert len(model[0]._forward_hooks) == 1


def test_a_network_that_is_run_for_one_recorder_is_heard_by_no_other() -> None:
    model, other = (nn.Sequential(nn.Linear(3, 4), nn.ReLU()) for _ in range(2))
    own, second, elsewhere = recorder(model, "0"), recorder(model, "0", "1"), recorder(other, "1")
    for listening in (own, second, elsewhere):
        listening.start(5)
    x = torch.randn(5, 3)
    with frozen(model, own):
        model(x)
        other(x)
    assert [list(listening.recording.features) for listening in (own, second, elsewhere)] == [["0"], [], ["1"]]
    with pytest.raises(RuntimeError), frozen(model, own):
        model(torch.randn(5, 2))
    model(x)
    assert list(second.recording.features) == ["0", "1"]
    assert all(HEARD_BY not in vars(module) for module in model.modules())


def test_a_later_batch_of_another_size_does_not_fit_what_was_drawn() -> None:
    found = ActivationRecorder(Reducer("subset", 4))
    found.start(5)
    found.record("layer", torch.randn(5, 9))
    assert found.stop().features["layer"].shape == (5, 4)
    found.start(5)
    found.record("layer", torch.randn(5, 8))
    assert found.recording.misfits == {"layer": "it has 8 values where it had 9 when its subset was drawn"}
