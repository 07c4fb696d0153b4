import numpy as np
import pytest
import torch

from trainables.dust3r.metrics import CHAMFER_POINTS, LOWER_IS_BETTER, NAMES, chamfer_distance, per_pair


def scenes(batch=3, height=12, width=10, seed=0):
    """True points before the camera and predictions at another scale with errors of some per cent."""
    g = torch.Generator().manual_seed(seed)
    true = torch.rand(2, batch, height, width, 3, generator=g) * torch.tensor([4.0, 3.0, 5.0])
    true += torch.tensor([-2.0, -1.5, 1.0])
    scale = torch.tensor([0.3, 1.0, 7.0])[:batch].reshape(1, batch, 1, 1, 1)
    found = scale * true * (1 + 0.15 * torch.randn(true.shape, generator=g))
    return found[0], found[1], true[0], true[1]


def slow(points1, points2, true1, true2):
    """The definitions, pair by pair and point by point, in double precision."""
    results = []
    for p1, p2, t1, t2 in zip(
        *(np.asarray(x, dtype=np.float64) for x in (points1, points2, true1, true2)), strict=True
    ):
        d, t = p1[..., 2].ravel(), t1[..., 2].ravel()
        low = (len(d) - 1) // 2  # of an even number, the lower middle
        scale = np.sort(t)[low] / np.sort(d)[low]
        d = d * scale
        ratio = np.maximum(d / t, t / d)
        cloud = scale * np.concatenate([p1.reshape(-1, 3), p2.reshape(-1, 3)])
        true = np.concatenate([t1.reshape(-1, 3), t2.reshape(-1, 3)])
        step = len(cloud) // CHAMFER_POINTS | 1
        cloud, true = cloud[::step], true[::step]
        there = np.mean([min(np.linalg.norm(true - point, axis=1)) for point in cloud])
        back = np.mean([min(np.linalg.norm(cloud - point, axis=1)) for point in true])
        results.append(
            {
                "absrel": np.mean(np.abs(d - t) / t),
                "rmse": np.sqrt(np.mean((d - t) ** 2)),
                "delta1": np.mean(ratio < 1.25),
                "chamfer": (there + back) / 2,
            }
        )
    return {name: np.array([result[name] for result in results]) for name in results[0]}


@pytest.mark.parametrize("size", [(12, 10), (11, 9), (40, 30)])
def test_against_slow_definitions(size):
    data = scenes(3, *size)
    found, expected = per_pair(*data), slow(*data)
    assert set(found) == set(expected) == set(NAMES) == set(LOWER_IS_BETTER)
    for name in NAMES:
        assert found[name].shape == (3,) and found[name].dtype == torch.float32
        assert np.allclose(found[name].numpy(), expected[name], rtol=2e-5, atol=1e-7), name
    assert "chamfer" not in per_pair(*data, chamfer=False)


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
    grid = torch.stack(torch.meshgrid(*[torch.arange(8.0)] * 3, indexing="ij"), -1).reshape(1, -1, 3) + 5
    assert chamfer_distance(grid, grid) == 0
    cloud = torch.rand(2, 900, 3, generator=g) * 8
    assert torch.equal(chamfer_distance(cloud, cloud), torch.zeros(2))
    assert torch.equal(chamfer_distance(cloud, cloud[:, torch.randperm(900, generator=g)]), torch.zeros(2))
    shift = torch.tensor([0.03, -0.04, 0.0])  # far less than the grid's step of 1: the nearest is the own image
    assert chamfer_distance(grid, grid + shift) == pytest.approx(0.05, rel=1e-4)


def test_chamfer_counts_both_directions():
    one = torch.tensor([[[0.0, 0, 0], [0, 0, 0]]])
    two = torch.tensor([[[0.0, 0, 0], [0, 0, 3]]])
    assert chamfer_distance(one, two) == chamfer_distance(two, one) == 0.75


def test_chamfer_takes_evenly_strided_points():
    cloud = torch.rand(1, 4 * CHAMFER_POINTS, 3, generator=torch.Generator().manual_seed(0))
    moved = cloud.clone()
    moved[:, torch.arange(4 * CHAMFER_POINTS) % 5 != 0] += 100  # 4 is even: the next odd step
    assert chamfer_distance(moved, cloud) == 0
