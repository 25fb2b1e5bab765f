"""Small networks whose rows are samples, views, parts, steps or nodes, and what their features are sample by sample.

The reference knows nothing of rows: it gives the network one sample at a time, so that whatever a layer puts out is of
this sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.data import DataLoader

CLASSES = 4
SAMPLES = 320

Reference = Callable[[Any], Any]
"""Turn what a layer put out for one sample into its rows of features, ``(views, features)``."""

CASES: dict[str, Callable[[], Case]] = {}


@dataclass
class Case:
    """Hold a network, its data, and what is expected of its layers.

    Attributes:
        modules: the modules by name.
        step: what the training and validation step do with a batch without labels.
        sample: returns one sample, without its label, for a class and a generator.
        read: ``{layer: reference}`` of the layers that have to be read.
        left_out: ``{layer: part of the reason}`` of the layers that may be left out.
        fallback: ``{layer: reference}`` of the layers that training cannot tell, which are cross-fitted on validation.
        together: how samples become a batch; by default they are stacked.
        options: of the callback.
        validating: the step of validation where it is another one.
        batch_size: of training.
    """

    modules: Mapping[str, Any]
    step: Callable[[Any, Any], Any]
    sample: Callable[[int, torch.Generator], Any]
    read: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    fallback: dict[str, Reference] = field(default_factory=dict)
    together: Callable[[Sequence[Any]], Any] = field(default=lambda samples: stack(samples))
    options: dict[str, Any] = field(default_factory=dict)
    validating: Callable[[Any, Any], Any] | None = None
    batch_size: int = 32
    reads_call: dict[str, int] = field(default_factory=dict)

    def loaders(self) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """Return loaders of training and validation, whose batches differ in size."""
        return self._loader(1, self.batch_size), self._loader(2, 48)

    def _loader(self, seed: int, batch_size: int) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, CLASSES, (SAMPLES,), generator=generator).tolist()
        data = [(self.sample(label, generator), label) for label in labels]
        return DataLoader(data, batch_size, collate_fn=self.collate)  # type: ignore[arg-type]

    def collate(self, samples: Sequence[tuple[Any, int]]) -> dict[str, Any]:
        """Make a batch of samples with labels."""
        return {"x": self.together([x for x, _ in samples]), "y": torch.tensor([y for _, y in samples])}


def stack(samples: Sequence[Any]) -> Any:
    """Stack samples, part by part where they have several."""
    if isinstance(samples[0], Mapping):
        return {key: stack([sample[key] for sample in samples]) for key in samples[0]}
    if isinstance(samples[0], tuple):
        return [stack(parts) for parts in zip(*samples, strict=True)]
    return torch.stack(list(samples))


class Host(LightningModule):
    """Run a case; nothing is trained, so that its features are the same in each epoch."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        for name, module in case.modules.items():
            self.add_module(name, module)
        self.free = nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        found = self.case.step(self, batch["x"])
        return found.float().mean() * 0 + self.free.sum()  # type: ignore[no-any-return]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        (self.case.validating or self.case.step)(self, batch["x"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.free], lr=1e-3)


def case(function: Callable[[], Case]) -> Callable[[], Case]:
    """Put a case into the table under the name of its function."""
    CASES[function.__name__] = function
    return function


# Samples


def vector(size: int = 8, noise: float = 0.5) -> Callable[[int, torch.Generator], Tensor]:
    """Return samples of which the class can be told by the first values, with errors."""

    def sample(label: int, generator: torch.Generator) -> Tensor:
        x = noise * torch.randn(size, generator=generator)
        x[label] += 1.0
        return x

    return sample


def sequence(steps: int, size: int = 8, noise: float = 1.0) -> Callable[[int, torch.Generator], Tensor]:
    """Return sequences ``(steps, size)``, each step of which tells something of the class."""

    def sample(label: int, generator: torch.Generator) -> Tensor:
        x = noise * torch.randn(steps, size, generator=generator)
        x[:, label] += 1.0
        return x

    return sample


