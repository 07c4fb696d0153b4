"""Alignment of pair graphs, on rooms whose geometry is exact and on the real sample where it is there."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engines.errors import InputError
from trainables.dust3r import rooms
from trainables.dust3r.align import Predictions, align
from trainables.dust3r.geometry import focal_of, pose_and_focal, pose_of, rays, similarity

SAMPLE = Path(__file__).parents[4] / "shared" / "data" / "sevenscenes"


def between(poses, i, j):
    return torch.linalg.inv(poses[i]) @ poses[j]


def predicted(points, known, poses, edges, noise, seed=0):
    """What a perfect network with relative noise says: both maps in camera i's frame, each pair in its own unit."""
    g = torch.Generator().manual_seed(seed)
    parts = []
    for i, j in edges:
        unit, move = 0.5 + 1.5 * torch.rand((), generator=g), between(poses, i, j)
        maps = (points[i] * unit, (points[j] @ move[:3, :3].T + move[:3, 3]) * unit)
        maps = [m + noise * m.norm(dim=-1, keepdim=True) * torch.randn(m.shape, generator=g) for m in maps]
        conf = [torch.where(known[view], 4.0, 1.0) for view in (i, j)]
        parts.append((maps[0], conf[0], maps[1], conf[1]))
    return Predictions(edges, *(torch.stack(part) for part in zip(*parts, strict=True)))


def trajectory_error(found, poses):
    """Root mean square distance of camera centres after one similarity, in the truth's unit, and its scale."""
    ours, true = found.poses[:, :3, 3], poses[:, :3, 3]
    scale, rotation, shift = similarity(ours, true, torch.ones(len(true)))
    return float((scale * ours @ rotation.T + shift - true).square().sum(1).mean().sqrt()), float(scale)


@pytest.fixture(scope="module")
def room():
    """Four views of a room at 64 x 64: points in their own frames, poses, focal length."""
    views = rooms.render(5, "test", torch.tensor([3]), 4, (64, 64))
    poses = torch.linalg.inv(views.pose[0, :1]) @ views.pose[0]
    k = views.intrinsics[0]
    # The renderer's rays: pixel centres at a half, as in the module under test.
    own = rays((64, 64), k[0, 0]) * views.depth[0][..., None]
    return own, torch.ones(4, 64, 64, dtype=torch.bool), poses, float(k[0, 0])


ALL = [(i, j) for i in range(4) for j in range(4) if i != j]


@pytest.mark.parametrize("edges", [ALL, [(0, 1), (1, 2), (2, 3)], [(i, j) for i, j in ALL if i < j]])
def test_exact_maps_give_the_exact_scene(room, edges):
    points, known, poses, focal = room
    found = align(predicted(points, known, poses, edges, 0.0), steps=100)
    error, scale = trajectory_error(found, poses)
    assert error < 0.003 * float(poses[:, :3, 3].norm(dim=1).max())
    assert (found.focals / focal - 1).abs().max() < 0.01
    assert ((found.depth * scale / points[..., 2]) - 1).abs().median() < 0.01
    rotation = found.poses[0, :3, :3].T @ found.poses[1, :3, :3]
    torch.testing.assert_close(rotation, between(poses, 0, 1)[:3, :3], atol=5e-3, rtol=0)


def test_noise_is_averaged_and_the_loss_falls(room):
    points, known, poses, focal = room
    found = align(predicted(points, known, poses, ALL, 0.02), steps=100)
    assert found.loss[1] < found.loss[0]
    error, scale = trajectory_error(found, poses)
    assert error < 0.01 and (found.focals / focal - 1).abs().max() < 0.02
    assert ((found.depth * scale / points[..., 2]) - 1).abs().median() < 0.015  # 2 % in each of six maps
    again = align(predicted(points, known, poses, ALL, 0.02), steps=100)
    assert torch.equal(found.poses, again.poses) and torch.equal(found.depth, again.depth)


