"""Recorded calls, run again: the frozen network's features, and no trace of it in the network."""

from __future__ import annotations

import copy
import pickle
import random
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from networks import Classifier, ViT, convnet
from states import differences, rng_states
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_probes.network.batches import tensors_in
from lightning_probes.replay.calls import Call, CannotRunAgainError, View, num_bytes
from lightning_probes.replay.frozen import frozen
from lightning_probes.replay.recorder import CallRecorder
from lightning_probes.replay.replayer import Replay
from lightning_probes.replay.reservoir import Budget

Outputs = dict[str, list[Tensor]]


def leaves(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if name and not list(module.children())}


def recorded(model: nn.Module, step: Callable[[], Any], layers: Mapping[str, nn.Module] | None = None) -> list[Call]:
    recorder = CallRecorder(Budget(8192, 2**30))
    recorder.attach(model, leaves(model) if layers is None else layers)
    recorder.start()
    step()
    try:
        return recorder.stop().calls
    finally:
        recorder.detach()


def refusal(model: nn.Module, step: Callable[[], Any]) -> str:
    """Return why a step, or some of it, cannot be run again."""
    recorder = CallRecorder(Budget(8192, 2**30))
    recorder.attach(model, leaves(model))
    recorder.start()
    step()
    try:
        found = recorder.stop()
        assert found.reason
        assert found.calls
        return found.reason
    except CannotRunAgainError as error:
        return str(error)
    finally:
        recorder.detach()


