import numpy as np
import pytest
import torch
from scipy.optimize import least_squares
from scipy.spatial.transform import Rotation

from trainables.dust3r import geometry, metrics
from trainables.dust3r.metrics import CLOUD_POINTS, LOWER_IS_BETTER, NAMES, POSES, cloud_distances, per_pair


def scenes(batch=3, height=12, width=10, seed=0):
    """True points before the camera and predictions at another scale with errors of some per cent."""
    g = torch.Generator().manual_seed(seed)
    true = torch.rand(2, batch, height, width, 3, generator=g) * torch.tensor([4.0, 3.0, 5.0])
    true += torch.tensor([-2.0, -1.5, 1.0])
    scale = torch.tensor([0.3, 1.0, 7.0])[:batch].reshape(1, batch, 1, 1, 1)
    found = scale * true * (1 + 0.15 * torch.randn(true.shape, generator=g))
    return found[0], found[1], true[0], true[1]


def slow(points1, points2, true1, true2):
    """The definitions, pair by pair and point by point, in double precision; NaN among the true points = unknown."""
    results = []
    for p1, p2, t1, t2 in zip(
        *(np.asarray(x, dtype=np.float64) for x in (points1, points2, true1, true2)), strict=True
    ):
        d, t = p1[..., 2].ravel(), t1[..., 2].ravel()
        d, t = d[~np.isnan(t)], t[~np.isnan(t)]
        low = (len(d) - 1) // 2  # of an even number, the lower middle
        scale = np.sort(t)[low] / np.sort(d)[low]
        d = d * scale
        ratio = np.maximum(d / t, t / d)
        cloud = scale * np.concatenate([p1.reshape(-1, 3), p2.reshape(-1, 3)])
        true = np.concatenate([t1.reshape(-1, 3), t2.reshape(-1, 3)])
        cloud, true = cloud[~np.isnan(true[:, 0])], true[~np.isnan(true[:, 0])]
        step = len(cloud) // CLOUD_POINTS | 1
        cloud, true = cloud[::step], true[::step]
        there = np.mean([min(np.linalg.norm(true - point, axis=1)) for point in cloud])
        back = np.mean([min(np.linalg.norm(cloud - point, axis=1)) for point in true])
        results.append(
            {
                "absrel": np.mean(np.abs(d - t) / t),
                "rmse": np.sqrt(np.mean((d - t) ** 2)),
                "delta1": np.mean(ratio < 1.25),
                "delta103": np.mean(ratio < 1.03),
                "accuracy": there,
                "completeness": back,
                "chamfer": (there + back) / 2,
            }
        )
    return {name: np.array([result[name] for result in results]) for name in results[0]}


@pytest.mark.parametrize("size", [(12, 10), (11, 9), (40, 30)])
def test_against_slow_definitions(size):
    data = scenes(3, *size)
    found, expected = per_pair(*data), slow(*data)
    assert set(found) == set(expected) == set(NAMES) > set(LOWER_IS_BETTER)
    for name in NAMES:
        assert found[name].shape == (3,) and found[name].dtype == torch.float32
        assert np.allclose(found[name].numpy(), expected[name], rtol=2e-5, atol=1e-7), name
    assert not {"chamfer", "accuracy", "completeness"} & set(per_pair(*data, clouds=False))


@pytest.mark.parametrize("share", [0.1, 0.9, 0.995])
def test_unknown_pixels_count_nowhere(share):
    data = scenes(3, 30, 24)
    g = torch.Generator().manual_seed(3)
    for true in data[2:]:
        true[torch.rand(true.shape[:3], generator=g) < share] = torch.nan
    found, expected = per_pair(*data), slow(*data)
    for name in NAMES:
        assert np.allclose(found[name].numpy(), expected[name], rtol=2e-5, atol=1e-7), name
    # Whatever stands at unknown pixels, as long as it is a number: nothing changes.
    other = [x.clone() for x in data]
    for points, true in zip(other[:2], other[2:], strict=True):
        points[true.isnan()] *= -37
    for name, value in per_pair(*other).items():
        assert torch.equal(value, found[name]), name
    nobody = [*data[:3], torch.full_like(data[3], torch.nan)]
    assert all(value.isfinite().all() for value in per_pair(*nobody).values()), "view 2 may be unknown as a whole"


@pytest.mark.parametrize("factor", [1e-3, 0.5, 4.0, 1e4])
def test_scale_does_not_matter(factor):
    points1, points2, true1, true2 = scenes()
    found, scaled = per_pair(points1, points2, true1, true2), per_pair(points1 * factor, points2 * factor, true1, true2)
    for name in NAMES:
        assert torch.allclose(found[name], scaled[name], rtol=1e-4), name


