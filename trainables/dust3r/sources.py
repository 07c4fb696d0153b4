"""Where pairs of images with exact geometry come from: rooms that are rendered, or recordings on disk.

A batch of B pairs: image (B, 2, 3, H, W) uint8; points (B, 2, H, W, 3) float32, metres in the first camera's frame, NaN
where the depth is unknown; pose (B, 4, 4), camera 2 in camera 1; intrinsics (B, 2, 3, 3), pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from trainables.config import WorkloadSettings
from trainables.domain import Batch
from trainables.dust3r import pairs, rooms
from trainables.dust3r.pairs import Edges, SceneGraph
from trainables.dust3r.recordings import Recordings


class Source(Protocol):
    """Pairs by split and index; no scene and no frame is in two splits."""

    def pairs(self, split: str, indices: Tensor) -> Batch:
        """The pairs `indices` of 'train', 'val' or 'test'."""

    def identity(self, split: str) -> str:
        """Changes with the files that the split's pairs come from; empty where code alone decides."""

    def sampled(self) -> dict[str, Any]:
        """The workload's sampled pairs, as plain data for its file. InputError where there are too few of any kind."""

    def images(self) -> Tensor:
        """The sampled pairs' images, (sampled_pairs, 2, 3, H, W) uint8."""

    def scene(self) -> SceneGraph:
        """The first scene of the test split: of its views, at most `scene_views` that its pair graph joins."""


def source(workload: WorkloadSettings, seed: int, train_pairs: int) -> Source:
    """What the workload says. seed: of the training pairs, of which so many distinct ones are needed."""
    if workload.data == "rooms":
        return Rooms(workload, seed)
    return Recordings(Path(workload.data), workload, seed, train_pairs)


class Rooms:
    """Procedural rooms: as many pairs as are asked for, each in a room of its own."""

    def __init__(self, workload: WorkloadSettings, seed: int) -> None:
        self.workload, self.seed = workload, seed

    def pairs(self, split: str, indices: Tensor) -> Batch:
        """One pair of views per room."""
        seed = self.seed if split == "train" else self.workload.workload_seed
        views = rooms.render(seed, split, indices, 2, self.workload.height_width)
        pose = torch.linalg.inv(views.pose[:, 0]) @ views.pose[:, 1]
        intrinsics = views.intrinsics[:, None].expand(-1, 2, 3, 3)
        return {"image": views.image, "points": views.points, "pose": pose, "intrinsics": intrinsics}

    def identity(self, split: str) -> str:
        """Empty."""
        return ""

    def sampled(self) -> dict[str, Any]:
        """Edges (room, view, view)."""
        scene = self.scene()
        return {
            "pairs (scene, view, view)": [list(edge) for edge in self.edges()],
            "scene": {"views": scene.names, "pairs": [list(edge) for edge in scene.edges]},
        }

    def edges(self) -> list[tuple[int, int, int]]:
        """`sampled_pairs` edges (room, i, j) drawn without replacement with `workload_seed` from the pair graphs.

        The rooms follow those of the test pairs, so that none serves twice; there are as many as give each at most
        `views_per_scene` pairs.
        """
        w = self.workload
        count = -(-w.sampled_pairs // w.views_per_scene)
        views = self._views(torch.arange(w.test_pairs, w.test_pairs + count))
        edges: list[tuple[int, int, int]] = []
        for row in range(count):
            edges += [(w.test_pairs + row, i, j) for i, j in self._graph(views, row)]
        chosen = np.random.default_rng(w.workload_seed).permutation(len(edges))[: w.sampled_pairs]
        return [edges[k] for k in sorted(chosen)]

    def images(self) -> Tensor:
        """The images of :meth:`edges`."""
        edges = self.edges()
        scenes = torch.tensor(sorted({scene for scene, _, _ in edges}))
        views = self._views(scenes)
        row = {int(scene): k for k, scene in enumerate(scenes)}
        return torch.stack([views.image[row[scene], [i, j]] for scene, i, j in edges])

    def scene(self) -> SceneGraph:
        """The first room of :meth:`edges`."""
        room = self.workload.test_pairs
        views = self._views(torch.tensor([room]))
        at, edges = pairs.chained(self._graph(views, 0), self.workload.scene_views)
        pose = (torch.linalg.inv(views.pose[0, at[:1]]) @ views.pose[0, at]).float()
        intrinsics = views.intrinsics.expand(len(at), 3, 3)
        return SceneGraph([f"room {room}, view {k}" for k in at], views.image[0, at], edges, pose, intrinsics)

    def _graph(self, views: rooms.Views, row: int) -> Edges:
        """The directed pairs of a room's views."""
        w = self.workload
        if w.pair_graph != "nearest":
            return sorted(pairs.symmetrised(pairs.graph(w.pair_graph, w.views_per_scene)))
        to_first = torch.linalg.inv(views.pose[row, :1]) @ views.pose[row]
        share = pairs.covisibility(views.points[row], to_first, views.depth[row], views.intrinsics[row])
        return pairs.nearest(share, w.neighbours)

    def _views(self, scenes: Tensor) -> rooms.Views:
        w = self.workload
        return rooms.render(w.workload_seed, "test", scenes, w.views_per_scene, w.height_width)
