"""Small helpers over ONNX graphs: reading, writing whole or not at all, users of a tensor, dead nodes."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from engines.errors import InputError
from engines.export import publish
from engines.runtimes import Array

# Protobuf ends at 2 GiB; some room for the graph itself.
_LARGEST = 2**31 - 2**26


def load(path: str | Path, weights: bool = True) -> onnx.ModelProto:
    """The model; without `weights`, external data stay in their file. InputError if the file cannot be read."""
    try:
        model = onnx.load(str(path), load_external_data=weights)
    except Exception as problem:  # protobuf's DecodeError, onnx's own errors, or OSError
        reason = " ".join(str(problem).split())
        raise InputError(f"{path}: not a readable ONNX file ({reason}); export the model again") from problem
    if not model.graph.node:  # so reads an empty file, too
        raise InputError(f"{path}: not a readable ONNX file (its graph has no node); export the model again")
    return model


def save(model: onnx.ModelProto, path: str | Path) -> None:
    """Write `model` under `path` whole or not at all; past 2 GB its weights lie beside it in `<name>.<n>.data`.

    Raises InputError where the folder cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            draft = Path(folder) / path.name
            size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
            if size > _LARGEST:
                onnx.save_model(model, str(draft), save_as_external_data=True, location=f"{path.name}.{size}.data")
            else:
                draft.write_bytes(model.SerializeToString())
            publish(draft, path)
    except OSError as problem:
        raise InputError(f"{path}: cannot write the ONNX file ({problem}); free or change the folder") from problem


def values(tensor: onnx.TensorProto) -> Array:
    """The numbers of a constant."""
    array: Array = numpy_helper.to_array(tensor)
    return array


def constant(name: str, array: object, dtype: type | np.dtype[np.generic]) -> onnx.TensorProto:
    """An initializer."""
    return numpy_helper.from_array(np.ascontiguousarray(np.asarray(array, dtype=dtype)), name)


def users(graph: onnx.GraphProto) -> Mapping[str, list[onnx.NodeProto]]:
    """The nodes that read each tensor, by its name; a node that reads it twice is listed twice."""
    found: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            found[name].append(node)
    return found


def sweep(graph: onnx.GraphProto) -> None:
    """Remove nodes and initializers that no output needs."""
    needed = {output.name for output in graph.output}
    live = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            live.append(node)
            needed.update(node.input)
    kept = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(reversed(live))
    graph.initializer.extend(kept)
