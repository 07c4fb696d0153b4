"""The explicit-QDQ twin: numerics in ONNX Runtime, and the types and scales that TensorRT demands."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from engines import qdq
from engines.calibrate import Ranges, calibrate
from engines.errors import InputError
from engines.explain import annotation
from engines.export import export_onnx
from engines.policy import QuantPolicy, choices
from engines.qdq import write_qdq
from engines.quantize import activations

Arrays = dict[str, npt.NDArray[np.float32]]


class Block(nn.Module):
    """One pre-norm attention block, a convolution before it and a head that ends in an exponential."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 32, 4, stride=4)
        self.norm = nn.LayerNorm(32)
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        t = self.embed(x).flatten(2).transpose(1, 2)
        n = self.norm(t)
        q, k, v = (f(n).view(1, 16, 2, 16).transpose(1, 2) for f in (self.q, self.k, self.v))
        a = nn.functional.scaled_dot_product_attention(q, k, v)
        t = t + self.out(a.transpose(1, 2).reshape(1, 16, 32))
        raw = self.head(t)
        return raw[..., :4], 1 + (raw[..., 4] + 12).exp()  # e^12 is past half precision


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("block") / "block.onnx"
    export_onnx(Block(), (torch.rand(1, 3, 16, 16),), path, ["x"], ["y", "conf"])
    return path


def images(count: int, seed: int = 1) -> list[Arrays]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.uniform(-1, 1, (1, 3, 16, 16)).astype(np.float32)} for _ in range(count)]


def run(path: Path, feed: Arrays) -> list[npt.NDArray[np.float32]]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return list(ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, feed))


def measure(path: Path, policy: QuantPolicy, feeds: Sequence[Arrays]) -> Ranges:
    """The range of every tensor that the policy rounds."""
    model = onnx.load(str(path), load_external_data=False)
    names = activations(model, choices(model, policy))
    return calibrate(path, [tuple(feed.values()) for feed in feeds], names, "minmax", len(feeds))


