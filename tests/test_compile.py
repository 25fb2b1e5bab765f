"""Compiled networks: hooks fire in them, and cost no graph break and no compilation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from networks import QUIET, Classifier, images, loader
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_probes import LinearProbeCallback
from lightning_probes.network.hooks import ActivationRecorder
from lightning_probes.network.pooling import Reducer
from lightning_probes.network.torch_internals import Interception, compiled_parts

pytestmark = pytest.mark.compile

WAYS = ["in place", "wrapped", "module in place", "part in place", "parts in one", "by the trainer"]


@pytest.fixture(autouse=True)
def _nothing_is_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Body(nn.Module):
    def __init__(self, use_reentrant: bool | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.use_reentrant = use_reentrant

    def features(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(self.act(self.conv(x)), 2).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        if self.use_reentrant is None:
            return self.features(x)
        return checkpoint(self.features, x, use_reentrant=self.use_reentrant)  # type: ignore[no-any-return]


class Net(nn.Module):
    """With a forward of its own: a Sequential of torch's own modules is never compiled in place."""

    def __init__(self, use_reentrant: bool | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.body = Body(use_reentrant)
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.body(torch.relu(self.norm(self.conv(x))))))  # type: ignore[no-any-return]


class Deep(nn.Module):
    """More layers than have their turn in one step."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64 if i == 0 else 8, 8) for i in range(24)])
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in self.layers:
            x = x + layer(x).tanh() if x.shape[1] == 8 else layer(x)
        return self.head(x)  # type: ignore[no-any-return]


class Quiet(Classifier):
    """What it logs would be compiled with its steps, and once more for each number of values logged."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self(batch[0])


