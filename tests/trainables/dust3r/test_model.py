import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from engines.errors import InputError
from trainables.dust3r.model import from_reference_config

GOLDEN = Path(__file__).parents[4] / "shared" / "golden"
SMALL = {
    "head_type": "linear",
    "img_size": (32, 48),
    "patch_size": 8,
    "enc_embed_dim": 32,
    "enc_depth": 2,
    "enc_num_heads": 4,
    "dec_embed_dim": 24,
    "dec_depth": 3,
    "dec_num_heads": 3,
}
DPT = {
    "head_type": "dpt",
    "feature_dim": 16,
    "last_dim": 8,
    "layer_dims": (8, 8, 12, 16),
    "hooks": (0, 1, 2, 3),
}


def build(**changes):
    torch.manual_seed(0)
    return from_reference_config(**{**SMALL, **changes}).eval()


def images(*sizes, batch=2):
    g = torch.Generator().manual_seed(1)
    return [torch.rand(batch, 3, h, w, generator=g) * 2 - 1 for h, w in sizes]


@pytest.mark.skipif(not (GOLDEN / "parity.py").exists(), reason="reference outputs are not beside this checkout")
@pytest.mark.parametrize("name", ["linear", "dpt", pytest.param("release", marks=pytest.mark.slow)])
def test_outputs_agree_with_reference(name):
    spec = importlib.util.spec_from_file_location("parity", GOLDEN / "parity.py")
    parity = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(parity)
    worst = parity.check(from_reference_config, [name], 2e-5)
    assert worst[name] <= 2e-5


MANY = {"patch_embed_cls": "ManyAR_PatchEmbed", "landscape_only": True}


@pytest.mark.parametrize("changes", [{}, DPT], ids=["linear", "dpt"])
def test_a_mixed_batch_gives_each_pair_what_it_gets_alone(changes):
    """Portraits lie on their side among landscapes; alone, a plain model takes each pair upright."""
    plain, mixed = build(**changes), build(**changes, **MANY)
    mixed.load_state_dict(plain.state_dict())
    landscape, portrait = (32, 48), (48, 32)
    shapes = [(landscape, portrait), (portrait, portrait), (portrait, landscape), (landscape, landscape)] * 2
    upright = [images(*both, batch=1) for both in shapes]
    lying = [[img if img.shape[-1] == 48 else img.mT for img in pair] for pair in upright]
    view1, view2 = (
        {"img": torch.cat([pair[v] for pair in lying]), "true_shape": torch.tensor([both[v] for both in shapes])}
        for v in (0, 1)
    )
    with torch.no_grad():
        first, second = mixed(view1, view2)
        alone = [plain.pointmaps(*pair) for pair in upright]
    assert first["pts3d"].shape == second["pts3d_in_other_view"].shape == (8, 32, 48, 3)
    for row, (maps, both) in enumerate(zip(alone, shapes, strict=True)):
        pts1, conf1, pts2, conf2 = maps
        for view, points, conf in ((first, pts1, conf1), (second, pts2, conf2)):
            side = both[view is second] == portrait
            found = view["pts3d" if view is first else "pts3d_in_other_view"][row], view["conf"][row]
            for a, b in zip(found, (points[0], conf[0]), strict=True):
                torch.testing.assert_close(a, b.transpose(0, 1) if side else b, rtol=1e-5, atol=1e-5)
    # Read as landscapes the portraits would give other points: the test can fail.
    flat = {**view1, "true_shape": torch.tensor([landscape] * 8)}
    with torch.no_grad():
        assert not torch.allclose(mixed(flat, view2)[0]["pts3d"][1], first["pts3d"][1], rtol=1e-3)


def test_shapes_that_do_not_fit_a_mixed_batch_are_refused():
    model = build(**MANY)
    img = images((32, 48))[0]
    good = {"img": img, "true_shape": torch.tensor([[32, 48], [48, 32]])}
    model(good, good)
    for shape, picture in (([[32, 48], [48, 48]], img), ([[48, 32], [48, 32]], img.mT)):
        with pytest.raises(InputError, match="true_shape"):
            model({"img": picture, "true_shape": torch.tensor(shape)}, good)


@pytest.mark.parametrize("changes", [{}, DPT, {**DPT, "patch_size": 16}], ids=["linear", "dpt8", "dpt16"])
def test_shapes_ranges_and_gradients(changes):
    model = build(**changes)
    img1, img2 = images((32, 48), (48, 16))
    pts1, conf1, pts2, conf2 = model.pointmaps(img1, img2)
    assert pts1.shape == (2, 32, 48, 3) and conf1.shape == (2, 32, 48)
    assert pts2.shape == (2, 48, 16, 3) and conf2.shape == (2, 48, 16)
    assert (conf1 > 1).all() and (conf2 > 1).all()
    sum(t.sum() for t in (pts1, conf1, pts2, conf2)).backward()
    without = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    # Published checkpoints carry this unit, the network never runs it.
    assert all("refinenet4.resConfUnit1" in name for name in without)


