"""Pairs from RGB-D recordings: scenes are split, frames picked and checked, pairs taken from each scene's pair graph.

Splits follow the layout where it names them. Else a tenth of the places is for testing and a tenth for validation; with
fewer than three places the recordings of a place are told apart; with fewer than three recordings each is cut into
blocks of frames in the order of capture, 60 % for training, then 20 % and 20 %. Frames that cannot be used are left out
and listed in `skipped`.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engines.errors import InputError
from trainables.config import WorkloadSettings
from trainables.domain import Batch
from trainables.dust3r import pairs
from trainables.dust3r.frames import BrokenFrame, Frame, Scene, fit, points
from trainables.dust3r.pairs import SceneGraph
from trainables.dust3r.readers import layouts

OVERLAP = (0.2, 0.9)  # share of a view's pixels that the other one sees, the lesser of both directions
SHARE = 0.1  # of the places that testing and validation get each
BLOCKS = {"train": (0.0, 0.6), "val": (0.6, 0.8), "test": (0.8, 1.0)}
COARSE = 64  # pixels across in which overlaps are counted
KEPT_FRAMES = 64  # in memory

Splits = dict[str, list[Scene]]


@dataclass(frozen=True)
class Link:
    """Two frames of a scene."""

    scene: Scene
    first: str
    second: str

    @property
    def names(self) -> list[str]:
        """As plain data."""
        return [self.scene.name, self.first, self.second]


@dataclass(frozen=True)
class Listing:
    """links: a split's pairs in their order. content: hash of all that the frames hold. frames: how many there are."""

    links: Sequence[Link]
    content: str
    frames: int


