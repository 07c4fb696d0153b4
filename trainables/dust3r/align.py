"""Global alignment: the pairwise pointmaps of a scene's pair graph in one frame, with cameras and depth maps.

Every pair's two pointmaps are moved by one similarity, every image has a pose, a focal length and a depth along each
pixel's ray; what is minimised is the distance between the two, weighted by the log of the confidence (DUSt3R, Wang et
al., arXiv:2312.14132, section 3.4). The start is a spanning tree of the graph over its most confident pairs. Two things
make it fast: gradients are taken on a coarse grid of pixels, whose depths are variables, and the depths of all others
follow from the cameras in closed form at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from engines.errors import InputError
from trainables.dust3r.geometry import focal_of, pose_and_focal, pose_of, rays, similarity

STEPS = 300
STEP = 0.01  # Adam's first rate, in units of log-depth, of a tangent of rotation, of the scene's depth, of log-scale
FOCAL_SHARE = 0.05  # of it for log-focal, which moves all depths at once
SAMPLES = 9600  # pixels per image on the coarse grid
Edge = tuple[int, int]


@dataclass(frozen=True)
class Predictions:
    """Of a pair graph: edges (i, j), both images' pointmaps in camera i's frame (E, H, W, 3), confidences (E, H, W)."""

    edges: Sequence[Edge]
    pts1: Tensor
    conf1: Tensor
    pts2: Tensor
    conf2: Tensor

    @property
    def views(self) -> int:
        """How many images there are."""
        return 1 + max(max(edge) for edge in self.edges)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.pts1.shape[1], self.pts1.shape[2]

    def to(self, device: str) -> Predictions:
        """The same on another device."""
        maps = (self.pts1, self.conf1, self.pts2, self.conf2)
        return Predictions(self.edges, *(part.to(device) for part in maps))


@dataclass(frozen=True)
class Reconstruction:
    """One cloud: poses (n, 4, 4) camera to world, focals (n,) in pixels, depth (n, H, W) along z, all in one free unit
    unless poses were given; confidence (n, H, W), the largest of any pair; loss: first and last value.
    """

    poses: Tensor
    focals: Tensor
    depth: Tensor
    confidence: Tensor
    loss: tuple[float, float]

    @property
    def points(self) -> Tensor:
        """(n, H, W, 3) in the world's frame."""
        return placed(self.poses, rays((self.depth.shape[1], self.depth.shape[2]), self.focals) * self.depth[..., None])


def placed(poses: Tensor, points: Tensor) -> Tensor:
    """Points (n, ..., 3) of cameras' frames in the world's frame; poses (n, 4, 4)."""
    flat = points.flatten(1, -2)
    return (flat @ poses[:, :3, :3].transpose(1, 2) + poses[:, None, :3, 3]).view(points.shape)


def align(
    found: Predictions, poses: Tensor | None = None, focals: Tensor | None = None, steps: int = STEPS
) -> Reconstruction:
    """The cameras and depths that agree best with all pairs.

    poses (n, 4, 4), focals (n,): where they are known; they are kept as given. Deterministic. Raises InputError where
    the graph falls into parts or holds an image paired with itself, and for pointmaps that no camera could see.
    """
    _check(found)
    linalg: Any = torch.linalg  # typed in part only
    try:
        start = _from_tree(found) if poses is None else _from_poses(found, poses, focals)
        with torch.enable_grad():
            result = _Problem(found, *start, poses, focals).solve(steps)
    except linalg.LinAlgError:  # what overflowed has no decomposition
        result = None
    if result is None or not all(part.isfinite().all() for part in (result.poses, result.focals, result.depth)):
        raise InputError("the pointmaps cannot be aligned, they overflow or hold NaN: predict them with another model")
    return result


def _check(found: Predictions) -> None:
    parts = {view: {view} for view in range(found.views)}
    for i, j in found.edges:
        if i == j:
            raise InputError(f"pair ({i}, {j}): an image cannot be paired with itself; remove the pair")
        joined = parts[i] | parts[j]
        parts |= dict.fromkeys(joined, joined)
    if len(parts[0]) < found.views:
        others = ", ".join(str(view) for view in range(found.views) if view not in parts[0])
        raise InputError(f"no chain of pairs joins images {others} with image 0: add pairs, or align the parts alone")


def _weights(conf: Tensor) -> Tensor:
    """log confidence; confidences start at 1, so that a pixel of which nothing is known counts nothing."""
    return conf.clamp_min(1).log()


