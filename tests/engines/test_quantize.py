import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from engines import quantize
from engines.calibrate import calibrate
from engines.errors import InputError
from engines.export import export_onnx
from engines.graph import load, values
from engines.policy import QuantPolicy, choices
from engines.quantize import activations, post_training, quantize_cpu, weight_bits
from engines.runtimes import OnnxRuntime

Feeds = list[tuple[np.ndarray]]


def error(path: Path, fp32: Path, feeds: Feeds) -> float:
    """Relative L2 error over the samples."""
    a, b = (np.concatenate([OnnxRuntime(p, "cpu", 1).run(x)[0] for x in feeds]) for p in (path, fp32))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def linear_file(weight: np.ndarray, bias: np.ndarray, rows: int, path: Path) -> Path:
    net = nn.Linear(weight.shape[1], weight.shape[0])
    net.weight.data, net.bias.data = torch.from_numpy(weight), torch.from_numpy(bias)
    export_onnx(net, (torch.zeros(1, rows, weight.shape[1]),), path, ["x"], ["y"])
    return path


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), st.integers(1, 40), st.integers(4, 8), st.integers(0, 99))
def test_shallow_net_is_exact(
    tmp_path_factory: pytest.TempPathFactory, rows: int, inner: int, width: int, bits: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    folder = tmp_path_factory.mktemp("exact")
    weight = rng.normal(size=(width, inner)).astype(np.float32)
    bias = rng.normal(size=width).astype(np.float32)
    path = linear_file(weight, bias, rows, folder / "net.onnx")
    x = rng.uniform(-1, 3, size=(1, rows, inner)).astype(np.float32)
    policy = QuantPolicy(bits_w=bits, calibration=1)
    report = post_training(path, folder / "int8.onnx", policy, [(x,)])
    # What 8-bit arithmetic is meant to give, in integers and double precision.
    top = 2 ** (report.bits_w - 1) - 1
    scale = np.abs(weight).max(1) / np.float32(top)
    codes = np.rint(weight / scale[:, None]).astype(np.int64)
    lo, hi = report.ranges["x"]
    step = np.float32((max(hi, 0.0) - min(lo, 0.0)) / 255)
    zero = round(-min(lo, 0.0) / step)
    activation = np.clip(np.rint(x / step).astype(np.int64) + zero, 0, 255) - zero
    want = activation @ codes.T * (step * scale.astype(np.float64)) + bias
    (got,) = OnnxRuntime(folder / "int8.onnx", "cpu", 1).run((x,))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def test_extreme_operands_do_not_saturate(tmp_path: Path) -> None:
    """Every product at its largest: 16-bit sums of pairs overflow unless the machine or 7-bit weights prevent it."""
    path = linear_file(np.full((8, 64), 0.5, np.float32), np.zeros(8, np.float32), 4, tmp_path / "net.onnx")
    x = np.full((1, 4, 64), 2.0, np.float32)
    post_training(path, tmp_path / "int8.onnx", QuantPolicy(calibration=1), [(x,)])
    np.testing.assert_allclose(OnnxRuntime(tmp_path / "int8.onnx", "cpu", 1).run((x,))[0], 64.0, rtol=1e-3)


def test_reduce_range_follows_the_machine(monkeypatch: pytest.MonkeyPatch, block_file: Path, tmp_path: Path) -> None:
    for isa, bits in (("AVX2", 7), ("AVX512", 7), ("AVX512+VNNI", 8), ("AVX2+VNNI", 8)):
        monkeypatch.setattr(quantize, "environment", lambda isa=isa: {"isa": isa})
        assert weight_bits(QuantPolicy()) == bits
        assert weight_bits(QuantPolicy(reduce_range=True)) == 7
        assert weight_bits(QuantPolicy(reduce_range=False)) == 8
        assert weight_bits(QuantPolicy(bits_w=5, reduce_range=True)) == 5
    report = quantize_cpu(block_file, tmp_path / "a.onnx", QuantPolicy(mode="dynamic", reduce_range=True), {})
    weights = [values(t) for t in load(tmp_path / "a.onnx").graph.initializer if t.name.endswith("/int8")]
    assert report.bits_w == 7 and len(weights) == report.count("int8") == 6
    assert all(np.abs(w).max() == 63 for w in weights)
    # Two products of the largest operands fit the 16-bit sums of a machine without VNNI, with 8 bits they do not.
    assert 2 * 255 * 63 <= 32767 < 2 * 255 * 127


@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize("keep", [(), ("layernorm", "softmax", "attention"), ("gemm",), ("conv", "*fc?*", "softmax")])
def test_file_obeys_the_keep_list(
    block_file: Path, feeds: Feeds, tmp_path: Path, mode: str, keep: tuple[str, ...]
) -> None:
    path = tmp_path / "int8.onnx"
    policy = QuantPolicy(keep=keep, mode=mode, calibration=8)
    report = post_training(block_file, path, policy, feeds)
    model = load(path)
    onnx.checker.check_model(model)
    integer = {
        n.name.rsplit("/", 1)[0] for n in model.graph.node if n.op_type in ("MatMulIntegerToFloat", "ConvInteger")
    }
    plain = {n.name for n in model.graph.node}
    source = {o: n.op_type for n in model.graph.node for o in n.output}
    for choice in report.choices:
        if choice.kind in ("gemm", "conv", "attention"):
            assert (choice.node in integer, choice.node in plain) == (
                choice.precision == "int8",
                choice.precision == "kept",
            )
        elif choice.kind is not None:
            node = next(n for n in model.graph.node if n.name == choice.node)
            assert (source[node.input[0]] == "DequantizeLinear") == (choice.precision == "int8")
            readers = {n.op_type for n in model.graph.node if node.output[0] in n.input}
            if choice.precision == "int8":
                assert readers <= {"QuantizeLinear", "DynamicQuantizeLinear"}
    assert report.choices == tuple(choices(load(block_file), policy))
    assert 1e-4 < error(path, block_file, feeds) < 0.1


def test_weights_are_stored_in_eight_bits(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).normal(size=(512, 512)).astype(np.float32)
    path = linear_file(weight, np.zeros(512, np.float32), 2, tmp_path / "net.onnx")
    quantize_cpu(path, tmp_path / "int8.onnx", QuantPolicy(mode="dynamic"), {})
    assert (tmp_path / "int8.onnx").stat().st_size < 0.27 * path.stat().st_size


def test_rounding_the_keep_list_costs_accuracy(block_file: Path, feeds: Feeds, tmp_path: Path) -> None:
    errors = []
    for keep in (("layernorm", "softmax", "attention", "gemm", "conv"), ("softmax", "attention", "gemm", "conv"), ()):
        post_training(block_file, tmp_path / "a.onnx", QuantPolicy(keep=keep, calibration=8), feeds)
        errors.append(error(tmp_path / "a.onnx", block_file, feeds))
    assert errors[0] < 1e-6 < errors[1] < errors[2]


def test_strided_padded_grouped_convolution(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), nn.ReLU(), nn.Conv2d(8, 3, 1, bias=False))
    export_onnx(net, (torch.zeros(1, 4, 9, 9),), tmp_path / "net.onnx", ["x"], ["y"])
    rng = np.random.default_rng(0)
    feeds = [(rng.normal(size=(1, 4, 9, 9)).astype(np.float32) + 1,) for _ in range(4)]
    for mode in ("static", "dynamic"):
        report = post_training(tmp_path / "net.onnx", tmp_path / "q.onnx", QuantPolicy(mode=mode, calibration=4), feeds)
        assert report.count("int8") == 2
        assert error(tmp_path / "q.onnx", tmp_path / "net.onnx", feeds) < 0.02


