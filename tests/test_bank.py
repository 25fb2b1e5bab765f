from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from classified import Probes, count_classes, fit_probes, score, tally
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_probes.probes.dataset import LayerBatch
from lightning_probes.probes.heads import StackedProbes
from lightning_probes.tasks.classification import Classification
from lightning_probes.tasks.intervals import wilson_interval

LEARNING_RATE = 3e-3

Step = tuple[dict[str, Tensor], Tensor]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Products this small only wait for further threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class ReferenceProbe:
    """A head trained by autograd on features standardised with two passes over all that it has seen."""

    def __init__(self, width: int, classes: int, dtype: torch.dtype) -> None:
        self.head = nn.Linear(width, classes, dtype=dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.optimizer = torch.optim.Adam(self.head.parameters(), LEARNING_RATE)
        self.seen: list[Tensor] = []
        self.weights: list[float] = []

    def standardise(self, x: Tensor) -> Tensor:
        shares = [w / len(x) for w, x in zip(self.weights, self.seen, strict=True) for _ in x]
        each = torch.tensor(shares, dtype=torch.float64).unsqueeze(1)
        seen = torch.cat(self.seen).double()
        mean = (each * seen).sum(dim=0)
        variance = (each * (seen - mean) ** 2).sum(dim=0)
        scale = torch.where(variance > 0, (variance + 1e-6 * variance.mean()).rsqrt(), 0.0)
        return ((x.double() - mean) * scale).to(x.dtype)

    def update(self, x: Tensor, targets: Tensor) -> tuple[float, float]:
        weight = max(1 / (len(self.seen) + 1), 0.01)
        self.weights = [(1 - weight) * w for w in self.weights] + [weight]
        self.seen.append(x)
        rows = targets.to(x.dtype).repeat(len(x) // len(targets), 1)
        kept = rows.sum(dim=1) > 0
        logits = self.head(self.standardise(x))
        loss = -(rows * logits.log_softmax(dim=1)).sum()
        self.optimizer.zero_grad()
        (loss / max(int(kept.sum()), 1)).backward()
        self.optimizer.step()
        return loss.item(), float(kept.sum())


def probe(bank: Probes, layer: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of one layer, copied."""
    stacks: dict[str, Any] = bank.state_dict()
    stack = stacks[str(bank.widths[layer])]
    row = stack["layers"].index(layer)
    return stack["tensors"]["weight"][row].clone(), stack["tensors"]["bias"][row, :, 0].clone()


@dataclass
class Run:
    layers: dict[str, int]
    classes: int
    steps: list[Step]


@st.composite
def runs(draw: st.DrawFn) -> Run:
    """Several steps: layers missing now and then, or joining late, of k views; soft or hard labels, some left out."""
    widths = draw(st.lists(st.sampled_from([1, 2, 5]), min_size=1, max_size=5))
    layers = {f"layer{i}": width for i, width in enumerate(widths)}
    classes = draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    offset, scale = draw(st.sampled_from([(0.0, 1.0), (1.0, 0.5), (-2.0, 4.0)]))
    steps: list[Step] = []
    for _ in range(draw(st.integers(1, 5))):
        samples = draw(st.integers(1, 8))
        targets = torch.rand(samples, classes, generator=generator, dtype=torch.float64)
        targets = targets / targets.sum(dim=1, keepdim=True)
        if draw(st.booleans()):
            targets = F.one_hot(targets.argmax(dim=1), classes).double()
        if draw(st.booleans()):
            targets[torch.rand(samples, generator=generator) < 0.4] = 0
        present = draw(st.sets(st.sampled_from(list(layers)), min_size=1))
        views = draw(st.fixed_dictionaries({layer: st.sampled_from([1, 1, 2, 3]) for layer in sorted(present)}))
        steps.append(
            (
                {
                    layer: offset + scale * torch.randn(samples * k, layers[layer], generator=generator).double()
                    for layer, k in views.items()
                },
                targets,
            )
        )
    return Run(layers, classes, steps)


@given(run=runs())
@settings(deadline=None, max_examples=60, derandomize=True)
def test_every_probe_is_a_linear_head_trained_by_autograd_and_adam(run: Run) -> None:
    bank = Probes(list(run.layers), run.classes, LEARNING_RATE)
    heads = {layer: ReferenceProbe(width, run.classes, torch.float64) for layer, width in run.layers.items()}
    for features, targets in run.steps:
        sums = bank.learn(features, targets)
        expected = {layer: heads[layer].update(x, targets) for layer, x in features.items()}
        for i, layer in enumerate(run.layers):
            assert sums[1:, i].tolist() == pytest.approx(expected.get(layer, (0, 0)), rel=1e-8, abs=1e-8)
    for layer in bank.widths:
        weight, bias = probe(bank, layer)
        # A gradient of zero is 1e-16 off, which Adam divides by as little as its eps of 1e-8.
        torch.testing.assert_close(weight, heads[layer].head.weight.data, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(bias, heads[layer].head.bias.data, rtol=1e-8, atol=1e-8)


def batches(
    steps: int, *widths: int, samples: int = 32, classes: int = 4, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Step]:
    """Features in which the class can be seen; layers of one width differ."""
    generator = torch.Generator().manual_seed(seed)
    patterns = [torch.randn(classes, width, generator=generator) for width in widths]
    found: list[Step] = []
    for _ in range(steps):
        labels = torch.randint(classes, (samples,), generator=generator)
        features = {
            f"layer{i}": (p[labels] + torch.randn(samples, p.shape[1], generator=generator)).to(dtype)
            for i, p in enumerate(patterns)
        }
        found.append((features, F.one_hot(labels, classes).to(dtype)))
    return found


def fitted(steps: list[Step], layers: list[str] | None = None, learning_rate: float = LEARNING_RATE) -> Probes:
    features, targets = steps[0]
    bank = Probes(layers or list(features), targets.shape[1], learning_rate)
    for features, targets in steps:
        bank.learn(features, targets)
    return bank


def test_probes_in_float32_equal_autograd_and_adam_to_rounding() -> None:
    steps = batches(120, 6, 6, 9, samples=16)
    bank = fitted(steps)
    for layer in bank.layers:
        head = ReferenceProbe(steps[0][0][layer].shape[1], 4, torch.float32)
        for features, targets in steps:
            head.update(features[layer], targets)
        weight, bias = probe(bank, layer)
        assert weight.dtype == torch.float32
        # 120 steps of 3e-3, each off by a few float32 roundings.
        torch.testing.assert_close(weight, head.head.weight.data, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bias, head.head.bias.data, rtol=1e-4, atol=1e-5)


def test_many_layers_of_one_width_do_not_mix() -> None:
    steps = batches(5, *[3] * 40, dtype=torch.float64)
    together = fitted(steps)
    for layer in together.layers:
        alone = fitted([({layer: features[layer]}, targets) for features, targets in steps])
        for found, expected in zip(probe(together, layer), probe(alone, layer), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_layer_that_is_not_finite_is_never_updated_again_and_the_others_go_on(bad: float) -> None:
    steps = batches(20, 4, 4, 4, dtype=torch.float64)
    steps[10][0]["layer1"][3, 2] = bad
    bank = fitted(steps[:10])
    before = probe(bank, "layer1")
    for features, targets in steps[10:]:
        bank.learn(features, targets)
    assert bank.finite() == {"layer0": True, "layer1": False, "layer2": True}
    without = fitted([({k: x for k, x in features.items() if k != "layer1"}, y) for features, y in steps])
    for layer in ("layer0", "layer2"):
        for found, expected in zip(probe(bank, layer), probe(without, layer), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(found, expected) for found, expected in zip(probe(bank, "layer1"), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 1e-8, 0.1, 12345.678, 1e8])
def test_constant_features_give_the_class_frequencies(value: float, dtype: torch.dtype) -> None:
    steps = [({"layer0": torch.full_like(x["layer0"], value)}, y) for x, y in batches(300, 5, dtype=dtype)]
    bank = fitted(steps, learning_rate=1e-2)
    assert bank.finite() == {"layer0": True}
    assert torch.equal(probe(bank, "layer0")[0], torch.zeros(4, 5, dtype=dtype))
    frequencies = torch.cat([y for _, y in steps]).double().mean(dim=0)
    found = probe(bank, "layer0")[1].double().softmax(dim=0)
    torch.testing.assert_close(found, frequencies, rtol=0, atol=0.05)
    _, loss, _ = bank.test(batches(1, 5, dtype=dtype)[0][0], steps[0][1])[:, 0].tolist()
    assert np.isfinite(loss)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_scale_of_the_features_makes_no_difference(scale: float, offset: float) -> None:
    steps = [({"layer0": x["layer0"] + offset}, y) for x, y in batches(50, 6)]
    scaled = [({"layer0": x["layer0"] * scale}, y) for x, y in steps]
    found, expected = fitted(scaled), fitted(steps)
    torch.testing.assert_close(probe(found, "layer0"), probe(expected, "layer0"), rtol=1e-3, atol=1e-4)
    assert found.test(*scaled[0])[1, 0].item() == pytest.approx(expected.test(*steps[0])[1, 0].item(), rel=1e-3)


def test_update_changes_neither_the_random_state_nor_its_arguments() -> None:
    steps = batches(3, 4, 6, 6)
    copies = [({layer: x.clone() for layer, x in features.items()}, y.clone()) for features, y in steps]
    before = torch.get_rng_state()
    bank = fitted(steps)
    bank.test(*steps[0])
    assert torch.equal(torch.get_rng_state(), before)
    for (features, targets), (kept, kept_targets) in zip(steps, copies, strict=True):
        assert torch.equal(targets, kept_targets)
        assert all(torch.equal(features[layer], x) for layer, x in kept.items())


def test_probes_need_no_gradient_and_leave_none_on_the_features() -> None:
    steps = batches(2, 4)
    features = {layer: x.requires_grad_() for layer, x in steps[0][0].items()}
    sums = fitted([(features, steps[0][1]), steps[1]]).test(features, steps[0][1])
    assert not sums.requires_grad
    assert features["layer0"].grad is None


def saved(bank: Probes) -> bytes:
    file = io.BytesIO()
    torch.save(bank.state_dict(), file)
    return file.getvalue()


def test_score_updates_nothing() -> None:
    steps = batches(4, 4, 6)
    bank, other = fitted(steps[:3]), fitted(steps[:3])
    first = bank.test(*steps[3])
    assert torch.equal(bank.test(*steps[3]), first)
    assert saved(bank) == saved(other)


def test_score_and_update_agree_on_what_was_known_before_the_step() -> None:
    steps = batches(120, 4, 6, dtype=torch.float64)
    bank = fitted(steps[:-1])
    found, expected = bank.test(*steps[-1]), bank.learn(*steps[-1])
    # The update moves mean and variance by a hundredth of the batch's first.
    torch.testing.assert_close(found[1], expected[1], rtol=0.02, atol=0)
    assert found[2].tolist() == [32, 32]


def test_score_of_a_layer_that_was_never_updated_is_nothing() -> None:
    steps = batches(2, 4, 6)
    bank = fitted([({"layer1": features["layer1"]}, y) for features, y in steps], ["layer0", "layer1"])
    sums = bank.test(*steps[0])
    assert sums[:, 0].tolist() == [0, 0, 0]
    assert sums[2, 1] == 32


def test_bank_of_solutions_scores_as_each_of_them_does() -> None:
    generator = torch.Generator().manual_seed(3)
    targets = F.one_hot(torch.randint(4, (90,), generator=generator), 4).float()
    features = {
        name: (torch.randn(90, width, generator=generator) + targets[:, :1]) * scale
        for name, width, scale in (("a", 5, 1.0), ("b", 8, 1e3), ("c", 5, 1e-3), ("d", 5, float("nan")))
    }
    solutions = fit_probes({layer: x[:60] for layer, x in features.items()}, targets[:60])
    bank = StackedProbes.of(["d", "c", "never", "b", "a"], Classification(4), solutions)
    assert bank.widths == {"a": 5, "b": 8, "c": 5, "d": 5}
    found = bank.score(LayerBatch({layer: x[60:] for layer, x in features.items()}, targets[60:]))
    for i, layer in enumerate(bank.layers):
        if layer == "never":
            assert found[:, i].tolist() == [0, 0, 0]
        elif layer == "d":
            assert found[1, i].isnan()
            assert not bank.finite()["d"]
        else:
            expected = score(solutions[layer], features[layer][60:], targets[60:])
            assert torch.allclose(found[:, i], expected, rtol=1e-5)
            assert bank.finite()[layer]


def test_step_in_which_no_layer_ran_changes_nothing() -> None:
    steps = batches(2, 4, 6)
    bank, other = fitted(steps), fitted(steps)
    targets = steps[0][1]
    assert bank.learn({}, targets).tolist() == bank.test({}, targets).tolist() == [[0, 0]] * 3
    assert saved(bank) == saved(other)


def test_resumed_bank_goes_on_as_if_it_had_never_stopped() -> None:
    steps = batches(12, 4, 6, 4)
    late = [({k: x for k, x in features.items() if k != "layer2"}, y) for features, y in steps[:6]] + steps[6:]
    bank = fitted(late[:8], ["layer0", "layer1", "layer2"])
    resumed = Probes(bank.layers, 4, LEARNING_RATE)
    resumed.load_state_dict(torch.load(io.BytesIO(saved(bank)), weights_only=True), "cpu")
    assert (resumed.widths, resumed.finite()) == (bank.widths, bank.finite())
    for features, targets in late[8:]:
        assert torch.equal(resumed.learn(features, targets), bank.learn(features, targets))
    for layer in bank.layers:
        assert all(torch.equal(a, b) for a, b in zip(probe(resumed, layer), probe(bank, layer), strict=True))


def test_loaded_bank_shares_no_memory_with_the_state() -> None:
    steps = batches(3, 4)
    bank = fitted(steps[:2])
    before = probe(bank, "layer0")
    resumed = Probes(bank.layers, 4, LEARNING_RATE)
    resumed.load_state_dict(bank.state_dict(), "cpu")
    resumed.learn(*steps[2])
    assert all(torch.equal(a, b) for a, b in zip(probe(bank, "layer0"), before, strict=True))


def test_scores_over_uneven_batches_are_those_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    log_p = torch.randn(3, 4, 101, generator=generator, dtype=torch.float64).log_softmax(dim=1)
    labels = torch.randint(4, (101,), generator=generator)
    rows = F.one_hot(labels, 4).double()
    left_out = torch.rand(101, generator=generator) < 0.2
    rows[left_out] = 0
    sums, classes = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for part in torch.split(torch.arange(101), [40, 40, 20, 1]):
        sums += tally(log_p[:, :, part], rows[part])
        classes += count_classes(rows[part])
    found = {"wrong": sums[0], "loss": sums[1], "total": sums[2], "classes": classes}
    kept = labels[~left_out].numpy()
    for layer in range(3):
        p = log_p[layer].T[~left_out].exp().numpy()
        assert found["total"][layer] == len(kept)
        assert 1 - found["wrong"][layer] / found["total"][layer] == pytest.approx(accuracy_score(kept, p.argmax(1)))
        assert found["loss"][layer] / found["total"][layer] == pytest.approx(log_loss(kept, p, labels=range(4)))
    assert found["classes"].tolist() == np.bincount(kept, minlength=4).tolist()


def test_soft_targets_count_their_likeliest_class_and_their_cross_entropy() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.5, 0.4]], dtype=torch.float64)
    targets = torch.tensor([[0.6, 0.4, 0.0], [0.3, 0.3, 0.4]], dtype=torch.float64)
    wrong, loss, total = tally(p.log().T.unsqueeze(0), targets)[:, 0].tolist()
    assert (wrong, total) == (1, 2)
    assert loss == pytest.approx(float(F.cross_entropy(p.log(), targets, reduction="sum")))


@given(total=st.integers(1, 100_000), share=st.floats(0, 1))
def test_interval_is_wilsons(total: int, share: float) -> None:
    wrong = round(share * total)
    expected = binomtest(wrong, total).proportion_ci(0.95, method="wilson")
    assert wilson_interval(wrong, total) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("wrong", "total"), [(0, 0), (float("nan"), 10)])
def test_interval_of_nothing_is_nan(wrong: float, total: float) -> None:
    assert np.isnan(wilson_interval(wrong, total)).all()


def noisy_digits(copies: int = 4) -> tuple[Step, Step]:
    """Digits under noise through a fixed random network: training and held-out features of its layers, and labels."""
    generator = torch.Generator().manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=generator)
    matrices = [torch.randn(a, b, generator=generator) / a**0.5 for a, b in ((64, 48), (48, 24))]

    def through(samples: Tensor) -> Step:
        x = (torch.from_numpy(images).float() / 16)[samples].repeat(copies, 1)
        features = {"input": x + 0.3 * torch.randn(x.shape, generator=generator)}
        features["hidden1"] = (features["input"] @ matrices[0]).tanh()
        features["hidden2"] = (features["hidden1"] @ matrices[1]).tanh()
        return features, F.one_hot(torch.from_numpy(labels)[samples].repeat(copies), 10).float()

    return through(order[:900]), through(order[900:])


def test_probes_of_a_fixed_network_reach_the_error_of_logistic_regression() -> None:
    (features, targets), (held_out, held_out_targets) = noisy_digits()
    bank = Probes(list(features), 10, 1e-2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(80):
        for part in torch.split(torch.randperm(len(targets), generator=generator), 256):
            bank.learn({layer: x[part] for layer, x in features.items()}, targets[part])
    wrong, _, total = bank.test(held_out, held_out_targets)
    for i, (layer, x) in enumerate(features.items()):
        mean, deviation = x.mean(dim=0), x.std(dim=0)
        with threadpool_limits(1):
            exact = LogisticRegression(max_iter=1000).fit(((x - mean) / deviation).numpy(), targets.argmax(dim=1))
        answers = exact.predict(((held_out[layer] - mean) / deviation).numpy())
        exact_error = float(np.mean(answers != held_out_targets.argmax(dim=1).numpy()))
        assert float(wrong[i] / total[i]) == pytest.approx(exact_error, abs=0.005), layer


def test_layers_that_are_dropped_at_random_mix_nothing() -> None:
    names = [f"layer{i}" for i in range(8)]
    steps = batches(80, *[3] * 8, dtype=torch.float64)
    bank = Probes(names, 4, LEARNING_RATE)
    alone = Probes(["layer3"], 4, LEARNING_RATE)
    for i, (features, targets) in enumerate(steps):
        present = {name for j, name in enumerate(names) if (i >> (j % 7)) & 1 or name == "layer3"}
        sums = bank.learn({name: x for name, x in features.items() if name in present}, targets)
        own = alone.learn({"layer3": features["layer3"]}, targets)
        torch.testing.assert_close(sums[:, 3], own[:, 0], rtol=1e-12, atol=1e-12)
        assert [n > 0 for n in sums[2].tolist()] == [name in present for name in names]
