"""What sweeps/aq_fusion.py does beside training: the teacher is checked before, the probes are measured after it.

The functions are those of trainables/evaluate.py for a module that is no decoder, so that AQ-3 reports error rates
of the test shots, which had no part in choosing its weights. Nothing is deployed: the sweep asks for no latency.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trainables.alphaqubit.domain import AlphaQubit
from trainables.alphaqubit.fusion import HEADS, Head, load_probes
from trainables.alphaqubit.model import Decoder
from trainables.checkpoint import model_hash
from trainables.deploy import Job, domain_of
from trainables.evaluate import compile_engine, identify, measure_latency
from trainables.gates import paired_drop

__all__ = ["compile_engine", "identify", "measure_latency", "measure_quality", "prepare"]


def prepare(job: Job) -> None:
    """Nothing: one trial shares its teacher with nobody."""


def measure_quality(job: Job) -> dict[str, Any]:
    """LER of the fusion and its drop against the teacher's own readout; of every head `ler_*`, and of the probes
    `gain_*`: the share of the flips that are predicted rightly beyond those of the best constant answer, 1 = all.
    """
    torch.set_num_threads(1)
    domain = domain_of(job)
    teacher = domain.teacher()
    assert isinstance(domain, AlphaQubit) and isinstance(teacher, Decoder)
    own = reference = domain.evaluate(teacher, "test")["ler"]
    extra: dict[str, Any] = {"test_samples": len(own)}
    if job["weights"]:
        probes = load_probes(Path(job["weights"]), teacher)
        wrong = {name: domain.evaluate(Head(teacher, probes, name), "test")["ler"] for name in (*HEADS, "fused")}
        own, constant = wrong["fused"], domain.chance("test")
        extra |= {f"ler_{name}": float(values.mean()) for name, values in wrong.items()}
        extra |= {f"gain_{name}": 1 - float(wrong[name].mean()) / constant for name in HEADS}
        extra["weights"] = model_hash(probes)
    seed = job["settings"]["workload_seed"]
    change = paired_drop(own.numpy(), reference.numpy(), domain.lower_is_better, seed=seed)
    quality = float(own.mean())
    drops = {"drop": change.value, "drop_lo": change.lo, "drop_hi": change.hi}
    return {"quality": quality, "ler": quality, **drops, "parent": f"teacher:{model_hash(teacher)}", "extra": extra}
