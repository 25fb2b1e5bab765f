"""TensorBoard: all layers of a stage in one chart."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any


def write_layout(loggers: Iterable[Any], prefix: str, metrics: Iterable[str], stages: Iterable[str]) -> None:
    """Tell TensorBoard's Custom Scalars page to draw one chart a metric and stage, a line a layer.

    Of a run's layouts the last one wins, so it goes to a sub-run of its own and leaves the user's alone.

    Args:
        loggers: any loggers; those without TensorBoard's writer are passed over.
        prefix: what stands before ``probe_`` in the logged names.
        metrics: as in the logged names.
        stages: as in the logged names.
    """
    from torch.utils.tensorboard import SummaryWriter

    charts = {
        f"{metric}, {stage}": ["Multiline", [rf"^{re.escape(f'{prefix}probe_{metric}_{stage}')}/.*"]]
        for metric in metrics
        for stage in stages
    }
    for logger in loggers:
        if isinstance(getattr(logger, "experiment", None), SummaryWriter):
            with SummaryWriter(f"{logger.experiment.log_dir.rstrip('/')}/{prefix}probes") as writer:
                writer.add_custom_scalars({f"{prefix}linear probes": charts})
