import json

import numpy as np
import pytest
import torch

from engines.errors import InputError
from engines.export import export_onnx
from engines.halves import split
from engines.policy import QuantPolicy
from engines.runtimes import OnnxRuntime
from trainables import deploy
from trainables.checkpoint import read_model
from trainables.dust3r.__main__ import main
from trainables.dust3r.align import align
from trainables.dust3r.domain import SHIPPED, SMALL_TEACHER
from trainables.dust3r.model import from_reference_config
from trainables.dust3r.rooms import render
from trainables.dust3r.scene import cloud, picture, predict, predict_deployed, write_ply

EDGES = [(i, j) for i in range(4) for j in range(4) if i != j]


def teacher():
    config, weights = read_model(SHIPPED)
    model = from_reference_config(**config)
    model.load_state_dict(weights)
    return model.eval()


@pytest.fixture(scope="module")
def views():
    return render(5, "test", torch.tensor([3]), 4, (64, 64)).image[0].float() / 127.5 - 1


def test_encoding_once_is_encoding_per_pair(views):
    torch.manual_seed(0)
    encoded = []
    for config in (SMALL_TEACHER, {**SMALL_TEACHER, "pos_embed": "RoPE100"}):
        model = from_reference_config(**config).eval()
        encoded.clear()
        model.enc_norm.register_forward_hook(lambda _, inputs, __: encoded.append(len(inputs[0])))
        found = predict(model, views, EDGES)
        assert sum(encoded) == 4
        with torch.no_grad():
            expected = [model.pointmaps(views[[i]], views[[j]]) for i, j in EDGES]
        for own, others in zip(
            (found.pts1, found.conf1, found.pts2, found.conf2), zip(*expected, strict=True), strict=True
        ):
            torch.testing.assert_close(own, torch.cat(others), rtol=1e-5, atol=1e-5)


def test_a_scene_is_written_and_drawn(views, tmp_path):
    found = align(predict(teacher(), views, EDGES), steps=20)
    points, colours = cloud(found, views)
    assert len(points) == len(colours) >= 4 * 64 * 64 // 2 and np.isfinite(points).all()
    write_ply(tmp_path / "scene.ply", points, colours)
    header, body = (tmp_path / "scene.ply").read_bytes().split(b"end_header\n", 1)
    assert f"element vertex {len(points)}".encode() in header and len(body) == 15 * len(points)
    first = np.frombuffer(body[:12], "<f4")
    assert np.allclose(first, points[0]) and list(body[12:15]) == list(colours[0])
    drawn = picture(found, points, colours, unit="metres")
    assert [axes.get_xlabel() for axes in drawn.axes] == ["x [m]", "z [m]"]
    drawn.savefig(tmp_path / "scene.png")
    assert (tmp_path / "scene.png").stat().st_size > 10_000


def test_pairs_of_images_that_are_not_there_are_named(views):
    model = from_reference_config(**SMALL_TEACHER).eval()
    for edges in ([(0, 4)], []):
        with pytest.raises(InputError, match="expected one or more of 4 images"):
            predict(model, views, edges)


def test_halves_of_a_deployed_file_are_the_file(tiny, tmp_path):
    """FP32 and INT8; an odd number of images, each encoded once."""
    domain = tiny.domain()
    model, views = domain.teacher(), domain.source.scene()
    images, edges = views.image.float() / 127.5 - 1, views.edges
    assert len(images) == 3
    files = [tmp_path / name for name in ("fp32.onnx", "int8.onnx")]
    deploy.export_fp32(domain, model, files[0])
    deploy.export_int8(domain, model, QuantPolicy(calibration=4), files[1])
    for file in files:
        whole, halves = OnnxRuntime(file, "cpu", 1), [OnnxRuntime(half, "cpu", 1) for half in split(file, tmp_path)]
        runs = []
        first = halves[0].run
        halves[0].run = lambda inputs, first=first, runs=runs: runs.append(inputs) or first(inputs)
        found = predict_deployed(*halves, images, edges)
        assert len(runs) == 2
        for k, (i, j) in enumerate(edges):
            said = whole.run((images[i : i + 1].numpy(), images[j : j + 1].numpy()))
            own = (found.pts1[k], found.conf1[k], found.pts2[k], found.conf2[k])
            assert all(np.allclose(a.numpy(), b[0], atol=1e-4) for a, b in zip(own, said, strict=True))
    torch.testing.assert_close(predict(model, images, edges).pts2, found.pts2, atol=0.2, rtol=0.2)  # INT8's rounding


