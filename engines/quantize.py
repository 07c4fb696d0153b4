"""FP32 ONNX -> INT8 ONNX for ONNX Runtime on the CPU.

A quantized product becomes QuantizeLinear (or DynamicQuantizeLinear) and MatMulIntegerToFloat, which multiplies in
8 bits and scales and adds the bias while it writes: what was around it stays in single precision and is rounded
nowhere else. Activations are uint8 with a zero point, weights int8: products of two signed operands run an
order of magnitude slower there.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from engines.calibrate import Ranges, calibrate, channel_maxima
from engines.errors import InputError
from engines.explain import annotate
from engines.fuse import CONTRIB, fuse_rotary, use_contrib
from engines.graph import constant, load, save, sweep, users, values
from engines.latency import environment
from engines.operators import layer_times
from engines.policy import Choice, QuantPolicy, choices, constants
from engines.runtimes import Array, Arrays, OnnxRuntime
from engines.smooth import norms, smooth

_PROFILE_ROUNDS = 20


@dataclass(frozen=True)
class Report:
    """What was done. choices: every node's precision and why; bits_w: levels of the weights after reduce_range;
    smoothed: LayerNorms whose scales moved into the next weights; ranges: of the activations (static mode).
    """

    choices: tuple[Choice, ...]
    bits_w: int
    smoothed: int
    ranges: dict[str, tuple[float, float]]

    def count(self, precision: str) -> int:
        """Number of eligible nodes at "int8" or "kept"; of the others at "float"."""
        return sum(c.precision == precision for c in self.choices)

    def to_data(self) -> dict[str, Any]:
        """JSON-able."""
        return dataclasses.asdict(self)


def post_training(fp32_path: str | Path, out_path: str | Path, policy: QuantPolicy, feeds: Sequence[Arrays]) -> Report:
    """Smooth, calibrate and quantize as `policy` says; `feeds` holds the calibration samples, inputs batch by batch.

    Raises InputError as `calibrate` and `quantize_cpu` do; `out_path` then stays as it was.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, smoothed = smoothed_file(fp32_path, policy, feeds, Path(folder))
        ranges = ranges_of(source, policy, feeds) if policy.mode == "static" else {}
        report = quantize_cpu(source, out_path, policy, ranges)
    return dataclasses.replace(report, smoothed=smoothed)


def smoothed_file(
    fp32_path: str | Path, policy: QuantPolicy, feeds: Sequence[Arrays], folder: Path
) -> tuple[Path, int]:
    """The FP32 file after SmoothQuant, in `folder`, and the LayerNorms that it changed; without smoothing the file."""
    if not policy.smooth:
        return Path(fp32_path), 0
    model = load(fp32_path)
    chosen = choices(model, policy)
    maxima = channel_maxima(fp32_path, feeds, norms(model, chosen), policy.calibration)
    smoothed, path = smooth(model, chosen, maxima, policy.smooth), folder / "smooth.onnx"
    save(model, path)
    return path, smoothed


def ranges_of(fp32_path: str | Path, policy: QuantPolicy, feeds: Sequence[Arrays]) -> dict[str, tuple[float, float]]:
    """The range of every activation that the policy rounds."""
    model = load(fp32_path)
    return calibrate(fp32_path, feeds, activations(model, choices(model, policy)), policy.method, policy.calibration)


def activations(model: onnx.ModelProto, chosen: Iterable[Choice]) -> list[str]:
    """The tensors whose ranges the static mode needs for the int8 choices."""
    nodes = {node.name: node for node in model.graph.node}
    found: list[str] = []
    for choice in chosen:
        if choice.precision != "int8":
            continue
        node = nodes[choice.node]
        found.append(node.input[0])
        if choice.kind == "attention":
            found.append(node.input[1])
        elif choice.kind in ("layernorm", "softmax"):
            found.append(node.output[0])
    return list(dict.fromkeys(found))


def quantize_cpu(fp32_path: str | Path, out_path: str | Path, policy: QuantPolicy, ranges: Ranges) -> Report:
    """Write the INT8 file of `policy`, whole and loadable or not at all, with the policy and its choices in it.

    Args:
        fp32_path: of `export_onnx`.
        ranges: (lo, hi) of every tensor in `activations`; ignored in the dynamic mode. `policy.smooth` is not
            looked at: smooth before calibrating, or call `post_training`.

    Raises:
        InputError: an unreadable or already quantized graph, a keep pattern that matches nothing, a range that
            is missing or not finite, a path that cannot be written.
    """
    model = load(fp32_path)
    chosen = choices(model, policy)
    if policy.mode == "static":
        _check_ranges(activations(model, chosen), ranges)
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "int8.onnx"
        result = _quantized(model, chosen, policy, ranges)
        save(result, draft)
        if policy.skip_slower:
            chosen = _without_losers(fp32_path, draft, chosen)
            result = _quantized(model, chosen, policy, ranges)
        annotate(result, policy, chosen)
        save(result, draft)
        OnnxRuntime(draft, "cpu", threads=1).close()  # refuses what it cannot run
        save(result, out_path)
    plain = {name: (float(lo), float(hi)) for name, (lo, hi) in ranges.items()}
    return Report(tuple(chosen), weight_bits(policy), 0, plain)


