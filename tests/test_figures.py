"""Figures show what the report holds, whatever it holds: read off the axes, and measured on the canvas."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from sklearn.isotonic import IsotonicRegression

from lightning_probes import ProbeReport
from lightning_probes.figures.names import blocks, labels
from lightning_probes.figures.scales import apart, scale_of

KINDS: list[Any] = ["depth", "time", "map"]
Error = Callable[[float, int], float]
"""The error of a layer, from its depth as a share and the epoch."""


def report_of(
    layers: Sequence[str],
    error: Error,
    epochs: Sequence[int] = range(6),
    *,
    baseline: float = 0.887,
    notes: Sequence[str] = (),
    metric: str = "error",
    task: str = "classification",
    steps: int = 100,
) -> ProbeReport:
    """Errors of 1 000 samples with intervals of their binomial, at the end of epochs or, with ``steps=1``, at steps."""
    rows = []
    for epoch in epochs:
        for depth, layer in enumerate(layers):
            value = error(depth / max(len(layers) - 1, 1), epoch)
            half = 1.96 * math.sqrt(max(value * (1 - value), 1e-4) / 1000)
            row = {"layer": layer, "depth": depth, "stage": "val", "dataloader": 0, "metric": metric, "value": value}
            row |= {"epoch": epoch if steps > 1 else 0, "step": steps * epoch, "samples": 1000, "features": 64}
            rows.append(row | {"low": max(0.0, value - half), "high": value + half, "logged_step": steps * epoch})
    return ProbeReport(rows=rows, baseline={"val": baseline}, notes=list(notes), tasks={"": task})


def falling(depth: float, epoch: int) -> float:
    return 0.02 + 0.07 * (1 - depth) + 0.3 * depth * math.exp(-epoch / 1.5)


def residual(stages: Sequence[int]) -> list[str]:
    parts = ["conv1", "bn1", "relu", "conv2", "bn2", "conv3"]
    inside = [f"layer{i}.{j}.{part}" for i, n in enumerate(stages, 1) for j in range(n) for part in parts]
    return ["input", "conv1", *inside, "avgpool", "fc"]


LONG = ["self_attention.query_key_value_projection", f"self_attention.output_{'x' * 60}", "mlp.dense_h_to_4h"]
LAYERS = {
    "one": ["net"],
    "five": ["input", "net.0", "net.2", "net.4", "head"],
    "forty": ["input", *(f"module.encoder.stages.layers.{i}.{part}" for i in range(13) for part in LONG)],
    "three hundred": residual([3, 8, 36, 3]),
    "five hundred": [f"l.{i}" for i in range(500)],
    "odd": ["<script>alert(1)</script>", "a$b$c", r"\frac{", "x_{1}^2", "Ünïcode.слой", "y" * 120, "_hidden"],
}


def drawn(figure: Any) -> Any:
    """The renderer of a figure, once it is drawn as it will be saved."""
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas.get_renderer()


def boxes(texts: Sequence[Any], renderer: Any) -> list[Any]:
    return [text.get_window_extent(renderer) for text in texts if text.get_visible() and text.get_text().strip()]


# Whatever the report holds


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", LAYERS)
def test_names_are_told_apart_and_all_words_are_on_the_figure(which: str, kind: Any) -> None:
    names = LAYERS[which]
    figure = report_of(names, falling, range(100) if len(names) > 100 else range(6)).plot(kind)
    renderer = drawn(figure)
    axes = figure.axes[0]
    ticks = {"depth": axes.get_xticklabels(), "map": axes.get_yticklabels(), "time": []}[kind]
    assert len(ticks) <= 48
    assert max((len(tick.get_text()) for tick in ticks), default=0) <= 32
    if kind != "time":
        assert ticks[-1].get_text()  # the last layer is named
    words = [*ticks, *axes.texts, axes.title, *figure.texts, *(axes.get_xticklabels() if kind != "depth" else [])]
    everything = figure.bbox
    for box in boxes(words, renderer):
        assert everything.x0 - 2 <= box.x0 <= box.x1 <= everything.x1 + 2
        assert everything.y0 - 2 <= box.y0 <= box.y1 <= everything.y1 + 2
    # Names at an angle are a line apart where they begin; others do not touch.
    if kind == "depth":
        assert all(right.x1 - left.x1 > 10 for left, right in pairwise(boxes(ticks, renderer)))
    else:
        assert not any(one.overlaps(other) for one, other in combinations(boxes(ticks or axes.texts, renderer), 2))
    assert axes.get_position().width > 0.3
    assert axes.get_position().height > 0.3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("error", "epochs"),
    [
        pytest.param(lambda depth, epoch: math.nan, range(3), id="nothing"),
        pytest.param(lambda depth, epoch: 0.0, range(3), id="all right"),
        pytest.param(lambda depth, epoch: 0.25, [0], id="one moment"),
        pytest.param(lambda depth, epoch: math.nan if depth > 0.3 else 0.3 - 0.1 * depth, [1], id="one value"),
        pytest.param(lambda depth, epoch: 0.1 * (depth < 0.5) * epoch, range(3), id="zeros"),
        pytest.param(lambda depth, epoch: 40.0 ** (1 - depth) + epoch, range(3), id="beyond one"),
        pytest.param(lambda depth, epoch: math.inf if depth > 0.9 else 0.1, range(3), id="infinite"),
    ],
)
def test_every_report_is_drawn(kind: Any, error: Error, epochs: Sequence[int]) -> None:
    figure = report_of(LAYERS["five"], error, epochs, baseline=math.nan if len(epochs) == 1 else 0.9).plot(kind)
    assert len(figure.png()) > 1000
    assert ("no values" in [text.get_text() for text in figure.axes[0].texts]) == (
        kind != "map" and not any(math.isfinite(error(depth, 1)) for depth in (0.0, 0.25, 0.5, 0.75, 1.0))
    )


def test_the_first_word_of_plot_is_its_kind() -> None:
    report = report_of(LAYERS["five"], falling)
    assert isinstance(report.plot(), Figure)
    with pytest.raises(
        ValueError, match=r"^kind: expected one of 'depth', 'time', 'map', found 'heat'; did you mean 'depth'\?$"
    ):
        report.plot("heat")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"found 'train'; write stage='train'$"):
        report.plot("train")  # type: ignore[call-overload]


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_chosen_by_name_or_glob(kind: Any) -> None:
    report = report_of(residual([3, 8, 36, 3]), falling)
    chosen: list[tuple[Any, list[str]]] = [
        ("layer1.*.conv1", [f"layer1.{i}.conv1" for i in range(3)]),
        (["fc", "input"], ["input", "fc"]),
        (["layer4.**", "conv1"], ["conv1", *(name for name in residual([3, 8, 36, 3]) if name.startswith("layer4"))]),
    ]
    for layers, expected in chosen:
        axes = report.plot(kind, layers=layers).axes[0]
        if kind == "time":
            assert [line.get_label() for line in axes.lines][: len(expected)] == expected
        elif kind == "map":
            assert np.asarray(axes.images[0].get_array()).shape == (len(expected), 6)
        else:
            assert len(np.asarray(axes.lines[0].get_ydata())) == len(expected)
    with pytest.raises(ValueError, match=r"^layers: 'layer9.0.conv1' matches no layer; nearest: layer\d"):
        report.plot(kind, layers="layer9.0.conv1")
    with pytest.raises(TypeError, match=r"^layers: expected a pattern or a list"):
        report.plot(kind, layers=3)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"^layers: an empty list"):
        report.plot(kind, layers=[])


def test_a_name_that_is_a_glob_is_a_name() -> None:
    axes = report_of(["net[0]", "net0"], falling).plot(layers="net[0]").axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["net[0]"]


# The axis of values


@pytest.mark.parametrize(
    ("errors", "baseline", "is_logarithmic", "is_beyond"),
    [
        pytest.param([0.08, 0.2, 0.45], 0.887, False, True, id="8 to 45 %, baseline far above"),
        pytest.param([0.35, 0.5, 0.7], 0.887, False, False, id="baseline near"),
        pytest.param([0.02, 0.1, 0.5], 0.887, True, False, id="factors"),
        pytest.param([0.002, 0.005, 0.018], 0.9, True, True, id="small errors, baseline far above"),
        pytest.param([0.44, 0.45, 0.46], 0.9, False, True, id="all alike"),
        pytest.param([0.44, 0.45, 0.46], 0.02, False, True, id="something far below"),
        pytest.param([0.0, 0.01, 0.3], 0.5, True, False, id="with a zero"),
    ],
)
@pytest.mark.parametrize("kind", ["depth", "time"])
def test_the_axis_is_what_the_data_ask_for(
    kind: Any, errors: list[float], baseline: float, is_logarithmic: bool, is_beyond: bool
) -> None:
    report = report_of(["a", "b", "c"], lambda depth, epoch: errors[round(2 * depth)], [1, 2], baseline=baseline)
    axes = report.plot(kind).axes[0]
    assert (axes.get_yscale() != "linear") == is_logarithmic
    words = [text.get_text() for text in axes.texts if text.get_text()[:1] in "↑↓"]
    arrow = "↑" if baseline > errors[1] else "↓"
    assert words == ([f"{arrow} majority class {100 * baseline:.1f} %"] if is_beyond else [])
    low, high = ((axes.transScale + axes.transLimits).transform((0.0, 100 * x))[1] for x in (min(errors), max(errors)))
    # The data reach far up an axis from 0, or take most of another; intervals may be wider than they are.
    assert high > 0.6 or errors[0] > 0.4
    assert high - low > 0.5 or not is_logarithmic
    assert -1e-9 <= low < high <= 1


def test_marks_of_a_logarithmic_axis_are_round_and_inside() -> None:
    for least, most in ((0.3, 3.0), (0.01, 0.2), (1.0, 95.0), (1e-6, 100.0)):
        scale = scale_of([least, most, (least * most) ** 0.5])
        ticks = scale.ticks()
        assert scale.is_logarithmic
        assert 2 <= len(ticks) <= 12
        low, high = scale.limits()
        assert all(low <= tick <= high for tick in ticks)
        assert all(f"{tick:e}"[0] in "125" for tick in ticks)
    assert scale_of([0.0, 0.5, 30.0]).ticks()[0] == 0


def test_metrics_of_which_more_is_better_are_never_logarithmic() -> None:
    report = report_of(["a", "b", "c"], lambda depth, epoch: 0.05 + 0.9 * depth, metric="AUROC")
    axes = report.plot(metric="AUROC").axes[0]
    assert axes.get_yscale() == "linear"
    assert axes.get_ylabel() == "probe AUROC"
    assert report.plot("map", metric="AUROC").axes[0].images[0].get_cmap().name == "viridis"


@pytest.mark.parametrize(
    ("task", "words", "error"),
    [
        ("classification", "majority class 50.0 %", "probe error (%)"),
        ("multilabel", "commonest answers 50.0 %", ""),
        ("regression", "the mean 50.0 %", ""),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_every_task_has_its_error_and_its_baseline(kind: Any, task: str, words: str, error: str) -> None:
    from lightning_probes.tasks.kinds import words_of

    figure = report_of(["a", "b", "c"], lambda depth, epoch: 0.4 - 0.1 * depth, baseline=0.5, task=task).plot(kind)
    axis = figure.axes[1 if kind == "map" else 0].get_ylabel()
    assert axis.startswith(f"probe {words_of(task).error} (%)")
    shown = [axis, *(text.get_text() for text in figure.axes[0].texts)]
    shown += [str(line.get_label()) for line in figure.axes[0].lines]
    assert any(words_of(task).baseline in text and "50.0 %" in text for text in shown)


# What is drawn


def test_depth_has_a_line_a_moment_from_early_to_late_and_the_interval_of_the_last() -> None:
    report = report_of(LAYERS["five"], falling, range(30))
    axes = report.plot().axes[0]
    lines = [line for line in axes.lines if str(line.get_label()).startswith(("start", "epoch"))]
    assert len(lines) == 8
    for line in lines:
        epoch = int(str(line.get_label()).replace("start", "epoch 0").split()[1])
        expected = [100 * falling(depth, epoch) for depth in (0, 0.25, 0.5, 0.75, 1)]
        assert np.asarray(line.get_ydata()).tolist() == pytest.approx(expected)
    # The later the darker: a copy in grey tells them apart.
    light = [np.dot(to_rgba(line.get_color())[:3], (0.2126, 0.7152, 0.0722)) for line in lines]
    assert light == sorted(light, reverse=True)
    (band,) = axes.collections
    last = report.select(epoch=29)
    assert np.asarray(band.get_paths()[0].vertices)[:, 1].min() == pytest.approx(100 * min(r["low"] for r in last))


def test_time_has_a_line_a_layer_named_at_its_end_and_spread_so_that_words_do_not_overlap() -> None:
    names = [f"net.{i}" for i in range(18)]
    # All lines end within a tenth of a point.
    figure = report_of(names, lambda depth, epoch: 0.3 / (1 + epoch) + 1e-3 * depth).plot("time")
    renderer = drawn(figure)
    (axes,) = figure.axes
    assert figure.legends == []
    words = [text.get_text() for text in axes.texts if text.get_text().startswith("net.")]
    assert [word.split()[0] for word in words] == names
    assert [float(word.split()[1]) for word in words] == pytest.approx([5 + 0.1 * i / 17 for i in range(18)], abs=0.06)
    assert not any(one.overlaps(other) for one, other in combinations(boxes(axes.texts, renderer), 2))
    # In the order of the lines' ends.
    heights = [text.get_position()[1] for text in axes.texts if text.get_text().startswith("net.")]
    assert heights == sorted(heights)


def test_of_many_layers_time_names_the_first_the_last_the_best_and_the_worst() -> None:
    rng = random.Random(0)
    ends = {i / 299: 0.1 + 0.3 * rng.random() for i in range(300)}
    names = [f"net.{i}" for i in range(300)]
    axes = report_of(names, lambda depth, epoch: ends[depth], range(3)).plot("time").axes[0]
    words = {text.get_text().split()[0]: text for text in axes.texts if text.get_text().startswith("net.")}
    order = sorted(range(300), key=lambda i: ends[i / 299])
    assert {"net.0", "net.299", f"net.{order[0]}", f"net.{order[-1]}"} <= words.keys()
    assert len(words) <= 12
    assert words[f"net.{order[0]}"].get_fontweight() == "bold"
    assert "300 layers" in axes.get_xlabel()


def test_moments_far_apart_have_an_axis_that_says_what_it_is() -> None:
    steps = [0, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000]
    report = report_of(LAYERS["five"], lambda depth, step: 0.1 + 0.3 / (1 + step), steps, steps=1)
    axes = report.plot("time").axes[0]
    assert axes.get_xscale() == "symlog"
    assert axes.get_xlabel().startswith("step, logarithmic")
    axes = report.plot("map").axes[0]
    assert axes.get_xlabel() == "step, a column a moment: not to scale"
    shown = [tick.get_text() for tick in axes.get_xticklabels()]
    assert (shown[0], shown[-1]) == ("start", "10000")
    even = report_of(LAYERS["five"], falling, range(1, 9))
    assert even.plot("map").axes[0].get_xlabel() == "epoch"
    assert even.plot("time").axes[0].get_xscale() == "linear"


def test_map_has_a_row_a_layer_and_a_column_a_moment_and_a_bar_with_the_unit() -> None:
    report = report_of(LAYERS["five"], falling)
    figure = report.plot("map", references={"the network": 0.05})
    axes, bar = figure.axes
    expected = [[100 * falling(depth, epoch) for epoch in range(6)] for depth in (0, 0.25, 0.5, 0.75, 1)]
    cells = np.asarray(axes.images[0].get_array())
    assert cells == pytest.approx(np.array(expected))
    assert bar.get_ylabel() == "probe error (%)\nmajority class: 88.7 %\nthe network: 5.0 %"
    assert len(bar.lines) == 2  # of what is among the colours, in light and dark
    assert sorted(text.get_text() for text in axes.texts) == sorted(f"{x:.1f}" for x in cells.ravel())
    # The input is on top, as in the table.
    assert axes.get_ylim()[0] > axes.get_ylim()[1]


def test_differences_that_may_be_chance_do_not_take_all_colours() -> None:
    report = report_of(LAYERS["five"], lambda depth, epoch: 0.45 + 1e-3 * depth)
    norm: Any = report.plot("map").axes[0].images[0].norm
    half = 1.96 * math.sqrt(0.45 * 0.55 / 1000)
    assert norm.vmax - norm.vmin == pytest.approx(200 * half, rel=0.05)


CROSS = "\N{MULTIPLICATION SIGN}"
NAN = "layer 'net.2' is set aside at epoch 3, step 300: NaN or Inf in its features or their squares (val)"


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_is_set_aside_is_a_gap_with_a_mark_and_its_reason(kind: Any) -> None:
    def error(depth: float, epoch: int) -> float:
        return math.nan if 0.4 < depth < 0.6 and epoch >= 3 else falling(depth, epoch)

    figure = report_of(["input", "net.0", "net.2", "net.20", "head"], error, notes=[NAN, "another"]).plot(kind)
    small = " ".join("".join(text.get_text() for text in figure.texts).split())
    assert f"{CROSS} {NAN}" in small
    assert f"{CROSS} another" not in small
    axes = figure.axes[0]
    crosses = [line for line in axes.lines if line.get_marker() == "x"]
    if kind == "depth":
        (cross,) = crosses
        assert np.asarray(cross.get_xdata()).tolist() == [2]
        last = np.asarray(axes.lines[5].get_ydata(), dtype=float)
        assert np.flatnonzero(np.isnan(last)).tolist() == [2]
        assert "no value" in [text.get_text() for text in figure.legends[0].get_texts()]
    elif kind == "time":
        (cross,) = crosses
        assert np.ravel(cross.get_xdata()).tolist() == [2]
        assert [text.get_text() for text in axes.texts if "no value" in text.get_text()] == [
            f"net.2  {100 * error(0.5, 2):.1f} % (no value since)"
        ]
    else:
        cells: Any = axes.images[0].get_array()
        assert np.argwhere(np.ma.getmaskarray(cells)).tolist() == [[2, 3], [2, 4], [2, 5]]
        assert axes.patch.get_hatch()
        assert "hatched: no value" in axes.get_xlabel()
    bare = report_of(["a", "b"], lambda depth, epoch: math.nan if depth else 0.2).plot(kind)
    assert f"{CROSS} b: no value at the last point." in bare.texts[0].get_text()


# Where it is drawn


@pytest.mark.parametrize("kind", KINDS)
def test_own_axes_are_drawn_into_and_the_rest_of_their_figure_is_left_alone(kind: Any) -> None:
    figure = Figure(layout="constrained")
    left, right = figure.subplots(1, 2)
    axes: Axes = report_of(LAYERS["forty"], falling).plot(kind, ax=right)
    assert axes is right
    assert not [*left.lines, *left.images, *left.texts, *figure.legends, *figure.texts]
    drawn(figure)
    small = Figure(figsize=(3, 3)).subplots(6, 6)[2, 3]
    report_of(LAYERS["three hundred"], falling, range(100)).plot(kind, ax=small)
    drawn(small.figure)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("style", ["default", "dark_background", "transparent"])
def test_words_are_read_on_light_and_dark_backgrounds(kind: Any, style: str) -> None:
    own: Any = {"figure.facecolor": (1, 1, 1, 0), "axes.facecolor": (1, 1, 1, 0)} if style == "transparent" else {}
    with mpl.rc_context(own or None):
        if not own:
            mpl.style.use(style)
        figure = report_of(LAYERS["five"], falling).plot(kind)
    (face,) = {to_rgba(figure.get_facecolor())}
    assert face[3] == 1
    axes = figure.axes[0]
    words = [*axes.get_xticklabels(), *axes.get_yticklabels(), axes.title, axes.xaxis.label, axes.yaxis.label]
    words += figure.texts + [text for legend in figure.legends for text in legend.get_texts()]
    words += [] if kind == "map" else axes.texts
    assert min(contrast(to_rgba(text.get_color()), face) for text in words) >= 4.5
    lines = [line for line in axes.lines if str(line.get_label()).startswith(("epoch", "start", *LAYERS["five"]))]
    assert min((contrast(to_rgba(line.get_color()), face) for line in lines), default=9) >= 1.8


def contrast(one: Sequence[float], other: Sequence[float]) -> float:
    """As the Web Content Accessibility Guidelines define it; 4.5 is wanted of words."""

    def luminance(colour: Sequence[float]) -> float:
        linear = [x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in colour[:3]]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_drawing_draws_from_no_generator_changes_no_setting_and_leaves_pyplot_nothing() -> None:
    before = torch.get_rng_state(), str(np.random.get_state()), random.getstate(), dict(mpl.rcParams)
    figures = pyplot.get_fignums()
    for kind in KINDS:
        pixels = report_of(LAYERS["forty"], falling).plot(kind).pixels()
        assert pixels.shape[2] == 3
        assert pixels.std() > 10
    assert pyplot.get_fignums() == figures
    after = torch.get_rng_state(), str(np.random.get_state()), random.getstate(), dict(mpl.rcParams)
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_a_notebook_shows_the_layers_by_depth_and_the_map() -> None:
    page = report_of(LAYERS["odd"], falling)._repr_html_()
    assert page.count("<img ") == 2
    assert 'alt="probe error, depth"' in page
    assert 'alt="probe error, map"' in page
    assert "<script>" not in page
    assert report_of(LAYERS["odd"], falling, [1])._repr_html_().count("<img ") == 1


# Blocks and places


def test_blocks_share_the_longest_path_that_leaves_few() -> None:
    found = [(block.name, block.first, block.last) for block in blocks(residual([3, 8, 36, 3]))]
    assert found == [
        ("input", 0, 0),
        ("conv1", 1, 1),
        ("layer1", 2, 19),
        ("layer2", 20, 67),
        ("layer3", 68, 283),
        ("layer4", 284, 301),
        ("avgpool", 302, 302),
        ("fc", 303, 303),
    ]
    assert [block.path for block in blocks(LAYERS["forty"])][:3] == [
        "input",
        "module.encoder.stages.layers.0",
        "module.encoder.stages.layers.1",
    ]
    for names in (LAYERS["five"], LAYERS["one"], LAYERS["five hundred"], ["a", "b", "c"]):
        assert blocks(names) == []


@pytest.mark.parametrize("which", LAYERS)
@pytest.mark.parametrize("most", [2, 7, 40])
def test_every_nth_layer_is_named_and_the_last(which: str, most: int) -> None:
    names = LAYERS[which]
    path, texts = labels(names, 24, most)
    assert len(texts) <= max(most, 1) + 1
    assert 0 in texts
    assert len(names) - 1 in texts
    assert max(map(len, texts.values())) <= 24
    gaps = {second - first for first, second in pairwise(list(texts)[:-1])}
    assert len(gaps) <= 1
    if all(len(name) <= 24 for name in names):
        assert path == ""
        assert texts == {i: names[i] for i in texts}


@given(wanted=st.lists(st.floats(-0.5, 1.5), min_size=1, max_size=30, unique=True), gap=st.floats(0.001, 0.2))
def test_words_are_moved_as_little_as_possible(wanted: list[float], gap: float) -> None:
    found = apart(wanted, gap)
    order = np.argsort(wanted)
    gap = min(gap, 1 / max(len(wanted) - 1, 1))
    steps = gap * np.arange(len(wanted))
    model = IsotonicRegression(y_min=0, y_max=max(0.0, 1 - steps[-1]))
    expected = model.fit_transform(np.arange(len(wanted)), np.array(wanted)[order] - steps) + steps
    assert np.array(found)[order] == pytest.approx(expected, abs=1e-6)