class Loud(Quiet):
    """Logs one value."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


class Compilations(Callback):
    """A backend that counts what it compiles, and that count after each step."""

    def __init__(self, backend: str) -> None:
        self._compile = lookup_backend(backend)
        self.count = 0
        self.after_steps: list[int] = []

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        return self._compile(graph, inputs)

    def on_train_batch_end(self, *_: Any) -> None:
        self.after_steps.append(self.count)

    def on_validation_epoch_end(self, *_: Any) -> None:
        self.after_steps.append(self.count)


def compiled(model: Any, way: str, backend: Any) -> Any:
    """What is given to ``fit``."""
    if way == "by the trainer":
        return torch.compile(model, backend=backend)
    if way == "wrapped":
        model.net = torch.compile(model.net, backend=backend)
    elif way == "in place":
        model.net.compile(backend=backend)
    elif way == "module in place":
        model.compile(backend=backend)
    elif way == "part in place":
        model.net.body.compile(backend=backend)
    elif way == "parts in one":
        model.net.body.compile(backend=backend)
        model.net = torch.compile(model.net, backend=backend)
    return model


class Run:
    """A run and what it left."""

    def __init__(
        self,
        way: str,
        backend: str,
        *probes: LinearProbeCallback,
        make: Callable[[], nn.Module] = Net,
        prepare: Callable[[Any], None] | None = None,
        samples: int = 96,
        kind: type[Classifier] = Quiet,
        epochs: int = 2,
    ) -> None:
        torch.compiler.reset()
        counters.clear()
        seed_everything(0, verbose=False)
        self.model = kind(make())
        self.epochs = epochs
        self.compilations = Compilations(backend)
        given = compiled(self.model, way, self.compilations)
        if prepare is not None:
            prepare(self.model)
        self.fit(given, *probes, samples=samples)

    def fit(self, given: Any, *probes: LinearProbeCallback, samples: int = 96) -> None:
        trainer = Trainer(
            **QUIET, max_epochs=self.epochs, callbacks=[*probes, self.compilations], num_sanity_val_steps=0
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(given, loader(samples), loader(32, seed=1))
        self.said = [str(w.message) for w in caught if "LinearProbeCallback" in str(w.message)]
        self.breaks = dict(counters["graph_break"])
        self.graphs = counters["stats"]["unique_graphs"]
        self.after_steps = self.compilations.after_steps
        self.state = {name: value.clone() for name, value in self.model.state_dict().items()}


def check_same(one: Run, other: Run) -> None:
    """Trained alike, and compiled alike after every step."""
    assert other.after_steps == one.after_steps
    assert other.graphs == one.graphs > 0
    assert other.breaks == one.breaks
    assert one.state.keys() == other.state.keys()
    assert all(torch.equal(value, other.state[name]) for name, value in one.state.items())


def values(probes: LinearProbeCallback, **conditions: Any) -> dict[Any, float]:
    rows = probes.report.select(**conditions)
    assert rows
    return {tuple(row[key] for key in ("layer", "stage", "epoch", "metric")): row["value"] for row in rows}


@pytest.fixture(scope="module")
def eager() -> LinearProbeCallback:
    """After a run without a compiler."""
    probes = LinearProbeCallback("net.**")
    Run("", "eager", probes)
    return probes


@pytest.mark.parametrize(("way", "backend"), [*((way, "aot_eager") for way in WAYS), ("in place", "eager")])
def test_hooks_cost_no_graph_break_and_no_compilation(way: str, backend: str, eager: LinearProbeCallback) -> None:
    probes = LinearProbeCallback("net.**")
    without, watched = Run(way, backend), Run(way, backend, probes)
    check_same(without, watched)
    # One for training, one for validation; each once.
    assert without.after_steps[0] >= 1
    assert without.after_steps[7:] == without.after_steps[7:8] * 7
    if way == "by the trainer":
        # The step is one piece of compiled code: no call of a module can be seen in it.
        assert len(watched.said) == 1
        assert "cross-fitted" in watched.said[0]
        assert {row["layer"] for row in probes.report.rows} == {row["layer"] for row in eager.report.rows}
    else:
        assert watched.said == []
        assert values(probes) == pytest.approx(values(eager), rel=1e-4, abs=1e-4)
        assert {row["fitted_on"]["data"] for row in probes.report.rows} == {"train"}


@pytest.mark.parametrize("way", WAYS)
def test_a_labelled_set_costs_no_graph_break_and_no_compilation(way: str) -> None:
    data = loader(40, seed=2), loader(40, seed=3)
    probes, eager = LinearProbeCallback("net.**", data=data), LinearProbeCallback("net.**", data=data)
    Run("", "aot_eager", eager)
    watched = Run(way, "aot_eager", probes)
    check_same(Run(way, "aot_eager"), watched)
    # Outside of training all of it runs in python, also what the Trainer compiled together with its steps.
    assert watched.said == []
    assert values(probes) == pytest.approx(values(eager), rel=1e-4, abs=1e-4)


def test_compiled_logging_is_compiled_once_more_at_the_first_publication() -> None:
    # Lightning's own: its compiled self.log knows how many values there are.
    without = Run("by the trainer", "eager", kind=Loud, epochs=4)
    watched = Run("by the trainer", "eager", LinearProbeCallback("net.**"), kind=Loud, epochs=4)
    assert without.graphs <= watched.graphs <= without.graphs + 1
    for run in (without, watched):
        assert run.after_steps[-8:] == run.after_steps[-1:] * 8
    assert all(torch.equal(value, watched.state[name]) for name, value in without.state.items())


def test_layers_that_have_their_turn_cost_no_compilation() -> None:
    probes, eager = LinearProbeCallback("net.**"), LinearProbeCallback("net.**")
    watched = Run("in place", "aot_eager", probes, make=Deep)
    check_same(Run("in place", "aot_eager", make=Deep), watched)
    Run("", "aot_eager", eager, make=Deep)
    assert len({row["layer"] for row in probes.report.rows}) == 27
    assert values(probes) == pytest.approx(values(eager), rel=1e-4, abs=1e-4)


def test_a_smaller_last_batch_costs_one_compilation_as_it_does_anyway() -> None:
    without = Run("in place", "aot_eager", samples=90)
    check_same(without, Run("in place", "aot_eager", LinearProbeCallback("net.**"), samples=90))
    assert without.after_steps[5] == 2


def test_two_callbacks_see_the_same_in_one_compiled_network() -> None:
    lag: dict[str, Any] = {"log_metrics": ["lag"]}  # Else layers are trained along in turns, which differ.
    both = [LinearProbeCallback("net.**", **lag), LinearProbeCallback(["net.conv", "net.fc"], name="other", **lag)]
    watched = Run("in place", "aot_eager", *both)
    check_same(Run("in place", "aot_eager"), watched)
    for layer in ("input", "net.conv", "net.fc"):
        assert values(both[0], layer=layer) == pytest.approx(values(both[1], layer=layer), rel=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_in_compiled_code(use_reentrant: bool, eager: LinearProbeCallback) -> None:
    probes = LinearProbeCallback("net.**")
    watched = Run("in place", "aot_eager", probes, make=lambda: Net(use_reentrant))
    check_same(Run("in place", "aot_eager", make=lambda: Net(use_reentrant)), watched)
    assert values(probes) == pytest.approx(values(eager), rel=1e-4, abs=1e-4)


def test_features_are_those_before_an_operation_in_place() -> None:
    net = Net().train()
    recorder = ActivationRecorder(Reducer())
    recorder.attach({"conv": net.body.conv, "act": net.body.act})
    net.compile(backend="aot_eager")
    recorder.start(16)
    net(images(16).tensors[0]).sum().backward()
    features = recorder.stop().features
    assert (features["conv"] < 0).any()
    assert torch.equal(features["conv"].relu(), features["act"])


def test_what_was_compiled_with_probes_knows_later_ones() -> None:
    first = LinearProbeCallback("net.**", fit_samples=0)
    again = LinearProbeCallback("net.**", fit_samples=0)
    run = Run("in place", "aot_eager", first)
    before = run.compilations.count
    run.fit(run.model, again)
    assert run.said == []
    assert run.compilations.count == before
    assert values(first).keys() == values(again).keys()


def called(model: Any) -> None:
    """In training and in validation, before anybody hooks it."""
    x = images(16).tensors[0]
    model(x)
    with torch.no_grad():
        model.eval()(x)
        model.eval()(images(32).tensors[0])
    model.train()


@pytest.mark.parametrize("layers", [None, "net.**"], ids=["default", "named"])
@pytest.mark.parametrize("fit_samples", [None, 0])
def test_code_that_was_compiled_before_is_told_of_once_with_what_to_do(
    layers: str | None, fit_samples: int | None
) -> None:
    probes = LinearProbeCallback(layers, fit_samples=fit_samples)
    run = Run("in place", "eager", probes, prepare=called)
    (warning,) = run.said
    assert "'net.conv', 'net.norm'," in warning
    assert "'net.fc' (it never ran, or in code that was compiled before the probes came: " in warning
    assert "call torch.compiler.reset() before fit" in warning
    # What is run again is not compiled.
    assert ("net.conv" in {row["layer"] for row in probes.report.rows}) == (fit_samples is None)


@pytest.mark.parametrize("layers", [None, "net.**"], ids=["default", "named"])
def test_after_a_reset_it_is_probed_as_any_other(layers: str | None) -> None:
    def called_and_reset(model: Any) -> None:
        called(model)
        torch.compiler.reset()

    runs = []
    for way in ("in place", ""):
        probes = LinearProbeCallback(layers)
        assert Run(way, "eager", probes, prepare=called_and_reset).said == []
        runs.append(values(probes))
    assert runs[0] == pytest.approx(runs[1], rel=1e-4, abs=1e-4)


def test_parts_inside_of_compiled_code_are_found() -> None:
    model = Classifier(Net())
    assert compiled_parts(model) == ([], set())
    model.net.body.compile(backend="eager")  # type: ignore[union-attr]
    parts, inside = compiled_parts(model)
    assert parts == [model.net.body]
    assert inside == {id(module) for module in model.net.body.modules()}  # type: ignore[union-attr]
    net = model.net
    model.net = torch.compile(net, backend="eager")  # type: ignore[assignment]
    parts, inside = compiled_parts(model)
    assert parts == []
    assert inside == {id(module) for module in net.modules()}


def test_calls_are_intercepted_and_let_go_again() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not len(x):
                raise ValueError("nothing")
            return x + 1

    module = Fails()
    module.compile(backend="eager")
    own = module._compiled_call_impl
    seen: list[Any] = []
    interception = Interception(module, lambda *given: seen.append(given), lambda *given: seen.append(given))
    x = torch.ones(2)
    out = module(x)
    with pytest.raises(ValueError, match="nothing"):
        module(torch.ones(0))
    before = [Fails, tuple, dict]
    types = [[type(part) for part in given] for given in seen]
    assert types == [before, [Fails, tuple, Tensor], before, [Fails, tuple, type(None)]]
    assert seen[1][2] is out
    interception.remove()
    assert module._compiled_call_impl is own
