import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from trainables.dust3r import rooms
from trainables.dust3r.pairs import covisibility

SIZE = (32, 40)
FIELDS = ("image", "depth", "points", "intrinsics", "pose", "overlap")


@pytest.fixture(scope="module")
def views():
    """64 scenes of two views."""
    return rooms.render(5, "train", torch.arange(64), 2, SIZE)


def equal(a, b, rows=slice(None)):
    return {field for field in FIELDS if not torch.equal(getattr(a, field), getattr(b, field)[rows])}


# ------------------------------------------------------------------ the same sample everywhere
def test_a_scene_does_not_depend_on_its_batch(views):
    order = torch.tensor([63, 3, 17, 3, 40, 0, 22])
    assert equal(rooms.render(5, "train", order, 2, SIZE), views, order) == set()
    for size in (1, 2, 13):
        for part in torch.split(torch.arange(26), size):
            assert equal(rooms.render(5, "train", part, 2, SIZE), views, part) == set(), f"batch of {size}"


def test_a_pair_is_the_same_inside_a_longer_series(views):
    many = rooms.render(5, "train", torch.arange(8), 5, SIZE)
    for field in ("image", "depth", "points", "pose", "overlap"):
        assert torch.equal(getattr(many, field)[:, :2], getattr(views, field)[:8]), field


def test_a_scene_does_not_depend_on_process_or_threads(views, tmp_path):
    code = (
        "import sys, torch; from trainables.dust3r import rooms; torch.set_num_threads(2); torch.rand(3)\n"
        f"v = rooms.render(5, 'train', torch.arange(50, 64), 2, {SIZE})\n"
        f"torch.save({{f: getattr(v, f) for f in {FIELDS}}}, sys.argv[1])"
    )
    root = Path(__file__).parents[3]
    subprocess.run(
        [sys.executable, "-c", code, tmp_path / "views.pt"],
        **{"check": True, "cwd": root, "timeout": 120},
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])},
    )
    other = torch.load(tmp_path / "views.pt", weights_only=True)
    assert {field for field in FIELDS if not torch.equal(other[field], getattr(views, field)[50:])} == set()


def test_uniforms_are_uniform_and_independent():
    table = rooms.uniforms(3, "val", torch.arange(2000), 1, 50).double()
    assert table.min() >= 0 and table.max() < 1
    # 100,000 numbers: the mean's standard deviation is 0.00091, that of each bin's count 95; 5 of those, p < 1e-5.
    assert abs(table.mean() - 0.5) < 0.0046
    assert (torch.histc(table, 10, 0, 1) - 10_000).abs().max() < 475
    for a, b in ((table[:, :-1], table[:, 1:]), (table[:-1], table[1:])):
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(correlation) < 5 / math.sqrt(a.numel())
    longer = rooms.uniforms(3, "val", torch.arange(5), 1, 90)
    assert torch.equal(longer[:, :50], table[:5].float())


def test_splits_and_seeds_share_no_scene():
    """The same seed and indices in all splits, as a user's seed may be that of the workload: not one room in common."""
    scenes, seen = torch.arange(4000), set()
    for seed, split in ((42, "train"), (42, "val"), (42, "test"), (43, "train"), (43, "val")):
        table = rooms.uniforms(seed, split, scenes, 0, 9).numpy()
        found = {row.tobytes() for row in table}
        assert len(found) == 4000 and not seen & found
        seen |= found
    images = [rooms.render(42, split, torch.arange(8), 1, (16, 16)).image for split in rooms.SPLITS]
    for i in range(3):
        for j in range(i):
            apart = (images[i][:, None].int() - images[j][None].int()).abs().float().mean((2, 3, 4, 5))
            assert apart.min() > 2


# ------------------------------------------------------------------ exact geometry
def test_shapes_and_finiteness(views):
    assert views.image.shape == (64, 2, 3, *SIZE) and views.image.dtype == torch.uint8
    assert views.points.shape == (64, 2, *SIZE, 3) and views.depth.shape == (64, 2, *SIZE)
    assert all(getattr(views, field).isfinite().all() for field in FIELDS)
    assert views.depth.min() > 0.05 and views.depth.max() < 12.5, "within the room's diagonal"


