"""Build TensorRT engines: one builder for `tensorrt` and for `tensorrt_rtx`, which needs no GPU to build.

`compile_int8` goes the whole way: FP32 graph, policy and ranges -> explicit-QDQ twin -> engine -> what the engine
says of its layers. What was built and not run is labelled so.
"""

from __future__ import annotations

import contextlib
import importlib
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from engines.calibrate import Ranges
from engines.errors import InputError
from engines.export import external_files, publish
from engines.graph import load
from engines.policy import Choice, QuantPolicy
from engines.qdq import Float, write_qdq
from engines.tensorrt_layers import EngineLayer, check_precision, parse_layers
from engines.tensorrt_manifest import AHEAD_OF_TIME, NOT_EXECUTED, RTX_CAPABILITIES, Device, sha256, write_engine

_FLAVOURS = ("tensorrt", "tensorrt_rtx")


def load_tensorrt() -> ModuleType:
    """`tensorrt` where it is installed, else `tensorrt_rtx`. InputError where neither can be imported."""
    reasons = []
    for name in _FLAVOURS:
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as problem:
            reasons.append(f"{name}: {' '.join(str(problem).split())}")
            continue
        if hasattr(module, "Builder"):  # the registry also holds empty shells under this name
            return module
        reasons.append(f"{name}: an empty package")
    raise InputError(f"no TensorRT here ({'; '.join(reasons)}); pip install tensorrt-rtx, or tensorrt on a GPU machine")


def present_device(index: int = 0) -> Device | None:
    """The GPU that torch sees under `index`, or None."""
    if index >= torch.cuda.device_count():
        return None
    return Device(torch.cuda.get_device_name(index), ".".join(map(str, torch.cuda.get_device_capability(index))))


def build_engine(
    trt: ModuleType,
    onnx_path: str | Path,
    plan_path: str | Path,
    workload_hash: str,
    chosen: Sequence[Choice] = (),
    kept: Float = "float16",
    policy: QuantPolicy | None = None,
) -> dict[str, Any]:
    """Build an engine with the fixed shapes and the very types of an ONNX file; return its manifest.

    The engine and its manifest (`<plan_path>.json`) appear whole or not at all.

    Args:
        trt: `tensorrt` or `tensorrt_rtx` (see `load_tensorrt`).
        onnx_path: fixed shapes; INT8 as symmetric Q/DQ nodes (`write_qdq`).
        plan_path: where the engine goes, by custom `*.trt`.
        workload_hash: of the protocol that the engine is to be measured by.
        chosen, kept: what `write_qdq` returned and was given; the engine is compared with them.
        policy: recorded in the manifest.

    Raises:
        InputError: a shape that is not fixed, or what TensorRT refuses, in its own words.
    """
    onnx_path, plan_path = Path(onnx_path), Path(plan_path)
    with _scratch(plan_path) as folder:
        draft = folder / plan_path.name
        manifest = _build(trt, onnx_path, draft, str(onnx_path), chosen, kept)
        manifest |= {"workload": workload_hash, "policy": policy.to_data() if policy else None}
        write_engine(plan_path, draft, manifest)
    return manifest


def compile_int8(
    fp32_onnx: str | Path,
    plan_path: str | Path,
    policy: QuantPolicy,
    ranges: Ranges,
    workload_hash: str,
    kept: Float = "float16",
) -> dict[str, Any]:
    """Compile the INT8 engine of an FP32 graph: `plan_path`, its manifest, and its ONNX twin beside them.

    Args: as `write_qdq` and `build_engine`. The twin is `plan_path` with the suffix `.qdq.onnx`.

    Returns:
        The manifest; its `precision` holds `int8_share` of the eligible products and `keep_list_violations`,
        its `onnx_sha256` is that of the twin.

    Raises:
        InputError: see `write_qdq` and `build_engine`.
    """
    plan_path = Path(plan_path)
    twin = plan_path.with_suffix(".qdq.onnx")
    trt = load_tensorrt()
    with _scratch(plan_path) as folder:
        draft, draft_twin = folder / plan_path.name, folder / twin.name
        chosen = write_qdq(fp32_onnx, draft_twin, policy, ranges, kept)
        manifest = _build(trt, draft_twin, draft, str(fp32_onnx), chosen, kept)
        manifest |= {"workload": workload_hash, "policy": policy.to_data()}
        publish(draft_twin, twin)
        write_engine(plan_path, draft, manifest)
    return manifest


