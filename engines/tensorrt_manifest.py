"""What an engine file is: a manifest beside it, and the refusal of an engine that belongs elsewhere.

An engine runs only with the TensorRT that built it, on the device it was built for (`tensorrt`) or on the
architectures it was compiled for (`tensorrt_rtx`, which builds ahead of time, with no GPU at all).
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from engines.errors import InputError

AHEAD_OF_TIME = "none (ahead of time)"
NOT_EXECUTED = "compiled, not executed"
# What an engine of tensorrt_rtx runs on unless the builder is told otherwise (its documentation, "CPU-Only AOT").
RTX_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")


@dataclass(frozen=True)
class Device:
    """A GPU as an engine sees it: its name and compute capability ("9.0")."""

    name: str
    capability: str


def manifest_path(plan: str | Path) -> Path:
    """Where the manifest of an engine file lies: `model.trt` -> `model.trt.json`."""
    return Path(f"{plan}.json")


def sha256(*paths: str | Path) -> str:
    """Hex digest of the files' contents, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with Path(path).open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def write_engine(plan: str | Path, draft: Path, manifest: dict[str, Any]) -> None:
    """Put an engine (a file on the same disk) and its manifest in place; both carry the engine's hash.

    The engine goes first: should the second step not happen, the old manifest names another hash and
    `check_manifest` refuses the pair.
    """
    target = manifest_path(plan)
    note = draft.with_name(target.name)
    note.write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n")
    os.replace(draft, plan)
    os.replace(note, target)


def read_manifest(plan: str | Path) -> dict[str, Any]:
    """The manifest of an engine file. InputError where either is missing or it is no manifest."""
    path = manifest_path(plan)
    if not Path(plan).is_file():
        raise InputError(f"{plan}: no such engine; build it with compile_int8")
    try:
        data = json.loads(path.read_text())
        missing = [key for key in ("tensorrt", "version", "device", "capabilities", "engine_sha256") if key not in data]
    except (OSError, ValueError, TypeError) as problem:
        raise InputError(f"{path}: not a readable manifest ({problem}); build the engine again") from None
    if missing:
        raise InputError(f"{path}: the manifest lacks {', '.join(missing)}; build the engine again")
    return dict(data)


def check_manifest(
    plan: str | Path, trt: ModuleType, device: Device | None, workload_hash: str | None = None
) -> dict[str, Any]:
    """The manifest of an engine that `trt` can run on `device` here.

    Args:
        trt: `tensorrt` or `tensorrt_rtx`.
        device: the GPU; None skips that check (to look at an engine where there is no GPU).
        workload_hash: the workload that the engine must have been built for; None = any.

    Raises:
        InputError: another flavour or version of TensorRT, another device or workload, a changed engine file.
    """
    data = read_manifest(plan)
    built, here = f"{data['tensorrt']} {data['version']}", f"{trt.__name__} {trt.__version__}"
    if built != here:
        raise InputError(f"{plan}: built by {built}, but here is {here}; build the engine again here")
    if workload_hash is not None and data.get("workload") != workload_hash:
        raise InputError(
            f"{plan}: built for workload {data.get('workload')}, not {workload_hash}; build it for this workload"
        )
    if device is not None:
        if device.capability not in data["capabilities"]:
            raise InputError(
                f"{plan}: built for compute capability {' or '.join(data['capabilities'])}, but {device.name} has "
                f"{device.capability}; build the engine again there"
            )
        if data["device"] not in (device.name, AHEAD_OF_TIME):
            raise InputError(
                f"{plan}: built on {data['device']}, but here is {device.name}; build the engine again here"
            )
    if sha256(plan) != data["engine_sha256"]:
        raise InputError(f"{plan}: not the engine that its manifest describes; build it again")
    return data