def test_perfect_predictions():
    _, _, true1, true2 = scenes()
    found = per_pair(true1 * 3, true2 * 3, true1, true2)
    assert found["absrel"].max() < 1e-6 and found["rmse"].max() < 1e-5
    assert torch.equal(found["delta1"], torch.ones(3)) and found["chamfer"].max() < 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("view", [0, 1])
def test_one_number_that_is_none_spoils_its_pair_only(view, value):
    data = [x.clone() for x in scenes()]
    clean = per_pair(*data)
    data[view][1, 3, 4, 0] = value
    found = per_pair(*data)
    for name in NAMES:
        assert found[name].isnan().tolist() == [False, True, False], name
        assert torch.equal(found[name][[0, 2]], clean[name][[0, 2]])


def test_points_behind_the_camera_are_bad_but_finite():
    points1, points2, true1, true2 = scenes()
    points1[0] *= -1
    found = per_pair(points1, points2, true1, true2)
    assert all(value.isfinite().all() for value in found.values())
    assert found["delta1"][0] == 0 and found["absrel"][0] > 1


def test_chamfer_of_equal_and_of_shifted_clouds():
    """Points far from the origin, where squares cancel: equal clouds are at distance 0, not at a millimetre."""
    g = torch.Generator().manual_seed(1)
    grid = torch.stack(torch.meshgrid(*[torch.arange(8.0)] * 3, indexing="ij"), -1).reshape(-1, 3) + 5
    assert cloud_distances(grid, grid).tolist() == [0, 0]
    cloud = torch.rand(900, 3, generator=g) * 8
    assert cloud_distances(cloud, cloud[torch.randperm(900, generator=g)]).tolist() == [0, 0]
    shift = torch.tensor([0.03, -0.04, 0.0])  # far less than the grid's step of 1: the nearest is the own image
    assert cloud_distances(grid, grid + shift).tolist() == pytest.approx([0.05, 0.05], rel=1e-4)


def test_accuracy_and_completeness_are_the_two_directions():
    one = torch.tensor([[0.0, 0, 0], [0, 0, 0]])
    two = torch.tensor([[0.0, 0, 0], [0, 0, 3]])
    assert cloud_distances(one, two).tolist() == [0, 1.5] and cloud_distances(two, one).tolist() == [1.5, 0]


def test_chamfer_takes_evenly_strided_points():
    cloud = torch.rand(4 * CLOUD_POINTS, 3, generator=torch.Generator().manual_seed(0))
    moved = cloud.clone()
    moved[torch.arange(4 * CLOUD_POINTS) % 5 != 0] += 100  # 4 is even: the next odd step
    assert cloud_distances(moved, cloud).tolist() == [0, 0]


# ------------------------------------------------------------------ relative poses
def posed(batch=6, height=24, width=32, noise=0.0, seed=0):
    """Points that view 2 sees, in camera 1's frame, each pair at a scale of its own; intrinsics and true poses."""
    rng = np.random.default_rng(seed)
    poses, points, cameras = [], [], []
    v, u = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
    for _ in range(batch):
        focal = rng.uniform(0.7, 1.5) * width
        k = np.array([[focal, 0, width / 2 + rng.uniform(-2, 2)], [0, focal, height / 2], [0, 0, 1]])
        local = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(k).T * rng.uniform(1, 4, (height, width, 1))
        pose = np.eye(4)
        pose[:3, :3] = Rotation.from_rotvec(rng.normal(size=3) * 0.4).as_matrix()
        pose[:3, 3] = rng.normal(size=3) * 0.5
        there = local * (1 + noise * rng.normal(size=local.shape)) @ pose[:3, :3].T + pose[:3, 3]
        poses.append(pose), points.append(there * rng.uniform(0.2, 5)), cameras.append(k)
    return [torch.from_numpy(np.stack(part)).float() for part in (points, cameras, poses)]


def test_exact_points_give_the_exact_pose():
    points, cameras, poses = posed()
    found = metrics.pose_errors(points, torch.full(points.shape[:3], 2.0), cameras, poses)
    assert set(found) == set(POSES) and all(value.shape == (6,) for value in found.values())
    assert found["rotation_deg"].max() < 0.05 and found["translation_deg"].max() < 0.2
    assert found["rra15"].tolist() == found["rta15"].tolist() == found["maa30"].tolist() == [1] * 6


