"""Pruning: what the dependency graph removes, what a narrowed model computes, and what the refit is worth."""

import dataclasses
import json
import warnings

import numpy as np
import pytest
import torch

from engines.errors import InputError
from engines.export import export_onnx
from engines.footprint import params_M
from engines.runtimes import OnnxRuntime
from trainables.dust3r import inherit
from trainables.dust3r.config import PARTS, Config
from trainables.dust3r.domain import SMALL_TEACHER, Deployed
from trainables.dust3r.model import from_reference_config
from trainables.dust3r.narrow import Part, narrowed, parts_of, partway
from trainables.dust3r.prune import prune, refit, sensitivities

TINY = {
    **{**SMALL_TEACHER, "img_size": (32, 32), "enc_embed_dim": 32, "enc_depth": 2, "enc_num_heads": 4},
    **{"dec_embed_dim": 24, "dec_depth": 3, "dec_num_heads": 3},
}
DPT = {**TINY, "head_type": "dpt", "feature_dim": 8, "last_dim": 8, "layer_dims": (8, 8, 8, 8), "img_size": (32, 48)}
ROPE = {**DPT, "pos_embed": "RoPE100", "dec_num_heads": 2, "dec_head_dim": 12}
GROUPS = ("enc_heads", "enc_ffn", "dec_heads", "dec_ffn")
THIRD = {**dict.fromkeys(GROUPS, 0.3), "residual": 0.0}


def build(seed=0, **config):
    """Weights far from the initial ones, so that every layer, bias and norm matters."""
    torch.manual_seed(seed)
    model = from_reference_config(**config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.15 if p.ndim < 2 else 0.05))
    return model


def pairs(count, seed, size=(32, 32)):
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count * 2, 3, 6, 6, generator=g) * 2 - 1
    fine = torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(-1, 1)
    return fine.unflatten(0, (count, 2))


@torch.no_grad()
def outputs(model, images):
    return torch.cat([part.flatten() for part in model.pointmaps(images[:, 0], images[:, 1])])


def root(model, part):
    """(rows of the part's first layer, columns of its output layer), a row per output channel."""
    module = model.get_submodule(part.path)
    if part.name == "mlp":
        return module.fc1.weight, module.fc2.weight
    first = module.qkv.weight.chunk(3)[0] if part.name == "attn" else module.projq.weight
    return first, module.proj.weight


def silenced(model, pruned):
    """The model with those heads and channels silenced that `pruned` lacks, found by comparing weights."""
    for part in parts_of(Config(**model.config)):
        (rows, columns), (left, _) = root(model, part), root(pruned, part)
        gone = [i for i, row in enumerate(rows) if not any(torch.equal(row, other) for other in left)]
        assert len(rows) - len(gone) == len(left)
        with torch.no_grad():
            columns[:, gone] = 0
    return model