def test_slower_layers_go_back_with_both_times(
    monkeypatch: pytest.MonkeyPatch, block_file: Path, feeds: Feeds, tmp_path: Path
) -> None:
    times = iter([{"fc1/MatMul": 10.0, "qkv/MatMul": 30.0}, {"fc1/MatMul": 12.0, "qkv/MatMul": 20.0}])
    monkeypatch.setattr(quantize, "layer_times", lambda path, rounds: next(times))
    report = post_training(block_file, tmp_path / "a.onnx", QuantPolicy(skip_slower=True, calibration=8), feeds)
    kept = {c.layer: c.why for c in report.choices if "slower" in c.why}
    assert kept == {"fc1/MatMul": "INT8 measured slower: 12 us against 10 us"}
    names = {n.name for n in load(tmp_path / "a.onnx").graph.node}
    assert "/fc1/MatMul" in names and "/qkv/MatMul" not in names


def test_measured_choice_runs_for_real(block_file: Path, feeds: Feeds, tmp_path: Path) -> None:
    report = post_training(block_file, tmp_path / "a.onnx", QuantPolicy(skip_slower=True, calibration=8), feeds)
    eligible = [c for c in report.choices if c.kind in ("gemm", "conv")]
    assert len(eligible) == 6 and all(c.precision == "int8" or "measured slower" in c.why for c in eligible)
    assert error(tmp_path / "a.onnx", block_file, feeds) < 0.1


def test_bad_input_leaves_the_old_file(block_file: Path, feeds: Feeds, tmp_path: Path) -> None:
    path = tmp_path / "int8.onnx"
    path.write_bytes(b"old")
    policy = QuantPolicy(calibration=8)
    ranges = calibrate(block_file, feeds, activations(load(block_file), choices(load(block_file), policy)), "minmax", 8)
    broken = [(np.full_like(feeds[0][0], np.nan),)] * 8
    for call, words in (
        (lambda: quantize_cpu(block_file, path, policy, dict(list(ranges.items())[1:])), "no range for"),
        (lambda: quantize_cpu(block_file, path, policy, {k: (0.0, np.inf) for k in ranges}), "expected finite"),
        (lambda: post_training(block_file, path, dataclasses.replace(policy, keep=("nope",)), feeds), "'nope' matches"),
        (lambda: post_training(block_file, path, dataclasses.replace(policy, calibration=9), feeds), "asked for 9"),
        (lambda: post_training(block_file, path, policy, broken), "NaN or infinite"),
        (lambda: quantize_cpu(tmp_path / "none.onnx", path, policy, ranges), "not a readable ONNX file"),
        (lambda: quantize_cpu(block_file, path / "below" / "a.onnx", policy, ranges), "cannot write"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    quantize_cpu(block_file, path, policy, ranges)
    with pytest.raises(InputError, match="quantized already"):
        quantize_cpu(path, tmp_path / "twice.onnx", policy, ranges)
