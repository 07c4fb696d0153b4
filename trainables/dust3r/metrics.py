"""Quality of predicted pointmaps against exact ones, per pair of images.

All of them come after ONE scale per pair: median(true depth of view 1) / median(predicted depth of view 1). Depth is
the z coordinate of view 1 in its own camera; view 2's pointmap lives in the same frame, so one scale fits both. True
points are NaN where the depth is unknown: those pixels count nowhere, in the scale neither.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trainables.dust3r.geometry import resected
from trainables.gates import tail_of

CLOUD_POINTS = 1024
RESAMPLES = 2000
NAMES = ("absrel", "rmse", "delta1", "delta103", "chamfer", "accuracy", "completeness")
POSES = ("rotation_deg", "translation_deg", "rra15", "rta15", "maa30")
LOWER_IS_BETTER = {"chamfer": True, "absrel": True, "rmse": True, "delta1": False}  # what can be the primary metric


def known(points: Tensor) -> Tensor:
    """Which of the true points (..., 3) are known, (...) bool."""
    return points.isfinite().all(-1)


def aligned(depth: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Predicted depths (B, N) after the one scale per row, and that scale (B, 1). true: NaN = unknown."""
    seen = depth.masked_fill(true.isnan(), torch.nan)
    scale = (true.nanmedian(1).values / seen.nanmedian(1).values.clamp_min(1e-6))[:, None]
    return depth * scale, scale


def per_pair(points1: Tensor, points2: Tensor, true1: Tensor, true2: Tensor, clouds: bool = True) -> dict[str, Tensor]:
    """Metrics of B pairs, each (B,) float32. Points are (B, H, W, 3), metres for the true ones, NaN = unknown.

    absrel: mean |d - d*| / d*. rmse: root mean (d - d*)^2, metres. delta1, delta103: share of pixels with
    max(d / d*, d* / d) < 1.25, < 1.03. With clouds, of the joint clouds of both views at known pixels, metres, on about
    CLOUD_POINTS evenly strided points of each: accuracy, mean distance of a predicted point to the nearest true one;
    completeness, of a true point to the nearest predicted one; chamfer, half of their sum.
    A pair with a non-finite prediction has NaN in every metric.
    """
    true = true1[..., 2].flatten(1).masked_fill(~known(true1).flatten(1), torch.nan)
    depth, scale = aligned(points1[..., 2].flatten(1), true)
    error = (depth - true).abs()
    ratio = torch.maximum(depth / true, true / depth.clamp_min(1e-6))
    result = {
        "absrel": (error / true).nanmean(1),
        "rmse": error.square().nanmean(1).sqrt(),
        "delta1": _share(ratio < 1.25, true),
        "delta103": _share(ratio < 1.03, true),
    }
    if clouds:
        cloud = torch.cat([points1.flatten(1, 2), points2.flatten(1, 2)], 1) * scale[..., None]
        exact = torch.cat([true1.flatten(1, 2), true2.flatten(1, 2)], 1)
        both = [
            cloud_distances(*(part[known(there)] for part in (c, there))) for c, there in zip(cloud, exact, strict=True)
        ]
        result["accuracy"], result["completeness"] = torch.stack(both).unbind(1)
        result["chamfer"] = 0.5 * (result["accuracy"] + result["completeness"])
    bad = ~(points1.isfinite().all(-1) & points2.isfinite().all(-1)).flatten(1).all(1)
    return {name: value.masked_fill(bad, torch.nan) for name, value in result.items()}


def _share(good: Tensor, true: Tensor) -> Tensor:
    return (good & ~true.isnan()).sum(1) / (~true.isnan()).sum(1)


def cloud_distances(cloud: Tensor, true: Tensor) -> Tensor:
    """Mean distance to the nearest point of the other cloud, of `cloud` (N, 3) to `true` (N, 3) and back; (2,)."""
    # An odd step: an even one would divide the image width and pick the same few columns in every row.
    step = len(cloud) // CLOUD_POINTS | 1
    # Not through a matrix product: squares of metres cancel there, and equal points would be up to 1 mm apart.
    distance = torch.cdist(cloud[::step], true[::step], compute_mode="donot_use_mm_for_euclid_dist")
    return torch.stack([distance.amin(1).mean(), distance.amin(0).mean()])


def pose_errors(points2: Tensor, confidence2: Tensor, intrinsics2: Tensor, pose: Tensor) -> dict[str, Tensor]:
    """Errors of the pose of camera 2 in camera 1 that the predicted points of view 2 imply, each (B,) float32.

    points2: (B, H, W, 3) in camera 1, at any scale; confidence2: (B, H, W) > 1; intrinsics2: (B, 3, 3) of view 2, taken
    as known; pose: (B, 4, 4), the true one. rotation_deg: angle of the rotation between both. translation_deg: angle
    between the directions to camera 2, as the scale is unknown. rra15, rta15: whether these are below 15 degrees.
    maa30: share of the thresholds 1, 2, ..., 30 degrees that both are below (its mean over pairs is mAA(30)).
    A pair with a non-finite prediction has NaN.
    """
    bad = ~(points2.isfinite().all(-1) & confidence2.isfinite()).flatten(1).all(1)
    numbers = points2.nan_to_num(0.0, 0.0, 0.0), confidence2.nan_to_num(1.0, 1.0, 1.0)
    rotation, centre = resected(*numbers, intrinsics2)
    between = rotation.double() @ pose[:, :3, :3].double()
    turn = torch.stack([between[:, 2, 1], between[:, 0, 2], between[:, 1, 0]], -1)
    back = torch.stack([between[:, 1, 2], between[:, 2, 0], between[:, 0, 1]], -1)
    trace = between.diagonal(dim1=1, dim2=2).sum(-1)
    angles = {
        "rotation_deg": torch.atan2((turn - back).norm(dim=-1), trace - 1),
        "translation_deg": _angle(centre.double(), pose[:, :3, 3].double()),
    }
    result = {name: value.rad2deg().float() for name, value in angles.items()}
    worst = torch.maximum(*result.values())
    result["rra15"], result["rta15"] = ((value < 15).float() for value in (*result.values(),))
    result["maa30"] = (30 - worst.floor()).clamp(0, 30) / 30
    return {name: value.masked_fill(bad, torch.nan) for name, value in result.items()}


def _angle(a: Tensor, b: Tensor) -> Tensor:
    return torch.atan2(torch.linalg.cross(a, b).norm(dim=-1), (a * b).sum(-1))


def intervals(values: dict[str, Tensor], seed: int, level: float = 0.95) -> dict[str, float]:
    """Bootstrap intervals over pairs of every metric's mean, as NAME_lo and NAME_hi; NaN where a value is."""
    table = torch.stack(list(values.values()), 1).double().numpy()
    count = len(table)
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES) / count
    tail = tail_of((1 - level) / 2, count)
    ends = np.quantile(weights @ table, [tail, 1 - tail], axis=0)
    return {f"{name}_{end}": float(ends[k, n]) for n, name in enumerate(values) for k, end in enumerate(("lo", "hi"))}
