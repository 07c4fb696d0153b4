"""A decoder in INT8: one policy for the file, for fake quantization and for the TensorRT engine."""

from pathlib import Path

import pytest
import torch

from engines.explain import explain
from engines.policy import QuantPolicy
from trainables import checkpoint, deploy, evaluate, fake_quant
from trainables.product import Product
from trainables.quantize import Quantize

QUANT = {
    **{"model": "teacher", "bits_w": 8, "keep": ["layernorm", "softmax", "attention", "conv"], "calibration": 16},
    **{"reduce_range": False, "epochs": 4, "qat_share": 0.5, "frozen_share": 0.2, "qat_lr": 1e-3},
}
PRODUCTS = {
    *(f"layers.0.{name}" for name in ("attention.packed", "attention.out", "dense.both", "dense.out")),
    *("layers.0.grid.convs.0.product", "layers.0.grid.out", "readout.qubits.product", "readout.lines.Z.layers.0"),
    "readout.heads.Z",
}


def config(aq, name, budget=-1.0, **changes):
    return {**aq.config(name, {}, **{**QUANT, **changes}), "budget": budget}


def test_every_product_by_a_weight_is_int8_and_has_its_module_in_every_round(aq):
    domain = aq.domain(**QUANT)
    model = domain.teacher()
    (chosen,) = deploy.choices_of(domain, model, QuantPolicy(keep=tuple(QUANT["keep"])))
    nodes = fake_quant.modules_of(chosen, model)
    assert nodes.keys() == PRODUCTS
    assert all(len(found) == (1 if name.startswith("readout") else 3) for name, found in nodes.items()), "2 rounds + 1"
    assert sum(map(len, nodes.values())) == sum(choice.precision == "int8" for choice in chosen)
    assert {choice.kind for choice in chosen if choice.precision == "kept"} == {"layernorm", "softmax", "attention"}


def test_the_deployed_decoder_answers_as_the_decoder(aq):
    for changes in ({}, {"distance": 5, "rounds": 3}):
        model = aq.new_decoder(distance=changes.get("distance", 3))
        domain = aq.domain(**changes)
        module, inputs, _, _ = domain.deployed(model)
        with torch.no_grad():
            assert torch.equal(module(*inputs[0]), model(*inputs[0]))
        assert module.state_dict().keys() == {f"decoder.{name}" for name in model.state_dict()}


def test_fake_quantization_reaches_products_whose_weights_are_computed(aq):
    trial = Quantize(config(aq, "a", bits_w=4))
    results = [trial.step() for _ in range(4)]
    assert [r["fake_quant"] for r in results] == [0, 0, 1, 1]
    product = trial.model.layers[0].attention.packed
    assert isinstance(product, Product) and product.weight_quantizer.is_enabled
    x, weight = torch.randn(5, 8), torch.randn(6, 8)
    levels = product.weight_quantizer(weight) / (weight.abs().amax(1, keepdim=True) / 7)
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    assert not torch.allclose(product(x, weight), x @ weight.T)
    shots = trial.domain._fixed("val")
    with torch.no_grad():
        plain = trial._plain()(shots["events"], shots["measurements"])
        assert (plain - trial.model.eval()(shots["events"], shots["measurements"])).abs().max() > 1e-4
    names = checkpoint.load(Path(trial.folder) / "best.pth")["model"].keys()
    assert names == trial.domain.teacher().state_dict().keys()


def test_the_int8_file_is_what_is_measured(aq, tmp_path):
    student = aq.save(tmp_path / "student.pth", aq.new_decoder(seed=3))
    given = config(aq, "job", budget=10.0, model=str(student))
    assert Quantize(given).step()["done"]
    best = Path(given["state_dir"]) / "best.pth"
    job = {**aq.job(best, **{**QUANT, "model": str(student)}), "state_dir": given["state_dir"]}
    quality = evaluate.measure_quality(job)
    assert quality["bits_w"] == 8 and quality["parent"].startswith("student:")
    assert "ler_over_matching" in quality["extra"] and quality["extra"]["drop_to_student_lo"] <= 0.5
    file = Path(given["state_dir"]) / "deployed.onnx"
    found = aq.domain(**QUANT).evaluate(deploy.Engine(file), "test")["ler"]
    assert quality["quality"] == pytest.approx(float(found.mean()))
    said = explain(file)
    assert "attention/packed_2/MatMul" in said and "on the keep-list: softmax" in said
    extra = evaluate.measure_latency(job)["extra"]
    assert extra["p50_ratio_fp32"] > 0 and extra["p50_ratio_onnxruntime"] > 0 and extra["us_per_shot_1024"] > 0


def test_the_tensorrt_engine_keeps_the_same_layers(aq):
    pytest.importorskip("tensorrt_rtx", reason="the extra [trt] is not installed")
    given = config(aq, "job", budget=10.0)
    Quantize(given).step()
    job = {**aq.job(Path(given["state_dir"]) / "best.pth", **QUANT), "state_dir": given["state_dir"]}
    found = evaluate.compile_engine(job)
    assert found == {"trt": "compiled, not executed", "trt_int8_share": 1.0, "trt_keep_list_violations": 0}
