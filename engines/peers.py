"""Other runtimes that a latency is set beside on request: torch.compile, and OpenVINO where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch

from engines import openvino_peer
from engines.runtimes import Runtime, TorchRuntime


def runtimes(
    module: torch.nn.Module, path: Path, example: tuple[torch.Tensor, ...], device: str, threads: int
) -> tuple[dict[str, Runtime], list[str]]:
    """The peers that run `module` here, by name, and why torch.compile does not. path: the module's ONNX file."""
    found: dict[str, Runtime] = {}
    left_out: list[str] = []
    compiled = TorchRuntime(cast(torch.nn.Module, torch.compile(module)), device, threads)
    try:
        compiled.run(tuple(tensor.numpy() for tensor in example))
        found["compile"] = compiled
    except Exception as error:  # a missing compiler, an operator that it does not know: whatever the backend raises
        compiled.close()
        left_out.append(f"torch.compile left out ({(str(error).splitlines() or [type(error).__name__])[0][:120]})")
    if device == "cpu" and openvino_peer.installed():
        found["openvino"] = openvino_peer.OpenVino(path, threads)
    return found, left_out
