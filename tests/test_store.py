"""The feature store and what solvers read out of it: the features as they were, within bounds, and no files left."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import pytest
import torch
from classified import solve
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_probes.distributed import Ranks, alone
from lightning_probes.probes.dataset import FeatureDataset, HalfPrecisionStore, LayerBatch, LayerSamples
from lightning_probes.probes.rows import Parts, Rows, statistics
from lightning_probes.tasks.classification import Classification

SCALES = st.sampled_from([1e-8, 1e-4, 1.0, 1e4, 1e8])


def labels_of(samples: int, classes: int = 3) -> Tensor:
    return torch.eye(classes)[torch.arange(samples) % classes]


def held(max_bytes: int) -> tuple[HalfPrecisionStore, FeatureDataset]:
    store = HalfPrecisionStore(max_bytes)
    return store, FeatureDataset(Classification(3), store, numbers_left_out=True)


def add(data: FeatureDataset, layer: str, x: Tensor, batch: int, views: int = 1) -> None:
    """Batch by batch; a batch has its samples once for each view."""
    for first in range(0, len(x) // views, batch):
        part = torch.cat([view[first : first + batch] for view in x.chunk(views)])
        samples = len(part) // views
        data.add(LayerBatch({layer: part}, labels_of(len(x))[first + torch.arange(samples)]))


def read(store: HalfPrecisionStore, layer: str) -> Tensor:
    return torch.cat(list(store.read(layer)))


def in_batches(x: Tensor, batch: int, views: int) -> Tensor:
    """In the order of the pass."""
    chunks = x.chunk(views)
    firsts = range(0, len(chunks[0]), batch)
    return torch.cat([view[first : first + batch] for first in firsts for view in chunks])


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1000),
    samples=st.integers(2, 30),
    batch=st.sampled_from([1, 2, 7, 30]),
    views=st.integers(1, 3),
    scale=SCALES,
    shift=st.sampled_from([0.0, 1.0, 100.0]),
    constant=st.booleans(),
    outlier=st.sampled_from([0.0, 1e3, 1e7]),
    max_bytes=st.sampled_from([1, 100, 10**6]),
)
def test_features_are_read_as_they_were_to_half_precision_of_their_deviation(
    seed: int,
    samples: int,
    batch: int,
    views: int,
    scale: float,
    shift: float,
    constant: bool,
    outlier: float,
    max_bytes: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(views * samples, 4, generator=generator) + shift
    if constant:
        x[:, 1] = 3.0
    x[-1, 2] += outlier
    x *= scale
    store, data = held(max_bytes)
    try:
        add(data, "layer", x, batch, views)
        found, expected = read(store, "layer"), in_batches(x, batch, views)
        assert found.shape == expected.shape
        assert found.dtype == torch.float32
        # Every value in deviations from the first batch's mean, and of the whole layer where there is next to none.
        first = expected[: views * min(batch, samples)].mean(dim=0)
        deviation = x.std(dim=0, unbiased=False)
        deviation = deviation + 1e-3 * deviation.mean()
        rounding = 2**-11 * ((expected - first).abs() + deviation) + 2**-22 * (expected.abs() + first.abs())
        assert ((found - expected).abs() <= rounding).all()
        assert store.memory_bytes <= max_bytes
        assert store.memory_bytes + store.file_bytes >= 2 * x.numel()
        assert store.is_read_whole("layer") == (4 * x.numel() <= max_bytes / 4)
        assert data.samples == samples
    finally:
        store.close()


@pytest.mark.parametrize("max_bytes", [1, 10**6], ids=["on disk", "in memory"])
@pytest.mark.parametrize(
    ("bad", "where"), [(bad, where) for bad in (math.nan, math.inf, -math.inf) for where in (0, 25)] + [(1e38, 25)]
)
def test_what_half_precision_cannot_hold_is_kept_as_it_is(bad: float, where: int, max_bytes: int) -> None:
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    x[where, 1] = bad
    store, data = held(max_bytes)
    add(data, "layer", x, 8)
    found = read(store, "layer")
    batch = slice(8 * (where // 8), 8 * (where // 8) + 8)
    assert torch.equal(found[batch].nan_to_num(), x[batch].nan_to_num())
    assert torch.equal(found.isfinite(), x.isfinite())
    fine = x.isfinite() & (x.abs() < 1e30)
    torch.testing.assert_close(found[fine], x[fine], rtol=2e-3, atol=2e-3)
    store.close()


@pytest.mark.parametrize("max_bytes", [1, 10**6], ids=["on disk", "in memory"])
def test_double_precision_stays(max_bytes: int) -> None:
    x = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e-12 + 1
    store, data = held(max_bytes)
    add(data, "layer", x, 8)
    assert torch.equal(read(store, "layer"), x)
    store.close()


def test_a_layer_that_is_constant_at_first_and_tiny_later_does_not_vanish() -> None:
    x = torch.cat([torch.zeros(8, 3), 1e-8 * torch.randn(32, 3, generator=torch.Generator().manual_seed(0))])
    store, data = held(10**6)
    add(data, "layer", x, 8)
    torch.testing.assert_close(read(store, "layer"), x, rtol=2e-3, atol=1e-11)
    store.close()


@pytest.mark.parametrize("max_bytes", [1, 1000, 10**9])
def test_views_have_the_label_and_the_position_of_their_sample(max_bytes: int) -> None:
    # Each feature says which sample it is of.
    samples = 5000
    x = torch.arange(samples).float().view(-1, 1).repeat(2, 1)
    store, data = held(max_bytes)
    add(data, "two views", x, 64, views=2)
    read_layer = data.reader(Ranks(), "cpu")
    assert read_layer("never seen") is None
    given = read_layer("two views")
    assert given is not None
    layer, _, y, folds = given
    assert layer == "two views"
    store, data = held(max_bytes)  # it was given out and is gone
    add(data, "two views", x, 64, views=2)
    parts = store.read("two views")
    found = torch.cat(list(parts))
    positions = in_batches(torch.arange(samples).repeat(2), 64, 2)
    drawn = torch.randperm(samples, generator=torch.Generator().manual_seed(0)) % 5
    assert torch.equal(folds, drawn[positions])
    assert torch.equal(y, labels_of(samples)[positions])
    assert (found.flatten() - positions).abs().max() <= 0.5 * 5000 / 64
    # No more than so many at a time.
    assert len(parts) == len(parts.lengths) > 1
    assert max(parts.lengths) <= 2048
    assert [len(part) for part in parts] == list(parts.lengths)
    assert torch.equal(parts[-1], parts[len(parts) - 1])
    assert torch.equal(parts[1], parts[1])
    store.close()


def test_files_are_there_while_they_are_needed_and_gone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    x = torch.randn(40, 3)
    store, data = held(100)
    add(data, "one", x[:8], 8)
    assert (store.memory_bytes, store.file_bytes) == (48, 0)
    assert list(tmp_path.iterdir()) == []
    add(data, "two", x, 8)
    assert (store.memory_bytes, store.file_bytes) == (96, 48 * 4)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.features")) == store.file_bytes
    kept = store.read("two")
    before = torch.cat(list(kept))
    store.close()
    assert list(tmp_path.iterdir()) == []
    assert torch.isfinite(before).all()


def test_soft_labels_are_kept_as_they_are() -> None:
    soft = torch.softmax(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    _, data = held(100)
    data.add(LayerBatch({"layer": torch.randn(8, 2)}, soft))
    data.add(LayerBatch({"layer": torch.randn(4, 2)}, torch.eye(3)[torch.tensor([0, 0, 1, 2])]))
    given = data.reader(Ranks(), "cpu")("layer")
    assert given is not None
    targets = given.targets
    assert torch.equal(targets[:8], soft)
    assert torch.equal(
        data.target_sums,
        torch.bincount(soft.argmax(dim=1), minlength=3).double() + torch.tensor([2.0, 1.0, 1.0]).double(),
    )


# Rows


@st.composite
def cuts(draw: st.DrawFn) -> tuple[int, list[int]]:
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
    return draw(st.integers(0, 1000)), lengths


@settings(deadline=None, max_examples=60)
@given(cuts())
def test_products_of_parts_are_those_of_the_whole(drawn: tuple[int, list[int]]) -> None:
    seed, lengths = drawn
    generator = torch.Generator().manual_seed(seed)
    samples = sum(lengths)
    x = torch.randn(samples, 3, generator=generator, dtype=torch.float64)
    ones = torch.cat([x, torch.ones(samples, 1, dtype=torch.float64)], dim=1)
    pieces = ones.split(lengths)  # type: ignore[no-untyped-call]
    parts = Rows(Parts(lengths, lambda i: pieces[i]), 4, torch.float64)
    weights = torch.rand(2, samples, generator=generator, dtype=torch.float64)
    v = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    mask = torch.rand(samples, generator=generator) < 0.5
    for rows, there, its in (
        (parts, ones, slice(None)),
        (Rows.of(x), ones, slice(None)),
        (parts.kept(), ones, slice(None)),
        (parts.where(mask), ones[mask], mask),
        (Rows.of(x).where(mask), ones[mask], mask),
        (parts.to(torch.float32), ones.float(), slice(None)),
    ):
        w, u = (part.to(there) for part in (weights[:, its], v))
        off = 1e-4 if there.dtype == torch.float32 else 1e-9
        assert rows.samples == len(there)
        assert rows.width == 4
        for most in (1, 4, 100):
            chunks = list(rows.chunks(most))
            assert max((len(some) for some, _ in chunks), default=0) <= most
            scores = torch.cat([u @ some.T for some, _ in chunks], dim=1)
            torch.testing.assert_close(scores, u @ there.T, rtol=off, atol=off)
            sums = sum(w[:, place] @ some for some, place in chunks)
            torch.testing.assert_close(sums, w @ there, rtol=off, atol=off)
        torch.testing.assert_close(rows.gram(w[0]), there.T @ torch.diag(w[0]) @ there, rtol=off, atol=off)


@settings(deadline=None, max_examples=40)
@given(cuts(), st.sampled_from([1e-8, 1.0, 1e8]))
def test_statistics_of_parts_are_those_of_the_whole(drawn: tuple[int, list[int]], scale: float) -> None:
    seed, lengths = drawn
    x = scale * torch.randn(sum(lengths), 3, generator=torch.Generator().manual_seed(seed))
    pieces = x.split(lengths)  # type: ignore[no-untyped-call]
    mean, variance = statistics(Parts(lengths, lambda i: pieces[i]))
    expected = x.double() if len(x) else torch.zeros(1, 3, dtype=torch.float64)
    torch.testing.assert_close(mean.double(), expected.mean(dim=0), rtol=1e-4, atol=1e-5 * scale)
    torch.testing.assert_close(
        variance.double(), expected.var(dim=0, unbiased=False), rtol=1e-4, atol=1e-5 * scale * scale
    )


def test_a_solver_finds_the_same_in_parts_as_in_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 5, generator=generator), labels_of(200)
    pieces = torch.cat([x, torch.ones(200, 1)], dim=1).split(60)  # type: ignore[no-untyped-call]
    lengths = [len(piece) for piece in pieces]
    whole = solve(Rows.of(x), y, 1e-3)
    parted = solve(Rows(Parts(lengths, lambda i: pieces[i]), 6, torch.float32), y, 1e-3)
    torch.testing.assert_close(parted.weight, whole.weight, rtol=1e-2, atol=1e-3)
    assert parted.tally[2] == whole.tally[2] == 200
    assert abs(parted.tally[0] - whole.tally[0]) <= 1


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1000),
    samples=st.integers(2, 700),
    width=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    data=st.data(),
)
def test_fingerprint_is_that_of_the_rows_in_any_order(
    seed: int, samples: int, width: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(samples, width, generator=generator, dtype=dtype), labels_of(samples)

    def mark(x: Tensor | Parts, y: Tensor) -> int:
        return LayerSamples("a", x, y, torch.zeros(len(y))).fingerprint(alone)

    order = torch.randperm(samples, generator=generator)
    cut = data.draw(st.integers(0, samples))
    parts = Parts([cut, samples - cut], lambda i: x[order][:cut] if i == 0 else x[order][cut:])
    assert mark(x[order], y[order]) == mark(parts, y[order]) == mark(x, y)
    row, column = data.draw(st.integers(0, samples - 1)), data.draw(st.integers(0, width - 1))
    other = x.clone()
    other[row, column] = torch.nextafter(x[row, column], x.new_tensor(torch.inf))
    assert mark(other, y) != mark(x, y)
    assert mark(x, y.roll(1, dims=0)) != mark(x, y)
    assert mark(x[1:], y[1:]) != mark(x, y)
    # Samples of two processes are those of one.
    shares = [mark(x[:cut], y[:cut]), mark(x[cut:], y[cut:])]
    assert sum(shares) % 2**64 == mark(x, y) % 2**64


def test_fingerprints_of_features_with_little_in_them_differ() -> None:
    """Dead layers, maps padded with zeros, activations of two values, tables of codes."""

    def mark(x: Tensor, y: Tensor) -> int:
        return LayerSamples("a", x, y, torch.zeros(len(x))).fingerprint(alone)

    signs = torch.randn(60, 12, generator=torch.Generator().manual_seed(0)).sign()
    found = [torch.zeros(60, width, dtype=dtype) for width in (1, 8, 64) for dtype in (torch.float32, torch.float64)]
    found += [torch.cat([signs, torch.zeros(60, more)], dim=1) for more in (0, 1, 4)]
    found += [signs[:, torch.randperm(12, generator=torch.Generator().manual_seed(i))] for i in range(1, 20)]
    found += [signs.clone().index_fill_(0, torch.tensor([i]), 1.0) for i in range(5)]
    codes = torch.eye(12)[torch.arange(60) % 12]
    found += [codes.roll(i, dims=1) for i in range(12)]
    y = labels_of(60)
    rows = [(x.dtype, x.shape, str(sorted(torch.cat([x, y], dim=1).tolist()))) for x in found]
    assert len({mark(x, y) for x in found}) == len(set(rows)) > 30
    assert mark(torch.zeros(5, 2), torch.zeros(5, 3)) != mark(torch.zeros(10, 2), torch.zeros(10, 3))


@pytest.mark.parametrize("width", [5, 255, 256, 600])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_gram_matrix_is_that_of_all_rows_and_symmetric(width: int, is_weighted: bool) -> None:
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(90, width, generator=generator, dtype=torch.float64)
    weights = torch.rand(90, generator=generator, dtype=torch.float64) if is_weighted else None
    parts = Parts([40, 0, 50], lambda i: (x[:40], x[:0], x[40:])[i])
    rows = Rows.standardised(parts, x.mean(dim=0), x.var(dim=0, unbiased=False))
    whole = torch.cat(list(rows.parts))
    expected = whole.T @ (torch.ones(90).double() if weights is None else weights).diag() @ whole
    torch.testing.assert_close(rows.gram(weights), expected, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(rows.gram(weights), rows.gram(weights).T, rtol=1e-12, atol=1e-10)
