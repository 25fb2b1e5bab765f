"""What probes may be asked, of batches ``(images, labels)``: a table for the tests that hold for every task."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def answers(batch: Any) -> Tensor:
    """Three questions about the label; every seventh sample lacks the second."""
    labels = batch[1]
    found = torch.stack([labels % 2, labels > 4, labels % 3 == 0], dim=1).float()
    found[:, 1] = torch.where(labels == 7, torch.nan, found[:, 1])
    return found


def numbers(batch: Any) -> Tensor:
    """Two numbers of other units and offsets; some samples lack the second."""
    labels = batch[1].double()
    missing = torch.where(labels == 7, torch.nan, labels.sqrt())
    return torch.stack([1e6 + 1e3 * labels, 1e-6 * missing], dim=1)


def bright(batch: Any) -> Tensor:
    """A class for each pixel: is it brighter than the image is? The darkest have none."""
    image = batch[0][:, 0]
    classes = (image > image.mean(dim=(1, 2), keepdim=True)).long()
    return torch.where(image < -1.5, -100, classes)


ASKED: dict[str, dict[str, Any]] = {
    "classification": {},
    "multilabel": {"task": "multilabel", "target": answers},
    "regression": {"task": "regression", "target": numbers},
    "several": {
        "target": {"digit": 1, "answers": answers, "numbers": numbers},
        "task": {"answers": "multilabel", "numbers": "regression"},
    },
    "pixels": {"num_classes": 2, "positions": 3, "target": bright},
}
"""Arguments of callback and ``probe()``."""
