"""Reports whose errors are chosen: what is read off them has to follow."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_probes import ProbeReport


def report(layers: Sequence[int], *moments: Sequence[float]) -> ProbeReport:
    """The validation errors of ``net.layers.*`` at steps 0, 1, ...: of 10 000 samples, five classes of equally many."""
    new, total = ProbeReport(), 10_000.0
    about = {f"net.layers.{i}": {"depth": i, "features": 1, "features_total": 1} for i in layers}
    for step, errors in enumerate(moments):
        scores = {"wrong": [total * error for error in errors], "loss": [0.0] * len(errors)}
        scores |= {"total": [total] * len(errors), "classes": [total / 5] * 5}
        new.add(about, scores, stage="val", dataloader=0, epoch=step, step=step)
    return new
