"""Graphs, dataclasses and other objects as batches and as arguments of calls; inputs that flatten has copied."""

from __future__ import annotations

import copy
import weakref
from collections import UserDict
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from networks import QUIET, Classifier, loader
from states import differences
from test_replay import by_hand, recorded, refusal, replayed, train_once
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.data import DataLoader

from lightning_probes import LinearProbeCallback, probe
from lightning_probes.network.batches import describe, pick, tensors_in
from lightning_probes.replay.calls import num_bytes


class Storage(MutableMapping[str, Any]):
    """Where a graph of PyTorch Geometric keeps its tensors; it knows the graph, by a reference that has no copy."""

    def __init__(self, parent: Any, items: dict[str, Any]) -> None:
        self.items_by_name = dict(items)
        self.parent = weakref.ref(parent)

    def __getitem__(self, key: str) -> Any:
        return self.items_by_name[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.items_by_name[key] = value

    def __delitem__(self, key: str) -> None:
        del self.items_by_name[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.items_by_name)

    def __len__(self) -> int:
        return len(self.items_by_name)

    def __getstate__(self) -> Any:
        return {"items_by_name": self.items_by_name, "parent": self.parent()}

    def __setstate__(self, state: Any) -> None:
        self.items_by_name = state["items_by_name"]
        self.parent = weakref.ref(state["parent"])


class Graph:
    """Hands out by attribute what is in its storage, as PyTorch Geometric's ``Data`` does."""

    def __init__(self, **items: Any) -> None:
        self.__dict__["_store"] = Storage(self, items)

    def __getattr__(self, name: str) -> Any:
        store = self.__dict__.get("_store", {})
        if name not in store:
            raise AttributeError(name)
        return store[name]

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__["_store"][name] = value

    def to(self, device: Any, non_blocking: bool = False) -> Graph:
        return self


class Plain:
    """Has its tensors as attributes, among others."""

    def __init__(self, **items: Any) -> None:
        self.name = "graph"
        vars(self).update(items)


@dataclass
class Record:
    x: Tensor
    edges: Tensor


@dataclass(frozen=True)
class Whole:
    """Objects in an object."""

    graph: Any
    scales: list[Any]


X = torch.randn(5, 6)
EDGES = torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 2]])


class Convolution(nn.Linear):
    """Adds to each node the mean of what leads to it."""

    def forward(self, data: Any) -> Any:
        data = data if not isinstance(data, UserDict) else SimpleNamespace(**data)
        source, target = data.edges
        x: Tensor = data.x
        data.x = super().forward(x + torch.zeros_like(x).index_add(0, target, x[source]))  # it writes to its argument
        return data


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = Convolution(6, 6), Convolution(6, 6), nn.Linear(6, 3)


def deep(model: Any, data: Any) -> Any:
    return model.head(model.two(model.one(data)).x)


class Nested(nn.Linear):
    def forward(self, whole: Any, *, weights: Any) -> Tensor:  # type: ignore[override]
        return super().forward(whole.graph.x * whole.scales[0] + weights["a"] + whole.scales[1]["b"].x)


GIVEN: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Any]]] = {
    "a graph with a storage": (Net, lambda m: deep(m, Graph(x=X, edges=EDGES, kind="a"))),
    "a graph": (Net, lambda m: deep(m, Plain(x=X, edges=EDGES))),
    "a dataclass": (Net, lambda m: deep(m, Record(X, EDGES))),
    "a namespace": (Net, lambda m: deep(m, SimpleNamespace(x=X, edges=EDGES))),
    "a dict of the user's": (Net, lambda m: deep(m, UserDict(x=X, edges=EDGES))),
    "objects in objects": (
        lambda: nn.Sequential(Nested(6, 3)),
        lambda m: m[0](Whole(Graph(x=X), [2, {"b": Record(X, EDGES)}]), weights=UserDict(a=X + 1)),
    ),
    "a packed sequence": (
        lambda: nn.Sequential(nn.GRU(6, 4)),
        lambda m: m[0](pack_padded_sequence(X[:, :, None] * torch.ones(6), torch.tensor([6, 4, 4, 2, 1]), True))[1],
    ),
}


@pytest.mark.parametrize("kind", GIVEN)
def test_calls_that_were_given_objects_are_run_again(kind: str) -> None:
    make, step = GIVEN[kind]
    torch.manual_seed(0)
    model = make()
    calls = recorded(model, lambda: step(model))
    older, before = copy.deepcopy(model.state_dict()), by_hand(model, step)
    train_once(model, lambda m: sum(x.mean() for x in tensors_in(step(m))))
    after = by_hand(model, step)
    assert differences(before, after) != []
    for _ in range(2):  # nothing that a replay writes to is kept
        assert differences(after, replayed(model, calls)) == []
    assert differences(before, replayed(model, calls, older)) == []


