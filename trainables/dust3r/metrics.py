"""Quality of predicted pointmaps against exact ones, per pair of images.

All of them come after ONE scale per pair: median(true depth of view 1) / median(predicted depth of view 1). Depth is
the z coordinate of view 1 in its own camera; view 2's pointmap lives in the same frame, so one scale fits both.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHAMFER_POINTS = 1024
NAMES = ("chamfer", "absrel", "rmse", "delta1")
LOWER_IS_BETTER = {"chamfer": True, "absrel": True, "rmse": True, "delta1": False}


def per_pair(points1: Tensor, points2: Tensor, true1: Tensor, true2: Tensor, chamfer: bool = True) -> dict[str, Tensor]:
    """Metrics of B pairs, each (B,) float32. Points are (B, H, W, 3), metres for the true ones.

    absrel: mean |d - d*| / d*. rmse: root mean (d - d*)^2, metres. delta1: share of pixels with
    max(d / d*, d* / d) < 1.25. chamfer: mean nearest-neighbour distance between the joint clouds of both views, half
    of the sum of both directions, metres, on CHAMFER_POINTS evenly strided points of each cloud.
    A pair with a non-finite prediction has NaN in every metric.
    """
    depth, true = points1[..., 2].flatten(1), true1[..., 2].flatten(1)
    scale = (true.median(1).values / depth.median(1).values.clamp_min(1e-6))[:, None]
    depth = depth * scale
    error = (depth - true).abs()
    ratio = torch.maximum(depth / true, true / depth.clamp_min(1e-6))
    result = {
        "absrel": (error / true).mean(1),
        "rmse": error.square().mean(1).sqrt(),
        "delta1": (ratio < 1.25).float().mean(1),
    }
    if chamfer:
        cloud = torch.cat([points1.flatten(1, 2), points2.flatten(1, 2)], 1) * scale[..., None]
        result["chamfer"] = chamfer_distance(cloud, torch.cat([true1.flatten(1, 2), true2.flatten(1, 2)], 1))
    bad = ~(points1.isfinite().all(-1) & points2.isfinite().all(-1)).flatten(1).all(1)
    return {name: value.masked_fill(bad, float("nan")) for name, value in result.items()}


def chamfer_distance(cloud: Tensor, true: Tensor) -> Tensor:
    """Half the sum of both mean nearest-neighbour distances between (B, N, 3) clouds, (B,)."""
    # An odd step: an even one would divide the image width and pick the same few columns in every row.
    step = cloud.shape[1] // CHAMFER_POINTS | 1
    # Not through a matrix product: squares of metres cancel there, and equal points would be up to 1 mm apart.
    distance = torch.cdist(cloud[:, ::step], true[:, ::step], compute_mode="donot_use_mm_for_euclid_dist")
    return 0.5 * (distance.amin(2).mean(1) + distance.amin(1).mean(1))
