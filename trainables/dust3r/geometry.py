"""Closed-form geometry of point sets and cameras: similarity, focal length, pose from a pointmap.

Cameras are OpenCV's: x right, y down, z forward; poses are camera to world; the principal point is the image's centre,
pixel centres lie at whole coordinates plus a half. Everything is float32 or float64 as given, batched over leading axes
where the docstring says so.
"""

from __future__ import annotations

import torch
from torch import Tensor

POSE_STEPS = 60
POSE_PIXELS = 2000  # of a pointmap that a pose is found from
FOCAL_STEPS = 10
FOCALS = (0.4, 0.55, 0.75, 1.0, 1.35, 1.8, 2.4, 3.2)  # times the longer side, tried where nothing is known


def rays(size: tuple[int, int], focal: Tensor) -> Tensor:
    """(..., H, W, 3) directions with z = 1 through every pixel; focal (...,) in pixels."""
    height, width = size
    v, u = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    centred = torch.stack((u + 0.5 - width / 2, v + 0.5 - height / 2), -1).to(focal)
    xy = centred / focal[..., None, None, None]
    return torch.cat((xy, torch.ones_like(xy[..., :1])), -1)


def similarity(source: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scale (...,), rotation (..., 3, 3) and shift (..., 3) that take `source` to `target`, weighted least squares.

    source, target (..., N, 3), weight (..., N), not all 0. Umeyama (PAMI 1991): target ~ scale R source + shift.
    """
    share = (weight / weight.sum(-1, keepdim=True).clamp_min(1e-12))[..., None]
    mean_s, mean_t = ((share * x).sum(-2, keepdim=True) for x in (source, target))
    centred = source - mean_s
    u, d, vt = torch.linalg.svd((share * (target - mean_t)).transpose(-2, -1) @ centred)
    sign = torch.ones_like(d)
    sign[..., 2] = torch.linalg.det(u @ vt).sign()
    rotation = u * sign[..., None, :] @ vt
    scale = (d * sign).sum(-1) / (share * centred.square()).sum((-2, -1)).clamp_min(1e-12)
    shift = mean_t[..., 0, :] - scale[..., None] * (rotation @ mean_s[..., 0, :, None])[..., 0]
    return scale, rotation, shift


def focal_of(points: Tensor, weight: Tensor) -> Tensor:
    """Focal length in pixels of the camera in whose frame `points` (H, W, 3) are; weight (H, W).

    Minimises the summed distance between pixels and projections by Weiszfeld's iteration, as a median does; stays
    within a quarter of and four times the longer side.
    """
    height, width = points.shape[:2]
    pixels = (rays((height, width), points.new_ones(()))[..., :2]).reshape(-1, 2)
    ahead = points[..., 2].reshape(-1)
    use = (ahead > 1e-6) & (weight.reshape(-1) > 0)
    pixels, slope = pixels[use], points.reshape(-1, 3)[use][:, :2] / ahead[use][:, None]
    own = weight.reshape(-1)[use]
    focal = points.new_tensor(float(max(height, width)))
    for _ in range(FOCAL_STEPS):
        near = own / (pixels - focal * slope).norm(dim=1).clamp_min(1e-3)
        focal = (near * (pixels * slope).sum(1)).sum() / (near * slope.square().sum(1)).sum().clamp_min(1e-12)
    longer = float(max(height, width))
    return focal.clamp(0.25 * longer, 4 * longer)


def pose_of(points: Tensor, weight: Tensor, focal: Tensor) -> tuple[Tensor, Tensor]:
    """The pose (4, 4) of the camera that sees `points` (H, W, 3), given in a frame not far turned from the camera's,
    each at its own pixel, and the weighted mean distance of pixels from projections, in pixels; weight (H, W).

    Orthogonal iteration on object space errors (Lu, Hager, Mjolsness, PAMI 2000), also right for planes, with weights
    that let go of outliers (a median instead of a mean).
    """
    every = max(1, round((weight.numel() / POSE_PIXELS) ** 0.5))
    look, flat, own = (
        part[every // 2 :: every, every // 2 :: every].flatten(0, 1).double()
        for part in (rays((points.shape[0], points.shape[1]), focal), points, weight)
    )
    use = (own > 0) & flat.isfinite().all(1)
    look, flat, own = look[use], flat[use], own[use] / own[use].sum()
    along = look / look.norm(dim=1, keepdim=True)
    eye = torch.eye(3, dtype=torch.float64, device=points.device)
    off = eye - along[:, :, None] * along[:, None]  # what of a vector is not along the ray
    rotation, shift, near, far = eye, torch.zeros_like(flat[0]), own, flat.norm(dim=1).median()
    for _ in range(POSE_STEPS):
        turned = flat @ rotation.T
        system = (near[:, None, None] * off).sum(0)
        shift = -torch.linalg.solve(system, (near[:, None] * (off @ turned[:, :, None])[..., 0]).sum(0))
        seen = turned + shift
        miss = (off @ seen[:, :, None])[..., 0]
        _, rotation, _ = similarity(flat, seen - miss, near)
        distance = miss.norm(dim=1) / seen[:, 2].abs().clamp_min(1e-3 * far)
        near = own / distance.clamp_min(1e-3)
        near = near / near.sum()
    seen = flat @ rotation.T + shift
    error = (seen[:, :2] / seen[:, 2:].clamp_min(1e-3 * far) - look[:, :2]).norm(dim=1) * focal
    pose = torch.eye(4, dtype=torch.float64, device=points.device)
    pose[:3, :3], pose[:3, 3] = rotation.T, -rotation.T @ shift
    return pose.to(points), (own * error).sum().to(points)


def pose_and_focal(points: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`pose_of` where the focal length is unknown: pose and focal of the best of several, refined."""
    longer = float(max(points.shape[:2]))
    tried = [points.new_tensor(ratio * longer) for ratio in FOCALS]
    for spread in (1.15, 1.07, 1.03, 1.015):
        best = min(tried, key=lambda focal: float(pose_of(points, weight, focal)[1]))
        tried = [best / spread, best, best * spread]
    focal = min(tried, key=lambda one: float(pose_of(points, weight, one)[1]))
    return pose_of(points, weight, focal)[0], focal
