"""Find checkpoints on disk, read when in training each was written, and load its weights into a model."""

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
from torch.nn.parameter import is_lazy

from lightning_probes.network.layers import clean
from lightning_probes.options import first_of


class CheckpointError(ValueError):
    """Report why a checkpoint cannot be probed."""


_PARALLEL = "module."
"""Give the prefix of all names in the state dict of a network inside DistributedDataParallel or DataParallel."""

STATE_VERSION = 1
"""Number the form of a callback's state in a checkpoint. Release 0.1.0 wrote no number; its form is the same."""


def check_version(written: Any, known: int, what: str) -> None:
    """Refuse what another version of this package wrote in a form that this one does not know.

    Args:
        written: number of the form that was written.
        known: number of the form that this version reads.
        what: what was written, with its place.

    Raises:
        ValueError: the numbers differ; the message has both.
    """
    if written != known:
        raise ValueError(
            f"{what} is of version {written}, and this lightning_probes reads version {known}: another release wrote "
            "it; install that one"
        )


def find_checkpoints(ckpt_path: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the checkpoint files that are named, each once.

    Args:
        ckpt_path: a path, a glob (``**`` matches any number of folders), or a list of paths and globs.

    Raises:
        FileNotFoundError: a path is no file, or a glob matches none. The message names checkpoints with similar names
            below the nearest folder that exists.
    """
    found: dict[Path, Path] = {}  # Resolved paths are the keys, since last.ckpt may be a link to another checkpoint.
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
    """Read a checkpoint; its tensors stay in the file until they are used, unless its format is too old for that.

    Args:
        path: the file.
        weights_only: whether to load nothing but tensors and plain types. With ``False`` a checkpoint can run any code.

    Returns:
        ``(epochs completed, global_step)`` at the time of writing, or ``None`` if the checkpoint does not say; and the
        content of the checkpoint.

    Raises:
        CheckpointError: the file is no checkpoint, cannot be read, or holds more than ``weights_only`` allows.
    """
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)
        except RuntimeError:  # The format before PyTorch 1.6 is no zip file and cannot be mapped.
            content = torch.load(path, map_location="cpu", weights_only=weights_only)
    except pickle.UnpicklingError as error:
        # Nobody should be told to trust a file that is not even a zip file, for example a text under such a name.
        if not (weights_only and zipfile.is_zipfile(path)):
            raise CheckpointError(f"{path} is no checkpoint") from error
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({found[1]})" if found else ""
        raise CheckpointError(
            f"{path} holds more than tensors and plain types{what}: weights_only=False loads it, if you trust it"
        ) from error
    except Exception as error:  # A damaged file can raise anything.
        first = (str(error).splitlines() or ["it is empty"])[0]
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {first}") from error
    if not isinstance(content, Mapping) or not _weights_in(content):
        several = first_of([str(name) for name in _state_dicts(content)])
        told = f" of one network, but several state dicts: {several}" if several else ""
        raise CheckpointError(f"{path} is no checkpoint: it holds a {type(content).__name__} without any weights{told}")
    return _when(content), dict(content)


def load_weights(model: nn.Module, path: Path, content: dict[str, Any]) -> None:
    """Load the weights of a checkpoint into ``model``, after the model's own ``on_load_checkpoint``.

    Args:
        model: the network; its ``strict_loading`` decides whether keys may be missing or unexpected, as in Lightning.
        path: the file, for messages.
        content: what :func:`read_checkpoint` returned of the file.

    Raises:
        CheckpointError: the checkpoint is of another architecture, and the message names the first keys and shapes that
            differ; or ``on_load_checkpoint`` raised.
    """
    if callable(hook := getattr(model, "on_load_checkpoint", None)):
        try:
            hook(content)
        except Exception as error:  # The hook may need more than the checkpoint holds.
            what = f"on_load_checkpoint raised {type(error).__name__}: {error}"
            raise CheckpointError(f"{path} cannot be loaded: {what}") from error
    weights = {clean(name): tensor for name, tensor in _weights_in(content).items()}
    own = model.state_dict()
    if all(name.startswith(_PARALLEL) for name in weights) and not any(name.startswith(_PARALLEL) for name in own):
        weights = {name.removeprefix(_PARALLEL): tensor for name, tensor in weights.items()}
    names = {clean(name): name for name in own}
    shapes = [
        f"{name} {list(weights[name].shape)}, not {list(own[names[name]].shape)}"
        for name in names
        if name in weights and not _fits(own[names[name]], weights[name])
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


def _fits(own: Any, weight: Any) -> bool:
    """Return whether a weight has the shape of a model's own; one that has no shape yet takes any."""
    return not isinstance(own, Tensor) or is_lazy(own) or weight.shape == own.shape


def _weights_in(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the weights of a Lightning checkpoint or of a plain state dict; empty if there are none.

    In other checkpoints, such as Fabric's, the weights are a state dict of any name: that of the name ``model``, or the
    only one.
    """
    weights = content.get("state_dict", content)
    if not isinstance(weights, Mapping):
        return {}
    is_plain = weights is content
    found = {str(name): value for name, value in weights.items() if isinstance(value, Tensor) or not is_plain}
    if any(isinstance(value, Tensor) for value in found.values()):
        return found
    named = _state_dicts(content)
    one = named.get("model") or (next(iter(named.values())) if len(named) == 1 else {})
    return {str(name): value for name, value in one.items()}


def _state_dicts(content: Any) -> dict[str, Mapping[Any, Tensor]]:
    """Return the parts of a checkpoint that hold tensors and nothing else, by name."""
    parts = content.items() if isinstance(content, Mapping) else ()
    return {
        str(name): part
        for name, part in parts
        if isinstance(part, Mapping) and part and all(isinstance(value, Tensor) for value in part.values())
    }


def _when(content: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return ``(epochs completed, global_step)`` at the time of writing, or ``None`` if the checkpoint does not say."""
    epoch, step = content.get("epoch"), content.get("global_step")
    # The key ``epoch`` means different things: Lightning raises it after an epoch's last validation, but before
    # on_train_epoch_end, and checkpoints are written in both. The counters of its loops are unambiguous.
    loop = content.get("loops", {}).get("fit_loop", {}) if isinstance(content.get("loops"), Mapping) else {}
    begun = loop.get("epoch_progress", {}).get("current", {}).get("ready")
    if isinstance(begun, int):
        is_last = loop.get("epoch_loop.batch_progress", {}).get("is_last_batch", False)
        epoch = begun if is_last else begun - 1
    return (epoch, step) if isinstance(epoch, int) and isinstance(step, int) else None
