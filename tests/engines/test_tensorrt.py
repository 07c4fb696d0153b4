"""Every exported graph is parsed and compiled by a real TensorRT builder, and the ENGINE is asked what it became.

Without a GPU that is tensorrt_rtx, which compiles ahead of time: what passes here was compiled, not executed.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from engines import tensorrt_layers
from engines.__main__ import main
from engines.calibrate import Ranges
from engines.errors import InputError
from engines.export import export_onnx
from engines.policy import Choice, QuantPolicy, choices
from engines.qdq import Float, write_qdq
from engines.quantize import activations
from engines.tensorrt_build import build_engine, compile_int8, inspect_engine, load_tensorrt
from engines.tensorrt_layers import EngineLayer, check_precision, parse_layers
from engines.tensorrt_manifest import AHEAD_OF_TIME, NOT_EXECUTED, Device, check_manifest, manifest_path, sha256
from engines.tensorrt_run import TensorRTRuntime

try:
    TRT = load_tensorrt()
except InputError as problem:
    pytest.skip(str(problem), allow_module_level=True)
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")
NAMES = (["img1", "img2"], ["pts1", "conf1", "pts2", "conf2"])
KINDS = ("gemm", "conv", "attention")
dust3r = pytest.importorskip("trainables.dust3r.domain")


def made_up_ranges(path: Path, policy: QuantPolicy) -> Ranges:
    """What is compiled does not depend on the values."""
    model = onnx.load(str(path), load_external_data=False)
    return dict.fromkeys(activations(model, choices(model, policy)), (-8.0, 8.0))


def export(model: nn.Module, path: Path, size: int) -> Path:
    # Freshly made LayerNorms are all alike, and the builder merges those that read one tensor: tell them apart.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.add_(torch.rand(module.weight.shape, generator=generator) * 0.1)
    images = tuple(torch.rand(1, 3, size, size, generator=generator) * 2 - 1 for _ in range(2))
    export_onnx(dust3r.Deployed(model), images, path, *NAMES)
    return path


def teacher() -> nn.Module:
    model: nn.Module = dust3r.Dust3r({}, 0).load(dust3r.SHIPPED)
    return model


def student() -> nn.Module:
    """The cut student of the small profile, filled from the teacher."""
    old: Any = teacher().eval()
    config = dust3r.inheritance.student_config(old.config, depth=0.7, heads=0.7, ffn=0.7)
    new: nn.Module = dust3r.from_reference_config(**config)
    images = torch.rand(4, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    dust3r.inheritance.inherit(old, new, images)
    return new


def pruned() -> nn.Module:
    """The teacher without three tenths of its heads and channels, residual streams included."""
    whole: Any = teacher()
    ratios = dict.fromkeys(("enc_heads", "enc_ffn", "dec_heads", "dec_ffn", "residual"), 0.3)
    new: nn.Module = dust3r.pruning.prune(whole, dust3r.narrow.narrowed(dust3r.Config(**whole.config), ratios))[0]
    return new


TINY = {"enc_embed_dim": 64, "enc_num_heads": 2, "dec_embed_dim": 48, "dec_num_heads": 2, "img_size": (64, 64)}


def tiny_dpt() -> nn.Module:
    """The full profile's architecture (rotary positions, convolutional heads) with few and narrow layers."""
    torch.manual_seed(0)
    widths = {"feature_dim": 32, "last_dim": 16, "layer_dims": (16, 24, 32, 48)}
    model: nn.Module = dust3r.from_reference_config(**TINY, **widths, enc_depth=2, dec_depth=2)
    return model


def tiny_linear() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = dust3r.from_reference_config(**TINY, head_type="linear", enc_depth=1, dec_depth=1)
    return model


def products(chosen: list[Choice]) -> int:
    return sum(c.kind in KINDS and c.precision == "int8" for c in chosen)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tiny_linear(), tmp_path_factory.mktemp("tiny") / "tiny.onnx", 64)