def test_rotary_gradient_equals_that_of_the_recorded_operations():
    from trainables.dust3r.blocks import rotary_positions, rotate

    at = rotary_positions((2, 3), 8, 100.0, torch.device("cpu"), torch.float64)
    x = torch.randn(2, 6, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: rotate(t, at, 2, 8), (x,))
    # Turning keeps lengths, and scores depend on the offset between patches only.
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(2, 1, 6, 1, 8)
    q, k = rotate(q.contiguous(), at, 1, 8)[0, :, 0], rotate(k.contiguous(), at, 1, 8)[0, :, 0]
    torch.testing.assert_close(q.norm(dim=-1), q.norm(dim=-1)[:1].expand(6))
    scores = q @ k.T
    torch.testing.assert_close(scores[0, 1], scores[4, 5])
    assert abs(scores[0, 1] - scores[0, 3]) > 1e-3


def test_cut_heads_and_narrow_layers_have_the_stated_shapes():
    model = build(
        enc_num_heads=3, enc_head_dim=8, dec_num_heads=2, dec_head_dim=8, enc_mlp_hidden=40, dec_mlp_hidden=20
    )
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert shapes["enc_blocks.0.attn.qkv.weight"] == (3 * 3 * 8, 32)
    assert shapes["enc_blocks.0.attn.proj.weight"] == (32, 3 * 8)
    assert shapes["enc_blocks.0.mlp.fc1.weight"] == (40, 32)
    for side in ("dec_blocks", "dec_blocks2"):
        assert shapes[f"{side}.2.cross_attn.projk.weight"] == (2 * 8, 24)
        assert shapes[f"{side}.2.cross_attn.proj.weight"] == (24, 2 * 8)
        assert shapes[f"{side}.2.mlp.fc2.weight"] == (24, 20)
    assert model.pointmaps(*images((32, 48), (32, 48)))[0].shape == (2, 32, 48, 3)


