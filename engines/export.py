"""Export a torch module to ONNX, check the file against torch, and only then put it in place.

The TorchScript exporter is used on purpose: it keeps module paths in the node names (/enc.0/attn/q/MatMul),
which patterns over layers need, and ONNX Runtime runs its graphs faster than those of the newer exporter.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from engines.errors import InputError
from engines.runtimes import Array, OnnxRuntime, as_tensors, eval_mode

OPSET = 20
TOLERANCE = 1e-4

Tensors = tuple[torch.Tensor, ...]


def export_onnx(
    model: torch.nn.Module,
    example: Tensors,
    path: str | Path,
    input_names: Sequence[str],
    output_names: Sequence[str],
    tolerance: float = TOLERANCE,
) -> float:
    """Write `model` in eval mode as ONNX with the fixed shapes of `example`; return its error against torch.

    The graph is traced, so what `forward` reaches only in training (adapters, probes, dropout) is not in
    the file, and a branch on tensor values is frozen as `example` takes it: `max_error` on other inputs
    shows whether that matters. The file appears under `path` whole and checked, or not at all. Weights
    beyond protobuf's 2 GB lie beside it in one file `<name>.<hash>.data`.

    Args:
        model: returns a tensor or a tuple of tensors; left in the mode it was in, submodule by submodule.
        example: inputs, on the model's device.
        path: where the .onnx file goes; missing folders are made.
        input_names, output_names: one name per input and per output.
        tolerance: largest allowed relative error, see `max_error`.

    Raises:
        InputError: names that do not match, an operator that ONNX does not have, an error past `tolerance`,
            a path that cannot be written.
    """
    path = Path(path)
    outputs = len(_torch_outputs(model, example))
    for what, names, count in (("input", input_names, len(example)), ("output", output_names, outputs)):
        if len(names) != count or len(set(names)) != count:
            raise InputError(f"{what}_names={list(names)}: expected {count} different names, one per {what}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            draft = Path(folder) / path.name
            _trace(model, example, draft, input_names, output_names)
            _gather_external_data(draft)
            error = max_error(model, draft, example, tolerance, label=str(path))
            publish(draft, path)
    except OSError as problem:
        raise InputError(f"{path}: cannot write the ONNX file ({problem}); free or change the folder") from problem
    return error


def max_error(
    model: torch.nn.Module,
    path: str | Path,
    example: Tensors,
    tolerance: float = TOLERANCE,
    label: str | None = None,
) -> float:
    """Relative error of the ONNX file (ONNX Runtime, CPU) against `model` in eval mode on `example`.

    Per output |onnx - torch| / |torch| in the L2 norm; the largest over the outputs is returned. A NaN or
    infinity on either side counts as an infinite error. `label` names the file in messages (default:
    `path`).

    Raises:
        InputError: the error exceeds `tolerance`, or the file cannot be loaded or run on `example`.
    """
    label = label or str(path)
    expected = _torch_outputs(model, example)
    runtime = OnnxRuntime(path, "cpu", threads=1)
    try:
        actual = runtime.run(tuple(x.detach().cpu().numpy() for x in example))
    finally:
        runtime.close()
    if len(actual) != len(expected):
        raise InputError(f"{label} has {len(actual)} outputs, the torch model {len(expected)}; export it again")
    error = max(_relative_error(a, e.cpu().numpy()) for a, e in zip(actual, expected, strict=True))
    if not error <= tolerance:
        raise InputError(
            f"{label}: relative error {error:.3g} against torch is above tolerance={tolerance:.3g}; make the "
            "forward pass independent of tensor values and free of NaN, or give a larger tolerance"
        )
    return error


def external_files(path: str | Path) -> list[Path]:
    """The external data files that an ONNX file refers to, none for most. InputError if it is unreadable."""
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as problem:  # protobuf's DecodeError, or OSError
        raise InputError(f"{path}: not a readable ONNX file ({' '.join(str(problem).split())})") from problem
    names = {e.value for t in graph.initializer for e in t.external_data if e.key == "location"}
    return [Path(path).parent / name for name in sorted(names)]


def _torch_outputs(model: torch.nn.Module, example: Tensors) -> Tensors:
    with eval_mode(model), torch.no_grad():
        return as_tensors(model(*example), model)


def _relative_error(actual: Array, expected: Array) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    want = expected.astype(np.float64)
    difference = float(np.linalg.norm(actual.astype(np.float64) - want))
    if difference == 0.0:
        return 0.0
    error = difference / max(float(np.linalg.norm(want)), np.finfo(np.float64).tiny)
    return error if np.isfinite(error) else float("inf")


def _trace(
    model: torch.nn.Module,
    example: Tensors,
    path: Path,
    input_names: Sequence[str],
    output_names: Sequence[str],
) -> None:
    with eval_mode(model), torch.no_grad(), _quiet_exporter(), _expm1_symbolic():
        try:
            torch.onnx.export(
                model,
                example,
                str(path),
                input_names=list(input_names),
                output_names=list(output_names),
                opset_version=OPSET,
                dynamo=False,
            )
        except torch.onnx.errors.OnnxExporterError as problem:
            reason = " ".join(str(problem).split())
            raise InputError(
                f"{type(model).__name__} cannot be exported: {reason}; write it with other ops"
            ) from problem


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """No deprecation or tracer warnings, no dump of the graph on stdout at an unsupported operator."""
    core: Any = torch._C
    log = core._jit_onnx_log
    fast_path = torch.backends.mha.get_fastpath_enabled()
    # The exporter switches its log on again by itself, so the log function is what has to go.
    core._jit_onnx_log = lambda *_: None
    # The fused transformer layer has no ONNX form; its plain form has.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        core._jit_onnx_log = log
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextlib.contextmanager
def _expm1_symbolic() -> Iterator[None]:
    """Teach the exporter expm1, which ONNX lacks: expm1(x) = tanh(x/2) (exp(x) + 1), exact also near 0."""

    def expm1(g: Any, x: Any) -> Any:
        half = g.op("Mul", x, g.op("Constant", value_t=torch.tensor(0.5)))
        one = g.op("Constant", value_t=torch.tensor(1.0))
        return g.op("Mul", g.op("Tanh", half), g.op("Add", g.op("Exp", x), one))

    exporter: Any = torch.onnx
    exporter.register_custom_op_symbolic("aten::expm1", expm1, 9)
    try:
        yield
    finally:
        exporter.unregister_custom_op_symbolic("aten::expm1", 9)


def _gather_external_data(draft: Path) -> None:
    """Past 2 GB the exporter writes one file per weight: make that one file, named by its content."""
    if not external_files(draft):
        return
    pieces = [p for p in draft.parent.iterdir() if p != draft]
    whole = onnx.load(str(draft))
    for piece in pieces:
        piece.unlink()
    data = draft.parent / "data"
    onnx.save_model(whole, str(draft), save_as_external_data=True, location=data.name)
    with data.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()[:12]
    name = f"{draft.name}.{digest}.data"
    data.rename(draft.parent / name)
    # Only the names of the data file change, so the graph is saved again without its weights.
    light = onnx.load(str(draft), load_external_data=False)
    for tensor in light.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    draft.write_bytes(light.SerializeToString())


def publish(draft: Path, path: Path) -> None:
    """Data first, then the graph that names it: an earlier export stays whole until the last rename."""
    data = external_files(draft)
    for file in data:
        os.replace(file, path.parent / file.name)
    os.replace(draft, path)
    for old in path.parent.glob(f"{path.name}.*.data"):
        if old.name not in {file.name for file in data}:
            old.unlink()
