"""Checkpoints: written to a temporary name and renamed, read without unpickling anything but tensors and plain data."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from engines.errors import InputError
from engines.untrusted import refuse_inflating


def save(path: Path, content: dict[str, Any]) -> None:
    """Write `content` (tensors and plain data) to `path`, which holds either the old or the new content, never a part.

    Raises:
        OSError: nothing could be written; the message says that the earlier file survives.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError | RuntimeError):
            raise
        kept = "the earlier checkpoint is kept" if path.exists() else "there was no earlier checkpoint"
        raise OSError(f"checkpoint {path} could not be written: {_cause(error)}; {kept}") from error


def _cause(error: BaseException) -> str:
    """One line. A failed write leaves torch as a RuntimeError about file positions, raised after the OSError."""
    first: BaseException | None = error
    while first is not None:
        error, first = (first if isinstance(first, OSError) else error), first.__context__
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "no space left on the device"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def load(path: Path, what: str = "checkpoint") -> dict[str, Any]:
    """Read a file that :func:`save` wrote. Raises InputError when it is missing, truncated or not such a file."""
    if not path.is_file():
        raise InputError(f"{what} {path} does not exist; give the path of a checkpoint")
    refuse_inflating(path, what)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise InputError(
                f"{what} {path} cannot be read: it holds {code[1]}, which is neither a tensor nor plain data; nothing "
                "of it was run. Save the file again with tensors alone"
            ) from None
        raise InputError(
            f"{what} {path} cannot be read ({_first_line(error)[:120]}); it is truncated or not a .pth file"
        ) from None
    if not isinstance(content, dict):
        raise InputError(f"{what} {path} holds a {type(content).__name__}, expected a dictionary with 'model'")
    return content


def read_model(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Constructor arguments and weights from a .pth of :func:`save` or a .safetensors with its config in the header.

    Raises InputError for a file that is missing, damaged or of another kind.
    """
    if path.suffix != ".safetensors":
        return config_and_weights(path, load(path, "model"))
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            weights = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"model {path} cannot be read ({error}); it is missing or truncated") from None
    if "config" not in header:
        raise InputError(
            f"{path}: its header holds no 'config', so the architecture is unknown; of a download from the hub, with "
            "config.json beside the weights, give the folder"
        )
    try:
        return json.loads(header["config"]), weights
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: the 'config' in its header is not JSON ({error}); save the file again") from None


def config_and_weights(path: Path, content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Constructor arguments and weights from what :func:`load` read. InputError names what is not there."""
    if "config" not in content or "model" not in content:
        keys = ", ".join(map(str, list(content)[:5]))
        raise InputError(f"{path}: expected the keys 'model' and 'config', found {keys}")
    config, model = content["config"], content["model"]
    named = isinstance(model, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in model.items())
    if not isinstance(config, dict) or not named:
        raise InputError(f"{path}: expected 'config' as names and values and 'model' as names and tensors")
    return config, model


def model_hash(model: nn.Module) -> str:
    """16 hex digits of the weights' names, shapes and bytes and of the model's `config`, where it has one."""
    digest = hashlib.sha256(repr(getattr(model, "config", None)).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def rng_states() -> dict[str, Any]:
    """The states of all random generators of this process, as plain data and tensors."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, numbers, gauss = random.getstate()
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [
            str(kind),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            position,
            has_gauss,
            cached,
        ],
        "python": [version, list(numbers), gauss],
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_rng(states: dict[str, Any]) -> None:
    """Put back what :func:`rng_states` took."""
    torch.set_rng_state(states["torch"])
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
