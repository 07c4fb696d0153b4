"""What TensorRT made of a graph: the layers of a built engine, their datatypes, and whether they obey the policy.

The judgement is on the engine, not on the graph: the builder fuses and folds, and a layer that the graph keeps in
single precision (Cast, MatMul, Cast) may come out in half.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from engines.policy import Choice
from engines.qdq import Float

_HEADING = "Layers:\n"
_END = "\nI/O Tensors:"
_LINE = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: \[(?P<constants>.*?)\], "
    r"Outputs: \[(?P<outputs>.*?)\], TacticName: .*?, Metadata: ?(?P<metadata>.*)"
)
_DATATYPE = re.compile(r"Datatype: (\w+)")
_NODE = re.compile(r"\[ONNX Layer: (.*?)\]")
_PRODUCTS = ("gemm", "conv", "attention")
# Generated elementwise kernels: they carry the names of the products whose bias or scale they finish.
_ELEMENTWISE = "kgen"


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine: TensorRT's name and type, the datatypes of its tensors, the graph nodes in it."""

    name: str
    type: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class PrecisionReport:
    """How an engine obeys a policy.

    int8, eligible: matrix products and convolutions that run on int8 operands, of those that the policy made
    int8. not_int8: the names of the others. violations: kept nodes that read int8 or, where they were to be
    float32, half. missing: nodes of either kind that no layer names.
    """

    int8: int
    eligible: int
    not_int8: tuple[str, ...]
    kept: int
    violations: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def share(self) -> float:
        """Int8 share of the eligible products, 1 where there are none."""
        return self.int8 / self.eligible if self.eligible else 1.0

    def to_data(self) -> dict[str, Any]:
        """JSON-able summary."""
        return {
            "int8_share": self.share,
            "int8": self.int8,
            "eligible": self.eligible,
            "not_int8": list(self.not_int8),
            "kept": self.kept,
            "keep_list_violations": list(self.violations),
            "missing": list(self.missing),
        }


def parse_layers(messages: Iterable[str]) -> list[EngineLayer]:
    """The final layers from a builder's log messages (ProfilingVerbosity.DETAILED), in order of execution.

    Raises RuntimeError where the log has no such list or one in another form: without it precision is unknown.
    """
    text = next((m for m in messages if m.startswith(_HEADING)), None)
    if text is None:
        raise RuntimeError("the TensorRT builder printed no list of layers, so their precision cannot be checked")
    found = []
    for line in text[len(_HEADING) :].partition(_END)[0].splitlines():
        match = _LINE.fullmatch(line)
        if not match:
            if line.startswith("Name: "):
                raise RuntimeError(f"unknown form of a layer in the TensorRT builder's log: {line[:200]}")
            continue
        inputs, constants, outputs = (tuple(_DATATYPE.findall(match[x])) for x in ("inputs", "constants", "outputs"))
        nodes = tuple(_NODE.findall(match["metadata"]))
        found.append(EngineLayer(match["name"], match["type"], inputs, constants, outputs, nodes))
    return found


def check_precision(layers: Sequence[EngineLayer], chosen: Sequence[Choice], kept: Float) -> PrecisionReport:
    """Compare an engine's layers with the policy's choices; `kept` is the precision that the keep-list was to have.

    A product is int8 if every layer that computes it reads int8 for both operands. A kept product reads no int8,
    and float32 for its operands if `kept` says so. Another kept node reads no int8 either, unless it was fused
    behind an int8 product, whose operands those are; whether a LayerNorm or Softmax reads Half or Float is left
    open, since their kernels widen it themselves.
    """
    by_node: dict[str, list[EngineLayer]] = defaultdict(list)
    for layer in layers:
        for node in layer.nodes:
            by_node[node].append(layer)
    products = {c.node for c in chosen if c.kind in _PRODUCTS and c.precision == "int8"}
    keep = [c for c in chosen if c.precision == "kept"]
    not_int8 = [n for n in products if not _is_int8(_computing(by_node[n]))]
    violations = []
    for choice in keep:
        own = by_node[choice.node]
        if choice.kind in _PRODUCTS:
            operands = 2 if choice.kind == "attention" else 1
            bad = any("Int8" in _read(layer) for layer in _computing(own)) or (
                kept == "float32" and not all(_is_single(layer, operands) for layer in _computing(own))
            )
        else:
            bad = any("Int8" in _read(layer) and not products & set(layer.nodes) for layer in own)
        if bad:
            violations.append(choice.node)
    missing = [c.node for c in keep if not by_node[c.node]] + [n for n in products if not by_node[n]]
    return PrecisionReport(
        int8=len(products) - len(not_int8),
        eligible=len(products),
        not_int8=tuple(sorted(not_int8)),
        kept=len(keep),
        violations=tuple(violations),
        missing=tuple(sorted(missing)),
    )


def _computing(layers: Sequence[EngineLayer]) -> list[EngineLayer]:
    """Of the layers that name a product those that compute it, not only finish it."""
    return [layer for layer in layers if layer.type != _ELEMENTWISE] or list(layers)


def _read(layer: EngineLayer) -> tuple[str, ...]:
    return layer.inputs + layer.constants


def _is_int8(layers: Sequence[EngineLayer]) -> bool:
    """Whether all read int8 for both operands; further constants (scales, bias) are floats."""
    return bool(layers) and all(
        layer.inputs and layer.inputs[0] == "Int8" and _read(layer).count("Int8") >= 2 for layer in layers
    )


def _is_single(layer: EngineLayer, operands: int) -> bool:
    """Whether a product reads float32; what was fused behind it may read half besides, but not its weight."""
    return layer.inputs.count("Float") >= operands and "Half" not in layer.constants
