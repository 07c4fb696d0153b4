"""What is done beside training: what trials share is prepared, and finished models are measured.

Every function takes one job of plain data (see sweeps/spec.py) and runs as a Ray task. Quality is measured packed,
latency alone on its device and interleaved with the teacher, so that the ratio survives a noisy machine.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from engines.errors import InputError
from engines.footprint import params_M
from engines.latency import environment
from trainables import checkpoint, deploy
from trainables.checkpoint import model_hash
from trainables.config import WORDS, PruneSettings, QuantSettings
from trainables.deploy import Job, domain_of, model_of
from trainables.domain import Domain, answering
from trainables.gates import Drop, paired_drop
from trainables.teacher_cache import TeacherCache, inherited, pruned, teacher_metrics
from trainables.timing import measure_latency

__all__ = ["compile_engine", "identify", "measure_latency", "measure_quality", "prepare"]


def identify(job: Job) -> tuple[dict[str, str], dict[str, Any]]:
    """The hash of the teacher's content, under its setting's name, and the samples on which latency is measured.

    Writes nothing. InputError for a teacher or model that cannot serve, and for what no trial can do with it: a
    keep-list pattern that matches no layer, ratios that leave a layer empty.
    """
    domain, settings = domain_of(job), job["settings"]
    models = {"teacher": domain.teacher()}
    if settings.get("model", "teacher") not in WORDS:
        models["model"] = domain.load(Path(settings["model"])).eval()
    for key, model in models.items():
        _refuse_broken(model, f"{key}={settings[key]}")
    sampled = domain.sampled()
    trials = [{**settings, **params} for params in job["trials"]]
    if "rho" in settings:
        for params in job["trials"]:
            domain_of({**job, "params": params}).widths()
    if "model" in settings and "bits_w" not in settings:
        for params in job["trials"]:  # the student that a stage goes on from
            student = domain_of({**job, "params": params}).student(inherit=False)
        if job["trials"] and params_M(student) > params_M(models["teacher"]):
            print(
                f"warning: the student has more parameters ({1e6 * params_M(student):,.0f}) than its teacher "
                f"({1e6 * params_M(models['teacher']):,.0f}): give a larger teacher with --set teacher=FILE",
                file=sys.stderr,
            )
    if "bits_w" in settings:
        source = models.get("model", models["teacher"])
        deploy.choices_of(domain, source, *(QuantSettings.among(trial).policy for trial in trials))
    return {key: model_hash(model) for key, model in models.items()} | domain.contents(), sampled


def _refuse_broken(model: nn.Module, what: str) -> None:
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise InputError(f"{what}: its weight {name} holds NaN or infinity; give the file of a sound training")


def prepare(job: Job) -> None:
    """Fill the teacher cache and measure the teacher on validation data, before the first trial starts."""
    torch.set_num_threads(1)
    domain, settings, cache = domain_of(job), job["settings"], Path(job["cache_dir"])
    domain.teacher()
    if job["trials"]:
        teacher_metrics(cache, domain, "val", full=False)
        trials = [domain_of({**job, "params": params}) for params in job["trials"]]
        if settings.get("init") == "inherit":
            inherited(cache, domain)
        if "rho" in settings:
            for trial, params in zip(trials, job["trials"], strict=True):
                pruned(cache, trial, PruneSettings.among({**settings, **params}).steps)
        if "bits_w" in settings:
            return  # rounding alone may do, and then no training sample is ever needed
        states = any(signal.states for trial in trials for signal in trial.signals())
        for seed in job.get("seeds") or [job["seed"]]:  # each has training samples of its own
            own = partial(domain_of, {**job, "seed": seed})
            shared = TeacherCache(cache, own, settings["train_samples"], states)
            shared.build(int(environment()["cores"] or 1), partial(_report, job))


def measure_quality(job: Job) -> dict[str, Any]:
    """Quality on the test split, used here and nowhere else, and the drop against the teacher on the same samples."""
    torch.set_num_threads(1)
    domain = domain_of(job)
    teacher = teacher_metrics(Path(job["cache_dir"]), domain, "test", full=True)
    model = original = answering(domain.teacher())
    own, reference = teacher, f"teacher:{model_hash(original)}"
    more: dict[str, Any] = {}
    if job["weights"]:
        model = model_of(job, domain)
        deployed, more = _deployed(job, domain, model)
        own = domain.evaluate(deployed, "test", full=True)
        more["parent"], ancestry = _lineage(job, domain, own, reference)
        more["extra"] = {
            **more.get("extra", {}),
            **ancestry,
            **_trained(job, domain, own, teacher),
            "reference": reference,
        }
        np.save(Path(job["state_dir"]) / "test_costs.npy", _costs(own, domain))
    primary = domain.primary
    change = _drop(job, domain, own, teacher)
    means = {name: float(values.mean()) for name, values in own.items()}
    beside = domain.compare(own, "test")
    size = {"params_down": 1 - params_M(model) / params_M(original)} if job["weights"] else {}
    return {
        **means,
        "quality": means[primary],
        "drop": change.value,
        "drop_lo": change.lo,
        "drop_hi": change.hi,
        "parent": None,
        **more,
        "extra": {
            "test_samples": len(own[primary]),
            "weights": model_hash(model),
            **size,
            **beside,
            **more.get("extra", {}),
        },
    }


def _deployed(job: Job, domain: Domain, model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """What is evaluated: the model itself or, of a quantized one, the INT8 file; with the fields that say so."""
    policy = deploy.policy_of(Path(job["weights"]))
    if policy is None:
        return model, {}
    path = deploy.file_of(job)
    report = deploy.export_int8(domain, model, policy, path)
    said = {"bits_w": policy.bits_w, "bits_a": policy.bits_a, "keep_list": ", ".join(policy.keep)}
    counts = {f"layers_{precision}": report.count(precision) for precision in ("int8", "kept")}
    return deploy.Engine(path), {**said, "extra": counts}


def _lineage(job: Job, domain: Domain, own: dict[str, Tensor], reference: str) -> tuple[str, dict[str, float]]:
    """Where a model comes from: the teacher, or the student that it is an INT8 form of, with the drop against that."""
    name = job["settings"].get("model", "teacher")
    if name in WORDS:
        return reference, {}
    source = domain.load(Path(name)).eval()
    change = _drop(job, domain, own, domain.evaluate(source, "test", full=True))
    found = {"drop_to_student": change.value, "drop_to_student_lo": change.lo, "drop_to_student_hi": change.hi}
    return f"student:{model_hash(source)}", found


def _trained(job: Job, domain: Domain, own: dict[str, Tensor], teacher: dict[str, Tensor]) -> dict[str, Any]:
    """How a quantized model's weights came about (PTQ, FP fine-tuning, QAT); where they were trained, the drop of
    rounding alone, and the own one against that.
    """
    content = checkpoint.load(Path(job["weights"]))
    if "quantization" not in content:
        return {}
    route = content["origin"].get("route", "PTQ")
    if route == "PTQ":
        return {"route": route}
    with TemporaryDirectory(dir=job["work_dir"]) as folder:
        path, asked = Path(folder) / "ptq.onnx", QuantSettings.among({**job["settings"], **job["params"]})
        deploy.export_int8(domain, deploy.source(domain, asked.model), asked.policy, path)
        rounded = domain.evaluate(deploy.Engine(path), "test", full=True)
    drops = {"ptq_drop": _drop(job, domain, rounded, teacher), "drop_to_ptq": _drop(job, domain, own, rounded)}
    ends = {"": "value", "_lo": "lo", "_hi": "hi"}
    numbers = {f"{name}{end}": getattr(change, field) for name, change in drops.items() for end, field in ends.items()}
    return {"route": route, **numbers}


def _drop(job: Job, domain: Domain, own: dict[str, Tensor], reference: dict[str, Tensor]) -> Drop:
    values, base = (metrics[domain.primary].numpy() for metrics in (own, reference))
    return paired_drop(values, base, domain.lower_is_better, seed=job["settings"]["workload_seed"])


def _costs(own: dict[str, Tensor], domain: Domain) -> npt.NDArray[np.floating]:
    """The primary metric per sample, lower = better: what ablations pair."""
    values = own[domain.primary].numpy()
    return values if domain.lower_is_better else -values


def compile_engine(job: Job) -> dict[str, Any]:
    """Leave the TensorRT engine of a quantized trial in its folder, and say what came of it."""
    torch.set_num_threads(1)
    domain, path = domain_of(job), Path(job["state_dir"]) / "deployed.trt"
    policy = deploy.policy_of(Path(job["weights"]))
    assert policy is not None
    made = deploy.compile_int8(domain, model_of(job, domain), policy, path, job["workload_hash"])
    return {"trt": made["label"], **deploy.precision(made)}


def _report(job: Job, done: int, total: int) -> None:
    """Say how far the teacher's outputs are, where somebody asked for it; the file appears whole."""
    if "report" in job:
        path = Path(job["report"])
        partial_ = path.with_name(f"{path.name}.tmp")
        partial_.write_text(json.dumps(["samples of the teacher's outputs", done, total]))
        partial_.replace(path)
