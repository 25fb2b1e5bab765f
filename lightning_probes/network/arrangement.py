"""Arrange the rows of an activation by sample: views of the batch one after the other, each row beside its target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_probes.network.pooling import Reducer, assumed_axes, mean_by_sample, nested_features
from lightning_probes.options import Axes, Tokens

Kind = Literal["rows", "blocks", "consecutive", "indexed", "packed"]


class ContradictionError(ValueError):
    """Signal that an activation cannot be arranged as the first batch showed, so that its layer was misunderstood."""


@dataclass(frozen=True)
class Arrangement:
    """Say which rows of an activation are of which sample.

    Attributes:
        kind: ``rows``: one row a sample, in the order of the batch. ``blocks``: one or more blocks of one row a sample
            each, and perhaps other rows between them. ``consecutive``: the same number of rows for each sample, one
            sample after the other. ``indexed``: as many rows for each sample as the batch says, such as the nodes of a
            graph. ``packed``: the steps of a packed sequence.
        dim: dimension of the activation that holds the rows, 0 or 1.
        each: number of rows of a sample; 1 where that is not fixed.
        at: for ``blocks`` the first row of each block; for ``consecutive`` which of a sample's rows count, or all if
            empty.
        of: number of rows and of samples when blocks were found; blocks move with them.
        is_mean: whether the rows of a sample are averaged; else each is a view with the sample's target.
        calls: which calls of the layer in a step are arranged so, counted from 0; any if empty.
        note: what a reader of the report should know about how this was found; empty if it is plain.
    """

    kind: Kind = "rows"
    dim: int = 0
    each: int = 1
    at: tuple[int, ...] = ()
    of: tuple[int, int] = (0, 0)
    is_mean: bool = False
    calls: tuple[int, ...] = ()
    note: str = ""

    @property
    def is_as_it_is(self) -> bool:
        """Return whether features of the rows are features of samples without being joined."""
        return self.kind == "rows" or (self.kind == "blocks" and not self.is_mean)

    @property
    def is_batch_after_batch(self) -> bool:
        """Return whether the rows come batch after batch, so that a mask of the batch can be repeated for them."""
        return self.kind in ("rows", "blocks")

    @property
    def rows_in_a_sample(self) -> int:
        """Return how many rows of an activation a sample has, of those that count; 1 where that is not fixed."""
        return (len(self.at) or self.each) if self.kind in ("blocks", "consecutive") else 1

    @property
    def rows_of_sample(self) -> int:
        """Return how many rows of features a sample has in the end."""
        return 1 if self.is_mean else self.rows_in_a_sample

    def samples_of(self, activation: Tensor | PackedSequence, index: Tensor | None = None) -> int:
        """Return the number of samples that an activation has the rows of.

        Args:
            activation: what the layer put out.
            index: sample of each row, for ``indexed``.

        Raises:
            ValueError: there is no ``index`` where one is needed.
        """
        if isinstance(activation, PackedSequence):
            return int(activation.batch_sizes[0])
        if self.kind == "indexed":
            if index is None:
                raise ValueError("index: expected the sample of each row, (rows,), since samples differ in their rows")
            return int(index.max()) + 1
        rows = activation.shape[self.dim]
        if self.kind == "blocks":
            return rows * self.of[1] // self.of[0]
        return rows // self.each

    def rows(self, activation: Tensor | PackedSequence, samples: int, index: Tensor | None = None) -> Tensor:
        """Return an activation with its rows in dimension 0, without those that are of no sample of the batch.

        Args:
            activation: what the layer put out.
            samples: number of samples of the batch.
            index: sample of each row, for ``indexed``.

        Raises:
            ContradictionError: the activation has another number of rows than this arrangement means.
            ValueError: the blocks of this batch cannot be located.
        """
        if isinstance(activation, PackedSequence):
            if self.kind != "packed":
                raise ContradictionError("it puts out a packed sequence, which it did not in the first batch")
            return activation.data
        if self.kind == "packed" or activation.dim() <= self.dim:
            raise ContradictionError(
                f"it has another kind of output, {list(activation.shape)}, than in the first batch"
            )
        x = activation.movedim(self.dim, 0) if self.dim else activation
        if self.kind == "blocks":
            blocks = [x[first : first + samples] for first in self._blocks(len(x), samples)]
            return blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        expected = len(index) if self.kind == "indexed" and index is not None else self.each * samples
        if len(x) != expected:
            raise ContradictionError(
                f"dimension {self.dim} of its output {list(activation.shape)} has {len(x)} entries, where the first "
                f"batch promised {expected}"
            )
        return x

    def _blocks(self, rows: int, samples: int) -> list[int]:
        known_rows, known_samples = self.of
        if rows * known_samples == known_rows * samples and all(first % known_samples == 0 for first in self.at):
            return [first // known_samples * samples for first in self.at]
        if (self.at == (0,) and rows >= samples) or (rows, samples) == self.of:
            return list(self.at)
        raise ValueError(
            f"where its labelled rows are was found with {known_rows} rows and {known_samples} labels, and is unknown "
            f"with {rows} rows and {samples}"
        )

    def join(
        self, features: Tensor, samples: int, index: Tensor | None = None, packed: PackedSequence | None = None
    ) -> Tensor:
        """Return features of samples, view after view, ``(views * samples, features)``.

        Args:
            features: of each row that :meth:`rows` returned, ``(rows, features)``.
            samples: number of samples of the batch.
            index: sample of each row, for ``indexed``.
            packed: what the layer put out, for ``packed``.
        """
        if self.kind == "packed" and packed is not None:
            index = index_of(packed)
        if self.kind in ("packed", "indexed") and index is not None:
            return mean_by_sample(features, index, samples)
        if self.kind == "blocks":
            return features.view(-1, samples, features.shape[1]).mean(dim=0) if self.is_mean else features
        if self.kind == "consecutive":
            each = features.view(samples, self.each, features.shape[1])
            each = each[:, list(self.at)] if self.at else each
            return each.mean(dim=1) if self.is_mean else each.transpose(0, 1).flatten(0, 1)
        return features

    def described(self, tokens: Tokens = "mean") -> str:
        """Say in a few words which rows are of a sample; empty for one row a sample.

        Args:
            tokens: how the tokens of the layer become features.
        """
        count = self.rows_in_a_sample
        if self.kind == "blocks":
            rows, samples = self.of
            rest = rows - count * samples
            others = f" ({rest} other rows of {rows} belong to no label)" * (rest > 0)
            if count == 1:
                ends = {0: "the first rows of a batch", rows - samples: "the last rows of a batch"}
                return ends.get(self.at[0], f"the rows of a batch from row {self.at[0]} on") + others
            return (f"mean of {count} parts" if self.is_mean else f"{count} views") + f", batch after batch{others}"
        if self.kind == "consecutive":
            some = f"{count} of {self.each}" if count < self.each else f"{count}"
            return f"mean of {some} parts" if self.is_mean else f"{some} views of a sample after one another"
        if self.kind == "indexed":
            return "mean over the rows of each sample in the batch's index"
        if self.kind == "packed":
            return "steps of packed sequences" if tokens != "mean" else "mean over the steps of each packed sequence"
        return "time first" if self.dim else ""

    def is_like(self, other: Arrangement) -> bool:
        """Return whether another arrangement is this one for a batch of another size."""
        same = ("kind", "dim", "each", "is_mean")
        places = [(first == 0, first + one.of[1] == one.of[0]) for one in (self, other) for first in one.at[:1]]
        return all(getattr(self, name) == getattr(other, name) for name in same) and len(set(places)) < 2

    def state_dict(self) -> dict[str, Any]:
        """Return the arrangement as plain types."""
        return {**asdict(self), "at": list(self.at), "of": list(self.of), "calls": list(self.calls)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Arrangement:
        """Return the arrangement that :meth:`state_dict` described."""
        found: dict[str, Any] = {x: tuple(value) if isinstance(value, list) else value for x, value in state.items()}
        return cls(**found)


PLAIN = Arrangement()
"""Arrange one row a sample in the first dimension."""


def by_layout(layout: str, shape: Sequence[int], samples: int) -> Arrangement | None:
    """Return what the user's ``time_first``, ``parts`` or ``views`` means; ``None`` if it has no effect.

    Args:
        layout: what the user wrote.
        shape: shape of the layer's output.
        samples: number of samples of the batch.
    """
    if layout == "time_first":
        return Arrangement("rows", 1) if len(shape) > 1 and shape[1] == samples else None
    if not shape or shape[0] <= samples or shape[0] % samples:
        return None
    each = shape[0] // samples
    if layout == "parts":
        return Arrangement("consecutive", each=each, is_mean=True)
    return Arrangement("blocks", each=each, at=tuple(range(0, shape[0], samples)), of=(shape[0], samples))


def values_of(output: Tensor | PackedSequence) -> Tensor:
    """Return the values of an output, which are the data of a packed sequence."""
    return output.data if isinstance(output, PackedSequence) else output


def index_of(packed: PackedSequence) -> Tensor:
    """Return the sample of each row of a packed sequence's data, without waiting for its device."""
    # Step t has the batch_sizes[t] longest sequences; torch keeps these sizes on the host.
    lengths = packed.batch_sizes
    steps = torch.arange(len(lengths)).repeat_interleave(lengths)
    place = (torch.arange(len(steps)) - (lengths.cumsum(0) - lengths)[steps]).to(packed.data.device)
    return place if packed.sorted_indices is None else packed.sorted_indices[place]


