"""Add a subcommand ``probe`` to LightningCLI, for the checkpoints that a configuration trained."""

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
    # Without jsonargparse lightning.pytorch.cli can be imported, and raises only once a LightningCLI is made.
    from jsonargparse.typing import class_from_function
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("the command line needs jsonargparse: pip install 'lightning-probes[cli]'") from error

from lightning_probes.callback import LinearProbeCallback
from lightning_probes.checkpoints import CheckpointError, find_checkpoints, read_checkpoint
from lightning_probes.figures.drawing import require_matplotlib
from lightning_probes.posthoc.probe import Interruption, probe
from lightning_probes.report.report import ProbeReport

INTERRUPTED = 130
"""Exit with this code after Ctrl-C, as shells do: 128 plus the number of SIGINT."""


class ProbeTrainer(Trainer):
    """Add to the Lightning Trainer a method that probes a model or its checkpoints."""

    def probe(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | list[str] | None = None,
        untrained: bool = False,
        layers: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        metrics: list[str] | None = None,
        weights_only: bool | None = None,
        output: str | None = None,
        html: str | None = None,
    ) -> ProbeReport:
        """Measure the error of a linear probe on each layer of a model or of its checkpoints.

        A :class:`~lightning_probes.LinearProbeCallback` among the Trainer's callbacks decides which layers are probed,
        and how, so one configuration serves the network in training and its checkpoints. No callback is called during
        probing, and loggers get nothing.

        Args:
            model: the network whose layers are probed.
            datamodule: the training and validation data. Without it the model's own dataloaders are used.
            ckpt_path: checkpoints to probe: a path, a glob in quotes ('runs/**/*.ckpt'), or a list of them. Without it
                the model is probed as it is configured.
            untrained: whether to probe also the network with newly initialised parameters, as epoch 0, step 0.
            layers: layers to probe instead of those of the callback in the configuration: globs over named_modules()
                paths, or class names.
            exclude: layers to leave out, instead of those that the callback leaves out: globs or class names.
            metrics: names of torchmetrics metrics that score the probes too, instead of those of the callback.
            weights_only: whether to load only checkpoints that hold nothing but tensors and plain types, the default.
                false loads others too. Those can run any code, so use it only if you trust them.
            output: JSON file for the report. The figure is saved beside it, with the suffix .png, and of
                several targets one for each, with the suffix .TARGET.png.
            html: HTML file for the report as a page, which any browser opens from disk.

        Returns:
            The report of :func:`~lightning_probes.probe`.

        Raises:
            ValueError: ``output`` ends in ``.png``, so that the figure would overwrite the report, or is also ``html``.
            Exception: whatever :func:`~lightning_probes.probe` raises.
        """
        file = None if output is None else Path(output)
        if file is not None:
            if file.suffix == ".png":
                raise ValueError(f"output: {output!r} is where the figure goes; name the report, like report.json")
            # A folder that cannot be made, or a figure that cannot be drawn, should be known before hours of work.
            file.parent.mkdir(parents=True, exist_ok=True)
            if self.is_global_zero:
                _warn_unless_it_can_draw()
        page = None if html is None else Path(html)
        if page is not None:
            if file is not None and page.resolve() == file.resolve():
                raise ValueError(f"html: {html!r} is where the report goes; name the page, like report.html")
            page.parent.mkdir(parents=True, exist_ok=True)
        given = {"layers": layers, "exclude": exclude, "metrics": metrics}
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
        if page is not None and self.is_global_zero:
            _save_page(report, page)
        return report


