"""Checkpoints on disk: which there are, when in training each was written, and its weights into a model."""

from __future__ import annotations

import difflib
import glob
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_probes.network.layers import clean
from lightning_probes.options import first_of


class CheckpointError(ValueError):
    """Why a checkpoint cannot be probed."""


def find_checkpoints(ckpt_path: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files that are named, each once.

    Args:
        ckpt_path: a path, a glob (``**`` across folders), or a list of them.

    Raises:
        FileNotFoundError: a path is none, or a glob finds nothing; the message names what is there.
    """
    found: dict[Path, Path] = {}  # by what a link leads to: a last.ckpt may be one
    for pattern in [ckpt_path] if isinstance(ckpt_path, (str, Path)) else ckpt_path:
        path = Path(pattern)
        paths = [path] if path.is_file() else [Path(p) for p in sorted(glob.glob(str(pattern), recursive=True))]
        paths = [path for path in paths if path.is_file()]
        if not paths:
            folder = next((parent for parent in path.parents if parent.is_dir()), Path())
            there = sorted(str(p) for p in folder.rglob("*") if p.suffix in (".ckpt", ".pt", ".pth"))
            near = difflib.get_close_matches(str(path), there, 3, 0.3) or there[:3]
            hint = f"; under {folder} there are: {', '.join(near)}" if near else f"; under {folder} there is none"
            raise FileNotFoundError(f"ckpt_path: no checkpoint {str(pattern)!r}{hint}")
        for path in paths:
            found.setdefault(path.resolve(), path)
    return list(found.values())


def read_checkpoint(path: Path, *, weights_only: bool = True) -> tuple[tuple[int, int] | None, dict[str, Any]]:
    """A checkpoint, whose tensors stay in the file until they are used.

    Returns:
        ``(epochs completed, global_step)`` when it was written, or ``None`` if it does not say; its content.

    Raises:
        CheckpointError: it is none, or cannot be loaded.
    """
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)
        except RuntimeError:  # an older format, which cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=weights_only)
    except pickle.UnpicklingError as error:
        if not (weights_only and zipfile.is_zipfile(path)):  # a text that somebody named so: nothing to be trusted
            raise CheckpointError(f"{path} is no checkpoint") from error
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({found[1]})" if found else ""
        raise CheckpointError(
            f"{path} holds more than tensors and plain types{what}: weights_only=False loads it, if you trust it"
        ) from error
    except Exception as error:  # whatever a damaged file makes of it
        first = (str(error).splitlines() or ["it is empty"])[0]
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {first}") from error
    if not isinstance(content, Mapping) or not _weights_in(content):
        raise CheckpointError(f"{path} is no checkpoint: it holds a {type(content).__name__} without any weights")
    return _when(content), dict(content)


def load_weights(model: nn.Module, path: Path, content: dict[str, Any]) -> None:
    """Put the weights of a checkpoint into ``model``.

    Raises:
        CheckpointError: it is one of another architecture; the message names the first keys and shapes that differ.
    """
    if callable(hook := getattr(model, "on_load_checkpoint", None)):
        try:
            hook(content)
        except Exception as error:  # it may want more than there is
            what = f"on_load_checkpoint raised {type(error).__name__}: {error}"
            raise CheckpointError(f"{path} cannot be loaded: {what}") from error
    weights = {clean(name): tensor for name, tensor in _weights_in(content).items()}
    own = model.state_dict()
    names = {clean(name): name for name in own}
    shapes = [
        f"{name} {list(weights[name].shape)}, not {list(own[names[name]].shape)}"
        for name in names
        if isinstance(own[names[name]], Tensor) and name in weights and weights[name].shape != own[names[name]].shape
    ]
    differences = {
        "missing": [name for name in names if name not in weights],
        "unexpected": [name for name in weights if name not in names],
        "of another shape": shapes,
    }
    is_strict = getattr(model, "strict_loading", True)
    if any(differences.values()) if is_strict else shapes:
        told = "; ".join(f"{what}: {first_of(keys)}" for what, keys in differences.items() if keys)
        raise CheckpointError(f"{path} is a checkpoint of another architecture than {type(model).__name__}; {told}")
    model.load_state_dict({names[name]: tensor for name, tensor in weights.items() if name in names}, strict=is_strict)


def _weights_in(content: Mapping[str, Any]) -> dict[str, Any]:
    """Of a Lightning checkpoint, or of a plain state dict."""
    weights = content.get("state_dict", content)
    if not isinstance(weights, Mapping):
        return {}
    is_plain = weights is content
    found = {str(name): value for name, value in weights.items() if isinstance(value, Tensor) or not is_plain}
    return found if any(isinstance(value, Tensor) for value in found.values()) else {}


def _when(content: Mapping[str, Any]) -> tuple[int, int] | None:
    epoch, step = content.get("epoch"), content.get("global_step")
    loop = content.get("loops", {}).get("fit_loop", {}) if isinstance(content.get("loops"), Mapping) else {}
    begun = loop.get("epoch_progress", {}).get("current", {}).get("ready")
    if isinstance(begun, int):
        is_last = loop.get("epoch_loop.batch_progress", {}).get("is_last_batch", False)
        epoch = begun if is_last else begun - 1
    return (epoch, step) if isinstance(epoch, int) and isinstance(step, int) else None
