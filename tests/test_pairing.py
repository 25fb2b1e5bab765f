"""Every row stands beside the label of its own sample, or its layer is left out with the reason.

The reference gives each network one sample at a time, and fits scikit-learn's regression on what its layers put out.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foldings import CASES, CLASSES, Case, Host, Reference
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer, seed_everything
from networks import QUIET
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from lightning_probes import LinearProbeCallback, ProbeReport
from lightning_probes.network import pairing, provenance, torch_internals
from lightning_probes.network.extractor import LayerExtractor
from lightning_probes.network.pairing import Outcome
from lightning_probes.options import checked
from lightning_probes.probes.dataset import LayerBatch
from lightning_probes.replay.recorder import CallRecorder
from lightning_probes.replay.reservoir import Budget
from lightning_probes.replay.trial import pair

NEAR = 0.02
"""Bound the difference of two errors on 320 samples: six of them."""


def options_of(case: Case) -> dict[str, Any]:
    # A layer that is named by its path, and cannot be probed, is an error: these are named by a pattern.
    left_out = [f"{layer[:-1]}[{layer[-1]}]" for layer in case.left_out]
    named = [*case.read, *case.fallback, *left_out]
    return {"layers": named, "input": "x", "target": "y", "num_classes": 4, **case.options}


def fitted(case: Case) -> tuple[Host, ProbeReport]:
    """Run a case for an epoch with the callback."""
    seed_everything(0)
    host = Host(case)
    probes = LinearProbeCallback(**options_of(case))
    Trainer(max_epochs=1, callbacks=[probes], num_sanity_val_steps=0, **QUIET).fit(host, *case.loaders())
    return host, probes.report


def one_by_one(
    host: Host, layers: Mapping[str, Reference], loader: Any, *, is_training: bool
) -> dict[str, tuple[Any, Any]]:
    """Return ``{layer: features and labels of every row}``, from steps with a single sample each."""
    case = host.case
    calls: dict[str, list[Any]] = {layer: [] for layer in layers}
    found: dict[str, tuple[list[Tensor], list[int]]] = {layer: ([], []) for layer in layers}
    hooks = [
        host.get_submodule(layer).register_forward_hook(lambda _m, _a, output, layer=layer: calls[layer].append(output))
        for layer in layers
    ]
    step = case.step if is_training else case.validating or case.step
    host.eval()
    with torch.no_grad():
        for sample in loader.dataset:
            step(host, case.collate([sample])["x"])
            for layer, reference in layers.items():
                of_sample = reference(calls[layer][case.reads_call.get(layer, 0)])
                found[layer][0].append(of_sample)
                found[layer][1].extend([sample[1]] * len(of_sample))
                calls[layer].clear()
    for hook in hooks:
        hook.remove()
    return {layer: (torch.cat(x).double().numpy(), np.array(y)) for layer, (x, y) in found.items()}


def error_by_hand(fit: tuple[Any, Any], scored: tuple[Any, Any], l2: float) -> float:
    """Return the error of scikit-learn's regression at a strength of L2."""
    (x, y), (x_scored, y_scored) = fit, scored
    mean, deviation = x.mean(0), x.std(0)
    deviation[deviation == 0] = 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LogisticRegression(C=1 / (l2 * len(x)), max_iter=2000).fit((x - mean) / deviation, y)
    return float(1 - model.score((x_scored - mean) / deviation, y_scored))


def expected(
    host: Host, layers: Mapping[str, Reference], l2: Mapping[str, float], *, on_training: bool
) -> dict[str, float]:
    """Return the error of each layer, by hand."""
    train, val = host.case.loaders()
    scored = one_by_one(host, layers, val, is_training=False)
    fit = one_by_one(host, layers, train, is_training=True) if on_training else scored
    return {layer: error_by_hand(fit[layer], scored[layer], l2[layer]) for layer in layers}


def errors(report: ProbeReport) -> dict[str, float]:
    rows = report.select(stage="val", metric="error", epoch=1)
    return {row["layer"]: row["value"] for row in rows}


