import numpy as np
import pytest
import torch

from engines.errors import InputError
from trainables.checkpoint import read_model
from trainables.dust3r.align import align
from trainables.dust3r.domain import SHIPPED, SMALL_TEACHER
from trainables.dust3r.model import from_reference_config
from trainables.dust3r.rooms import render
from trainables.dust3r.scene import cloud, picture, predict, write_ply

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
    picture(found, points, colours).savefig(tmp_path / "scene.png")
    assert (tmp_path / "scene.png").stat().st_size > 10_000 and [p.name for p in tmp_path.glob(".*")] == []


def test_pairs_of_images_that_are_not_there_are_named(views):
    model = from_reference_config(**SMALL_TEACHER).eval()
    for edges in ([(0, 4)], []):
        with pytest.raises(InputError, match="expected one or more of 4 images"):
            predict(model, views, edges)