def test_known_cameras_are_kept_and_set_the_unit(room):
    points, known, poses, focal = room
    maps = predicted(points, known, poses, ALL, 0.02)
    found = align(maps, poses=poses, focals=torch.full((4,), focal), steps=100)
    assert torch.allclose(found.poses, poses, atol=1e-5) and torch.allclose(found.focals, torch.full((4,), focal))
    assert ((found.depth / points[..., 2]) - 1).abs().median() < 0.015
    free = align(maps, poses=poses, steps=100)
    assert (free.focals / focal - 1).abs().max() < 0.02


def test_pixels_of_no_confidence_count_nothing(room):
    points, known, poses, focal = room
    spoilt, masked = points.clone(), known.clone()
    spoilt[:, :, :20] = torch.randn(4, 64, 20, 3, generator=torch.Generator().manual_seed(1)) * 50
    masked[:, :, :20] = False
    found = align(predicted(spoilt, masked, poses, ALL, 0.0), steps=50)
    assert trajectory_error(found, poses)[0] < 0.003 and (found.focals / focal - 1).abs().max() < 0.01


def test_a_graph_in_parts_is_named(room):
    points, known, poses, _ = room
    with pytest.raises(InputError, match="no chain of pairs joins images 2, 3 with image 0"):
        align(predicted(points, known, poses, [(0, 1), (2, 3)], 0.0))
    with pytest.raises(InputError, match=r"pair \(1, 1\): an image cannot be paired with itself"):
        align(predicted(points, known, poses, [(0, 1), (1, 1)], 0.0))


def test_similarity_and_cameras_are_recovered(room):
    points, _, poses, focal = room
    g = torch.Generator().manual_seed(0)
    source, weight = torch.randn(2, 50, 3, generator=g), torch.rand(2, 50, generator=g)
    turn = torch.linalg.qr(torch.randn(2, 3, 3, generator=g))[0]
    turn = turn * torch.linalg.det(turn).sign()[:, None, None]
    target = 2.5 * source @ turn.transpose(1, 2) + torch.tensor([1.0, -2.0, 3.0])
    scale, rotation, shift = similarity(source, target, weight)
    torch.testing.assert_close(scale, torch.full((2,), 2.5))
    torch.testing.assert_close(rotation, turn, atol=1e-5, rtol=0)
    torch.testing.assert_close(shift, torch.tensor([[1.0, -2.0, 3.0]] * 2), atol=1e-4, rtol=0)
    ones = torch.ones(64, 64)
    assert float(focal_of(points[1], ones)) == pytest.approx(focal, rel=1e-3)
    move = between(poses, 0, 1)
    seen = points[1] @ move[:3, :3].T + move[:3, 3]
    outliers = ones.clone()
    spoilt = seen.clone()
    spoilt[::5, ::5] += 3.0
    pose, _ = pose_of(spoilt, outliers, torch.tensor(focal))
    torch.testing.assert_close(pose, move, atol=5e-3, rtol=0)
    pose, length = pose_and_focal(seen, ones)
    assert float(length) == pytest.approx(focal, rel=0.02)
    torch.testing.assert_close(pose[:3, :3], move[:3, :3], atol=0.02, rtol=0)


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the real sample is not here")
def test_the_real_sample_with_noise():
    """7-Scenes frames, 224 x 168, ground-truth maps with 2 % noise: centres within 5 mm, focal lengths within 1 %."""
    focal, height, width = 585.0 * 224 / 640, 168, 224
    points, poses = [], []
    for frame in (0, 54, 108, 162):
        stem = SAMPLE / f"frame-{frame:06d}"
        depth = np.asarray(Image.open(f"{stem}.depth.png")).astype(np.float32) / 1000
        rows, columns = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in ((height, 480), (width, 640)))
        depth = torch.from_numpy(np.where(depth < 60, depth, 0)[rows][:, columns])
        pose = torch.from_numpy(np.loadtxt(f"{stem}.pose.txt"))
        u, _, vt = torch.linalg.svd(pose[:3, :3])
        pose[:3, :3] = u @ vt
        points.append(rays((height, width), torch.tensor(focal)) * depth[..., None])
        poses.append(pose.float())
    known, poses = torch.stack([p[..., 2] > 0 for p in points]), torch.stack(poses)
    found = align(predicted(torch.stack(points), known, poses, ALL, 0.02))
    assert trajectory_error(found, poses)[0] < 0.005
    assert (found.focals / focal - 1).abs().max() < 0.01