def test_errors_are_the_angles_to_the_true_pose():
    points, cameras, poses = posed()
    conf = torch.full(points.shape[:3], 2.0)
    turn = torch.from_numpy(Rotation.from_rotvec([0, np.radians(10.5), 0]).as_matrix()).float()
    other = poses.clone()
    other[:, :3, :3] = poses[:, :3, :3] @ turn
    found = metrics.pose_errors(points, conf, cameras, other)
    assert found["rotation_deg"].numpy() == pytest.approx(10.5, abs=0.05)
    assert found["maa30"].numpy() == pytest.approx(20 / 30) and (found["rra15"] == 1).all()
    other = poses.clone()
    across = torch.linalg.cross(poses[:, :3, 3], torch.tensor([[0.0, 0, 1]]).expand(6, 3))
    other[:, :3, 3] += across / across.norm(dim=1, keepdim=True) * poses[:, :3, 3].norm(dim=1, keepdim=True)
    found = metrics.pose_errors(points, conf, cameras, other)
    assert found["translation_deg"].numpy() == pytest.approx(45, abs=0.2), "the scale of the baseline does not matter"
    assert found["rta15"].sum() == found["maa30"].sum() == 0


def test_the_pose_is_that_of_a_slow_least_squares_fit():
    """Against an independent method: scipy minimises the sum of angles over rotation vector and position."""
    points, cameras, poses = posed(batch=3, noise=0.05)
    conf = torch.full(points.shape[:3], 2.0)
    rotation, centre = geometry.resected(points, conf, cameras)
    for b in range(3):
        world = points[b].double().numpy().reshape(-1, 3)[:: 24 * 32 // geometry.POSE_POINTS | 1]
        v, u = np.meshgrid(np.arange(24) + 0.5, np.arange(32) + 0.5, indexing="ij")
        ray = np.stack([u, v, np.ones_like(u)], -1).reshape(-1, 3)[:: 24 * 32 // geometry.POSE_POINTS | 1]
        ray = ray @ np.linalg.inv(cameras[b].double().numpy()).T
        ray /= np.linalg.norm(ray, axis=1, keepdims=True)

        def sines(x, world=world, ray=ray):
            local = (world - x[3:]) @ Rotation.from_rotvec(x[:3]).as_matrix().T
            return np.linalg.norm(np.cross(local, ray), axis=1) / np.linalg.norm(local, axis=1)

        true = poses[b].double().numpy()
        ours = np.concatenate([Rotation.from_matrix(rotation[b].numpy()).as_rotvec(), centre[b].numpy()])
        # From two starts, the true rotation and ours: neither may be far below what the fast one reached.
        starts = [np.concatenate([Rotation.from_matrix(true[:3, :3].T).as_rotvec(), ours[3:]]), ours]
        best = min(np.abs(sines(least_squares(sines, x, loss="soft_l1", f_scale=1e-3).x)).sum() for x in starts)
        assert np.abs(sines(ours)).sum() < 1.02 * best


def test_few_outliers_do_not_move_the_pose():
    points, cameras, poses = posed()
    wild = points.clone()
    g = torch.Generator().manual_seed(1)
    scale = points.norm(dim=-1).mean((1, 2))[:, None, None, None].expand_as(points)
    off = torch.rand(points.shape[:3], generator=g) < 0.15
    wild[off] += 2 * scale[off]
    found = metrics.pose_errors(wild, torch.full(points.shape[:3], 2.0), cameras, poses)
    assert found["rotation_deg"].max() < 0.2 and found["translation_deg"].max() < 2


def test_a_pose_from_numbers_that_are_none_is_none():
    points, cameras, poses = posed()
    points[2, 0, 0, 1] = torch.nan
    points[3, :3] = torch.inf
    points[4] *= 1e38  # finite, but its squares are not
    found = metrics.pose_errors(points, torch.full(points.shape[:3], 2.0), cameras, poses)
    for value in found.values():
        assert value.isnan().tolist()[:4] == [False, False, True, True] and value.isfinite()[5]


def test_intervals_hold_the_true_mean_as_often_as_they_say():
    """500 samples of 40 skewed values: 95 % intervals miss the mean 25 times; 45 or more, once in 10,000 runs."""
    g, missed = torch.Generator().manual_seed(5), 0
    for k in range(500):
        values = {"a": torch.rand(40, generator=g).square(), "b": torch.ones(40)}
        found = metrics.intervals(values, seed=k)
        assert found["b_lo"] == pytest.approx(1) and found["b_hi"] == pytest.approx(1)
        missed += not found["a_lo"] <= 1 / 3 <= found["a_hi"]
    assert 8 < missed < 45
    assert metrics.intervals(values, 1) == metrics.intervals(values, 1) != metrics.intervals(values, 2)
    assert np.isnan(metrics.intervals({"a": torch.tensor([1.0, torch.nan, 2.0])}, 1)["a_lo"])