def error(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def producers(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in graph.node for name in node.output}


def array(graph: onnx.GraphProto, name: str) -> npt.NDArray[np.float32]:
    return numpy_helper.to_array(next(t for t in graph.initializer if t.name == name))


POLICIES = [
    (QuantPolicy(), "float16"),
    (QuantPolicy(), "float32"),
    (QuantPolicy(keep=("layernorm", "softmax")), "float16"),
    (QuantPolicy(keep=()), "float16"),
    (QuantPolicy(keep=("q/MatMul", "conv")), "float32"),
]


@pytest.mark.parametrize(("policy", "kept"), POLICIES)
def test_follows_fp32_in_onnx_runtime(block: Path, tmp_path: Path, policy: QuantPolicy, kept: qdq.Float) -> None:
    twin = tmp_path / "new" / "twin.onnx"
    write_qdq(block, twin, policy, measure(block, policy, images(16)), kept)
    onnx.checker.check_model(onnx.load(str(twin)), full_check=True)
    feed = images(1, seed=2)[0]
    errors = [error(a, b) for a, b in zip(run(twin, feed), run(block, feed), strict=True)]
    # 8 bits over a range of a few standard deviations: one to three percent per layer, five layers deep.
    assert all(1e-4 < e < 0.06 for e in errors), errors
    assert [p.name for p in twin.parent.iterdir()] == ["twin.onnx"]
    said = annotation(twin)
    assert said and said[0] == policy, "both exports explain themselves"


def test_nothing_but_float16_separates_a_twin_without_int8_from_fp32(block: Path, tmp_path: Path) -> None:
    policy = QuantPolicy(keep=("gemm", "conv", "attention", "layernorm", "softmax"))
    write_qdq(block, tmp_path / "half.onnx", policy, {}, "float16")
    feed = images(1)[0]
    y, conf = (error(a, b) for a, b in zip(run(tmp_path / "half.onnx", feed), run(block, feed), strict=True))
    assert 1e-6 < y < 2e-3 and 1e-6 < conf < 2e-3


def test_one_layer_is_the_textbook_formula(tmp_path: Path) -> None:
    """y = s_x q(x) (s_w q(w)) + b with symmetric q, worked out in float64 by hand."""
    torch.manual_seed(3)
    layer = nn.Linear(24, 40)
    with torch.no_grad():
        layer.weight *= torch.logspace(-3, 1, 40)[:, None]  # channels of very different size
    x = torch.randn(1, 7, 24)
    path, twin = tmp_path / "a.onnx", tmp_path / "b.onnx"
    export_onnx(layer, (x,), path, ["x"], ["y"])
    policy = QuantPolicy()
    ranges = measure(path, policy, [{"x": x.numpy()}])
    write_qdq(path, twin, policy, ranges)
    w = layer.weight.detach().numpy().astype(np.float64)
    s_w, s_x = np.abs(w).max(1) / 127, np.abs(x.numpy()).max() / 127
    q_w, q_x = np.rint(w / s_w[:, None]), np.rint(x.numpy().astype(np.float64) / s_x)
    want = (q_x @ q_w.T) * s_x * s_w + layer.bias.detach().numpy()
    got = run(twin, {"x": x.numpy()})[0]
    # Scales have the 11 bits of half precision, so some values round to the neighbouring step.
    per_channel = np.linalg.norm(got - want, axis=(0, 1)) / np.linalg.norm(want, axis=(0, 1))
    assert per_channel.max() < 0.01


@pytest.mark.parametrize(("policy", "kept"), POLICIES)
def test_what_tensorrt_demands(block: Path, tmp_path: Path, policy: QuantPolicy, kept: qdq.Float) -> None:
    twin = tmp_path / "twin.onnx"
    chosen = write_qdq(block, twin, policy, measure(block, policy, images(2)), kept)
    model = onnx.load(str(twin))
    graph, made = model.graph, producers(model.graph)
    assert [v.type.tensor_type.elem_type for v in [*graph.input, *graph.output]] == [TensorProto.FLOAT] * 3
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = array(graph, node.input[2])
            assert zero.dtype == np.int8 and not zero.any()
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, check_type=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in [*inferred.value_info, *inferred.input, *inferred.output]}
    types |= {t.name: t.data_type for t in graph.initializer}
    nodes = {n.name: n for n in graph.node}
    for choice in chosen:
        node = nodes[choice.node]
        floats = {types[n] for n in node.input if types[n] in (TensorProto.FLOAT, TensorProto.FLOAT16)}
        assert len(floats) <= 1, f"{node.name} mixes types"  # strongly typed networks have no implicit casts
        rounded = [made[n].op_type == "DequantizeLinear" for n in node.input[:2] if n in made]
        if choice.precision == "int8" and choice.kind in ("gemm", "conv", "attention"):
            assert rounded == [True, True]
        elif choice.precision == "kept" and choice.kind in ("gemm", "conv", "attention"):
            assert not any(rounded)
        if choice.precision == "kept":
            ends = choice.layer.startswith("head")
            assert floats == {TensorProto.FLOAT if kept == "float32" or ends else TensorProto.FLOAT16}
    # The exponential and the layer that feeds it.
    assert {types[n] for op in graph.node if op.op_type == "Exp" for n in op.input} == {TensorProto.FLOAT}
    assert types[nodes["/head/MatMul"].output[0]] == TensorProto.FLOAT


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_weights_use_all_their_levels_per_channel(block: Path, tmp_path: Path, bits: int) -> None:
    policy = QuantPolicy(bits_w=bits)
    write_qdq(block, tmp_path / "twin.onnx", policy, measure(block, policy, images(2)))
    graph = onnx.load(str(tmp_path / "twin.onnx")).graph
    weights = [t for t in graph.initializer if t.data_type == TensorProto.INT8 and len(t.dims) > 1]
    assert len(weights) == 6
    made = {n.input[0]: n for n in graph.node if n.op_type == "DequantizeLinear"}
    for tensor in weights:
        values, node = numpy_helper.to_array(tensor).astype(int), made[tensor.name]
        axis = next(a.i for a in node.attribute if a.name == "axis")
        assert axis == (0 if values.ndim == 4 else 1)  # convolutions are (out, in, h, w), matrices (in, out)
        largest = np.abs(values).max(axis=tuple(i for i in range(values.ndim) if i != axis))
        # A scale that was rounded up to half precision may leave the largest weight one step below the top.
        assert set(largest) <= {2 ** (bits - 1) - 1, 2 ** (bits - 1) - 2}
        assert array(graph, node.input[1]).shape == largest.shape


