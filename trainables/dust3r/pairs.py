"""Pair graphs: which images of a scene are paired. Edges (i, j) are indices of images, i the first view."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engines.errors import InputError
from trainables.config import PAIR_GRAPHS

Edges = list[tuple[int, int]]

DISTINCT = (0.0, 1.0)
_WINDOWED = re.compile(r"(swin|logwin)(?:-(\d+))?(-noncyclic)?")
_REFERENCE = re.compile(r"oneref(?:-(\d+))?")
_FILTER = re.compile(r"(seq|cyc)(\d+)")


@dataclass(frozen=True)
class SceneGraph:
    """Images of one scene, its directed pair graph, and the truth.

    names: of the images; image (n, 3, H, W) uint8; edges: pairs of their numbers; pose (n, 4, 4) float32, camera to
    the first camera, metres; intrinsics (n, 3, 3) float32, pixels; skipped: names of frames that could not be used,
    with the reason.
    """

    names: list[str]
    image: Tensor
    edges: Edges
    pose: Tensor
    intrinsics: Tensor
    skipped: Mapping[str, str] = field(default_factory=dict)


def covisibility(points: Tensor, pose: Tensor, depth: Tensor, intrinsics: Tensor) -> Tensor:
    """(V, V): share of view i's pixels with a depth that view j sees, by reprojecting depth.

    points: (V, H, W, 3) in one common frame; pose: (V, 4, 4) camera to that frame; depth: (V, H, W), z-depth in
    metres, 0 = unknown; intrinsics: (3, 3) or one per view, (V, 3, 3). A pixel is seen where it falls into view j at no
    more than 1.05 x the depth there.
    """
    views, height, width, _ = points.shape
    share = torch.zeros(views, views)
    flat, known = points.reshape(-1, 3), (depth > 0).view(views, -1)
    cameras = intrinsics.expand(views, 3, 3)
    for j, k in enumerate(cameras):
        local = (flat - pose[j, :3, 3]) @ pose[j, :3, :3]
        z = local[:, 2].clamp_min(1e-6)
        u = (local[:, 0] / z * k[0, 0] + k[0, 2]).floor().long()
        v = (local[:, 1] / z * k[1, 1] + k[1, 2]).floor().long()
        inside = (local[:, 2] > 0) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
        there = depth[j][v.clamp(0, height - 1), u.clamp(0, width - 1)]
        seen = (inside & (z <= 1.05 * there)).view(views, -1) & known
        share[:, j] = seen.sum(1) / known.sum(1).clamp_min(1)
    return share


def nearest(share: Tensor, neighbours: int, overlap: tuple[float, float] = DISTINCT) -> Edges:
    """Directed edges: every view with its `neighbours` most covisible others, symmetrised, sorted.

    share: as :func:`covisibility` gives. Two views whose weaker direction lies outside of `overlap` are not paired.
    """
    score = torch.minimum(share, share.T).fill_diagonal_(-1.0)
    fits = (score >= overlap[0]) & (score <= overlap[1])
    score = torch.where(fits, score, -1.0)
    most = min(neighbours, len(share) - 1)
    edges = {(i, int(j)) for i in range(len(share)) for j in score[i].topk(most).indices if score[i, j] >= 0}
    return sorted(edges | {(j, i) for i, j in edges})


def graph(kind: str, count: int) -> Edges:
    """Undirected edges of `count` images in the order of capture, each once; no image is paired with itself.

    complete: all, (i, j) with i > j. swin-K: each with the next K (3), around the end unless -noncyclic. logwin-K: each
    with those 1, 2, 4, ..., 2^(K-1) away (K = 3), likewise. oneref-I: image I (0) with every other.
    """
    if kind == "complete":
        return [(i, j) for i in range(count) for j in range(i)]
    if found := _REFERENCE.fullmatch(kind):
        reference = int(found[1] or 0)
        if reference >= count:
            raise InputError(f"pair_graph={kind}: there are {count} images, numbered from 0")
        return [(reference, j) for j in range(count) if j != reference]
    if not (found := _WINDOWED.fullmatch(kind)):
        raise InputError(f"pair_graph={kind!r} is unknown, use {PAIR_GRAPHS}")
    size, cyclic = int(found[2] or 3), not found[3]
    steps = range(1, size + 1) if found[1] == "swin" else [2**k for k in range(size)]
    edges: dict[tuple[int, int], None] = {}
    for i in range(count):
        for step in steps:
            j = (i + step) % count if cyclic else i + step
            if j < count and j != i:
                edges[min(i, j), max(i, j)] = None
    return list(edges)


def symmetrised(edges: Edges) -> Edges:
    """The edges, then each the other way round."""
    return [*edges, *((j, i) for i, j in edges)]


def prefiltered(edges: Iterable[tuple[int, int]], rule: str, count: int) -> Edges:
    """Edges of images at most N apart: 'seqN' in the order of capture, 'cycN' also around the end of `count` images."""
    found = _FILTER.fullmatch(rule)
    if not found:
        raise InputError(f"pair filter {rule!r} is unknown, use seqN or cycN")
    most = int(found[2])

    def apart(i: int, j: int) -> int:
        gap = abs(i - j)
        return min(gap, count - gap) if found[1] == "cyc" else gap

    return [(i, j) for i, j in edges if apart(i, j) <= most]


def chained(edges: Edges, most: int) -> tuple[list[int], Edges]:
    """At most `most` images that chains of pairs join, of the largest such group, and the edges among them.

    The images in their order; an edge holds positions in that list.
    """
    beside: dict[int, set[int]] = {}
    for i, j in edges:
        beside.setdefault(i, set()).add(j)
        beside.setdefault(j, set()).add(i)
    groups = []
    for start in sorted(beside):
        group = [start]
        for image in group:  # grows on the way
            group += sorted(beside[image].difference(group))
        groups.append(sorted(group[:most]))
    images = max(groups, key=len)
    at = {image: k for k, image in enumerate(images)}
    return images, [(at[i], at[j]) for i, j in edges if i in at and j in at]