def test_depth_is_the_first_cameras_z(views):
    assert torch.allclose(views.points[:, 0, ..., 2], views.depth[:, 0], atol=1e-5, rtol=1e-5)
    assert torch.equal(views.overlap[:, 0], torch.ones(64))


def test_poses_are_rigid_and_inside_of_the_room(views):
    turn = views.pose[..., :3, :3].double()
    assert torch.allclose(turn @ turn.transpose(-1, -2), torch.eye(3).double().expand_as(turn), atol=1e-5)
    assert torch.allclose(torch.linalg.det(turn), torch.ones(64, 2).double(), atol=1e-5)
    assert torch.equal(views.pose[..., 3, :], torch.tensor([0.0, 0, 0, 1]).expand(64, 2, 4))
    apart = (views.pose[:, 0, :3, 3] - views.pose[:, 1, :3, 3]).norm(dim=-1)
    assert (apart < 2.001).all() and apart.median() > 0.3


def test_points_project_onto_their_pixels_centres(views):
    """Both views' points, given in camera 0, moved into their own camera and through its intrinsics."""
    pose, points = views.pose.double(), views.points.double()
    relative = torch.linalg.inv(pose[:, :1]) @ pose
    local = torch.einsum("bvhwi,bvij->bvhwj", points - relative[:, :, None, None, :3, 3], relative[..., :3, :3])
    assert torch.allclose(local[..., 2], views.depth.double(), atol=1e-5, rtol=1e-5)
    pixel = torch.einsum("bij,bvhwj->bvhwi", views.intrinsics.double(), local / local[..., 2:])
    v, u = torch.meshgrid(torch.arange(SIZE[0]) + 0.5, torch.arange(SIZE[1]) + 0.5, indexing="ij")
    assert (pixel[..., 0] - u).abs().max() < 1e-3 and (pixel[..., 1] - v).abs().max() < 1e-3
    field = 2 * torch.atan(0.5 * max(SIZE) / views.intrinsics[:, 0, 0]).rad2deg()
    assert field.min() >= 54.9 and field.max() <= 65.1


class Oracle:
    """The first hit of one ray, in double precision, surface by surface."""

    def __init__(self, seed, split, index, poses):
        scenes = torch.tensor([index])
        tables = [rooms.uniforms(seed, split, scenes, *args) for args in ((0, rooms._SCENE_NUMBERS), (2, 10))]
        scene = rooms._clear(rooms._scene(*tables)[0], poses[None, :2, :3, 3])
        self.half, self.spheres = scene.half[0].double().numpy(), scene.sphere[0].double().numpy()
        self.boxes, self.yaw = scene.box[0].double().numpy(), scene.yaw[0].double().numpy()

    def depth(self, origin, ray):
        hits = [side * half - o for side in (-1, 1) for half, o in zip(self.half, origin, strict=True)]
        hits = [gap / r for gap, r in zip(hits, [*ray, *ray], strict=True) if r != 0]
        hits = [min(t for t in hits if t > 0)]
        for x, y, z, radius in self.spheres:
            gap = origin - np.array([x, y, z])
            a, b, c = ray @ ray, 2 * ray @ gap, gap @ gap - radius**2
            if b * b > 4 * a * c:
                hits += [(-b - math.sqrt(b * b - 4 * a * c)) / (2 * a)]
        for (x, y, z, *reach), (cos, sin) in zip(self.boxes, self.yaw, strict=True):
            turn = np.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]])
            start, way = turn @ (origin - np.array([x, y, z])), turn @ ray
            for axis in range(3):
                for side in (-1, 1):
                    t = (side * reach[axis] - start[axis]) / way[axis]
                    at = start + t * way
                    if all(abs(at[k]) <= reach[k] for k in range(3) if k != axis):
                        hits += [t]
        return min(t for t in hits if t > 1e-3)