@given(st.floats(0, 65504), st.sampled_from([7, 127]))
def test_scales_are_exact_in_half_precision_and_clip_nothing(largest: float, levels: int) -> None:
    scale = qdq._scales(np.array([largest]), levels)
    assert scale == scale.astype(np.float16) and scale > 0
    assert largest <= float(scale[0]) * levels
    if largest > 0.1:
        assert float(scale[0]) * levels < largest * 1.001


def test_a_scalar_that_half_precision_cannot_hold_keeps_its_node_single(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            y = (y * 1e6) / (1e6 + y.abs() * 1e-9)  # the identity; in half precision infinity
            return self.b(y)

    path, twin = tmp_path / "a.onnx", tmp_path / "b.onnx"
    x = torch.randn(1, 4, 8)
    export_onnx(Masked(), (x,), path, ["x"], ["y"])
    write_qdq(path, twin, QuantPolicy(), measure(path, QuantPolicy(), [{"x": x.numpy()}]))
    assert error(run(twin, {"x": x.numpy()})[0], run(path, {"x": x.numpy()})[0]) < 0.05


def test_gemm_with_a_computed_bias(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    w = numpy_helper.from_array(rng.normal(size=(6, 8)).astype(np.float32), "w")
    nodes = [
        helper.make_node("Gelu", ["x"], ["h"], "/gelu"),
        helper.make_node("Gemm", ["h", "w", "c"], ["y"], "/gemm", transB=1),
    ]
    values = {"x": (4, 8), "c": (4, 6), "y": (4, 6)}
    x, c, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in values.items())
    path, twin = tmp_path / "a.onnx", tmp_path / "b.onnx"
    graph = helper.make_graph(nodes, "g", [x, c], [y], [w])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), str(path))
    feed = {n: rng.normal(size=values[n]).astype(np.float32) for n in ("x", "c")}
    ranges = measure(path, QuantPolicy(), [feed])
    assert list(ranges) == ["h"]
    write_qdq(path, twin, QuantPolicy(), ranges)
    assert 0 < error(run(twin, feed)[0], run(path, feed)[0]) < 0.02