class Recordings:
    """Pairs of a folder's recordings, see :class:`trainables.dust3r.sources.Source`."""

    def __init__(self, folder: Path, workload: WorkloadSettings, seed: int, train_pairs: int) -> None:
        self.folder, self.workload, self.seed = folder, workload, seed
        w = workload
        self._need = {"train": train_pairs, "val": w.val_pairs, "test": max(w.test_pairs, -(-w.sampled_pairs // 2))}
        self._listed: dict[str, Listing] = {}
        self.skipped: dict[str, str] = {}
        self._frame = lru_cache(KEPT_FRAMES)(self._read)

    @cached_property
    def _layout(self) -> tuple[str, Splits]:
        name, scenes = layouts.scenes(self.folder)
        return name, splits(scenes, self.workload.workload_seed)

    def pairs(self, split: str, indices: Tensor) -> Batch:
        """Pairs by index; behind the last one they begin anew."""
        links = self.listing(split).links
        return _stacked([self._pair(links[int(k) % len(links)]) for k in indices])

    def identity(self, split: str) -> str:
        """Hash of every frame of the split as it is used: pixels, depths, intrinsics, pose, and of the pairs."""
        return self.listing(split).content

    def sampled(self) -> dict[str, Any]:
        """Frames and hashes of the fixed splits, the sampled pairs by name, and what was skipped."""
        self._check()
        if self.skipped:
            print(f"warning: data={self.folder}: {self._lost()}; workload.yaml lists them", file=sys.stderr)
        fixed = {split: self.listing(split) for split in ("val", "test")}
        scene = self.scene()
        return {
            "pairs (scene, frame, frame)": [link.names for link in self._sample()],
            "scene": {"views": scene.names, "pairs": [list(edge) for edge in scene.edges]},
            "frames": {split: listing.frames for split, listing in fixed.items()},
            "frames_hash": {split: listing.content for split, listing in fixed.items()},
            "skipped_frames": dict(sorted(self.skipped.items())),
        }

    def images(self) -> Tensor:
        """The sampled pairs' images, (sampled_pairs, 2, 3, H, W) uint8."""
        return torch.stack([self._pair(link)["image"] for link in self._sample()])

    def scene(self) -> SceneGraph:
        """The first scene of the test split that has a pair; InputError where none has."""
        scenes = self._layout[1]["test"]
        for number in np.random.default_rng(self.workload.workload_seed).permutation(len(scenes)):
            usable = self._usable(scenes[number])
            links = self._links(usable)
            if links:
                break
        else:
            raise self._nothing("test", len(scenes))
        number_of = {name: k for k, name in enumerate(usable.frames)}
        graph = sorted(pairs.symmetrised([(number_of[link.first], number_of[link.second]) for link in links]))
        at, edges = pairs.chained(graph, self.workload.scene_views)
        names = [usable.frames[k] for k in at]
        found = [self._frame(usable, name) for name in names]
        pose = np.stack([np.linalg.inv(found[0].pose) @ frame.pose for frame in found]).astype(np.float32)
        image = np.stack([frame.image for frame in found]).transpose(0, 3, 1, 2)
        intrinsics = np.stack([frame.intrinsics for frame in found]).astype(np.float32)
        arrays = (torch.from_numpy(np.ascontiguousarray(array)) for array in (image, pose, intrinsics))
        images, poses, cameras = arrays
        there = (f"{usable.name}/{name}" for name in scenes[number].frames)
        skipped = {name: self.skipped[name] for name in there if name in self.skipped}
        return SceneGraph([f"{usable.name}/{name}" for name in names], images, edges, poses, cameras, skipped)

    def _sample(self) -> list[Link]:
        """`sampled_pairs` directed pairs of the test split, without replacement."""
        links = self.listing("test").links
        both = [*links, *(Link(link.scene, link.second, link.first) for link in links)]
        chosen = np.random.default_rng(self.workload.workload_seed).permutation(len(both))
        return [both[k] for k in sorted(chosen[: self.workload.sampled_pairs])]

    def _check(self) -> None:
        """InputError that names every number of pairs that the recordings cannot give."""
        have = {split: len(self.listing(split).links) for split in BLOCKS}
        asked = {"train_samples": (2 * have["train"], 2 * self._need["train"])}
        asked |= {
            f"{split}_pairs": (have[split], getattr(self.workload, f"{split}_pairs")) for split in ("val", "test")
        }
        asked["sampled_pairs"] = (2 * have["test"], self.workload.sampled_pairs)
        few = [f"{key}={want}: {got} there (--set {key}={got})" for key, (got, want) in asked.items() if got < want]
        if few:
            raise InputError(
                f"data={self.folder} ({self._layout[0]}) has too few pairs for {'; '.join(few)}; {self._lost()}. More "
                f"views_per_scene={self.workload.views_per_scene}, neighbours={self.workload.neighbours} or "
                f"pair_graph=complete may give more"
            )

    def listing(self, split: str) -> Listing:
        """The pairs of a split: scenes are taken in an order of the seed until there are enough."""
        if split not in self._listed:
            self._listed[split] = self._list(split)
        return self._listed[split]

    def _list(self, split: str) -> Listing:
        seed = self.seed if split == "train" else self.workload.workload_seed
        order, digest, used = np.random.default_rng(seed), hashlib.sha256(), 0
        links: list[Link] = []
        scenes = self._layout[1][split]
        for number in order.permutation(len(scenes)):
            scene = self._usable(scenes[number])
            links += self._links(scene)
            used += len(scene.frames)
            for name in scene.frames:
                frame = self._frame(scene, name)
                digest.update(f"{scene.name}\0{name}\0{frame.image.shape}".encode())
                for array in (frame.image, frame.depth, frame.intrinsics, frame.pose):
                    digest.update(np.ascontiguousarray(array).tobytes())
            if len(links) >= self._need[split]:
                break
        if not links:
            raise self._nothing(split, len(scenes))
        chosen = [links[k] for k in order.permutation(len(links))[: self._need[split]]]
        digest.update(repr([link.names for link in chosen]).encode())
        return Listing(chosen, digest.hexdigest()[:16], used)

    def _nothing(self, split: str, scenes: int) -> InputError:
        return InputError(
            f"data={self.folder} ({self._layout[0]}): no pair for {split} in {scenes} scenes, "
            f"{self._lost()}; give other frames, or another size by --set image_size= (now {self.workload.image_size})"
        )

    def _lost(self) -> str:
        """How many frames were skipped, and why the first two were."""
        some = "; ".join(f"{name}: {reason}" for name, reason in list(self.skipped.items())[:2])
        return f"{len(self.skipped)} frames skipped{some and f' ({some})'}"

    def _usable(self, scene: Scene) -> Scene:
        """`views_per_scene` evenly spaced frames of a scene, or those of some of its own pairs, less the broken."""
        w = self.workload
        own = scene.pairs if w.pair_graph == "nearest" else None
        if own is not None:
            most = w.views_per_scene * w.neighbours // 2
            own = [own[k] for k in _spread(len(own), most)]
            picked = sorted({number for pair in own for number in pair})
        else:
            picked = _spread(len(scene.frames), w.views_per_scene)
        good = [number for number in picked if self._sound(scene, scene.frames[number])]
        at = {number: k for k, number in enumerate(good)}
        kept = None if own is None else [(at[a], at[b]) for a, b in own if a in at and b in at]
        return replace(scene, frames=tuple(scene.frames[number] for number in good), pairs=kept)

    def _sound(self, scene: Scene, name: str) -> bool:
        try:
            self._frame(scene, name)
        except BrokenFrame as error:
            self.skipped[f"{scene.name}/{name}"] = str(error)
            return False
        return True

    def _links(self, scene: Scene) -> list[Link]:
        """A usable scene's pairs, each once."""
        w, count = self.workload, len(scene.frames)
        if scene.pairs is not None:
            edges = list(scene.pairs)
        elif count < 2:
            edges = []
        elif w.pair_graph == "nearest":
            share = pairs.covisibility(*_coarse([self._frame(scene, name) for name in scene.frames]))
            edges = [(i, j) for i, j in pairs.nearest(share, w.neighbours, OVERLAP) if i < j]
        else:
            edges = pairs.graph(w.pair_graph, count)
        return [Link(scene, scene.frames[i], scene.frames[j]) for i, j in edges]

    def _read(self, scene: Scene, name: str) -> Frame:
        return fit(scene.read(name), self.workload.height_width)

    def _pair(self, link: Link) -> Batch:
        first, second = (self._frame(link.scene, name) for name in (link.first, link.second))
        pose = np.linalg.inv(first.pose) @ second.pose
        seen = [points(first), points(second) @ pose[:3, :3].T + pose[:3, 3]]
        for frame, there in zip((first, second), seen, strict=True):
            there[frame.depth == 0] = np.nan
        images = np.stack([first.image, second.image]).transpose(0, 3, 1, 2)
        return {
            "image": torch.from_numpy(np.ascontiguousarray(images)),
            "points": torch.from_numpy(np.stack(seen).astype(np.float32)),
            "pose": torch.from_numpy(pose.astype(np.float32)),
            "intrinsics": torch.from_numpy(np.stack([first.intrinsics, second.intrinsics]).astype(np.float32)),
        }


def splits(scenes: Sequence[Scene], seed: int) -> Splits:
    """Scenes by split, as the module says; the seed decides which places are for testing where the layout does not."""
    keys: list[Callable[[Scene], str]] = [lambda scene: scene.place or scene.name, lambda scene: scene.name]
    for key in keys:
        tests = {key(scene) for scene in scenes if scene.split == "test"}
        rest = sorted({key(scene) for scene in scenes} - tests, key=lambda name: _digest(seed, name))
        few = max(1, round(SHARE * len(rest)))
        if not tests:
            tests, rest = set(rest[:few]), rest[few:]
        if len(rest) >= 2:
            fixed = dict.fromkeys(tests, "test") | dict.fromkeys(rest[:few], "val")
            found: Splits = {split: [] for split in BLOCKS}
            for scene in scenes:
                found[fixed.get(key(scene), "train")].append(scene)
            if all(found.values()):
                return found
    return {split: [_block(scene, *part) for scene in scenes] for split, part in BLOCKS.items()}


def _block(scene: Scene, start: float, end: float) -> Scene:
    """Consecutive frames of a scene, with the pairs among them."""
    low, high = round(start * len(scene.frames)), round(end * len(scene.frames))
    inside = scene.pairs and [(a - low, b - low) for a, b in scene.pairs if low <= min(a, b) and max(a, b) < high]
    return replace(scene, frames=scene.frames[low:high], pairs=inside)


def _digest(*identity: object) -> str:
    return hashlib.sha256(repr(identity).encode()).hexdigest()


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` numbers, evenly spaced."""
    return list(range(count)) if count <= most else [k * count // most for k in range(most)]


def _coarse(frames: list[Frame]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Points in the first frame's camera, poses to it, depths and intrinsics, on every so many-th pixel."""
    step = max(1, frames[0].depth.shape[1] // COARSE)
    every = slice(step // 2, None, step)
    to_first = [np.linalg.inv(frames[0].pose) @ frame.pose for frame in frames]
    moved = [points(f)[every, every] @ p[:3, :3].T + p[:3, 3] for f, p in zip(frames, to_first, strict=True)]
    cameras = [frame.intrinsics / np.array([[step], [step], [1]]) for frame in frames]
    depths = [frame.depth[every, every] for frame in frames]
    found = (torch.from_numpy(np.stack(parts).astype(np.float32)) for parts in (moved, to_first, depths, cameras))
    at, pose, depth, intrinsics = found
    return at, pose, depth, intrinsics


def _stacked(parts: list[Batch]) -> Batch:
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
