"""SmoothQuant on an ONNX graph: outlier channels of an activation move into the weights that read it.

Xiao et al., arXiv:2211.10438. A LayerNorm's gamma and beta are divided by s per channel and the rows of every
weight behind it multiplied by s, s_j = max|X_j|^alpha / max|W_j|^(1 - alpha): the function stays the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx

from engines.graph import constant, sweep, users, values
from engines.policy import Choice, constants
from engines.runtimes import Array


def norms(model: onnx.ModelProto, chosen: Iterable[Choice]) -> list[str]:
    """Outputs of the LayerNorms that `smooth` can treat: read by nothing but weight GEMMs that become INT8."""
    return [norm.output[0] for norm, _ in _groups(model, chosen)]


def smooth(model: onnx.ModelProto, chosen: Iterable[Choice], maxima: Mapping[str, Array], alpha: float) -> int:
    """Move scales from activations into weights, in place; returns how many LayerNorms were treated.

    Args:
        maxima: largest magnitude per channel of each tensor that `norms` names.
        alpha: migration strength in (0, 1], 0.5 balances activation and weight.
    """
    graph = model.graph
    fixed = constants(graph)
    groups = _groups(model, chosen)
    for norm, readers in groups:
        weights = [values(fixed[node.input[1]]) for node in readers]
        rows = np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0)
        # Channels that are silent on either side keep their scale.
        seen = maxima[norm.output[0]]
        live = (seen > 0) & (rows > 0)
        scale = np.ones_like(rows)
        scale[live] = seen[live] ** alpha / rows[live] ** (1 - alpha)
        # Fresh tensors: one LayerNorm's weights may serve several places of the graph, each with its own scale.
        for i in range(1, len(norm.input)):
            _replace(graph, norm, i, values(fixed[norm.input[i]]) / scale)
        for node, weight in zip(readers, weights, strict=True):
            _replace(graph, node, 1, weight * scale[:, None])
    sweep(graph)
    return len(groups)


def _groups(model: onnx.ModelProto, chosen: Iterable[Choice]) -> list[tuple[onnx.NodeProto, list[onnx.NodeProto]]]:
    graph = model.graph
    fixed, readers = constants(graph), users(graph)
    outputs = {output.name for output in graph.output}
    gemms = {c.node for c in chosen if c.kind == "gemm" and c.precision == "int8" and c.op == "MatMul"}
    result = []
    for node in graph.node:
        if node.op_type != "LayerNormalization" or any(name not in fixed for name in node.input[1:]):
            continue
        behind = readers[node.output[0]]
        if behind and node.output[0] not in outputs and all(reader.name in gemms for reader in behind):
            result.append((node, behind))
    return result


def _replace(graph: onnx.GraphProto, node: onnx.NodeProto, index: int, array: Array) -> None:
    name = f"{node.name}/smoothed_{index}"
    graph.initializer.append(constant(name, array, np.float32))
    node.input[index] = name