def image(side: int = 8, channels: int = 3, noise: float = 1.0) -> Callable[[int, torch.Generator], Tensor]:
    """Return images whose class is the quadrant that is brighter."""

    def sample(label: int, generator: torch.Generator) -> Tensor:
        x = noise * torch.randn(channels, side, side, generator=generator)
        half = side // 2
        x[:, half * (label // 2) : half * (label // 2 + 1), half * (label % 2) : half * (label % 2 + 1)] += 1.0
        return x

    return sample


def clip(frames: int = 4, side: int = 8) -> Callable[[int, torch.Generator], Tensor]:
    """Return clips ``(frames, channels, side, side)`` of images of one class."""
    frame = image(side, noise=1.5)
    return lambda label, generator: torch.stack([frame(label, generator) for _ in range(frames)])


def pair_of(one: Callable[[int, torch.Generator], Tensor]) -> Callable[[int, torch.Generator], tuple[Tensor, Tensor]]:
    """Return pairs of views of the same class."""
    return lambda label, generator: (one(label, generator), one(label, generator))


def with_unlabelled(one: Callable[[int, torch.Generator], Tensor]) -> Callable[[int, torch.Generator], Any]:
    """Return a labelled sample beside one of another class without label."""

    def sample(label: int, generator: torch.Generator) -> dict[str, Tensor]:
        other = int(torch.randint(0, CLASSES, (), generator=generator))
        return {"labelled": one(label, generator), "unlabelled": one(other, generator)}

    return sample


# References


def whole(output: Any) -> Any:
    """One row, all values of which are features."""
    return output.reshape(1, -1)


def rows(output: Any) -> Any:
    """Each row is a view."""
    return output.flatten(1)


def over(*dims: int) -> Reference:
    """One row: the mean over some dimensions."""

    def mean(output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) and not isinstance(output, PackedSequence) else output
        x = x.data if isinstance(x, PackedSequence) else x
        return x.mean(dim=dims).reshape(1, -1)

    return mean


def first_row(output: Any) -> Any:
    """The first row is the sample's."""
    return output[:1].flatten(1)


def last_row(output: Any) -> Any:
    """The last row is the sample's."""
    return output[-1:].flatten(1)


LABELLED: dict[str, Any] = {"input": lambda batch: batch["x"]["labelled"]}


def mlp(size: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(size, 16), nn.ReLU(), nn.Linear(16, CLASSES))


def convolutions(channels: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, CLASSES)
    )


# Plain


@case
def plain_mlp() -> Case:
    return Case({"net": mlp()}, lambda host, x: host.net(x), vector(), {"net.0": whole, "net.1": whole, "net.2": whole})


@case
def plain_convolutions() -> Case:
    read = {"net.0": whole, "net.2": whole, "net.4": whole}
    return Case({"net": convolutions()}, lambda host, x: host.net(x), image(), read)


@case
def words() -> Case:
    def sample(label: int, generator: torch.Generator) -> Tensor:
        likely = 5 * label + torch.randint(0, 5, (12,), generator=generator)
        return torch.where(
            torch.rand(12, generator=generator) < 0.4, likely, torch.randint(0, 20, (12,), generator=generator)
        )

    net = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8))
    return Case({"net": net}, lambda host, x: host.net(x), sample, {"net.0": over(0, 1), "net.1": over(0, 1)})


# Time first


def recurrent(kind: Callable[[int, int], nn.Module], steps: int) -> Case:
    def step(host: Any, x: Tensor) -> Any:
        found, _ = host.net(x.transpose(0, 1))
        return host.head(found[-1])

    modules = {"net": kind(8, 16), "head": nn.Linear(16, CLASSES)}
    return Case(modules, step, sequence(steps), {"net": over(0, 1), "head": whole})