@pytest.mark.parametrize("config", [TINY, DPT, ROPE], ids=["tables, linear", "tables, dpt", "rope, dpt"])
def test_pruned_is_the_model_with_the_other_heads_and_channels_silenced(config):
    model, images = build(**config), pairs(3, 1, config["img_size"])
    whole = outputs(model, images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruned, kept = prune(model, narrowed(Config(**model.config), THIRD))
    assert torch.equal(outputs(model, images), whole), "the model itself is left as it is"
    found = outputs(pruned, images)
    assert not torch.allclose(found, whole, atol=1e-3)
    torch.testing.assert_close(found, outputs(silenced(model, pruned), images), rtol=1e-5, atol=1e-5)
    assert kept["enc"].tolist() == list(range(config["enc_embed_dim"]))


def test_least_l1_norm_leaves_first():
    model = build(**TINY)
    part = Part("dec_blocks2", "mlp", 1)
    mlp = model.get_submodule(part.path)
    with torch.no_grad():
        mlp.fc1.weight[8:40] /= 100
        mlp.fc2.weight[:, 8:40] /= 100
    cross = model.dec_blocks[2].cross_attn
    with torch.no_grad():
        for layer in (cross.projq, cross.projk, cross.projv):
            layer.weight[8:16] /= 100
        cross.proj.weight[:, 8:16] /= 100
    pruned, _ = prune(model, narrowed(Config(**model.config), {**THIRD, "dec_ffn": 1 / 3, "dec_heads": 1 / 3}))
    stay = [*range(8), *range(40, 96)]
    assert torch.equal(pruned.get_submodule(part.path).fc1.weight, mlp.fc1.weight[stay])
    heads = [*range(8), *range(16, 24)]
    for name in ("projq", "projk", "projv"):
        left = getattr(pruned.dec_blocks[2].cross_attn, name)
        assert torch.equal(left.weight, getattr(cross, name).weight[heads]), name


@pytest.mark.parametrize("config", [TINY, DPT, ROPE], ids=["tables, linear", "tables, dpt", "rope, dpt"])
def test_residual_channels_leave_every_layer_at_once(config):
    """What is left of each weight is the model's at the kept channels: checked where only the stream was cut."""
    model, images = build(**config), pairs(2, 1, config["img_size"])
    ratios = {**dict.fromkeys(GROUPS, 0.0), "residual": 0.3}
    pruned, kept = prune(model, narrowed(Config(**model.config), ratios))
    assert (pruned.config["enc_embed_dim"], pruned.config["dec_embed_dim"]) == (24, 16)
    old = model.state_dict()
    for name, value in pruned.state_dict().items():
        whole = old[name]
        for axis, (size, left) in enumerate(zip(whole.shape, value.shape, strict=True)):
            if size != left:
                whole = whole.index_select(axis, kept["enc" if size == 32 else "dec"])
        assert torch.equal(value, whole), name
    assert outputs(pruned, images).isfinite().all()


def test_residual_channels_that_no_layer_uses_leave_first():
    """The importance is summed over all layers that read or write a channel, of both decoders and of the heads."""
    model = build(**TINY)
    ratios = {**dict.fromkeys(GROUPS, 0.0), "residual": 0.3}
    unused = {32: torch.arange(8, 16), 24: torch.arange(0, 8)}
    with torch.no_grad():
        for name, value in model.state_dict().items():
            side = 24 if name.startswith(("dec_", "downstream", "decoder_embed")) else 32
            for axis, size in enumerate(value.shape):
                if size == side or (name == "decoder_embed.weight" and size == 32):
                    value.index_fill_(axis, unused[size], 0)
    _, kept = prune(model, narrowed(Config(**model.config), ratios))
    assert kept["enc"].tolist() == [*range(8), *range(16, 32)]
    assert kept["dec"].tolist() == list(range(8, 24))


@pytest.mark.parametrize("config", [TINY, ROPE], ids=["tables, linear", "rope, dpt"])
def test_file_reloads_without_tracing(config, tmp_path, monkeypatch):
    model = build(**config)
    pruned, _ = prune(model, narrowed(Config(**model.config), {**THIRD, "residual": 0.3}))
    monkeypatch.setattr("torch_pruning.DependencyGraph", None)
    torch.save(pruned.state_dict(), tmp_path / "weights.pth")
    (tmp_path / "config.json").write_text(json.dumps(pruned.config))
    again = from_reference_config(**json.loads((tmp_path / "config.json").read_text())).eval()
    again.load_state_dict(torch.load(tmp_path / "weights.pth", weights_only=True))
    images = pairs(2, 1, config["img_size"])
    assert torch.equal(outputs(again, images), outputs(pruned, images)) and again.config == pruned.config


def test_pruned_twice_is_narrower_still():
    model = build(**ROPE)
    old = Config(**model.config)
    target = narrowed(old, {**THIRD, "enc_heads": 0.5, "residual": 0.3})
    halfway, _ = prune(model, partway(old, target, 0.5))
    pruned, _ = prune(halfway, target)
    assert params_M(model) > params_M(halfway) > params_M(pruned)
    assert pruned.config == target.to_data()
    assert outputs(pruned, pairs(2, 1, ROPE["img_size"])).isfinite().all()


def test_onnx_of_a_pruned_model_equals_torch(tmp_path):
    model = build(**ROPE)
    pruned, _ = prune(model, narrowed(Config(**model.config), {**THIRD, "residual": 0.3}))
    images = pairs(3, 1, ROPE["img_size"])
    module, path = Deployed(pruned).eval(), tmp_path / "pruned.onnx"
    example = (images[:1, 0], images[:1, 1])
    export_onnx(module, example, path, ["img1", "img2"], ["pts1", "conf1", "pts2", "conf2"])
    engine = OnnxRuntime(path, "cpu", 1)
    for image in images:
        found = engine.run((image[None, 0].numpy(), image[None, 1].numpy()))
        with torch.no_grad():
            expected = module(image[None, 0], image[None, 1])
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b.numpy(), rtol=1e-3, atol=1e-4)
    engine.close()