def test_tensors_of_objects_are_copied_once_and_counted() -> None:
    model, data = Net(), Graph(x=X.clone(), edges=EDGES)
    calls = recorded(model, lambda: deep(model, data))
    assert num_bytes(calls) == 5 * 6 * 4 + 2 * 6 * 8
    expected = by_hand(model, lambda m: deep(m, Graph(x=X, edges=EDGES)))
    data.x.detach().zero_()
    data.edges = None
    assert differences(expected, replayed(model, calls)) == []


def test_what_is_computed_in_an_object_is_refused() -> None:
    def step(m: Any) -> Tensor:
        data = m.one(Record(X, EDGES))
        data.x = F.relu(data.x)
        return m.two(data).x  # type: ignore[no-any-return]

    model = Net()
    assert refusal(model, lambda: step(model)).startswith("the input of 'two' is computed from the output of other")


def test_parts_of_a_graph_are_named_by_attribute() -> None:
    for data in (Graph(x=X, y=EDGES, name="a"), Plain(x=X, y=EDGES)):
        assert pick(data, "x", "input") is X
        assert pick([data, 3], "y", "target") is EDGES
        assert list(tensors_in({"a": [data]})) == [X, EDGES]
        told = f"it is {type(data).__name__} {{'x': float32[5, 6], 'y': int64[2, 6]}}; its labels could be target='y'"
        with pytest.raises(LookupError) as caught:
            pick(data, "z", "target")
        assert told in str(caught.value) or told.split(";")[0] in str(caught.value)
    assert describe(Plain(words=["a"])) == "Plain"


# Whole runs


