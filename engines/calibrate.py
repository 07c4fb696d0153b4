"""Ranges of activations over calibration samples, seen by ONNX Runtime.

Sample by sample, with a histogram per tensor that widens as values demand it, so that memory does not grow with
the number of samples.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from engines.errors import InputError
from engines.policy import METHODS
from engines.runtimes import Array, Arrays, OnnxRuntime

Ranges = Mapping[str, Sequence[float]]

_BINS = 4096
_TAIL = 1e-4  # percentile: share of the values that is cut off at either end
_LEVELS = 128  # entropy: levels of a magnitude in 8 bits


def calibrate(
    onnx_path: str | Path, feeds: Iterable[Arrays], tensors: Sequence[str], method: str, samples: int
) -> dict[str, tuple[float, float]]:
    """The range (lo, hi) of each tensor over the first `samples` of `feeds`; plain data, so JSON takes it.

    minmax: the extremes. percentile: without the outermost 0.01 % at either end. entropy: clipped at the
    magnitude where the values in 8 bits are nearest, in Kullback-Leibler divergence, to the values themselves.

    Args:
        feeds: the model's inputs, one tuple of arrays per sample.
        tensors: names of tensors in the graph.

    Raises:
        InputError: an unknown method or tensor, fewer samples than asked, a NaN or infinite activation.
    """
    if method not in METHODS:
        raise InputError(f"method={method!r}: expected one of {', '.join(METHODS)}")
    seen = {name: _Histogram() for name in tensors}
    for found in _observe(onnx_path, feeds, tensors, samples):
        for name, array in found.items():
            seen[name].add(array, count=method != "minmax")
    return {name: histogram.range(method) for name, histogram in seen.items()}


def channel_maxima(
    onnx_path: str | Path, feeds: Iterable[Arrays], tensors: Sequence[str], samples: int
) -> dict[str, Array]:
    """Largest magnitude of each tensor in each of its last axis' channels, (channels,); raises as `calibrate`."""
    top: dict[str, Array] = {}
    for found in _observe(onnx_path, feeds, tensors, samples):
        for name, array in found.items():
            here = np.abs(array).reshape(-1, array.shape[-1]).max(axis=0)
            top[name] = np.maximum(top[name], here) if name in top else here
    return top


def _observe(
    onnx_path: str | Path, feeds: Iterable[Arrays], tensors: Sequence[str], samples: int
) -> Iterator[dict[str, Array]]:
    """Values of `tensors` for each sample."""
    if samples < 1:
        raise InputError(f"samples={samples}: expected at least 1 calibration sample")
    if not tensors:
        return
    path = Path(onnx_path)
    if not path.is_file():
        raise InputError(f"{path}: no such ONNX file; export the model there first")
    model = onnx.load(str(path), load_external_data=False)
    known = {name for node in model.graph.node for name in node.output} | {i.name for i in model.graph.input}
    unknown = sorted(set(tensors) - known)
    if unknown:
        raise InputError(f"{path}: no tensor {unknown[0]!r} to calibrate; take the names from its graph")
    names = list(dict.fromkeys(tensors))
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    # Beside the model: weights in a file of their own are found there.
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".onnx") as file:
        file.write(model.SerializeToString())
        file.flush()
        runtime = OnnxRuntime(file.name, "cpu", threads=1)
    count = 0
    try:
        for count, feed in enumerate(islice(feeds, samples), start=1):
            found = dict(zip(names, runtime.run(feed), strict=True))
            for name, array in found.items():
                # A sum is finite exactly where all terms are, and needs no array of its own.
                if not np.isfinite(array.sum(dtype=np.float64)):
                    raise InputError(f"sample {count}: activation {name!r} is NaN or infinite; check model and data")
            yield found
    finally:
        runtime.close()
    if count < samples:
        raise InputError(f"{count} calibration samples, asked for {samples}; give more data or a smaller calibration")


class _Histogram:
    """Counts over [-width, width]; `width` doubles, merging pairs of bins, whenever a value lies outside."""

    def __init__(self) -> None:
        self.lo, self.hi, self.width = np.inf, -np.inf, 0.0
        self.counts: npt.NDArray[np.int64] = np.zeros(_BINS, dtype=np.int64)

    def add(self, array: Array, count: bool) -> None:
        lo, hi = float(array.min()), float(array.max())
        self.lo, self.hi = min(self.lo, lo), max(self.hi, hi)
        if not count:
            return
        top = max(-lo, hi)
        if self.width == 0.0:
            # A power of two: every later width is a doubling of the first, and its bins are unions of pairs.
            self.width = float(2.0 ** np.ceil(np.log2(max(top, 1e-30))))
        while top > self.width:
            merged = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.pad(merged, _BINS // 4)
            self.width *= 2
        # np.histogram does the same several times as slowly.
        bins = np.floor(array.ravel() * np.float64(_BINS / 2 / self.width)).astype(np.int32) + _BINS // 2
        self.counts += np.bincount(np.minimum(bins, _BINS - 1), minlength=_BINS)

    def range(self, method: str) -> tuple[float, float]:
        if method == "minmax":
            return self.lo, self.hi
        if method == "percentile":
            share = np.cumsum(self.counts) / self.counts.sum()
            edges = np.linspace(-self.width, self.width, _BINS + 1)
            low = edges[np.searchsorted(share, _TAIL, side="right")]
            high = edges[np.searchsorted(share, 1 - _TAIL, side="left") + 1]
            return max(self.lo, float(low)), min(self.hi, float(high))
        half = _BINS // 2
        magnitudes = self.counts[half:] + self.counts[:half][::-1]
        top = _entropy_threshold(magnitudes) * self.width / half
        return max(self.lo, -top), min(self.hi, top)


def _entropy_threshold(counts: npt.NDArray[np.int64]) -> int:
    """How many of the bins of magnitudes to keep: the count with the least divergence."""
    last = int(np.flatnonzero(counts)[-1]) + 1
    # Zeros are exact in 8 bits whatever the range; a spike there would only drown the rest.
    p_all = counts.astype(np.float64)
    p_all[0] = p_all[1]
    best, threshold = np.inf, last
    for keep in range(_LEVELS, last + 1, 16):
        p = p_all[:keep].copy()
        p[-1] += p_all[keep:].sum()
        starts = np.unique(np.arange(_LEVELS) * keep // _LEVELS)
        sizes = np.diff(np.append(starts, keep))
        filled = p_all[:keep] > 0
        total = np.add.reduceat(p_all[:keep], starts)
        count = np.maximum(np.add.reduceat(filled.astype(np.int64), starts), 1)
        q = np.where(filled, np.repeat(total / count, sizes), 0.0)
        if p.sum() == 0 or q.sum() == 0:
            continue
        p, q = p / p.sum(), np.maximum(q / q.sum(), 1e-12)
        here = p > 0
        divergence = float((p[here] * np.log(p[here] / q[here])).sum())
        if divergence < best:
            best, threshold = divergence, keep
    return threshold
