"""Decide how the tokens of each layer become its features, and tell where what the user said has no effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_probes.network.arrangement import Arrangement
from lightning_probes.options import Tokens, first_of


class TokenChoice:
    """Hold how tokens of layers become features, as the user said.

    Args:
        given: one way for all layers, or ways by layer pattern, of which the later ones count.

    Attributes:
        kinds: ``{layer: way}`` of the layers whose tokens are not averaged.
    """

    def __init__(self, given: Tokens | Mapping[str, Tokens]) -> None:
        self.kinds: dict[str, Tokens] = {}
        self._given = given
        self._layers: list[str] = []
        self._named: dict[str, list[str]] = {}

    @property
    def patterns(self) -> list[str]:
        """Return the layer patterns that the user wrote; none if there is one way for all layers."""
        return list(self._given) if isinstance(self._given, Mapping) else []

    def attach(self, layers: Sequence[str], named: Mapping[str, list[str]]) -> None:
        """Learn which layers there are.

        Args:
            layers: the layers that are probed.
            named: ``{pattern: the probed layers that it names}`` of :attr:`patterns`.
        """
        self._layers, self._named = list(layers), dict(named)
        if isinstance(self._given, Mapping):
            ways = {layer: way for pattern, way in self._given.items() for layer in self._named.get(pattern, ())}
        else:
            ways = dict.fromkeys(layers, self._given)
        self.kinds = {layer: way for layer, way in ways.items() if way != "mean"}

    def differing(self, saved: Mapping[str, Tokens]) -> str:
        """Say of which layer of a checkpoint tokens became features in another way; empty if of none.

        Args:
            saved: ``{layer: way}`` of the layers of the checkpoint that have tokens.
        """
        for layer, there in saved.items():
            here = self.kinds.get(layer, "mean")
            if layer in self._layers and there != here:
                return f"tokens of {layer!r} is {there!r} in the checkpoint and {here!r} here"
        return ""

    def load(self, saved: Mapping[str, Tokens]) -> None:
        """Take the ways of a checkpoint where no network has shown which layers there are."""
        if not self._layers:
            self.kinds = {layer: way for layer, way in saved.items() if way != "mean"}

    def check(self, has_tokens: Mapping[str, bool], shapes: Mapping[str, Sequence[int]]) -> None:
        """Raise if the first batch shows that what the user said has no effect.

        Args:
            has_tokens: ``{layer: whether its activation has tokens}`` of the layers of which that is known.
            shapes: ``{layer: shape of its activation}``, for the message.

        Raises:
            ValueError: no probed layer has tokens, or none that a pattern names has; the message has their shapes.
        """
        named = self._named if isinstance(self._given, Mapping) else {self._given: list(self.kinds)}
        for what, layers in named.items():
            # A layer that ran and of which it is not known may turn out to have tokens.
            known = [has_tokens.get(layer) for layer in layers if layer in has_tokens or layer in shapes]
            if known and not any(found is not False for found in known):
                found = first_of([f"{layer} {tuple(shapes[layer])}" for layer in layers if layer in shapes])
                raise ValueError(
                    f"tokens: {what!r} has no effect, since none of the probed layers that it is for has tokens, "
                    f"(batch, ..., width); found {found}; layout={{layer pattern: 'tokens'}} says which have"
                )

    def notes(self, has_tokens: Mapping[str, bool], arrangements: Mapping[str, Arrangement]) -> list[str]:
        """Return what a reader of the report should know of layers whose tokens are not averaged.

        Args:
            has_tokens: as for :meth:`check`.
            arrangements: which rows are of which sample, by layer.
        """
        notes: list[str] = []
        parts = {x for x, known in arrangements.items() if known.kind == "indexed" or known.is_mean}
        for way in dict.fromkeys(self.kinds.values()):
            own = [layer for layer, kind in self.kinds.items() if kind == way]
            if each := [layer for layer in own if layer in parts and has_tokens.get(layer)]:
                notes.append(
                    f"tokens={way!r}: of {first_of(each)} it is that of each part of a sample, then their mean"
                )
            if whole := [layer for layer in own if layer in parts and has_tokens.get(layer) is False]:
                notes.append(
                    f"tokens={way!r} is not about the parts of a sample of {first_of(whole)}: their mean is taken"
                )
            known = [has_tokens[layer] for layer in own if layer in has_tokens]
            if known and not any(known):
                notes.append(f"tokens={way!r} has no effect: {first_of(own)} have no tokens")
        return notes
