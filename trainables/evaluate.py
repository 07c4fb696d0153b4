"""What is done beside training: what trials share is prepared, and finished models are measured.

Every function takes one job of plain data (see sweeps/spec.py) and runs as a Ray task. Quality is measured packed,
latency alone on its device and interleaved with the teacher, so that the ratio survives a noisy machine.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import nn

from engines import footprint
from engines.export import export_onnx
from engines.latency import environment, measure, summarise
from engines.runtimes import OnnxRuntime, TorchRuntime
from trainables.checkpoint import model_hash
from trainables.domain import Domain, make_domain
from trainables.gates import paired_drop
from trainables.teacher_cache import TeacherCache, inherited, teacher_metrics

Job = dict[str, Any]


def identify(job: Job) -> tuple[dict[str, str], dict[str, Any]]:
    """The hash of the teacher's content, under its setting's name, and the samples on which latency is measured.

    Writes nothing. InputError for a teacher that cannot serve.
    """
    domain = _domain(job)
    return {"teacher": model_hash(domain.teacher())}, domain.sampled()


def prepare(job: Job) -> None:
    """Fill the teacher cache and measure the teacher on validation data, before the first trial starts."""
    torch.set_num_threads(1)
    domain, settings, cache = _domain(job), job["settings"], Path(job["cache_dir"])
    domain.teacher()
    if job["trials"]:
        teacher_metrics(cache, domain, "val", full=False)
        if settings["init"] == "inherit":
            inherited(cache, domain)
        trials = [make_domain(job["domain"], settings, params, job["seed"]) for params in job["trials"]]
        states = any(signal.states for trial in trials for signal in trial.signals())
        shared = TeacherCache(cache, partial(_domain, job), settings["train_pairs"], states)
        shared.build(int(environment()["cores"] or 1), partial(_report, job))


def measure_quality(job: Job) -> dict[str, Any]:
    """Quality on the test split, used here and nowhere else, and the drop against the teacher on the same samples."""
    torch.set_num_threads(1)
    domain = _domain(job)
    teacher = teacher_metrics(Path(job["cache_dir"]), domain, "test", full=True)
    model = _model(job, domain) if job["weights"] else domain.teacher()
    own = domain.evaluate(model, "test", full=True) if job["weights"] else teacher
    primary = domain.primary
    change = paired_drop(
        own[primary].numpy(),
        teacher[primary].numpy(),
        domain.lower_is_better,
        seed=job["settings"]["workload_seed"],
    )
    means = {name: float(values.mean()) for name, values in own.items()}
    return {
        **means,
        "quality": means[primary],
        "drop": change.value,
        "drop_lo": change.lo,
        "drop_hi": change.hi,
        "parent": f"teacher:{model_hash(domain.teacher())}" if job["weights"] else None,
        "extra": {"test_samples": len(own[primary]), "weights": model_hash(model)},
    }


def measure_latency(job: Job) -> dict[str, Any]:
    """p50 and p95 of the deployed model (ONNX Runtime), in one interleaved run with torch and the teacher in both.

    p50_ratio: the teacher's p50 in torch over the own deployed p50 (2 = half the time, the plan's "p50 down 50 %").
    p50_ratio_same_runtime: the same with the teacher in ONNX Runtime too, so that it shows the model alone.
    Each with a paired bootstrap 95 % interval over rounds (_lo, _hi).
    """
    settings = job["settings"]
    device, threads = "cuda" if torch.cuda.is_available() else "cpu", settings["threads"]
    state = environment()
    domain = _domain(job)
    models = {"teacher": domain.teacher()}
    if job["weights"]:
        models["own"] = _model(job, domain)
    own = "own" if "own" in models else "teacher"
    module, inputs, names_in, names_out = domain.deployed(models[own])
    # Before the engines, which move the module to their device.
    weight = {"params_M": footprint.params_M(models[own]), "flops_G": footprint.flops_G(module, inputs[0])}
    memory = _memory(module, inputs[0], device)
    onnx = device == "cpu" or "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    calls: dict[str, Callable[[], object]] = {}
    engines: dict[str, TorchRuntime | OnnxRuntime] = {}
    errors, sizes = {}, {}
    for name, model in models.items():
        module, inputs, _, _ = domain.deployed(model.to("cpu"))
        path = Path(job["work_dir"]) / f"{name}_{model_hash(model)}.onnx"
        errors[name] = export_onnx(module, inputs[0], path, names_in, names_out)
        sizes[name] = footprint.size_MB(path)
        engines[f"{name} torch"] = TorchRuntime(module, device, threads)
        if onnx:
            engines[f"{name} onnxruntime"] = OnnxRuntime(path, device, threads)
    arrays = [tuple(tensor.numpy() for tensor in sample) for sample in inputs]
    calls = {name: _next_sample(engine, arrays) for name, engine in engines.items()}
    seed = settings["workload_seed"]
    samples = measure(calls, settings["warmup"], settings["repeats"], seed)
    for engine in engines.values():
        engine.close()
    runtime = "onnxruntime" if onnx else "torch"
    times = summarise(samples, "teacher torch", seed)
    best, plain = times[f"{own} {runtime}"], times[f"{own} torch"]
    same = summarise(samples, f"teacher {runtime}", seed)[f"{own} {runtime}"]
    extra = {
        "p50_lo": best.p50_lo,
        "p50_hi": best.p50_hi,
        "p95_lo": best.p95_lo,
        "p95_hi": best.p95_hi,
        "p50_torch_ms": plain.p50_ms,
        "p50_ratio": best.ratio,
        "p50_ratio_lo": best.ratio_lo,
        "p50_ratio_hi": best.ratio_hi,
        "p50_ratio_same_runtime": same.ratio,
        "p50_ratio_same_runtime_lo": same.ratio_lo,
        "p50_ratio_same_runtime_hi": same.ratio_hi,
        "export_error": errors[own],
        "threads": threads,
        **{key: value for key, value in state.items() if value is not None},
    }
    return {
        **weight,
        "size_MB": sizes[own],
        "vram_GB": memory if device == "cuda" else None,
        "t_pair_p50_ms": best.p50_ms,
        "t_pair_p95_ms": best.p95_ms,
        "pairs_per_sec": 1000.0 / best.p50_ms,
        "engine": runtime,
        "device": str(state.get("gpu") or state["cpu"]),
        "notes": None if onnx else "timed in torch: this onnxruntime has no CUDA (install onnxruntime-gpu)",
        "extra": {**extra, **({} if device == "cuda" else {"ram_GB": memory})},
    }


def _report(job: Job, done: int, total: int) -> None:
    """Say how far the teacher's outputs are, where somebody asked for it; the file appears whole."""
    if "report" in job:
        path = Path(job["report"])
        partial_ = path.with_name(f"{path.name}.tmp")
        partial_.write_text(json.dumps(["pairs of the teacher's outputs", done, total]))
        partial_.replace(path)


def _domain(job: Job) -> Domain:
    return make_domain(job["domain"], job["settings"], job.get("params", {}), job["seed"])


def _model(job: Job, domain: Domain) -> nn.Module:
    return domain.load(Path(job["weights"])).eval()


def _next_sample(engine: TorchRuntime | OnnxRuntime, samples: list[tuple[np.ndarray, ...]]) -> Callable[[], object]:
    turn = cycle(samples)
    return lambda: engine.run(next(turn))


def _memory(module: nn.Module, sample: tuple[torch.Tensor, ...], device: str) -> float | None:
    def once() -> None:
        # A copy, so that the weights count too.
        with torch.no_grad():
            copy.deepcopy(module).to(device)(*(tensor.to(device) for tensor in sample))

    return footprint.peak_vram_GB(once, device) if device == "cuda" else footprint.peak_ram_GB(once)