class Nodes(nn.Module):
    """Classifies nodes, and takes a graph or its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Any, edges: Tensor | None = None) -> Tensor:
        x, edges = (x.x, x.edges) if isinstance(x, Graph) else (x, edges)
        assert edges is not None
        for layer in (self.first, self.second):
            x = F.relu(layer(x + torch.zeros_like(x).index_add(0, edges[1], x[edges[0]])))
        return x  # type: ignore[no-any-return]


class Labeller(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Nodes()

    def training_step(self, data: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(data), data.y)

    def validation_step(self, data: Any, batch_idx: int) -> None:
        self.net(data)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-2)


def graphs(count: int, seed: int) -> DataLoader[Any]:
    """Graphs of 40 nodes, the class of each in its features."""
    generator = torch.Generator().manual_seed(seed)
    made: Any = []
    for _ in range(count):
        y = torch.randint(3, (40,), generator=generator)
        x = torch.randn(40, 6, generator=generator) + 2 * F.one_hot(y, 6)
        made.append(Graph(x=x, edges=torch.randint(40, (2, 60), generator=generator), y=y))
    return DataLoader(made, batch_size=None)


def test_graphs_are_probed_while_a_network_is_trained_on_them() -> None:
    seed_everything(0, verbose=False)
    choice: dict[str, Any] = {"num_classes": 3, "input": "x", "target": "y"}
    probes, model, trainer = LinearProbeCallback(**choice), Labeller(), Trainer(**QUIET, max_epochs=1)
    trainer.callbacks.append(probes)  # type: ignore[attr-defined]
    trainer.fit(model, graphs(10, 1), graphs(5, 2))
    assert {row["fitted_on"]["data"] for row in probes.report.rows} == {"train"}
    report = probe(model, graphs(10, 1), graphs(5, 2), **choice, trainer=Trainer(**QUIET))
    for row in report.select(stage="val", metric="error"):
        (same,) = probes.report.select(stage="val", metric="error", layer=row["layer"], epoch=1)
        assert abs(row["value"] - same["value"]) * 200 <= 1.01
    # Without a validation_step, the network is called on the parts of the graph.
    plain = probe(model.net, graphs(10, 1), graphs(5, 2), **choice, trainer=Trainer(**QUIET))
    assert [row["value"] for row in plain.rows] == [row["value"] for row in report.rows]
    assert "Nodes is given edges of the batch too" in plain.notes


# Copies between two modules


IMAGES = torch.randn(4, 3, 6, 6)


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))
        self.head = nn.Linear(80, 2)
        self.gain = nn.Parameter(torch.ones(1))


COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten": lambda z: z.flatten(1),
    "reshape": lambda z: z.reshape(4, 80),
    "contiguous and view": lambda z: z.contiguous().view(4, -1),
    "clone": lambda z: z.clone(memory_format=torch.contiguous_format).flatten(1),
    "detached": lambda z: z.detach().flatten(1),
    "in steps": lambda z: z.flatten(2)[:, :, None].squeeze(2).flatten(1),
}


def laid_out(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_copy_of_an_output_in_another_shape_is_run_again(kind: str, is_frozen: bool) -> None:
    torch.manual_seed(0)
    model = Images()
    model.body.requires_grad_(not is_frozen)

    def step(m: Any) -> Any:
        return m.head(COPIES[kind](m.body(laid_out(IMAGES))))

    calls = recorded(model, lambda: step(model))
    # The images alone are kept, and no output.
    assert num_bytes(calls) == 4 * IMAGES.numel()
    train_once(model, step)
    with torch.no_grad():
        model.body[0].get_parameter("weight").mul_(2)
    assert differences(by_hand(model, step), replayed(model, calls)) == []


class Apart(Classifier):
    """Flattens between two modules what the first puts out, in either layout."""

    def __init__(self, memory_format: torch.memory_format) -> None:
        seed_everything(0, verbose=False)
        super().__init__(nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU()))
        self.head, self.memory_format = nn.Linear(180, 10), memory_format

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x.to(memory_format=self.memory_format)).flatten(1))  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = torch.cat([batch[0]] * 2, dim=1)[:, :1].to(memory_format=self.memory_format)
        return F.cross_entropy(self.head(self.net(x).flatten(1)), batch[1])


def test_a_network_is_fitted_on_training_in_either_layout() -> None:
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        probes = LinearProbeCallback(["net.0", "head"], input=None)
        trainer = Trainer(**QUIET, max_epochs=1, callbacks=[probes])
        trainer.fit(Apart(memory_format), loader(96), loader(64, seed=1))
        assert probes.report.notes == []
        assert {row["fitted_on"]["data"] for row in probes.report.rows} == {"train"}
        found.append([row["value"] for row in probes.report.select(metric="error")])
    assert found[1] == pytest.approx(found[0], abs=2.01 / 64)


@pytest.mark.parametrize(
    "glue",
    [
        lambda m, z: (z * m.gain).flatten(1),  # the same values, as long as the gain is 1
        lambda m, z: z.clamp(min=-1e9).flatten(1),
        lambda m, z: z.contiguous().permute(0, 2, 3, 1).flatten(1),
        lambda m, z: z.flatten(1) + 0,
        lambda m, z: z.flatten(1).mul_(2),
        lambda m, z: z.add_(1).flatten(1),
    ],
)
def test_what_is_computed_is_no_copy(glue: Any) -> None:
    torch.manual_seed(0)
    model = Images()
    reason = refusal(model, lambda: model.head(glue(model, model.body(laid_out(IMAGES)))))
    assert reason.startswith("the input of 'head' is computed from the output of other layers")


def test_equal_constants_are_no_copy() -> None:
    torch.manual_seed(0)
    model = Images()
    nn.init.zeros_(model.body[0].get_parameter("weight"))
    nn.init.zeros_(model.body[0].get_parameter("bias"))

    def step(m: Any) -> Any:
        m.body[0](laid_out(IMAGES))
        return m.head(torch.zeros(4, 80))

    calls = recorded(model, lambda: step(model))
    assert num_bytes(calls) == 4 * (IMAGES.numel() + 4 * 80)
    nn.init.ones_(model.body[0].get_parameter("bias"))
    assert differences(by_hand(model, step), replayed(model, calls)) == []


def test_parts_of_one_operation_are_told_apart() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 10, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.conv(x).chunk(2, dim=1)  # type: ignore[no-any-return]

    model = Images()
    model.body = Halves()  # type: ignore[assignment]

    def step(m: Any) -> Any:
        return m.head(m.body(laid_out(IMAGES))[1].flatten(1))

    calls = recorded(model, lambda: step(model))
    assert differences(by_hand(model, step), replayed(model, calls)) == []


def test_packed_sequences_are_what_they_were() -> None:
    seen: list[PackedSequence] = []

    class Taker(nn.GRU):
        def forward(self, x: Any, state: Any = None) -> Any:
            seen.append(x)
            return super().forward(x, state)

    model = nn.Sequential(Taker(6, 4))
    packed = pack_padded_sequence(torch.randn(3, 5, 6), torch.tensor([2, 5, 1]), True, enforce_sorted=False)
    calls = recorded(model, lambda: model[0](packed))
    replayed(model, calls)
    assert type(seen[1]) is PackedSequence
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