@contextlib.contextmanager
def _scratch(plan_path: Path) -> Iterator[Path]:
    """A folder on the disk of `plan_path`, gone afterwards."""
    try:
        plan_path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=plan_path.parent, prefix=f".{plan_path.name}.") as folder:
            yield Path(folder)
    except OSError as problem:
        raise InputError(f"{plan_path}: cannot write the engine ({problem}); free or change the folder") from problem


def _build(
    trt: ModuleType, onnx_path: Path, plan: Path, label: str, chosen: Sequence[Choice], kept: Float
) -> dict[str, Any]:
    """Write the engine of `onnx_path` to `plan`; returns what the manifest says of both. `label` names the source."""
    _check_shapes(onnx_path, label)
    started = time.monotonic()
    layers = _compile(trt, onnx_path, plan, label)
    seconds = time.monotonic() - started
    # tensorrt_rtx compiles for architectures, whatever GPU there is; tensorrt for the GPU at hand.
    device = None if trt.__name__ == "tensorrt_rtx" else present_device()
    return {
        "label": NOT_EXECUTED,
        "tensorrt": trt.__name__,
        "version": trt.__version__,
        "device": device.name if device else AHEAD_OF_TIME,
        "capabilities": [device.capability] if device else list(RTX_CAPABILITIES),
        "onnx_sha256": sha256(onnx_path, *external_files(onnx_path)),
        "engine_sha256": sha256(plan),
        "engine_MB": plan.stat().st_size / 1e6,
        "build_s": round(seconds, 1),
        "kept": kept,
        "precision": check_precision(layers, chosen, kept).to_data(),
        "layers": _summary(layers),
    }


def _check_shapes(path: Path, label: str) -> None:
    for tensor in load(path, weights=False).graph.input:
        for axis, dim in enumerate(tensor.type.tensor_type.shape.dim):
            if dim.dim_value < 1:
                name = dim.dim_param or "?"
                raise InputError(
                    f"{label}: input {tensor.name!r} has the dynamic dimension {name!r} (axis {axis}), and an engine "
                    "has fixed shapes; export it with example inputs of the workload's size"
                )


def _compile(trt: ModuleType, path: Path, plan: Path, label: str) -> list[EngineLayer]:
    """Write the serialized engine to `plan`; returns its layers."""
    log = _log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(0)  # strongly typed: the one kind that both flavours have
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        raise InputError(f"{label}: TensorRT refuses it: {_parser_error(parser, log)}; make it with write_qdq")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        reason = _one_line(log.errors[0] if log.errors else "no reason given")
        raise InputError(f"{label}: TensorRT cannot build it: {reason}; make it with write_qdq")
    plan.write_bytes(engine)
    # Not every builder prints its layers; a loaded engine can be asked, but needs a GPU.
    lists = log.lists or ([inspect_engine(trt, plan)] if present_device() else [])
    return parse_layers(lists)


def inspect_engine(trt: ModuleType, plan: str | Path) -> str:
    """The layers of an engine file, one line each, as `parse_layers` reads them. Needs a GPU."""
    runtime = trt.Runtime(_log(trt))
    engine = runtime.deserialize_cuda_engine(Path(plan).read_bytes())
    if engine is None:
        raise InputError(f"{plan}: {trt.__name__} cannot load it here; build the engine again")
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.ONELINE))


def _log(trt: ModuleType) -> Any:
    """A logger that keeps errors and the list of final layers, and prints nothing."""

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.lists: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(message)
            elif message.startswith("Layers:"):
                self.lists.append(message)

    return Log()


def _parser_error(parser: Any, log: Any) -> str:
    if not parser.num_errors:
        return _one_line(log.errors[0] if log.errors else "no reason given")
    error = parser.get_error(0)
    # Where there is no GPU, some messages go on to say that there is none.
    reason = error.desc().partition("[checkMacros")[0]
    return _one_line(f"{error.node_operator()} {error.node_name()!r}: {reason}")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _summary(layers: Sequence[EngineLayer]) -> dict[str, int]:
    """How many layers there are of each type and input datatypes: {"gemm Int8": 84, ...}."""
    kinds = Counter(f"{layer.type} {'+'.join(dict.fromkeys(layer.inputs)) or '-'}" for layer in layers)
    return dict(kinds.most_common())
