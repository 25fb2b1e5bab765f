"""The pause is explained: progress while probes are fitted, what is kept and what it took, and no bar is harmed."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from networks import QUIET, Classifier, loader, mlp
from terminal import COLUMNS, run_in_terminal
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from lightning_probes import LinearProbeCallback, probe
from lightning_probes.training import estimate, refit
from lightning_probes.training.estimate import seconds_to_fit

BARS: list[Any] = ["TQDMProgressBar", "RichProgressBar"]

SCRIPT = """
import sys

import torch
from lightning.pytorch import Trainer, callbacks
from networks import QUIET, Classifier, loader, mlp

from lightning_probes import LinearProbeCallback, probe

torch.set_num_threads(1)
for name in ("TQDMProgressBar", "RichProgressBar"):
    print(f"begin {name}")
    bars = [getattr(callbacks, name)()]
    quiet = QUIET | {"enable_progress_bar": True}
    trainer = Trainer(max_epochs=2, callbacks=[probes := LinearProbeCallback(), *bars], **quiet)
    model = Classifier(mlp(width=128, depth=3))
    trainer.fit(model, loader(600, 50), loader(100, 50))
    share = 100 * probes.report.cost["share"]
    print(f"cost {probes.report.cost['seconds']:.1f} {share:.{0 if share >= 10 else 1}f}")
    probe(model, loader(600, 50), loader(100, 50), trainer=Trainer(callbacks=bars, **quiet))
    print(f"end {name}")
"""


@pytest.fixture(scope="module")
def screens(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    pytest.importorskip("rich")
    script = tmp_path_factory.mktemp("terminal") / "train.py"
    script.write_text(SCRIPT)
    return run_in_terminal(script)


def of_run(bar: str, screen: list[str]) -> list[str]:
    """The rows between ``begin`` and ``end`` of the run with this bar."""
    begin, end = f"begin {bar}", f"end {bar}"
    after = screen[screen.index(begin) + 1 :] if begin in screen else []
    return after[: after.index(end)] if end in after else after


def paragraph(rows: list[str], begin: str) -> str:
    """The line that begins like this, wherever the terminal has wrapped it."""
    (at,) = [i for i, row in enumerate(rows) if row.startswith(begin)]
    text = rows[at]
    while len(rows[at]) == COLUMNS:
        at += 1
        text += rows[at]
    return text


@pytest.mark.slow
@pytest.mark.parametrize("bar", BARS)
def test_terminal_shows_which_batch_and_layer_the_fit_is_at(bar: str, screens: list[list[str]]) -> None:
    shown = list(dict.fromkeys(row for screen in screens for row in of_run(bar, screen) if "Fitting" in row))
    # A bar and two times, and nothing else in its row.
    line = r"(Fitting probes(?: at start)?), (batch|layer) (\d+) of (\d+)\W+[━╸╺█▏▎▍▌▋▊▉ \d%|]+ \W*\d+:\d\d.*"
    found = [re.fullmatch(line, row) for row in shown]
    assert all(found), shown
    steps = [match.groups() for match in found if match is not None]
    for title in ("Fitting probes", "Fitting probes at start"):
        for name, total, least in (("batch", "12", 1), ("layer", "8", 4)):
            seen = {int(i) for *what, i, n in steps if what == [title, name] and n == total}
            assert len(seen) >= least, (title, name, shown)
    assert not any("Fitting" in row for row in screens[-1])


@pytest.mark.slow
@pytest.mark.parametrize("bar", BARS)
def test_lines_at_start_and_end_stand_alone_and_agree_with_the_report(bar: str, screens: list[list[str]]) -> None:
    rows = of_run(bar, screens[-1])
    assert all(row.startswith("LinearProbeCallback: ") for row in rows if "LinearProbeCallback" in row)
    (cost,) = [row.split() for row in rows if row.startswith("cost ")]
    start = paragraph(rows, "LinearProbeCallback: 8 layers")
    assert re.fullmatch(
        r"LinearProbeCallback: 8 layers, 842 features \(\d\.\d MiB\); "
        r"keeps up to 12 training batches \(\d\.\d MiB\) and the first weights \(\d\.\d MiB\)",
        start,
    )
    assert paragraph(rows, "LinearProbeCallback: fitting") == (
        f"LinearProbeCallback: fitting probes took {cost[1]} s, {cost[2]} % of this run; every_n_epochs=2 about halves "
        "that, fit_samples below 600 lowers it, at the cost of precision"
    )


@pytest.mark.slow
@pytest.mark.parametrize("bar", BARS)
def test_terminal_is_left_with_the_bars_of_lightning_alone(bar: str, screens: list[list[str]]) -> None:
    # That of validation stays where Lightning writes in the middle of it that training has stopped.
    lightning = ("Epoch 1", "Validation", "Predicting", "GPU", "TPU", "💡 Tip", "Trainer.fit` stopped")
    rows = [row for row in of_run(bar, screens[-1]) if row]
    begun = [i for i, row in enumerate(rows) if row.startswith((*lightning, "LinearProbeCallback: ", "cost "))]
    assert [i for i in range(len(rows)) if i not in begun and len(rows[i - 1]) < COLUMNS] == []


# In the bars themselves


def trainer_with(bar: Callback | None, *callbacks: Callback, package: Any = lightning.pytorch, **options: Any) -> Any:
    shown = QUIET | {"enable_progress_bar": bar is not None, "max_epochs": 2}
    return package.Trainer(callbacks=[*callbacks, *([bar] if bar is not None else [])], **(shown | options))


def tasks(bar: Any) -> list[Any]:
    """What a bar of either kind shows: for each bar within it what it is called, its total, its count and the rest."""
    if isinstance(bar, TQDMProgressBar):
        parts = [bar._train_progress_bar, bar._val_progress_bar]
        names = ("desc", "total", "n", "postfix", "pos", "disable", "leave")  # few of them, if it was never enabled
        return [[getattr(part, name, None) for name in names] for part in parts if part is not None]
    assert bar.progress is not None
    assert "get_renderables" not in vars(bar.progress)
    return [(task.id, task.description, task.total, task.completed, task.visible) for task in bar.progress.tasks]


class Watch(Callback):
    """Writes down what a bar shows, and the state of training, at each event."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar
        self.seen: list[Any] = []

    def _look(self, trainer: Any, pl_module: Any, *_: Any, **__: Any) -> None:
        weights = torch.cat([parameter.detach().flatten() for parameter in pl_module.parameters()])
        states = [hash(tensor.numpy().tobytes()) for tensor in (weights, torch.get_rng_state())]
        self.seen.append((tasks(self.bar), trainer.global_step, *states))

    on_train_batch_start = on_train_batch_end = on_train_epoch_end = on_train_end = _look
    on_validation_batch_start = on_validation_batch_end = on_validation_epoch_end = on_validation_end = _look


