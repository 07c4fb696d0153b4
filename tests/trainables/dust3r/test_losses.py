import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from scipy.integrate import quad

from engines.errors import InputError
from trainables.dust3r.losses import (
    INVARIANCES,
    NORM_MODES,
    confidence_loss,
    laplace_kl,
    normalise_pointmaps,
    regression_loss,
)

GOLDEN = Path(__file__).parents[4] / "shared" / "golden" / "golden_losses.safetensors"
needs_golden = pytest.mark.skipif(not GOLDEN.exists(), reason="reference loss values are not beside this checkout")


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN, "pt") as f:
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (not a dict)
        values = json.loads(f.metadata()["values"])
    world = [tensors["in/gt1/pts3d"], tensors["in/gt2/pts3d"]]
    to_first = torch.linalg.inv(tensors["in/gt1/camera_pose"])
    turn, move = to_first[:, :3, :3], to_first[:, None, None, :3, 3]
    return {
        "pred": [tensors["in/p1/pts3d"], tensors["in/p2/pts3d_in_other_view"]],
        "conf": [tensors["in/p1/conf"], tensors["in/p2/conf"]],
        "world": world,
        "true": [torch.einsum("bij,bhwj->bhwi", turn, points) + move for points in world],
        "valid": [tensors["in/gt1/valid_mask"], tensors["in/gt2/valid_mask"]],
        "values": values,
        "factor": tensors["out/avg_dis_factor"],
    }


@needs_golden
@pytest.mark.parametrize("mode", NORM_MODES)
def test_regression_and_confidence_agree_with_reference(golden, mode):
    pred, conf, true, valid = (golden[k] for k in ("pred", "conf", "true", "valid"))
    ours = {
        "Regr3D": regression_loss(pred, true, valid, mode=mode),
        "Regr3D_gtscale": regression_loss(pred, true, valid, mode=mode, gt_scale=True),
        "ConfLoss": confidence_loss(pred[0], conf[0], pred[1], conf[1], *true, *valid, mode),
    }
    for name, value in ours.items():
        assert value.item() == pytest.approx(golden["values"][f"{name}/{mode}"], rel=1e-5), name


@needs_golden
@pytest.mark.parametrize("gt_scale", [False, True])
@pytest.mark.parametrize("name", ["shift", "scale", "scale_shift"])
def test_invariant_variants_agree_with_reference(golden, name, gt_scale):
    pred, true, valid = (golden[k] for k in ("pred", "true", "valid"))
    reference = {"shift": "ShiftInv", "scale": "ScaleInv", "scale_shift": "ScaleShiftInv"}[name]
    loss = regression_loss(pred, true, valid, gt_scale=gt_scale, invariance=name)
    assert loss.item() == pytest.approx(golden["values"][f"Regr3D_{reference}/gt_scale={gt_scale}"], rel=1e-5)


@needs_golden
def test_average_distance_agrees_with_reference(golden):
    # The recorded factor is that of the true points in world coordinates.
    points1, points2, factor = normalise_pointmaps(*golden["world"], *golden["valid"])
    torch.testing.assert_close(factor, golden["factor"], rtol=1e-5, atol=0)
    again = normalise_pointmaps(points1, points2, *golden["valid"])[2]
    torch.testing.assert_close(again, torch.ones_like(again))


def _pair(seed=0, batch=2):
    g = torch.Generator().manual_seed(seed)
    pts = [torch.randn(batch, h, 6, 3, generator=g, dtype=torch.float64) for h in (5, 4)]
    true = [p + 0.3 * torch.randn(p.shape, generator=g, dtype=torch.float64) for p in pts]
    valid = [torch.rand(p.shape[:3], generator=g) > 0.3 for p in pts]
    return pts, true, valid


@pytest.mark.parametrize("mode", NORM_MODES)
@pytest.mark.parametrize("invariance", INVARIANCES)
def test_invalid_pixels_and_empty_views_reach_neither_value_nor_gradient(mode, invariance):
    pts, true, valid = _pair()
    valid[1][:] = False  # no valid pixel in view 2
    valid[0][1] = False  # nor in sample 1 at all
    expected = regression_loss(pts, true, valid, mode=mode, invariance=invariance)
    for tensors in (pts, true):
        for tensor, mask in zip(tensors, valid, strict=True):
            tensor[~mask] = math.nan
    leaves = [p.clone().requires_grad_() for p in pts]
    conf = [torch.full_like(p[..., 0], math.nan).masked_fill(v, 2.0) for p, v in zip(pts, valid, strict=True)]
    loss = regression_loss(leaves, true, valid, mode=mode, invariance=invariance)
    weighted = confidence_loss(leaves[0], conf[0], leaves[1], conf[1], *true, *valid, mode)
    (loss + weighted).backward()
    assert loss.item() == pytest.approx(expected.item()) and math.isfinite(weighted.item())
    for leaf, mask in zip(leaves, valid, strict=True):
        assert leaf.grad.isfinite().all() and (leaf.grad[~mask] == 0).all()
    assert leaves[0].grad.abs().sum() > 0


