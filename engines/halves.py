"""A two-view ONNX file cut where one tensor carries all: what is computed of each image, and what of a pair."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime as ort
from onnx import helper

from engines.errors import InputError
from engines.graph import load, save, sweep, users


def split(path: str | Path, folder: Path) -> tuple[Path, Path]:
    """Two files in `folder` that run one after the other are the file: inputs to one tensor, that tensor to outputs.

    The cut is the last tensor (float32) past which nothing of the inputs is needed but itself. InputError where there
    is none, or the file cannot be read.
    """
    files = folder / "before.onnx", folder / "after.onnx"
    before, after = load(path), load(path)
    cut = narrowest(before.graph)
    del before.graph.output[:], after.graph.input[:]
    before.graph.output.append(helper.make_tensor_value_info(cut, onnx.TensorProto.FLOAT, None))
    sweep(before.graph)
    save(before, files[0])
    after.graph.input.append(helper.make_tensor_value_info(cut, onnx.TensorProto.FLOAT, _shape(files[0])))
    after.graph.node.remove(next(node for node in after.graph.node if cut in node.output))
    sweep(after.graph)
    save(after, files[1])
    return files


def _shape(path: Path) -> list[int]:
    """Of the only output; ONNX Runtime knows its own operators' shapes, onnx does not."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    (output,) = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).get_outputs()
    return list(output.shape)


def narrowest(graph: onnx.GraphProto) -> str:
    """The name of the cut, see :func:`split`."""
    left = {name: len(nodes) for name, nodes in users(graph).items()}
    for output in graph.output:
        left[output.name] = left.get(output.name, 0) + 1
    constants = {tensor.name for tensor in graph.initializer}
    live = {one.name for one in graph.input} - constants
    reached, found = set(live), ""
    for node in graph.node:
        if not reached.intersection(node.input):
            continue
        for name in filter(None, node.input):
            left[name] -= 1
        live = {name for name in live.union(node.output) if left.get(name, 0)}
        reached.update(node.output)
        if len(live) == 1:
            (found,) = live
    if not found:
        raise InputError("no single tensor of this graph carries all that its outputs need: it cannot be cut in two")
    return found