def outputs(model: nn.Module, run: Callable[[], Any]) -> Outputs:
    """What each layer of the lowest level put out."""
    seen: Outputs = {}

    def hook(name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            seen.setdefault(name, []).append(next(tensors_in(output)).detach().clone())

        return keep

    hooks = [module.register_forward_hook(hook(name)) for name, module in leaves(model).items()]
    try:
        run()
    finally:
        for handle in hooks:
            handle.remove()
    return seen


def replayed(model: nn.Module, calls: list[Call], weights: Mapping[str, Tensor] | None = None) -> Outputs:
    with frozen(model):
        return outputs(model, lambda: Replay(model, device="cpu", weights=weights).run(calls))


def by_hand(model: nn.Module, step: Callable[[Any], Any]) -> Outputs:
    """The features of the step in eval mode, on a copy that may be spoilt."""
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        return outputs(twin, lambda: step(twin))


def train_once(model: nn.Module, step: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss = step(model)
    loss.square().mean().backward()
    optimizer.step()


class Glue(nn.Module):
    """Functional glue between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.drop, self.fc2 = nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.drop(self.fc1(x))))  # type: ignore[no-any-return]


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, batch: dict[str, Any], *, scale: Tensor, mode: str = "plus") -> dict[str, Any]:
        assert mode == "minus"
        return {"deep": [self.fc(batch["views"][0] - scale * batch["views"][1])]}


@dataclass
class Encoded:
    name: str
    z: Tensor


class Pair(nn.Module):
    """Two networks that a step calls one after the other, with a layer without a probe in between."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"a": nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))})
        self.between = nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(0.3))
        self.head = nn.Linear(8, 3)


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Encoded:
        return Encoded("z", self.fc(x))


class Ended(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = Wrapped(), nn.Linear(8, 3)


X, IMAGES = torch.randn(5, 6), torch.randn(5, 1, 8, 8)
WORLDS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "conv_net_with_batchnorm_and_dropout": (convnet, lambda m: m(IMAGES)),
    "transformer": (lambda: ViT(width=32, depth=2, size=8, channels=1), lambda m: m(IMAGES)),
    "called_through_the_root": (lambda: Classifier(convnet()), lambda m: m(IMAGES)),
    "called_below_the_root": (lambda: Classifier(convnet()), lambda m: m.net(IMAGES)),
    "functional_glue_in_forward": (Glue, lambda m: m(X)),
    "two_networks_linked": (Pair, lambda m: m.head(m.between(m.encoder["a"](X)))),
    "linked_through_detach": (Pair, lambda m: m.head(m.encoder["a"](X).detach())),
    "linked_through_a_dataclass": (Ended, lambda m: m.last(m.first(X).z)),
    "nested_inputs": (
        lambda: nn.Sequential(Keywords()),
        lambda m: m[0]({"views": [X, X + 1]}, scale=torch.ones(1), mode="minus")["deep"][0],
    ),
    "a_module_called_twice": (lambda: nn.Sequential(nn.Linear(6, 6)), lambda m: m[0](m[0](X)) + m[0](-X)),
    "a_recurrent_network": (lambda: nn.Sequential(nn.LSTM(6, 4)), lambda m: m[0](X[:, None])[0]),
}


@pytest.mark.parametrize("world", WORLDS)
def test_replayed_calls_give_the_features_of_the_frozen_network_as_it_is_then(world: str) -> None:
    make, step = WORLDS[world]
    model = make().train()
    calls = recorded(model, lambda: step(model))
    for _ in range(2):
        expected = by_hand(model, step)
        found = replayed(model, calls)
        assert differences(expected, found) == []
        train_once(model, step)
    assert differences(expected, replayed(model, calls)) != []


@pytest.mark.parametrize("world", WORLDS)
def test_older_weights_give_the_older_features_and_leave_no_trace(world: str) -> None:
    make, step = WORLDS[world]
    model = make().train()
    calls = recorded(model, lambda: step(model))
    older, expected = copy.deepcopy(model.state_dict()), by_hand(model, step)
    train_once(model, step)
    before = copy.deepcopy(model.state_dict())
    assert differences(expected, replayed(model, calls, older)) == []
    assert differences(before, model.state_dict()) == []


LOGGED: list[Any] = []


class Restless(LightningModule):
    """Everything that a forward can leave behind."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.slow = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)
        self.register_buffer("written", torch.zeros(8, 6), persistent=False)
        self.register_buffer("replaced", torch.zeros(8, 6))
        self.calls, self.plain, self.seen = 0, torch.zeros(6), [0]

    def log(self, *args: Any, **kwargs: Any) -> None:
        LOGGED.append(args)

    def forward(self, x: Tensor) -> Tensor:
        F.batch_norm(x, self.norm.running_mean, self.norm.running_var, training=True)
        z: Tensor = self.norm(self.fc(x))
        self.written[: len(x)] = z.detach()  # type: ignore[operator]
        self.replaced = torch.cat([z.detach(), self.replaced])[:8]  # type: ignore[has-type]
        self.slow.weight.data.mul_(0.9).add_(self.fc.weight.data, alpha=0.1)
        self.slow.bias.data = self.slow.bias.data * 0.9
        self.calls += 1
        self.plain += 1
        self.seen.append(self.calls)
        self.log("noise", torch.rand(()) + random.random() + np.random.rand())
        self.last = out = torch.as_tensor(self.slow(z))
        return out


def test_a_forward_that_leaves_traces_leaves_none() -> None:
    model = Restless()
    model.norm.eval()
    LOGGED.clear()
    calls = recorded(model, lambda: model(X))
    del model.last

    assert len(LOGGED) == 1

    def state() -> Any:
        flags = [(name, part.training) for name, part in model.named_modules()]
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        kept = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        ids = {name: (id(tensor), tensor.data_ptr()) for name, tensor in tensors.items()}
        own = model.calls, model.plain.tolist(), list(model.seen), sorted(vars(model))
        return kept, ids, flags, own, rng_states()

    older = copy.deepcopy(model.state_dict())
    before = state()
    for weights in (None, older):
        with frozen(model):
            replay = Replay(model, device="cpu", weights=weights)
            for _ in range(3):
                replay.run(calls)
        assert differences(before, state()) == []
    assert differences(older, model.state_dict()) == []
    assert len(LOGGED) == 1
    model.seen.append(7)
    assert model.seen[-1] == 7


def test_flags_attributes_and_random_states_come_back_after_an_exception() -> None:
    class Own(nn.Sequential):
        def train(self, mode: bool = True) -> Own:
            raise AssertionError("the user's train() was called")

    net = convnet()
    model = Own(net, nn.Linear(10, 2))
    net.eval()
    net[8].train()
    flags, before = [m.training for m in model.modules()], rng_states()

    def fail() -> None:
        with frozen(model):
            assert not any(m.training for m in model.modules())
            assert not torch.is_grad_enabled()
            assert torch.rand(1) + np.random.rand() + random.random() >= 0
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [m.training for m in model.modules()] == flags
    assert differences(before, rng_states()) == []
    assert torch.is_grad_enabled()


def test_hooks_added_while_frozen_stay_and_those_removed_are_gone() -> None:
    model = convnet()
    fired: list[str] = []
    gone = model[0].register_forward_hook(lambda *_: fired.append("gone"))
    with frozen(model):
        gone.remove()
        model[0].register_forward_hook(lambda *_: fired.append("stays"))
    model(IMAGES)
    assert fired == ["stays"]


def test_tied_weights_and_a_module_under_two_names_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
            self.out.weight = self.embed.weight
            self.again = self.norm = nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.again(self.norm(self.embed(x))))  # type: ignore[no-any-return]

    model = Tied()
    calls = recorded(model, lambda: model(X))
    older, expected = copy.deepcopy(model.state_dict()), by_hand(model, lambda m: m(X))
    parameter, buffer = model.embed.weight, model.norm.running_mean
    train_once(model, lambda m: m(X))
    before = copy.deepcopy(model.state_dict())
    assert differences(expected, replayed(model, calls, older)) == []
    assert differences(before, model.state_dict()) == []
    assert model.out.weight is model.embed.weight is parameter
    assert model.norm.running_mean is buffer
    assert model.again is model.norm
    with pytest.raises(KeyError, match=r"weights: no 'embed\.weight'"):
        Replay(model, device="cpu", weights={})


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.loss = nn.Linear(6, 6), nn.Linear(6, 3), nn.MSELoss()


def functional_glue(m: Any) -> None:
    m.head(F.relu(m.body(X)))


def in_place_glue(m: Any) -> None:
    m.head(m.body(X).relu_())


def in_place_view_glue(m: Any) -> None:
    z = m.body(X).detach()
    z[1:] += 1
    m.head(z[:2])


def in_place_without_gradient(m: Any) -> None:
    z = m.body(X).detach()
    z += 1
    m.head(z)


def of_weights(m: Any) -> None:
    m.head(m.body.weight * 2)


@pytest.mark.parametrize(
    "step", [functional_glue, in_place_glue, in_place_view_glue, in_place_without_gradient, of_weights]
)
def test_what_is_computed_outside_of_modules_is_refused_with_the_reason(step: Callable[[nn.Module], None]) -> None:
    model = Steps()
    reason = refusal(model, lambda: step(model))
    assert reason.startswith("the input of 'head' is computed")
    assert reason.endswith("outside of any module; move that code into a forward()")


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "detached and sliced": lambda z: z.detach()[1:],
    "flattened": lambda z: z.view(3, 10).flatten().view(5, 6),
    "every other sample": lambda z: z[::2],
    "turned over twice": lambda z: z.T.T,
    "the last samples of a part": lambda z: z[2:][1:],
    "expanded": lambda z: z[:1].expand(4, -1),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views_between_modules_are_followed(view: str) -> None:
    model = Steps()
    calls = recorded(model, lambda: model.head(VIEWS[view](model.body(X))))
    train_once(model, lambda m: m.head(m.body(X)))
    expected = by_hand(model, lambda m: m.head(VIEWS[view](m.body(X))))
    assert differences(expected, replayed(model, calls)) == []


def test_view_of_an_output_that_is_laid_out_differently_is_refused() -> None:
    model = Steps()
    calls = recorded(model, lambda: model.head(model.body(X)[1:]))
    model.body.register_forward_hook(lambda module, args, output: output.T.contiguous().T)
    with pytest.raises(CannotRunAgainError, match="laid out differently"), frozen(model):
        Replay(model, device="cpu").run(calls)


def test_glue_that_no_probed_layer_depends_on_is_no_obstacle() -> None:
    model = Steps()
    calls = recorded(model, lambda: model.loss(model.body(X).relu(), X), {"body": model.body})
    assert [call.module for call in calls] == [model.body]


def test_an_object_that_cannot_be_copied_is_refused() -> None:
    class Taker(nn.Linear):
        def forward(self, x: Any) -> Tensor:
            return super().forward(x.z)

    class Shared:
        def __init__(self) -> None:
            self.x = X

        def __deepcopy__(self, memo: Any) -> Any:
            return self

    model = nn.Sequential(Taker(6, 2))
    for held in (nn.Identity(), torch.Generator(), X.numpy(), threading.Lock(), (i for i in range(3)), Shared()):
        batch = SimpleNamespace(z=X, held=[held])
        reason = refusal(model, lambda batch=batch: model[0](batch))  # type: ignore[misc]
        assert reason.startswith("an argument of '0' is a SimpleNamespace, which cannot be copied: ")
    large = SimpleNamespace(z=X, more=[[i] for i in range(20_000)])
    assert "cannot be copied" in refusal(model, lambda: model[0](large))
    assert "no module that holds a probed layer" in refusal(model, lambda: None)


def test_parameters_and_buffers_given_as_arguments_are_those_of_the_day() -> None:
    model = Steps()
    model.register_buffer("queue", torch.randn(5, 6))

    def step(m: Any) -> Tensor:
        m.head(m.queue)
        return m.head(m.body.weight)  # type: ignore[no-any-return]

    calls = recorded(model, lambda: step(model))
    older, expected = copy.deepcopy(model.state_dict()), by_hand(model, step)
    train_once(model, step)
    with torch.no_grad():
        model.get_buffer("queue").add_(1)
    assert differences(by_hand(model, step), replayed(model, calls)) == []
    assert differences(expected, replayed(model, calls, older)) == []
    assert num_bytes(calls) == 0


def test_activation_checkpointing_records_each_call_once() -> None:
    model = Steps()

    def step(reentrant: bool) -> None:
        x = X.clone().requires_grad_()
        z = checkpoint(model.body, x, use_reentrant=reentrant)
        z.sum().backward()

    for reentrant in (False, True):
        calls = recorded(model, lambda r=reentrant: step(r))  # type: ignore[misc]
        assert [call.module for call in calls] == [model.body]
        assert differences({"body": [model.body(X).detach()]}, replayed(model, calls)) == []


def test_what_is_kept_is_safe_from_in_place_changes_of_input_and_of_replay() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 2))
    x = X.clone()

    def step() -> None:
        model[1](x)
        model(x)
        x.fill_(7)

    calls = recorded(model, step)
    first = replayed(model, calls)
    assert torch.equal(first["1"][0], model[1](X))
    assert torch.equal(first["1"][1], model[1](X.relu()))
    assert differences(first, replayed(model, calls)) == []


def test_an_input_of_several_calls_is_kept_once_and_without_a_graph() -> None:
    model = Steps()
    x = X.clone().requires_grad_()
    calls = recorded(model, lambda: (model.body(x), model.head(x)))
    assert num_bytes(calls) == 4 * X.numel()
    assert calls[0].args[0] is calls[1].args[0]
    assert not calls[0].args[0].requires_grad


def test_recording_draws_nothing_and_detaching_leaves_nothing() -> None:
    model = Classifier(convnet())
    recorder = CallRecorder(Budget(8192, 2**30))
    recorder.attach(model, leaves(model))
    model.eval()
    before = rng_states()
    recorder.start()
    model(IMAGES)
    assert differences(before, rng_states()) == []
    recorder.detach()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._forward_hooks_always_called


def test_a_forward_that_raises_leaves_the_recorder_usable() -> None:
    model = Classifier(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2)))
    recorder = CallRecorder(Budget(8192, 2**30))
    recorder.attach(model, leaves(model))
    recorder.start()
    with pytest.raises(RuntimeError):
        model(torch.randn(5, 4))
    model(X)
    calls = recorder.stop().calls
    assert [call.module for call in calls] == [model]
    recorder.start()
    with pytest.raises(RuntimeError):
        model(torch.randn(5, 4))
    recorder.start()
    model.net(X)
    calls = recorder.stop().calls
    assert [call.module for call in calls] == [model.net]


def test_a_root_that_stands_for_the_step_is_not_recorded() -> None:
    """As Lightning does it under DDP, where the class's own forward stays behind as an attribute."""
    model = Classifier(convnet())

    def redirected(step: Callable[[], Any]) -> list[Call]:
        original = model.forward

        def stand_in(batch: Tensor) -> Any:
            model.forward = original  # type: ignore[method-assign]
            return step()

        model.forward = stand_in  # type: ignore[method-assign, assignment]
        return recorded(model, lambda: model(IMAGES))

    for _ in range(2):
        assert [call.module for call in redirected(lambda: model(IMAGES))] == [model]
        assert [call.module for call in redirected(lambda: model.net(IMAGES))] == [model.net]
    calls = recorded(model, lambda: model(IMAGES))
    assert differences(by_hand(model, lambda m: m.net(IMAGES)), replayed(model, calls)) == []


def test_copies_of_a_model_record_nothing_and_it_can_be_pickled() -> None:
    model = Steps()
    recorder = CallRecorder(Budget(8192, 2**30))
    recorder.attach(model, leaves(model))
    recorder.start()
    copy.deepcopy(model).body(X)
    pickle.loads(pickle.dumps(model)).body(X)
    with pytest.raises(CannotRunAgainError):
        recorder.stop()


@pytest.mark.parametrize("way", ["wrapped", "in place"])
def test_a_compiled_network_is_run_again_eagerly(way: str) -> None:
    net = convnet().train()
    if way == "in place":
        net.compile(backend="eager")
    model = Classifier(net if way == "in place" else torch.compile(net, backend="eager"))  # type: ignore[arg-type]
    calls = recorded(model, lambda: model(IMAGES))
    expected = by_hand(nn.ModuleDict({"net": net}), lambda m: m["net"](IMAGES))
    found = replayed(model, calls)
    assert differences(list(expected.values()), list(found.values())) == []
    model(IMAGES)


class Odd(nn.Module):
    """Takes a function, and holds what a forward may write to in odd places."""

    one: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.many: list[Any] = [0] * 2000
        self.draws = np.random.RandomState(3)
        self.register_buffer("one", torch.zeros(2))
        self.same = self.one

    def forward(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        self.many.append(x)
        self.same += self.draws.rand()
        return function(self.linear(x) + self.one.sum())


def double(x: Tensor) -> Tensor:
    return 2 * x


def test_odd_states_come_back_and_a_function_is_an_argument() -> None:
    odd: Any = Odd()
    model, x = nn.Sequential(odd), torch.randn(3, 4)
    calls = recorded(model, lambda: odd(x, double))
    known = len(odd.many), odd.draws.get_state()[2], odd.one.clone()
    first, second = (replayed(model, calls)["0.linear"] for _ in range(2))
    assert differences(first, second) == []
    assert len(odd.many) == known[0]
    assert odd.draws.get_state()[2] == known[1]
    assert torch.equal(odd.one, known[2])
    assert odd.same is odd.one


def test_an_output_read_as_another_type_is_refused() -> None:
    model = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Flatten(0)})
    reason = refusal(model, lambda: model["two"](model["one"](torch.zeros(2, 4)).detach().view(torch.int32)))
    assert reason.startswith("the input of 'two' is computed")
    held = torch.zeros(4)
    assert View.of(held.view(torch.int32), held) is None


def test_an_output_that_is_its_input_is_no_computation() -> None:
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    calls = recorded(model, lambda: model[1](model[0](x)[:, :]))
    assert differences(replayed(model, calls)["1"], [model[1](x).detach()]) == []