@pytest.mark.parametrize(
    ("make", "gemms", "convolutions"), [(teacher, 92, 1), (student, 68, 1), (pruned, 92, 1), (tiny_dpt, 42, 61)]
)
def test_all_eligible_products_are_int8_in_the_engine(
    tmp_path: Path, make: Callable[[], nn.Module], gemms: int, convolutions: int
) -> None:
    source = export(make(), tmp_path / "model.onnx", 64)
    policy = QuantPolicy()
    chosen = choices(onnx.load(str(source)), policy)
    kinds = [c.kind for c in chosen if c.precision == "int8"]
    assert (kinds.count("gemm"), kinds.count("conv"), len(kinds)) == (gemms, convolutions, gemms + convolutions)
    report = compile_int8(source, tmp_path / "model.trt", policy, made_up_ranges(source, policy), "w0")
    assert report["precision"]["int8_share"] == 1.0 and report["precision"]["int8"] == products(chosen)
    assert report["precision"]["keep_list_violations"] == [] and report["precision"]["missing"] == []
    assert report["precision"]["kept"] == sum(c.precision == "kept" for c in chosen) > 20
    files = {"model.onnx", "model.qdq.onnx", "model.trt", "model.trt.json"}
    assert {p.name for p in tmp_path.iterdir()} == files
    assert report["engine_MB"] == (tmp_path / "model.trt").stat().st_size / 1e6


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (("layernorm", "softmax"), "float16"),
        ((), "float16"),
        (("*mlp/fc2*", "*cross_attn/proj?/*", "layernorm", "softmax", "attention"), "float16"),
        # Cast, MatMul, Cast is what the builder folds into half precision.
        (("*mlp/fc2*", "*cross_attn/proj?/*", "layernorm", "softmax", "attention"), "float32"),
    ],
)
def test_engine_obeys_other_keep_lists(tiny: Path, tmp_path: Path, keep: tuple[str, ...], kept: Float) -> None:
    policy = QuantPolicy(keep=keep)
    report = compile_int8(tiny, tmp_path / "m.trt", policy, made_up_ranges(tiny, policy), "w0", kept)
    precision = report["precision"]
    assert precision["eligible"] == products(choices(onnx.load(str(tiny)), policy))
    assert precision["int8_share"] == 1.0 and precision["keep_list_violations"] == precision["missing"] == []


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One linear layer after a LayerNorm, exported and compiled: small.onnx, small.trt."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("small")
    net = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 8))
    export_onnx(net, (torch.randn(1, 4, 32),), folder / "small.onnx", ["x"], ["y"])
    source, policy = folder / "small.onnx", QuantPolicy()
    compile_int8(source, folder / "small.trt", policy, made_up_ranges(source, policy), "w0")
    return folder / "small.trt"


def built(source: Path, folder: Path, chosen: list[Choice], kept: Float = "float16") -> tensorrt_layers.PrecisionReport:
    manifest = build_engine(TRT, source, folder / "built.trt", "w0", chosen, kept)
    data = manifest["precision"]
    return tensorrt_layers.PrecisionReport(
        data["int8"],
        data["eligible"],
        tuple(data["not_int8"]),
        data["kept"],
        tuple(data["keep_list_violations"]),
        tuple(data["missing"]),
    )


def test_an_fp32_engine_is_caught_as_not_int8(small: Path, tmp_path: Path) -> None:
    source = small.with_name("small.onnx")
    chosen = choices(onnx.load(str(source)), QuantPolicy())
    report = built(source, tmp_path, chosen)
    assert report.int8 == 0 and report.share == 0.0 and report.not_int8 == ("/1/MatMul", "/3/MatMul", "/5/MatMul")


def test_an_int8_engine_is_caught_by_a_policy_that_keeps_a_layer(small: Path, tmp_path: Path) -> None:
    kept = choices(onnx.load(str(small.with_name("small.onnx"))), QuantPolicy(keep=("3/MatMul", "layernorm")))
    report = built(small.with_suffix(".qdq.onnx"), tmp_path, kept)
    assert report.violations == ("/3/MatMul",) and report.share == 1.0


def test_half_where_single_was_asked_for_is_caught(small: Path, tmp_path: Path) -> None:
    source, policy = small.with_name("small.onnx"), QuantPolicy(keep=("3/MatMul",))
    chosen = write_qdq(source, tmp_path / "half.onnx", policy, made_up_ranges(source, policy), "float16")
    assert built(tmp_path / "half.onnx", tmp_path, chosen, "float16").violations == ()
    assert built(tmp_path / "half.onnx", tmp_path, chosen, "float32").violations == ("/3/MatMul",)
    one = next(c for c in chosen if c.precision == "kept")
    assert built(tmp_path / "half.onnx", tmp_path, [dataclasses.replace(one, node="/9")]).missing == ("/9",)


def test_layers_are_read_from_the_builders_list() -> None:
    text = (
        "Layers:\nName: a_myl0_1, LayerType: gemm, Inputs: [ { Name: x [1], Dimensions: [1,4], Datatype: Int8, Format: "
        "(Linear) Row }], Constants: [ { Name: w, Datatype: Int8, Format: R }, { Name: s, Datatype: Float, Format: R }]"
        ", Outputs: [ { Name: y, Datatype: Half, Format: R }], TacticName: , StreamId: 0, Metadata: [ONNX Layer: /a]"
        "[ONNX Layer: /b]\nName: s, LayerType: signal, Inputs: [], Constants: [], Outputs: [], TacticName: , "
        "StreamId: 0, EventId: 26, Metadata: \n\nI/O Tensors:\n Name: x, IOMode: Input\n"
    )
    layers = parse_layers(["other", text])
    assert layers[0] == EngineLayer("a_myl0_1", "gemm", ("Int8",), ("Int8", "Float"), ("Half",), ("/a", "/b"))
    assert [layer.type for layer in layers] == ["gemm", "signal"]
    with pytest.raises(RuntimeError, match="printed no list"):
        parse_layers(["other"])
    with pytest.raises(RuntimeError, match="unknown form"):
        parse_layers(["Layers:\nName: a, Kind: gemm"])


