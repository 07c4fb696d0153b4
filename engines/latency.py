"""Latency of several candidates on a noisy machine: interleaved rounds, then paired statistics.

A round runs every candidate once in a random order, so that a slow second of the machine hits all of them
and the ratio to the reference survives. The clock (`measure`) and the statistics (`summarise`) are apart.
"""

from __future__ import annotations

import gc
import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engines.errors import InputError

Samples = npt.NDArray[np.float64]

_LEVEL = 0.95
_RESAMPLES = 2000
# Resamples are drawn in blocks of about this many indices, so that memory does not grow with the rounds.
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Latency:
    """Latency of one candidate over `repeats` rounds; times in milliseconds.

    `_lo` and `_hi` bound 95 % bootstrap intervals (rounds resampled with replacement). `ratio` is the
    reference's p50 over the own p50 (2 = twice as fast as the reference); its interval resamples the same
    rounds for both.
    """

    p50_ms: float
    p95_ms: float
    p50_lo: float
    p50_hi: float
    p95_lo: float
    p95_hi: float
    ratio: float
    ratio_lo: float
    ratio_hi: float
    repeats: int


def interleaved(
    candidates: Mapping[str, Callable[[], object]], reference: str, warmup: int, repeats: int, seed: int
) -> dict[str, Latency]:
    """Time `candidates` against `candidates[reference]`; see `measure` and `summarise`.

    Raises:
        InputError: no candidate of the name `reference`, `warmup` < 0 or `repeats` < 2.
    """
    _check_reference(candidates, reference)
    return summarise(measure(candidates, warmup, repeats, seed), reference, seed)


def measure(candidates: Mapping[str, Callable[[], object]], warmup: int, repeats: int, seed: int) -> dict[str, Samples]:
    """Milliseconds per call of each candidate, shape (repeats,); index i of all belongs to round i.

    `warmup` whole rounds come first and are not recorded. The order within a round is random (from `seed`).
    A call ends when the CUDA work that it started has ended. The garbage collector is off during all
    rounds.

    Raises:
        InputError: no candidates, `warmup` < 0 or `repeats` < 2. What a candidate raises is passed on.
    """
    if not candidates:
        raise InputError("no candidates to time: give at least one")
    if warmup < 0 or repeats < 2:
        raise InputError(f"warmup={warmup}, repeats={repeats}: expected warmup >= 0 and repeats >= 2")
    names = list(candidates)
    rng = np.random.default_rng(seed)
    times = np.empty((len(names), repeats))
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(-warmup, repeats):
            for i in rng.permutation(len(names)):
                elapsed = _time_ns(candidates[names[i]])
                if turn >= 0:
                    times[i, turn] = elapsed * 1e-6
    finally:
        if collecting:
            gc.enable()
    return {name: times[i] for i, name in enumerate(names)}


def summarise(samples: Mapping[str, Samples], reference: str, seed: int) -> dict[str, Latency]:
    """Percentiles (linear interpolation), bootstrap intervals and ratios of paired `samples`.

    Args:
        samples: milliseconds per name, each of shape (rounds,), index = round.
        reference: the name that ratios refer to.
        seed: of the resampling.

    Raises:
        InputError: no samples of the name `reference`, different lengths, fewer than two rounds, or a time
            that is not
            finite and positive.
    """
    _check_reference(samples, reference)
    shapes = {name: np.shape(values) for name, values in samples.items()}
    rounds = len(samples[reference])
    if rounds < 2 or any(shape != (rounds,) for shape in shapes.values()):
        raise InputError(f"samples have shapes {shapes}: expected one length of at least 2 rounds for all")
    table = np.stack([np.asarray(values, dtype=np.float64) for values in samples.values()])
    if not (np.isfinite(table) & (table > 0)).all():
        raise InputError("samples hold a time that is not finite and positive; measure again")

    ref = list(samples).index(reference)
    p50, p95 = np.quantile(table, [0.5, 0.95], axis=1)
    boot50, boot95 = _bootstrap(table, seed)
    tail = (1 - _LEVEL) / 2

    def interval(values: Samples) -> tuple[float, float]:
        lo, hi = np.quantile(values, [tail, 1 - tail])
        return float(lo), float(hi)

    result = {}
    for i, name in enumerate(samples):
        ratio_lo, ratio_hi = interval(boot50[ref] / boot50[i])
        p50_lo, p50_hi = interval(boot50[i])
        p95_lo, p95_hi = interval(boot95[i])
        result[name] = Latency(
            p50_ms=float(p50[i]),
            p95_ms=float(p95[i]),
            p50_lo=p50_lo,
            p50_hi=p50_hi,
            p95_lo=p95_lo,
            p95_hi=p95_hi,
            ratio=float(p50[ref] / p50[i]),
            ratio_lo=ratio_lo,
            ratio_hi=ratio_hi,
            repeats=rounds,
        )
    return result


def environment() -> dict[str, str | float | int | None]:
    """What a latency depends on beside the code, for the record.

    cpu (model name), isa (what torch's kernels use, and VNNI), cores (that this process may use), load_1m
    (runnable processes, mean of the last minute: ask BEFORE measuring), gpu (name, None without one).
    """
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        info = ""
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    # avx_vnni or avx512_vnni on x86: the 8-bit dot product that decides what INT8 can gain.
    vnni = re.search(r"^flags\s*:.*\bavx(512)?_vnni\b", info, re.MULTILINE) is not None
    cuda = torch.cuda.is_available()
    return {
        "cpu": model.group(1).strip() if model else platform.processor() or platform.machine(),
        "isa": torch.backends.cpu.get_cpu_capability() + ("+VNNI" if vnni else ""),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "load_1m": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if cuda else None,
    }


def _check_reference(names: Mapping[str, object], reference: str) -> None:
    if reference not in names:
        raise InputError(f"reference={reference!r}: expected one of {sorted(names)}")


def _time_ns(call: Callable[[], object]) -> int:
    _synchronize()
    start = time.perf_counter_ns()
    result = call()
    _synchronize()
    elapsed = time.perf_counter_ns() - start
    del result  # freeing the outputs is not part of the call
    return elapsed


def _synchronize() -> None:
    cuda: Any = torch.cuda  # typed in part only
    if cuda.is_initialized():
        torch.cuda.synchronize()


def _bootstrap(table: Samples, seed: int) -> tuple[Samples, Samples]:
    """p50 and p95, each (candidates, resamples), over the same resampled rounds for all candidates."""
    rounds = table.shape[1]
    rng = np.random.default_rng(seed)
    step = max(1, _BLOCK // rounds)
    parts = []
    for start in range(0, _RESAMPLES, step):
        index = rng.integers(rounds, size=(min(step, _RESAMPLES - start), rounds))
        parts.append(np.stack([np.quantile(row[index], [0.5, 0.95], axis=1) for row in table]))
    both = np.concatenate(parts, axis=2)
    return both[:, 0], both[:, 1]
