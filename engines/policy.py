"""The quantization policy and the one selection of layers that every INT8 export obeys.

A policy is plain data (sweeps/settings/quant.yaml). `choices` maps it onto the nodes of an FP32 graph; the CPU
engine and the TensorRT export both take its answer, so their keep-lists cannot differ.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import onnx

from engines.errors import InputError

Kind = Literal["gemm", "conv", "attention", "layernorm", "softmax"]
Precision = Literal["int8", "kept", "float"]

# A family name in a keep-list stands for all its nodes; it is not a typo in a graph that has none of them.
FAMILIES: dict[str, str] = {
    "gemm": "weight GEMM",
    "conv": "convolution",
    "attention": "product of two activations",
    "layernorm": "LayerNormalization",
    "softmax": "Softmax",
}
METHODS = ("minmax", "percentile", "entropy")
MODES = ("static", "dynamic")
_QUANTIZED_OPS = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "QLinearMatMul"}


@dataclass(frozen=True)
class QuantPolicy:
    """What becomes INT8 and how. Weights: symmetric, one scale per output channel; activations: one per tensor.

    bits_w: levels of a weight, 4 to 8 bits, always stored as int8. bits_a: 8. keep: what stays in floating
    point, each entry a family (`FAMILIES`) or a glob over layer names ("enc_blocks.0/attn/qkv/MatMul") or over
    operator types ("Softmax"); a LayerNorm or Softmax that is not kept has its input and output rounded to
    8 bits. calibration, method: samples and rule behind the activations' ranges. mode (CPU engine only): static
    ranges, or dynamic ones found in every call. smooth: SmoothQuant's migration strength, 0 = off
    (Xiao et al., arXiv:2211.10438). reduce_range (CPU engine only): 7-bit weights, None = where the machine has
    no VNNI, since its 8-bit products saturate. skip_slower (CPU engine only): keep products that INT8 makes slower,
    as measured on this machine.

    Raises InputError that lists all bad values.
    """

    bits_w: int = 8
    bits_a: int = 8
    keep: tuple[str, ...] = ("layernorm", "softmax", "attention")
    calibration: int = 512
    method: str = "minmax"
    mode: str = "static"
    smooth: float = 0.0
    reduce_range: bool | None = None
    skip_slower: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.keep, list):
            object.__setattr__(self, "keep", tuple(self.keep))
        bad = self._problems()
        if bad:
            raise InputError("quantization policy: " + "; ".join(bad))

    def _problems(self) -> list[str]:
        bad = []
        if not _is_int(self.bits_w) or not 4 <= self.bits_w <= 8:
            bad.append(f"bits_w={self.bits_w!r}: expected 4 to 8")
        if self.bits_a != 8:
            bad.append(f"bits_a={self.bits_a!r}: only 8 is supported")
        if not isinstance(self.keep, tuple) or not all(isinstance(k, str) and k for k in self.keep):
            bad.append(f"keep={self.keep!r}: expected a list of patterns")
        if not _is_int(self.calibration) or self.calibration < 1:
            bad.append(f"calibration={self.calibration!r}: expected at least 1 sample")
        for name, known in (("method", METHODS), ("mode", MODES)):
            if getattr(self, name) not in known:
                bad.append(f"{name}={getattr(self, name)!r}: expected one of {', '.join(known)}")
        if isinstance(self.smooth, bool) or not isinstance(self.smooth, int | float) or not 0 <= self.smooth <= 1:
            bad.append(f"smooth={self.smooth!r}: expected 0 (off) to 1")
        if self.reduce_range not in (True, False, None):
            bad.append(f"reduce_range={self.reduce_range!r}: expected true, false or null (by the machine)")
        if not isinstance(self.skip_slower, bool):
            bad.append(f"skip_slower={self.skip_slower!r}: expected true or false")
        return bad

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> QuantPolicy:
        """Build from settings; InputError for unknown keys and for bad values."""
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(data) - set(known))
        if unknown:
            raise InputError(f"quantization policy: unknown keys {unknown}, known are {known}")
        return cls(**data)

    def to_data(self) -> dict[str, Any]:
        """JSON-able keyword arguments that build an equal policy."""
        return {**dataclasses.asdict(self), "keep": list(self.keep)}


@dataclass(frozen=True)
class Choice:
    """One node's precision. `node`: its name in the graph; `layer`: that without the leading slash.

    `kind` is None where the node is not eligible (precision "float"); "kept" = eligible, but on the keep-list.
    """

    node: str
    op: str
    layer: str
    kind: Kind | None
    precision: Precision
    why: str


def choices(model: onnx.ModelProto, policy: QuantPolicy) -> list[Choice]:
    """Precision of every node of an FP32 graph but constants, in graph order.

    Raises InputError: the graph is quantized already, nodes without a name of their own, a glob of the
    keep-list that matches no eligible node.
    """
    graph = model.graph
    _check_graph(graph)
    fixed = constants(graph)
    found: list[Choice] = []
    used: set[str] = set()
    for node in graph.node:
        if node.op_type == "Constant" or node.output[0] in fixed:
            continue
        layer = node.name.lstrip("/")
        kind, reason = _kind(node, fixed)
        if kind is None:
            found.append(Choice(node.name, node.op_type, layer, None, "float", reason))
            continue
        matches = [k for k in policy.keep if k == kind or fnmatchcase(layer, k) or fnmatchcase(node.op_type, k)]
        used.update(matches)
        if matches:
            why = f"{FAMILIES[kind]}, on the keep-list: {matches[0]}"
            found.append(Choice(node.name, node.op_type, layer, kind, "kept", why))
        else:
            found.append(Choice(node.name, node.op_type, layer, kind, "int8", FAMILIES[kind]))
    unmatched = [k for k in policy.keep if k not in used and k not in FAMILIES]
    if unmatched:
        raise InputError(_typo(unmatched, found))
    return found


def constants(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Tensors that do not depend on the inputs, by name: initializers, Constant nodes, and Identities of those."""
    fixed = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            fixed.update((node.output[0], a.t) for a in node.attribute if a.name == "value")
        elif node.op_type == "Identity" and node.input[0] in fixed:
            fixed[node.output[0]] = fixed[node.input[0]]
    return fixed


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_graph(graph: onnx.GraphProto) -> None:
    quantized = sorted({n.op_type for n in graph.node} & _QUANTIZED_OPS)
    if quantized:
        raise InputError(f"the graph is quantized already (it has {', '.join(quantized)}); give the FP32 file")
    repeated = [name or "''" for name, count in Counter(n.name for n in graph.node).items() if count > 1 or not name]
    if repeated:
        raise InputError(f"nodes without a name of their own ({repeated[0]}); export the model with export_onnx")


