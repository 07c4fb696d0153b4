import json
import math

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from engines.errors import InputError
from trainables import checkpoint
from trainables.domain import make_domain
from trainables.dust3r import domain as module
from trainables.dust3r import losses, metrics
from trainables.dust3r.domain import SMALL_TEACHER, Dust3r


def refused(call, *parts):
    """The one line of its InputError, which names all the parts."""
    with pytest.raises(InputError) as error:
        call()
    text = str(error.value)
    assert text and "\n" not in text, text
    for part in parts:
        assert str(part) in text
    return text


@pytest.fixture
def domain(tiny):
    return tiny.domain()


@pytest.fixture
def batch(domain):
    return domain.samples("train", torch.arange(6))


# ------------------------------------------------------------------ teachers and files
def test_teacher_is_the_files_and_frozen(domain, tiny):
    teacher = domain.teacher()
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert tiny.same(dict(teacher.state_dict()), dict(tiny.new_model().state_dict()))


def test_missing_and_unreadable_teachers_are_one_line(tiny, tmp_path):
    for name in ("missing.pth", "missing.safetensors"):
        refused(tiny.domain(teacher=str(tmp_path / name)).teacher, tmp_path / name)
    model = tiny.new_model()
    whole = tmp_path / "whole.safetensors"
    save_file(model.state_dict(), whole, {"config": json.dumps(model.config)})
    data = whole.read_bytes()
    assert tiny.same(dict(tiny.domain(teacher=str(whole)).teacher().state_dict()), dict(model.state_dict()))
    for k, content in enumerate((data[: len(data) // 2], data[:-4], data[:20], b"", b"hello world, no tensors")):
        path = tmp_path / f"broken{k}.safetensors"
        path.write_bytes(content)
        refused(tiny.domain(teacher=str(path)).teacher, path, "truncated")
    torn = tmp_path / "torn.pth"
    torn.write_bytes(tiny.teacher_file.read_bytes()[:-200])
    refused(tiny.domain(teacher=str(torn)).teacher, torn, "truncated")
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    refused(tiny.domain(teacher=str(folder)).teacher, folder)


def test_files_of_another_kind_are_one_line(tiny, tmp_path):
    model = tiny.new_model()
    weights, config = model.state_dict(), model.config
    other = {key: value for key, value in weights.items() if "dec_blocks" not in key}
    contents = {
        "no config": {"model": weights},
        "no model": {"config": config},
        "layers missing": {"model": other, "config": config},
        "deeper": {"model": weights, "config": {**config, "enc_depth": 5}},
        "wider": {"model": weights, "config": {**config, "dec_mlp_hidden": 40}},
        "unknown key": {"model": weights, "config": {**config, "encoder": 3}},
        "not a config": {"model": weights, "config": [1, 2]},
        "not weights": {"model": [1, 2], "config": config},
        "impossible": {"model": weights, "config": {**config, "img_size": [33, 32]}},
        "wrong type": {"model": weights, "config": {**config, "enc_depth": "three"}},
        "no size": {"model": weights, "config": {**config, "img_size": 32}},
    }
    for name, content in contents.items():
        path = tmp_path / f"{name}.pth"
        checkpoint.save(path, content)
        refused(tiny.domain(teacher=str(path)).teacher, path)
    for name, header in {"none": None, "torn": {"config": '{"img_size": [32'}, "list": {"config": "[1]"}}.items():
        path = tmp_path / f"{name}.safetensors"
        save_file(weights, path, header)
        refused(tiny.domain(teacher=str(path)).teacher, path)


def test_image_size_must_be_the_teachers(tiny, tmp_path):
    text = refused(tiny.domain(image_size="64x48").teacher, "64x48", "32x32", "teacher")
    assert str(tiny.teacher_file) in text
    wide = tiny.save_model(tmp_path / "wide.pth", tiny.new_model(img_size=(32, 48)))
    tiny.domain(teacher=str(wide), image_size="48x32").teacher()
    refused(tiny.domain(teacher=str(wide), image_size="32x48").teacher, "48x32")
    refused(tiny.domain(image_size="30x30").new_teacher, "img_size", "30")


def test_unknown_domain_is_one_line():
    refused(lambda: make_domain("dust4r", {}, {}, 0), "dust4r", "dust3r")


def test_shipped_teacher_serves_its_own_size():
    shipped = Dust3r({}, seed=0)
    assert shipped.teacher().config["img_size"] == [64, 64]
    assert shipped.new_teacher().config == shipped.teacher().config
    assert {key: shipped.teacher().config[key] for key in ("enc_depth", "dec_depth")} == {
        key: SMALL_TEACHER[key] for key in ("enc_depth", "dec_depth")
    }
    assert module.SHIPPED.stat().st_size <= 10e6


def test_students_are_cut_as_the_settings_say(tiny):
    for share, depth in ((1.0, 3), (0.7, 2), (0.3, 1)):
        config = tiny.domain(depth=share, heads=share, ffn=share).student(inherit=False).config
        assert config["enc_depth"] == config["dec_depth"] == depth
    whole = tiny.domain(depth=1.0, heads=1.0, ffn=1.0)
    ids = {tiny.domain(**change).student_id() for change in ({}, {"depth": 0.5}, {"heads": 0.5}, {"ffn": 0.5})}
    assert len(ids) == 4
    images = whole.samples("train", torch.arange(4))
    exact = whole.forward(whole.teacher(), images)["pts1"]
    assert torch.allclose(whole.forward(whole.student(inherit=True), images)["pts1"], exact, rtol=1e-3, atol=1e-3)


def test_a_student_comes_back_from_its_file(domain, tmp_path, tiny):
    student = domain.student(inherit=False)
    checkpoint.save(tmp_path / "s.pth", domain.export(student))
    assert tiny.same(dict(domain.load(tmp_path / "s.pth").state_dict()), dict(student.state_dict()))


# ------------------------------------------------------------------ data
def test_samples_do_not_depend_on_their_batch(domain, tiny):
    whole = domain.samples("train", torch.arange(40))
    assert whole["image"].dtype == torch.uint8 and whole["points"].dtype == torch.float16
    rows = torch.tensor([39, 4, 5, 4, 0, 22])
    picked = domain.samples("train", rows)
    assert all(tiny.same(picked[name], whole[name][rows]) for name in whole)
    for size in (1, 3, 16):
        parts = [domain.samples("train", part) for part in torch.split(torch.arange(40), size)]
        for name in whole:
            assert tiny.same(torch.cat([part[name] for part in parts]), whole[name]), (name, size)


def test_a_scene_is_seen_both_ways(domain):
    forth, back = (domain.samples("train", torch.arange(k, 12, 2)) for k in (0, 1))
    assert torch.equal(forth["image"], back["image"].flip(1))
    scenes = domain.scene_pairs("train", torch.arange(6))
    both = domain.both_ways(scenes)
    assert both["points"].shape[0] == 12
    assert torch.equal(both["points"][0::2], scenes["points"])
    # Seen the other way, view 2 comes first: its points in its own frame, whose z is its depth.
    views = module.rooms.render(7, "train", torch.arange(6), 2, (32, 32))
    assert torch.allclose(both["points"][1::2, 0, ..., 2], views.depth[:, 1], rtol=1e-4, atol=1e-4)
    # A rigid motion: distances between points stay.
    before, after = scenes["points"].flatten(1, 3), both["points"][1::2].flip(1).flatten(1, 3)
    pick = torch.randperm(before.shape[1], generator=torch.Generator().manual_seed(0))[:60]
    assert torch.allclose(
        torch.cdist(before[:, pick].double(), before[:, pick].double()),
        torch.cdist(after[:, pick].double(), after[:, pick].double()),
        atol=1e-4,
    )
    # And twice is back again.
    pose = torch.linalg.inv(scenes["pose"])
    again = domain.both_ways({"image": both["image"][1::2], "points": both["points"][1::2], "pose": pose})
    assert torch.allclose(again["points"][1::2], scenes["points"], atol=1e-4)


def test_identities_follow_what_they_stand_for(tiny, monkeypatch):
    def ids(seed=7, **changes):
        domain = tiny.domain(seed, **changes)
        return domain.data_id(), domain.split_id("val"), domain.split_id("test")

    base = ids()
    assert ids() == base and len(set(base)) == 3
    # What changes: (data, val, test).
    assert [a != b for a, b in zip(ids(8), base, strict=True)] == [True, False, False]
    for change, expected in {
        "image_size": ("48x48", [True, True, True]),
        "workload_seed": (43, [False, True, True]),
        "val_pairs": (13, [False, True, False]),
        "test_pairs": (13, [False, False, True]),
        "primary": ("rmse", [False, True, True]),
        "T": (9.0, [False, False, False]),
    }.items():
        value, changed = expected
        assert [a != b for a, b in zip(ids(**{change: value}), base, strict=True)] == changed, change
    monkeypatch.setattr(module, "_CODE", module._CODE + "# edited")
    assert all(a != b for a, b in zip(ids(), base, strict=True)), "other code, other data"


# ------------------------------------------------------------------ forward, signals, losses
def test_both_directions_of_a_pair_encode_each_image_once(domain, batch):
    teacher, encoded = domain.teacher(), []
    teacher.enc_norm.register_forward_hook(lambda _, args, out: encoded.append(len(out)))
    with torch.no_grad():
        both = domain.forward(teacher, batch)
        assert encoded == [len(batch["image"])], "twice as many images, each of them twice"
        apart = [domain.forward(teacher, {"image": image[None]}) for image in batch["image"]]
        shifted = domain.forward(teacher, {"image": batch["image"][1:5]})
    assert {"pts1", "conf1", "pts2", "conf2", *module.STATES} == both.keys()
    for name, value in both.items():
        whole = torch.cat([part[name] for part in apart])
        assert torch.allclose(value, whole, rtol=1e-4, atol=1e-4), name
        assert torch.allclose(shifted[name], whole[1:5], rtol=1e-4, atol=1e-4), "pairs that are not each other's swap"


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"beta": 0.5, "gamma": 0.0}, ["kl"]),
        ({"beta": 0.0, "gamma": 0.1}, ["feature"]),
        ({"beta": 0, "gamma": 0}, []),
        ({"beta": {"step": [0.0, 0.7], "shares": [0.7, 0.3]}, "gamma": 0.2}, ["kl", "feature"]),
        ({"beta": {"linear": [0.5, 0.0]}}, ["kl"]),
        ({"beta": {"linear": [0, 0]}}, []),
    ],
)
def test_signals_are_on_where_their_weight_is_not_zero(tiny, changes, names):
    assert [signal.name for signal in tiny.domain(**changes).signals()] == names