class _Parser(LightningArgumentParser):
    """End messages about a LinearProbeCallback with its own error, which the parser buries among other alternatives."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        own = _of_callback(message)
        super().error(f"{message}\n{own}" if own else message, ex)


class ProbeCLI(LightningCLI):
    """Run LightningCLI with a further subcommand ``probe``; arguments and other subcommands are LightningCLI's.

    .. code-block:: sh

        python main.py probe --config config.yaml --ckpt_path 'runs/**/*.ckpt' --untrained --html report.html

    ``probe`` prints the table of the report. After Ctrl-C it prints and saves the networks probed so far and exits with
    code 130. A ``trainer_class`` of your own gets the method :meth:`ProbeTrainer.probe` unless it has a ``probe``.
    """

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return LightningCLI's subcommands and ``probe``, each with the arguments to leave off the command line."""
        return {**LightningCLI.subcommands(), "probe": {"model", "datamodule"}}

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """Set up the parser as LightningCLI does, for a Trainer class that has a method ``probe``.

        Args:
            args: positional arguments of LightningCLI's method.
            kwargs: keyword arguments of LightningCLI's method.

        Raises:
            TypeError: ``trainer_class`` is a function that makes a Trainer without a method ``probe``.
        """
        self.trainer_class = _with_probe(self.trainer_class)
        super().setup_parser(*args, **kwargs)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make a parser whose messages about an argument of a LinearProbeCallback end with the callback's own error."""
        kind = self.parser_class
        if not issubclass(kind, _Parser):
            is_plain = kind is LightningArgumentParser
            self.parser_class = _Parser if is_plain else type(kind.__name__, (_Parser, kind), {})
        return super().init_parser(**kwargs)

    def instantiate_classes(self) -> None:
        """Instantiate the classes of the configuration.

        Raises:
            TypeError, ValueError: an argument of a LinearProbeCallback is wrong. The error is the callback's own,
                without the parser's errors around it.
            Exception: whatever else LightningCLI raises.
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
        """Print the table of each LinearProbeCallback after ``fit``, in the first process."""
        if self.trainer.is_global_zero:
            for callback in _probes_of(self.trainer):
                print(callback.report)

    def probe(self, **arguments: Any) -> None:
        """Run the Trainer's ``probe`` and print the table of its report.

        Args:
            arguments: the arguments of :meth:`ProbeTrainer.probe`.

        Raises:
            SystemExit: no checkpoint could be probed (exit code 1), or Ctrl-C ended the probing (exit code 130).
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
        if any(isinstance(note, Interruption) for note in report.notes):
            sys.exit(INTERRUPTED)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        for action in parser._actions:
            # Users expect a bare --untrained to mean true; jsonargparse would demand a value.
            if subcommand == "probe" and action.dest == "untrained":
                action.nargs, action.const = "?", True
        return parser

    def _parse_ckpt_path(self) -> None:
        """Give the model the hyperparameters stored in its checkpoint; of several, those of the first readable one."""
        # LightningCLI accepts a single path only, so ``ckpt_path`` is that of one checkpoint while it parses.
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
    """Return a LinearProbeCallback's own error for the argument that a parser's message refuses; empty if none."""
    import yaml  # type: ignore[import-untyped]  # PyYAML comes with jsonargparse.

    block = re.search(r"class_path '[\w.]*LinearProbeCallback':\n((?:(?!\s*- Problem with).*\n?)*)", message)
    if block is None:
        return ""
    if unknown := re.search(r"Option '(\w+)' is not accepted", block[1]):
        known = list(inspect.signature(LinearProbeCallback).parameters)
        near = get_close_matches(unknown[1], known, n=3, cutoff=0.4) or known
        return f"LinearProbeCallback has no argument {unknown[1]!r}; nearest: {', '.join(near)}"
    key = re.search(r'^( *)Parser key "(\w+)', block[1], flags=re.MULTILINE)
    # The indentation selects the value of this argument: nested values, and other arguments, have a different one.
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
    """Return whether ``error`` was raised while a LinearProbeCallback was made."""
    return any(frame.f_code is LinearProbeCallback.__init__.__code__ for frame, _ in walk_tb(error.__traceback__))


def _with_probe(trainer_class: type[Trainer] | Callable[..., Trainer]) -> type[Trainer] | Callable[..., Trainer]:
    """Return ``trainer_class``, or a subclass of it that has a method ``probe`` if it has none."""
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
    except CheckpointError:  # The report of the probing will name it.
        return False
    return True


def _probes_of(trainer: Trainer) -> list[LinearProbeCallback]:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, LinearProbeCallback)]


def _selection(trainer: Trainer) -> dict[str, Any]:
    """Return the arguments with which the configuration's first LinearProbeCallback selects layers and data."""
    found = _probes_of(trainer)
    if len(found) > 1:
        rank_zero_warn(f"probe: of {len(found)} LinearProbeCallbacks the first says what is probed")
    return dict(found[0].selection) if found else {}


def _warn_unless_it_can_draw() -> None:
    """Warn if matplotlib is missing that there will be no figure, and name the package to install."""
    try:
        require_matplotlib()
    except ModuleNotFoundError as error:
        rank_zero_warn(f"probe: a report, but no figure: {error}")


def _save(report: ProbeReport, file: Path) -> None:
    """Save the report and, if it can be drawn, the figure of each target beside it."""
    report.save(file)
    rank_zero_info(f"probe: report in {file}")
    for target in report.tasks:
        figure = file.with_suffix(f".{target}.png" if target else ".png")
        try:
            report.plot(target=target).savefig(figure, dpi=150)
        except Exception as error:  # An error of drawing must not keep the table from being printed.
            rank_zero_warn(f"probe: no figure: {error}")
        else:
            rank_zero_info(f"probe: figure in {figure}")


def _save_page(report: ProbeReport, file: Path) -> None:
    """Save the report as a page."""
    try:
        report.save_html(file)
    except Exception as error:  # A page that cannot be written must not keep the table from being printed.
        rank_zero_warn(f"probe: no page: {error}")
    else:
        rank_zero_info(f"probe: page in {file}")
