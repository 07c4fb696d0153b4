from pathlib import Path

import numpy as np
import onnx
import pytest

from engines.__main__ import main
from engines.explain import annotation
from engines.operators import layer_times, profile
from engines.policy import QuantPolicy
from engines.quantize import post_training

Feeds = list[tuple[np.ndarray]]


@pytest.fixture
def int8_file(block_file: Path, feeds: Feeds, tmp_path: Path) -> Path:
    policy = QuantPolicy(keep=("softmax", "attention", "*head*"), calibration=8)
    post_training(block_file, tmp_path / "int8.onnx", policy, feeds)
    return tmp_path / "int8.onnx"


def test_explain_tells_every_layer_and_reason(int8_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(int8_file)]) == 0
    text = capsys.readouterr().out
    assert "7 layers quantized, 4 kept" in text and "method=minmax" in text
    quantized, kept = text.split("kept in floating point (4):")
    for layer in ("patch/Conv", "qkv/MatMul", "proj/MatMul", "fc1/MatMul", "fc2/MatMul", "norm1/LayerNormalization"):
        assert f"\n  {layer} " in quantized and f"\n  {layer} " not in kept
    rows = dict(line.strip().split("  ", 1) for line in kept.strip().splitlines())
    assert rows["head/Gemm"].strip() == "weight GEMM, on the keep-list: *head*"
    assert rows["Softmax"].strip() == "Softmax, on the keep-list: softmax"


def test_record_in_the_file_is_the_policy(int8_file: Path) -> None:
    found = annotation(int8_file)
    assert found is not None
    assert found[0] == QuantPolicy(keep=("softmax", "attention", "*head*"), calibration=8)
    assert sum(c.precision == "int8" for c in found[1]) == 7


def test_single_precision_is_explained_as_such(block_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert annotation(block_file) is None
    assert main(["explain", str(block_file)]) == 0
    text = capsys.readouterr().out
    assert "single precision, nothing is quantized" in text and len(text.splitlines()) == 1 + 11


def test_profile_adds_up(block_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", str(block_file), "--rounds", "3", "--top", "4"]) == 0
    text = capsys.readouterr().out
    assert "Softmax" in text and "isa=" in text and "load=" in text
    nodes = profile(block_file, rounds=3)
    assert {"Softmax", "LayerNormalization", "Conv"} <= {node.op for node in nodes}
    assert all(node.us >= 0 for node in nodes)
    assert not list(block_file.parent.glob("*.json"))


def test_layer_times_know_the_layers_of_both_files(block_file: Path, int8_file: Path) -> None:
    for path in (block_file, int8_file):
        times = layer_times(path, rounds=2)
        for layer in ("patch/Conv", "qkv/MatMul", "proj/MatMul", "fc1/MatMul", "fc2/MatMul", "head/Gemm"):
            assert times[layer] > 0, (path, layer)


@pytest.mark.parametrize("command", ["explain", "profile"])
@pytest.mark.parametrize("content", [None, b"not a model"])
def test_bad_file_is_one_line(
    command: str, content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.onnx"
    if content is not None:
        path.write_bytes(content)
    assert main([command, str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "bad.onnx" in err and err.count("\n") == 1


def test_other_bad_input(block_file: Path, int8_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", str(block_file), "--rounds", "0"]) == 2
    assert main(["profile", str(block_file), "--threads", "0"]) == 2
    model = onnx.load(str(int8_file))
    next(p for p in model.metadata_props if p.key.startswith("slimsweep")).value = "{}"
    onnx.save(model, str(int8_file))
    assert main(["explain", str(int8_file)]) == 2
    assert capsys.readouterr().err.count("error: ") == 3