def test_a_head_whose_output_is_zero_can_be_cut_exactly():
    whole = build()
    cut = build(enc_num_heads=3, enc_head_dim=8)
    state = whole.state_dict()
    for i in range(2):
        state[f"enc_blocks.{i}.attn.proj.weight"][:, 24:] = 0
    whole.load_state_dict(state)
    for i in range(2):
        for kind in ("weight", "bias"):
            name = f"enc_blocks.{i}.attn.qkv.{kind}"
            state[name] = state[name].unflatten(0, (3, 4, 8))[:, :3].flatten(0, 2)
        state[f"enc_blocks.{i}.attn.proj.weight"] = state[f"enc_blocks.{i}.attn.proj.weight"][:, :24]
    cut.load_state_dict(state)
    pair = images((32, 48), (32, 48))
    for a, b in zip(whole.pointmaps(*pair), cut.pointmaps(*pair), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_cosine_positions_are_fixed_tables():
    model = build(pos_embed="cosine")
    state = model.state_dict()
    assert state["enc_pos_embed"].shape == (24, 32) and state["dec_pos_embed"].shape == (24, 24)
    table = state["enc_pos_embed"].view(4, 6, 32)
    column, row = table[..., :16], table[..., 16:]
    assert (column == column[:1]).all() and (row == row[:, :1]).all()
    np.testing.assert_allclose(column[0, :, 0], np.sin(np.arange(6)), atol=1e-6)
    np.testing.assert_allclose(row[:, 0, 8], np.cos(np.arange(4)), atol=1e-6)
    assert "enc_pos_embed" not in build().state_dict()
    # Without positions a flat image would give the same token everywhere.
    tokens = model.encode(torch.zeros(1, 3, 32, 48))
    assert (tokens[0, 0] - tokens[0, 1]).abs().max() > 1e-3
    with pytest.raises(InputError, match="img_size"):
        model.encode(torch.zeros(1, 3, 32, 32))


def test_reference_names_and_tied_convolutions():
    model = build(**DPT)
    state = model.state_dict()
    for head in ("downstream_head1", "downstream_head2"):
        for i in range(4):
            first = state[f"{head}.dpt.scratch.layer{i + 1}_rn.weight"]
            assert first.data_ptr() == state[f"{head}.dpt.scratch.layer_rn.{i}.weight"].data_ptr()
    assert (
        state["downstream_head1.dpt.head.0.weight"].data_ptr() != state["downstream_head2.dpt.head.0.weight"].data_ptr()
    )
    assert state["mask_token"].shape == (1, 1, 24)


def test_config_is_json_and_rebuilds_the_model():
    model = build(**DPT, enc_mlp_hidden=40)
    again = from_reference_config(**json.loads(json.dumps(model.config, allow_nan=False)))
    assert again.config == model.config
    again.load_state_dict(model.state_dict())
    pair = images((32, 48), (32, 48))
    assert torch.equal(again.eval().pointmaps(*pair)[0], model.pointmaps(*pair)[0])


@pytest.mark.parametrize("blocks", [False, True])
def test_features_come_with_the_same_pointmaps(blocks):
    model = build()
    pair = images((32, 48), (32, 48))
    outputs, states = model.features(*pair, blocks=blocks)
    for a, b in zip(outputs, model.pointmaps(*pair), strict=True):
        assert torch.equal(a, b)
    list1, list2 = model.decode(states["enc1"], (32, 48), states["enc2"], (32, 48))
    assert len(list1) == 4 and list1[0] is states["enc1"]
    assert torch.equal(list1[-1], states["dec1"]) and torch.equal(list2[-1], states["dec2"])
    torch.testing.assert_close(model.encode(pair[1]), states["enc2"], rtol=1e-5, atol=1e-5)
    if blocks:
        both = model.enc_norm(states["enc_block1"])
        assert torch.equal(both[:2], states["enc1"]) and torch.equal(both[2:], states["enc2"])
        assert torch.equal(model.dec_norm(states["dec2_block2"]), states["dec2"])
        assert torch.equal(states["dec1_block0"], list1[1])
    else:
        assert set(states) == {"enc1", "enc2", "dec1", "dec2"}


def test_symmetric_features_are_those_of_the_swapped_pairs():
    model = build()
    img1, img2 = images((32, 48), (32, 48))
    both = model.features(img1, img2, symmetric=True)[0]
    swapped = model.pointmaps(torch.cat((img1, img2)), torch.cat((img2, img1)))
    for a, b in zip(both, swapped, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("sizes", "passes"), [(((32, 48), (32, 48)), 1), (((32, 48), (48, 32)), 2)])
def test_views_of_equal_shape_share_one_encoder_pass(sizes, passes):
    model = build()
    seen = []
    model.patch_embed.register_forward_hook(lambda _m, args, _o: seen.append(len(args[0])))
    first, second = model({"img": images(*sizes)[0]}, {"img": images(*sizes)[1]})
    assert seen == [4] if passes == 1 else seen == [2, 2]
    assert set(first) == {"pts3d", "conf"} and set(second) == {"pts3d_in_other_view", "conf"}


def test_a_model_first_run_in_inference_mode_can_still_be_trained():
    model = build()
    pair = images((32, 48), (32, 48))
    with torch.inference_mode():
        model.pointmaps(*pair)
    model.pointmaps(*pair)[0].sum().backward()
    assert model.patch_embed.proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"pos_embed": "learned"}, "pos_embed='learned'"),
        ({"head_type": "conv"}, "head_type='conv'"),
        ({"depth_mode": ("linear", 0, 1)}, "depth_mode"),
        ({"landscape_only": True, "head_type": "conv"}, "landscape_only=True.*head_type"),
        ({"patch_embed_cls": "ManyAR_PatchEmbed"}, "patch_embed_cls='ManyAR_PatchEmbed' with landscape_only=False"),
        ({"enc_num_heads": 5}, "enc_embed_dim=32.*enc_num_heads=5"),
        ({"enc_head_dim": 6}, "6 must be a multiple of 4"),
        ({"dec_mlp_hidden": 0}, "dec_mlp_hidden=0"),
        ({"img_size": (30, 48)}, "img_size"),
        ({**DPT, "hooks": (0, 1, 2, 4)}, "hooks"),
        ({"enc_dim": 3}, "enc_dim"),
    ],
)
def test_unsupported_values_are_named_in_one_line(changes, named):
    with pytest.raises(InputError, match=named) as caught:
        build(**changes)
    assert "\n" not in str(caught.value)


def test_image_that_the_patch_size_does_not_divide():
    with pytest.raises(InputError, match="patch_size=8"):
        build().encode(torch.zeros(1, 3, 30, 48))


class _Tensors(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, img1, img2):
        return self.model.pointmaps(img1, img2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("changes", [{}, DPT, {"pos_embed": "cosine"}], ids=["linear", "dpt", "cosine"])
def test_onnx_export_keeps_the_batch_free_and_the_outputs(changes):
    model = build(**changes)
    pair = images((32, 48), (32, 48), batch=3)
    file = io.BytesIO()
    names = ["img1", "img2"]
    axes = {name: {0: "batch"} for name in names}
    example = tuple(p[:1] for p in pair)
    torch.onnx.export(
        _Tensors(model), example, file, dynamo=False, opset_version=20, input_names=names, dynamic_axes=axes
    )
    operators = {node.op_type for node in onnx.load_from_string(file.getvalue()).graph.node}
    assert not operators & {"Cos", "Sin", "Mod", "If", "Loop"}
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    got = session.run(None, {n: p.numpy() for n, p in zip(names, pair, strict=True)})
    with torch.no_grad():
        expected = model.pointmaps(*pair)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b.numpy(), rtol=1e-4, atol=1e-5)
