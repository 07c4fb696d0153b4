"""What is done beside training: what trials share is prepared, and finished models are measured.

Every function takes one job of plain data (see sweeps/spec.py) and runs as a Ray task. Quality is measured packed,
latency alone on its device and interleaved with the teacher, so that the ratio survives a noisy machine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from engines import footprint
from engines.export import export_onnx
from engines.latency import environment, interleaved
from engines.runtimes import OnnxRuntime, TorchRuntime
from trainables.checkpoint import model_hash
from trainables.domain import Domain, make_domain
from trainables.gates import paired_drop
from trainables.schedules import Schedule
from trainables.teacher_cache import TeacherCache, inherited, teacher_metrics

Job = dict[str, Any]


def prepare(job: Job) -> dict[str, Any]:
    """Fill the teacher cache and measure the teacher on validation data, before the first trial starts.

    Returns the samples on which latency is measured, for the workload's file.
    """
    torch.set_num_threads(1)
    domain, settings, cache = _domain(job), job["settings"], Path(job["cache_dir"])
    domain.teacher()
    if job["trains"]:
        teacher_metrics(cache, domain, "val", full=False)
        if settings["init"] == "inherit":
            inherited(cache, domain)
        states = any(Schedule.from_data(settings["gamma"]).values)
        make = partial(_domain, job)
        TeacherCache(cache, make, settings["train_pairs"], states).build(workers=int(environment()["cores"] or 1))
    return domain.sampled()


def measure_quality(job: Job) -> dict[str, Any]:
    """Quality on the test split, used here and nowhere else, and the drop against the teacher on the same samples."""
    torch.set_num_threads(1)
    domain = _domain(job)
    teacher = teacher_metrics(Path(job["cache_dir"]), domain, "test", full=True)
    own = domain.evaluate(_model(job, domain), "test", full=True) if job["weights"] else teacher
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
        "extra": {"test_samples": len(own[primary])},
    }


def measure_latency(job: Job) -> dict[str, Any]:
    """p50 and p95 of the deployed model (ONNX Runtime), in one interleaved run with torch and the teacher in both.

    p50_ratio: the teacher's p50 in torch over the own deployed p50 (2 = half the time, the plan's "p50 down 50 %").
    p50_ratio_same_runtime: the same with the teacher in ONNX Runtime too, so that it shows the model alone.
    """
    settings = job["settings"]
    device, threads = "cuda" if torch.cuda.is_available() else "cpu", settings["threads"]
    state = environment()
    domain = _domain(job)
    folder = Path(job["work_dir"])
    models = {"teacher": domain.teacher()}
    if job["weights"]:
        models["own"] = _model(job, domain)
    calls: dict[str, Callable[[], object]] = {}
    runtimes: list[TorchRuntime | OnnxRuntime] = []
    size = error = 0.0
    for name, model in models.items():
        module, inputs, names_in, names_out = domain.deployed(model)
        path = folder / f"{name}_{model_hash(model)}.onnx"
        error = export_onnx(module, inputs[0], path, names_in, names_out)
        size = footprint.size_MB(path)
        arrays = [tuple(tensor.numpy() for tensor in sample) for sample in inputs]
        for engine in (TorchRuntime(module, device, threads), OnnxRuntime(path, device, threads)):
            runtimes.append(engine)
            calls[f"{name} {engine.name}"] = _next_sample(engine, arrays)
    own = "own" if "own" in models else "teacher"
    torch_name, onnx_name = runtimes[0].name, runtimes[1].name
    times = interleaved(
        calls, f"teacher {torch_name}", settings["warmup"], settings["repeats"], settings["workload_seed"]
    )
    for engine in runtimes:
        engine.close()
    best, plain = times[f"{own} {onnx_name}"], times[f"{own} {torch_name}"]
    same = times[f"teacher {onnx_name}"].p50_ms / best.p50_ms
    module, inputs, _, _ = domain.deployed(models[own])
    extra = {
        "p50_lo": best.p50_lo,
        "p50_hi": best.p50_hi,
        "p95_lo": best.p95_lo,
        "p95_hi": best.p95_hi,
        "p50_torch_ms": plain.p50_ms,
        "p50_ratio": best.ratio,
        "p50_ratio_lo": best.ratio_lo,
        "p50_ratio_hi": best.ratio_hi,
        "p50_ratio_same_runtime": same,
        "export_error": error,
        "threads": threads,
        **{key: value for key, value in state.items() if value is not None},
    }
    memory = _memory(domain, models[own], device)
    return {
        "params_M": footprint.params_M(models[own]),
        "flops_G": footprint.flops_G(module, inputs[0]),
        "size_MB": size,
        "vram_GB": memory if device == "cuda" else None,
        "t_pair_p50_ms": best.p50_ms,
        "t_pair_p95_ms": best.p95_ms,
        "pairs_per_sec": 1000.0 / best.p50_ms,
        "engine": onnx_name,
        "device": str(state.get("gpu") or state["cpu"]),
        "extra": {**extra, **({} if device == "cuda" else {"ram_GB": memory})},
    }


def _domain(job: Job) -> Domain:
    return make_domain(job["domain"], job["settings"], job.get("params", {}), job["seed"])


def _model(job: Job, domain: Domain) -> nn.Module:
    return domain.load(Path(job["weights"])).eval()


def _next_sample(engine: TorchRuntime | OnnxRuntime, samples: list[tuple[np.ndarray, ...]]) -> Callable[[], object]:
    turn = cycle(samples)
    return lambda: engine.run(next(turn))


def _memory(domain: Domain, model: nn.Module, device: str) -> float | None:
    module, inputs, _, _ = domain.deployed(model)

    def once() -> None:
        with torch.no_grad():
            module.to(device)(*(tensor.to(device) for tensor in inputs[0]))

    return footprint.peak_vram_GB(once, device) if device == "cuda" else footprint.peak_ram_GB(once)
