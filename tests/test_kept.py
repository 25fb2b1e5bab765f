"""What is kept of a stretch of training: within the bounds, fairly, and over from one stretch to the next."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from states import differences, rng_states

from lightning_probes.replay.reservoir import Budget, Reservoir


def stretch(kept: Reservoir[int], sizes: list[int], bytes_each: int = 1) -> list[int]:
    kept.clear()
    for i, samples in enumerate(sizes):
        if kept.wants():
            kept.add(samples, i, samples * bytes_each)
        assert kept.seen == i + 1
    return kept.items()


def test_everything_is_kept_when_it_fits() -> None:
    kept = Reservoir[int](Budget(100, 200))
    assert stretch(kept, [16] * 6 + [4], 2) == list(range(7))
    assert (kept.samples, kept.num_bytes, kept.seen) == (100, 200, 7)
    assert stretch(kept, [16]) == [0]


@pytest.mark.parametrize("sizes", [[16] * 40, [16] * 39 + [5], [3 + i % 4 for i in range(40)]])
@pytest.mark.parametrize("is_second", [False, True], ids=["first stretch", "second stretch"])
def test_each_batch_has_about_the_same_chance_within_the_bounds(sizes: list[int], is_second: bool) -> None:
    before = rng_states()
    counts = torch.zeros(len(sizes))
    for seed in range(1500):
        kept = Reservoir[int](Budget(100, 150), seed)
        if is_second:
            stretch(kept, [7] * 30, 2)
            kept.renew(1)
            go_on(kept, sizes, 2)
        items = kept.items() if is_second else stretch(kept, sizes, 2)
        assert items == sorted(items)
        assert kept.samples == sum(sizes[i] for i in items) <= 75
        assert kept.num_bytes == 2 * kept.samples <= 150
        counts[items] += 1
    chance = counts / 1500
    # Five standard deviations of a fair sample; batches of uneven size may differ a little more.
    tolerance = 5 * (chance.mean() * (1 - chance.mean()) / 1500).sqrt()
    assert ((chance - chance.mean()).abs() < tolerance * (1 if len(set(sizes)) == 1 else 2)).all()
    assert differences(before, rng_states()) == []


def test_a_batch_larger_than_the_bounds_is_not_kept() -> None:
    kept = Reservoir[int](Budget(100, 10))
    assert stretch(kept, [16, 16]) == []
    assert not kept.wants()


def go_on(kept: Reservoir[int], sizes: list[int], bytes_each: int = 1, first: int = 0) -> None:
    for i, samples in enumerate(sizes):
        if kept.wants():
            kept.add(samples, first + i, samples * bytes_each)


lengths = st.lists(st.lists(st.integers(1, 12), max_size=30), min_size=1, max_size=5)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(stretches=lengths, max_samples=st.integers(1, 80), max_bytes=st.integers(1, 200), seed=st.integers(0, 99))
def test_bounds_hold_at_all_times_and_nothing_is_kept_twice(
    stretches: list[list[int]], max_samples: int, max_bytes: int, seed: int
) -> None:
    kept = Reservoir[int](Budget(max_samples, max_bytes), seed)
    seen: list[int] = []
    for sizes in stretches:
        kept.renew(1)
        for samples in sizes:
            seen.append(samples)
            if kept.wants():
                kept.add(samples, len(seen) - 1, 3 * samples)
            items = kept.items()
            assert len(items) == len(set(items))
            assert items == sorted(items)
            assert kept.samples == sum(seen[i] for i in items) <= max_samples
            assert kept.num_bytes == 3 * kept.samples <= max_bytes


@settings(max_examples=100, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=40), bound=st.integers(12, 100), seed=st.integers(0, 99))
def test_a_stretch_as_long_as_the_one_before_takes_all_its_places(sizes: list[int], bound: int, seed: int) -> None:
    kept = Reservoir[int](Budget(bound, 10**6), seed)
    go_on(kept, sizes)
    kept.renew(1)
    assert kept.items() != []
    go_on(kept, sizes, first=1000)
    assert all(item >= 1000 for item in kept.items())
    assert kept.items() != []


@pytest.mark.parametrize("bound", [80, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_the_number_kept_never_falls_while_a_new_stretch_takes_over(bound: int, seed: int) -> None:
    kept = Reservoir[int](Budget(bound, 10**6), seed)
    go_on(kept, [8] * 30)
    full, old = len(kept.items()), []
    assert full == min(bound // 8, 30)
    kept.renew(1)
    for i in range(30):
        go_on(kept, [8], first=1000 + i)
        assert len(kept.items()) == full
        old.append(sum(item < 1000 for item in kept.items()))
    # One for one, and no sooner than they are needed.
    assert old == [max(full - 1 - i, 0) for i in range(30)]


def test_a_short_stretch_leaves_the_newer_of_the_older_ones() -> None:
    kept = Reservoir[int](Budget(100, 10**6))
    go_on(kept, [10] * 10)
    kept.renew(1)
    go_on(kept, [10] * 4, first=100)
    kept.renew(1)
    go_on(kept, [10] * 2, first=200)
    assert kept.items() == [6, 7, 8, 9, 100, 101, 102, 103, 200, 201]
    kept.clear()
    assert (kept.items(), kept.samples, kept.num_bytes) == ([], 0, 0)
