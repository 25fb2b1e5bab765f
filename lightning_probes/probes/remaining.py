"""Estimate how much lower an error would be if a probe were fitted on more samples of the same kind."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from lightning_probes.tasks.task import Task

REMAINING = ("remaining", "remaining_low", "remaining_high")
"""Name the entries of a row: what an error would fall by, and the ends of its 90 % interval."""

_SPREAD = 0.35
"""Give the standard deviation of what the error falls by, as a share of the estimate, beside the noise of two errors.

Of 568 rows of five networks the interval held 95 % of what was measured at a share of .4
(``benchmarks/remaining.py``).
"""

_NORMAL = 1.64
"""Give the half-width of a 90 % interval in standard deviations."""


def remaining(task: Task, fitted: Tensor, held_out: Tensor | None, share: float | None) -> dict[str, Any]:
    """Return by how much the error would fall on all samples, for the rows of a report.

    A linear classifier's errors on the samples that it was fitted on and on others approach one limit from both sides,
    equally fast, in proportion to 1 / n (Cortes et al. 1993). So half of the difference is still to come with
    infinitely many samples, and of that the part that is not the share of samples had. Both errors are of samples that
    the network has been trained on in the same way, so a network that has learnt its training set by heart is not taken
    for a probe that lacks samples.

    Args:
        task: what the probe is asked.
        fitted: tally ``(statistics,)`` of the samples that the probe was fitted on.
        held_out: tally ``(statistics,)`` of samples held out of it; ``None`` if there are none.
        share: samples fitted on, as a share of all, above 0; ``None`` if it is not known.

    Returns:
        ``remaining``, in units of the error, and the ends of its 90 % interval, ``remaining_low`` and
        ``remaining_high``; ``None`` for each if there is nothing to tell it from.
    """
    known = [fitted.tolist()] if held_out is None else [fitted.tolist(), held_out.tolist()]
    seen, *others = (task.measures(tally)["error"] for tally in known)
    if share is None or not math.isfinite(seen + sum(others)):
        return dict.fromkeys(REMAINING)
    if share >= 1:
        return dict.fromkeys(REMAINING, 0.0)
    if not others:
        return dict.fromkeys(REMAINING)
    (unseen,) = others
    noise = math.hypot(*((high - low) / (2 * 1.96) for low, high in map(task.interval, known)))
    part = (1 - share) / 2
    found = part * max(unseen - seen, 0.0)
    half = _NORMAL * math.hypot(_SPREAD * found, part * noise)
    return dict(zip(REMAINING, (found, max(found - half, 0.0), found + half), strict=True))
