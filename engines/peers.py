"""Other runtimes that a latency is set beside on request: torch.compile, and OpenVINO where it is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from engines.errors import InputError
from engines.runtimes import Arrays, Runtime, TorchRuntime

Tensors = tuple[torch.Tensor, ...]


class OpenVINORuntime:
    """OpenVINO on the CPU, in single precision, tuned for the latency of one call.

    Args:
        path: an FP32 .onnx file.
        threads: inference threads.
    """

    name = "openvino"
    device = "cpu"

    def __init__(self, path: str | Path, threads: int) -> None:
        try:
            import openvino
        except ImportError:
            raise InputError("openvino is not installed: pip install '.[openvino]'") from None
        options = {
            "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32",
        }  # fmt: skip
        self._call: Any = openvino.Core().compile_model(str(path), "CPU", options)

    def run(self, inputs: Arrays) -> Arrays:
        """Run the model on host arrays; returns host arrays."""
        found = self._call(list(inputs))
        return tuple(np.asarray(found[output]) for output in self._call.outputs)

    def close(self) -> None:
        """Release the compiled model."""
        self._call = None


def runtimes(
    module: torch.nn.Module, path: Path, example: Tensors, device: str, threads: int
) -> tuple[dict[str, Runtime], list[str]]:
    """The peers that run `module` here, by name, and why each of the others does not. path: its ONNX file."""
    found: dict[str, Runtime] = {}
    left_out: list[str] = []
    compiled = TorchRuntime(cast(torch.nn.Module, torch.compile(module)), device, threads)
    try:
        compiled.run(tuple(tensor.numpy() for tensor in example))
        found["compile"] = compiled
    except Exception as error:  # a missing compiler, an operator that it does not know: whatever the backend raises
        compiled.close()
        left_out.append(f"torch.compile left out ({(str(error).splitlines() or [type(error).__name__])[0][:120]})")
    if device == "cpu" and importlib.util.find_spec("openvino"):
        found["openvino"] = OpenVINORuntime(path, threads)
    return found, left_out