def test_refit_moves_the_outputs_towards_the_model_on_unseen_images():
    model, images = build(**TINY), pairs(64, 1)
    fresh = pairs(32, 2)
    whole = outputs(model, fresh)
    for residual in (0.0, 0.3):
        pruned, kept = prune(model, narrowed(Config(**model.config), {**THIRD, "residual": residual}))
        before = (outputs(pruned, fresh) - whole).norm()
        refit(model, pruned, kept, images)
        assert (outputs(pruned, fresh) - whole).norm() < 0.8 * before


def test_refit_of_an_unpruned_model_changes_nothing():
    model, images = build(**DPT), pairs(16, 1, DPT["img_size"])
    same, kept = prune(model, Config(**model.config))
    refit(model, same, kept, images)
    torch.testing.assert_close(outputs(same, images), outputs(model, images), rtol=1e-4, atol=1e-4)


def test_sensitivity_finds_what_matters():
    """A part whose output is nearly zero costs next to nothing, whatever its weights before it."""
    model, images = build(**TINY), pairs(8, 1)
    whole = outputs(model, images)
    idle = Part("enc_blocks", "mlp", 1), Part("dec_blocks", "cross_attn", 2)
    with torch.no_grad():
        for part in idle:
            inherit.output(model.get_submodule(f"{part.stack}.{part.layer}"), part.name).weight.mul_(1e-3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    whole = outputs(model, images)
    costs = sensitivities(model, 0.3, lambda m: float((outputs(m, images) - whole).square().mean()))
    assert costs.keys() == set(parts_of(Config(**model.config)))
    for part in idle:
        others = [costs[p] for p in costs if p.group == part.group and p not in idle]
        assert costs[part] < 0.01 * min(others)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "put back"
    target = narrowed(Config(**model.config), THIRD, costs)
    assert target.layers["enc_blocks.mlp"][1] < target.layers["enc_blocks.mlp"][0]
    assert target.layers["dec_blocks.cross_attn"][2] == 1


def test_no_random_number_is_drawn():
    model = build(**TINY)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    prune(model, narrowed(Config(**model.config), THIRD))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        ({"enc_blocks.attn": (4,)}, "enc_blocks.attn=\\(4,\\) must be 2 numbers"),
        ({"enc_blocks.mlp": (8, 0)}, "enc_blocks.mlp=\\(8, 0\\)"),
        ({"enc_blocks.cross_attn": (1, 1)}, "no part 'enc_blocks.cross_attn'"),
        ({"dec_blocks2.mlp": None}, "lacks 'dec_blocks2.mlp'"),
    ],
)
def test_wrong_layers_are_one_line(layers, named):
    good = narrowed(Config(**TINY), THIRD).layers
    wrong = {part: counts for part, counts in {**good, **layers}.items() if counts is not None}
    with pytest.raises(InputError, match=named) as error:
        dataclasses.replace(Config(**TINY), layers=wrong)
    assert "\n" not in str(error.value)


def test_parts_are_those_of_the_model():
    names = {name for name, _ in build(**TINY).named_modules()}
    paths = {part.path for part in parts_of(Config(**TINY))}
    assert paths <= names and len(paths) == 2 * 2 + 3 * 3 * 2
    assert {name.split(".")[-1] for name in paths} == {part for parts in PARTS.values() for part in parts}
