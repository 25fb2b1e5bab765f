from __future__ import annotations

import re
from collections import UserDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_probes.network.batches import as_tensor, pick
from lightning_probes.network.labels import find_num_classes
from lightning_probes.options import Where
from lightning_probes.probes.dataset import LayerBatch
from lightning_probes.tasks.classification import Classification

X, Y = torch.zeros(4, 3), torch.tensor([0, 1, 2, 1])


def check_labels(labels: Any, num_classes: int) -> None:
    Classification(num_classes).check(as_tensor(labels))


def distributions(labels: Tensor, num_classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return Classification(num_classes).encode(labels, dtype)


@dataclass
class Batch:
    image: Tensor
    label: Tensor


Pair = namedtuple("Pair", ["image", "label"])


@pytest.mark.parametrize(
    ("batch", "where"),
    [
        ((X, Y), 1),
        ([X, Y], -1),
        ([[X, X], Y], 1),
        ({"image": X, "label": Y}, "label"),
        (UserDict(image=X, label=Y), "label"),
        ({0: X, 1: Y}, 1),
        (Batch(X, Y), "label"),
        (Batch(X, Y), 1),
        (Batch(X, Y), -1),
        (Pair(X, Y), "label"),
        (Pair(X, Y), 1),
        (Pair(X, Y), -1),
        ({"inputs": X, "targets": {"label": Y}}, "label"),
        ((X, {"label": Y}), "label"),
        ((X, Pair(X, Y)), "label"),
        ({"label": Y, "nested": {"label": X}}, "label"),
        ([X, Batch(X, Y)], "label"),
        ((X, {"label": Y}), lambda batch: batch[1]["label"]),
    ],
)
def test_pick_finds_an_index_a_key_or_what_a_function_returns(batch: Any, where: Where) -> None:
    assert pick(batch, where, "target") is Y


@pytest.mark.parametrize(
    ("batch", "where", "message"),
    [
        ((X, Y), 2, "target=2: the batch has no such index; it is tuple {0: float32[4, 3], 1: int64[4]}"),
        ((X, Y), -3, "target=-3: the batch has no such index; it is tuple {0: float32[4, 3], 1: int64[4]}"),
        (
            {"image": X, "targets": {"fine": Y, "names": ["a"]}},
            "label",
            "target='label': the batch has no such key; "
            "it is dict {'image': float32[4, 3], 'targets': dict {'fine': int64[4], 'names': list}}",
        ),
        (
            {"image": X, "label": Y},
            1,
            "target=1: the batch has no such index; it is dict {'image': float32[4, 3], 'label': int64[4]}",
        ),
        (
            Batch(X, Y),
            "y",
            "target='y': the batch has no such key; it is Batch {'image': float32[4, 3], 'label': int64[4]}",
        ),
        (X, 1, "target=1: the batch has no such index; it is float32[4, 3]"),
        ((X, [X, Y]), "y", "target='y': the batch has no such key; it is tuple {0: float32[4, 3], 1: list {0: float32"),
    ],
)
def test_missing_place_is_an_error_that_lists_keys_and_shapes(batch: Any, where: Where, message: str) -> None:
    with pytest.raises(LookupError, match="^" + re.escape(message)):
        pick(batch, where, "target")


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("shape", [(4,), (4, 1)])
@pytest.mark.parametrize("num_classes", [3, 200, 1000])
def test_integer_labels_become_one_hot_rows(dtype: torch.dtype, shape: tuple[int, ...], num_classes: int) -> None:
    labels = Y.reshape(shape).to(dtype)
    check_labels(labels, num_classes)
    rows = distributions(labels, num_classes)
    assert rows.dtype == torch.float32
    assert torch.equal(rows, nn.functional.one_hot(Y, num_classes).float())


@pytest.mark.parametrize("dtype", INTEGERS[1:])
@pytest.mark.parametrize("num_classes", [1, 2, 3, 200])
def test_label_minus_100_is_left_out(dtype: torch.dtype, num_classes: int) -> None:
    labels = torch.tensor([0, -100, 0], dtype=dtype)
    check_labels(labels, num_classes)
    assert distributions(labels, num_classes).sum(dim=1).tolist() == [1, 0, 1]


@pytest.mark.parametrize("bad", [-1, -7, 3, 127])
def test_label_outside_the_classes_is_a_zero_row(bad: int) -> None:
    assert distributions(torch.tensor([bad, 2]), 3).tolist() == [[0, 0, 0], [0, 0, 1]]


SOFT = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_soft_labels_stay_as_they_are(dtype: torch.dtype) -> None:
    labels = SOFT.to(dtype)
    check_labels(labels, 3)
    assert torch.equal(distributions(labels, 3), labels.float())
    assert distributions(labels, 3, torch.float64).dtype == torch.float64


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.bool, torch.float32])
def test_one_hot_labels_stay_as_they_are(dtype: torch.dtype) -> None:
    labels = torch.eye(3)[Y].to(dtype)
    check_labels(labels, 3)
    assert torch.equal(distributions(labels, 3), torch.eye(3)[Y])