def test_a_tensor_may_be_an_output_and_enter_an_int8_layer(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.norm(self.a(x))
            return y, self.b(y)

    torch.manual_seed(0)
    path, twin = tmp_path / "a.onnx", tmp_path / "b.onnx"
    x = torch.randn(1, 4, 8)
    export_onnx(Two(), (x,), path, ["x"], ["y", "z"])
    policy = QuantPolicy()
    write_qdq(path, twin, policy, measure(path, policy, [{"x": x.numpy()}]))
    got, want = run(twin, {"x": x.numpy()}), run(path, {"x": x.numpy()})
    assert [g.dtype for g in got] == [np.float32, np.float32]
    assert all(error(g, w) < 0.05 for g, w in zip(got, want, strict=True))


def test_shipped_teacher_keeps_its_pointmaps(tmp_path: Path) -> None:
    domain = pytest.importorskip("trainables.dust3r.domain")
    rooms = pytest.importorskip("trainables.dust3r.rooms")
    torch.manual_seed(0)
    model = domain.Dust3r({}, 0).load(domain.SHIPPED)
    views = rooms.render(0, "train", torch.arange(10), 2, (64, 64)).image.float() / 127.5 - 1
    path, twin = tmp_path / "teacher.onnx", tmp_path / "twin.onnx"
    names = ["pts1", "conf1", "pts2", "conf2"]
    export_onnx(domain.Deployed(model), (views[:1, 0], views[:1, 1]), path, ["img1", "img2"], names)
    feeds = [{"img1": v[None, 0].numpy(), "img2": v[None, 1].numpy()} for v in views]
    policy = QuantPolicy()
    write_qdq(path, twin, policy, measure(path, policy, feeds[2:]))
    errors = [[error(a, b) for a, b in zip(run(twin, f), run(path, f), strict=True)] for f in feeds[:2]]
    pts1, _, pts2, _ = np.mean(errors, axis=0)
    assert pts1 < 0.05 and pts2 < 0.05, errors


def refusal(source: Path, target: Path, policy: QuantPolicy, ranges: Ranges) -> str:
    target.write_bytes(b"old")
    with pytest.raises(InputError) as caught:
        write_qdq(source, target, policy, ranges)
    assert "\n" not in str(caught.value)
    assert target.read_bytes() == b"old" and not list(target.parent.glob(".*"))
    return str(caught.value)


def test_bad_ranges_are_one_line(block: Path, tmp_path: Path) -> None:
    policy = QuantPolicy()
    ranges = measure(block, policy, images(1))
    first = next(iter(ranges))
    target = tmp_path / "twin.onnx"
    assert repr(first) in refusal(block, target, policy, {k: v for k, v in ranges.items() if k != first})
    assert "[nan, 1.0]" in refusal(block, target, policy, {**ranges, first: (float("nan"), 1.0)})
    assert "inf" in refusal(block, target, policy, {**ranges, first: (0.0, float("inf"))})
    assert "70000" in refusal(block, target, policy, {**ranges, first: (-7e4, 0.0)})


def test_bad_graphs_are_one_line(block: Path, tmp_path: Path) -> None:
    policy, target, source = QuantPolicy(), tmp_path / "twin.onnx", tmp_path / "bad.onnx"
    ranges = measure(block, policy, images(1))
    assert "no such" in (text := refusal(source, target, policy, ranges)).lower() and str(source) in text
    source.write_bytes(b"not onnx at all")
    assert "not a readable ONNX file" in refusal(source, target, policy, ranges)

    model = onnx.load(str(block))
    model.opset_import[0].version = 17
    onnx.save(model, str(source))
    assert "opset 17" in refusal(source, target, policy, ranges)

    model = onnx.load(str(block))
    weight = next(t for t in model.graph.initializer if len(t.dims) == 2)
    values = numpy_helper.to_array(weight).copy()
    values[0, 0] = np.nan
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(model, str(source))
    assert weight.name in (text := refusal(source, target, policy, ranges)) and "NaN" in text

    model = onnx.load(str(block))
    branch = helper.make_graph([], "b", [], [])
    model.graph.node.append(helper.make_node("If", ["c"], ["d"], "/loop/If", then_branch=branch, else_branch=branch))
    onnx.save(model, str(source))
    assert "/loop/If" in refusal(source, target, policy, ranges)

    model = onnx.load(str(block))
    model.graph.node.append(helper.make_node("FastGelu", ["y"], ["z"], "/gelu", domain="com.microsoft"))
    onnx.save(model, str(source))
    assert "com.microsoft.FastGelu" in refusal(source, target, policy, ranges)

    write_qdq(block, tmp_path / "once.onnx", policy, ranges)
    assert "quantized already" in refusal(tmp_path / "once.onnx", target, policy, ranges)


def test_weights_in_external_data(block: Path, tmp_path: Path) -> None:
    source = tmp_path / "big.onnx"
    onnx.save(onnx.load(str(block)), str(source), save_as_external_data=True, location="big.data", size_threshold=64)
    policy = QuantPolicy()
    ranges = measure(block, policy, images(1))
    write_qdq(block, tmp_path / "a.onnx", policy, ranges)
    write_qdq(source, tmp_path / "b.onnx", policy, ranges)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    (tmp_path / "big.data").unlink()
    assert "cannot be read" in refusal(source, tmp_path / "c.onnx", policy, ranges)
