"""``ProbeCLI``: LightningCLI with one more subcommand, ``probe``, for the checkpoints that a configuration trained."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from traceback import walk_tb
from typing import Any, NoReturn

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

try:
    # Without it Lightning's module can be imported, and complains only when a program begins.
    from jsonargparse.typing import class_from_function
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("the command line needs jsonargparse: pip install 'lightning-probes[cli]'") from error

from lightning_probes.callback import LinearProbeCallback
from lightning_probes.checkpoints import CheckpointError, find_checkpoints, read_checkpoint
from lightning_probes.posthoc.probe import probe
from lightning_probes.report.plots import new_picture
from lightning_probes.report.report import ProbeReport

INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells have it."""


class ProbeTrainer(Trainer):
    """A Trainer with one more thing to do with a model: to probe it, or the checkpoints of it."""

    def probe(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | list[str] | None = None,
        untrained: bool = False,
        layers: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        weights_only: bool | None = None,
        output: str | None = None,
    ) -> ProbeReport:
        """Say what each layer of a model, or of checkpoints of it, knows: an error for each layer.

        A :class:`~lightning_probes.LinearProbeCallback` among the Trainer's callbacks says what is probed, and how:
        one configuration for the network while it trains and for its checkpoints. Callbacks and loggers get nothing.

        Args:
            model: whose layers are probed.
            datamodule: has the data; not given: the model.
            ckpt_path: checkpoints to probe: a path, a glob in quotes ('runs/**/*.ckpt'), or a list of them. Not given:
                the model as it is configured.
            untrained: also the network with its parameters initialised anew, as step 0.
            layers: which layers, in the place of those that the callback in the configuration has: globs over
                named_modules() paths, or class names.
            exclude: layers to take away, in the place of the callback's, the same way.
            weights_only: false also loads checkpoints that hold more than tensors and plain types. Those can run any
                code: only where you trust them.
            output: JSON file for the report; the figure goes beside it, with the suffix .png.

        Returns:
            The report of :func:`~lightning_probes.probe`.

        Raises:
            ValueError: the report and its figure would be the same file, or as :func:`~lightning_probes.probe`.
        """
        file = None if output is None else Path(output)
        if file is not None:
            if file.suffix == ".png":
                raise ValueError(f"output: {output!r} is where the figure goes; name the report, like report.json")
            # What cannot be is better known before the work than after it.
            file.parent.mkdir(parents=True, exist_ok=True)
            if self.is_global_zero:
                _warn_unless_it_can_draw()
        given = {"layers": layers, "exclude": exclude}
        report = probe(
            model,
            datamodule=datamodule,
            ckpt_path=ckpt_path,
            untrained=untrained,
            weights_only=weights_only is not False,
            trainer=self,
            **_selection(self) | {name: value for name, value in given.items() if value is not None},
        )
        if file is not None and self.is_global_zero:
            _save(report, file)
        return report


class _Parser(LightningArgumentParser):
    """Ends its errors with what is wrong with an argument of a LinearProbeCallback, below all that it is not either."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        own = _of_callback(message)
        super().error(f"{message}\n{own}" if own else message, ex)


class ProbeCLI(LightningCLI):
    """LightningCLI with a subcommand ``probe``; the arguments, and all other subcommands, are LightningCLI's.

    .. code-block:: sh

        python main.py probe --config config.yaml --ckpt_path 'runs/**/*.ckpt' --untrained --output report.json

    It prints the table. After Ctrl-C it prints and saves what was done, and the exit code is 130. A ``trainer_class``
    of your own gets the method :meth:`ProbeTrainer.probe` unless it has a ``probe``.
    """

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Those of LightningCLI and ``probe``, each with the arguments that are not for the command line."""
        return {**LightningCLI.subcommands(), "probe": {"model", "datamodule"}}

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """Make sure that the Trainer can probe, then as LightningCLI."""
        self.trainer_class = _with_probe(self.trainer_class)
        super().setup_parser(*args, **kwargs)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make a parser whose errors end in words of the callback's."""
        kind = self.parser_class
        if not issubclass(kind, _Parser):
            is_plain = kind is LightningArgumentParser
            self.parser_class = _Parser if is_plain else type(kind.__name__, (_Parser, kind), {})
        return super().init_parser(**kwargs)

    def instantiate_classes(self) -> None:
        """Make the objects of the configuration.

        Raises:
            TypeError, ValueError: of a LinearProbeCallback, its own words and not the parser's around them.
        """
        try:
            super().instantiate_classes()
        except Exception as error:
            found: BaseException | None = error
            while found is not None and not _is_of_callback(found):
                found = found.__cause__ or found.__context__
            if found is None:
                raise
            raise found.with_traceback(None) from None

    def after_fit(self) -> None:
        """Print the table of each probe callback, as ``probe`` does."""
        if self.trainer.is_global_zero:
            for callback in _probes_of(self.trainer):
                print(callback.report)

    def probe(self, **arguments: Any) -> None:
        """Run the Trainer's ``probe`` and print the table.

        Args:
            arguments: of :meth:`ProbeTrainer.probe`.

        Raises:
            SystemExit: nothing could be probed, or it was interrupted.
        """
        trainer: Any = self.trainer
        try:
            report = trainer.probe(**arguments)
        except CheckpointError as error:
            sys.exit(f"probe: {error}")
        except KeyboardInterrupt:
            rank_zero_info("probe: interrupted before anything was probed")
            sys.exit(INTERRUPTED)
        if trainer.is_global_zero:
            print(report)
        if any(note.startswith("interrupted; not probed") for note in report.notes):
            sys.exit(INTERRUPTED)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        for action in parser._actions:
            if subcommand == "probe" and action.dest == "untrained":  # true without a value, too
                action.nargs, action.const = "?", True
        return parser

    def _parse_ckpt_path(self) -> None:
        """The model has the hyperparameters that are in its checkpoint; of many, in the first that can be read."""
        # LightningCLI knows of one path only.
        config = self.config.get("probe") if self.config.get("subcommand") == "probe" else None
        if config is None:
            super()._parse_ckpt_path()
            return
        given = config.get("ckpt_path")
        try:
            found = [] if given is None else find_checkpoints(given)
        except FileNotFoundError as error:
            self.parser.error(str(error))
        if (first := next(filter(_is_readable, found), None)) is not None:
            config["ckpt_path"] = str(first)
            super()._parse_ckpt_path()
            self.config["probe"]["ckpt_path"] = given


