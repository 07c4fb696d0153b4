"""Files in the two published forms, written here from tiny architectures, and files that only look like them."""

import argparse
import json
import math
import os

import pytest
import torch
from safetensors.torch import save_file

from engines.errors import InputError
from trainables import checkpoint
from trainables.dust3r import released
from trainables.dust3r.__main__ import main
from trainables.dust3r.model import from_reference_config

LINEAR = {
    "pos_embed": "RoPE100",
    "patch_embed_cls": "ManyAR_PatchEmbed",
    "img_size": (64, 48),
    "head_type": "linear",
    "output_mode": "pts3d",
    "depth_mode": ("exp", -math.inf, math.inf),
    "conf_mode": ("exp", 1, math.inf),
    "enc_embed_dim": 32,
    "enc_depth": 2,
    "enc_num_heads": 4,
    "dec_embed_dim": 24,
    "dec_depth": 3,
    "dec_num_heads": 2,
}
DPT = {**LINEAR, "head_type": "dpt"}
WIDTHS = {"feature_dim": 16, "last_dim": 12, "layer_dims": (8, 12, 16, 20)}
TIED = [f"downstream_head{head}.dpt.scratch.layer_rn.{i}.weight" for head in (1, 2) for i in range(4)]


def model_of(arguments, seed=0):
    """The model that the published code would build at inference, with random weights."""
    torch.manual_seed(seed)
    widths = WIDTHS if arguments["head_type"] == "dpt" else {}
    plain = {"patch_embed_cls": "PatchEmbedDust3R", "landscape_only": False}
    return from_reference_config(**{**arguments, **plain, **widths}).eval()


def spelled(arguments):
    return f"AsymmetricCroCo3DStereo({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


def write_pth(path, arguments, weights, **more):
    args = argparse.Namespace(model=spelled(arguments), lr=1e-4, amp=True, pretrained=None, dist_url="env://")
    torch.save({"args": args, "model": weights, "epoch": 90, "best_so_far": math.inf, **more}, path)
    return path


def write_hub(folder, arguments, weights):
    folder.mkdir()
    plain = {**arguments, "patch_embed_cls": "PatchEmbedDust3R", "landscape_only": False}
    (folder / "config.json").write_text(json.dumps(plain, indent=2))
    kept = {key: value for key, value in weights.items() if key not in TIED}
    save_file(kept, folder / "model.safetensors", {"format": "pt", **{key: "its twin" for key in TIED}})
    return folder


def refused(path, *parts):
    with pytest.raises(InputError) as error:
        released.read(path)
    text = str(error.value)
    assert "\n" not in text and all(str(part) in text for part in (path, *parts)), text
    return text


@pytest.mark.parametrize("arguments", [LINEAR, DPT], ids=["linear", "dpt"])
@pytest.mark.parametrize("form", ["pth", "hub"])
def test_both_forms_give_the_model_back(tiny, tmp_path, arguments, form):
    model = model_of(arguments)
    write = write_pth if form == "pth" else write_hub
    path = write(tmp_path / f"teacher.{form}", arguments, model.state_dict())
    before = torch.get_rng_state()
    loaded = tiny.domain().load(path).eval()
    assert torch.equal(torch.get_rng_state(), before), "reading moves no random number"
    assert tiny.same(dict(loaded.state_dict()), dict(model.state_dict()))
    widths = {f"{side}_mlp_hidden": 4 * arguments[f"{side}_embed_dim"] for side in ("enc", "dec")}
    assert loaded.config == {**model.config, **widths}, "of the feed-forward width the shapes are the source"
    pair = torch.rand(2, 1, 3, 48, 64) * 2 - 1
    for a, b in zip(loaded.pointmaps(*pair), model.pointmaps(*pair), strict=True):
        assert torch.equal(a, b)
    assert loaded.enc_blocks[0].mlp.fc1.weight.requires_grad
    assert tiny.domain(teacher=str(path), image_size="64x48").teacher().config == loaded.config


