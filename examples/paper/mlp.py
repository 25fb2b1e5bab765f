"""The deep multilayer perceptron of E3, E4, E7 and E8: equal layers, perhaps a bridge over the first half."""

from __future__ import annotations

from torch import Tensor, nn

SLOPE = 0.3
"""Of LeakyReLU below 0."""


class DeepMLP(nn.Module):
    """``(samples, ...)`` to a list of logits ``(samples, classes)``: of the last head, then of those below.

    Args:
        depth: layers, each linear with LeakyReLU.
        bridge: add what the first layer gives to the input of the layer ``depth // 2``.
        heads_every: a head after every so many layers, beside the last; 0: none.
        width: units of each layer.
        inputs: values of a sample.
        classes: logits.
        gain: of the weights, orthogonal matrices times ``gain``, biases 0. At 1.35 activations and gradients keep their
            size from layer to layer.
    """

    def __init__(
        self,
        depth: int,
        *,
        bridge: bool = False,
        heads_every: int = 0,
        width: int = 128,
        inputs: int = 784,
        classes: int = 10,
        gain: float = 1.3,
    ) -> None:
        super().__init__()
        self.bridge = bridge
        sizes = [inputs, *[width] * depth]
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(a, width), nn.LeakyReLU(SLOPE)) for a in sizes[:-1])
        places = range(heads_every, depth, heads_every) if heads_every else ()
        self.heads = nn.ModuleDict({str(place): nn.Linear(width, classes) for place in places})
        self.head = nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.orthogonal_(module.weight, gain)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Logits of the last head, then those of the others."""
        x = first = self.layers[0](x.flatten(1))
        others = []
        for i, layer in enumerate(list(self.layers)[1:], start=1):
            x = layer(x + first if self.bridge and i == len(self.layers) // 2 else x)
            if str(i + 1) in self.heads:
                others.append(self.heads[str(i + 1)](x))
        return [self.head(x), *others]