def packed_ends(packed: PackedSequence, tokens: Tokens) -> Tensor:
    """Return the first or last step of each sample of a packed sequence, ``(samples, ...)``, as a copy."""
    # Step t has the batch_sizes[t] longest sequences; torch keeps these sizes on the host.
    sizes = packed.batch_sizes
    places = torch.arange(int(sizes[0]))
    if tokens == "last":
        last = (sizes.unsqueeze(0) > places.unsqueeze(1)).sum(dim=1) - 1
        places = (sizes.cumsum(0) - sizes)[last] + places
    places = places.to(packed.data.device)
    return packed.data.detach()[places if packed.unsorted_indices is None else places[packed.unsorted_indices]]


@dataclass(frozen=True)
class LayerReduction:
    """Make features of what a layer puts out, as the layer's probe was given them.

    Attributes:
        layer: name of the layer.
        reducer: reduces activations; it holds the layer's subset or projection if one was drawn.
        axes: which dimension of an activation holds features, by the number of its dimensions.
        tokens: how tokens become features: ``mean``, ``first`` or ``last``.
        arrangement: which rows of an activation are of which sample.
        has_positions: whether labels are of positions, so that features are those at each position.
    """

    layer: str
    reducer: Reducer
    axes: Mapping[int, Axes]
    tokens: Tokens
    arrangement: Arrangement
    has_positions: bool = False

    def __call__(
        self, activation: Tensor | PackedSequence, mask: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """Reduce an activation to features.

        Args:
            activation: what the layer put out, ``(batch, ...)``: a floating-point tensor, also a nested one, or a
                packed sequence. Where the layer has time first or several rows a sample, that is undone.
            mask: ``(batch, tokens)``, 0 for the tokens to leave out; only for an activation ``(batch, tokens, width)``.
            index: sample of each row, ``(rows,)``, where samples differ in their rows, as the nodes of graphs do.

        Returns:
            Features ``(batch, features)``, detached, in float32, or in float64 if the activation is. Views of a sample
            have a row each, view after view. Of labels of positions ``(batch, positions ..., features)``.

        Raises:
            ValueError: ``mask`` does not fit the activation, or ``index`` is missing.
            OtherSizeError: the activation has another number of values than when a subset or projection was drawn.
        """
        packed = activation if isinstance(activation, PackedSequence) else None
        if packed is None and activation.is_nested:  # type: ignore[union-attr]
            activation = nested_features(activation, self.tokens)  # type: ignore[arg-type]
        samples = self.arrangement.samples_of(activation, index)
        rows = self.arrangement.rows(activation, samples, index)
        if packed is not None and self.tokens != "mean":
            rows = packed_ends(packed, self.tokens)
        axes = self.axes.get(rows.dim()) or assumed_axes(rows.dim())
        if mask is not None:
            if rows.dim() != 3 or axes != "tokens" or not self.arrangement.is_batch_after_batch:
                raise ValueError(f"mask: {self.layer} has no tokens (batch, tokens, width) that one could leave out")
            if mask.shape != (samples, rows.shape[1]):
                raise ValueError(
                    f"mask: expected {(samples, rows.shape[1])}, (batch, tokens) of {self.layer}, found "
                    f"{tuple(mask.shape)}"
                )
            mask = mask != 0
        if self.has_positions:
            rows = rows.movedim(1, -1) if axes == "channels" else rows
            return self.reducer(self.layer, rows.flatten(0, -2)).view(*rows.shape[:-1], -1)
        features = self.reducer(self.layer, rows, axes=axes, mask=mask, tokens=self.tokens)
        if packed is not None and self.tokens != "mean":
            return features
        return self.arrangement.join(features, samples, index, packed)