def _from_tree(found: Predictions) -> tuple[Tensor, Tensor, Tensor]:
    """World points (n, H, W, 3), poses and focals, from a maximum spanning tree over the pairs' mean confidences."""
    score = (found.conf1.mean((1, 2)) * found.conf2.mean((1, 2))).tolist()
    w1, w2 = _weights(found.conf1).flatten(1), _weights(found.conf2).flatten(1)
    flat = found.pts1.flatten(1, 2), found.pts2.flatten(1, 2)
    world: dict[int, Tensor] = {}
    first = max(range(len(score)), key=score.__getitem__)
    world |= {found.edges[first][side]: flat[side][first] for side in (0, 1)}
    while len(world) < found.views:
        reach = [k for k, (i, j) in enumerate(found.edges) if (i in world) != (j in world)]
        k = max(reach, key=score.__getitem__)
        known = 0 if found.edges[k][0] in world else 1
        scale, rotation, shift = similarity(flat[known][k], world[found.edges[k][known]], (w1, w2)[known][k])
        world[found.edges[k][1 - known]] = scale * flat[1 - known][k] @ rotation.T + shift
    focals, poses = [], []
    for view in range(found.views):
        own = [k for k, (i, _) in enumerate(found.edges) if i == view]
        if own:  # its own frame is known from the pair in which it comes first
            k = max(own, key=score.__getitem__)
            _, rotation, shift = similarity(flat[0][k], world[view], w1[k])
            poses.append(_pose(rotation, shift))
            focals.append(_own_focal(found, own))
        else:
            k = max((k for k, (_, j) in enumerate(found.edges) if j == view), key=score.__getitem__)
            local, focal = pose_and_focal(found.pts2[k], _weights(found.conf2[k]))
            scale, rotation, shift = similarity(flat[1][k], world[view], w2[k])
            poses.append(_pose(rotation @ local[:3, :3], scale * rotation @ local[:3, 3] + shift))
            focals.append(focal)
    return torch.stack([world[view] for view in range(found.views)]), torch.stack(poses), torch.stack(focals)


def _own_focal(found: Predictions, pairs: Sequence[int]) -> Tensor:
    """The median focal length that the first maps of these pairs imply."""
    return torch.stack([focal_of(found.pts1[k], _weights(found.conf1[k])) for k in pairs]).median()


