"""From weights to the files that are deployed: ONNX in FP32, or INT8 by a policy, and a TensorRT engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from engines.export import export_onnx
from engines.policy import Choice, QuantPolicy, choices
from engines.quantize import Report, post_training, ranges_of, smoothed_file
from engines.runtimes import Arrays, OnnxRuntime
from trainables import checkpoint
from trainables.domain import Domain, make_domain

Job = dict[str, Any]  # see sweeps/spec.py

CALIBRATION_BATCH = 32


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


def domain_of(job: Job) -> Domain:
    """The domain of a measuring job, with the trial's own parameters."""
    cache = Path(job["cache_dir"]) if "cache_dir" in job else None
    return make_domain(job["domain"], job["settings"], job.get("params", {}), job["seed"], cache)


def model_of(job: Job, domain: Domain) -> nn.Module:
    """The trial's best weights."""
    return domain.load(Path(job["weights"])).eval()


def file_of(job: Job) -> Path:
    """Where the deployed ONNX file of a trial lies."""
    return Path(job["state_dir"]) / "deployed.onnx"


def source(domain: Domain, model: str) -> nn.Module:
    """The model that is quantized: "teacher", or a checkpoint's path. InputError names what is wrong with a file."""
    return domain.teacher() if model == "teacher" else domain.load(Path(model)).eval()


def policy_of(weights: Path) -> QuantPolicy | None:
    """The policy by which a checkpoint is to be rounded; None for one that is deployed in floating point."""
    found = checkpoint.load(weights, "model").get("quantization")
    return QuantPolicy.from_data(found) if found else None


def export_fp32(domain: Domain, model: nn.Module, path: Path) -> float:
    """Write the deployed form of `model` as ONNX; its relative error against torch."""
    module, inputs, names_in, names_out = domain.deployed(model)
    return export_onnx(module, inputs[0], path, names_in, names_out)


def export_int8(domain: Domain, model: nn.Module, policy: QuantPolicy, path: Path) -> Report:
    """Write the INT8 file of `model` for ONNX Runtime; what was quantized, kept and why.

    Calibrated on the first training samples of the domain's seed. Raises InputError for what the policy asks and
    this model cannot give.
    """
    with _fp32(domain, model, path.parent) as fp32:
        return post_training(fp32, path, policy, feeds(domain, policy.calibration))


def compile_int8(
    domain: Domain, model: nn.Module, policy: QuantPolicy, path: Path, workload_hash: str
) -> dict[str, Any]:
    """Compile the TensorRT engine of `model` by the same policy and the same calibration; its manifest.

    Raises InputError where TensorRT is not installed or refuses the graph.
    """
    from engines import tensorrt_build

    samples = feeds(domain, policy.calibration)
    with _fp32(domain, model, path.parent) as fp32:
        source, _ = smoothed_file(fp32, policy, samples, fp32.parent)
        ranges = ranges_of(source, policy, samples)
        return tensorrt_build.compile_int8(source, path, policy, ranges, workload_hash)


def precision(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What an engine's manifest says of its layers, as extras of the record."""
    found = manifest["precision"]
    return {"trt_int8_share": found["int8_share"], "trt_keep_list_violations": len(found["keep_list_violations"])}


def ranges(domain: Domain, model: nn.Module, policy: QuantPolicy, folder: Path) -> dict[str, float]:
    """The magnitude at which the first input of every INT8 node is clipped, by the policy's calibration; node -> it."""
    with _fp32(domain, model, folder) as fp32:
        found = ranges_of(fp32, policy, feeds(domain, policy.calibration))
        nodes = {node.name: node for node in onnx.load(str(fp32)).graph.node}
        chosen = choices(onnx.load(str(fp32)), policy)
    firsts = {choice.node: found[nodes[choice.node].input[0]] for choice in chosen if choice.precision == "int8"}
    return {node: max(abs(low), abs(high)) for node, (low, high) in firsts.items()}


def choices_of(domain: Domain, model: nn.Module, *policies: QuantPolicy) -> list[list[Choice]]:
    """What each policy says of every layer of `model`. InputError for a pattern that matches none."""
    with TemporaryDirectory() as folder, _fp32(domain, model, Path(folder)) as fp32:
        graph = onnx.load(str(fp32))
    return [choices(graph, policy) for policy in policies]


def feeds(domain: Domain, count: int) -> list[Arrays]:
    """The deployed module's inputs for the first `count` training samples, batch 1."""
    found: list[Arrays] = []
    for rows in torch.split(torch.arange(count), CALIBRATION_BATCH):
        inputs = domain.inputs(domain.samples("train", rows))
        singles = (torch.split(tensor, 1) for tensor in inputs)
        found += [tuple(tensor.numpy() for tensor in sample) for sample in zip(*singles, strict=True)]
    return found


@contextmanager
def _fp32(domain: Domain, model: nn.Module, folder: Path) -> Iterator[Path]:
    with TemporaryDirectory(dir=folder, prefix=".export.") as scratch:
        path = Path(scratch) / "fp32.onnx"
        export_fp32(domain, model, path)
        yield path