def test_a_product_merged_from_two_is_each_of_them_and_a_finishing_kernel_none() -> None:
    gemm = EngineLayer("g", "gemm", ("Int8",), ("Int8", "Float"), ("Half",), ("/k", "/v"))
    finish = EngineLayer("e", "kgen", ("Half",), ("Half",), ("Float",), ("/k", "/norm"))
    chosen = [Choice(n, "MatMul", n[1:], "gemm", "int8", "") for n in ("/k", "/v")]
    chosen.append(Choice("/norm", "LayerNormalization", "norm", "layernorm", "kept", ""))
    assert check_precision([gemm, finish], chosen, "float16").share == 1.0
    weight_only = dataclasses.replace(gemm, inputs=("Half",))
    assert check_precision([weight_only, finish], chosen, "float16").not_int8 == ("/k", "/v")
    # A LayerNorm that reads int8 of its own is a violation, one fused behind an int8 product is not.
    rounded = dataclasses.replace(finish, inputs=("Int8",), nodes=("/norm",))
    assert check_precision([gemm, rounded], chosen, "float16").violations == ("/norm",)
    fused = dataclasses.replace(gemm, type="runtime_fusion", nodes=("/k", "/v", "/norm"))
    assert check_precision([fused], chosen, "float16").violations == ()


def test_a_failed_compilation_leaves_the_earlier_one(small: Path, tmp_path: Path) -> None:
    for name in ("m.trt", "m.trt.json", "m.qdq.onnx"):
        (tmp_path / name).write_bytes(b"old")
    with pytest.raises(InputError, match="ranges: none for tensor"):
        compile_int8(small.with_name("small.onnx"), tmp_path / "m.trt", QuantPolicy(), {}, "w0")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == dict.fromkeys(
        ("m.trt", "m.trt.json", "m.qdq.onnx"), b"old"
    )
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the engine"):
        compile_int8(small.with_name("small.onnx"), tmp_path / "file" / "m.trt", QuantPolicy(), {}, "w0")


