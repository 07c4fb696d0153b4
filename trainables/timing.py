"""Latency and footprint of a finished model, alone on its device and interleaved with its teacher.

Candidates take turns in random order within each round, so ratios between them survive a noisy machine.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnxruntime
import torch
from torch import nn

from engines import footprint, peers
from engines.errors import InputError
from engines.export import export_onnx, publish
from engines.latency import environment, measure, summarise
from engines.policy import QuantPolicy
from engines.runtimes import Arrays, OnnxRuntime, Runtime, TorchRuntime
from engines.tensorrt_run import TensorRTRuntime
from trainables import deploy
from trainables.deploy import Job, domain_of, model_of
from trainables.domain import Domain, answering

# The record's name of a ratio -> the candidate that it refers to; each is that candidate's p50 over the deployed one's.
RATIOS = {
    "p50_ratio": "teacher torch",
    "p50_ratio_same_runtime": "teacher onnxruntime",
    "p50_ratio_fp32": "own torch",
    "p50_ratio_onnxruntime": "own onnxruntime",
}

# What stands for the model where it can be run, the first of these; and those that run its INT8 form.
DEPLOYED = ("own tensorrt", "own int8", "own onnxruntime", "own torch", "teacher onnxruntime", "teacher torch")
INT8 = {"own int8": "onnxruntime int8", "own tensorrt": "tensorrt int8"}


def measure_latency(job: Job) -> dict[str, Any]:
    """p50 and p95 of the deployed file, in one interleaved run with the FP32 model and the teacher in torch and ONNX.

    Ratios (2 = half the time, the plan's "p50 down 50 %"): p50_ratio against the teacher in torch,
    p50_ratio_same_runtime against the teacher in the same runtime (what the smaller model gains alone), p50_ratio_fp32
    against the own FP32 form in torch, p50_ratio_onnxruntime against that in ONNX Runtime (what INT8 gains alone).
    Each has an interval over the paired rounds.
    """
    settings, state = job["settings"], environment()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    onnx = device == "cpu" or "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    domain = domain_of(job)
    with TemporaryDirectory(dir=job["work_dir"], prefix=".timing.") as folder:
        engines, found = _candidates(job, domain, device, Path(folder), onnx)
        with ExitStack() as stack:
            for engine in engines.values():
                stack.callback(engine.close)
            arrays = [
                tuple(tensor.numpy() for tensor in sample) for sample in domain.deployed(answering(domain.teacher()))[1]
            ]
            calls = {name: _next_sample(engine, arrays) for name, engine in engines.items()}
            seed = settings["workload_seed"]
            samples = measure(calls, settings["warmup"], settings["repeats"], seed)
        names = list(samples)
        own = next(name for name in DEPLOYED if name in names)
        times = {name: summarise(samples, name, seed) for name in names if name in RATIOS.values() or name == own}
        best = times[own][own]
        model = model_of(job, domain) if job["weights"] else answering(domain.teacher())
        pace = domain.pace(model, best.p50_ms, device, found["policy"], found["file"])
    extra: dict[str, Any] = {key: getattr(best, key) for key in ("p50_lo", "p50_hi", "p95_lo", "p95_hi")}
    for key, reference in RATIOS.items():
        if reference in times and (own in INT8 or reference != "own onnxruntime"):
            ratio = times[reference][own]
            extra |= {key: ratio.ratio, f"{key}_lo": ratio.ratio_lo, f"{key}_hi": ratio.ratio_hi}
    kind = own.split()[0]
    for name in names:
        who, runtime = name.split(maxsplit=1)
        if who == kind and name != own:
            extra[f"p50_{runtime.replace(' ', '_')}_ms"] = times[own][name].p50_ms
    runtime = "onnxruntime" if onnx else "torch"
    return {
        **found["fields"],
        "t_pair_p50_ms": best.p50_ms,
        "t_pair_p95_ms": best.p95_ms,
        "t_scene_s": pace.pop("t_scene_s", None),
        "pairs_per_sec": 1000.0 / best.p50_ms,
        "engine": INT8.get(own, runtime),
        "device": str(state.get("gpu") or state["cpu"]),
        "notes": "; ".join(found["notes"]) or None,
        "extra": {
            **extra,
            **found["extra"],
            **pace,
            "threads": settings["threads"],
            **{key: value for key, value in state.items() if value is not None},
        },
    }


def _candidates(
    job: Job, domain: Domain, device: str, folder: Path, onnx: bool
) -> tuple[dict[str, Runtime], dict[str, Any]]:
    """Everything that is timed, by name, and what was measured of the own model on the way."""
    threads = job["settings"]["threads"]
    models = {"teacher": answering(domain.teacher())}
    if job["weights"]:
        models["own"] = model_of(job, domain)
    own = "own" if "own" in models else "teacher"
    engines: dict[str, Runtime] = {}
    notes = [] if onnx else ["timed in torch: this onnxruntime has no CUDA (install onnxruntime-gpu)"]
    for name, model in models.items():
        module, inputs, names_in, names_out = domain.deployed(model)
        if name == own:  # before the engines, which move the module to their device
            flops = footprint.flops_G(module, inputs[0])
            memory = _memory(module, inputs[0], device)
        path = folder / f"{name}.onnx"
        error = export_onnx(module, inputs[0], path, names_in, names_out)
        if name == own:
            fields = {
                "params_M": footprint.params_M(model),
                "flops_G": flops,
                "size_MB": footprint.size_MB(path),
                "vram_GB": memory if device == "cuda" else None,
            }
            extra: dict[str, Any] = {"export_error": error, **({} if device == "cuda" else {"ram_GB": memory})}
        engines[f"{name} torch"] = TorchRuntime(module, device, threads)
        if onnx:
            engines[f"{name} onnxruntime"] = OnnxRuntime(path, device, threads)
        if name == own and job["settings"]["peers"]:
            more, left_out = peers.runtimes(module, path, inputs[0], device, threads)
            engines |= {f"{name} {peer}": engine for peer, engine in more.items()}
            notes += left_out
    policy = deploy.policy_of(Path(job["weights"])) if job["weights"] else None
    if policy:
        path = deploy.file_of(job)
        if not path.exists():
            deploy.export_int8(domain, models["own"], policy, path)
        engines["own int8"] = OnnxRuntime(path, "cpu", threads)
        extra["size_fp32_MB"] = fields["size_MB"]
        fields["size_MB"] = footprint.size_MB(path)
        if device == "cuda":
            engine = _tensorrt(job, domain, models["own"], policy)
            if isinstance(engine, TensorRTRuntime):
                engines["own tensorrt"] = engine
                extra |= {"trt": "executed", **deploy.precision(engine.manifest)}
            else:
                notes.append(engine)
    elif job["weights"]:
        publish(path, deploy.file_of(job))
        path = deploy.file_of(job)
    file = path if onnx or policy else None
    return engines, {"fields": fields, "extra": extra, "notes": notes, "policy": policy, "file": file}


def _tensorrt(job: Job, domain: Domain, model: nn.Module, policy: QuantPolicy) -> TensorRTRuntime | str:
    """The INT8 engine for this GPU, built unless it lies there already; why there is none, where it cannot be."""
    path, workload = Path(job["state_dir"]) / "deployed.trt", job["workload_hash"]
    try:
        try:
            return TensorRTRuntime(path, "cuda", workload, cuda_graph=True)
        except InputError:  # not built yet, or elsewhere
            deploy.compile_int8(domain, model, policy, path, workload)
            return TensorRTRuntime(path, "cuda", workload, cuda_graph=True)
    except InputError as error:
        return f"not timed in TensorRT: {error}"


def _next_sample(engine: Runtime, samples: list[Arrays]) -> Callable[[], object]:
    turn = cycle(samples)
    return lambda: engine.run(next(turn))


def _memory(module: nn.Module, sample: tuple[torch.Tensor, ...], device: str) -> float | None:
    def once() -> None:
        # A copy, so that the weights count too.
        with torch.no_grad():
            copy.deepcopy(module).to(device)(*(tensor.to(device) for tensor in sample))

    return footprint.peak_vram_GB(once, device) if device == "cuda" else footprint.peak_ram_GB(once)