def test_the_file_needs_what_only_safe_reading_gives(tmp_path):
    path = write_pth(tmp_path / "teacher.pth", LINEAR, model_of(LINEAR).state_dict())
    with pytest.raises(Exception, match="argparse.Namespace"):
        torch.load(path, weights_only=True)
    text = (write_hub(tmp_path / "hub", LINEAR, model_of(LINEAR).state_dict()) / "config.json").read_text()
    assert "-Infinity" in text, "not strict JSON, as published"


def test_half_precision_and_either_tied_name(tiny, tmp_path):
    weights = {key: value.half() for key, value in model_of(DPT).state_dict().items()}
    other = {key: value for key, value in weights.items() if ".layer" not in key or key in TIED}
    assert len(other) == len(weights) - len(TIED)
    a, b = (released.read(write_pth(tmp_path / f"{k}.pth", DPT, part))[1] for k, part in enumerate((weights, other)))
    assert tiny.same(a, b) and {value.dtype for value in a.values()} == {torch.float32}


def test_heads_are_64_wide_where_no_argument_says_it(tmp_path):
    wide = {**LINEAR, "enc_embed_dim": 128, "enc_num_heads": 2, "dec_embed_dim": 64, "dec_num_heads": 1}
    said = {key: value for key, value in wide.items() if not key.endswith("num_heads")}
    config, _ = released.read(write_pth(tmp_path / "t.pth", said, model_of(wide).state_dict()))
    assert (config["enc_num_heads"], config["dec_num_heads"]) == (2, 1)


def test_own_files_are_read_as_before(tiny, tmp_path):
    assert tiny.domain().load(tiny.teacher_file).config == tiny.new_model().config
    checkpoint.save(tmp_path / "neither.pth", {"weights": {}, "epoch": 3})
    refused(tmp_path / "neither.pth", "'model' and 'config'", "weights, epoch")


def test_keys_that_do_not_fit_are_listed(tmp_path):
    weights = model_of(LINEAR).state_dict()
    broken = {key: value for key, value in weights.items() if not key.startswith("enc_norm")}
    broken["prediction_head.weight"] = torch.zeros(3)
    broken["dec_norm.weight"] = torch.zeros(25)
    text = refused(write_pth(tmp_path / "t.pth", LINEAR, broken), "2 missing: enc_norm.bias, enc_norm.weight")
    assert "1 extra: prediction_head.weight" in text
    assert "1 mis-shaped: dec_norm.weight (25,) instead of (24,)" in text
    half = {key: value for key, value in weights.items() if "dec_blocks2" not in key}
    assert "and 67 more" in refused(write_pth(tmp_path / "half.pth", LINEAR, half), "72 missing")