def _kind(node: onnx.NodeProto, fixed: Mapping[str, onnx.TensorProto]) -> tuple[Kind | None, str]:
    """The family of an eligible node, or None and why it is not eligible."""
    op, operands = node.op_type, list(node.input)
    if op == "LayerNormalization":
        return "layernorm", ""
    if op == "Softmax":
        return "softmax", ""
    if op == "Conv":
        return ("conv", "") if operands[1] in fixed else (None, "its kernel is not constant")
    if op not in ("MatMul", "Gemm"):
        return None, "no INT8 form"
    left, right = (name in fixed for name in operands[:2])
    if op == "MatMul" and not left and not right:
        return "attention", ""
    if left or not right:
        return None, "its right operand is not a constant weight"
    if len(fixed[operands[1]].dims) != 2:
        return None, "its weight is not a matrix"
    if op == "Gemm" and any(a.name == "transA" and a.i for a in node.attribute):
        return None, "its input is transposed"
    return "gemm", ""


def _typo(patterns: list[str], found: list[Choice]) -> str:
    eligible = [c for c in found if c.kind is not None]
    names = [*FAMILIES, *dict.fromkeys(c.op for c in eligible), *(c.layer for c in eligible)]
    pattern = patterns[0]
    near = difflib.get_close_matches(pattern.strip("*"), names, n=3, cutoff=0.3)
    others = f" (as do {patterns[1:]})" if len(patterns) > 1 else ""
    return (
        f"keep pattern {pattern!r} matches no eligible layer{others}; nearest are "
        f"{near or names[:3]}, families are {list(FAMILIES)}"
    )