@pytest.mark.parametrize("beta", [{"step": [0.5, 0.7], "shares": [0.7, 0.7]}, -0.1, "much", {"linear": [0.5, -1]}])
def test_impossible_schedules_are_refused(tiny, beta):
    with pytest.raises((InputError, ValidationError)):
        tiny.domain(beta=beta)


@pytest.mark.parametrize("change", [{"T": 0.0}, {"T": -1.0}, {"T": math.nan}, {"depth": 0.0}, {"depth": 1.1}])
def test_impossible_settings_are_refused(tiny, change):
    with pytest.raises((InputError, ValidationError)):
        tiny.domain(**change)


def test_a_students_signals_vanish_where_it_is_its_teacher(domain, batch):
    teacher = domain.teacher()
    with torch.no_grad():
        outputs = domain.forward(teacher, batch)
    exact = {name: outputs[name] for name in module.STATES}
    stored = {f"teacher_state_{name}": value for name, value in exact.items()}
    assert domain.signal_loss("feature", outputs, stored, domain.adapters()) == 0, "adapters start as the identity"
    cached = domain.teacher_outputs(teacher, batch)
    scale = torch.stack([value.square().mean() for value in exact.values()]).mean()
    assert domain.signal_loss("feature", outputs, cached, domain.adapters()) < 1e-6 * scale
    assert 0 <= domain.signal_loss("kl", outputs, cached, domain.adapters()) < 1e-4
    student = domain.forward(domain.student(inherit=False), batch)
    assert domain.signal_loss("feature", student, cached, domain.adapters()) > 0.01 * scale
    assert domain.signal_loss("kl", student, cached, domain.adapters()) > 0.01


