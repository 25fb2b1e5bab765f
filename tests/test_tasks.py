"""What probes are asked, beside scikit-learn: several labels, numbers, and classes; missing entries; any unit."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from asked import ASKED, answers, numbers
from classified import heads_of
from exact import features_by_hand
from fits import make_trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import seed_everything
from networks import Classifier, convnet, loader, mlp
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import balanced_accuracy_score, r2_score
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_probes import LinearProbeCallback, ProbeReport
from lightning_probes.probes.dataset import LayerBatch
from lightning_probes.probes.fit import fit_probe
from lightning_probes.probes.online import OnlineProbes
from lightning_probes.probes.solver import Solution, solve
from lightning_probes.probes.standardise import inverse_deviation
from lightning_probes.tasks.classification import Classification
from lightning_probes.tasks.intervals import cluster_sums, clustered_interval
from lightning_probes.tasks.multilabel import Multilabel
from lightning_probes.tasks.regression import Regression
from lightning_probes.tasks.task import Task, UnusableLabelsError


def planted(
    samples: int, task: str, seed: int = 0, width: int = 6, outputs: int = 3, missing: float = 0.2
) -> tuple[Tensor, Tensor]:
    """Features in which each answer can be seen but for some noise, and answers, some of which are missing."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, width, generator=generator, dtype=torch.float64) * 3 + 1
    direction = torch.randn(width, outputs, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    y = (x - 1) @ direction + 2 * torch.randn(samples, outputs, generator=generator, dtype=torch.float64)
    if task == "multilabel":
        y = (y > torch.tensor([0.5, 4.0, -2.0])[:outputs]).double()
    gone = torch.rand(samples, outputs, generator=generator) < missing
    return x, torch.where(gone, math.nan, y)


def task_for(kind: str, labels: Tensor) -> Task:
    task: Task = Multilabel() if kind == "multilabel" else Regression()
    return task.learn(labels)[0]


def standardised(x: Tensor) -> Tensor:
    return (x - x.mean(dim=0)) * inverse_deviation(x.mean(dim=0), x.var(dim=0, unbiased=False))


def by_scikit_learn(kind: str, x: Tensor, y: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    """Weights and bias of one problem for each output, on the samples that have it."""
    found = []
    for answer in y.T:
        has = ~answer.isnan()
        samples = int(has.sum())
        with threadpool_limits(1):
            if kind == "multilabel":
                model = LogisticRegression(C=1 / (samples * l2), tol=1e-10, max_iter=9999).fit(x[has], answer[has])
                found.append((model.coef_[0], model.intercept_[0]))
            else:
                model = Ridge(alpha=samples * l2, solver="svd").fit(x[has], answer[has])
                found.append((model.coef_, model.intercept_))
    weights = torch.tensor([w for w, _ in found], dtype=torch.float64)
    return weights, torch.tensor([float(b) for _, b in found], dtype=torch.float64)


def in_units(task: Task, solution: Solution) -> tuple[Tensor, Tensor]:
    """Weights and bias for targets in their own units."""
    centre, scale = (
        torch.tensor([task.centre, task.scale]) if isinstance(task, Regression) else torch.tensor([[0.0], [1.0]])
    )
    return solution.weight * scale[:, None], solution.bias * scale + centre


KINDS = ["multilabel", "regression"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_solver_finds_what_scikit_learn_finds(kind: str) -> None:
    raw, y = planted(400, kind)
    raw, y = (part[~y.isnan().all(dim=1)] for part in (raw, y))
    task, x = task_for(kind, y), standardised(raw)
    weight, bias = by_scikit_learn(kind, x, y, 1e-2)
    found = solve(task, x, y, 1e-2, tolerance=1e-9)
    for mine, theirs in zip(in_units(task, found), (weight, bias), strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=1e-5, atol=1e-5)
    chosen = fit_probe(task, raw, y, tolerance=1e-9)
    weight, bias = by_scikit_learn(kind, x, y, chosen.l2)
    torch.testing.assert_close(in_units(task, chosen)[0].double(), weight.double(), rtol=1e-4, atol=1e-4)
    predicted, measured = x @ weight.T + bias, task.measures(chosen.tally.tolist())
    each = task.each(chosen.tally.tolist())
    for i in range(3):
        has = ~y[:, i].isnan()
        truth, guess = y[has, i], predicted[has, i]
        if kind == "multilabel":
            assert each["error_by_label"][i] == pytest.approx(((guess > 0) != (truth > 0.5)).double().mean().item())
            balanced = 1 - balanced_accuracy_score(truth, guess > 0)
            assert each["balanced_error_by_label"][i] == pytest.approx(balanced)
        else:
            assert each["error_by_output"][i] == pytest.approx(1 - r2_score(truth, guess), abs=1e-6)
            assert each["rmse_by_output"][i] == pytest.approx((truth - guess).square().mean().sqrt().item(), rel=1e-5)
    errors = next(iter(each.values()))
    assert measured["error"] == pytest.approx(sum(errors) / 3)
    if kind == "multilabel":
        has = ~y.isnan()
        mean = F.binary_cross_entropy_with_logits(predicted[has], y[has])
        assert measured["cross_entropy"] == pytest.approx(mean.item(), rel=1e-4)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    samples=st.integers(30, 200),
    width=st.integers(1, 40),
    outputs=st.integers(1, 3),
    missing=st.sampled_from([0.0, 0.3]),
    unit=st.sampled_from([1e-12, 1.0, 1e12]),
    l2=st.sampled_from([1e-4, 1e-2, 1.0]),
    is_collinear=st.booleans(),
)
def test_objectives_are_those_of_scikit_learn(
    kind: str, samples: int, width: int, outputs: int, missing: float, unit: float, l2: float, is_collinear: bool
) -> None:
    """Within 1e-4 of the objective at zero weights, in float32, whatever the shape, unit and conditioning."""
    raw, y = planted(samples, kind, seed=samples, width=width, outputs=outputs, missing=missing)
    y[:2] = torch.tensor([[0.0], [1.0]])  # each label has both answers
    raw = torch.cat([raw, raw + 1e-4 * raw.roll(1, 0)], dim=1) if is_collinear else raw
    y = y * unit if kind == "regression" else y
    task, x = task_for(kind, y), standardised(raw)
    found = solve(task, x.float(), y, l2, tolerance=1e-5, max_iterations=2000)
    assert found.converged
    centre, scale = ([0.0] * outputs, [1.0] * outputs) if kind == "multilabel" else (task.centre, task.scale)  # type: ignore[attr-defined]
    scaled = (y - torch.tensor(centre)) / torch.tensor(scale)

    def objective(weight: Tensor, bias: Tensor) -> float:
        scores, has = x @ weight.T.double() + bias.double(), ~y.isnan()
        if kind == "multilabel":
            loss = F.binary_cross_entropy_with_logits(scores, scaled.nan_to_num(), reduction="none")
        else:
            loss = (scores - scaled.nan_to_num()).square() / 2
        return float(((loss * has).sum(dim=0) / has.sum(dim=0)).sum() + l2 / 2 * weight.double().square().sum())

    best = objective(*by_scikit_learn(kind, x, scaled, l2))
    nothing = objective(torch.zeros(outputs, x.shape[1]), torch.zeros(outputs))
    assert objective(found.weight, found.bias) - best <= 1e-4 * nothing


def test_two_classes_are_one_label_at_half_the_strength() -> None:
    raw, y = planted(300, "multilabel", outputs=1, missing=0.0)
    x, l2 = standardised(raw), 1e-2
    one = solve(Multilabel(1), x, y, l2 / 2, tolerance=1e-9)
    two = solve(Classification(2), x, F.one_hot(y[:, 0].long(), 2).double(), l2, tolerance=1e-9)
    torch.testing.assert_close(two.weight[1] - two.weight[0], one.weight[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(two.bias[1] - two.bias[0], one.bias[0], rtol=1e-5, atol=1e-6)


TASKS: list[Task] = [Classification(4), Multilabel(4), Regression(4, (1.0,) * 4, (2.0,) * 4)]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_a_task_is_of_the_exponential_family(task: Task) -> None:
    """What the solver counts on: the expectation minus the target is the derivative, and the bias gives the mean."""
    scores = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).softmax(dim=0)
    if task.kind != "classification":
        targets[2, 3] = math.nan
    (gradient,) = torch.autograd.grad(task.loss(scores, targets), scores)
    torch.testing.assert_close(task.residual_(task.expectation(scores.detach().clone()), targets), gradient)
    mean = targets.nanmean(dim=1)
    torch.testing.assert_close(task.expectation(task.constant(mean)[:, None])[:, 0], mean)
    bent: Any = torch.func.hessian(lambda s: task.loss(s[:, None], targets[:, :1]))(scores.detach()[:, 0])
    expected = bent.diagonal().mean()
    torch.testing.assert_close(task.curvature(task.expectation(scores.detach()))[0], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_online_heads_are_trained_by_autograd_and_adam(kind: str) -> None:
    task = task_for(kind, planted(64, kind)[1])
    probes, head = OnlineProbes(["a"], task, 1e-2), nn.Linear(6, 3, dtype=torch.float64)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    seen = torch.zeros(0, 6, dtype=torch.float64)
    for step in range(30):
        x, y = planted(32, kind, seed=step)
        tally = probes.update(LayerBatch({"a": x.clone()}, y))
        seen = torch.cat([seen, x])
        z = (x - seen.mean(dim=0)) * inverse_deviation(seen.mean(dim=0), seen.var(dim=0, unbiased=False))
        scores, has = head(z), ~y.isnan()
        if isinstance(task, Regression):
            y = (y - torch.tensor(task.centre)) / torch.tensor(task.scale)
            loss = (scores - y.nan_to_num()).square() / 2 * has
        else:
            loss = F.binary_cross_entropy_with_logits(scores, y.nan_to_num(), reduction="none") * has
        assert tally[-2:, 0].tolist() == pytest.approx([loss.sum().item(), int(has.any(dim=1).sum())], rel=1e-6)
        optimizer.zero_grad()
        (loss.sum(dim=0) / has.sum(dim=0)).sum().backward()
        optimizer.step()
    stack: Any = probes.state_dict()["6"]["tensors"]
    torch.testing.assert_close(stack["weight"][0], head.weight.data, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stack["bias"][0, :, 0], head.bias.data, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fit_samples", [None, 0], ids=["at the optimum", "online"])
@pytest.mark.parametrize("kind", KINDS)
def test_callback_publishes_the_errors_of_its_probes(kind: str, fit_samples: int | None, tmp_path: Path) -> None:
    seed_everything(3, verbose=False)
    model = Classifier(mlp(inputs=16, width=12, depth=1))
    train, held_out = loader(320, 32, size=4, seed=1), loader(160, 32, size=4, seed=2)
    probes = LinearProbeCallback("net.*", fit_samples=fit_samples, **ASKED[kind])
    make_trainer(tmp_path, probes, max_epochs=2).fit(model, train, held_out)
    rows = {row["layer"]: row for row in probes.report.select(stage="val", metric="error", epoch=2)}
    (features, labels), (others, truth) = (features_by_hand(model, model.state_dict(), x) for x in (train, held_out))
    ask = answers if kind == "multilabel" else numbers
    y, truth = ask((None, labels)), ask((None, truth))
    assert probes._session.online.probes is not None
    online, task = heads_of(probes._session.online.probes), probes._network.question.parts[""]
    for layer in ("input", "net.1", "net.3"):
        if fit_samples is None:
            exact = fit_probe(task, features[layer], y, tolerance=1e-7)
            mean, variance = exact.mean, exact.variance
        else:
            kept = online[layer]
            exact = replace(fit_probe(task, features[layer], y, l2=1.0), weight=kept["weight"], bias=kept["bias"][:, 0])
            mean, variance = kept["mean"][0].double(), kept["variance"][0].double()
        weight, bias = in_units(task, exact)
        predicted = ((others[layer] - mean) * inverse_deviation(mean, variance)) @ weight.double().T + bias.double()
        errors = []
        for i in range(truth.shape[1]):
            has = ~truth[:, i].isnan()
            wrong = ((predicted[has, i] > 0) != (truth[has, i] > 0.5)).double().mean().item()
            errors.append(wrong if kind == "multilabel" else 1 - r2_score(truth[has, i], predicted[has, i]))
        # The solver stops at its tolerance; online probes are the same but for a rounding or two.
        assert rows[layer]["value"] == pytest.approx(
            sum(errors) / len(errors), abs=0.01 if fit_samples is None else 5e-3
        )
        assert rows[layer]["low"] <= rows[layer]["value"] <= rows[layer]["high"]
    ones = truth.nanmean(dim=0)
    baseline = torch.minimum(ones, 1 - ones).mean().item() if kind == "multilabel" else 1.0
    assert probes.report.baseline["val"] == pytest.approx(baseline)
    shown = str(probes.report)
    assert ("commonest answer" in shown) == (kind == "multilabel")
    assert ("probe 1 - R2 in %" in shown) == (kind == "regression")
    probes.report.save(tmp_path / "report.json")
    assert ProbeReport.load(tmp_path / "report.json") == probes.report
    figure = probes.report.plot()
    assert figure.axes[0].get_ylim()[1] >= 100 * max(row["value"] for row in rows.values())


def test_intervals_hold_what_they_say() -> None:
    """Answers of a sample hang together; over 2 000 draws nineteen in twenty intervals hold the true error."""
    generator, held, independent = torch.Generator().manual_seed(0), 0, 0
    for _ in range(2000):
        # Each of 60 samples has an error of its own, and up to 8 answers.
        rate = torch.rand(60, generator=generator) ** 3
        each = torch.randint(1, 9, (60,), generator=generator)
        wrong = torch.binomial(each.float(), rate, generator=generator)
        low, high = clustered_interval(wrong.sum().item(), cluster_sums(wrong[None], each.float())[:, 0].tolist())
        held += low <= 0.25 <= high
        alone = cluster_sums(torch.ones(1, int(each.sum())), torch.ones(int(each.sum())))[:, 0].tolist()
        alone[0] = alone[1] = wrong.sum().item()
        low, high = clustered_interval(wrong.sum().item(), alone)
        independent += low <= 0.25 <= high
    assert 0.93 <= held / 2000 <= 0.97
    assert independent / 2000 < 0.9


@pytest.mark.parametrize("each", [1, 4], ids=["one number a sample", "four positions a sample"])
def test_intervals_of_a_regression_hold_what_they_say(each: int) -> None:
    generator, task, held = torch.Generator().manual_seed(0), Regression(1, (0.0,), (1.0,)), 0
    rows = 150 * each
    for _ in range(1000):
        shared = torch.randn(150, 1, generator=generator).expand(-1, each).flatten()
        truth = 3 + 2 * torch.randn(rows, 1, generator=generator)
        guess = truth[:, 0] + shared + 0.5 * torch.randn(rows, generator=generator)
        tally = task.tally(guess[None, None], task.prepare(truth, torch.float32, each))[:, 0].tolist()
        low, high = task.interval(tally)
        held += low <= 1.25 / 4 <= high
    assert 0.93 <= held / 1000 <= 0.97


# Bad input


BAD: dict[str, tuple[Task, Any, type[Exception], str]] = {
    "2 of a label": (
        Multilabel(),
        torch.tensor([[0, 2]]),
        UnusableLabelsError,
        "have a 2; expected 0 or 1 for task='multilabel'",
    ),
    "scores": (Multilabel(), torch.tensor([[0.3, 1.0]]), UnusableLabelsError, "; scores become answers by a threshold"),
    "classes": (Multilabel(), torch.tensor([3, 1]), ValueError, "shape (2,); expected rows (batch, labels)"),
    "tokens": (Multilabel(), torch.zeros(2, 5, 3), ValueError, "labels of their own for tokens or pixels: positions="),
    "other labels": (Multilabel(3), torch.zeros(2, 4), ValueError, "expected rows (batch, labels=3)"),
    "100 000 labels": (Multilabel(), torch.zeros(2, 100_000), ValueError, "more than 10,000 labels are refused"),
    "infinity": (
        Regression(),
        torch.tensor([1.0, math.inf]),
        UnusableLabelsError,
        "sample 1 of labels [2] is infinite",
    ),
    "no reals": (Regression(), torch.tensor([1j, 2]), TypeError, "expected real numbers for task='regression'"),
    "pixels": (Regression(), torch.zeros(2, 5, 5), ValueError, "numbers of their own for tokens or pixels: positions="),
    "100 000 outputs": (Regression(), torch.zeros(2, 100_000), ValueError, "more than 10,000 outputs are refused"),
}


@pytest.mark.parametrize("case", BAD)
def test_targets_that_do_not_fit_are_told_with_what_would(case: str) -> None:
    task, labels, kind, message = BAD[case]
    with pytest.raises(kind) as caught:
        task.check(labels)
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", ["multilabels", "regresion"])
def test_a_misspelt_task_is_told_with_the_nearest(kind: str) -> None:
    nearest = {"multilabels": "multilabel", "regresion": "regression"}[kind]
    with pytest.raises(ValueError, match=f"task: .* found '{kind}'; did you mean '{nearest}'"):
        LinearProbeCallback(task=kind)  # type: ignore[arg-type]


@pytest.mark.parametrize("task", KINDS)
def test_a_number_of_classes_belongs_to_a_classification(task: Any) -> None:
    with pytest.raises(ValueError, match=f"num_classes: it has no effect with task='{task}'"):
        LinearProbeCallback(task=task, num_classes=3)


def test_later_entries_without_a_meaning_leave_their_sample_out() -> None:
    rows = torch.tensor([[0.0, 1.0], [math.nan, 1.0], [-100.0, math.nan], [2.0, 1.0], [1.0, 0.0]])
    encoded = Multilabel(2).encode(rows)
    assert Multilabel(2).is_counted(encoded).tolist() == [True, True, False, False, True]
    assert Multilabel(2).is_left_out(rows).tolist() == [False, False, True, False, False]
    rows = torch.tensor([[0.0, 1.0], [math.nan, 1.0], [math.nan, math.nan], [math.inf, 1.0]])
    encoded = Regression(2).encode(rows)
    assert Regression(2).is_counted(encoded).tolist() == [True, True, False, False]
    assert Regression(2).is_left_out(rows).tolist() == [False, False, True, False]


ODD: dict[str, tuple[str, Any, str, float]] = {
    "always 0": ("multilabel", lambda y: torch.stack([y % 2, 0 * y], 1), "1 never occur (the first: 1)", math.nan),
    "no entry": (
        "multilabel",
        lambda y: torch.stack([y % 2, 0 * y - 100], 1),
        "1 have no entry (the first: 1)",
        math.nan,
    ),
    "missing": (
        "regression",
        lambda y: torch.stack([y.float(), torch.where(y == 7, torch.nan, y.float())], 1),
        "entries are missing, most of output 1: ",
        math.nan,
    ),
    "constant": (
        "regression",
        lambda y: torch.stack([y.float(), 0 * y + 5.0], 1),
        "1 of 2 outputs are constant",
        math.nan,
    ),
    "all constant": ("regression", lambda y: 0 * y + 5.0, "1 of 1 outputs are constant", 1.0),
}


@pytest.mark.parametrize("case", ODD)
def test_what_a_first_batch_cannot_show_is_finite_and_told(case: str, tmp_path: Path) -> None:
    kind, ask, note, error = ODD[case]
    seed_everything(3, verbose=False)
    probes = LinearProbeCallback("net.*", task=kind, target=lambda batch: ask(batch[1]))  # type: ignore[arg-type]
    train, held_out = loader(160, 32, size=4, seed=1), loader(80, 32, size=4, seed=2)
    make_trainer(tmp_path, probes, max_epochs=1).fit(Classifier(mlp(inputs=16, width=12, depth=1)), train, held_out)
    values = [row["value"] for row in probes.report.rows if row["metric"] == "error"]
    assert len(values) == 20
    assert all(math.isfinite(value) for value in values)
    assert math.isnan(error) or all(value == error for value in values)
    assert any(note in told for told in probes.report.notes), probes.report.notes


def root(unit: float, batch: Any) -> Tensor:
    return unit * batch[1].sqrt()  # type: ignore[no-any-return]


@pytest.mark.parametrize("unit", [1e-12, 1e12])
def test_errors_do_not_depend_on_the_unit(unit: float, tmp_path: Path) -> None:
    errors = []
    for factor in (1.0, unit):
        seed_everything(3, verbose=False)
        scaled = partial(root, factor)
        probes = LinearProbeCallback("net.*", task="regression", target=scaled)
        train, held_out = loader(160, 32, size=4, seed=1), loader(80, 32, size=4, seed=2)
        make_trainer(tmp_path, probes, max_epochs=1).fit(Classifier(mlp(inputs=16, width=12, depth=1)), train, held_out)
        errors.append([row["value"] for row in probes.report.select(stage="val", metric="error")])
    assert errors[1] == pytest.approx(errors[0], abs=1e-3)


@pytest.mark.parametrize(
    ("asked", "other", "said"),
    [
        ("classification", "multilabel", "task is 'classification' in the checkpoint and 'multilabel' here"),
        ("multilabel", "regression", "task is 'multilabel' in the checkpoint and 'regression' here"),
        ("several", "regression", "task is 'several' in the checkpoint and 'regression' here"),
        ("regression", "several", "targets are one without a name in the checkpoint and digit, answers, numbers here"),
    ],
)
def test_a_checkpoint_of_another_task_is_refused(asked: str, other: str, said: str, tmp_path: Path) -> None:
    data = loader(32, 16, size=4, seed=1), loader(16, 16, size=4, seed=2)

    def fit(probes: LinearProbeCallback, **options: Any) -> None:
        seed_everything(3, verbose=False)
        trainer = make_trainer(tmp_path, probes, **{"max_epochs": 1, **options})
        trainer.fit(Classifier(convnet()), *data, ckpt_path=path if path.exists() else None)
        trainer.save_checkpoint(path)

    path = tmp_path / "one.ckpt"
    fit(LinearProbeCallback(**ASKED[asked]))
    with pytest.raises(ValueError, match=said):
        fit(LinearProbeCallback(**ASKED[other]), max_epochs=2)


@pytest.mark.parametrize("offset", [0.0, 1e7, 1.7e9])
def test_numbers_far_from_0_are_told_apart(offset: float, tmp_path: Path) -> None:
    """Whole numbers and float64 keep what float32 would lose, up to what is handed out."""

    def ask(batch: Any) -> Tensor:
        means: Tensor = 12 * batch[0].double().mean(dim=(1, 2, 3))
        return means + offset

    seed_everything(3, verbose=False)
    probes = LinearProbeCallback("net.1", task="regression", target=ask, metrics=["R2Score", "MeanSquaredError"])
    train, held_out = loader(160, 32, size=4, seed=1), loader(80, 32, size=4, seed=2)
    make_trainer(tmp_path, probes, max_epochs=1).fit(Classifier(mlp(inputs=16, width=12, depth=1)), train, held_out)
    found = {row["metric"]: row["value"] for row in probes.report.select(stage="val", layer="input", epoch=1)}
    assert found["error"] < 0.01
    # That of torchmetrics subtracts two large squares.
    assert 1 - found["R2Score"] == pytest.approx(found["error"], abs=1e-4)
    assert found["MeanSquaredError"] == pytest.approx(found["rmse"] ** 2, rel=1e-3)
    x, y = held_out.dataset.tensors  # type: ignore[attr-defined]
    own, truth = probes.probe("input"), ask((x, y))
    predicted = own(own.reduction(x))[:, 0].double()
    off = (predicted - truth).square().mean() / truth.var(unbiased=False)
    assert off.item() == pytest.approx(found["error"], abs=1e-4)


@pytest.mark.parametrize("factor", [1e3, 1e9])
def test_a_first_batch_of_another_scale_costs_nothing_or_is_told(factor: float, tmp_path: Path) -> None:
    seen: list[int] = []

    def ask(batch: Any) -> Tensor:
        seen.append(len(batch[1]))
        labels: Tensor = batch[1].float()
        return labels * (factor if len(seen) == 1 else 1.0)  # in the sanity check

    train, held_out = loader(320, 32, size=4, seed=1), loader(160, 32, size=4, seed=2)
    errors = []
    for target in (ask, lambda batch: batch[1].float()):
        seed_everything(3, verbose=False)
        probes = LinearProbeCallback("net.1", task="regression", target=target)
        trainer = make_trainer(tmp_path, probes, max_epochs=1, num_sanity_val_steps=1)
        trainer.fit(Classifier(mlp(inputs=16, width=12, depth=1)), train, held_out)
        (row,) = probes.report.select(stage="val", metric="error", layer="input", epoch=1)
        errors.append(row["value"])
        told = any("vary by less than a millionth" in note for note in probes.report.notes)
        assert told == (target is ask and factor == 1e9)
    assert errors[0] == pytest.approx(errors[1] if factor == 1e3 else 1.0, abs=0.01)


def test_positions_of_a_checkpoint_are_refused(tmp_path: Path) -> None:
    data = loader(32, 16, size=4, seed=1), loader(16, 16, size=4, seed=2)
    path = tmp_path / "one.ckpt"
    for positions, epochs in ((3, 1), (4, 2)):
        seed_everything(3, verbose=False)
        trainer = make_trainer(
            tmp_path, LinearProbeCallback(**{**ASKED["pixels"], "positions": positions}), max_epochs=epochs
        )
        if positions == 3:
            trainer.fit(Classifier(convnet()), *data)
            trainer.save_checkpoint(path)
        else:
            with pytest.raises(ValueError, match="positions is 3 in the checkpoint and 4 here"):
                trainer.fit(Classifier(convnet()), *data, ckpt_path=path)