def mistakes(case: Case) -> dict[str, str]:
    """Run a case; return ``{layer: what is wrong}``."""
    host, report = fitted(case)
    found = errors(report)
    l2 = {row["layer"]: row.get("l2") or 1e-2 for row in report.select(stage="val", metric="error", epoch=1)}
    wrong: dict[str, str] = {}
    missing = [layer for layer in (*case.read, *case.fallback) if not np.isfinite(found.get(layer, np.nan))]
    wrong |= dict.fromkeys(missing, "it was not read")
    read = {layer: reference for layer, reference in case.read.items() if layer not in missing}
    # A probe of wrong pairs would choose a strength at which any probe answers with the most frequent class.
    plain = expected(host, read, dict.fromkeys(read, 1e-2), on_training=True)
    for layer, error in expected(host, read, l2, on_training=True).items():
        if abs(error - found[layer]) > NEAR or found[layer] > plain[layer] + 3 * NEAR:
            wrong[layer] = f"{found[layer]:.3f} where it is {error:.3f}, or {plain[layer]:.3f} with little penalty"
    crossed = {layer: reference for layer, reference in case.fallback.items() if layer not in missing}
    for layer, error in expected(host, crossed, dict.fromkeys(crossed, 1e-2), on_training=False).items():
        # These by hand are scored on the samples that they were fitted on: four fifths of them are not as many.
        if abs(error - found[layer]) > 3 * NEAR:
            wrong[layer] = f"{found[layer]:.3f} where it is about {error:.3f}"
    notes = " ".join(report.notes)
    for layer, reason in case.left_out.items():
        if np.isfinite(found.get(layer, np.nan)):
            wrong[layer] = f"read, with an error of {found[layer]:.3f}"
        elif layer not in notes or reason not in notes:
            wrong[layer] = f"left out without its reason: {report.notes}"
    return wrong


@pytest.mark.parametrize("name", CASES)
def test_every_number_belongs_to_its_sample(name: str) -> None:
    assert mistakes(CASES[name]()) == {}


@pytest.mark.parametrize("name", ["mixed_samples", "shuffled_samples"])
def test_samples_that_the_step_mixes_leave_it_to_validation(name: str) -> None:
    case = CASES[name]()
    _, report = fitted(case)
    rows = report.select(stage="val", metric="error", epoch=1)
    assert {row["fitted_on"]["data"] for row in rows if row["layer"] in case.fallback} == {"val, cross-fitted"}
    assert any("mixes samples" in note for note in report.notes)


# Random foldings, without a Trainer


def paired(
    step: Any, model: nn.Module, batch: dict[str, Tensor], layers: list[str]
) -> tuple[LayerExtractor, LayerBatch]:
    """Run a step once, experiment with it, and return the features of its samples."""
    reading = checked({"input": "x", "target": "y", "num_classes": CLASSES}, "")
    network = LayerExtractor(layers, None, reading)
    network.attach(model)
    recorder = CallRecorder(Budget(0, 0), network.heard)
    recorder.attach(model, network.modules)
    provenance = network.open(batch)
    assert provenance is not None
    recorder.start(provenance=provenance)
    with torch.no_grad():
        step(model, batch["x"])
    recorded = recorder.stop()
    seen = network.close()
    assert seen is not None
    seen = pair(network, recorded, seen, model, nullcontext)
    network.detach()
    return network, seen


@dataclass(frozen=True)
class Folds:
    """Fold parts of samples into the batch in some order, and bring them together again."""

    order: tuple[int, ...]
    flattened: int
    again: bool

    def __call__(self, model: Any, x: Tensor) -> Tensor:
        folded = x.permute(*self.order, 3)
        leading = folded.shape[: self.flattened]
        hidden = model.first(folded.flatten(0, self.flattened - 1) * 0.9 + 0.1)
        if self.again:  # The rest of the network sees one row a sample again.
            back = hidden.unflatten(0, leading).permute(*np.argsort(self.order).tolist(), 3)
            hidden = model.glue(back)
        return model.second(hidden)  # type: ignore[no-any-return]


