import itertools

import pytest
import torch

from engines.errors import InputError
from engines.footprint import params_M
from trainables import least_squares
from trainables.dust3r import dpt, inherit
from trainables.dust3r.domain import SMALL_TEACHER
from trainables.dust3r.inherit import kept_layers, student_config
from trainables.dust3r.model import from_reference_config

TINY = {
    **SMALL_TEACHER,
    "img_size": (32, 32),
    "enc_embed_dim": 32,
    "enc_depth": 4,
    "enc_num_heads": 4,
    "dec_embed_dim": 24,
    "dec_depth": 4,
    "dec_num_heads": 3,
}
DPT = {**TINY, "head_type": "dpt", "feature_dim": 8, "last_dim": 8, "layer_dims": (8, 8, 8, 8), "img_size": (32, 48)}
ROPE = {**TINY, "pos_embed": "RoPE100", "dec_num_heads": 2, "dec_head_dim": 12}


def build(seed=0, **config):
    """Weights far from the initial ones, so that every layer, bias and norm matters."""
    torch.manual_seed(seed)
    model = from_reference_config(**config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.15 if p.ndim < 2 else 0.05))
    return model


def pairs(count, seed, size=(32, 32)):
    """Smooth images: what trained features see is strongly correlated."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count * 2, 3, 6, 6, generator=g) * 2 - 1
    fine = torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(-1, 1)
    return fine.unflatten(0, (count, 2))


def student_of(teacher, depth=0.7, heads=0.7, ffn=0.7, images=None, **head):
    student = from_reference_config(**student_config(teacher.config, depth, heads, ffn, **head)).eval()
    if images is not None:
        inherit.inherit(teacher, student, images)
    return student


@torch.no_grad()
def output_error(teacher, student, images):
    """Relative distance of the pointmaps, mean over both views."""
    ours = student.pointmaps(images[:, 0], images[:, 1])
    goal = teacher.pointmaps(images[:, 0], images[:, 1])
    return sum(float((a - b).norm() / b.norm()) for a, b in zip(ours[::2], goal[::2], strict=True)) / 2


def test_counts_round_to_nearest_and_widths_stay():
    config = student_config(SMALL_TEACHER, 0.7, 0.7, 0.7)
    counts = {f"{s}_{p}": config[f"{s}_{p}"] for s in ("enc", "dec") for p in ("depth", "num_heads", "mlp_hidden")}
    assert counts == {
        "enc_depth": 4,  # 4.2 of 6
        "enc_num_heads": 4,  # 3.5 of 5
        "enc_mlp_hidden": 448,  # 448 of 640
        "dec_depth": 3,  # 2.8 of 4
        "dec_num_heads": 3,  # 2.8 of 4
        "dec_mlp_hidden": 360,  # 358.4 of 512
    }
    assert (config["enc_embed_dim"], config["dec_embed_dim"]) == (160, 128)
    assert (config["enc_head_dim"], config["dec_head_dim"]) == (32, 32)
    least = student_config(SMALL_TEACHER, 0.01, 0.01, 0.001)
    assert [least[f"enc_{p}"] for p in ("depth", "num_heads", "mlp_hidden")] == [1, 1, 8]


def test_decoders_may_be_cut_by_a_share_of_their_own():
    config = student_config(SMALL_TEACHER, 0.5, 0.7, 0.7, dec_depth=1.0)
    assert (config["enc_depth"], config["dec_depth"]) == (3, 4), "7 of 10 layers"


def test_students_of_students():
    once = student_config(SMALL_TEACHER, 1.0, 0.5, 0.5)
    twice = student_config(once, 0.5, 1.0, 0.5)
    assert (twice["enc_head_dim"], twice["enc_num_heads"], twice["enc_mlp_hidden"]) == (32, 3, 160)
    assert twice["enc_depth"] == 3


def test_layers_are_spread_evenly_with_both_ends():
    assert kept_layers(6, 4) == [0, 2, 3, 5]
    assert kept_layers(4, 3) == [0, 1, 3] and kept_layers(6, 3) == [0, 2, 5]
    assert kept_layers(24, 24) == list(range(24))
    for depth, keep in itertools.product(range(2, 25), repeat=2):
        if keep <= depth:
            layers = kept_layers(depth, keep)
            gaps = [b - a for a, b in itertools.pairwise(layers)]
            assert (layers[0], layers[-1], len(layers)) == (0, depth - 1, keep)
            assert min(gaps) >= 1
            assert max(gaps) - min(gaps) <= 1


def test_hooks_follow_the_layers():
    config = {"head_type": "dpt", "enc_depth": 4, "dec_depth": 12}
    assert student_config(config, 1.0, 0.5, 0.5)["hooks"] == [0, 6, 9, 12]
    # Layers 0 1 3 4 5 7 8 10 11 stay; each leaves the stream that enters the next: positions 1 3 4 5 7 8 10 11 12.
    assert kept_layers(12, 9) == [0, 1, 3, 4, 5, 7, 8, 10, 11]
    assert student_config(config, 0.75, 1.0, 1.0)["hooks"] == [0, 4, 6, 9]
    # One layer is left for three positions of the decoder; position 0, of the encoder's width, is never one of them.
    assert student_config(config, 0.01, 1.0, 1.0)["hooks"] == [0, 1, 1, 1]


@pytest.mark.parametrize("bad", [0.0, -0.1, 1.01, float("nan")])
@pytest.mark.parametrize("name", ["depth", "heads", "ffn", "dec_depth"])
def test_bad_ratios_are_named(name, bad):
    with pytest.raises(InputError) as error:
        student_config(SMALL_TEACHER, **{"depth": 0.7, "heads": 0.7, "ffn": 0.7, name: bad})
    assert f"{name}={bad}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", [TINY, ROPE, DPT], ids=["cosine", "rope", "dpt"])
def test_nothing_cut_is_the_teacher(config):
    teacher = build(**config)
    images = pairs(2, 1, config["img_size"])
    student = student_of(teacher, 1.0, 1.0, 1.0, images)
    assert output_error(teacher, student, images) == 0


@pytest.mark.parametrize(
    ("config", "ratios"),
    [
        (TINY, (0.7, 0.7, 0.7)),
        (ROPE, (0.7, 0.7, 0.7)),
        (DPT, (0.7, 0.7, 0.7)),
        (TINY, (0.5, 1.0, 1.0)),
        (TINY, (1.0, 0.5, 1.0)),
        (TINY, (1.0, 1.0, 0.5)),
        (DPT, (0.2, 0.2, 0.2)),
    ],
    ids=["cosine", "rope", "dpt", "depth", "heads", "ffn", "least"],
)
def test_refit_lowers_the_error_on_unseen_images(config, ratios, monkeypatch):
    teacher = build(**config)
    seen, unseen = pairs(48, 1, config["img_size"]), pairs(16, 2, config["img_size"])
    refitted = output_error(teacher, student_of(teacher, *ratios, images=seen), unseen)
    monkeypatch.setattr(least_squares, "RIDGE", 1e9)  # only the teacher's own weights are left
    plain = output_error(teacher, student_of(teacher, *ratios, images=seen), unseen)
    assert refitted < 0.7 * plain


def test_redundant_channels_and_heads_are_cut_without_loss(monkeypatch):
    """Copies of half of the channels and heads carry nothing of their own: half of the size gives the same outputs."""
    teacher = build(**{**TINY, "dec_num_heads": 2})
    with torch.no_grad():
        for block in (*teacher.enc_blocks, *teacher.dec_blocks, *teacher.dec_blocks2):
            half = block.mlp.fc1.out_features // 2
            block.mlp.fc1.weight[half:], block.mlp.fc1.bias[half:] = (
                block.mlp.fc1.weight[:half],
                block.mlp.fc1.bias[:half],
            )
            for parameter in (block.attn.qkv.weight, block.attn.qkv.bias):
                packed = parameter.unflatten(0, (3, -1, block.attn.head_dim))
                packed[:, 1::2] = packed[:, ::2]
            if hasattr(block, "cross_attn"):
                for name in ("projq", "projk", "projv"):
                    layer = getattr(block.cross_attn, name)
                    for parameter in (layer.weight, layer.bias):
                        packed = parameter.unflatten(0, (-1, block.cross_attn.head_dim))
                        packed[1::2] = packed[::2]
    monkeypatch.setattr(least_squares, "RIDGE", 1e-6)  # the usual pull to the teacher's weights costs over 1 %
    images = pairs(48, 1)
    student = student_of(teacher, 1.0, 0.5, 0.5, images)
    assert output_error(teacher, student, pairs(8, 2)) < 0.01


def test_repeatable_and_teacher_untouched():
    teacher = build(**TINY)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    torch.manual_seed(1)
    first = student_of(teacher, images=pairs(8, 1)).state_dict()
    torch.manual_seed(2)
    second = student_of(teacher, images=pairs(8, 1)).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_batches_do_not_change_the_result(monkeypatch):
    teacher = build(**TINY)
    whole = student_of(teacher, images=pairs(10, 1))
    monkeypatch.setattr(inherit, "BATCH_TOKENS", 2 * 16 * 3)
    parts = student_of(teacher, images=pairs(10, 1))
    assert output_error(whole, parts, pairs(4, 2)) < 1e-3


def test_other_architectures_are_refused():
    teacher = build(**TINY)
    other = from_reference_config(**{**student_config(TINY, 0.7, 0.7, 0.7), "enc_embed_dim": 40})
    with pytest.raises(InputError, match=r"enc_embed_dim=40 \(teacher 32\)"):
        inherit.inherit(teacher, other, pairs(2, 1))
    deeper = from_reference_config(**{**TINY, "enc_depth": 5})
    with pytest.raises(InputError, match=r"enc_depth=5 \(teacher 4\)"):
        inherit.inherit(teacher, deeper, pairs(2, 1))
    with pytest.raises(InputError, match="calibration images"):
        inherit.inherit(teacher, student_of(teacher), pairs(2, 1)[:, 0])


WIDE = {**DPT, "feature_dim": 32, "last_dim": 16, "layer_dims": (16, 32, 16, 32)}


def test_a_narrower_head_without_dead_channels_is_the_same_head():
    """Every second channel of every group is dead (nothing makes it, nothing reads it): the cut finds the others."""
    teacher = build(**WIDE)
    for head in (teacher.downstream_head1, teacher.downstream_head2):
        for name, weight in head.named_parameters():
            (makes, reads), (made, read) = dpt._channels(name), dpt._axes(name, weight)
            for group, axis in ((makes, made if weight.ndim > 1 else 0), (reads, read if weight.ndim > 1 else None)):
                if group is not None and axis is not None:
                    weight.data.index_fill_(axis, torch.arange(0, weight.shape[axis], 2), 0)
    images = pairs(4, 1, (32, 48))
    student = student_of(teacher, 1, 1, 1, images, head=0.5)
    assert student.config["feature_dim"] == 16 and student.config["layer_dims"] == [8, 16, 8, 16]
    assert output_error(teacher, student, pairs(4, 2, (32, 48))) < 1e-5


def test_a_shared_head_is_one_set_of_weights():
    for config in (WIDE, TINY):
        teacher, size = build(**config), (32, 48) if config is WIDE else (32, 32)
        both, one = (student_of(teacher, images=pairs(16, 1, size), shared_head=on) for on in (False, True))
        assert one.downstream_head1 is one.downstream_head2
        saved = params_M(both) - params_M(one)
        assert saved == pytest.approx(params_M(both.downstream_head1), rel=1e-6)
        again = from_reference_config(**one.config)
        again.load_state_dict(one.state_dict())
        assert output_error(again, one, pairs(4, 2, size)) == 0


def test_what_a_head_cannot_do_is_named():
    with pytest.raises(InputError, match=r"head=0.5: this teacher's heads are linear"):
        student_config(build(**TINY).config, 1, 1, 1, head=0.5)
    with pytest.raises(InputError, match=r"head=0 must lie above 0"):
        student_config(build(**WIDE).config, 1, 1, 1, head=0)
    wide, narrow = build(**WIDE), build(**DPT)
    with pytest.raises(InputError, match=r"feature_dim=32 \(teacher 8\)"):
        inherit.inherit(narrow, wide, pairs(2, 1, (32, 48)))