def _of_callback(message: str) -> str:
    """Return what a LinearProbeCallback says to what a parser refused for it; empty if nothing."""
    import yaml  # type: ignore[import-untyped]  # the parser's own

    block = re.search(r"class_path '[\w.]*LinearProbeCallback':\n((?:(?!\s*- Problem with).*\n?)*)", message)
    if block is None:
        return ""
    if unknown := re.search(r"Option '(\w+)' is not accepted", block[1]):
        known = list(inspect.signature(LinearProbeCallback).parameters)
        near = get_close_matches(unknown[1], known, n=3, cutoff=0.4) or known
        return f"LinearProbeCallback has no argument {unknown[1]!r}; nearest: {', '.join(near)}"
    key = re.search(r'^( *)Parser key "(\w+)', block[1], flags=re.MULTILINE)
    # Values inside of it, and others outside, stand in other columns.
    value = key and re.search(rf"^{key[1]}  (?:\S.* Got|Given) value: (.*)", block[1], flags=re.MULTILINE)
    if not key or not value:
        return ""
    try:
        LinearProbeCallback(**{key[2]: yaml.safe_load(value[1])})
    except (TypeError, ValueError) as error:
        return str(error)
    except yaml.YAMLError:
        return ""
    return ""


def _is_of_callback(error: BaseException) -> bool:
    return any(frame.f_code is LinearProbeCallback.__init__.__code__ for frame, _ in walk_tb(error.__traceback__))


def _with_probe(trainer_class: type[Trainer] | Callable[..., Trainer]) -> type[Trainer] | Callable[..., Trainer]:
    if trainer_class is Trainer:
        return ProbeTrainer
    made = trainer_class
    if not isinstance(trainer_class, type):
        made = class_from_function(trainer_class)
    if hasattr(made, "probe"):
        return trainer_class
    if not isinstance(trainer_class, type):
        raise TypeError(
            f"trainer_class: {trainer_class.__name__} makes a Trainer that has no method probe; let it make, and be "
            "annotated to return, a lightning_probes.cli.ProbeTrainer"
        )
    return type(trainer_class.__name__, (trainer_class, ProbeTrainer), {"__doc__": trainer_class.__doc__})


def _is_readable(path: Path) -> bool:
    try:
        read_checkpoint(path)
    except CheckpointError:  # probing will tell of it
        return False
    return True


def _probes_of(trainer: Trainer) -> list[LinearProbeCallback]:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, LinearProbeCallback)]


def _selection(trainer: Trainer) -> dict[str, Any]:
    """What the callback among those of the configuration probes."""
    found = _probes_of(trainer)
    if len(found) > 1:
        rank_zero_warn(f"probe: of {len(found)} LinearProbeCallbacks the first says what is probed")
    return dict(found[0].selection) if found else {}


def _warn_unless_it_can_draw() -> None:
    """Say that a figure will be missing, and how to get it."""
    try:
        new_picture(1, 1)
    except ModuleNotFoundError as error:
        rank_zero_warn(f"probe: a report, but no figure: {error}")


def _save(report: ProbeReport, file: Path) -> None:
    """Write the report and, if it can be drawn, the figure beside it."""
    report.save(file)
    rank_zero_info(f"probe: report in {file}")
    figure = file.with_suffix(".png")
    try:
        report.plot().savefig(figure, dpi=150)
    except Exception as error:  # the report is saved, and its table has yet to be printed
        rank_zero_warn(f"probe: no figure: {error}")
    else:
        rank_zero_info(f"probe: figure in {figure}")
