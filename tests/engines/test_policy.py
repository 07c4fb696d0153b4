from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.errors import InputError
from engines.policy import FAMILIES, QuantPolicy, choices

LAYERS = {
    "patch/Conv": "conv",
    "norm1/LayerNormalization": "layernorm",
    "qkv/MatMul": "gemm",
    "MatMul": "attention",
    "Softmax": "softmax",
    "MatMul_1": "attention",
    "proj/MatMul": "gemm",
    "norm2/LayerNormalization": "layernorm",
    "fc1/MatMul": "gemm",
    "fc2/MatMul": "gemm",
    "head/Gemm": "gemm",
}


def test_every_eligible_node_is_found(block_file: Path) -> None:
    found = {c.layer: c.kind for c in choices(onnx.load(str(block_file)), QuantPolicy(keep=())) if c.kind}
    assert found == LAYERS


@given(st.sets(st.sampled_from([*LAYERS, *FAMILIES, "*/MatMul", "Soft*", "fc?/*", "LayerNormalization"])))
def test_keep_list_decides_and_nothing_else(block_file: Path, keep: set[str]) -> None:
    globs = {
        "*/MatMul": {k for k in LAYERS if k.endswith("/MatMul")},
        "Soft*": {"Softmax"},
        "fc?/*": {"fc1/MatMul", "fc2/MatMul"},
        "LayerNormalization": {k for k, kind in LAYERS.items() if kind == "layernorm"},
        # A name without a module in front is also the operator's type.
        "MatMul": {k for k in LAYERS if k.split("/")[-1].startswith("MatMul")},
    }
    want = set()
    for pattern in keep:
        family = {k for k, kind in LAYERS.items() if kind == pattern}
        want |= globs.get(pattern, set()) | family | ({pattern} & set(LAYERS))
    found = choices(onnx.load(str(block_file)), QuantPolicy(keep=tuple(sorted(keep))))
    assert {c.layer for c in found if c.precision == "kept"} == want
    assert {c.layer for c in found if c.precision == "int8"} == set(LAYERS) - want
    assert all(c.precision == "float" for c in found if c.kind is None)


def test_typo_names_the_pattern_and_what_is_near(block_file: Path) -> None:
    with pytest.raises(InputError, match=r"'\*/hed/\*' matches no eligible layer.*head/Gemm") as caught:
        choices(onnx.load(str(block_file)), QuantPolicy(keep=("softmax", "*/hed/*")))
    assert "\n" not in str(caught.value)


def test_family_without_members_is_no_typo() -> None:
    weight = onnx.numpy_helper.from_array(np.ones((2, 2), np.float32), "w")
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="only")
    info = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, 2]) for n in "xy"]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", info[:1], info[1:], [weight]))
    assert [c.precision for c in choices(model, QuantPolicy())] == ["int8"]
    model.graph.node[0].name = ""
    with pytest.raises(InputError, match="without a name"):
        choices(model, QuantPolicy())
    model.graph.node.append(onnx.helper.make_node("DequantizeLinear", ["y", "w"], ["z"], name="dq"))
    with pytest.raises(InputError, match="quantized already"):
        choices(model, QuantPolicy())


def test_all_bad_values_at_once() -> None:
    with pytest.raises(InputError) as caught:
        QuantPolicy(
            bits_w=3,
            bits_a=4,
            keep="softmax",  # type: ignore[arg-type]
            calibration=0,
            method="max",
            mode="fast",
            smooth=1.5,
            reduce_range="auto",  # type: ignore[arg-type]
            skip_slower=1,  # type: ignore[arg-type]
        )
    for part in ("bits_w=3", "bits_a=4", "keep='softmax'", "calibration=0", "method='max'", "mode='fast'"):
        assert part in str(caught.value)
    for part in ("smooth=1.5", "reduce_range='auto'", "skip_slower=1"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_data_round_trip_and_unknown_keys() -> None:
    policy = QuantPolicy(keep=("softmax", "*head*"), smooth=0.5, reduce_range=True)
    assert QuantPolicy.from_data(policy.to_data()) == policy
    assert QuantPolicy.from_data({"keep": ["softmax"]}).keep == ("softmax",)
    with pytest.raises(InputError, match=r"unknown keys \['bits'\]"):
        QuantPolicy.from_data({"bits": 8})
