"""What TensorRT refuses, said in one line by the real parser and builder, with nothing half-written."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.errors import InputError
from engines.tensorrt_build import build_engine, load_tensorrt

try:
    TRT = load_tensorrt()
except InputError as problem:
    pytest.skip(str(problem), allow_module_level=True)


def graph_file(path: Path, nodes: list[onnx.NodeProto], constants: dict[str, Any], rows: int | str = 4) -> Path:
    """x (rows, 8) float32 -> y float32 (.., 8)."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), str(path))
    return path


def refused(source: Path, folder: Path) -> str:
    plan = folder / "bad.trt"
    plan.write_bytes(b"old")
    with pytest.raises(InputError) as caught:
        build_engine(TRT, source, plan, "w0")
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(source)) and len(message) < 500
    assert plan.read_bytes() == b"old" and {p.name for p in folder.iterdir()} == {source.name, plan.name}
    return message


def qdq_product(zero: Any) -> list[onnx.NodeProto]:
    return [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"], "/quantize"),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"], "/dequantize"),
        helper.make_node("MatMul", ["xd", "w"], ["y"], "/product"),
    ]


WEIGHT = np.eye(8, dtype=np.float32)


@pytest.mark.parametrize("zero", [np.int8(3), np.uint8(128)], ids=["asymmetric int8", "uint8"])
def test_asymmetric_activations_are_refused(tmp_path: Path, zero: Any) -> None:
    source = graph_file(tmp_path / "a.onnx", qdq_product(zero), {"s": np.float32(0.1), "z": zero, "w": WEIGHT})
    message = refused(source, tmp_path)
    assert "zero point" in message.lower() and "write_qdq" in message


def test_qlinear_matmul_is_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"], "/quantize"),
        helper.make_node("QLinearMatMul", ["xq", "s", "z", "wq", "s", "z", "s", "z"], ["yq"], "/product"),
        helper.make_node("DequantizeLinear", ["yq", "s", "z"], ["y"], "/dequantize"),
    ]
    constants = {"s": np.float32(0.1), "z": np.int8(0), "wq": WEIGHT.astype(np.int8)}
    message = refused(graph_file(tmp_path / "a.onnx", nodes, constants), tmp_path)
    assert "QLinearMatMul" in message and "write_qdq" in message


def test_mixed_types_are_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], "/half", to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["h", "w"], ["y"], "/product"),
    ]
    message = refused(graph_file(tmp_path / "a.onnx", nodes, {"w": WEIGHT}), tmp_path)
    assert "/product" in message and "type" in message.lower()


def test_dynamic_shapes_are_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "/product")]
    message = refused(graph_file(tmp_path / "a.onnx", nodes, {"w": WEIGHT}, rows="batch"), tmp_path)
    assert "'x'" in message and "'batch'" in message


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"nonsense")
    assert "not a readable ONNX file" in refused(tmp_path / "a.onnx", tmp_path)