@case
def lstm_time_first() -> Case:
    return recurrent(nn.LSTM, 64)


@case
def gru_time_first() -> Case:
    return recurrent(nn.GRU, 12)


@case
def gru_time_first_square() -> Case:
    return recurrent(nn.GRU, 32)


@case
def lstm_batch_first() -> Case:
    net = nn.LSTM(8, 16, batch_first=True)
    return Case({"net": net}, lambda host, x: host.net(x)[0], sequence(12), {"net": over(0, 1)})


def transformer(steps: int) -> Case:
    net = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2)))
    read = {"net.0": over(0, 1), "net.1": over(0, 1)}
    return Case({"net": net}, lambda host, x: host.net(x.transpose(0, 1)), sequence(steps), read)


@case
def transformer_time_first() -> Case:
    return transformer(10)


@case
def transformer_time_first_square() -> Case:
    return transformer(32)


@case
def time_first_from_the_loader() -> Case:
    return Case(
        {"net": nn.GRU(8, 16)},
        lambda host, x: host.net(x)[0],
        sequence(12),
        {"net": over(0, 1)},
        together=lambda samples: torch.stack(list(samples), dim=1),
    )


# Parts folded into the batch


@case
def frames_folded_by_the_step() -> Case:
    def step(host: Any, x: Tensor) -> Any:
        return host.head(host.frame(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(dim=1))

    modules = {"frame": nn.Sequential(nn.Flatten(), nn.Linear(192, 16)), "head": nn.Linear(16, CLASSES)}
    # The mean is computed outside of any module, so that what comes after it cannot be run again.
    return Case(modules, step, clip(), {"frame.1": over(0)}, fallback={"head": whole})


class Folding(nn.Module):
    """Fold frames into the batch, and average them again."""

    def __init__(self, *, time_first: bool = False) -> None:
        super().__init__()
        self.time_first = time_first
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8 * 64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if self.time_first else x
        frames = self.conv(x.flatten(0, 1)).relu().flatten(1).unflatten(0, x.shape[:2])
        return self.head(frames.mean(dim=0 if self.time_first else 1))  # type: ignore[no-any-return]


@case
def frames_folded_by_the_network() -> Case:
    read = {"net.conv": over(0), "net.head": whole}
    return Case({"net": Folding()}, lambda host, x: host.net(x), clip(), read)


@case
def frames_folded_time_first() -> Case:
    read = {"net.conv": over(0), "net.head": whole}
    return Case({"net": Folding(time_first=True)}, lambda host, x: host.net(x), clip(), read)


@case
def bytes_divided_and_folded() -> Case:
    def sample(label: int, generator: torch.Generator) -> Tensor:
        return (clip()(label, generator) * 20 + 120).clamp(0, 255).to(torch.uint8)

    def step(host: Any, x: Tensor) -> Any:
        return host.head(host.frame((x.float() / 255).flatten(0, 1)).unflatten(0, x.shape[:2]).mean(dim=1))

    modules = {"frame": nn.Sequential(nn.Flatten(), nn.Linear(192, 16)), "head": nn.Linear(16, CLASSES)}
    return Case(modules, step, sample, {"frame.1": over(0)}, fallback={"head": whole})


@case
def black_frames() -> Case:
    def sample(label: int, generator: torch.Generator) -> Tensor:
        frames = clip(5)(label, generator)
        frames[2:4] = 0  # The same in all samples.
        return frames

    read = {"net.conv": over(0), "net.head": whole}
    return Case({"net": Folding()}, lambda host, x: host.net(x), sample, read)


class Windows(nn.Module):
    """Attend within windows of an image whose channels are last, as Swin does."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3, 8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(x.movedim(1, -1))
        windows = x.reshape(len(x), 2, 4, 2, 4, 8).transpose(2, 3)
        tokens = windows.flatten(0, 2).flatten(1, 2)
        tokens, _ = self.attend(tokens, tokens, tokens)
        return self.norm(tokens.reshape(len(x), 64, 8))  # type: ignore[no-any-return]


@case
def windowed_attention() -> Case:
    read = {"net.attend": over(0, 1), "net.norm": over(0, 1)}
    case = Case({"net": Windows()}, lambda host, x: host.net(x), image(), read)
    case.read["net.attend"] = lambda output: output[0].mean(dim=(0, 1)).reshape(1, -1)
    return case


class ByChannel(nn.Module):
    """Give each channel of a series to the same layers, as PatchTST does."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.head = nn.Linear(8 * 8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        patches = x.transpose(1, 2).flatten(0, 1).reshape(8 * len(x), -1, 4)
        return self.head(self.embed(patches).mean(dim=1).reshape(len(x), -1))  # type: ignore[no-any-return]


@case
def channels_folded() -> Case:
    # The mean over channels tells nothing of the class, and is what the report says that it shows.
    read = {"net.embed": over(0, 1), "net.head": whole}
    return Case({"net": ByChannel()}, lambda host, x: host.net(x), sequence(12), read)


# Views and unlabelled samples


def together(*order: str, read: Reference) -> Case:
    """Give the network labelled and unlabelled samples in one batch."""

    def step(host: Any, x: Any) -> Any:
        return host.net(torch.cat([x[part] for part in order]))

    layers = {"net.0": read, "net.2": read}
    return Case({"net": mlp()}, step, with_unlabelled(vector()), layers, options=LABELLED)


@case
def labelled_and_unlabelled() -> Case:
    return together("labelled", "unlabelled", read=first_row)


@case
def unlabelled_and_labelled() -> Case:
    return together("unlabelled", "labelled", read=last_row)


@case
def views_stacked_sample_by_sample() -> Case:
    def step(host: Any, x: Any) -> Any:
        return host.net(torch.stack(x, 1).flatten(0, 1))

    return Case({"net": mlp()}, step, pair_of(vector()), {"net.0": rows, "net.2": rows})


@case
def two_augmentations() -> Case:
    def step(host: Any, x: Tensor) -> Any:
        return host.net(torch.cat([x + 0.1, x.flip(1) * 0.9]))

    return Case({"net": mlp()}, step, vector(), {"net.0": rows, "net.2": rows})


@case
def three_views_from_the_loader() -> Case:
    def sample(label: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        return tuple(vector()(label, generator) for _ in range(3))

    return Case({"net": mlp()}, lambda host, x: host.net(torch.cat(x)), sample, {"net.0": rows, "net.2": rows})


def one_after_the_other(*order: str) -> Case:
    """Call the network on labelled samples and on unlabelled ones in the same step."""

    def step(host: Any, x: Any) -> Any:
        first, second = (host.net(x[part]) for part in order)
        return first + second

    case = Case({"net": mlp()}, step, with_unlabelled(vector()), {"net.0": whole, "net.2": whole}, options=LABELLED)
    case.reads_call = dict.fromkeys(case.read, order.index("labelled"))
    return case


@case
def labelled_call_first() -> Case:
    return one_after_the_other("labelled", "unlabelled")


@case
def unlabelled_call_first() -> Case:
    return one_after_the_other("unlabelled", "labelled")


@case
def crops_of_two_sizes() -> Case:
    def step(host: Any, x: Tensor) -> Any:
        return host.net(x) + host.net(x[:, :, 2:6, 2:6])

    case = Case({"net": convolutions()}, step, image(), {"net.0": whole, "net.2": whole, "net.4": whole})
    case.reads_call = dict.fromkeys(case.read, 0)
    return case


@case
def a_queue_beside_the_batch() -> Case:
    def step(host: Any, x: Tensor) -> Any:
        return host.net(torch.cat([x, host.memory.queue]))

    memory = nn.Module()
    memory.register_buffer("queue", torch.randn(16, 8, generator=torch.Generator().manual_seed(0)))
    return Case({"net": mlp(), "memory": memory}, step, vector(), {"net.0": first_row, "net.2": first_row})


# Graphs and packed sequences


def graphs(sizes: Callable[[torch.Generator], int]) -> Callable[[int, torch.Generator], Tensor]:
    return lambda label, generator: sequence(sizes(generator))(label, generator)


def nodes_together(samples: Sequence[Tensor]) -> dict[str, Tensor]:
    index = torch.arange(len(samples)).repeat_interleave(torch.tensor([len(x) for x in samples]))
    return {"nodes": torch.cat(list(samples)), "batch": index}


class Graphs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.node = nn.Linear(8, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        sums = x.new_zeros(int(index.max()) + 1, 16).index_add_(0, index, self.node(x).relu())
        return self.head(sums)  # type: ignore[no-any-return]


def graph_case(sizes: Callable[[torch.Generator], int]) -> Case:
    return Case(
        {"net": Graphs()},
        lambda host, x: host.net(x["nodes"], x["batch"]),
        graphs(sizes),
        {"net.node": over(0), "net.head": whole},
        together=nodes_together,
        options={"input": lambda batch: batch["x"]["nodes"]},
    )


@case
def equal_graphs() -> Case:
    return graph_case(lambda generator: 5)


@case
def ragged_graphs() -> Case:
    return graph_case(lambda generator: int(torch.randint(2, 8, (), generator=generator)))


@case
def graphs_equal_only_at_first() -> Case:
    drawn = 0

    def sizes(generator: torch.Generator) -> int:
        nonlocal drawn
        drawn += 1
        return 4 if drawn <= 64 else 4 + drawn % 3

    def together(samples: Sequence[Tensor]) -> dict[str, Tensor]:
        return {"nodes": torch.cat(list(samples)), "sizes": torch.tensor([len(x) for x in samples])}

    def step(host: Any, x: Any) -> Any:
        index = torch.arange(len(x["sizes"])).repeat_interleave(x["sizes"])
        return host.net(x["nodes"], index)

    return Case(
        {"net": Graphs()},
        step,
        graphs(sizes),
        {"net.head": whole},
        {"net.node": ""},
        together=together,
        options={"input": lambda batch: batch["x"]["nodes"]},
    )


def packed(lengths: Callable[[torch.Generator], int], *, is_sorted: bool = False) -> Case:
    def together(samples: Sequence[Tensor]) -> dict[str, Tensor]:
        padded = nn.utils.rnn.pad_sequence(list(samples), batch_first=True)
        return {"steps": padded, "lengths": torch.tensor([len(x) for x in samples])}

    def step(host: Any, x: Any) -> Any:
        given = pack_padded_sequence(x["steps"], x["lengths"], batch_first=True, enforce_sorted=is_sorted)
        _, state = host.net(given)
        return host.head(state[-1])

    return Case(
        {"net": nn.GRU(8, 16), "head": nn.Linear(16, CLASSES)},
        step,
        graphs(lengths),
        {"net": over(0), "head": whole},
        together=together,
        options={"input": lambda batch: batch["x"]["steps"]},
    )


@case
def packed_equal_lengths() -> Case:
    return packed(lambda generator: 6, is_sorted=True)


@case
def packed_ragged_lengths() -> Case:
    return packed(lambda generator: int(torch.randint(2, 10, (), generator=generator)))


# Dimensions of features


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.space = nn.Linear(8, 8)
        self.features = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.space(x.transpose(1, 3)).transpose(1, 3)
        return x + self.features(x)  # type: ignore[no-any-return]


def grid_last(side: int) -> Reference:
    """One row: (1, height, width, channels) pooled to a grid, channel by channel."""

    def pooled(output: Any) -> Any:
        return F.adaptive_avg_pool2d(output.movedim(-1, 1), side).reshape(1, -1)

    return pooled


@case
def channels_last_mixer() -> Case:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(3, 6)
            self.blocks = nn.Sequential(Mixer(), Mixer())

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(self.stem(x.movedim(1, -1)))  # type: ignore[no-any-return]

    # 8 * 8 * 6 values are pooled to the largest grid of at most 64 values: 3 * 3 * 6.
    read = {"net.stem": grid_last(3), "net.blocks.0": grid_last(3), "net.blocks.1": grid_last(3)}
    return Case({"net": Net()}, lambda host, x: host.net(x), image(), read, options={"max_features": 64})


class MambaLike(nn.Module):
    """Tokens go through a convolution over tokens, and leave a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1, groups=16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv(self.up(x).transpose(1, 2)).transpose(1, 2)
        return x + self.down(F.silu(inner))  # type: ignore[no-any-return]


@case
def mamba_like() -> Case:
    net = nn.Sequential(MambaLike(), MambaLike())
    return Case({"net": net}, lambda host, x: host.net(x), sequence(10), {"net.0": over(1), "net.1": over(1)})


class ConformerLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.norm1 = nn.BatchNorm1d(8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.norm1(self.conv(x.transpose(1, 2))).relu().transpose(1, 2))  # type: ignore[no-any-return]


@case
def conformer_like() -> Case:
    net = nn.Sequential(ConformerLike(), ConformerLike())
    return Case({"net": net}, lambda host, x: host.net(x), sequence(10), {"net.0": over(1), "net.1": over(1)})


@case
def one_dimensional_pooling() -> Case:
    net = nn.Sequential(nn.Conv1d(8, 12, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(12, CLASSES))
    read = {"net.0": whole, "net.1": whole, "net.3": whole}
    return Case({"net": net}, lambda host, x: host.net(x.transpose(1, 2)), sequence(10), read)


# What a layer is


@case
def spectral_norm() -> Case:
    net = nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 16)), nn.ReLU(), nn.Linear(16, CLASSES))
    return Case({"net": net}, lambda host, x: host.net(x), vector(), {"net.0": whole, "net.1": whole, "net.2": whole})


@case
def weight_norm() -> Case:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), parametrizations.weight_norm(nn.Linear(16, CLASSES)))
    return Case({"net": net}, lambda host, x: host.net(x), vector(), {"net.0": whole, "net.1": whole, "net.2": whole})


@case
def dead_layer() -> Case:
    net = mlp()
    with torch.no_grad():
        net.get_parameter("0.bias").fill_(-100.0)
    return Case({"net": net}, lambda host, x: host.net(x), vector(), {"net.0": whole, "net.1": whole, "net.2": whole})


@case
def layers_that_start_at_zero() -> Case:
    net = mlp()
    for parameter in net[2].parameters():
        nn.init.zeros_(parameter)
    return Case({"net": net}, lambda host, x: host.net(x), vector(), {"net.0": whole, "net.2": whole})


@case
def folded_layers_that_start_at_zero() -> Case:
    net = Folding()
    nn.init.zeros_(net.head.weight)
    nn.init.zeros_(net.conv.weight)
    return Case({"net": net}, lambda host, x: host.net(x), clip(), {"net.conv": over(0), "net.head": whole})


class Table(nn.Module):
    """Put out the same whatever the batch holds."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.expand(len(x), *self.weight.shape)


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.positions = nn.Embedding(10, 8)
        self.table = Table(10, 8)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1]).expand(len(x), -1)
        return self.out(self.embed(x) + self.positions(places) + self.table(x))  # type: ignore[no-any-return]


@case
def tables_and_positions() -> Case:
    left_out = {"net.positions": "does not depend", "net.table": "does not depend"}
    read = {"net.embed": over(1), "net.out": over(1)}
    return Case({"net": Positions()}, lambda host, x: host.net(x), sequence(10), read, left_out)


@case
def layer_drop() -> Case:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
            self.generator = torch.Generator().manual_seed(0)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                if not self.training or torch.rand((), generator=self.generator) < 0.5:
                    x = layer(x)
            return x

    read = {f"net.layers.{i}": whole for i in range(6)}
    return Case({"net": Dropping()}, lambda host, x: host.net(x), vector(), read)


# What cannot be told, or only elsewhere


@case
def gan() -> Case:
    def step(host: Any, x: Tensor) -> Any:
        fake = host.generator(torch.randn(len(x), 8))
        return host.net(fake.detach()) + host.net(x)

    modules = {"generator": nn.Sequential(nn.Linear(8, 8)), "net": mlp()}
    case = Case(modules, step, vector(), {"net.0": whole, "net.2": whole}, {"generator.0": "does not depend"})
    case.reads_call = {"net.0": 1, "net.2": 1}
    return case


@case
def attention_over_the_batch() -> Case:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.mixed = nn.MultiheadAttention(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.mixed(x, x, x)[0]  # type: ignore[no-any-return]

    left_out = {"net.mixed": "several samples"}
    return Case({"net": Mixing()}, lambda host, x: host.net(x), vector(), {"net.first": whole}, left_out)


@case
def experts() -> Case:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(8, 2)
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
            self.head = nn.Linear(8, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            choice = self.router(x).argmax(dim=1)
            found = torch.zeros_like(x)
            for i, expert in enumerate(self.experts):
                found[choice == i] = expert(x[choice == i])
            return self.head(found)  # type: ignore[no-any-return]

    left_out = {"net.experts.0": "", "net.experts.1": ""}
    return Case(
        {"net": Experts()}, lambda host, x: host.net(x), vector(), {"net.router": whole, "net.head": whole}, left_out
    )


@case
def prompt_tokens() -> Case:
    class Prompted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prompt = nn.Parameter(torch.randn(3, 8))
            self.embed = nn.Linear(8, 8)
            self.mix = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            prompts = self.prompt.expand(len(x), -1, -1)
            return self.mix(torch.cat([prompts, self.embed(x)], dim=1))  # type: ignore[no-any-return]

    return Case(
        {"net": Prompted()}, lambda host, x: host.net(x), sequence(10), {"net.embed": over(1), "net.mix": over(1)}
    )


def only_in_training(change: Callable[[Tensor], Tensor]) -> Case:
    """Give the network in training what the step made of the samples, and in validation the samples as they are."""
    return Case(
        {"net": mlp()},
        lambda host, x: host.net(change(x)),
        vector(),
        fallback={"net.0": whole, "net.2": whole},
        validating=lambda host, x: host.net(x),
    )


@case
def mixed_samples() -> Case:
    return only_in_training(lambda x: 0.6 * x + 0.4 * x[torch.randperm(len(x))])


@case
def shuffled_samples() -> Case:
    return only_in_training(lambda x: x[torch.randperm(len(x))])


@case
def random_in_eval() -> Case:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 16)
            self.second = nn.Linear(16, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x) + 1e-3 * torch.randn(len(x), 16))  # type: ignore[no-any-return]

    return Case({"net": Noisy()}, lambda host, x: host.net(x), vector(), {"net.first": whole, "net.second": whole})


@case
def padded_by_the_step() -> Case:
    def step(host: Any, x: Tensor) -> Any:
        return host.net(F.pad(x, (1, 1, 1, 1)))

    return Case({"net": convolutions()}, step, image(), {"net.0": whole, "net.4": whole})


@case
def validation_folds_otherwise() -> Case:
    def step(host: Any, x: Tensor) -> Any:
        return host.net(x.flatten(0, 1))

    def validating(host: Any, x: Tensor) -> Any:
        return host.net(x.transpose(0, 1).flatten(0, 1))

    case = Case({"net": mlp()}, step, sequence(3), {"net.0": rows, "net.2": rows}, validating=validating)
    return case
