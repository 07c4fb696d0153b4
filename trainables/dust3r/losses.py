"""Losses on pairs of pointmaps (Wang et al., arXiv:2312.14132, section 3), and the distillation term.

Shapes everywhere: points (B, H, W, 3), confidences and validity masks (B, H, W); the views may differ in H
and W. All points of a pair are in the first camera's frame. Every reduction runs over valid pixels only: what
invalid pixels hold (NaN included) reaches neither value nor gradient, and a view without valid pixels
contributes zero.
"""

from typing import TypedDict, Unpack

import torch
from torch import Tensor

from engines.errors import InputError

NORM_MODES = ("avg_dis", "avg_log1p", "avg_warp-log1p", "median_dis", "sqrt_dis")
INVARIANCES = ("none", "shift", "scale", "scale_shift")

_TINY = 1e-8


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name}={value!r} is unknown, use one of {', '.join(allowed)}")


def _clean(points: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid[..., None], points, points.new_zeros(()))


def _masked_mean(values: Tensor, valid: Tensor) -> Tensor:
    total = torch.where(valid, values, values.new_zeros(())).sum()
    return total / valid.sum().clamp(min=1)


def _joint(first: Tensor, second: Tensor) -> Tensor:
    """Pixels of both views side by side: (B, H1 * W1 + H2 * W2, ...)."""
    return torch.cat((first.flatten(1, 2), second.flatten(1, 2)), dim=1)


def _joint_median(values: Tensor, valid: Tensor, empty: float) -> Tensor:
    """Lower median over the valid pixels of (B, N), per sample; `empty` where there are none."""
    median = values.masked_fill(~valid, torch.nan).nanmedian(dim=1).values
    return torch.where(valid.any(dim=1), median, median.new_tensor(empty))


def normalise_pointmaps(
    pts1: Tensor, pts2: Tensor, valid1: Tensor, valid2: Tensor, mode: str = "avg_dis"
) -> tuple[Tensor, Tensor, Tensor]:
    """Divide both pointmaps by one factor per sample; returns (pts1, pts2, factor (B,)), invalid pixels zero.

    With d the distance to the origin over the valid pixels of both views, the factor is
    'avg_dis': mean d; 'avg_log1p': mean log(1 + d); 'avg_warp-log1p': the same, after each point has been
    moved along its ray to distance log(1 + d); 'median_dis': median d, without gradient; 'sqrt_dis':
    (mean sqrt d)^2.
    """
    _choice("norm mode", mode, NORM_MODES)
    pts1, pts2 = _clean(pts1, valid1), _clean(pts2, valid2)
    d1, d2 = pts1.norm(dim=-1), pts2.norm(dim=-1)
    if mode == "avg_warp-log1p":
        pts1 = pts1 * (d1.log1p() / d1.clamp(min=_TINY))[..., None]
        pts2 = pts2 * (d2.log1p() / d2.clamp(min=_TINY))[..., None]
    distance, valid = _joint(d1, d2), _joint(valid1, valid2)
    count = valid.sum(dim=1).clamp(min=1)
    if mode == "avg_dis":
        factor = distance.sum(dim=1) / count
    elif mode == "median_dis":
        factor = _joint_median(distance.detach(), valid, empty=1.0)
    elif mode == "sqrt_dis":
        # The root's slope is infinite at the zeros that stand for invalid pixels.
        root = distance.clamp(min=_TINY).sqrt()
        factor = (torch.where(valid, root, root.new_zeros(())).sum(dim=1) / count).square()
    else:
        factor = distance.log1p().sum(dim=1) / count
    factor = factor.clamp(min=_TINY)
    scale = factor[:, None, None, None]
    return pts1 / scale, pts2 / scale, factor


def _shift_depth(pts1: Tensor, pts2: Tensor, valid1: Tensor, valid2: Tensor) -> tuple[Tensor, Tensor]:
    """Subtract the joint median of z."""
    z = _joint_median(_joint(pts1[..., 2], pts2[..., 2]), _joint(valid1, valid2), empty=0.0)
    shift = torch.stack((torch.zeros_like(z), torch.zeros_like(z), z), dim=-1)[:, None, None]
    return pts1 - shift, pts2 - shift


def _spread(pts1: Tensor, pts2: Tensor, valid1: Tensor, valid2: Tensor) -> Tensor:
    """Joint median distance to the joint median point, (B, 1, 1, 1)."""
    points, valid = _joint(pts1, pts2), _joint(valid1, valid2)
    centre = torch.stack([_joint_median(points[..., i], valid, empty=0.0) for i in range(3)], dim=-1)
    spread = _joint_median((points - centre[:, None]).norm(dim=-1), valid, empty=1.0)
    return spread[:, None, None, None]


class Comparison(TypedDict, total=False):
    """How ``point_errors`` compares; its defaults hold for what is absent."""

    mode: str
    gt_scale: bool
    invariance: str