def weight_bits(policy: QuantPolicy) -> int:
    """Levels of the weights on this machine: 8-bit products saturate where it has no VNNI."""
    reduce = policy.reduce_range
    if reduce is None:
        reduce = "VNNI" not in str(environment()["isa"])
    return min(policy.bits_w, 7) if reduce else policy.bits_w


def _check_ranges(needed: Sequence[str], ranges: Ranges) -> None:
    missing = [name for name in needed if name not in ranges]
    if missing:
        raise InputError(f"no range for {missing[0]!r} and {len(missing) - 1} more; calibrate all of activations()")
    for name in needed:
        lo, hi = ranges[name]
        if not (np.isfinite(lo) and np.isfinite(hi) and lo <= hi):
            raise InputError(f"range of {name!r} is ({lo}, {hi}): expected finite lo <= hi; calibrate again")


def _without_losers(fp32_path: str | Path, int8_path: Path, chosen: Sequence[Choice]) -> list[Choice]:
    """Products that took longer in INT8 than in single precision go back to it."""
    before, after = (layer_times(path, rounds=_PROFILE_ROUNDS) for path in (fp32_path, int8_path))
    result = []
    for choice in chosen:
        was, now = before.get(choice.layer, 0.0), after.get(choice.layer, 0.0)
        if choice.precision == "int8" and choice.kind in ("gemm", "conv", "attention") and 0 < was < now:
            why = f"INT8 measured slower: {now:.0f} us against {was:.0f} us"
            choice = dataclasses.replace(choice, precision="kept", why=why)
        result.append(choice)
    return result


def _quantized(fp32: onnx.ModelProto, chosen: Sequence[Choice], policy: QuantPolicy, ranges: Ranges) -> onnx.ModelProto:
    model = onnx.ModelProto()
    model.CopyFrom(fp32)
    fuse_rotary(model)
    builder = _Builder(model, ranges if policy.mode == "static" else None, weight_bits(policy))
    builder.run({c.node: c for c in chosen if c.precision == "int8"})
    use_contrib(model)
    sweep(model.graph)
    return model