class Glue(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=2).flatten(1)


@settings(max_examples=60, deadline=None)
@given(
    order=st.permutations((0, 1, 2)),
    flattened=st.integers(2, 3),
    again=st.booleans(),
    samples=st.integers(2, 7),
    parts=st.integers(1, 4),
    steps=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_random_foldings_are_read_right_or_left_out(
    order: tuple[int, ...], flattened: int, again: bool, samples: int, parts: int, steps: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    model: Any = nn.Module()
    model.first, model.glue = nn.Linear(3, 4), Glue()
    model.second = nn.Linear(4 * parts if again else 4, 2)
    x = torch.randn(samples, parts, steps, 3, generator=generator)
    step = Folds(tuple(order), flattened, again)
    batch = {"x": x, "y": torch.arange(samples) % CLASSES}
    network, seen = paired(step, model, batch, ["first", "second"])
    for layer, features in seen.features.items():
        if layer == "input" or layer not in network.pairing.arrangements:
            continue
        # What a layer puts out for a sample alone, as rows of features.
        alone: list[Tensor] = []
        module = model.get_submodule(layer)
        hook = module.register_forward_hook(
            lambda _m, _a, output, alone=alone: alone.append(output.detach().flatten(0, -2))
        )
        with torch.no_grad():
            for i in range(samples):
                step(model, x[i : i + 1])
        hook.remove()
        found = features.view(-1, samples, features.shape[1])
        for i, rows in enumerate(alone):
            # Views, parts and tokens are groups of equally many rows, so that all of them have one mean.
            torch.testing.assert_close(found[:, i].mean(dim=0), rows.mean(dim=0), atol=1e-5, rtol=1e-5)


def test_most_random_foldings_are_read() -> None:
    read = total = 0
    for seed in range(40):
        draw = random.Random(seed)
        order, flattened, again = tuple(draw.sample((0, 1, 2), 3)), draw.randint(2, 3), bool(draw.randint(0, 1))
        samples, parts, steps = draw.randint(3, 7), draw.randint(1, 4), draw.randint(1, 5)
        model: Any = nn.Module()
        model.first, model.glue = nn.Linear(3, 4), Glue()
        model.second = nn.Linear(4 * parts if again else 4, 2)
        x = torch.randn(samples, parts, steps, 3, generator=torch.Generator().manual_seed(seed))
        batch = {"x": x, "y": torch.arange(samples) % CLASSES}
        network, _ = paired(Folds(order, flattened, again), model, batch, ["first", "second"])
        read += sum(layer in network.pairing.arrangements for layer in ("first", "second"))
        total += 2
    assert read >= 0.75 * total


# A wrong pairing makes the table fail


def by_shape_alone(network: Any, step: Any, seen: Any, *args: Any, **options: Any) -> Any:
    """Take consecutive blocks of the batch for views, as if a shape said so."""
    network.pairing.give_up("of this test")
    return seen


def in_another_order(patch: pytest.MonkeyPatch) -> None:
    """Believe the first hypothesis, whatever changes."""
    patch.setattr(pairing, "_WEAK", float("nan"))
    patch.setattr(pairing, "_best", lambda fit: Outcome(fit[0].arrangement))


def without_tracing(patch: pytest.MonkeyPatch) -> None:
    """Follow no operation, and compare no content."""
    patch.setattr(torch_internals.OperationMode, "is_known", False)
    patch.setattr(provenance.Provenance, "_by_content", lambda self, tensor: None)


PLACES = ("training.session", "replay.trial", "posthoc.passes")
WRONG: dict[str, tuple[Any, list[str]]] = {
    "shape alone": (
        lambda patch: [patch.setattr(f"lightning_probes.{place}.pair", by_shape_alone) for place in PLACES],
        ["gru_time_first_square", "shuffled_samples", "unlabelled_and_labelled"],
    ),
    "hypotheses in another order": (in_another_order, ["transformer_time_first_square", "two_augmentations"]),
    "the tracer off": (without_tracing, ["shuffled_samples", "bytes_divided_and_folded"]),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_pairing_makes_the_table_fail(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sabotage, names = WRONG[wrong]
    sabotage(monkeypatch)
    for name in names:
        assert mistakes(CASES[name]()) != {}, name


# No trace


class Trained(Host):
    """Train the network of a case on whatever it puts out."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.losses: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.case.step(self, batch["x"]).float().pow(2).mean()
        self.losses.append(loss.detach())
        return loss  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def trained(name: str, *probes: LinearProbeCallback) -> list[Any]:
    """Train a case; return losses, weights and random states."""
    seed_everything(0)
    host = Trained(CASES[name]())
    train, val = host.case.loaders()
    Trainer(max_epochs=1, limit_train_batches=4, callbacks=list(probes), **QUIET).fit(host, train, val)
    return [host.losses, list(host.state_dict().values()), torch.get_rng_state(), torch.rand(3), random.random()]


TRACED = [
    *("labelled_and_unlabelled", "mixed_samples", "bytes_divided_and_folded", "packed_ragged_lengths", "gan"),
    *(
        "views_stacked_sample_by_sample",
        "random_in_eval",
        "experts",
        "layer_drop",
        "spectral_norm",
        "padded_by_the_step",
    ),
]


@pytest.mark.parametrize("fit_samples", [None, 0])
@pytest.mark.parametrize("name", TRACED)
def test_a_step_that_is_followed_is_bit_equal(name: str, fit_samples: int | None) -> None:
    case = CASES[name]()
    options = options_of(case) | {"layers": ["**"], "fit_samples": fit_samples}
    probes = LinearProbeCallback(**options)
    bare, with_probes = trained(name), trained(name, probes)
    assert all(torch.equal(a, b) for a, b in zip(bare[0], with_probes[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(bare[1], with_probes[1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(bare[2:4], with_probes[2:4], strict=True))
    assert bare[4] == with_probes[4]
    assert probes.report.rows


@pytest.mark.parametrize("number", [1, 3])
def test_several_callbacks_leave_no_mode_behind(number: int) -> None:
    host = Trained(CASES["labelled_and_unlabelled"]())
    probes = [LinearProbeCallback(**options_of(host.case), name=f"probes {i}") for i in range(number)]
    Trainer(max_epochs=1, callbacks=[*probes], num_sanity_val_steps=0, **QUIET).fit(host, *host.case.loaders())
    assert not is_in_torch_dispatch_mode()
    errors = [[row["value"] for row in each.report.select(metric="error")] for each in probes]
    assert errors == errors[:1] * number
    assert errors[0]


def test_the_mode_is_closed_after_an_exception() -> None:
    class Fails(Trained):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            super().training_step(batch, batch_idx)
            raise ZeroDivisionError

    host = Fails(CASES["labelled_and_unlabelled"]())
    probes = LinearProbeCallback(**options_of(host.case))
    with pytest.raises(ZeroDivisionError):
        Trainer(max_epochs=1, callbacks=[probes], num_sanity_val_steps=0, **QUIET).fit(host, *host.case.loaders())
    assert not is_in_torch_dispatch_mode()


def test_what_was_found_goes_into_checkpoints(tmp_path: Path) -> None:
    case = CASES["lstm_time_first"]()
    host = Host(case)
    first, resumed = LinearProbeCallback(**options_of(case)), LinearProbeCallback(**options_of(case))
    trainer = Trainer(max_epochs=1, callbacks=[first], **QUIET)
    trainer.fit(host, *case.loaders())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    experiments: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_probes.training.session.pair", lambda network, *_args: experiments.append("again"))
        Trainer(max_epochs=2, callbacks=[resumed], **QUIET).fit(host, *case.loaders(), ckpt_path=tmp_path / "last.ckpt")
    assert experiments == []
    assert errors(resumed.report) == errors(first.report)
    (row, *_) = resumed.report.select(layer="net", stage="val", metric="error", epoch=2)
    assert row["rows"] == "time first"
    assert row["reduction"] == "mean of 64 tokens"
