"""Fixed random subsets and projections: the same every time, of a generator of their own, taken through checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from networks import QUIET, Classifier, loader, mlp

from lightning_probes import LinearProbeCallback, probe
from lightning_probes.network.pooling import OtherSizeError, Reducer, reduce

KINDS = ["subset", "projection"]


def test_a_subset_is_of_the_values_themselves() -> None:
    x = torch.arange(2 * 3 * 8 * 8.0).view(2, 3, 8, 8)
    found = Reducer("subset", 20)("net.0", x)
    flat = x.flatten(1)
    places = [flat[0].tolist().index(value) for value in found[0].tolist()]
    assert len(set(places)) == 20
    assert places == sorted(places)
    assert torch.equal(found, flat[:, places])


@settings(deadline=None, max_examples=30)
@given(values=st.integers(2, 200), most=st.integers(1, 40))
def test_a_projection_is_linear_and_each_value_is_in_one_sum_with_a_sign(values: int, most: int) -> None:
    reducer = Reducer("projection", most)
    matrix = reducer("net.0", torch.eye(values, dtype=torch.float64))  # (values, features)
    if values <= most:
        assert torch.equal(matrix, torch.eye(values, dtype=torch.float64))
        return
    assert matrix.shape == (values, most)
    assert (matrix.abs().sum(dim=1) == 1).all()
    assert (matrix.abs().max(dim=1).values == 1).all()
    x = torch.randn(5, values, dtype=torch.float64)
    torch.testing.assert_close(reducer("net.0", x), x @ matrix)


def test_a_projection_keeps_lengths_on_average() -> None:
    x = torch.randn(400, 4096, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = Reducer("projection", 256)("net.0", x)
    # The ratio of a sample has variance 2 / 256, their mean over 400 samples that of 0.09 / 20.
    assert (found.norm(dim=1) ** 2 / x.norm(dim=1) ** 2).mean().item() == pytest.approx(1, abs=4 * 0.0884 / 20)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_are_the_same_anywhere_and_leave_other_generators_alone(kind: Any) -> None:
    x = torch.randn(3, 4, 9, 9)
    before = torch.get_rng_state()
    one, again = Reducer(kind, 30), Reducer(kind, 30)
    assert torch.equal(one("net.0", x), again("net.0", x))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(one("net.1", x), one("net.0", x))
    restored = Reducer(kind, 30)
    state = one.state_dict()
    state["draws"]["net.1"] = state["draws"]["net.0"]
    restored.load_state_dict(state)
    assert torch.equal(restored("net.1", x), one("net.0", x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_features_are_in_float32_or_float64_and_in_memory_that_is_lent(kind: Any, dtype: torch.dtype) -> None:
    x = torch.randn(3, 4, 9, 9).to(dtype)
    reducer = Reducer(kind, 30)
    found = reducer("net.0", x)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    out = torch.empty_like(found)
    assert reducer("net.0", x, out=out) is out
    assert torch.equal(out, found)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_averaged_first_and_small_layers_are_left_as_they_are(kind: Any) -> None:
    x, mask = torch.randn(2, 5, 12), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]).bool()
    reducer = Reducer(kind, 12)
    assert torch.equal(reducer("a", x, mask=mask), reduce(x, 12, mask=mask))
    assert torch.equal(reducer("b", x[:, 0]), x[:, 0])
    few = Reducer(kind, 6)
    assert torch.equal(few("a", x, mask=mask), few("a", reduce(x, 12, mask=mask)))
    with pytest.raises(OtherSizeError, match="it has 13 values where it had 12 when its"):
        few("a", torch.randn(2, 13))


def test_another_kind_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^reduction: expected 'pool', 'subset' or 'projection', found 'mean'$"):
        LinearProbeCallback(reduction="mean")  # type: ignore[arg-type]


def fit(probes: LinearProbeCallback, folder: Path, epochs: int, **options: Any) -> None:
    seed_everything(2, verbose=False)
    saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer = Trainer(**{**QUIET, "enable_checkpointing": True}, max_epochs=epochs, callbacks=[probes, saving])
    trainer.fit(Classifier(mlp()), loader(64), loader(32, seed=1), **options)


@pytest.mark.parametrize("kind", KINDS)
def test_the_callback_and_probe_see_the_same_features_and_resuming_goes_on_with_them(kind: Any, tmp_path: Path) -> None:
    whole, resumed = (LinearProbeCallback(reduction=kind, max_features=8) for _ in range(2))
    fit(whole, tmp_path / "whole", 2)
    rows = {row["layer"]: row for row in whole.report.rows}
    assert {row["features"] for row in rows.values() if row["features_total"] > 8} == {8}
    assert any(f"a random {kind} of at most 8 values" in note for note in whole.report.notes)
    checkpoint = str(tmp_path / "whole" / "epoch=0.ckpt")
    saved = torch.load(checkpoint, weights_only=True)["callbacks"][whole.state_key]["probes"]["reduction"]
    assert saved["kind"] == kind
    assert saved["draws"].keys() == {layer for layer, row in rows.items() if row["features_total"] > 8}
    fit(resumed, tmp_path / "resumed", 2, ckpt_path=checkpoint)
    assert resumed.report == whole.report
    report = probe(
        Classifier(mlp()),
        loader(64),
        loader(32, seed=1),
        ckpt_path=checkpoint,
        reduction=kind,
        max_features=8,
        trainer=Trainer(**QUIET),
    )
    assert {row["layer"]: row["features"] for row in report.rows} == {x: row["features"] for x, row in rows.items()}
    with pytest.raises(ValueError, match=f"reduction is '{kind}' in the checkpoint and 'pool' here"):
        fit(LinearProbeCallback(), tmp_path / "other", 2, ckpt_path=checkpoint)
    with pytest.warns(UserWarning, match="start afresh: reduction is"):
        fit(LinearProbeCallback(strict=False), tmp_path / "afresh", 2, ckpt_path=checkpoint)


def test_a_kind_that_is_not_known_is_no_projection_by_chance() -> None:
    unknown: Any = "max"
    with pytest.raises(ValueError, match="reduction: nothing is drawn for 'max'"):
        Reducer(unknown, 4)("net.0", torch.zeros(2, 9))
