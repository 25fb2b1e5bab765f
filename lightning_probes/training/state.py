"""Put a session into a checkpoint, and restore it in the session of a resumed run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from lightning_probes.checkpoints import STATE_VERSION
from lightning_probes.network.pairing import Pairing
from lightning_probes.report.report import ProbeReport
from lightning_probes.training.resume import differing, question_in, refuse
from lightning_probes.training.session import ProbingSession


def state_of(session: ProbingSession, report: ProbeReport) -> dict[str, Any]:
    """Return everything that a resumed run needs, as tensors and plain types.

    Beside the report there are, under ``probes``: the layers (``selected``, ``facts``: order, depth and size), how
    features are reduced (``reduction``, ``tokens``, ``positions``) and which dimension holds them (``axes``), which row
    is of which sample (``pairings``), what is asked and the number of outputs (``question``, ``num_classes``), the
    probes trained along (``along``) and those at their optimum with what is known of them (``optimum``), epoch and step
    of the last point and of the last step (``point``, ``now``), layers set aside and the running tally of the probes
    trained along (``points``), the note on targets that are strange (``missing``), whether training has no labels
    (``trains_without_labels``), and whether probes are on a labelled set of their own (``own_data``). The keys are
    those of release 0.1.0, and new ones. No batch and no feature is saved.
    """
    network = session.network
    probes = {
        "facts": session.facts.state_dict(),
        "selected": list(network.selected),
        "reduction": network.reducer.state_dict(),
        "tokens": network.ways_of_tokens,
        "positions": network.labels.most_positions,
        "trains_without_labels": network.labels.absent_in_training,
        "num_classes": network.question.outputs,
        "question": network.question.state_dict(),
        "along": session.online.state_dict(),
        "optimum": session.refit.state_dict(),
        "point": list(session.point),
        "now": list(session.now),
        "missing": session.doubts,
        "points": session.curves.state_dict(),
        "axes": network.axes.state_dict(),
        "own_data": session.has_own_data,
        "pairings": [known.state_dict() for known in network.pairings.values() if known.is_known],
    }
    return {"version": STATE_VERSION, "probes": probes, "report": asdict(report)}


def restore(
    session: ProbingSession,
    state: Mapping[str, Any],
    device: torch.device | str,
    *,
    strict: bool = True,
    is_training: bool = True,
) -> None:
    """Restore the probes of a checkpoint in a new session.

    Args:
        session: session of this run.
        state: the value under ``probes`` of what :func:`state_of` returned.
        device: device of the restored probes.
        strict: whether the probes must have the layers and classes of this run; else probes that differ start afresh.
        is_training: whether the run trains; else the layers of the checkpoint that this run selects are scored.

    Raises:
        ValueError: the probes differ from those of this run, and ``strict`` is true.
    """
    if session.has_own_data != state.get("own_data", False):
        there, here = ("training", "data") if session.has_own_data else ("data", "training")
        refuse(f"they were fitted on {there} in the checkpoint and are on {here} here", strict=strict)
        return
    network = session.network
    selected = network.selected if is_training else state["selected"]
    # In checkpoints without this entry features are means over space.
    reduction = state.get("reduction", {"kind": "pool", "draws": {}})
    # In checkpoints without this entry tokens are averaged.
    known = state.get("axes", {}).get("known", [])
    averaged = {layer: "mean" for layer, dimensions, axes in known if dimensions > 2 and axes == "tokens"}
    tokens = network.tokens.differing(state.get("tokens", averaged))
    asked = network.question
    both = state.get("positions"), network.labels.most_positions
    positions = "" if both[0] == both[1] else "positions is {} in the checkpoint and {} here".format(*both)
    if difference := tokens or positions or differing(state, selected, asked, reduction["kind"], network.reducer.kind):
        refuse(difference, strict=strict)
    session.point = tuple(state["point"])
    session.now = tuple(state["now"])
    session.doubts = state.get("missing", "")
    network.labels.present_in_validation |= state["trains_without_labels"]
    network.labels.is_trusted = True
    if asked.differs(question_in(state)) or reduction["kind"] != network.reducer.kind or tokens or positions:
        return
    network.reducer.load_state_dict(reduction)
    network.tokens.load(state.get("tokens", {}))
    layers = network.layers if difference else state["facts"]["layers"]
    session.online.load_state_dict(
        state["along"], layers, device, strict=strict, is_training=is_training, goes_on=not difference
    )
    if difference:
        # The first batch will show the order of the layers, which is that of their calls.
        return
    # Checkpoints without this entry were written before it was found out which row is of which sample.
    if "axes" in state:
        network.axes.load_state_dict(state["axes"])
    network.pairings = {known["data"]: Pairing.from_state(known) for known in state.get("pairings", [])}
    session.facts.load_state_dict(state["facts"])
    session.refit.load_state_dict(state["optimum"], session.facts.layers, device)
    session.curves.load_state_dict(state["points"], device)
