"""Find out which row of an activation is of which sample, from what changes when the content of a sample is replaced.

Hypotheses, such as "one row a sample" or "equally many consecutive rows for each sample", say which rows may change.
One that no replaced sample contradicts holds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_probes.network.arrangement import Arrangement, index_of, values_of
from lightning_probes.options import Calls, Tokens, first_of

_WEAK = 0.1
"""Bound what may change in rows of other samples, relative to the change of a sample's own rows: int8, statistics."""

_BLOCKS = 64
"""Bound the blocks in which the rows of a batch may lie."""

MIXED_BY_STEP = "the step mixes samples or changes their order before the network sees them"
"""Say why no row belongs to one sample where the network is not to blame."""

DEAD = "its output does not depend on the content of the batch"
"""Say why a layer that stays still whatever it is given has no arrangement."""

TRAINING = "train"
"""Name the data of training; the data of an evaluation are named by stage and loader, such as ``val/0``."""

_TRIES = 3
"""Bound the batches that are experimented with where the ones before told nothing."""


@dataclass(frozen=True)
class Outcome:
    """Hold what an experiment found of one call of a layer.

    Attributes:
        arrangement: which rows are of which sample; ``None`` if none is known.
        reason: why no arrangement is known; empty if one is.
        is_still: whether nothing that could tell has changed, so that other weights may tell more.
    """

    arrangement: Arrangement | None = None
    reason: str = ""
    is_still: bool = False


@dataclass
class Observation:
    """Hold what one call of a layer put out, and how that changed as samples were replaced.

    Attributes:
        shape: shape of the output, or of a packed sequence's data.
        packed: sample of each step if the output is a packed sequence; ``None`` if it is none.
        noise: largest change between two runs with the same content.
        changes: ``{sample: largest change of each entry of dimension 0, and of dimension 1}``; ``None`` for a sample
            with which the output had another shape.
    """

    shape: tuple[int, ...]
    packed: Tensor | None = None
    noise: float = 0.0
    changes: dict[int, tuple[Tensor, ...] | None] = field(default_factory=dict)

    @classmethod
    def of(cls, output: Tensor | PackedSequence) -> Observation:
        """Begin the observation of a call with what it put out before any sample was replaced."""
        packed = index_of(output) if isinstance(output, PackedSequence) else None
        return cls(tuple(values_of(output).shape), None if packed is None else packed.cpu())

    def compare(self, before: Tensor | PackedSequence, after: Tensor | PackedSequence, sample: int | None) -> None:
        """Take in the output of a further run, in which the content of ``sample`` was replaced, or nothing at all."""
        x, y = values_of(before), values_of(after)
        if x.shape != y.shape:
            if sample is not None:
                self.changes[sample] = None
            return
        change = (y - x).abs() if x.is_floating_point() else (x != y).float()
        if not math.isfinite(float(change.sum())):
            # Where values are not finite, only whether they differ tells.
            is_finite = x.isfinite() & y.isfinite()
            change = torch.where(is_finite, change.nan_to_num(posinf=1.0), (x != y) & ~(x.isnan() & y.isnan()))
        if sample is None:
            self.noise = float(change.max()) if change.numel() else 0.0
            return
        along = [change] if change.dim() == 1 else []
        if change.dim() > 1 and change.numel():
            along = [change.movedim(dim, 0).flatten(1).amax(dim=1) for dim in range(2)]
        self.changes[sample] = tuple(part.cpu().double() for part in along)


@dataclass(frozen=True)
class _Evidence:
    """Hold how well a hypothesis fits."""

    arrangement: Arrangement
    leak: float
    """Hold the largest change of rows of other samples, relative to the change of a sample's own rows."""
    covered: float
    """Hold the mean share of a sample's own rows that changed."""
    times: int
    """Hold the number of replaced samples with which anything changed."""


def decide(seen: Observation, samples: int, index: Tensor | None = None, *, is_complete: bool = False) -> Outcome:
    """Find the arrangement of one call of a layer.

    Args:
        seen: how its output changed.
        samples: number of samples of the batch.
        index: sample of each row, if the batch has such a vector, such as that of a batch of graphs.
        is_complete: whether everything that the network was given is known to be of samples of the batch, so that rows
            which did not change are theirs too.
    """
    if any(change is None for change in seen.changes.values()):
        return Outcome(reason=f"its output {list(seen.shape)} has another shape for other contents")
    changes = {
        sample: tuple(torch.where(part > seen.noise, part, 0.0) for part in parts)
        for sample, parts in seen.changes.items()
        if parts
    }
    if all(float(parts[0].max()) == 0 for parts in changes.values()):
        return Outcome(reason=DEAD, is_still=True)
    fit: list[_Evidence] = []
    unfit: list[_Evidence] = []
    for hypothesis in _hypotheses(seen, changes, samples, index):
        evidence = _weigh(hypothesis, seen, changes, samples, index)
        if evidence.leak >= _WEAK:
            unfit.append(evidence)
        elif (sure := _sure(evidence, changes, samples, is_complete=is_complete)) is not None:
            fit.append(sure)
    if not fit:
        shape = list(seen.shape)
        several = f"the rows of its output {shape} depend on several samples each"
        return Outcome(reason=several if unfit else f"no dimension of its output {shape} fits the {samples} labels")
    if max(evidence.times for evidence in fit) < 2 and samples > 1:
        return Outcome(reason="too few of its rows change with the content of the batch", is_still=True)
    return _best(fit)