def test_signal_losses_by_hand(domain, batch):
    teacher = domain.teacher()
    cached = domain.teacher_outputs(teacher, batch)
    outputs = domain.forward(domain.student(inherit=False), batch)
    squares = [(outputs[s] - cached[f"teacher_state_{s}"].float()).square().mean() for s in module.STATES]
    found = domain.signal_loss("feature", outputs, cached, domain.adapters())
    assert float(found.detach()) == pytest.approx(float(sum(squares).detach()) / 4, rel=1e-5)
    distance = [outputs[f"pts{v}"].norm(dim=-1).flatten(1) for v in (1, 2)]
    factor = torch.cat(distance, 1).mean(1)[:, None, None, None]
    parts = [
        losses.laplace_kl(
            *(cached[f"teacher_{name}{v}"].float() for name in ("pts", "conf")),
            *(outputs[f"pts{v}"] / factor, outputs[f"conf{v}"], 3.0),
        )
        for v in (1, 2)
    ]
    found = domain.signal_loss("kl", outputs, cached, domain.adapters())
    assert float(found.detach()) == pytest.approx(float(sum(parts).detach()), rel=1e-5)


def test_pretraining_loss_is_the_task_in_both_directions(domain):
    scenes = domain.pretraining_samples(torch.arange(5))
    model = domain.teacher()
    both = domain.both_ways(scenes)
    parts = [{name: value[way::2] for name, value in both.items()} for way in (0, 1)]
    expected = [float(domain.task_loss(domain.forward(model, part), part)) for part in parts]
    assert float(domain.pretraining_loss(model, scenes)) == pytest.approx(sum(expected) / 2, rel=1e-4)


