"""Show the progress of fitting probes in the Trainer's own progress bar, and log lines without breaking the bar."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, Protocol, TypeVar

from lightning.pytorch.utilities import rank_zero_info

from lightning_probes.network.torch_internals import (
    forget_rich_height,
    has_rich_display,
    has_tqdm_main_line,
    is_rich_bar,
    is_tqdm_bar,
    start_rich_display,
    stop_rich_display,
    tqdm_lines,
)

T = TypeVar("T")

_MANY = 100
"""Show every step of a loop of at most this many steps; show one every ``_INTERVAL`` of a longer loop."""

_INTERVAL = 0.1
"""Wait at least this many seconds between two updates in a longer loop, as tqdm does by default."""


class Progress:
    """Show the progress of fits in the progress bar of a Trainer.

    Nothing is shown before :meth:`meet`, nor if the Trainer has no bar of Lightning's kinds. An exception of the bar is
    caught, and nothing is shown from then on.
    """

    def __init__(self) -> None:
        self._bar: _Bar | None = None
        self._title = ""

    def meet(self, trainer: Any) -> Progress:
        """Use the progress bar of a Lightning Trainer from now on, in its first process only, and return ``self``."""
        self._bar = None
        with suppress(Exception):  # A user's own bar may raise anything when its attributes are read.
            self._bar = _known(trainer.progress_bar_callback) if trainer.is_global_zero else None
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave the bar out: it belongs to one process and to one Trainer."""
        return Progress().__dict__

    @contextmanager
    def during(self, title: str) -> Iterator[None]:
        """Show what :meth:`track` yields inside this context under ``title``, and remove the line at its end."""
        self._title = title
        try:
            yield
        finally:
            self._title = ""
            if self._bar is not None:
                with self._or_silence():
                    self._bar.hide()

    def track(self, name: str, items: Iterable[T], total: int) -> Iterator[T]:
        """Yield the items, and show the number of each before it is yielded.

        Args:
            name: what an item is, for example ``layer``.
            items: what is yielded.
            total: number of items.
        """
        due = 0.0
        for i, item in enumerate(items):
            if self._title and self._bar is not None and (total <= _MANY or time.monotonic() >= due):
                with self._or_silence():
                    self._bar.show(f"{self._title}, {name} {i + 1} of {total}", i, total)
                due = time.monotonic() + _INTERVAL
            yield item

    def say(self, text: str) -> None:
        """Log ``text`` at level INFO in the first process, on a line of its own while a bar is shown."""
        paused = ExitStack()
        if self._bar is not None:
            # The bar's own print would bypass the levels and handlers that the user set for logging.
            with self._or_silence():
                paused.enter_context(self._bar.paused())
        try:
            rank_zero_info(text)
        finally:
            with self._or_silence():
                paused.close()

    @contextmanager
    def _or_silence(self) -> Iterator[None]:
        """Give up the bar if the code inside this context raises, and go on."""
        try:
            yield
        except Exception:
            bar, self._bar = self._bar, None
            with suppress(Exception):
                if bar is not None:
                    bar.hide()


def size(num_bytes: float) -> str:
    """Return a number of bytes as text, for example ``0.8 MiB``, ``143 MiB`` or ``1.2 GiB``."""
    mebi = num_bytes / 2**20
    return f"{mebi:.1f} MiB" if mebi < 10 else f"{mebi:,.0f} MiB" if mebi < 1000 else f"{mebi / 2**10:,.1f} GiB"


class _Bar(Protocol):
    """Draw one further line in a progress bar, whatever kind of bar it is."""

    def show(self, text: str, done: int, total: int) -> None:
        """Show the line with ``text`` and ``done`` of ``total`` steps; ``done = 0`` restarts its clock."""

    def hide(self) -> None:
        """Remove the line."""

    def paused(self) -> AbstractContextManager[None]:
        """Keep the bar off the terminal inside this context, so that other code can write there."""


def _known(bar: Any) -> _Bar | None:
    """Return what draws in ``bar``, or ``None`` if its kind is unknown.

    Attributes tell the kind, not ``isinstance``: ``lightning.pytorch`` and ``pytorch_lightning`` have separate classes.
    """
    if is_tqdm_bar(bar):
        return _Tqdm(bar)
    return _Rich(bar) if is_rich_bar(bar) else None