def point_errors(
    pts1: Tensor,
    pts2: Tensor,
    true1: Tensor,
    true2: Tensor,
    valid1: Tensor,
    valid2: Tensor,
    mode: str = "avg_dis",
    gt_scale: bool = False,
    invariance: str = "none",
) -> tuple[Tensor, Tensor]:
    """Euclidean error of every pixel of both views, (B, H, W) each; zero where invalid.

    Prediction and truth are normalised by their own factors (see ``normalise_pointmaps``); with gt_scale the
    truth keeps its scale. invariance: 'shift' then takes the joint median z from both sides, 'scale' makes
    the prediction's spread that of the truth (with gt_scale) or both spreads 1, 'scale_shift' does both.
    """
    _choice("invariance", invariance, INVARIANCES)
    masks = (valid1, valid2)
    pred1, pred2, _ = normalise_pointmaps(pts1, pts2, *masks, mode)
    if gt_scale:
        goal1, goal2 = _clean(true1, valid1), _clean(true2, valid2)
    else:
        goal1, goal2, _ = normalise_pointmaps(true1, true2, *masks, mode)
    if invariance in ("shift", "scale_shift"):
        pred1, pred2 = _shift_depth(pred1, pred2, *masks)
        goal1, goal2 = _shift_depth(goal1, goal2, *masks)
    if invariance in ("scale", "scale_shift"):
        own, goal = _spread(pred1, pred2, *masks).clamp(1e-3, 1e3), _spread(goal1, goal2, *masks)
        if gt_scale:
            pred1, pred2 = pred1 * (goal / own), pred2 * (goal / own)
        else:
            pred1, pred2, goal1, goal2 = pred1 / own, pred2 / own, goal1 / goal, goal2 / goal
    # Differences are cleaned again: shifts move the zeros of invalid pixels.
    return _clean(pred1 - goal1, valid1).norm(dim=-1), _clean(pred2 - goal2, valid2).norm(dim=-1)


Views = tuple[Tensor, Tensor]


def regression_loss(pts: Views, true: Views, valid: Views, **how: Unpack[Comparison]) -> Tensor:
    """Mean ``point_errors`` of view 1 plus that of view 2, a scalar (Regr3D and its shift/scale variants)."""
    errors = point_errors(*pts, *true, *valid, **how)
    return _masked_mean(errors[0], valid[0]) + _masked_mean(errors[1], valid[1])


def confidence_loss(
    pts1: Tensor,
    conf1: Tensor,
    pts2: Tensor,
    conf2: Tensor,
    true1: Tensor,
    true2: Tensor,
    valid1: Tensor,
    valid2: Tensor,
    mode: str = "avg_dis",
    gt_scale: bool = False,
    alpha: float = 0.2,
) -> Tensor:
    """mean(conf * error - alpha * log conf) of view 1 plus that of view 2, a scalar; conf > 0."""
    error1, error2 = point_errors(pts1, pts2, true1, true2, valid1, valid2, mode, gt_scale)
    total = error1.new_zeros(())
    for error, conf, valid in ((error1, conf1, valid1), (error2, conf2, valid2)):
        conf = torch.where(valid, conf, conf.new_ones(()))
        total = total + _masked_mean(conf * error - alpha * conf.log(), valid)
    return total


def laplace_kl(
    mean_t: Tensor,
    conf_t: Tensor,
    mean_s: Tensor,
    conf_s: Tensor,
    temperature: float,
    valid: Tensor | None = None,
) -> Tensor:
    """T * KL(teacher || student) between pointmaps with confidence: mean over valid pixels, sum over x, y, z.

    A pointmap with confidence is read as a predictive distribution: each coordinate is Laplace with mean m
    (the point, already normalised on each side by its own ``normalise_pointmaps`` factor) and scale
    b = 1 / conf, whose negative log-likelihood per coordinate is conf * |error| - log conf + log 2.

    The divergence of two Laplace densities (Meyer, arXiv:1911.02088), with d = m_t - m_s, is
        KL = log(b_s / b_t) + (|d| + b_t exp(-|d| / b_t)) / b_s - 1
    because E_t |x - m_s| = |d| + b_t exp(-|d| / b_t) and the entropy of t is 1 + log(2 b_t). Softening
    multiplies both scales by T: with r = b_t / b_s = conf_s / conf_t and u = |d| conf_t / T it splits into
    two non-negative terms, neither of which cancels large numbers,
        KL = (r - 1 - log r) + r (u + exp(-u) - 1).

    What the factor T does (compare T^2 for softmax outputs, Hinton et al., arXiv:1503.02531): the derivative
    with respect to m_s is -sign(d) conf_s (1 - exp(-u)). Far from the teacher (|d| >> T / conf_t) its size is
    conf_s, whatever T; close to it, it is conf_s conf_t |d| / T, so T widens the zone in which the pull
    weakens. The derivative with respect to log conf_s is conf_s |d| + T (r exp(-u) - 1) per coordinate: the
    factor T leaves the far part, conf_s |d|, alone; the pull towards the teacher's confidence grows with T.

    The teacher's tensors get no gradient. valid None: every pixel. Raises InputError unless temperature > 0.
    """
    if not temperature > 0:
        raise InputError(f"temperature={temperature} must be above 0")
    mean_t, conf_t = mean_t.detach(), conf_t.detach()
    if valid is None:
        valid = torch.ones_like(conf_t, dtype=torch.bool)
    one = conf_t.new_ones(())
    conf_t, conf_s = torch.where(valid, conf_t, one), torch.where(valid, conf_s, one)
    ratio = conf_s / conf_t
    u = (_clean(mean_t, valid) - _clean(mean_s, valid)).abs() * (conf_t / temperature)[..., None]
    far = (u + torch.expm1(-u)).sum(dim=-1)
    near = 3 * (ratio - 1 - ratio.log())
    return temperature * _masked_mean(near + ratio * far, valid)