@pytest.mark.parametrize("row", [[0.2, 0.2, 0.2], [1.5, -0.5, 0.0], [float("nan"), 0.0, 1.0], [2.0, 0.0, 0.0]])
def test_row_that_is_no_distribution_is_left_out_and_an_error_at_first(row: list[float]) -> None:
    labels = torch.tensor([[0.0, 1.0, 0.0], row])
    assert distributions(labels, 3).tolist() == [[0, 1, 0], [0, 0, 0]]
    with pytest.raises(ValueError, match=r"^target: row 1 of the labels \[2, 3\] is no distribution: "):
        check_labels(labels, 3)


def test_soft_labels_do_not_carry_a_gradient_on() -> None:
    assert not distributions(SOFT.clone().requires_grad_(), 3).requires_grad


@pytest.mark.parametrize(
    ("labels", "num_classes", "expected"),
    [
        (torch.tensor([0, 0]), 1, [[1.0], [1.0]]),
        (torch.tensor([[0], [0]]), 1, [[1.0], [1.0]]),
        (torch.tensor([[1.0], [1.0]]), 1, [[1.0], [1.0]]),
        (torch.tensor([0, 1]), 2, [[1.0, 0.0], [0.0, 1.0]]),
        (torch.tensor([[0], [1]]), 2, [[1.0, 0.0], [0.0, 1.0]]),
        (torch.tensor([[0, 1], [1, 0]]), 2, [[0.0, 1.0], [1.0, 0.0]]),
        (torch.tensor([[0.25, 0.75]]), 2, [[0.25, 0.75]]),
        (torch.tensor([True, False]), 2, [[0.0, 1.0], [1.0, 0.0]]),
    ],
)
def test_one_class_and_two_classes(labels: Tensor, num_classes: int, expected: list[list[float]]) -> None:
    check_labels(labels, num_classes)
    assert distributions(labels, num_classes).tolist() == expected


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (
            [0, 1],
            TypeError,
            "target: expected a tensor of labels, found list; a function makes one of it: "
            "target=lambda batch: torch.tensor(batch[1])",
        ),
        (
            torch.tensor(1),
            ValueError,
            "target: labels have shape (); expected (batch,), (batch, 1) or (batch, num_classes=3)",
        ),
        (
            torch.zeros(2, 4),
            ValueError,
            "target: labels have shape (2, 4); expected (batch,), (batch, 1) or (batch, num_classes=3); a row of zeros "
            "names no class; integers leave a sample out with -100: target=lambda batch: "
            "torch.where(batch[1].sum(1) > 0, batch[1].argmax(1), -100)",
        ),
        (
            torch.zeros(2, 8, 8).long(),
            ValueError,
            "target: labels have shape (2, 8, 8); expected (batch,), (batch, 1) or (batch, num_classes=3); labels of "
            "their own for each pixel: positions=16, so many of a sample; or a function makes one of them, say the "
            "most frequent, "
            "target=lambda batch: batch[1].flatten(1).mode(dim=1).values",
        ),
        (
            torch.zeros(2),
            TypeError,
            "target: labels of shape (2,) are torch.float32; expected integers, or rows of probabilities; they are "
            "whole numbers, which .long() makes integers: target=lambda batch: batch[1].long()",
        ),
        (
            torch.zeros(2, 1),
            TypeError,
            "target: labels of shape (2, 1) are torch.float32; expected integers, or rows of probabilities; they are "
            "whole numbers, which .long() makes integers: target=lambda batch: batch[1].long()",
        ),
        (
            torch.tensor([0, 3]),
            ValueError,
            "target: label 3 is outside [0, num_classes=3); if there are more classes: num_classes=4; "
            "-100 leaves a sample out",
        ),
        (
            torch.tensor([[0], [-1]]),
            ValueError,
            "target: label -1 is outside [0, num_classes=3); -100 leaves a sample out: "
            "target=lambda batch: torch.where(batch[1] < 0, -100, batch[1])",
        ),
        (
            torch.tensor([0, 156], dtype=torch.uint8),
            ValueError,
            "target: label 156 is outside [0, num_classes=3); if there are more classes: num_classes=157; "
            "-100 leaves a sample out",
        ),
    ],
)
def test_labels_that_cannot_be_used_are_an_error(labels: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + re.escape(message) + "$"):
        check_labels(labels, 3)


