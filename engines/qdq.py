"""Explicit INT8 for TensorRT: an FP32 graph becomes one with Q/DQ nodes and FP16 everywhere else.

TensorRT is strongly typed: every layer computes in the types that the graph states, so this module states all of
them. Weights are symmetric int8 with one scale per output channel, activations symmetric int8 with one scale per
tensor (zero points are 0, which TensorRT demands), and all 8 bits are used: a 7-bit file made for a CPU without
VNNI is another export.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from engines.calibrate import Ranges
from engines.errors import InputError
from engines.explain import annotate
from engines.graph import load, save
from engines.policy import Choice, QuantPolicy, choices, constants

Float = Literal["float16", "float32"]

_ONNX = {"float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT}
_LEAST_OPSET = 19  # the first whose QuantizeLinear takes float16
_PRODUCTS = {"MatMul", "Gemm", "Conv", "ConvTranspose"}
# Their float outputs (or, for Resize, scales) are float32 by the operator's definition.
_FLOAT32_OPS = {"Cast", "ConstantOfShape", "Range", "RandomNormal", "RandomUniform", "EyeLike"}
_FLOAT32_INPUTS = {("Resize", 2)}
_HALF_MAX, _HALF_LEAST = float(np.finfo(np.float16).max), float(np.finfo(np.float16).smallest_subnormal)


def write_qdq(
    fp32_onnx: str | Path, path: str | Path, policy: QuantPolicy, ranges: Ranges, kept: Float = "float16"
) -> list[Choice]:
    """Write the explicit-QDQ twin of an FP32 file and return each node's precision (see `choices`).

    Inputs and outputs stay float32, and so does the end of the graph: the last matrix product or convolution on
    every path and what follows it (in pointmap heads that is exponentials, which half precision cannot hold).

    Args:
        fp32_onnx: as `engines.export.export_onnx` writes it, opset 19 or later.
        path: where the twin goes; it appears whole or not at all.
        policy: what becomes int8. `smooth` and the calibration are about making `fp32_onnx` and `ranges`.
        ranges: (lowest, highest) value of every tensor in `engines.quantize.activations`, by name.
        kept: precision of the layers on the keep-list; the rest is float16 in any case.

    Raises:
        InputError: see `choices`; a range that is missing or that half precision cannot hold; a weight with
            NaN; control flow; a folder that cannot be written.
    """
    source, folder = _read(fp32_onnx), Path(fp32_onnx).parent
    chosen = choices(source, policy)
    twin = _Twin(source, folder, chosen, policy, ranges, kept).build()
    annotate(twin, policy, chosen)
    save(twin, path)
    return chosen


def _read(path: str | Path) -> onnx.ModelProto:
    model = load(path, weights=False)
    opset = next((o.version for o in model.opset_import if o.domain == ""), 0)
    if opset < _LEAST_OPSET:
        raise InputError(f"{path}: opset {opset} has no float16 QuantizeLinear; export with opset {_LEAST_OPSET}")
    nested = [n.name for n in model.graph.node if any(a.type == onnx.AttributeProto.GRAPH for a in n.attribute)]
    if nested:
        raise InputError(
            f"{path}: node {nested[0]!r} is control flow, which the INT8 export does not follow; unroll it"
        )
    foreign = [f"{n.domain}.{n.op_type}" for n in model.graph.node if n.domain not in ("", "ai.onnx")]
    if foreign:
        raise InputError(f"{path}: {foreign[0]} is not a standard operator; give the file as export_onnx wrote it")
    return model


class _Twin:
    """One conversion. Tensors keep their names; `self.types` holds the float type each is computed in."""

    def __init__(
        self,
        source: onnx.ModelProto,
        folder: Path,
        chosen: list[Choice],
        policy: QuantPolicy,
        ranges: Ranges,
        kept: Float,
    ) -> None:
        self.source, self.folder, self.ranges = source, folder, ranges
        self.levels = 2 ** (policy.bits_w - 1) - 1
        self.choice = {c.node: c for c in chosen}
        self.fixed = constants(source.graph)
        self.floats = _float_tensors(source)
        self.precision = {c.node: self._precision(c, kept) for c in chosen}
        self.precision.update(dict.fromkeys(self._ends(), "float32"))
        if kept == "float32":
            self.precision.update(dict.fromkeys(self._kept_biases(), "float32"))
        self.types: dict[str, Float] = {i.name: "float32" for i in source.graph.input if i.name in self.floats}
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: dict[str, TensorProto] = {}
        self.weight_scales: dict[str, npt.NDArray[Any]] = {}
        self.made: set[str] = set()

    def build(self) -> onnx.ModelProto:
        graph = self.source.graph
        for node in graph.node:
            if node.name in self.choice:
                self._convert(node)
        for output in graph.output:
            if self.types.get(output.name) == "float16":
                self._rename_output(output.name)
        result = helper.make_graph(self.nodes, graph.name, graph.input, graph.output, list(self.tensors.values()))
        return helper.make_model(result, opset_imports=self.source.opset_import, ir_version=self.source.ir_version)

    # ------------------------------------------------------------------ which precision
    def _precision(self, choice: Choice, kept: Float) -> Float:
        if choice.op in _FLOAT32_OPS:
            return "float32"
        return kept if choice.precision == "kept" else "float16"

    def _ends(self) -> set[str]:
        """Nodes that no matrix product or convolution follows, those products included."""
        leads_on: set[str] = set()  # tensors that a product reads, directly or through other nodes
        ends = set()
        for node in reversed(self.source.graph.node):
            followed = any(name in leads_on for name in node.output)
            if not followed:
                ends.add(node.name)
            if followed or node.op_type in _PRODUCTS:
                leads_on.update(node.input)
        return ends

    def _kept_biases(self) -> set[str]:
        """Sums that add a constant to a kept product.

        TensorRT folds Cast, MatMul, Cast into a MatMul in half precision; with its bias between them it does not.
        """
        kept = {c.node for c in self.choice.values() if c.precision == "kept"}
        products = {n.output[0] for n in self.source.graph.node if n.name in kept and n.op_type in _PRODUCTS}
        return {
            node.name
            for node in self.source.graph.node
            if node.op_type == "Add" and products & set(node.input) and self.fixed.keys() & set(node.input)
        }

    def _must_be_single(self, node: onnx.NodeProto) -> bool:
        """Whether a scalar operand is lost in half precision: an infinity or a zero that was none."""
        for name in node.input:
            if name in self.fixed and name in self.floats and _size(self.fixed[name]) == 1:
                value = abs(float(self._array(name).reshape(())))
                if np.isfinite(value) and (value > _HALF_MAX or 0 < value < _HALF_LEAST):
                    return True
        return False

    # ------------------------------------------------------------------ nodes
    def _convert(self, node: onnx.NodeProto) -> None:
        choice, precision = self.choice[node.name], self.precision[node.name]
        if precision == "float16" and self._must_be_single(node):
            precision = "float32"
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        int8 = choice.precision == "int8"
        for i, name in enumerate(node.input):
            if name and name not in self.floats:
                copy.input[i] = self._integers(name)
            elif int8 and i == 1 and choice.kind in ("gemm", "conv"):
                copy.input[i] = self._int8_weight(name, _channel_axis(node), precision)
            elif name and int8 and i < 2 and name not in self.fixed:
                copy.input[i] = self._int8_activation(name, precision)
            elif name:
                copy.input[i] = self._as(name, "float32" if (node.op_type, i) in _FLOAT32_INPUTS else precision)
        self.nodes.append(copy)
        for name in node.output:
            if name in self.floats:
                self.types[name] = precision
        if int8 and choice.kind in ("layernorm", "softmax"):
            raw = f"{node.output[0]}_unrounded"
            self.types[raw] = precision
            self._swap_output(copy, node.output[0], raw, precision)

    def _swap_output(self, node: onnx.NodeProto, name: str, raw: str, precision: Float) -> None:
        """Let `name` be the 8-bit rounding of what the node computes."""
        node.output[0] = raw
        rounded = self._quantize(raw, name, precision)
        self._dequantize(rounded, name, name, precision, precision)

    def _rename_output(self, name: str) -> None:
        """A graph output that was computed in half precision leaves as float32 under its own name."""
        half = f"{name}_float16"
        for node in self.nodes:
            for names in (node.input, node.output):
                for i, other in enumerate(names):
                    if other == name:
                        names[i] = half
        self.nodes.append(helper.make_node("Cast", [half], [name], f"{name}_Cast", to=TensorProto.FLOAT))

    def _as(self, name: str, precision: Float) -> str:
        """The tensor in that precision: a converted constant, the tensor itself, or a cast of it."""
        if name in self.fixed:
            new = f"{name}_{precision}"
            if new not in self.tensors:
                limit = _HALF_MAX if precision == "float16" else np.inf
                values = self._array(name)
                finite = np.where(np.isfinite(values), np.clip(values, -limit, limit), values)
                self.tensors[new] = numpy_helper.from_array(finite.astype(precision), new)
            return new
        if self.types[name] == precision:
            return name
        new = f"{name}_{precision}"
        if new not in self.made:
            self.made.add(new)
            self.nodes.append(helper.make_node("Cast", [name], [new], f"{new}_Cast", to=_ONNX[precision]))
        return new

    def _integers(self, name: str) -> str:
        if name in self.fixed and name not in self.tensors:
            tensor = TensorProto()
            tensor.CopyFrom(self.fixed[name])
            tensor.name = name
            self.tensors[name] = tensor
        return name

    # ------------------------------------------------------------------ Q and DQ
    def _int8_activation(self, name: str, precision: Float) -> str:
        rounded = self._quantize(name, name, self.types[name])
        return self._dequantize(rounded, name, f"{name}_dequantized_{precision}", self.types[name], precision)

    def _quantize(self, name: str, measured: str, precision: Float) -> str:
        rounded = f"{measured}_int8"
        if rounded not in self.made:
            self.made.add(rounded)
            scale = self._put(f"{rounded}_scale_{precision}", self._activation_scale(measured).astype(precision))
            zero = self._put("zero_int8", np.zeros((), np.int8))
            self.nodes.append(
                helper.make_node("QuantizeLinear", [name, scale, zero], [rounded], f"{measured}_QuantizeLinear")
            )
        return rounded

    def _dequantize(self, rounded: str, measured: str, new: str, source: Float, precision: Float) -> str:
        if new not in self.made:
            self.made.add(new)
            # The same number in both types, so that a change of type rounds nothing.
            values = self._activation_scale(measured).astype(precision)
            scale = self._put(f"{rounded}_scale_{precision}", values)
            zero = self._put("zero_int8", np.zeros((), np.int8))
            self.nodes.append(
                helper.make_node("DequantizeLinear", [rounded, scale, zero], [new], f"{new}_DequantizeLinear")
            )
        return new

    def _activation_scale(self, name: str) -> npt.NDArray[Any]:
        if name not in self.ranges:
            raise InputError(
                f"ranges: none for tensor {name!r}, which enters an INT8 layer; calibrate with this policy"
            )
        lowest, highest = self.ranges[name]
        if not np.isfinite([lowest, highest]).all():
            raise InputError(
                f"ranges: {name!r} has [{lowest}, {highest}]; calibrate on samples free of NaN and infinity"
            )
        largest = max(abs(lowest), abs(highest))
        if largest > _HALF_MAX:
            raise InputError(f"ranges: {name!r} reaches {largest:.6g}, past the {_HALF_MAX:.0f} of half precision")
        return _scales(np.array(largest), 127)

    def _int8_weight(self, name: str, axis: int, precision: Float) -> str:
        rounded, new = f"{name}_int8_axis{axis}", f"{name}_dequantized_axis{axis}_{precision}"
        if rounded not in self.tensors:
            weight = self._array(name)
            if not np.isfinite(weight).all():
                raise InputError(f"weight {name!r} holds NaN or infinity; train or export the model again")
            others = tuple(i for i in range(weight.ndim) if i != axis)
            scale = _scales(np.abs(weight).max(axis=others), self.levels)
            shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
            values = np.clip(np.rint(weight / scale.reshape(shape)), -self.levels, self.levels)
            self.tensors[rounded] = numpy_helper.from_array(values.astype(np.int8), rounded)
            self._put(f"{rounded}_zero", np.zeros(scale.shape, np.int8))
            self.weight_scales[rounded] = scale
        if new not in self.made:
            self.made.add(new)
            scales = self._put(f"{rounded}_scale_{precision}", self.weight_scales[rounded].astype(precision))
            inputs = [rounded, scales, f"{rounded}_zero"]
            self.nodes.append(helper.make_node("DequantizeLinear", inputs, [new], f"{new}_DequantizeLinear", axis=axis))
        return new

    def _put(self, name: str, values: npt.NDArray[Any]) -> str:
        if name not in self.tensors:
            self.tensors[name] = numpy_helper.from_array(np.asarray(values), name)
        return name

    def _array(self, name: str) -> npt.NDArray[Any]:
        try:
            return numpy_helper.to_array(self.fixed[name], str(self.folder))
        except Exception as problem:  # onnx raises several kinds for external data that is missing or short
            reason = " ".join(str(problem).split())
            raise InputError(f"weight {name!r} cannot be read ({reason}); export the model again") from problem


def _float_tensors(model: onnx.ModelProto) -> set[str]:
    """Names of all float32 tensors of the graph."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=False).graph
    values = [*graph.input, *graph.output, *graph.value_info]
    known = {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.FLOAT}
    return known | {name for name, t in constants(model.graph).items() if t.data_type == TensorProto.FLOAT}


def _scales(largest: npt.NDArray[Any], levels: int) -> npt.NDArray[np.float32]:
    """Steps for values up to `largest`, such that half precision holds them exactly; float32."""
    steps = np.clip(np.asarray(largest, np.float64) / levels, 16 * _HALF_LEAST, _HALF_MAX)
    half = steps.astype(np.float16)
    # Rounded upwards, so that the largest value still fits.
    half = np.where(half < steps, np.nextafter(half, np.float16(_HALF_MAX)), half)
    return half.astype(np.float32)


def _channel_axis(node: onnx.NodeProto) -> int:
    """The weight's axis of output channels."""
    if node.op_type == "Conv" or any(a.name == "transB" and a.i for a in node.attribute):
        return 0
    return 1


def _size(tensor: TensorProto) -> int:
    return int(np.prod(tensor.dims, dtype=np.int64))