def test_adapters_fit_the_teachers_widths(domain):
    adapters = domain.adapters()
    assert (adapters["enc"].weight.shape, adapters["dec"].weight.shape) == ((32, 32), (24, 24))
    names = set(domain.export(domain.student(inherit=False))["model"])
    assert not any(name.startswith(("enc.", "dec.", "adapters")) for name in names)


# ------------------------------------------------------------------ evaluation
def test_evaluation_is_the_metrics_of_each_pair(domain, tiny):
    teacher = domain.teacher()
    found = domain.evaluate(teacher, "test", full=True)
    assert {name: value.shape for name, value in found.items()} == dict.fromkeys(
        (*metrics.NAMES, *metrics.POSES), (20,)
    )
    scenes = domain.scene_pairs("test", torch.tensor([13]))
    with torch.no_grad():
        out = domain.forward(teacher, scenes)
    alone = metrics.per_pair(out["pts1"], out["pts2"], scenes["points"][:, 0], scenes["points"][:, 1])
    for name, value in alone.items():
        assert torch.allclose(value[0], found[name][13], rtol=1e-3), name
    assert domain.evaluate(teacher, "val").keys() == {"absrel", "rmse", "delta1", "delta103"}
    assert "chamfer" in tiny.domain(primary="chamfer").evaluate(teacher, "val")


def test_deployed_model_is_the_model(domain):
    teacher = domain.teacher()
    deployed, inputs, names_in, names_out = domain.deployed(teacher)
    assert len(inputs) == 20 and names_in == ["img1", "img2"] and names_out == ["pts1", "conf1", "pts2", "conf2"]
    assert all(image.shape == (1, 3, 32, 32) and image.abs().max() <= 1 for image in inputs[0])
    with torch.no_grad():
        out = dict(zip(names_out, deployed(*inputs[4]), strict=True))
        image = domain.source.images()[4:5]
        expected = domain.forward(teacher, {"image": image})
    assert all(torch.equal(out[name], expected[name]) for name in names_out)
    assert json.loads(json.dumps(domain.sampled())) == domain.sampled()
