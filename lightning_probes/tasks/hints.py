"""Say what to write instead of labels that probes do not take.

Each hint is the end of an error message; it is empty where there is nothing to suggest.
"""

from __future__ import annotations

from torch import Tensor


def is_distribution(rows: Tensor) -> Tensor:
    """Return for each row of ``(samples, classes)`` whether it holds probabilities that sum to 1, within .01."""
    return (rows >= 0).all(dim=1) & ((rows.sum(dim=1) - 1).abs() < 1e-2)


def is_rows(labels: Tensor) -> bool:
    """Return whether ``labels`` may be rows ``(samples, classes)``: one-hot, probabilities, or several ones a row."""
    if labels.dim() != 2 or labels.shape[1] < 2 or labels.is_complex():
        return False
    return labels.is_floating_point() or is_zeros_and_ones(labels)


def is_zeros_and_ones(labels: Tensor) -> bool:
    """Return whether all values of ``labels`` are 0 or 1."""
    return bool(((labels == 0) | (labels == 1)).all())


def hint_of_shape(labels: Tensor) -> str:
    """Say what to write instead of several labels for each sample, ``(samples, ...)``."""
    if labels.dim() < 2 or not labels.numel():
        return ""
    if is_rows(labels):
        if bool(is_distribution(labels.double()).all()):
            return f"; these are rows of {labels.shape[1]} probabilities: num_classes={labels.shape[1]}"
        if is_zeros_and_ones(labels):
            return hint_of_rows(labels)
    if labels.is_floating_point() or labels.is_complex():
        return "; several numbers for a sample are no classes: task='regression'"
    each = {2: "token", 3: "pixel"}.get(labels.dim(), "part")
    return (
        f"; labels of their own for each {each}: positions=16, so many of a sample; or a function makes one of them, "
        "say the most frequent, target=lambda batch: batch[1].flatten(1).mode(dim=1).values"
    )


def hint_of_rows(labels: Tensor) -> str:
    """Say what to write instead of rows ``(samples, classes)`` that are no distributions over the classes."""
    if missing := _hint_of_nan(labels):
        return missing
    ones = labels.sum(dim=1)
    if is_zeros_and_ones(labels) and bool((ones > 1).any()):
        return "; several classes in a row are labels of their own: task='multilabel'"
    if is_zeros_and_ones(labels):
        return (
            "; a row of zeros names no class; integers leave a sample out with -100: target=lambda batch: "
            "torch.where(batch[1].sum(1) > 0, batch[1].argmax(1), -100)"
        )
    return (
        "; a row of probabilities has no negative ones and sums to 1; .softmax(dim=1) makes some of scores; rows of "
        "other numbers: task='regression'"
    )


def hint_of_integers(wrong: Tensor) -> str:
    """Say what to write instead of integers that are no classes, of which ``wrong`` are some."""
    if bool((wrong < 0).all()):
        return "; -100 leaves a sample out: target=lambda batch: torch.where(batch[1] < 0, -100, batch[1])"
    return f"; if there are more classes: num_classes={int(wrong.max()) + 1}; -100 leaves a sample out"


def hint_of_floats(labels: Tensor) -> str:
    """Say what to write instead of floats ``(samples,)`` that stand for classes."""
    if labels.is_complex():
        return ""
    if missing := _hint_of_nan(labels):
        return missing
    if bool((labels.isfinite() & (labels == labels.round())).all()):
        return "; they are whole numbers, which .long() makes integers: target=lambda batch: batch[1].long()"
    return (
        "; they are no whole numbers: task='regression'; or intervals of them can be classes: "
        "target=lambda batch: torch.bucketize(batch[1], torch.tensor([...]))"
    )


def _hint_of_nan(labels: Tensor) -> str:
    missing = labels.isnan().flatten(1).any(dim=1) if labels.dim() > 1 else labels.isnan()
    if not bool(missing.any()):
        return ""
    first, number = int(missing.nonzero()[0]), int(missing.sum())
    return (
        f"; {number} of the {len(labels)} are NaN, the first at {first}: leave such samples out of the dataset, or "
        "give them the integer label -100; of numbers that are no classes NaN leaves an entry out: task='regression'"
    )
