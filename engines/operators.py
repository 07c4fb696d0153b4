"""Time per operator of an ONNX file in ONNX Runtime."""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from engines.errors import InputError
from engines.runtimes import NUMPY_DTYPES, OnnxRuntime

_WARMUP = 3


@dataclass(frozen=True)
class NodeTime:
    """Median microseconds of one node of the graph that ONNX Runtime made of the file."""

    node: str
    op: str
    us: float


def profile(path: str | Path, rounds: int = 20, threads: int = 1, seed: int = 0) -> list[NodeTime]:
    """Every node's time on random inputs, in the order of execution.

    Fused operators carry the name of one of their parts. Raises InputError for a file that cannot be loaded,
    `rounds` < 1 or an input whose shape is not fixed.
    """
    if rounds < 1:
        raise InputError(f"rounds={rounds}: expected at least 1")
    OnnxRuntime(path, "cpu", threads).close()  # its messages for a bad file
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        rng = np.random.default_rng(seed)
        feed = {}
        for i in session.get_inputs():
            if not all(isinstance(size, int) for size in i.shape):
                raise InputError(f"{path}: input {i.name!r} has the free shape {i.shape}; export it with fixed sizes")
            feed[i.name] = rng.uniform(-1, 1, i.shape).astype(NUMPY_DTYPES[i.type])
        for _ in range(_WARMUP + rounds):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    suffix = "_kernel_time"
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(suffix):
            # A convolution in blocked layout is named after its output.
            name = re.sub(r"(_output_\d+)?_nchwc$", "", event["name"].removesuffix(suffix))
            times[name, event["args"]["op_name"]].append(event["dur"])
    return [NodeTime(node, op, float(np.median(us[_WARMUP:]))) for (node, op), us in times.items()]


def by_operator(nodes: Iterable[NodeTime]) -> list[tuple[str, int, float]]:
    """(operator, nodes, microseconds), slowest first."""
    counts: dict[str, int] = defaultdict(int)
    total: dict[str, float] = defaultdict(float)
    for node in nodes:
        counts[node.op] += 1
        total[node.op] += node.us
    return sorted(((op, counts[op], us) for op, us in total.items()), key=lambda row: -row[2])


def layer_times(path: str | Path, rounds: int) -> dict[str, float]:
    """Microseconds by layer: a node counts for its own name and for every name that it has as a path prefix."""
    total: dict[str, float] = defaultdict(float)
    for node in profile(path, rounds):
        parts = node.node.strip("/").split("/")
        for end in range(1, len(parts) + 1):
            total["/".join(parts[:end])] += node.us
    return dict(total)
