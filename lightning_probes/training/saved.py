"""What of a session goes into a checkpoint, and comes out of it into the session of a resumed run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lightning_probes.training.resume import differing, refuse
from lightning_probes.training.session import ProbingSession


def state_of(session: ProbingSession) -> dict[str, Any]:
    """Everything a resumed run needs: tensors and plain types."""
    network = session.network
    return {
        "facts": session.facts.state_dict(),
        "selected": list(network.selected),
        "reduction": network.reducer.state_dict(),
        "trains_without_labels": network.labels.absent_in_training,
        "num_classes": network.num_classes,
        "along": session.along.state_dict(),
        "optimum": session.optimum.state_dict(),
        "point": list(session.point),
        "now": list(session.now),
        "missing": session.missing,
        "points": session.points.state_dict(),
    }


def restore(
    session: ProbingSession,
    state: Mapping[str, Any],
    device: torch.device | str,
    *,
    strict: bool = True,
    is_training: bool = True,
) -> None:
    """Put what :func:`state_of` gave into a new session.

    Args:
        session: of this run.
        state: of the checkpoint.
        device: where the probes go on.
        strict: they must be those of the layers and classes of this run; else those that are not start afresh.
        is_training: else the layers of the checkpoint are scored, whichever they are.

    Raises:
        ValueError: they are not, and must.
    """
    network = session.network
    selected = network.selected if is_training else state["selected"]
    # Of checkpoints that do not say it was the mean over space.
    reduction = state.get("reduction", {"kind": "pool", "draws": {}})
    if difference := differing(state, selected, network.num_classes, reduction["kind"], network.reducer.kind):
        refuse(difference, strict=strict)
    session.point, session.now = tuple(state["point"]), tuple(state["now"])
    session.missing = state.get("missing", "")
    network.labels.present_in_validation |= state["trains_without_labels"]
    if state["num_classes"] != network.num_classes or reduction["kind"] != network.reducer.kind:
        return
    network.reducer.load_state_dict(reduction)
    layers = selected if difference else state["facts"]["layers"]
    session.along.load_state_dict(
        state["along"], layers, device, strict=strict, is_training=is_training, goes_on=not difference
    )
    if difference:
        # Their order is that of the calls, which the first batch will show.
        return
    session.facts.load_state_dict(state["facts"])
    session.optimum.load_state_dict(state["optimum"], session.layers, state["num_classes"], device)
    session.points.load_state_dict(state["points"], device)
