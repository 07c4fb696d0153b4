"""Quantize: PTQ first, QAT only past the budget; the INT8 file is what is validated; resumed = uninterrupted."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from engines.errors import InputError
from engines.policy import QuantPolicy
from trainables import checkpoint, deploy, evaluate, fake_quant
from trainables.deploy import source
from trainables.quantize import Quantize, Round

QUANT = {
    **{"model": "teacher", "bits_w": 8, "bits_a": 8, "keep": ["layernorm", "softmax", "attention"], "mode": "static"},
    **{"calibration": 8, "method": "minmax", "smooth": 0.0, "reduce_range": False, "skip_slower": False},
    **{"epochs": 5, "qat_share": 0.5, "frozen_share": 0.2, "samples_per_epoch": 16, "peers": False},
}
GO_ON = """
import json, sys
import torch
from trainables.quantize import Quantize
torch.set_num_threads(1)
config, steps = json.loads(sys.argv[1])
trial = Quantize(config)
print(json.dumps([trial.step() for _ in range(steps)]))
"""


def config(tiny, name, budget=-1.0, **changes):
    return {**tiny.config(name, {}, **{**QUANT, **changes}), "budget": budget}


def test_a_model_that_rounds_within_the_budget_is_done_after_one_epoch_and_unchanged(tiny):
    given = config(tiny, "a", budget=10.0)
    result = Quantize(given).step()
    assert result["done"] and result["epoch"] == 1 and result["fake_quant"] == 0
    kept = checkpoint.load(Path(given["state_dir"]) / "best.pth")
    teacher = tiny.domain().teacher().state_dict()
    assert all(torch.equal(value, teacher[name]) for name, value in kept["model"].items())
    assert kept["quantization"] == QuantPolicy(calibration=8, reduce_range=False).to_data()
    assert Round(config(tiny, "b")).step()["done"], "rounding alone never trains"


def test_past_the_budget_it_trains_and_fakes_quantization_in_the_last_share(tiny):
    trial = Quantize(config(tiny, "a"))
    results = [trial.step() for _ in range(5)]
    assert [r["fake_quant"] for r in results] == [0, 0, 0, 1, 1] and not any("done" in r for r in results)
    assert all("train_loss" in r for r in results[1:]) and "train_loss" not in results[0]
    assert results[1]["lr"] > results[2]["lr"] == pytest.approx(1e-2 * trial.quant.lr), "a cycle in floating point"
    assert results[3]["lr"] > results[4]["lr"] == pytest.approx(1e-2 * trial.quant.qat_lr), "and one of its own"
    quantized = {n for n, m in trial.model.named_modules() if getattr(m, "weight_quantizer", None) is not None
                 and m.weight_quantizer.is_enabled}  # fmt: skip
    assert "enc_blocks.0.attn.qkv" in quantized and "enc_blocks.0.norm1" not in quantized
    clipped = deploy.ranges(trial.domain, trial._plain(), trial.policy, trial.folder)
    found = clipped[trial.nodes["enc_blocks.0.attn.qkv"][0]]
    moved = abs(float(trial.model.enc_blocks[0].attn.qkv.input_quantizer.amax) / found - 1)
    assert moved < 0.2, "the range that the policy finds, as of the epoch in which they were frozen"
    plain = trial._plain()
    assert plain.state_dict().keys() == tiny.domain().teacher().state_dict().keys()
    with torch.no_grad():
        first, second = (torch.randn(1, 3, 32, 32) for _ in range(2))
        apart = (plain.pointmaps(first, second)[0] - trial.model.eval().pointmaps(first, second)[0]).abs().max()
    assert apart > 1e-6, "the trained model does see rounded weights and activations"


def test_smoothing_ends_where_fake_quantization_begins(tiny):
    trial = Quantize(config(tiny, "a", smooth=0.5))
    seen = []
    for _ in range(5):
        trial.step()
        seen.append((trial.faked, trial.exported()["quantization"]["smooth"]))
    assert seen == [(False, 0.5)] * 3 + [(True, 0.0)] * 2


def test_resumed_within_fake_quantization_equals_uninterrupted(tiny):
    straight, cut = config(tiny, "straight"), config(tiny, "cut")
    trial = Quantize(straight)
    expected = [trial.step() for _ in range(5)]
    trial = Quantize(cut)
    first = [trial.step() for _ in range(4)]
    repeated, last = json.loads(tiny.python(GO_ON, json.dumps([cut, 2])))
    assert tiny.without_clocks(repeated) == tiny.without_clocks(first[-1])
    assert tiny.without_clocks(last) == tiny.without_clocks(expected[-1])
    states = [checkpoint.load(Path(c["state_dir"]) / "state.pt") for c in (straight, cut)]
    for key in ("trained", "optimizer", "rng"):
        assert tiny.same(states[0][key], states[1][key]), key


def test_what_is_measured_is_the_int8_file(tiny, tmp_path):
    given = config(tiny, "a", budget=10.0)
    Quantize(given).step()
    job = tiny.job(Path(given["state_dir"]) / "best.pth", trains=False, **QUANT)
    job |= {"state_dir": given["state_dir"], "workload_hash": "w"}
    quality = evaluate.measure_quality(job)
    assert quality["bits_w"] == 8 and "layernorm" in quality["keep_list"] and quality["parent"].startswith("teacher:")
    assert quality["extra"]["layers_int8"] > 10 and quality["drop"] != 0 and quality["extra"]["route"] == "PTQ"
    file = Path(given["state_dir"]) / "deployed.onnx"
    domain = tiny.domain(**QUANT)
    own = domain.evaluate(deploy.Engine(file), "test")["absrel"]
    assert quality["quality"] == pytest.approx(float(own.mean()))
    assert np.load(Path(given["state_dir"]) / "test_costs.npy") == pytest.approx(own.numpy())
    latency = evaluate.measure_latency(job)
    extra = latency["extra"]
    assert latency["engine"] == "onnxruntime int8" and extra["size_fp32_MB"] > latency["size_MB"]
    for key in ("p50_ratio", "p50_ratio_fp32", "p50_ratio_onnxruntime", "p50_ratio_same_runtime"):
        assert extra[f"{key}_lo"] <= extra[key] <= extra[f"{key}_hi"]
    assert latency["t_scene_s"] > extra["t_scene_pairs_s"] > 0
    assert {"p50_torch_ms", "p50_onnxruntime_ms"} <= extra.keys() and not list(Path(job["work_dir"]).iterdir())


def test_training_is_compared_with_rounding_alone_on_the_same_pairs(tiny):
    given = config(tiny, "a", bits_w=4, lr=1e-4)
    trial = Quantize(given)
    for _ in range(5):
        trial.step()
    best = Path(given["state_dir"]) / "best.pth"
    content = checkpoint.load(best)
    # On random weights rounding alone may stay the best: then there is nothing to compare.
    checkpoint.save(best, {**content, "origin": {**content["origin"], "route": "QAT"}})
    job = {**tiny.job(best, trains=False, **{**QUANT, "bits_w": 4}), "state_dir": given["state_dir"]}
    extra = evaluate.measure_quality(job)["extra"]
    assert extra["route"] == "QAT"
    assert extra["ptq_drop_lo"] <= extra["ptq_drop"] <= extra["ptq_drop_hi"]
    assert extra["drop_to_ptq_lo"] <= extra["drop_to_ptq"] <= extra["drop_to_ptq_hi"]


def test_the_policy_chooses_the_same_layers_in_torch_and_onnx(tiny):
    domain = tiny.domain(**QUANT)
    model = domain.teacher()
    kept = QuantPolicy(keep=("layernorm", "softmax", "attention", "*head*"))
    chosen, other = deploy.choices_of(domain, model, kept, QuantPolicy(keep=("softmax", "attention")))
    names = fake_quant.modules_of(chosen, model)
    int8 = [choice for choice in chosen if choice.precision == "int8"]
    # Two decoders and one shared encoder, whose layers run once for both views.
    assert {
        n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d) and "head" not in n
    } == set(names)
    assert len(int8) >= len(names) and not any("head" in name for name in names)
    out = fake_quant.modules_of(other, model)
    assert "enc_blocks.0.norm1" in out and "downstream_head1.proj" in out


def test_a_source_that_cannot_be_quantized_is_named(tiny, tmp_path):
    domain = tiny.domain(**QUANT)
    assert source(domain, "teacher") is not None
    with pytest.raises(InputError, match=r"none\.pth does not exist"):
        source(domain, str(tmp_path / "none.pth"))
    with pytest.raises(InputError, match=r"keep pattern '\*qkw\*' matches no eligible layer"):
        Quantize(config(tiny, "typo", keep=["*qkw*"])).step()
    with pytest.raises(InputError, match=r"keep pattern '\*qkw\*' matches no eligible layer"):
        evaluate.identify({**tiny.job(**QUANT), "trials": [{}, {"keep": ["*qkw*"]}]})
    job = tiny.job(trains=False, **{**QUANT, "model": str(tmp_path / "none.pth")})
    with pytest.raises(InputError, match="does not exist"):
        evaluate.identify(job)


def test_the_deployed_file_says_what_it_is(tiny, tmp_path):
    domain = tiny.domain(**QUANT)
    report = deploy.export_int8(domain, domain.teacher(), QuantPolicy(calibration=8), tmp_path / "int8.onnx")
    graph = onnx.load(str(tmp_path / "int8.onnx"))
    assert report.count("int8") > 10 and graph.metadata_props
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".onnx"] == ["int8.onnx"]


def test_the_tensorrt_engine_of_a_smoothed_model_keeps_the_same_layers(tiny):
    pytest.importorskip("tensorrt_rtx", reason="the extra [trt] is not installed")
    given = config(tiny, "a", budget=10.0, smooth=0.5)
    Quantize(given).step()
    job = tiny.job(Path(given["state_dir"]) / "best.pth", trains=False, **{**QUANT, "smooth": 0.5})
    found = evaluate.compile_engine({**job, "state_dir": given["state_dir"]})
    assert found == {"trt": "compiled, not executed", "trt_int8_share": 1.0, "trt_keep_list_violations": 0}
    left = {path.name for path in Path(given["state_dir"]).iterdir()}
    assert {"deployed.trt", "deployed.trt.json"} <= left and not [name for name in left if name.startswith(".export")]


@pytest.mark.gpu
def test_on_a_gpu_what_is_timed_is_the_tensorrt_engine(tiny):
    pytest.importorskip("tensorrt", reason="the extra [trt] is not installed")
    given = config(tiny, "a", budget=10.0)
    Quantize(given).step()
    job = tiny.job(Path(given["state_dir"]) / "best.pth", trains=False, **QUANT) | {"state_dir": given["state_dir"]}
    found = evaluate.measure_latency(job)
    assert found["engine"] == "tensorrt int8" and found["extra"]["trt"] == "executed"
    assert found["extra"]["trt_int8_share"] == 1.0
