"""Closed-form geometry of point sets and cameras: similarity, focal length, pose from a pointmap.

Cameras are OpenCV's: x right, y down, z forward; poses are camera to world; the principal point is the image's centre,
pixel centres lie at whole coordinates plus a half. Everything is float32 or float64 as given, batched over leading axes
where the docstring says so.
"""

from __future__ import annotations

import torch
from torch import Tensor

POSE_POINTS = 512
POSE_STEPS = 30
POSE_DRAWS, POSE_SAMPLE = 24, 8
FARTHEST = 1e3  # of a point from the first camera, in median distances
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
    """The pose (4, 4) of the camera that sees `points` (H, W, 3) at its pixels, and the weighted mean distance of
    pixels from projections, in pixels; weight (H, W). See :func:`resected`.
    """
    height, width = points.shape[:2]
    half = points.new_tensor([width / 2, height / 2])
    camera = torch.eye(3).to(points)
    camera[0, 0] = camera[1, 1] = focal
    camera[:2, 2] = half
    rotation, centre = resected(points[None], weight.exp()[None], camera[None])
    seen = (points - centre[0]) @ rotation[0].T
    ahead = seen[..., 2:].clamp_min(1e-3 * seen[..., 2].abs().median())
    miss = (seen[..., :2] / ahead - rays((height, width), focal)[..., :2]).norm(dim=-1) * focal
    pose = torch.eye(4).to(points)
    pose[:3, :3], pose[:3, 3] = rotation[0].T, centre[0]
    return pose, (weight * miss).sum() / weight.sum()


def pose_and_focal(points: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`pose_of` where the focal length is unknown: pose and focal of the best of several, refined."""
    longer = float(max(points.shape[:2]))
    tried = [points.new_tensor(ratio * longer) for ratio in FOCALS]
    for spread in (1.15, 1.07, 1.03, 1.015):
        best = min(tried, key=lambda focal: float(pose_of(points, weight, focal)[1]))
        tried = [best / spread, best, best * spread]
    focal = min(tried, key=lambda one: float(pose_of(points, weight, one)[1]))
    return pose_of(points, weight, focal)[0], focal


def resected(points: Tensor, confidence: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """The camera that sees points (B, H, W, 3) at its pixels: rotation of the world into it, and its centre.

    Orthogonal iteration (Lu, Hager and Mjolsness, PAMI 2000) on POSE_POINTS evenly strided pixels, weighted by the
    logarithm of the confidence and reweighted towards the least sum of angles, from the best of several fits to a few
    points each, as outliers spoil some of those only.
    """
    height, width = points.shape[1:3]
    step = height * width // POSE_POINTS | 1
    v, u = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    pixel = torch.stack([u, v, torch.ones_like(u)], -1).flatten(0, 1)[::step].to(points.device)
    ray = torch.nn.functional.normalize(pixel @ torch.linalg.inv(intrinsics).mT, dim=-1)
    world, trust = points.flatten(1, 2)[:, ::step], confidence.flatten(1)[:, ::step].log().clamp_min(1e-3)
    scale = world.norm(dim=-1).median(1).values.clamp_min(1e-9)[:, None, None]
    world = (world / scale).clamp(-FARTHEST, FARTHEST)  # of a model gone astray, squares would not be finite
    rotation, weight = _first_fit(world, ray)
    for _ in range(POSE_STEPS):
        rotation, shift, weight = _iterate(world, ray, trust * weight, rotation)
    return rotation, -(rotation.mT @ shift[..., None])[..., 0] * scale[:, 0]


def _first_fit(world: Tensor, ray: Tensor) -> tuple[Tensor, Tensor]:
    """Of POSE_DRAWS fits to POSE_SAMPLE points the one with the least median angle: rotation, every point's weight."""
    batch, count = world.shape[:2]
    draws = torch.rand(POSE_DRAWS, count, generator=torch.Generator().manual_seed(0)).topk(POSE_SAMPLE).indices
    few, rays = (x[:, draws.to(x.device)].flatten(0, 1) for x in (world, ray))  # (B * draws, sample, 3)
    even = few.new_full(few.shape[:2], 1 / POSE_SAMPLE)
    rotation = _turned(few, rays / rays[..., 2:].clamp_min(1e-3), even)
    for _ in range(POSE_STEPS // 2):
        rotation, shift, _ = _iterate(few, rays, even, rotation)
    rotation, shift = rotation.view(batch, POSE_DRAWS, 3, 3), shift.view(batch, POSE_DRAWS, 1, 3)
    local = torch.einsum("bdij,bnj->bdni", rotation, world) + shift
    cosine = (local * ray[:, None]).sum(-1) / local.norm(dim=-1).clamp_min(1e-9)
    best = torch.arange(batch, device=world.device), cosine.median(2).values.argmax(1)
    return rotation[best], _weights(local[best], _off(local[best], ray))


def _iterate(world: Tensor, ray: Tensor, weight: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One orthogonal iteration: the better rotation, the shift that goes with the given one, and new weights."""
    weight = weight / weight.sum(1, keepdim=True)
    turned = world @ rotation.mT
    # The part off the line of sight: I - r r^T, in sums over the points.
    system = torch.eye(3, device=ray.device) - (weight[..., None] * ray).mT @ ray
    shift = -torch.linalg.solve(system, (weight[..., None] * _off(turned, ray)).sum(1))
    local = turned + shift[:, None]
    off = _off(local, ray)
    return _turned(world, local - off, weight), shift, _weights(local, off)


def _weights(local: Tensor, off: Tensor) -> Tensor:
    """What makes of weighted squares of `off` the sum of sines: 1 / (sine x distance^2), for sines from 1e-3 on."""
    distance = local.norm(dim=-1).clamp_min(1e-3)
    sine = (off.norm(dim=-1) / distance).clamp_min(1e-3)
    weights: Tensor = 1 / (sine * distance.square())
    return weights


def _off(local: Tensor, ray: Tensor) -> Tensor:
    off: Tensor = local - ray * (ray * local).sum(-1, keepdim=True)
    return off


def _turned(source: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The rotation (B, 3, 3) that takes weighted points (B, N, 3) nearest to others, each about its own mean."""
    share = weight[..., None]
    source, target = (x - (share * x).sum(1, keepdim=True) for x in (source, target))
    u, _, vt = torch.linalg.svd((share * target).mT @ source)
    flip = torch.ones_like(u[:, 0])
    flip[:, 2] = torch.linalg.det(u @ vt)
    rotation: Tensor = u * flip[:, None] @ vt
    return rotation