def test_a_file_that_no_tensor_divides_is_refused(tmp_path):
    path = tmp_path / "apart.onnx"
    export_onnx(Apart(), (torch.ones(2), torch.ones(2)), path, ["a", "b"], ["c", "d"])
    with pytest.raises(InputError, match="cannot be cut in two"):
        split(path, tmp_path)


class Apart(torch.nn.Module):
    """Two inputs that never meet."""

    def forward(self, a, b):
        return a + 1, b.exp()


def test_pace_takes_the_whole_scene_and_says_what_cannot_be_aligned(tiny, tmp_path):
    domain = tiny.domain()
    model, file = domain.teacher(), tmp_path / "fp32.onnx"
    deploy.export_fp32(domain, model, file)
    for deployed in (file, None):
        found = domain.pace(model, 1.0, "cpu", None, deployed)
        assert 0 < found["t_scene_pairs_s"] < found["t_scene_s"]
        assert (found["scene_images"], found["scene_pairs"]) == (3, 6)
    with torch.no_grad():
        model.downstream_head1.proj.bias.fill_(float("nan"))
    assert "cannot be aligned" in domain.pace(model, 1.0, "cpu", None, None)["scene_error"]


def test_the_command_leaves_cloud_picture_and_cameras(tmp_path, capsys):
    few = ["--set", "scene_views=3", "--set", "scene_steps=20", "--set", "pair_graph=complete"]
    assert main(["scene", "--out", str(tmp_path / "new" / "free"), *few]) == 0
    said = capsys.readouterr().out
    assert "3 images" in said and "6 directed pairs, poses found" in said and "camera centres" in said
    assert main(["scene", "--out", str(tmp_path / "known"), "--known-poses", *few]) == 0
    assert "poses given" in capsys.readouterr().out
    for folder, unit in ((tmp_path / "new" / "free", "free"), (tmp_path / "known", "metres")):
        assert sorted(path.name for path in folder.iterdir()) == ["cloud.ply", "cloud.png", "poses.json"]
        found = json.loads((folder / "poses.json").read_text())
        assert found["unit"] == unit and len(found["pairs"]) == 6 and found["t_scene_s"] > 0
        assert [np.shape(camera["pose"]) for camera in found["cameras"]] == [(4, 4)] * 3
    true = render(42, "test", torch.tensor([2048]), 8, (64, 64)).pose[0]
    poses = torch.tensor([camera["pose"] for camera in found["cameras"]])
    numbers = [int(camera["image"].split()[-1]) for camera in found["cameras"]]
    torch.testing.assert_close(poses, torch.linalg.inv(true[numbers[:1]]) @ true[numbers], atol=1e-4, rtol=0)


def test_a_scene_that_cannot_be_written_leaves_no_part_of_a_file(tmp_path, capsys):
    (tmp_path / "cloud.png").mkdir()
    few = ["--set", "scene_views=2", "--set", "scene_steps=1", "--set", "pair_graph=complete"]
    assert main(["scene", "--out", str(tmp_path), *few]) == 2
    error = capsys.readouterr().err
    assert error == f"error: --out {tmp_path}: Is a directory; free some space or give another folder\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cloud.ply", "cloud.png"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--poses"], "unrecognized arguments: --poses (--help lists the flags)"),
        (["--data", "nosuch"], "nosuch: no such folder"),
        (["--model", "nosuch.pth"], "nosuch.pth does not exist"),
        (["--set", "image_size=48x32"], "image_size=48x32: teacher"),
        (["--set", "scene_views=1"], "scene_views=1: Input should be greater"),
        (["--set", "image_size=[64"], "--set image_size, line 1: not YAML"),
        (["--set", "image_size=big"], "image_size='big': expected WIDTHxHEIGHT"),
        (["--set", "pair_graph=star"], "pair_graph='star': expected nearest, complete, swin[-K]"),
        (["--out", "/dev/null/x"], "--out /dev/null/x: Not a directory"),
    ],
)
def test_the_command_names_what_is_wrong(tmp_path, capsys, arguments, said):
    assert main(["scene", "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