class _Builder:
    """Rebuilds the node list of `model` in order; each new node carries its layer's name as a prefix."""

    def __init__(self, model: onnx.ModelProto, ranges: Ranges | None, bits_w: int) -> None:
        self.graph = model.graph
        self.ranges, self.bits_w = ranges, bits_w
        self.fixed = constants(self.graph)
        self.users = users(self.graph)
        self.outputs = {output.name for output in self.graph.output}
        self.nodes: list[onnx.NodeProto] = []
        self.added: set[str] = set()
        self.codes: dict[str, tuple[str, str, str]] = {}  # tensor -> its uint8 codes, scale, zero point
        self.rounded: dict[str, str] = {}  # tensor -> what its readers get instead
        self.merged: set[str] = set()  # bias additions that a product has taken over

    def run(self, int8: Mapping[str, Choice]) -> None:
        """Rewrite the graph in place."""
        for node in self.graph.node:
            if node.name in self.merged:
                continue
            choice = int8.get(node.name)
            for i, name in enumerate(node.input):
                if choice is None or choice.kind in ("layernorm", "softmax"):
                    node.input[i] = self.rounded.get(name, name)
            if choice is None:
                self.nodes.append(node)
            elif choice.kind == "conv":
                self._conv(node)
            elif choice.kind == "gemm":
                self._gemm(node)
            elif choice.kind == "attention":
                parts = [self._codes(name, node.name) for name in node.input]
                self._product(node.name, parts[0], parts[1], "", node.output[0])
            else:
                self._norm(node)
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)

    def _emit(self, op: str, inputs: Sequence[str], outputs: Sequence[str], layer: str, **attributes: Any) -> None:
        name = f"{layer}/{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, outputs, name=name, **attributes))

    def _constant(self, name: str, array: object, dtype: type) -> str:
        if name not in self.added:
            self.added.add(name)
            self.graph.initializer.append(constant(name, array, dtype))
        return name

    def _codes(self, tensor: str, layer: str) -> tuple[str, str, str]:
        """uint8 codes of an activation, made once however many layers read it."""
        if tensor not in self.codes:
            names = (f"{tensor}/codes", f"{tensor}/scale", f"{tensor}/zero")
            if self.ranges is None:
                self._emit("DynamicQuantizeLinear", [tensor], names, layer)
            else:
                scale, zero = _affine(*self.ranges[tensor])
                self._constant(names[1], scale, np.float32)
                self._constant(names[2], zero, np.uint8)
                self._emit("QuantizeLinear", [tensor, *names[1:]], names[:1], layer)
            self.codes[tensor] = names
        return self.codes[tensor]

    def _product(self, layer: str, left: Sequence[str], right: Sequence[str], bias: str, output: str) -> None:
        inputs = [left[0], right[0], left[1], right[1], left[2], right[2], bias]
        self._emit("MatMulIntegerToFloat", inputs if bias else inputs[:-1], [output], layer, domain=CONTRIB)

    def _gemm(self, node: onnx.NodeProto) -> None:
        weight, key = values(self.fixed[node.input[1]]), node.input[1]
        bias, output = "", node.output[0]
        if node.op_type == "Gemm":
            options = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            if options.get("transB"):
                weight, key = weight.T, f"{key}/transposed"
            if options.get("alpha", 1.0) != 1.0:
                weight, key = weight * np.float32(options["alpha"]), f"{key}/{node.name}"
            if len(node.input) > 2:
                output = f"{output}/product"
        else:
            bias, output = self._bias(output, weight.shape[1])
        codes, scale = _per_channel(weight, axis=1, bits=self.bits_w)
        right = (
            self._constant(f"{key}/int8", codes, np.int8),
            self._constant(f"{key}/scale", scale, np.float32),
            "",
        )
        self._product(node.name, self._codes(node.input[0], node.name), right, bias, output)
        if output != node.output[0] and node.op_type == "Gemm":
            beta = self._constant(f"{node.name}/beta", options.get("beta", 1.0), np.float32)
            self._emit("Mul", [node.input[2], beta], [f"{output}/bias"], node.name)
            self._emit("Add", [output, f"{output}/bias"], node.output, node.name)

    def _bias(self, output: str, width: int) -> tuple[str, str]:
        """The constant that a following Add puts on top and that Add's output, or no bias and `output` itself."""
        readers = self.users[output]
        if len(readers) == 1 and readers[0].op_type == "Add" and output not in self.outputs:
            other = readers[0].input[1 - list(readers[0].input).index(output)]
            if other in self.fixed and list(self.fixed[other].dims) == [width]:
                self.merged.add(readers[0].name)
                return other, readers[0].output[0]
        return "", output

    def _conv(self, node: onnx.NodeProto) -> None:
        """ConvInteger sums in int32; scale and bias follow, so that the result is not rounded to 8 bits."""
        weight, layer, key = values(self.fixed[node.input[1]]), node.name, node.input[1]
        codes, scale = _per_channel(weight, axis=0, bits=self.bits_w)
        around = (-1, *[1] * (weight.ndim - 2))
        x, x_scale, zero = self._codes(node.input[0], layer)
        kernel = self._constant(f"{key}/int8", codes, np.int8)
        kernel_scale = self._constant(f"{key}/scale", scale.reshape(around), np.float32)
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        self._emit("ConvInteger", [x, kernel, zero], [f"{layer}/sum"], layer, **attributes)
        self._emit("Cast", [f"{layer}/sum"], [f"{layer}/sum32"], layer, to=onnx.TensorProto.FLOAT)
        self._emit("Mul", [x_scale, kernel_scale], [f"{layer}/scale"], layer)
        last = f"{layer}/scaled" if len(node.input) > 2 else node.output[0]
        self._emit("Mul", [f"{layer}/sum32", f"{layer}/scale"], [last], layer)
        if len(node.input) > 2:
            bias = values(self.fixed[node.input[2]]).reshape(around)
            self._emit("Add", [last, self._constant(f"{layer}/bias", bias, np.float32)], node.output, layer)

    def _norm(self, node: onnx.NodeProto) -> None:
        """A LayerNorm or Softmax out of the keep-list: computed in single precision between 8-bit tensors."""
        source, result = node.input[0], node.output[0]
        node.input[0] = self._round(source, node.name)
        self.nodes.append(node)
        if result not in self.outputs:
            self.rounded[result] = self._round(result, node.name)

    def _round(self, tensor: str, layer: str) -> str:
        name = f"{tensor}/rounded"
        if name not in self.added:
            self.added.add(name)
            self._emit("DequantizeLinear", self._codes(tensor, layer), [name], layer)
        return name


def _affine(lo: float, hi: float) -> tuple[float, int]:
    """Scale and zero point of uint8 codes; zero is exact and inside the range."""
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    scale = float(np.float32((hi - lo) / 255)) or 1.0
    return scale, int(np.clip(round(-lo / scale), 0, 255))


def _per_channel(weight: Array, axis: int, bits: int) -> tuple[Array, Array]:
    """int8 codes and the scale of each output channel (`axis`)."""
    top = 2 ** (bits - 1) - 1
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scale = np.abs(weight).max(axis=others, keepdims=True) / np.float32(top)
    scale[scale == 0] = 1.0
    codes = np.clip(np.rint(weight / scale), -top, top).astype(np.int8)
    return codes, scale.reshape(-1)