class WithAttribute(LightningModule):
    num_classes = 7


class WithHyperparameter(LightningModule):
    def __init__(self, num_classes: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()


class WithMetric(LightningModule):
    def __init__(self, *num_classes: int) -> None:
        super().__init__()
        self.metrics = nn.ModuleList([MulticlassAccuracy(n) for n in num_classes])


class WithMetrics(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.val = MetricCollection([MulticlassAccuracy(9), MulticlassF1Score(9)])


class Data(LightningDataModule):
    num_classes = 5


class DataWithHyperparameter(LightningDataModule):
    def __init__(self, num_classes: int = 6) -> None:
        super().__init__()
        self.save_hyperparameters()


@pytest.mark.parametrize(
    ("owners", "expected"),
    [
        ((WithAttribute(),), 7),
        ((WithHyperparameter(),), 8),
        ((WithMetric(4),), 4),
        ((WithMetric(4, 4),), 4),
        ((WithMetrics(),), 9),
        ((None, WithAttribute()), 7),
        ((Data(), WithAttribute()), 5),
        ((DataWithHyperparameter(), WithAttribute()), 6),
        ((LightningDataModule(), WithHyperparameter()), 8),
        ((SimpleNamespace(num_classes="ten"), WithMetric(4)), 4),
    ],
)
def test_number_of_classes_is_that_of_the_first_owner_that_knows_it(owners: tuple[Any, ...], expected: int) -> None:
    assert find_num_classes(*owners) == expected


def test_unknown_number_of_classes_is_an_error_naming_who_was_asked() -> None:
    message = "num_classes is not given and LightningDataModule, WithMetric has no `num_classes`, as attribute"
    with pytest.raises(ValueError, match=f"^{message}, .*; pass num_classes=...$"):
        find_num_classes(None, LightningDataModule(), WithMetric())


def test_metrics_that_disagree_are_an_error_listing_their_numbers() -> None:
    with pytest.raises(ValueError, match=re.escape("(its metrics disagree: [3, 4]); pass num_classes=...")):
        find_num_classes(WithMetric(4, 3))


@pytest.mark.parametrize("views", [1, 2, 3])
def test_views_are_repeated_one_after_another(views: int) -> None:
    targets = torch.eye(3)
    assert torch.equal(LayerBatch({}, targets).targets_of(3 * views), torch.cat([targets] * views))
