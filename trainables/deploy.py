"""From weights to the ONNX file that is deployed and measured: FP32, or INT8 by a policy; and back into a module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from engines.calibrate import calibrate
from engines.export import export_onnx
from engines.policy import QuantPolicy
from engines.quantize import quantize_cpu
from engines.runtimes import Array, OnnxRuntime
from trainables.domain import Domain

BATCH = 32


class Engine(nn.Module):
    """An ONNX file behind the call of a module: tensors (B, ...) in, tensors out, one sample at a time."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        super().__init__()
        self.runtime = OnnxRuntime(path, "cpu", threads)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs of every sample, stacked: the file's shapes are fixed at batch 1."""
        samples = zip(*(torch.split(tensor, 1) for tensor in inputs), strict=True)
        runs = [self.runtime.run(tuple(tensor.numpy() for tensor in sample)) for sample in samples]
        return tuple(torch.from_numpy(np.concatenate(parts)) for parts in zip(*runs, strict=True))


def export_fp32(domain: Domain, model: nn.Module, path: Path) -> float:
    """Write the deployed form of `model` as ONNX; its relative error against torch."""
    module, inputs, names_in, names_out = domain.deployed(model)
    return export_onnx(module, inputs[0], path, names_in, names_out)


def export_int8(domain: Domain, model: nn.Module, policy: QuantPolicy, path: Path) -> dict[str, object]:
    """Write the INT8 file of `model` for ONNX Runtime; what was quantized, kept and why.

    Calibrated on the first training samples of the domain's seed. Raises InputError for what the policy asks and
    this model cannot give.
    """
    fp32 = path.with_name(f"{path.stem}.fp32.onnx")
    export_fp32(domain, model, fp32)
    try:
        return quantize_cpu(fp32, path, policy, ranges_of(domain, fp32, policy))
    finally:
        fp32.unlink(missing_ok=True)
