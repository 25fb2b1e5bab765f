"""Programs in a real terminal, a pseudo-terminal of 80 columns, and what is to be seen on its screen."""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from pathlib import Path

COLUMNS, ROWS = 80, 24

_CONTROL = re.compile(r"\x1b\[(\??[\d;]*)([A-Za-z])")


class Screen:
    """The part of a terminal's language that progress bars speak; whatever else comes is an error.

    Attributes:
        lines: all rows so far, those that have scrolled away included.
    """

    def __init__(self) -> None:
        self.lines = [""]
        self._row = self._column = 0

    def write(self, text: str) -> None:
        """Show ``text``; an escape sequence must be in it as a whole."""
        while text:
            if control := _CONTROL.match(text):
                self._obey(control[2], control[1])
                text = text[control.end() :]
            else:
                self._put(text[0])
                text = text[1:]

    def _put(self, character: str) -> None:
        if character == "\r":
            self._column = 0
        elif character == "\n":
            self._down()
        elif character.isprintable():
            if self._column == COLUMNS:  # the row is left only when there is something for the next one
                self._column = 0
                self._down()
            line = self.lines[self._row].ljust(self._column)
            self.lines[self._row] = line[: self._column] + character + line[self._column + 1 :]
            self._column += 1
        else:
            raise AssertionError(f"unknown character {character!r}")

    def _down(self) -> None:
        self._row += 1
        self.lines += [""] * (self._row + 1 - len(self.lines))

    def _obey(self, letter: str, argument: str) -> None:
        if letter == "A":
            self._row = max(self._row - int(argument or 1), 0, len(self.lines) - ROWS)
        elif (letter, argument) == ("K", "2"):
            self.lines[self._row] = ""
        elif letter != "m" and argument != "?25":  # colours; the cursor is hidden or shown
            raise AssertionError(f"unknown control sequence {argument}{letter}")


PATIENCE = 300
"""Seconds without any output after which a program is taken to hang."""


def run_in_terminal(script: Path, *arguments: str) -> list[list[str]]:
    """Run a Python script in a terminal; return its screen after each piece of output, as rows without trailing blanks.

    Raises:
        AssertionError: the script fails, or writes what :class:`Screen` does not know.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TQDM_MINITERS"):
        environment.pop(name, None)
    command = [sys.executable, "-W", "ignore", str(script), *arguments]
    screen, seen, rest = Screen(), list[list[str]](), b""
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    try:
        while output := _read(ours):
            # A screen for each row that is written, however many a busy machine lets through at once.
            *whole, rest = re.split(rb"(?=[\r\n])", rest + output)
            for piece in whole:
                screen.write(piece.decode())
                seen.append([line.rstrip() for line in screen.lines])
        screen.write(rest.decode())
    except BaseException:
        process.kill()
        raise
    finally:
        os.close(ours)
    seen.append([line.rstrip() for line in screen.lines])
    assert process.wait(timeout=60) == 0, "\n".join(seen[-1])
    return seen


def _read(terminal: int) -> bytes:
    if not select.select([terminal], [], [], PATIENCE)[0]:
        raise AssertionError(f"no output for {PATIENCE} s")
    try:
        return os.read(terminal, 65536)
    except OSError as error:
        if error.errno == errno.EIO:  # what Linux says at the end
            return b""
        raise