def test_invariances_forgive_what_they_name_and_nothing_else():
    _, true, valid = _pair()
    scaled = [3 * t for t in true]
    shifted = [t + torch.tensor([0.0, 0.0, 0.7], dtype=t.dtype) for t in true]
    assert regression_loss(scaled, true, valid).item() == pytest.approx(0, abs=1e-12)
    assert regression_loss(scaled, true, valid, gt_scale=True, invariance="scale").item() == pytest.approx(0, abs=1e-9)
    assert regression_loss(scaled, true, valid, gt_scale=True).item() > 0.1
    assert regression_loss(shifted, true, valid, invariance="scale").item() > 0.1
    moved = regression_loss(shifted, true, valid, gt_scale=True, invariance="scale_shift")
    assert moved.item() == pytest.approx(0, abs=1e-9)


def test_unknown_modes_are_named():
    pts, true, valid = _pair()
    with pytest.raises(InputError, match="avg_dist"):
        regression_loss(pts, true, valid, mode="avg_dist")
    with pytest.raises(InputError, match="rotation"):
        regression_loss(pts, true, valid, invariance="rotation")


def _one_pixel(m_t, c_t, m_s, c_s, temperature):
    point = torch.zeros(1, 1, 1, 3, dtype=torch.float64)
    conf = torch.ones(1, 1, 1, dtype=torch.float64)
    means = [point + torch.tensor(m, dtype=torch.float64) for m in (m_t, m_s)]
    return laplace_kl(means[0], conf * c_t, means[1], conf * c_s, temperature)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(("c_t", "c_s"), [(1.0, 1.0), (4.0, 1.5), (1.2, 6.0)])
def test_laplace_kl_equals_numerical_integration(c_t, c_s, temperature):
    m_t, m_s = (0.1, -0.4, 2.0), (0.1, 0.2, 0.5)
    b_t, b_s = temperature / c_t, temperature / c_s
    total = 0.0
    for mt, ms in zip(m_t, m_s, strict=True):

        def integrand(x, mt=mt, ms=ms):
            log_t = -abs(x - mt) / b_t - math.log(2 * b_t)
            return math.exp(log_t) * (log_t + abs(x - ms) / b_s + math.log(2 * b_s))

        corners = sorted((mt, ms))
        limits = [corners[0] - 60 * b_t, *corners, corners[1] + 60 * b_t]
        total += sum(quad(integrand, a, b, limit=200)[0] for a, b in zip(limits, limits[1:], strict=False))
    assert _one_pixel(m_t, c_t, m_s, c_s, temperature).item() == pytest.approx(temperature * total, rel=1e-7)


def _gradients(distance, c_t, c_s, temperature):
    mean_s = torch.full((1, 1, 1, 3), -distance, dtype=torch.float64, requires_grad=True)
    log_conf = torch.full((1, 1, 1), math.log(c_s), dtype=torch.float64, requires_grad=True)
    conf_t = torch.full_like(log_conf, c_t)
    laplace_kl(torch.zeros_like(mean_s), conf_t, mean_s, log_conf.exp(), temperature).backward()
    return mean_s.grad.flatten()[0].item(), log_conf.grad.item()


def test_gradient_on_the_mean_is_free_of_temperature_far_away_and_falls_with_it_near():
    c_t, c_s = 2.0, 3.0
    for temperature in (1.0, 2.0, 4.0):
        assert _gradients(100.0, c_t, c_s, temperature)[0] == pytest.approx(-c_s, rel=1e-12)
        near = _gradients(1e-5, c_t, c_s, temperature)[0]
        assert near == pytest.approx(-c_s * c_t * 1e-5 / temperature, rel=1e-4)
        # At equal means the pull on the confidence is proportional to the temperature.
        assert _gradients(0.0, c_t, c_s, temperature)[1] == pytest.approx(3 * temperature * (c_s / c_t - 1))


def test_laplace_kl_is_zero_only_for_equal_sides_and_ignores_invalid_pixels():
    pts, other, valid = _pair(1)
    conf = torch.rand(pts[0].shape[:3], dtype=torch.float64) + 1
    assert laplace_kl(pts[0], conf, pts[0], conf, 2.0).item() == pytest.approx(0, abs=1e-12)
    clean = laplace_kl(pts[0], conf, other[0], conf, 2.0, valid[0])
    assert clean.item() > 0
    spoilt, spoilt_conf = other[0].clone(), conf.clone()
    spoilt[~valid[0]], spoilt_conf[~valid[0]] = math.nan, math.nan
    spoilt.requires_grad_()
    loss = laplace_kl(pts[0], conf, spoilt, spoilt_conf, 2.0, valid[0])
    loss.backward()
    assert loss.item() == pytest.approx(clean.item()) and spoilt.grad.isfinite().all()
    assert laplace_kl(pts[0], conf, other[0], conf, 2.0, torch.zeros_like(valid[0])).item() == 0
    with pytest.raises(InputError, match="temperature=0"):
        laplace_kl(pts[0], conf, other[0], conf, 0.0)