def test_tensors_that_no_model_has_are_one_line(tmp_path):
    weights = model_of(LINEAR).state_dict()
    path = tmp_path / "t.pth"
    for name in ("patch_embed.proj.weight", "enc_blocks.0.mlp.fc1.weight"):
        refused(write_pth(path, LINEAR, {**weights, name: torch.tensor(1.0)}), f"lacks {name} of")
    vast = {"patch_embed.proj.weight": torch.zeros(1).expand(2**40, 3, 16, 16)}
    refused(write_pth(path, {}, {**weights, **vast}), "not stored in full: patch_embed.proj.weight")
    refused(write_pth(path, LINEAR, {**weights, "enc_norm.bias": torch.zeros(32).to_sparse()}), "enc_norm.bias")
    far = {"enc_blocks.2000000000.norm1.weight": torch.zeros(32)}  # and not: build two billion layers
    refused(write_pth(path, {}, {**weights, **far}), "1 extra: enc_blocks.2000000000.norm1.weight")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"img_size": 512}, ["img_size=512"]),
        ({"enc_num_heads": "x"}, ["enc_num_heads='x'"]),
        ({"enc_depth": 3}, ["enc_depth=3", "have 2"]),
        ({"head_type": "dpt"}, ["head_type=dpt", "linear"]),
        ({"enc_num_heads": 5}, ["enc_embed_dim=32", "enc_num_heads=5"]),
        ({"depth_mode": ("linear", 0, 1)}, ["depth_mode"]),
        ({"two_confs": True}, ["unknown arguments ['two_confs']"]),
        ({"img_size": "large"}, ["img_size"]),
    ],
)
def test_arguments_that_contradict_are_named(tmp_path, change, parts):
    weights = model_of(LINEAR).state_dict()
    refused(write_pth(tmp_path / "t.pth", {**LINEAR, **change}, weights), *parts)
    write_hub(tmp_path / "hub", {**LINEAR, **change}, weights)
    with pytest.raises(InputError):
        released.read(tmp_path / "hub")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_hostile_files_are_refused_and_do_nothing(tmp_path):
    exploded = tmp_path / "exploded"
    weights = model_of(LINEAR).state_dict()
    for k, content in enumerate(
        (
            {"args": Bomb(exploded), "model": weights},
            {"args": argparse.Namespace(model=Bomb(exploded)), "model": weights},
            {"args": argparse.Namespace(model=spelled(LINEAR)), "model": {**weights, "x": Bomb(exploded)}},
        )
    ):
        path = tmp_path / f"bomb{k}.pth"
        torch.save(content, path)
        refused(path, "mkdir", "nothing of it was run")
    calls = [
        f"__import__('os').mkdir({str(exploded)!r})",
        f"AsymmetricCroCo3DStereo(enc_depth=__import__('os').mkdir({str(exploded)!r}))",
        f"AsymmetricCroCo3DStereo(**{{'enc_depth': open({str(exploded)!r}, 'w')}})",
        "AsymmetricCroCo3DStereo(enc_depth=[2 for _ in ()])",
        "AsymmetricCroCo3DStereo(enc_depth=9**9**9)",
        "AsymmetricCroCo3DStereo(enc_depth=x.y)",
        "AsymmetricCroCo3DStereo(2)",
        "AsymmetricCroCo3DStereo",
        "os.mkdir(path=3)",
        "(lambda: 1)()",
        "A(" * 5000,
        "",
        "A(b='\0')",
    ]
    for k, text in enumerate(calls):
        path = tmp_path / f"call{k}.pth"
        torch.save({"args": argparse.Namespace(model=text), "model": weights}, path)
        refused(path, "args.model")
    torch.save({"args": argparse.Namespace(), "model": weights}, tmp_path / "none.pth")
    refused(tmp_path / "none.pth", "args.model=None")
    assert not exploded.exists()
    assert argparse.Namespace not in torch.serialization.get_safe_globals(), "allowed for the reading alone"


def test_damaged_files_are_one_line(tmp_path):
    weights = model_of(LINEAR).state_dict()
    whole = write_pth(tmp_path / "t.pth", LINEAR, weights).read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "half.pth", "truncated")
    for name, content in {"list": [1, 2], "numbers": {"a": 1}, "empty": {}}.items():
        path = tmp_path / f"{name}.pth"
        torch.save({"args": argparse.Namespace(model=spelled(LINEAR)), "model": content}, path)
        refused(path)
    hub = write_hub(tmp_path / "hub", LINEAR, weights)
    data = (hub / "model.safetensors").read_bytes()
    (hub / "model.safetensors").write_bytes(data[:-10])
    refused(hub, "model.safetensors", "truncated")
    (hub / "model.safetensors").unlink()
    refused(hub, "model.safetensors", "does not exist")
    (hub / "model.safetensors").write_bytes(data)
    with pytest.raises(InputError, match="give the folder"):
        released.read(hub / "model.safetensors")
    for text in ("{", "[1]", "\xff", "[" * 100_000):
        (hub / "config.json").write_bytes(text.encode("latin-1"))
        refused(hub, "config.json")
    (hub / "config.json").unlink()
    refused(hub, "config.json", "does not exist")


def test_describe_takes_both_forms(tmp_path, capsys):
    weights = model_of(LINEAR).state_dict()
    tables = []
    for path in (write_pth(tmp_path / "a.pth", LINEAR, weights), write_hub(tmp_path / "hub", LINEAR, weights)):
        assert main(["describe", "--set", f"teacher={path}"]) == 0
        tables.append(capsys.readouterr().out)
    millions = sum(value.numel() for key, value in weights.items() if key != "mask_token") / 1e6
    assert tables[0] == tables[1] and f"{'all: parameters, M':34}{millions:12.2f}" in tables[0]
