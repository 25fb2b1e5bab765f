"""Read which tokens of a batch count, and bring each mask to the lengths of the layers that it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from typing import Any

from torch import Tensor, nn

from lightning_probes.network.batches import describe, pick
from lightning_probes.network.layers import clean, match_layers
from lightning_probes.options import ATTENTION_MASK, Where, first_of

_STRIDED = (nn.Conv1d, nn.Conv2d, nn.AvgPool1d, nn.AvgPool2d, nn.MaxPool1d, nn.MaxPool2d, nn.LPPool1d, nn.LPPool2d)


@dataclass(frozen=True)
class _Place:
    """Locate a mask in a batch, and say whether batches may lack it."""

    where: Where
    may_lack: bool = False


@dataclass
class _Uses:
    """Remember what a reader of the report should know of the masks, by layer in the order of the calls.

    Attributes:
        misfits: length of a mask and the number of tokens that it does not fit, of the first batch where that was so.
        strided: length of a mask and the number of tokens that it was brought to, of the first batch likewise.
        decoding: layers of a decoder whose mask is one of their own.
        withheld: layers of a decoder that the encoder's mask was kept from.
        applied: layers of which a mask left tokens out.
    """

    misfits: dict[str, tuple[int, int]] = field(default_factory=dict)
    strided: dict[str, tuple[int, int]] = field(default_factory=dict)
    decoding: dict[str, None] = field(default_factory=dict)
    withheld: dict[str, None] = field(default_factory=dict)
    applied: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Masks:
    """Hold the masks of one batch.

    Attributes:
        reader: the reader of the masks, which knows the layers that each belongs to.
        tensors: ``{index of the place: (batch, tokens)}``, true for the tokens that count.
    """

    reader: MaskReader
    tensors: Mapping[int, Tensor]

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the masks."""
        return sum(mask.numel() for mask in self.tensors.values())

    def copied(self, copy: Callable[[Tensor], Tensor]) -> Masks:
        """Return these masks with a copy of each tensor."""
        return Masks(self.reader, {place: copy(mask) for place, mask in self.tensors.items()})

    def of(self, layer: str, tokens: int, *, is_repeated: bool = True) -> Tensor | None:
        """Return which tokens of a layer count, ``(batch, tokens)``; ``None`` if all do, or no mask fits.

        Args:
            layer: name of the layer.
            tokens: number of tokens of each row that the layer puts out.
            is_repeated: whether rows come batch after batch, so that the mask can be repeated for them.
        """
        return self.reader.fit(layer, self.tensors, tokens, is_repeated=is_repeated)