def test_depth_against_an_independent_ray_caster(views):
    rng, wrong, hidden, count = np.random.default_rng(1), 0, 0, 0
    for index in range(24):
        oracle = Oracle(5, "train", index, views.pose[index])
        focal = float(views.intrinsics[index, 0, 0])
        for v in range(2):
            pose = views.pose[index, v].double().numpy()
            for row, column in zip(rng.integers(0, SIZE[0], 25), rng.integers(0, SIZE[1], 25), strict=True):
                ray = np.array([(column + 0.5 - SIZE[1] / 2) / focal, (row + 0.5 - SIZE[0] / 2) / focal, 1.0])
                expected = oracle.depth(pose[:3, 3], pose[:3, :3] @ ray)
                walls = Oracle.__new__(Oracle)
                walls.half, walls.spheres, walls.boxes, walls.yaw = oracle.half, [], [], []
                hidden += expected < 0.999 * walls.depth(pose[:3, 3], pose[:3, :3] @ ray)
                wrong += abs(float(views.depth[index, v, row, column]) - expected) > 1e-4 * expected
                count += 1
    # A ray that grazes an edge may fall on either side of it in single precision.
    assert wrong <= 0.003 * count, f"{wrong} of {count} rays"
    assert 0.2 < hidden / count < 0.9, "what stands in the room is seen, and so is the room"


def test_both_views_tell_of_one_surface(views):
    """From camera 0, every point of view 2 lies on the first surface in its direction (seen) or behind it (hidden)."""
    rng, beyond, seen, count = np.random.default_rng(2), 0, [], 0
    for index in range(16):
        oracle = Oracle(5, "train", index, views.pose[index])
        pose = views.pose[index, 0].double().numpy()
        points = views.points[index, 1].double().numpy().reshape(-1, 3)
        found = []
        for point in points[rng.choice(len(points), 40, replace=False)]:
            reach = oracle.depth(pose[:3, 3], pose[:3, :3] @ point)
            beyond += reach > 1 + 1e-3  # nothing there: the point would hang in the air
            found.append(abs(reach - 1) < 1e-3)
            count += 1
        seen.append(np.mean(found))
    assert beyond <= 0.003 * count, f"{beyond} of {count} points"
    assert 0.3 < np.mean(seen) < 0.98, "most are seen, some are hidden"


def test_pairs_overlap_really(views):
    low, high = rooms.OVERLAP
    overlap = views.overlap[:, 1]
    assert ((overlap >= low - 0.02) & (overlap <= high + 0.02)).float().mean() > 0.85
    assert overlap.std() > 0.05
    # Against a count of all pixels through the depth map of the other view.
    relative = torch.linalg.inv(views.pose[:, :1]) @ views.pose
    shares = []
    for k in range(64):
        shares.append(covisibility(views.points[k], relative[k], views.depth[k], views.intrinsics[k])[0, 1])
    error = (torch.stack(shares) - overlap).abs()
    assert error.mean() < 0.05 and error.max() < 0.25


def test_images_show_something(views):
    flat = views.image.float().flatten(3).flatten(0, 1)
    assert (flat.std(-1).amax(1) > 8).float().mean() > 0.98
    assert (flat.mean((1, 2)) > 15).float().mean() > 0.95 and (flat.mean((1, 2)) < 240).all()
    depth = views.depth.flatten(2)
    assert ((depth.amax(-1) / depth.amin(-1)) > 1.3).float().mean() > 0.9
    # The same surface has much the same colour in both views: they show one scene.
    apart = (views.image[:, 0].float() - views.image[:, 1].float()).abs().mean()
    other = (views.image[:, 0].float() - views.image[:, 1].float().roll(1, 0)).abs().mean()
    assert apart < 0.9 * other


@pytest.mark.parametrize("size", [(16, 16), (24, 48), (64, 64)])
def test_geometry_is_that_of_the_size(size):
    small = rooms.render(5, "val", torch.arange(4), 2, size)
    assert small.image.shape[-2:] == size and small.intrinsics[0, :2, 2].tolist() == [size[1] / 2, size[0] / 2]
    assert small.points.isfinite().all()
