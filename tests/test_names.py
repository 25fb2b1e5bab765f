"""Names are short, and no two of them look the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_probes.figures.names import shorten

SEGMENTS = st.sampled_from(["layers", "0", "1", "10", "self_attention", "output_projection", "x" * 40, "a", "_orig"])
PATHS = st.lists(st.lists(SEGMENTS, min_size=1, max_size=6).map(".".join), min_size=1, max_size=60, unique=True)


@given(names=PATHS, width=st.integers(12, 40))
def test_no_two_names_look_the_same_and_none_is_too_long(names: list[str], width: int) -> None:
    path, short = shorten(names, width)
    assert list(short) == names
    assert len(set(short.values())) == len(names)
    assert max(map(len, short.values())) <= width
    # What is whole is a name, or the rest of one below the path that is said.
    for name, shown in short.items():
        assert ".." in shown or name in (shown, f"{path}.{shown}")


@given(names=PATHS)
def test_names_that_fit_stay_whole(names: list[str]) -> None:
    assert shorten(names, max(map(len, names))) == ("", {name: name for name in names})


@pytest.mark.parametrize(
    ("names", "path", "shown"),
    [
        (
            [f"layers.{i}.self_attention.output_projection" for i in range(11)],
            "layers",
            [*(f"{i}.self_at..n.output_projection" for i in range(10)), "10.self_a..n.output_projection"],
        ),
        (
            ["input", *[f"encoder.blocks.{i}.attention_of_many_heads" for i in range(3)]],
            "encoder.blocks",
            ["input", *[f"{i}.attention_of_many_heads" for i in range(3)]],
        ),
        # A path that is said would make two of these the same.
        (["head", f"net.{'x' * 40}", "net.head"], "", ["head", f"net.xxxxx..{'x' * 19}", "net.head"]),
        # They differ before and after the gap, wherever it is.
        (
            [f"{a}{'x' * 30}{b}{'x' * 30}{c}" for a in "ab" for b in "ab" for c in "ab"],
            "",
            [f"{a}{'x' * 26}..{i}" for i, a in enumerate("aaaabbbb")],
        ),
    ],
)
def test_shared_path_is_said_once_and_long_names_are_cut_in_the_middle(
    names: list[str], path: str, shown: list[str]
) -> None:
    found, short = shorten(names, 30)
    assert found == path
    assert list(short.values()) == shown