def _from_poses(found: Predictions, poses: Tensor, focals: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The same where poses are known: the pose that a pair's second map implies gives its baseline, thus its scale."""
    first = {view: [k for k, (i, _) in enumerate(found.edges) if i == view] for view in range(found.views)}
    known = {view: _own_focal(found, own) for view, own in first.items() if own}
    if focals is not None:
        known = dict(enumerate(focals))
    scales, baselines = [], []
    for k, (i, j) in enumerate(found.edges):
        weight = _weights(found.conf2[k])
        if j in known:
            local, _ = pose_of(found.pts2[k], weight, known[j])
        else:
            local, known[j] = pose_and_focal(found.pts2[k], weight)
        baselines.append((poses[j, :3, 3] - poses[i, :3, 3]).norm())
        scales.append(baselines[-1] / local[:3, 3].norm().clamp_min(1e-6))
    world = []
    for view, own in first.items():
        sides = [(k, 0) for k in own] or [(k, 1) for k, (_, j) in enumerate(found.edges) if j == view]
        k, side = max(sides, key=lambda one: float(baselines[one[0]]))  # a long baseline tells the scale best
        points = (found.pts1, found.pts2)[side][k].flatten(0, 1) * scales[k]
        world.append(placed(poses[found.edges[k][0]][None], points[None])[0])
    return torch.stack(world), poses, torch.stack([known[view] for view in range(found.views)])


def _pose(rotation: Tensor, shift: Tensor) -> Tensor:
    pose = torch.eye(4, dtype=rotation.dtype, device=rotation.device)
    pose[:3, :3], pose[:3, 3] = rotation, shift
    return pose


def _turned(base: Tensor, tangent: Tensor) -> Tensor:
    """Rotations `base` (m, 3, 3) turned by rotation vectors (m, 3)."""
    x, y, z = tangent.unbind(-1)
    zero = torch.zeros_like(x)
    skew = torch.stack((zero, -z, y, z, zero, -x, -y, x, zero), -1).view(-1, 3, 3)
    turned: Tensor = torch.linalg.matrix_exp(skew) @ base
    return turned


class _Problem:
    """The variables, their start and the loss. Lengths are in units of the scene's median depth."""

    def __init__(
        self, found: Predictions, world: Tensor, poses: Tensor, focals: Tensor,
        known_poses: Tensor | None, known_focals: Tensor | None,
    ) -> None:  # fmt: skip
        self.found, (height, width) = found, found.size
        every = max(1, round((height * width / SAMPLES) ** 0.5))
        # The grid's middle lies on the image's, or near it.
        rows, columns = (torch.arange(every // 2, side, every) for side in (height, width))
        self.at = (rows[:, None] * width + columns).flatten().to(world.device)
        self.i, self.j = (torch.tensor(side, device=world.device) for side in zip(*found.edges, strict=True))
        local = ((world - poses[:, None, :3, 3]) @ poses[:, :3, :3])[:, :, 2]
        ahead = local[local > 0]
        self.unit = (ahead if len(ahead) else local.abs()).median()
        self.rotation, self.centre = poses[:, :3, :3], poses[:, :3, 3] / self.unit
        self.pixels = rays(found.size, world.new_ones(())).view(-1, 3)[self.at, :2]
        self.pairs = [part.flatten(1, 2)[:, self.at] for part in (found.pts1, found.pts2)]
        self.weights = [_weights(part).flatten(1)[:, self.at] for part in (found.conf1, found.conf2)]
        source, target = torch.cat(self.pairs, 1), torch.cat((world[self.i][:, self.at], world[self.j][:, self.at]), 1)
        scale, self.pair_rotation, shift = similarity(source, target / self.unit, torch.cat(self.weights, 1))
        depth = (local[:, self.at] / self.unit).clamp_min(0.01)
        zeros = poses.new_zeros
        self.turn, self.move, self.log_depth = zeros(len(poses), 3), zeros(len(poses), 3), depth.log()
        self.log_focal = focals.log() / FOCAL_SHARE
        self.pair_turn, self.pair_shift, self.log_scale = zeros(len(scale), 3), shift, scale.clamp_min(1e-6).log()
        self.first_log_scale = self.log_scale.clone()
        free = [self.log_depth, self.pair_turn, self.pair_shift, self.log_scale]
        free += [] if known_poses is not None else [self.turn, self.move]
        free += [] if known_focals is not None else [self.log_focal]
        self.free = [one.requires_grad_() for one in free]
        self.total = sum(float(weight.sum()) for weight in self.weights)

    def cameras(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rotations, centres and focal lengths."""
        return _turned(self.rotation, self.turn), self.centre + self.move, (self.log_focal * FOCAL_SHARE).exp()

    def moved(self, points: Tensor) -> Tensor:
        """Pairs' points (E, ..., 3) in the world."""
        turned = points.flatten(1, -2) @ _turned(self.pair_rotation, self.pair_turn).transpose(1, 2)
        return (self.log_scale.exp()[:, None, None] * turned + self.pair_shift[:, None]).view(points.shape)

    def loss(self) -> Tensor:
        """Mean weighted distance, of each pair relative to how it was scaled since the start: distances in the world
        would be least where everything has shrunk.
        """
        rotation, centre, focal = self.cameras()
        xy = self.pixels / focal[:, None, None]
        look = F.pad(xy, (0, 1), value=1.0)
        world = (self.log_depth.exp()[..., None] * look) @ rotation.transpose(1, 2) + centre[:, None]
        parts = zip((self.i, self.j), self.pairs, self.weights, strict=True)
        errors = [((world[view] - self.moved(points)).norm(dim=-1) * own).sum(1) for view, points, own in parts]
        shrunk = (self.first_log_scale - self.log_scale).exp()
        mean: Tensor = ((errors[0] + errors[1]) * shrunk).sum() / self.total
        return mean

    def solve(self, steps: int) -> Reconstruction:
        """Adam with a linear decay, then all depths."""
        optimizer = torch.optim.Adam(self.free, lr=STEP, betas=(0.9, 0.9), foreach=True)
        first = last = float("nan")
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = STEP * (1 - step / steps)
            optimizer.zero_grad()
            loss = self.loss()
            torch.autograd.backward(loss)
            optimizer.step()
            first, last = (loss.item() if step == 0 else first), loss.item() if step == steps - 1 else last
        with torch.no_grad():
            return self.scene((first, last))

    def scene(self, loss: tuple[float, float]) -> Reconstruction:
        """Depths of all pixels: along each ray the weighted mean of what all pairs say, in the input's unit."""
        rotation, centre, focal = self.cameras()
        look = rays(self.found.size, focal)
        total, weight = torch.zeros_like(look[..., 0]), torch.full_like(look[..., 0], 1e-6)
        confidence = torch.zeros_like(weight)
        sides = ((self.i, self.found.pts1, self.found.conf1), (self.j, self.found.pts2, self.found.conf2))
        for view, points, conf in sides:
            moved = self.moved(points)
            for k, v in enumerate(view.tolist()):
                local = (moved[k] - centre[v]) @ rotation[v]
                along = (local * look[v]).sum(-1) / look[v].square().sum(-1)
                own = _weights(conf[k]) + 1e-6
                total[v] += own * along
                weight[v] += own
                confidence[v] = torch.maximum(confidence[v], conf[k])
        poses = torch.stack([_pose(r, c * self.unit) for r, c in zip(rotation, centre, strict=True)])
        return Reconstruction(poses, focal, (total / weight).clamp_min(1e-6) * self.unit, confidence, loss)