def test_an_engine_is_built_from_the_export_of_another_machine(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twin, engine = small.with_suffix(".qdq.onnx"), tmp_path / "m.trt"
    assert main(["build", str(twin), str(engine), "--workload", "w0"]) == 0
    assert "100 % of the products in INT8, 0 layers against the keep-list" in capsys.readouterr().out
    built, first = (json.loads(manifest_path(plan).read_text()) for plan in (engine, small))
    for key in ("policy", "workload", "onnx_sha256", "precision", "layers"):
        assert built[key] == first[key], key
    (tmp_path / "empty.onnx").write_bytes(b"")
    for file, said in (("empty.onnx", "its graph has no node"), ("none.onnx", "not a readable ONNX file")):
        assert main(["build", str(tmp_path / file), str(tmp_path / "no.trt")]) == 2
        assert said in capsys.readouterr().err
    assert main(["build", str(small.with_name("small.onnx")), str(tmp_path / "no.trt")]) == 2
    assert "no quantization record" in capsys.readouterr().err and not (tmp_path / "no.trt").exists()


# ---------------------------------------------------------------------- engines and where they belong
def test_manifest_says_what_was_built(small: Path) -> None:
    data = json.loads(manifest_path(small).read_text())
    assert data["label"] == NOT_EXECUTED == "compiled, not executed"
    assert data["tensorrt"] == TRT.__name__ and data["version"] == TRT.__version__
    assert data["onnx_sha256"] == sha256(small.with_suffix(".qdq.onnx")) and data["engine_sha256"] == sha256(small)
    assert data["workload"] == "w0" and QuantPolicy.from_data(data["policy"]) == QuantPolicy()
    assert data["precision"]["int8_share"] == 1.0
    if TRT.__name__ == "tensorrt_rtx":
        assert data["device"] == AHEAD_OF_TIME
        check_manifest(small, TRT, Device("NVIDIA GeForce RTX 4090", "8.9"), "w0")
        with pytest.raises(InputError, match=r"8\.9 or 12\.0, but NVIDIA H100 has 9\.0; build the engine again"):
            check_manifest(small, TRT, Device("NVIDIA H100", "9.0"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"version": "10.0.0"}, "10.0.0, but here is"),
        ({"tensorrt": "other"}, "built by other"),
        ({"workload": "w1"}, "workload w1, not w0"),
        ({"device": "NVIDIA L4"}, "built on NVIDIA L4, but here is NVIDIA A10"),
        ({"engine_sha256": "0"}, "not the engine that its manifest describes"),
        ({"capabilities": ["7.5"]}, "compute capability 7.5, but NVIDIA A10 has 8.6"),
    ],
)
def test_an_engine_of_elsewhere_is_refused(small: Path, tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    plan = tmp_path / "m.trt"
    plan.write_bytes(small.read_bytes())
    data = json.loads(manifest_path(small).read_text()) | {"device": "NVIDIA A10", "capabilities": ["8.6"]}
    manifest_path(plan).write_text(json.dumps(data))
    here = Device("NVIDIA A10", "8.6")
    assert check_manifest(plan, TRT, here, "w0") == data
    manifest_path(plan).write_text(json.dumps(data | change))
    with pytest.raises(InputError, match=expected) as caught:
        check_manifest(plan, TRT, here, "w0")
    assert "\n" not in str(caught.value) and str(plan) in str(caught.value)


def test_a_missing_or_broken_manifest_is_refused(small: Path, tmp_path: Path) -> None:
    plan = tmp_path / "m.trt"
    for content, expected in ((None, "not a readable manifest"), ("[1", "not a readable"), ("{}", "lacks tensorrt")):
        plan.write_bytes(small.read_bytes())
        if content is not None:
            manifest_path(plan).write_text(content)
        with pytest.raises(InputError, match=expected):
            check_manifest(plan, TRT, None)
    with pytest.raises(InputError, match="no such engine"):
        check_manifest(tmp_path / "other.trt", TRT, None)


@without_gpu
def test_running_without_a_gpu_says_what_is_missing(small: Path) -> None:
    with pytest.raises(InputError, match=r"device='cuda' is not available: torch sees 0 CUDA devices"):
        TensorRTRuntime(small)
    with pytest.raises(InputError, match=r"device='cpu': a TensorRT engine runs on cuda"):
        TensorRTRuntime(small, "cpu")


# ---------------------------------------------------------------------- on a GPU
@pytest.mark.gpu
def test_a_loaded_engine_names_the_layers_that_its_builder_named(small: Path) -> None:
    chosen = choices(onnx.load(str(small.with_name("small.onnx"))), QuantPolicy())
    report = check_precision(parse_layers([inspect_engine(TRT, small)]), chosen, "float16")
    assert report.to_data() == json.loads(manifest_path(small).read_text())["precision"]


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_engine_follows_onnx_runtime(small: Path, cuda_graph: bool) -> None:
    from engines.runtimes import OnnxRuntime

    x = np.random.default_rng(0).normal(size=(1, 4, 32)).astype(np.float32)
    twin = OnnxRuntime(small.with_suffix(".qdq.onnx"), "cpu", threads=1)
    engine = TensorRTRuntime(small, "cuda", "w0", cuda_graph)
    want = twin.run((x,))[0]
    for _ in range(3):
        got = engine.run((x,))[0]
        assert got.dtype == want.dtype == np.float32
        # Rounding to int8 falls differently where half precision sums in another order.
        assert np.linalg.norm(got - want) < 0.03 * np.linalg.norm(want)
        assert engine.gpu_ms > 0
    assert np.array_equal(engine.run((x,))[0], engine.run((x,))[0])
    assert not np.array_equal(engine.run((-x,))[0], got)
    with pytest.raises(InputError, match=r"'x' is float32\[1, 5, 32\], expected float32\[1, 4, 32\]"):
        engine.run((np.zeros((1, 5, 32), np.float32),))
    with pytest.raises(InputError, match="takes 1 inputs, got 2"):
        engine.run((x, x))
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.run((x,))


# ---------------------------------------------------------------------- the full profile
@pytest.mark.slow
def test_full_architecture_compiles(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """512_dpt with random weights at 1x3x512x512: 571 M parameters. Peak 6 GiB of memory, 4 GB of disk."""
    torch.manual_seed(0)
    model = dust3r.from_reference_config()
    assert sum(p.numel() for p in model.parameters()) == 571_171_208
    source = export(model, tmp_path / "full.onnx", 512)
    del model
    policy = QuantPolicy()
    report = compile_int8(source, tmp_path / "full.trt", policy, made_up_ranges(source, policy), "w0")
    print(f"full engine: {report['build_s']} s, {report['engine_MB']:.0f} MB")
    record_property("build_s", report["build_s"])
    assert report["precision"]["int8_share"] == 1.0 and report["precision"]["keep_list_violations"] == []
    assert report["precision"]["missing"] == []