def _hypotheses(
    seen: Observation, changes: Mapping[int, tuple[Tensor, ...]], samples: int, index: Tensor | None
) -> list[Arrangement]:
    if seen.packed is not None:
        return [Arrangement("packed")] if int(seen.packed.max()) < samples else []
    found: list[Arrangement] = []
    # A vector of the batch is read anew in each batch, so it is preferred to a fixed number of rows.
    if index is not None and seen.shape[0] == len(index):
        found.append(Arrangement("indexed"))
    for dim, size in enumerate(seen.shape[:2]):
        if size == samples:
            found.append(Arrangement("rows", dim))
        elif size and size % samples == 0:
            found.append(Arrangement("consecutive", dim, size // samples))
        if size > samples and dim == 0 and (blocks := _blocks(changes, size, samples)) is not None:
            found.append(blocks)
    return found


def _blocks(changes: Mapping[int, tuple[Tensor, ...]], rows: int, samples: int) -> Arrangement | None:
    """Return the blocks that the first rows to change point to: the others are asked afterwards."""
    offsets: set[int] = set()
    for sample, parts in changes.items():
        change = parts[0]
        if float(change.max()) > 0:
            strong = (change > 1e-3 * change.max()).nonzero().flatten().tolist()
            offsets |= {row - sample for row in strong}
    at = sorted(offsets)
    if not at or len(at) > _BLOCKS or at[0] < 0 or at[-1] + samples > rows:
        return None
    if any(second - first < samples for first, second in pairwise(at)):
        return None
    return Arrangement("blocks", each=len(at), at=tuple(at), of=(rows, samples))


def _owners(arrangement: Arrangement, seen: Observation, samples: int, index: Tensor | None) -> Tensor:
    """Return the sample of each entry of the arrangement's dimension; -1 for those of no sample."""
    rows = seen.shape[arrangement.dim]
    if arrangement.kind == "packed" and seen.packed is not None:
        return seen.packed
    if arrangement.kind == "indexed" and index is not None:
        return index.cpu().long()
    if arrangement.kind == "blocks":
        owners = torch.full((rows,), -1)
        for first in arrangement.at:
            owners[first : first + samples] = torch.arange(samples)
        return owners
    return torch.arange(rows) // arrangement.each


def _weigh(
    arrangement: Arrangement,
    seen: Observation,
    changes: Mapping[int, tuple[Tensor, ...]],
    samples: int,
    index: Tensor | None,
) -> _Evidence:
    owners = _owners(arrangement, seen, samples, index)
    leak = 0.0
    covered: list[float] = []
    for sample, parts in changes.items():
        change = parts[arrangement.dim]
        own, others = change[owners == sample], change[owners != sample]
        most = float(others.max()) if len(others) else 0.0
        top = float(own.max()) if len(own) else 0.0
        if top or most:
            leak = max(leak, most / top if top else float("inf"))
            covered.append(float((own > 0).double().mean()) if len(own) else 0.0)
    return _Evidence(arrangement, leak, sum(covered) / max(len(covered), 1), len(covered))


def _sure(
    evidence: _Evidence, changes: Mapping[int, tuple[Tensor, ...]], samples: int, *, is_complete: bool
) -> _Evidence | None:
    """Keep of equally many consecutive rows those that are known to be the sample's."""
    arrangement = evidence.arrangement
    if is_complete or arrangement.kind != "consecutive":
        return evidence
    sure: set[int] = set()
    for sample, parts in changes.items():
        own = parts[arrangement.dim][sample * arrangement.each : (sample + 1) * arrangement.each]
        sure |= set(own.nonzero().flatten().tolist())
    if len(sure) == arrangement.each:
        return evidence
    return replace(evidence, arrangement=replace(arrangement, at=tuple(sorted(sure)))) if sure else None


_ORDER = ("rows", "indexed", "consecutive", "packed", "blocks")


def _best(fit: Sequence[_Evidence]) -> Outcome:
    ranked = sorted(fit, key=lambda e: (e.leak > 0, -round(e.covered, 2), _ORDER.index(e.arrangement.kind)))
    best = ranked[0]
    # A vector of the batch and blocks describe rows that another arrangement may describe as well.
    alike = ("indexed", "blocks")
    rivals = [
        other
        for other in ranked[1:]
        if (other.leak > 0, round(other.covered, 2)) == (best.leak > 0, round(best.covered, 2))
        and not {other.arrangement.kind, best.arrangement.kind} & set(alike)
    ]
    indexed = next((e for e in ranked if e.arrangement.kind == "indexed" and not e.leak), None)
    if indexed is not None and best.arrangement.kind == "consecutive":
        best = indexed
    elif rivals:
        kinds = ", ".join(f"{e.arrangement.described() or 'one row a sample'}" for e in (best, *rivals))
        return Outcome(reason=f"its rows can be arranged in several ways: {kinds}")
    note = f"rows of other samples change up to {best.leak:.1%} as much as its own" if best.leak > 0 else ""
    return Outcome(replace(best.arrangement, note=note))


def choose(
    outcomes: Mapping[str, Mapping[int, Outcome]],
    which: Calls,
    *,
    ones: Container[str] = (),
    wanted: Mapping[str, str] | None = None,
) -> dict[str, Outcome]:
    """Choose the call of each layer that counts, and say what several rows of a sample mean.

    The same call counts for all layers where it can: the first, or last, that most layers have in an arrangement. Rows
    are parts of their sample, to be averaged, if a later layer has fewer rows a sample; else they are views of it.

    Args:
        outcomes: ``{layer: {number of the call: what was found}}``, in the order of the first calls.
        which: which of several calls counts.
        ones: layers without an arrangement that have one row a sample by their shape.
        wanted: ``{layer: "parts" or "views"}`` where the user says what several rows mean.
    """
    held = {layer: [n for n, found in calls.items() if found.arrangement] for layer, calls in outcomes.items()}
    # Calls are counted from the end for the last one, since layers differ in their number of calls.
    places = {layer: {_place(n, outcomes[layer], which): n for n in numbers} for layer, numbers in held.items()}
    votes = Counter(place for known in places.values() for place in known)
    common = max(votes, key=lambda place: (votes[place], -place), default=0)
    chosen: dict[str, Outcome] = {}
    for layer, calls in outcomes.items():
        if not held[layer]:
            chosen[layer] = calls[min(calls)] if calls else Outcome()
            continue
        number = places[layer].get(common, places[layer][min(places[layer])])
        found = calls[number].arrangement
        assert found is not None
        same = [n for n in held[layer] if _bare(calls[n].arrangement) == _bare(found)]
        if which == "first":
            same = [number]
        elif len(same) == len(calls):
            same = []  # Any call, of which later steps may have more.
        elif which == "last":
            same = [number]
        chosen[layer] = Outcome(replace(found, calls=tuple(same)))
    fewest: float = float("inf")
    for layer in reversed(chosen):
        found = chosen[layer].arrangement
        if found is None:
            fewest = 1 if layer in ones and not outcomes[layer] else fewest
            continue
        many = found.rows_of_sample
        if many > 1:
            meaning = (wanted or {}).get(layer)
            is_mean = fewest < many if meaning is None else meaning == "parts"
            chosen[layer] = Outcome(replace(found, is_mean=is_mean))
        fewest = min(fewest, many)
    return {layer: found for layer, found in chosen.items() if outcomes[layer]}


def _place(number: int, calls: Mapping[int, Outcome], which: Calls) -> int:
    return max(calls) - number if which == "last" else number


def _bare(arrangement: Arrangement | None) -> Arrangement | None:
    return None if arrangement is None else replace(arrangement, note="")


def may_fit_batch(shape: Sequence[int], samples: int) -> bool:
    """Return whether an activation of this shape may have rows for each sample, as far as sizes can tell."""
    return len(shape) > 0 and (shape[0] > samples or any(size and size % samples == 0 for size in shape[:2]))


@dataclass
class Pairing:
    """Hold what is known of the rows of all layers for the batches of one loader.

    Attributes:
        data: name of the data of the loader.
        arrangements: which rows of a layer's activation are of which sample, by layer.
        refused: why no row of a layer is of one sample, by layer.
        is_known: whether it was found out, or given up; until then shapes decide.
        is_shuffled: whether the step mixes samples before the network sees them, so that layers are not to blame.
        doubt: why shapes decide, and not an experiment; empty where an experiment decided.
        notes: what else a reader of the report should know.
    """

    data: str = TRAINING
    arrangements: dict[str, Arrangement] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    is_known: bool = False
    is_shuffled: bool = False
    doubt: str = ""
    notes: list[str] = field(default_factory=list)
    _tries: int = 0

    def learn(self, chosen: Mapping[str, Outcome], *, is_shuffled: bool) -> None:
        """Take in what was found of each layer."""
        if self._tries:
            self.notes.append("rows: those of the first batches were taken for one a sample, by their shapes")
        self.is_known = True
        self.is_shuffled = is_shuffled
        self.doubt = ""
        for layer, found in chosen.items():
            if found.arrangement is not None:
                self.arrangements[layer] = found.arrangement
            else:
                self.refused[layer] = MIXED_BY_STEP if is_shuffled else found.reason

    def give_up(self, reason: str) -> None:
        """Leave it to shapes which row is of which sample, because of ``reason``."""
        self.is_known = True
        self.doubt = reason

    def try_again(self, reason: str) -> None:
        """Leave it to shapes until the next batch, since this one told nothing."""
        self._tries += 1
        self.doubt = reason
        self.is_known = self._tries >= _TRIES

    def drop(self, layer: str, reason: str) -> None:
        """Refuse a layer that a later batch shows to be arranged otherwise."""
        self.arrangements.pop(layer, None)
        self.refused[layer] = reason

    def agree(self, gather: Callable[[Any], list[Any]]) -> None:
        """Agree with the other processes, each of which experimented with a batch of its own."""
        own = self.arrangements, self.refused, self.is_known and not self.doubt, self.is_shuffled
        everyone = gather(own)
        if len(everyone) == 1:
            return
        if any(is_found for _, _, is_found, _ in everyone):
            self.is_known, self.doubt = True, ""
        self.is_shuffled = any(is_shuffled for *_, is_shuffled in everyone)
        layers = dict.fromkeys(layer for known, refused, *_ in everyone for layer in (*known, *refused))
        for layer in layers:
            found = [known[layer] for known, *_ in everyone if layer in known]
            reasons = [refused[layer] for _, refused, *_ in everyone if layer in refused]
            if len({replace(one, at=(), of=(0, 0), note="") for one in found}) > 1:
                reasons = ["its rows are arranged otherwise in other processes"]
            if reasons:
                self.drop(layer, reasons[0])
            elif found:
                self.arrangements[layer] = found[0]

    def described(self, beside: Pairing | None, tokens: Mapping[str, Tokens]) -> list[str]:
        """Return notes on everything but the plain case that each layer has one row a sample.

        Args:
            beside: what is known of the batches of another loader; what is the same there is not told again.
            tokens: ``{layer: how its tokens become features}`` of the layers whose tokens are not averaged.
        """
        where = "" if self.data == TRAINING else f" ({self.data})"
        found: list[str] = []
        if self.doubt and (beside is None or beside.doubt != self.doubt):
            found.append(
                f"rows{where}: one a sample is assumed where the first dimension is that of the batch, since "
                f"{self.doubt}"
            )
        texts: dict[str, list[str]] = {}
        for layer, arrangement in self.arrangements.items():
            other = None if beside is None else beside.arrangements.get(layer)
            said = ", ".join(filter(None, [arrangement.described(tokens.get(layer, "mean")), arrangement.note]))
            if said and (other is None or not arrangement.is_like(other)):
                texts.setdefault(said, []).append(layer)
        found += [f"rows{where} of {first_of(layers)}: {said}" for said, layers in texts.items()]
        return found + [note for note in self.notes if beside is None or note not in beside.notes]

    def state_dict(self) -> dict[str, Any]:
        """Return what is known as plain types."""
        known = {layer: found.state_dict() for layer, found in self.arrangements.items()}
        return {
            "data": self.data,
            "arrangements": known,
            "refused": dict(self.refused),
            "is_known": self.is_known,
            "is_shuffled": self.is_shuffled,
            "doubt": self.doubt,
            "notes": list(self.notes),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Pairing:
        """Return what :meth:`state_dict` described."""
        known = {layer: Arrangement.from_state(found) for layer, found in state["arrangements"].items()}
        return cls(**{**state, "arrangements": known, "refused": dict(state["refused"]), "notes": list(state["notes"])})


def notes_of(pairings: Mapping[str, Pairing], tokens: Mapping[str, Tokens]) -> list[str]:
    """Return the notes on the rows of all loaders, each thing once; ``tokens`` as for :meth:`Pairing.described`."""
    training = pairings.get(TRAINING)
    return [
        note
        for data, pairing in pairings.items()
        for note in pairing.described(None if data == TRAINING else training, tokens)
    ]