def make_bar(kind: str) -> Any:
    if kind == "TQDMProgressBar":
        return TQDMProgressBar()
    pytest.importorskip("rich")
    return RichProgressBar(console_kwargs={"force_terminal": True})


@pytest.mark.parametrize("validates", [True, False], ids=["validation", "no validation"])
@pytest.mark.parametrize("kind", BARS)
def test_bars_training_and_random_states_are_what_they_are_without_probes(
    kind: str, validates: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    seen, said = [], []
    for probes in ([], [LinearProbeCallback()]):
        seed_everything(5, verbose=False)
        bar = make_bar(kind)
        trainer = trainer_with(bar, *probes, watch := Watch(bar))
        trainer.fit(Classifier(mlp(depth=1)), loader(shuffle=True), loader(32) if validates else None)
        seen.append(watch.seen)
        said.append(capsys.readouterr().out)
    for without, having in zip(*seen, strict=True):
        assert without == having
    assert len(seen[0]) == 2 * (2 * 6 + 1) + 1 + 3 * 6 * validates  # six events in each validation, the first included
    assert "layer 4 of 4" not in said[0]
    assert "layer 4 of 4" in said[1]


class Bare(Classifier):
    """Its steps compute with a parameter before its modules, which cannot be run again."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(32, 10))
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 32))
        self.gain = nn.Parameter(torch.ones(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(self.body(batch[0] * self.gain)), batch[1])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.training_step(batch, batch_idx)


@pytest.mark.parametrize("kind", BARS)
@pytest.mark.filterwarnings("ignore:LinearProbeCallback. training cannot be run again")
def test_cross_fitting_is_shown_too(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    trainer_with(make_bar(kind), LinearProbeCallback()).fit(Bare(), loader(), loader(96))
    assert "Cross-fitting probes, layer 2 of 3" in capsys.readouterr().out


@pytest.mark.parametrize("bars", ["tqdm_progress.TQDMProgressBar", "rich_progress.RichProgressBar"])
def test_bars_of_pytorch_lightning_are_known(bars: str, capsys: pytest.CaptureFixture[str]) -> None:
    class Model(pytorch_lightning.LightningModule):
        num_classes = 10

        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(depth=1)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    module, name = bars.split(".")
    if name == "RichProgressBar":
        pytest.importorskip("rich")
    make = getattr(getattr(pytorch_lightning.callbacks.progress, module), name)
    bar = make(**({"console_kwargs": {"force_terminal": True}} if name == "RichProgressBar" else {}))
    trainer_with(bar, LinearProbeCallback(), package=pytorch_lightning).fit(Model(), loader())
    assert "Fitting probes, layer 4 of 4" in capsys.readouterr().out


@pytest.mark.parametrize("given", ["no trainer", *BARS])
def test_probe_shows_its_fit(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    bar = make_bar(given) if given in BARS else None
    trainer = trainer_with(bar) if bar is not None else None
    probe(Classifier(mlp(depth=1)), loader(), loader(32), trainer=trainer)
    assert "Fitting probes, layer 4 of 4" in capsys.readouterr().out
    assert bar is None or isinstance(bar, TQDMProgressBar) or "get_renderables" not in vars(bar.progress)


class Own(ProgressBar):
    """A user's own bar."""

    def __init__(self) -> None:
        super().__init__()
        self.printed: list[Any] = []

    def disable(self) -> None: ...

    def enable(self) -> None: ...

    def print(self, *args: Any, **kwargs: Any) -> None:
        self.printed.append(args)


def disabled(kind: str) -> Any:
    bar = make_bar(kind)
    bar.disable()  # as Lightning does in all processes but the first
    return bar


@pytest.mark.parametrize(
    "make",
    [
        lambda: None,
        Own,
        lambda: disabled("TQDMProgressBar"),
        lambda: disabled("RichProgressBar"),
        lambda: TQDMProgressBar(refresh_rate=0),
    ],
    ids=["none", "unknown", "tqdm disabled", "rich disabled", "refresh_rate=0"],
)
def test_nothing_is_shown_without_a_bar_that_is_known_and_enabled(
    make: Callable[[], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    bar = make()
    trainer_with(bar, probes := LinearProbeCallback()).fit(Classifier(mlp(depth=1)), loader(), loader(32))
    probe(Classifier(mlp(depth=1)), loader(), loader(32), trainer=trainer_with(bar))
    assert "robes" not in capsys.readouterr().out
    assert not isinstance(bar, Own) or bar.printed == []
    assert probes.report.rows


class Fragile(Tqdm):
    """A tqdm bar that cannot be what it is asked for: when it is made, drawn, or closed."""

    fails = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._fail("made")

    def set_description_str(self, *args: Any, **kwargs: Any) -> None:
        super().set_description_str(*args, **kwargs)
        self._fail("drawn")

    def close(self) -> None:
        is_open = not self.disable
        super().close()
        if is_open:
            self._fail("closed")

    @classmethod
    def external_write_mode(cls, *args: Any, **kwargs: Any) -> Any:
        if cls.fails == "paused":
            raise RuntimeError("paused")
        return super().external_write_mode(*args, **kwargs)

    def _fail(self, when: str) -> None:
        if self.fails == when and "robes" in (self.desc or ""):
            raise RuntimeError(when)


class FragileTqdm(TQDMProgressBar):
    def init_train_tqdm(self) -> Tqdm:
        return Fragile(disable=False, leave=True, bar_format=self.BAR_FORMAT)


@pytest.mark.parametrize("when", ["made", "drawn", "closed", "paused"])
def test_tqdm_bar_that_raises_costs_nothing(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fragile, "fails", when)
    check_nothing_is_lost(FragileTqdm())


def test_rich_bar_that_raises_costs_nothing() -> None:
    pytest.importorskip("rich")

    class FragileRich(RichProgressBar):
        def refresh(self, hard: bool = False) -> None:
            if self.progress is not None and "get_renderables" in vars(self.progress):
                raise RuntimeError("refresh")
            super().refresh(hard)

    check_nothing_is_lost(FragileRich(console_kwargs={"force_terminal": True}))


def check_nothing_is_lost(bar: Any) -> None:
    reports = []
    for given in (None, bar):
        seed_everything(5, verbose=False)
        trainer = trainer_with(given, probes := LinearProbeCallback())
        trainer.fit(Classifier(mlp(depth=1)), loader(), loader(32))
        reports.append(probes.report)
    assert reports[0] == reports[1]
    assert reports[1].select(epoch=2, stage="val", metric="error")


# What is said


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr("lightning_probes.progress.rank_zero_info", lines.append)
    return lines


class Endless(IterableDataset[Any]):
    """Samples without a number."""

    def __iter__(self) -> Any:
        return iter(loader(size=64).dataset)


@pytest.mark.parametrize(
    ("options", "data", "batches"),
    [
        ({}, loader(size=64), 6),
        ({"fit_samples": 40}, loader(size=64), 2),
        ({"fit_bytes": 2**20}, loader(size=64), 3),
        ({"fit_samples": 50}, DataLoader(Endless(), 16), 3),
    ],
    ids=["epoch", "fit_samples", "fit_bytes", "nobody knows how long"],
)
def test_start_says_how_much_will_be_kept(options: dict[str, Any], data: Any, batches: int, said: list[str]) -> None:
    model = Classifier(mlp(depth=1, inputs=64 * 64))
    trainer_with(None, probes := LinearProbeCallback(**options)).fit(model, data, loader(32, size=64))
    cost = probes.report.cost
    kept, weights = (f"{cost[name] / 2**20:.1f} MiB" for name in ("kept_bytes", "weights_bytes"))
    assert said[0] == (
        f"LinearProbeCallback: 4 layers, 1,098 features (0.1 MiB); keeps up to {batches} training batches ({kept}) and "
        f"the first weights ({weights})"
    )
    assert cost["kept_bytes"] > 16 * batches * 4 * (64 * 64 + 1024)
    assert len(said[0]) <= 160


@pytest.mark.parametrize(("pause", "is_told"), [(1e-9, True), (1e9, False)])
def test_start_says_how_long_fits_will_take_if_that_is_long(
    pause: float, is_told: bool, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refit, "_PAUSE", pause)
    trainer_with(None, LinearProbeCallback()).fit(Classifier(mlp(depth=1)), loader(), loader(32))
    assert bool(re.search(r"; fits will take about \d+ s at each point$", said[0])) == is_told


def test_estimate_grows_with_what_is_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert 0 < seconds_to_fit([64], 10, 1_000, cpu) < 60
    monkeypatch.setattr(estimate, "_rate", lambda device: 1e9)  # That of the machine differs each time.
    least = seconds_to_fit([64], 10, 1_000, cpu)
    assert seconds_to_fit([64] * 100, 10, 1_000, cpu) == pytest.approx(100 * least)
    for widths, outputs, samples in (([64], 1_000, 1_000), ([64], 10, 100_000), ([6_400], 10, 1_000)):
        assert seconds_to_fit(widths, outputs, samples, cpu) > 50 * least


@pytest.mark.filterwarnings("ignore:LinearProbeCallback. training cannot be run again")
@pytest.mark.parametrize("validates", [True, False], ids=["validation", "no validation"])
def test_start_says_that_training_is_not_kept_where_it_cannot_be_run_again(validates: bool, said: list[str]) -> None:
    trainer_with(None, LinearProbeCallback()).fit(Bare(), loader(), loader(32) if validates else None)
    instead = " but features of validation, up to 14,000 samples (5.7 MiB)" if validates else ""
    assert f"; keeps no training batch{instead}: the input of 'body' is computed from" in said[0]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"fit_samples": 0}, "keeps no training batch (fit_samples=0)"),
        ({"fit_samples": 8}, "keeps no training batch (fit_samples and fit_bytes have no room for one)"),
    ],
)
@pytest.mark.filterwarnings("ignore:LinearProbeCallback. training cannot be run again")
def test_start_says_that_nothing_is_kept(options: dict[str, Any], kept: str, said: list[str]) -> None:
    trainer_with(None, LinearProbeCallback(**options)).fit(Classifier(mlp(depth=1)), loader())
    assert said[0].endswith(f"; {kept}")


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({}, "every_n_epochs=2 about halves that, fit_samples below 96 lowers it"),
        ({"every_n_epochs": 2}, "every_n_epochs=4 about halves that, fit_samples below 96 lowers it"),
        ({"every_n_epochs": 3}, "fit_samples below 96 lowers that"),
        ({"fit_samples": 48}, "every_n_epochs=2 about halves that, fit_samples below 48 lowers it"),
    ],
)
def test_end_says_what_the_probes_took_and_what_lowers_it(
    options: dict[str, Any], advice: str, said: list[str]
) -> None:
    trainer = trainer_with(None, probes := LinearProbeCallback(**options), max_epochs=4)
    trainer.fit(Classifier(mlp(depth=1)), loader(), loader(32))
    seconds, share = probes.report.cost["seconds"], 100 * probes.report.cost["share"]
    shown = f"{share:.0f}" if share >= 10 else f"{share:.1f}"
    end = f"fitting probes took {seconds:.1f} s, {shown} % of this run; {advice}, at the cost of precision"
    assert said[1:] == [f"LinearProbeCallback: {end}"]
    assert 0 < share < 100


class Stopping(Callback):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            raise self.error


@pytest.mark.parametrize("error", [ValueError("stop"), KeyboardInterrupt()], ids=["exception", "Ctrl-C"])
def test_end_is_not_said_of_a_fit_that_did_not_end(error: BaseException, said: list[str]) -> None:
    with pytest.raises((ValueError, SystemExit, KeyboardInterrupt)):
        trainer_with(None, probes := LinearProbeCallback(), Stopping(error)).fit(
            Classifier(mlp(depth=1)), loader(), loader(32)
        )
    assert probes.report.cost["seconds"] > 0
    assert len(said) == 1


def test_end_is_not_said_where_nothing_was_fitted(said: list[str]) -> None:
    trainer_with(None, LinearProbeCallback(fit_samples=0)).fit(Classifier(mlp(depth=1)), loader())
    assert len(said) == 1