class MaskReader:
    """Read the masks of batches; raise on a mistake in the first batch, before training, but never in a later one.

    A mask that is given for all layers is taken for the encoder's in a network with an encoder and a decoder beside it:
    it is kept from the decoder's layers, which get the mask ``decoder_...`` where the batch has one.

    A mask fits a layer with as many tokens. A longer one is brought to the layer's length where both the length is a
    multiple of it and strided modules of the network explain the factor; a token then counts if any of the places that
    it is made of counts. Any other mask is not applied, which a note says.

    Args:
        token_mask: where in a batch the mask is; or for some layers each, by pattern; ``None`` if it is nowhere.
    """

    def __init__(self, token_mask: Where | Mapping[str, Where] | None) -> None:
        self._token_mask = token_mask
        self._places: list[_Place] = []
        self._place_of: dict[str, int] = {}
        self._decoding: set[str] = set()
        self._factors: set[int] = set()
        self._uses = _Uses()

    def attach(self, model: nn.Module, layers: Mapping[str, nn.Module], raw: str) -> None:
        """Find out which mask belongs to which layer.

        Args:
            model: the network.
            layers: its probed modules by layer.
            raw: name of the raw input among the layers.

        Raises:
            ValueError: a pattern matches nothing.
        """
        self._places, self._place_of, self._decoding, self._uses = [], {}, set(), _Uses()
        self._factors = set(accumulate(_strides(model), mul)) - {1}
        given = self._token_mask
        if isinstance(given, Mapping):
            for pattern, where in given.items():
                named = {} if pattern == raw else match_layers(model, pattern, "token_mask")
                matched = set(named.values())
                found = [raw] if pattern == raw else [x for x, module in layers.items() if module in matched]
                self._places.append(_Place(where))
                self._place_of |= dict.fromkeys(found, len(self._places) - 1)
        elif given is not None:
            decoders = _decoders(model)
            self._places.append(_Place(given, may_lack=given == ATTENTION_MASK))
            self._place_of = dict.fromkeys([raw, *layers], 0)
            self._decoding = {layer for layer, module in layers.items() if module in decoders}
            if isinstance(given, str):
                self._places.append(_Place(f"decoder_{given}", may_lack=True))
                self._place_of |= dict.fromkeys(self._decoding, 1)
            else:
                self._place_of = {x: place for x, place in self._place_of.items() if x not in self._decoding}

    def is_applied(self, layer: str) -> bool:
        """Return whether a mask has left tokens of a layer out."""
        return layer in self._uses.applied

    @property
    def notes(self) -> list[str]:
        """Return what a reader of the report should know of masks that were not simply applied."""
        uses, notes = self._uses, list[str]()
        for (length, tokens), layers in _by_lengths(uses.misfits):
            notes.append(f"token_mask of {length:,} not applied to {first_of(layers)} of {tokens:,} tokens")
        for (length, tokens), layers in _by_lengths(uses.strided):
            notes.append(
                f"token_mask of {length:,} brought to the {tokens:,} tokens of {first_of(layers)}: a token counts "
                f"if any of its {length // tokens:,} places does"
            )
        if uses.decoding:
            where = self._places[1].where
            notes.append(f"token_mask: {first_of([*uses.decoding])} of the decoder have the mask {where!r}")
        if uses.withheld:
            notes.append(
                f"token_mask not applied to {first_of([*uses.withheld])}: it is taken for the encoder's; "
                "token_mask={layer pattern: place} gives the decoder one"
            )
        return notes

    def read(self, batch: Any, samples: int, *, is_first: bool) -> Masks | None:
        """Return the masks of a batch; ``None`` if it has none.

        Args:
            batch: the batch.
            samples: number of labels of the batch.
            is_first: whether a mask that is missing where the user said is a mistake.

        Raises:
            LookupError, TypeError, ValueError: the first batch has no usable mask where the user said.
        """
        found: dict[int, Tensor] = {}
        for i in sorted(set(self._place_of.values())):
            try:
                found[i] = pick_mask(batch, self._places[i].where, samples)
            except Exception:  # A user's function may raise anything.
                if is_first and not self._places[i].may_lack:
                    raise
        return Masks(self, found) if found else None

    def fit(self, layer: str, masks: Mapping[int, Tensor], tokens: int, *, is_repeated: bool = True) -> Tensor | None:
        """Return the mask of a layer, as :meth:`Masks.of` does, and remember what the notes say of it."""
        mask, uses = masks.get(self._place_of.get(layer, -1)), self._uses
        if tokens == 1:  # There is nothing to leave out.
            return None
        if mask is None:
            if layer in self._decoding and masks:
                uses.withheld[layer] = None
            return None
        if layer in self._decoding:
            uses.decoding[layer] = None
        length = mask.shape[1]
        if length == tokens and is_repeated:
            uses.applied.add(layer)
            return mask
        if not is_repeated or not tokens or length % tokens or length // tokens not in self._factors:
            uses.misfits.setdefault(layer, (length, tokens))
            return None
        uses.applied.add(layer)
        uses.strided.setdefault(layer, (length, tokens))
        return mask.view(len(mask), tokens, length // tokens).any(dim=2)


def pick_mask(batch: Any, where: Where, samples: int) -> Tensor:
    """Return which tokens of each sample count: ``(samples, tokens)``, true where the mask in ``batch`` is not 0.

    Raises:
        LookupError: the batch has no mask there.
        TypeError, ValueError: the mask is no tensor, or has another shape.
    """
    mask = pick(batch, where, "token_mask")
    if not isinstance(mask, Tensor):
        raise TypeError(f"token_mask: expected a tensor (batch, tokens), found {type(mask).__name__}")
    if mask.is_nested or mask.dim() != 2 or len(mask) != samples:
        raise ValueError(
            f"token_mask: expected (batch, tokens) with a row for each of the {samples} labels, found {describe(mask)}"
        )
    return mask.detach() != 0


def _by_lengths(uses: Mapping[str, tuple[int, int]]) -> list[tuple[tuple[int, int], list[str]]]:
    return [(lengths, [x for x, own in uses.items() if own == lengths]) for lengths in dict.fromkeys(uses.values())]


def _strides(model: nn.Module) -> Iterable[int]:
    """Yield the strides along the first spatial dimension, which is that of time, in the order of the modules."""
    for module in model.modules():
        if isinstance(module, _STRIDED):
            stride: Any = module.stride
            yield stride[0] if isinstance(stride, tuple) else stride


def _decoders(model: nn.Module) -> set[nn.Module]:
    """Return the modules named as decoders that have an encoder beside them, and all modules below them."""
    found: set[nn.Module] = set()
    for module in model.modules():
        children = {clean(name).lower(): child for name, child in module.named_children()}
        if any(name.endswith("encoder") for name in children):
            decoders = [child for name, child in children.items() if name.endswith("decoder")]
            found |= {below for decoder in decoders for below in decoder.modules()}
    return found
