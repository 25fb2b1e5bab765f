"""A task is the only place that knows what is asked: another one of a few lines goes through all that probes do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from classified import heads_of
from exact import features_by_hand
from fits import make_trainer
from lightning.pytorch import seed_everything
from networks import Classifier, images, mlp
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_probes import LinearProbeCallback, probe
from lightning_probes.distributed import Ranks
from lightning_probes.network import extractor
from lightning_probes.probes.dataset import FeatureDataset, LayerBatch, MemoryStore
from lightning_probes.probes.fit import fit_layers, fit_probe
from lightning_probes.probes.online import OnlineProbes
from lightning_probes.probes.solver import solve
from lightning_probes.probes.standardise import inverse_deviation
from lightning_probes.tasks.classification import Classification
from lightning_probes.tasks.task import Labels, Task


@dataclass(frozen=True)
class YesOrNo(Task):
    """Asks several questions at once: one logistic regression each; a row with NaN is left out."""

    outputs: int

    statistics = 3
    left_out = math.nan

    def learn(self, labels: Tensor) -> tuple[Task, str]:
        return self, ""

    def check(self, labels: Tensor) -> None:
        assert labels.shape[1:] == (self.outputs,)

    def encode(self, labels: Tensor) -> Tensor:
        return labels.float()

    def is_counted(self, targets: Tensor) -> Tensor:
        return ~targets.isnan().any(dim=1)

    def constant(self, mean: Tensor) -> Tensor:
        return mean.logit(eps=1e-6)

    def loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(scores, targets, reduction="sum")

    def expectation(self, scores: Tensor) -> Tensor:
        return scores.sigmoid()

    def curvature(self, expectation: Tensor) -> Tensor:
        return (expectation * (1 - expectation)).mean(dim=0)

    def tally(self, scores: Tensor, labels: Labels) -> Tensor:
        y = labels.rows.nan_to_num().T
        wrong = (((scores > 0) != (y > 0.5)).double().mean(dim=1) * labels.counted).sum(dim=1)
        loss = F.softplus(scores) - scores * y
        total = labels.total.expand(len(scores))
        return torch.stack([wrong, (loss.sum(dim=1) * labels.counted).sum(dim=1), total]).double()

    def measures(self, tally: list[float]) -> dict[str, float]:
        wrong, loss, samples = tally
        return {"error": wrong / samples, "cross_entropy": loss / samples}

    def interval(self, tally: list[float]) -> tuple[float, float]:
        return math.nan, math.nan

    def target_sums(self, targets: Tensor) -> Tensor:
        counted = targets[self.is_counted(targets)].double()
        return torch.cat([counted.sum(dim=0), counted.new_tensor([float(len(counted))])])

    def samples_in(self, target_sums: list[float]) -> float:
        return target_sums[-1]

    def baseline(self, target_sums: list[float]) -> float:
        *ones, samples = target_sums
        return sum(min(n, samples - n) for n in ones) / len(ones) / samples


def planted(samples: int, seed: int = 0, width: int = 6, questions: int = 3) -> tuple[Tensor, Tensor]:
    """Features in which each answer can be seen but for some noise, and answers; every seventh sample has none."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, width, generator=generator, dtype=torch.float64) * 3 + 1
    direction = torch.randn(width, questions, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    y = ((x - 1) @ direction + 2 * torch.randn(samples, questions, generator=generator) > 0.5).double()
    y[::7, 1] = math.nan
    return x, y


def standardised(x: Tensor) -> Tensor:
    return (x - x.mean(dim=0)) * inverse_deviation(x.mean(dim=0), x.var(dim=0, unbiased=False))


def by_scikit_learn(x: Tensor, y: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    with threadpool_limits(1):
        fitted = [LogisticRegression(C=1 / (len(x) * l2), tol=1e-10, max_iter=9999).fit(x, answer) for answer in y.T]
    return torch.tensor([each.coef_[0] for each in fitted]), torch.tensor([each.intercept_[0] for each in fitted])


def test_the_solver_finds_the_logistic_regressions_of_scikit_learn() -> None:
    raw, y = planted(300)
    counted = ~y.isnan().any(dim=1)
    x = standardised(raw[counted])
    weight, bias = by_scikit_learn(x, y[counted], 1e-2)
    found = solve(YesOrNo(3), x, y[counted], 1e-2, tolerance=1e-9)
    torch.testing.assert_close(found.weight, weight, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.bias, bias, rtol=0, atol=1e-5)
    chosen = fit_probe(YesOrNo(3), raw, y, tolerance=1e-9)
    weight, bias = by_scikit_learn(x, y[counted], chosen.l2)
    torch.testing.assert_close(chosen.weight, weight, rtol=0, atol=1e-5)
    wrong = ((x @ weight.T + bias > 0) != (y[counted] > 0.5)).double().mean(dim=1).sum()
    assert chosen.tally.tolist()[::2] == pytest.approx([wrong.item(), int(counted.sum())])


def test_fitted_probes_score_other_samples() -> None:
    task, (x, y), (other, answers) = YesOrNo(3), planted(300), planted(200, seed=1)
    dataset = FeatureDataset(task, MemoryStore())
    dataset.add(LayerBatch({"a": x, "b": -x}, y))
    alone = Ranks()
    found = fit_layers(
        task, dataset, ["a", "b"], "train", ranks=alone, device=alone.device, track=lambda name, items, total: items
    )
    assert found is not None
    tally = found.probes.score(LayerBatch({"a": other, "b": -other}, answers))
    solution = fit_probe(task, x, y)
    z = (other - solution.mean) * inverse_deviation(solution.mean, solution.variance)
    counted = ~answers.isnan().any(dim=1)
    wrong = ((z @ solution.weight.T + solution.bias > 0) != (answers > 0.5)).double().mean(dim=1)[counted].sum()
    assert tally[0].tolist() == pytest.approx([wrong.item()] * 2, abs=1.5 / 3)
    assert tally[2].tolist() == [int(counted.sum())] * 2
    error = task.measures(tally[:, 0].tolist())["error"]
    assert error < task.baseline(task.target_sums(answers).tolist()) / 2


def test_online_heads_are_trained_by_autograd_and_adam() -> None:
    task = YesOrNo(3)
    probes, head = OnlineProbes(["a"], task, 1e-2), nn.Linear(6, 3, dtype=torch.float64)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    seen = torch.zeros(0, 6, dtype=torch.float64)
    for step in range(30):
        x, y = planted(32, seed=step)
        tally = probes.update(LayerBatch({"a": x.clone()}, y))
        seen = torch.cat([seen, x])
        z = (x - seen.mean(dim=0)) * inverse_deviation(seen.mean(dim=0), seen.var(dim=0, unbiased=False))
        counted = ~y.isnan().any(dim=1)
        loss = F.binary_cross_entropy_with_logits(head(z)[counted], y[counted], reduction="sum")
        assert tally[1:, 0].tolist() == pytest.approx([loss.item(), int(counted.sum())], rel=1e-6)
        optimizer.zero_grad()
        (loss / counted.sum()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    stack: Any = probes.state_dict()["6"]["tensors"]
    torch.testing.assert_close(stack["weight"][0], head.weight.data, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stack["bias"][0, :, 0], head.bias.data, rtol=1e-6, atol=1e-6)


class Several(Classifier):
    """Answers three questions about an image."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.binary_cross_entropy_with_logits(self(batch[0])[:, :3], batch[1])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))


def answered(samples: int, seed: int) -> DataLoader[Any]:
    x, labels = images(samples, size=4, seed=seed).tensors
    answers = torch.stack([labels % 2, labels > 4, labels % 3 == 0], dim=1).float()
    return DataLoader(TensorDataset(x, answers), batch_size=32)


@pytest.mark.parametrize("fit_samples", [None, 0], ids=["at the optimum", "online"])
def test_callback_and_probe_publish_its_errors(
    fit_samples: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extractor, "find_task", lambda *args: YesOrNo(3))
    seed_everything(3, verbose=False)
    model, train, held_out = Several(mlp(inputs=16, width=12, depth=1)), answered(320, 1), answered(160, 2)
    probes = LinearProbeCallback("net.*", fit_samples=fit_samples)
    make_trainer(tmp_path, probes, max_epochs=2).fit(model, train, held_out)
    errors = {row["layer"]: row["value"] for row in probes.report.select(stage="val", metric="error", epoch=2)}
    samples = [features_by_hand(model, model.state_dict(), loader) for loader in (train, held_out)]
    (features, answers), (others, truth) = samples
    assert probes._session.online.probes is not None
    online = heads_of(probes._session.online.probes)
    for layer in ("input", "net.1", "net.3"):
        if fit_samples is None:
            exact = fit_probe(YesOrNo(3), features[layer], answers.double(), tolerance=1e-7)
            weight, bias, mean, variance = exact.weight, exact.bias, exact.mean, exact.variance
        else:
            kept = online[layer]
            weight, bias = kept["weight"].double(), kept["bias"][:, 0].double()
            mean, variance = kept["mean"][0].double(), kept["variance"][0].double()
        z = (others[layer] - mean) * inverse_deviation(mean, variance)
        error = ((z @ weight.T + bias > 0) != (truth > 0.5)).double().mean().item()
        # The solver stops at its tolerance; online probes are the same but for a rounding or two.
        assert errors[layer] == pytest.approx(error, abs=0.01 if fit_samples is None else 1.5 / 480)
    ones = truth.mean(dim=0)
    assert probes.report.baseline["val"] == pytest.approx(torch.minimum(ones, 1 - ones).mean().item())
    if fit_samples is None:
        found = probe(model, train, held_out, layers="net.*").select(stage="val", metric="error")
        assert {row["layer"]: row["value"] for row in found} == pytest.approx(errors, abs=0.01)


def test_classification_is_of_the_exponential_family() -> None:
    """What the solver counts on: the expectation minus the target is the derivative, and the bias gives the mean."""
    task = Classification(4)
    scores = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).softmax(dim=0)
    (gradient,) = torch.autograd.grad(task.loss(scores, targets), scores)
    torch.testing.assert_close(task.expectation(scores.detach()) - targets, gradient)
    mean = targets.mean(dim=1)
    torch.testing.assert_close(task.expectation(task.constant(mean)[:, None])[:, 0], mean)
    bent: Any = torch.func.hessian(lambda s: task.loss(s[:, None], targets[:, :1]))(scores.detach()[:, 0])
    expected = bent.diagonal().mean()
    torch.testing.assert_close(task.curvature(task.expectation(scores.detach()))[0], expected)
