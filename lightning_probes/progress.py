"""Shows in the Trainer's own progress bar how far a fit of probes is, and says lines that do not land inside of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, Protocol, TypeVar

from lightning.pytorch.utilities import rank_zero_info

T = TypeVar("T")

_MANY = 100
"""Steps of which each is shown; of more than that, one in every tenth of a second."""

_INTERVAL = 0.1
"""Seconds; that of tqdm."""


class Progress:
    """Shows the progress of fits; silent until it has met a Trainer, and where that has no bar that it knows.

    What a bar raises is caught: progress is silent from then on.
    """

    def __init__(self) -> None:
        self._bar: _Bar | None = None
        self._title = ""

    def meet(self, trainer: Any) -> Progress:
        """Use the bar of a Lightning Trainer from now on, in its first process only; returns itself."""
        self._bar = None
        with suppress(Exception):  # whatever parts of a user's own bar raise
            self._bar = _known(trainer.progress_bar_callback) if trainer.is_global_zero else None
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave the bar out: in another process, or a copy, there may be none."""
        return Progress().__dict__

    @contextmanager
    def during(self, title: str) -> Iterator[None]:
        """Show what is tracked inside under a title, and leave the bar as it was."""
        self._title = title
        try:
            yield
        finally:
            self._title = ""
            if self._bar is not None:
                with self._or_silence():
                    self._bar.hide()

    def track(self, name: str, items: Iterable[T], total: int) -> Iterator[T]:
        """Yield ``items``, of which there are ``total``, and show before each which one it is."""
        due = 0.0
        for i, item in enumerate(items):
            if self._title and self._bar is not None and (total <= _MANY or time.monotonic() >= due):
                with self._or_silence():
                    self._bar.show(f"{self._title}, {name} {i + 1} of {total}", i, total)
                due = time.monotonic() + _INTERVAL
            yield item

    def say(self, text: str) -> None:
        """Log a line of information, on a line of its own where there is a bar."""
        paused = ExitStack()
        if self._bar is not None:
            # Around the log and not through what the bar has for printing: levels and handlers are the user's.
            with self._or_silence():
                paused.enter_context(self._bar.paused())
        try:
            rank_zero_info(text)
        finally:
            with self._or_silence():
                paused.close()

    @contextmanager
    def _or_silence(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            bar, self._bar = self._bar, None
            with suppress(Exception):
                if bar is not None:
                    bar.hide()


def size(num_bytes: float) -> str:
    """Return bytes as they are read: ``0.8 MiB``, ``143 MiB``, ``1.2 GiB``."""
    mebi = num_bytes / 2**20
    return f"{mebi:.1f} MiB" if mebi < 10 else f"{mebi:,.0f} MiB" if mebi < 1000 else f"{mebi / 2**10:,.1f} GiB"


class _Bar(Protocol):
    """What there is to do with a progress bar."""

    def show(self, text: str, done: int, total: int) -> None:
        """Show one line more, or another text in it."""

    def hide(self) -> None:
        """Take that line away."""

    def paused(self) -> AbstractContextManager[None]:
        """Leave the terminal to others meanwhile."""


def _known(bar: Any) -> _Bar | None:
    """Tell by its parts what a progress bar is: ``lightning.pytorch`` and ``pytorch_lightning`` have each their own."""
    if _has(bar, "is_enabled", "process_position", "init_train_tqdm"):
        return _Tqdm(bar)
    if _has(bar, "is_enabled", "progress", "theme", "_init_progress", "_stop_progress"):
        return _Rich(bar)
    return None


def _has(bar: Any, *parts: str) -> bool:
    return all(hasattr(bar, part) for part in parts)


class _Tqdm:
    """One tqdm bar more for a ``TQDMProgressBar``, in the line of the bar of validation."""

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
        self._line.set_description_str(text)  # which draws it

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
        position = 2 * self._callback.process_position + self._has_main_bar()
        for bar in self._active():
            if abs(bar.pos) == position:
                bar.clear()
        like = next(bar for bar in self._bars() if hasattr(bar, "fp"))  # which one that was never enabled has not
        look = {"file": like.fp, "ascii": like.ascii, "colour": like.colour, "dynamic_ncols": True}
        return type(like)(desc=text, total=total, position=position, leave=False, bar_format=self.FORMAT, **look)

    def _has_main_bar(self) -> bool:
        return any(bar is self._callback._train_progress_bar for bar in self._active())

    def _active(self) -> list[Any]:
        return [bar for bar in self._bars() if not bar.disable]  # as it is once it is closed

    def _bars(self) -> list[Any]:
        # Private, for the properties raise where there is no bar yet.
        callback = self._callback
        bars = (callback._train_progress_bar, callback._val_progress_bar, callback._predict_progress_bar)
        return [bar for bar in bars if bar is not None]


class _Rich:
    """A line below those of a ``RichProgressBar``, in its colours."""

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
            # Private: between two stages of a Trainer nothing is displayed, and the next one begins anew in any case.
            self._is_alone = callback.progress is None or callback._progress_stopped
            callback._init_progress(callback.trainer)
            self._progress = callback.progress
            self._line = self._new_line()
            # A task of the callback's own display would change the widths of its columns, and the numbers of its tasks.
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
        del self._progress.get_renderables  # that of its class is back
        self._callback.refresh()
        if self._is_alone:
            self._callback._stop_progress()

    @contextmanager
    def paused(self) -> Iterator[None]:
        progress = self._callback.progress
        if progress is None or self._callback._progress_stopped or not progress.console.is_interactive:
            yield
            return
        # What is logged goes past the display, which would draw over it.
        live = progress.live
        was = live.transient, live.vertical_overflow
        live.transient = True  # or a copy of it stays
        progress.stop()
        try:
            yield
        finally:
            live.transient, live.vertical_overflow = was
            live._live_render._shape = None  # private: or it begins by going up as many lines as it had
            progress.start()

    def _new_line(self) -> Any:
        from rich import progress as rich  # not everybody has it

        theme = self._callback.theme
        bar = rich.BarColumn(complete_style=theme.progress_bar, finished_style=theme.progress_bar_finished)
        times = rich.TimeElapsedColumn(), rich.TimeRemainingColumn()
        text = rich.TextColumn("{task.description}", style=theme.description or "none", markup=False)
        return rich.Progress(text, bar, *times, console=self._progress.console, auto_refresh=False)


def _joined(others: Callable[[], Iterable[Any]], line: Any) -> Iterator[Any]:
    yield from others()
    with suppress(Exception):  # which the thread that draws would print
        yield line.make_tasks_table(line.tasks)
