"""Write a text file in one piece, so that nobody ever finds half of it."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path


def write_whole(path: str | Path, text: str) -> None:
    """Write a text as UTF-8. A file of that name is replaced only when all is written; a link stays one.

    Args:
        path: the file, in a folder that exists.
        text: what the file will hold.

    Raises:
        FileNotFoundError: the folder does not exist.
        OSError: the file cannot be written; an earlier file of that name is unchanged.
    """
    path = Path(os.path.realpath(path))  # os.replace would put a file in the place of a link.
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(path.parent))
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        written = Path(folder) / path.name
        written.write_text(text, encoding="utf-8")
        os.replace(written, path)
