"""The workload's pairs: a pair graph (K nearest views by covisibility) over test scenes and a sample of its edges."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trainables.config import WorkloadSettings
from trainables.dust3r import rooms


def covisibility(points: Tensor, pose: Tensor, depth: Tensor, intrinsics: Tensor) -> Tensor:
    """(V, V): share of view i's pixels that view j sees, by reprojecting depth.

    points: (V, H, W, 3) in one common frame; pose: (V, 4, 4) camera to that frame; depth: (V, H, W), z-depth in
    metres; intrinsics: (3, 3). A pixel is seen where it falls into view j at no more than 1.05 x the depth there.
    """
    views, height, width, _ = points.shape
    share = torch.zeros(views, views)
    flat = points.reshape(-1, 3)
    for j in range(views):
        local = (flat - pose[j, :3, 3]) @ pose[j, :3, :3]
        z = local[:, 2].clamp_min(1e-6)
        u = (local[:, 0] / z * intrinsics[0, 0] + intrinsics[0, 2]).floor().long()
        v = (local[:, 1] / z * intrinsics[1, 1] + intrinsics[1, 2]).floor().long()
        inside = (local[:, 2] > 0) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
        there = depth[j][v.clamp(0, height - 1), u.clamp(0, width - 1)]
        share[:, j] = (inside & (z <= 1.05 * there)).float().view(views, -1).mean(1)
    return share


def nearest(share: Tensor, neighbours: int) -> list[tuple[int, int]]:
    """Directed edges (i, j): every view with its `neighbours` most covisible others, symmetrised, sorted."""
    score = torch.minimum(share, share.T).fill_diagonal_(-1.0)
    edges = {(i, int(j)) for i in range(len(share)) for j in score[i].topk(neighbours).indices}
    return sorted(edges | {(j, i) for i, j in edges})


def sampled(workload: WorkloadSettings) -> list[tuple[int, int, int]]:
    """`sampled_pairs` edges (scene, i, j) drawn without replacement with `workload_seed` from the pair graphs.

    The scenes follow those of the test pairs, so that none serves twice; there are as many as give each at most
    `views_per_scene` pairs.
    """
    count = -(-workload.sampled_pairs // workload.views_per_scene)
    scenes = torch.arange(workload.test_pairs, workload.test_pairs + count)
    views = rooms.render(workload.workload_seed, "test", scenes, workload.views_per_scene, workload.height_width)
    to_first = torch.linalg.inv(views.pose[:, :1]) @ views.pose
    edges: list[tuple[int, int, int]] = []
    for row, scene in enumerate(scenes.tolist()):
        share = covisibility(views.points[row], to_first[row], views.depth[row], views.intrinsics[row])
        edges += [(scene, i, j) for i, j in nearest(share, workload.neighbours)]
    chosen = np.random.default_rng(workload.workload_seed).permutation(len(edges))[: workload.sampled_pairs]
    return [edges[k] for k in sorted(chosen)]


def images(workload: WorkloadSettings) -> Tensor:
    """The sampled pairs' images, (sampled_pairs, 2, 3, H, W) uint8."""
    edges = sampled(workload)
    scenes = torch.tensor(sorted({scene for scene, _, _ in edges}))
    views = rooms.render(workload.workload_seed, "test", scenes, workload.views_per_scene, workload.height_width)
    row = {int(scene): k for k, scene in enumerate(scenes)}
    return torch.stack([views.image[row[scene], [i, j]] for scene, i, j in edges])
