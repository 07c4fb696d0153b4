"""Procedural rooms: boxes and spheres in a textured, lit room, ray-cast with exact geometry.

Every random number of a sample is a hash of (seed, split, scene, position in the stream), so that a sample is the
same whatever the batch it is rendered in, the number of workers or the order of calls, and so that two splits never
share a scene. Everything is vectorised over a batch of scenes. Lengths are metres; cameras look along +z, with x to
the right and y down (OpenCV); poses are camera-to-world.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SPLITS = {"train": 0, "val": 1, "test": 2}
SPHERES, BOXES = 4, 4
SURFACES = 6 + SPHERES + BOXES
CANDIDATES = 6
OVERLAP = (0.35, 0.9)
COARSE = 12
_SCENE_NUMBERS = 9 + SURFACES * 18 + (SPHERES + BOXES) * 12
_CAMERA_NUMBERS = 10


@dataclass(frozen=True)
class Views:
    """A batch of B scenes seen by V cameras each.

    image: (B, V, 3, H, W) uint8. depth: (B, V, H, W) float32, z-depth in metres. points: (B, V, H, W, 3) float32,
    metres, in the frame of each scene's camera 0. intrinsics: (B, 3, 3), pixels. pose: (B, V, 4, 4), camera to world.
    overlap: (B, V), the share of camera 0's (coarse) points that camera v sees; 1 for v = 0.
    """

    image: Tensor
    depth: Tensor
    points: Tensor
    intrinsics: Tensor
    pose: Tensor
    overlap: Tensor


def uniforms(seed: int, split: str, scenes: Tensor, stream: int, count: int) -> Tensor:
    """(B, count) float32 in [0, 1): splitmix64 of (seed, split, scene, stream, position), the same in any batch."""
    with np.errstate(over="ignore"):
        key = np.array([seed, SPLITS[split], stream], np.uint64)
        base = np.asarray(np.uint64(0x9E3779B97F4A7C15))
        for part in key:
            base = _mix(base ^ _mix(part + np.uint64(0x632BE59BD9B4E019)))
        rows = _mix(base ^ _mix(scenes.numpy().astype(np.uint64) + np.uint64(0xD1B54A32D192ED03)))
        columns = (np.arange(1, count + 1, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        bits = _mix(rows[:, None] + columns[None, :])
    return torch.from_numpy((bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24))


def _mix(z: np.ndarray | np.uint64) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))


class _Take:
    """Deals out columns of a (B, count) table of uniforms, each scaled to a range."""

    def __init__(self, table: Tensor) -> None:
        self.table, self.at = table, 0

    def __call__(self, shape: tuple[int, ...], low: float, high: float) -> Tensor:
        count = math.prod(shape)
        block = self.table[:, self.at : self.at + count]
        self.at += count
        return (low + (high - low) * block).reshape(len(self.table), *shape)


@dataclass(frozen=True)
class _Scene:
    half: Tensor  # (B, 3) half extents of the room, y is vertical (down)
    light: Tensor  # (B, 3)
    ambient: Tensor  # (B, 1)
    power: Tensor  # (B, 1)
    tint: Tensor  # (B, 3)
    sphere: Tensor  # (B, SPHERES, 4) centre, radius
    box: Tensor  # (B, BOXES, 6) centre, half extents
    yaw: Tensor  # (B, BOXES, 2) cosine and sine of the turn about the vertical, world to box
    paint: Tensor  # (16, B, SURFACES) two wave vectors, two phases, checked or striped, sharpness, two colours

    @property
    def form(self) -> Tensor:
        """(10, B, SURFACES): centre, half extents or radius, cosine and sine of the turn, round or flat, side."""
        b = len(self.half)
        one, zero = torch.ones(b, SURFACES, 1), torch.zeros(b, SURFACES, 1)
        centre = torch.cat([torch.zeros(b, 6, 3), self.sphere[..., :3], self.box[..., :3]], 1)
        radius = self.sphere[..., 3:].expand(-1, -1, 3)
        extent = torch.cat([self.half[:, None].expand(-1, 6, -1), radius, self.box[..., 3:]], 1)
        still = torch.tensor([1.0, 0.0]).expand(b, 6 + SPHERES, 2)
        turn = torch.cat([still, self.yaw], 1)
        kind = torch.arange(SURFACES)
        round_, inward = (kind >= 6) & (kind < 6 + SPHERES), kind < 6
        flags = [one * round_[:, None], torch.where(inward[:, None], -one, one) + zero]
        return torch.cat([centre, extent.clamp_min(1e-6), turn, *flags], -1).permute(2, 0, 1).contiguous()


def _scene(table: Tensor, camera: Tensor) -> tuple[_Scene, Tensor]:
    """A room, what stands in it, and the pose (B, 4, 4) of its first camera, from tables of uniforms."""
    take = _Take(table)
    half = torch.cat([take((1,), 1.6, 5.6), take((1,), 1.1, 1.6), take((1,), 1.6, 5.6)], 1)
    first = _first_camera(half, camera)
    light = take((3,), -0.75, 0.75) * half
    light[:, 1] = -half[:, 1] * (0.55 + 0.4 * light[:, 1].abs() / half[:, 1])
    ambient, power = take((1,), 0.25, 0.5), take((1,), 0.7, 1.6)
    tint = 1 - take((1,), 0.0, 0.25) * torch.tensor([0.0, 0.3, 1.0])
    n = SPHERES + BOXES
    # Most things stand on the floor, some float; some are scattered over the room, most before the first camera:
    # near things hide far ones, and no mean depth map explains the image.
    size = take((n, 3), 0.15, 0.6)
    floats, scattered = take((n,), 0, 1) < 0.25, take((n,), 0, 1) < 0.3
    away = 0.7 * _exp2(take((n, 1), 0, 2.8))
    before = torch.cat([take((n, 2), -0.5, 0.5), torch.ones_like(away)], -1) * away
    spot = first[:, None, :3, 3] + sum(before[..., j, None] * first[:, None, :3, j] for j in range(3))
    spot = torch.where(scattered[..., None], take((n, 3), -0.9, 0.9) * half[:, None], spot)
    spot = torch.maximum(torch.minimum(spot, half[:, None]), -half[:, None])
    angle = take((n,), 0, 2 * math.pi)
    height = torch.where(torch.arange(n) < SPHERES, size[:, :, 0], size[:, :, 1])
    spot[:, :, 1] = torch.where(floats, spot[:, :, 1], half[:, None, 1] - height)
    sphere = torch.cat([spot[:, :SPHERES], size[:, :SPHERES, :1]], -1)
    box = torch.cat([spot[:, SPHERES:], size[:, SPHERES:]], -1)
    yaw = torch.stack([angle[:, SPHERES:].cos(), angle[:, SPHERES:].sin()], -1)
    direction = take((SURFACES, 2, 3), -1, 1)
    direction = direction / _length(direction).clamp_min(1e-3)
    octave = take((SURFACES, 2, 1), 1.6, 2.7)
    wave = direction * _exp2(octave)
    phase = take((SURFACES, 2), 0, 2 * math.pi)
    style = torch.stack([take((SURFACES,), 0, 1).round(), _exp2(take((SURFACES,), 0, 4))], -1)
    colour = take((SURFACES, 2, 3), 0.08, 0.95)
    paint = torch.cat([wave.flatten(2), phase, style, colour.flatten(2)], -1).permute(2, 0, 1).contiguous()
    return _Scene(half, light, ambient, power, tint, sphere, box, yaw, paint), first


def _cast(scene: _Scene, origin: Tensor, ray: Tensor) -> tuple[Tensor, Tensor]:
    """First hit of rays. origin: (3, B, 1), ray: (3, B, N), any length -> t (B, N) in ray lengths, surface id.

    Coordinates lead, so that each operation runs over contiguous memory: this function is the renderer's time.
    """
    inverse = 1 / torch.where(ray.abs() < 1e-6, torch.full_like(ray, 1e-6), ray)
    half = scene.half.T[..., None]
    wall = half * inverse.abs() - origin * inverse
    best, axis = wall[0], torch.zeros_like(wall[0], dtype=torch.int64)
    for k in (1, 2):
        nearer = wall[k] < best
        best, axis = torch.where(nearer, wall[k], best), axis.masked_fill(nearer, k)
    surface = axis * 2 + (inverse.gather(0, axis[None])[0] > 0)
    squared = ray[0] * ray[0] + ray[1] * ray[1] + ray[2] * ray[2]
    for k in range(SPHERES):
        gap = origin - scene.sphere[:, k, :3].T[..., None]
        middle = gap[0] * ray[0] + gap[1] * ray[1] + gap[2] * ray[2]
        rest = (gap * gap).sum(0) - scene.sphere[:, k, 3:] ** 2
        root = middle * middle - squared * rest
        t = (-middle - root.clamp_min(0).sqrt()) / squared
        hit = (root > 0) & (t > 1e-3) & (t < best)
        best, surface = torch.where(hit, t, best), surface.masked_fill(hit, 6 + k)
    for k in range(BOXES):
        cos, sin = scene.yaw[:, k, 0, None], scene.yaw[:, k, 1, None]
        gap = origin - scene.box[:, k, :3].T[..., None]
        gap = torch.stack([cos * gap[0] - sin * gap[2], gap[1], sin * gap[0] + cos * gap[2]])
        slope = torch.stack([cos * ray[0] - sin * ray[2], sin * ray[0] + cos * ray[2]])
        slope = 1 / torch.where(slope.abs() < 1e-6, torch.full_like(slope, 1e-6), slope)
        near, far = torch.full_like(best, -math.inf), torch.full_like(best, math.inf)
        for side, across in enumerate((slope[0], inverse[1], slope[1])):
            middle, reach = -gap[side] * across, scene.box[:, k, 3 + side, None] * across.abs()
            near, far = torch.maximum(near, middle - reach), torch.minimum(far, middle + reach)
        hit = (near < far) & (near > 1e-3) & (near < best)
        best, surface = torch.where(hit, near, best), surface.masked_fill(hit, 6 + SPHERES + k)
    return best, surface


def _turn(vector: Tensor, matrix: Tensor) -> Tensor:
    """matrix (B, 3, 3) times vectors (3, B, N), written out: a batched matmul may sum in another order per batch."""
    m = matrix.permute(1, 2, 0)[..., None]
    return torch.stack([vector[0] * m[j, 0] + vector[1] * m[j, 1] + vector[2] * m[j, 2] for j in range(3)])


def _shade(scene: _Scene, point: Tensor, surface: Tensor) -> Tensor:
    """Colours (3, B, N) in [0, 1]: two-tone waves, stripes or checks, lit by one lamp without shadows."""
    paint = _pick(scene.paint, surface)
    swing = [(sum(paint[3 * j + k] * point[k] for k in range(3)) + paint[6 + j]).sin() for j in range(2)]
    value = swing[0] * torch.where(paint[8] > 0.5, swing[1], 1.0)
    share = 0.5 + 0.5 * (paint[9] * value).tanh()
    albedo = paint[13:16] + (paint[10:13] - paint[13:16]) * share
    to_light = scene.light.T[..., None] - point
    squared = (to_light * to_light).sum(0).clamp_min(0.04)
    lambert = ((_normal(scene, point, surface) * to_light).sum(0) / squared.sqrt()).clamp_min(0)
    lit = scene.ambient + scene.power * lambert / (1 + 0.12 * squared)
    return (albedo * (lit * scene.tint.T[..., None])).clamp(0, 1)


def _pick(table: Tensor, surface: Tensor) -> Tensor:
    """Numbers (P, B, N) of each pixel's surface from a (P, B, SURFACES) table (index_select: 1.5 x gather's speed)."""
    b, n = surface.shape
    row = (surface + torch.arange(b)[:, None] * SURFACES).flatten()
    return table.flatten(1).index_select(1, row).reshape(len(table), b, n)


def _normal(scene: _Scene, point: Tensor, surface: Tensor) -> Tensor:
    """Outward normals (3, B, N): every surface is a box face or a sphere about its own (turned) centre."""
    form = _pick(scene.form, surface)
    gap = point - form[0:3]
    cos, sin = form[6], form[7]
    local = torch.stack([cos * gap[0] - sin * gap[2], gap[1], sin * gap[0] + cos * gap[2]]) / form[3:6]
    away = local.abs()
    face = torch.where(away == away.amax(0), local / away.clamp_min(1e-9), 0.0)
    local = torch.where(form[8] > 0.5, local, face * form[9])
    return torch.stack([cos * local[0] + sin * local[2], local[1], cos * local[2] - sin * local[0]])


def _exp2(power: Tensor) -> Tensor:
    """2 ** power, rounded from double precision: in single, the last elements of a batch take another code path."""
    return torch.exp2(power.double()).float()


def _length(vector: Tensor) -> Tensor:
    """Lengths (..., 1) of vectors (..., 3), written out: a norm may sum in another order per batch."""
    x, y, z = vector[..., 0:1], vector[..., 1:2], vector[..., 2:3]
    return (x * x + y * y + z * z).sqrt()


def _unit(vector: Tensor) -> Tensor:
    return vector / _length(vector).clamp_min(1e-12)


def _look(position: Tensor, target: Tensor, roll: Tensor) -> Tensor:
    """Camera-to-world poses (B, 4, 4) at `position` looking at `target`, rolled by `roll` radians."""
    z = _unit(target - position)
    down = torch.tensor([0.0, 1.0, 0.0]).expand_as(z)
    x = _unit(torch.linalg.cross(down, z))
    y = torch.linalg.cross(z, x)
    cos, sin = roll.cos()[:, None], roll.sin()[:, None]
    pose = torch.eye(4).repeat(len(z), 1, 1)
    pose[:, :3, 0], pose[:, :3, 1], pose[:, :3, 2] = cos * x + sin * y, cos * y - sin * x, z
    pose[:, :3, 3] = position
    return pose


def _first_camera(half: Tensor, table: Tensor) -> Tensor:
    take = _Take(table)
    position = take((3,), -0.85, 0.85) * half
    position[:, 1] *= 0.4
    # Looking across the middle of the room keeps a good part of it, and of what stands in it, in sight.
    target = -position * take((1,), 0.2, 0.9) + take((3,), -0.5, 0.5) * half
    return _look(position, target, take((1,), -0.06, 0.06)[:, 0])


def _next_camera(scene: _Scene, first: Tensor, table: Tensor) -> Tensor:
    """A camera 0.2 to 2 m from the first that looks towards a point in front of the first."""
    take = _Take(table)
    step = _unit(take((3,), -1, 1) * torch.tensor([1.0, 0.5, 1.0]))
    position = first[:, :3, 3] + step * take((1,), 0.2, 2.0)
    position = torch.maximum(torch.minimum(position, 0.9 * scene.half), -0.9 * scene.half)
    target = first[:, :3, 3] + first[:, :3, 2] * take((1,), 1.5, 4.0) + take((3,), -0.6, 0.6)
    return _look(position, target, take((1,), -0.06, 0.06)[:, 0])


def _clear(scene: _Scene, cameras: Tensor) -> _Scene:
    """Take away whatever stands within 30 cm of a camera: the things shrink to nothing. cameras: (B, M, 3)."""
    gap = _length(cameras[:, None] - scene.sphere[:, :, None, :3])[..., 0] - scene.sphere[:, :, None, 3]
    sphere = scene.sphere.clone()
    sphere[..., 3] *= (gap.amin(-1) > 0.3).float()
    gap = _length(cameras[:, None] - scene.box[:, :, None, :3])[..., 0] - _length(scene.box[..., 3:])
    box = scene.box.clone()
    box[..., 3:] *= (gap.amin(-1) > 0.3).float()[..., None]
    return _Scene(**{**vars(scene), "sphere": sphere, "box": box})


def _rays(pose: Tensor, focal: Tensor, size: tuple[int, int], step: int = 1) -> Tensor:
    """World directions (3, B, N) of every `step`-th pixel's ray, with z-depth 1 in the camera."""
    height, width = size
    v, u = torch.meshgrid(torch.arange(step // 2, height, step), torch.arange(step // 2, width, step), indexing="ij")
    x = (u.flatten() + 0.5 - width / 2) / focal[:, None]
    y = (v.flatten() + 0.5 - height / 2) / focal[:, None]
    return _turn(torch.stack([x, y, torch.ones_like(x)]), pose[:, :3, :3])


def _centre(pose: Tensor) -> Tensor:
    """Camera centres (3, B, 1) of poses (B, 4, 4)."""
    return pose[:, :3, 3].T[..., None]


def _seen(scene: _Scene, point: Tensor, pose: Tensor, focal: Tensor, size: tuple[int, int]) -> Tensor:
    """Which of the world points (3, B, N) the cameras `pose` see: inside the frame and not hidden. (B, N) bool."""
    height, width = size
    sight = point - _centre(pose)
    local = _turn(sight, pose[:, :3, :3].transpose(1, 2))
    scale = focal[:, None] / local[2].clamp_min(1e-3)
    inside = (local[2] > 0.05) & ((local[0] * scale).abs() < width / 2)
    inside &= (local[1] * scale).abs() < height / 2
    reach, _ = _cast(scene, _centre(pose), sight)
    return inside & (reach > 0.97)


def render(seed: int, split: str, scenes: Tensor, views: int = 2, size: tuple[int, int] = (64, 64)) -> Views:
    """Render scenes `scenes` (B,) int64 of a split with `views` cameras each at `size` = (height, width).

    Camera 0 is free; every other one is the one of its candidates whose overlap with camera 0 lies in OVERLAP or
    nearest to it. A scene has the same cameras 0..v whatever the number of views asked for.
    """
    scene, first = _scene(
        uniforms(seed, split, scenes, 0, _SCENE_NUMBERS), uniforms(seed, split, scenes, 2, _CAMERA_NUMBERS)
    )
    field = uniforms(seed, split, scenes, 1, 1)[:, 0] * math.radians(10) + math.radians(55)
    focal = 0.5 * max(size) / (field / 2).tan()
    bare = _clear(scene, first[:, None, :3, 3])
    ray = _rays(first, focal, size, max(1, max(size) // COARSE))
    coarse = _centre(first) + _cast(bare, _centre(first), ray)[0] * ray
    poses, overlaps = [first], [torch.ones(len(scenes))]
    for view in range(1, views):
        tables = [uniforms(seed, split, scenes, 3 + view * CANDIDATES + c, _CAMERA_NUMBERS) for c in range(CANDIDATES)]
        pose, overlap = _choose(bare, first, coarse, focal, size, tables)
        poses.append(pose)
        overlaps.append(overlap)
    pose = torch.stack(poses, 1)
    # Only the first two cameras take things away, so that a pair is the same inside a longer series.
    scene = _clear(scene, pose[:, :2, :3, 3])
    image, depth, points = _expose(scene, pose, focal, size)
    intrinsics = torch.zeros(len(scenes), 3, 3)
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = focal
    intrinsics[:, 0, 2], intrinsics[:, 1, 2], intrinsics[:, 2, 2] = size[1] / 2, size[0] / 2, 1
    return Views(image, depth, points, intrinsics, pose, torch.stack(overlaps, 1))


def _choose(
    scene: _Scene, first: Tensor, coarse: Tensor, focal: Tensor, size: tuple[int, int], tables: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """The candidate whose overlap misses OVERLAP least, the earliest of equals: poses (B, 4, 4), overlaps (B,)."""
    poses = torch.stack([_next_camera(scene, first, table) for table in tables])
    overlap = torch.stack([_seen(scene, coarse, pose, focal, size).float().mean(-1) for pose in poses])
    miss = (OVERLAP[0] - overlap).clamp_min(0) + (overlap - OVERLAP[1]).clamp_min(0)
    best = (miss == miss.amin(0)).int().argmax(0)
    rows = torch.arange(len(first))
    return poses[best, rows], overlap[best, rows]


def _expose(scene: _Scene, pose: Tensor, focal: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    images, depths, points = [], [], []
    first = pose[:, 0]
    for here in pose.unbind(1):
        ray = _rays(here, focal, size)
        t, surface = _cast(scene, _centre(here), ray)
        world = _centre(here) + t * ray
        colour = _shade(scene, world, surface)
        images.append((colour * 255 + 0.5).to(torch.uint8).transpose(0, 1).reshape(-1, 3, *size))
        depths.append(t.reshape(-1, *size))
        local = _turn(world - _centre(first), first[:, :3, :3].transpose(1, 2))
        points.append(local.permute(1, 2, 0).reshape(-1, *size, 3))
    return torch.stack(images, 1), torch.stack(depths, 1), torch.stack(points, 1)