class _Tqdm:
    """Draw a further tqdm bar for a ``TQDMProgressBar``, in the place of the validation bar."""

    FORMAT = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"

    def __init__(self, callback: Any) -> None:
        self._callback = callback
        self._line: Any = None

    def show(self, text: str, done: int, total: int) -> None:
        if not self._callback.is_enabled:
            return
        if self._line is None:
            self._line = self._new_line(text, total)
        elif not done:
            self._line.reset(total)
        self._line.n = done
        self._line.set_description_str(text)  # This also redraws the line.

    def hide(self) -> None:
        line, self._line = self._line, None
        if line is not None:
            line.close()
            for bar in self._active():
                bar.refresh()

    @contextmanager
    def paused(self) -> Iterator[None]:
        active = self._active()
        with type(active[0]).external_write_mode() if active else nullcontext():
            yield

    def _new_line(self, text: str, total: int) -> Any:
        position = 2 * self._callback.process_position + has_tqdm_main_line(self._callback)
        for bar in self._active():
            if abs(bar.pos) == position:
                bar.clear()
        like = next(bar for bar in tqdm_lines(self._callback) if hasattr(bar, "fp"))  # Made disabled it has no ``fp``.
        look = {"file": like.fp, "ascii": like.ascii, "colour": like.colour, "dynamic_ncols": True}
        return type(like)(desc=text, total=total, position=position, leave=False, bar_format=self.FORMAT, **look)

    def _active(self) -> list[Any]:
        return [line for line in tqdm_lines(self._callback) if not line.disable]


class _Rich:
    """Draw a line below those of a ``RichProgressBar``, in its colours."""

    def __init__(self, callback: Any) -> None:
        self._callback = callback
        self._progress: Any = None
        self._line: Any = None
        self._is_alone = False

    def show(self, text: str, done: int, total: int) -> None:
        callback = self._callback
        if not callback.is_enabled:
            return
        if self._line is None:
            self._is_alone = not has_rich_display(callback)
            start_rich_display(callback)
            self._progress = callback.progress
            self._line = self._new_line()
            # The line has a display of its own, because a further task in the callback's display would change the
            # widths of its columns and the ids of its tasks.
            self._progress.get_renderables = partial(_joined, self._progress.get_renderables, self._line)
        if not done:
            for task in self._line.task_ids:
                self._line.remove_task(task)
            self._line.add_task(text, total=total)
        self._line.update(self._line.task_ids[0], description=text, completed=done)
        callback.refresh(hard=not done)

    def hide(self) -> None:
        if self._line is None:
            return
        self._line = None
        del self._progress.get_renderables  # Without it the method of the class is used again.
        self._callback.refresh()
        if self._is_alone:
            stop_rich_display(self._callback)

    @contextmanager
    def paused(self) -> Iterator[None]:
        progress = self._callback.progress
        if not has_rich_display(self._callback) or not progress.console.is_interactive:
            yield
            return
        # Log lines do not pass through the display, which would draw over them.
        live = progress.live
        was = live.transient, live.vertical_overflow
        live.transient = True  # Otherwise stop() leaves a copy of the display behind.
        progress.stop()
        try:
            yield
        finally:
            live.transient, live.vertical_overflow = was
            # A display that remembers its height first moves the cursor up by it, over the lines just logged.
            forget_rich_height(live)
            progress.start()

    def _new_line(self) -> Any:
        from rich import progress as rich  # rich is an optional dependency of Lightning.

        theme = self._callback.theme
        bar = rich.BarColumn(complete_style=theme.progress_bar, finished_style=theme.progress_bar_finished)
        times = rich.TimeElapsedColumn(), rich.TimeRemainingColumn()
        text = rich.TextColumn("{task.description}", style=theme.description or "none", markup=False)
        return rich.Progress(text, bar, *times, console=self._progress.console, auto_refresh=False)


def _joined(others: Callable[[], Iterable[Any]], line: Any) -> Iterator[Any]:
    """Yield what a display renders, and ``line`` below it."""
    yield from others()
    with suppress(Exception):  # Rich's drawing thread would print a traceback.
        yield line.make_tasks_table(line.tasks)
