"""Scenes: images encoded once against once per pair, and the alignment's pace and accuracy. Prints ratios.

    python benchmarks/scenes.py [--rounds 9] [--sample FOLDER]

Encoding: 10 images of a room, complete graph both ways, shipped teacher, CPU time of one thread, in turn. Alignment: 4
images of 224 x 168, 12 pairs; with --sample (a recording in 7-Scenes' layout with frames 0, 54, 108 and 162) exact
pointmaps with 2 % noise in a unit of each pair's own, without it a room's. Reach: 1.9 times as fast; at most half of
75 ms a step; camera centres within 5 mm, focal lengths within 1 %.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engines.errors import InputError, command_line
from trainables.checkpoint import read_model
from trainables.dust3r.align import STEPS, Predictions, align, placed
from trainables.dust3r.domain import SHIPPED
from trainables.dust3r.frames import fit, points
from trainables.dust3r.geometry import rays
from trainables.dust3r.model import from_reference_config
from trainables.dust3r.readers import layouts
from trainables.dust3r.rooms import render
from trainables.dust3r.scene import BATCH, predict
from trainables.dust3r.scene_report import trajectory_error

SIZE, FRAMES = (168, 224), tuple(f"frame-{number:06d}" for number in (0, 54, 108, 162))
KNOWN_MS = 75.0  # of a step of the published alignment on one core, at 4 images, 12 pairs, 224 x 168
Scene = tuple[Tensor, Tensor, float]  # points (n, H, W, 3) in each camera's frame, poses (n, 4, 4), focal length


def complete(count: int) -> list[tuple[int, int]]:
    """All directed pairs."""
    return [(i, j) for i in range(count) for j in range(count) if i != j]


def encoding(rounds: int) -> list[float]:
    """CPU seconds of every pair encoding its images, over those of each image encoded once; sorted."""
    config, weights = read_model(SHIPPED)
    model = from_reference_config(**config)
    model.load_state_dict(weights)
    model.eval()
    images, edges = render(5, "test", torch.tensor([3]), 10, (64, 64)).image[0].float() / 127.5 - 1, complete(10)

    @torch.no_grad()
    def per_pair() -> None:
        for batch in torch.split(torch.tensor(edges), BATCH):
            model.pointmaps(images[batch[:, 0]], images[batch[:, 1]])

    ratios = []
    for turn in range(rounds + 1):
        start = time.process_time()
        predict(model, images, edges)
        middle = time.process_time()
        per_pair()
        if turn:  # the first warms up
            ratios.append((time.process_time() - middle) / (middle - start))
    return sorted(ratios)


def room() -> Scene:
    """Four views of a room at SIZE."""
    views = render(5, "test", torch.tensor([3]), 4, SIZE)
    focal = float(views.intrinsics[0, 0, 0])
    poses = torch.linalg.inv(views.pose[0, :1]) @ views.pose[0]
    return rays(SIZE, torch.tensor(focal)) * views.depth[0][..., None], poses.float(), focal


def recorded(folder: Path) -> Scene:
    """FRAMES of a recording."""
    scenes = [scene for scene in layouts.scenes(folder)[1] if set(FRAMES) <= set(scene.frames)]
    if not scenes:
        raise InputError(f"--sample {folder}: no recording with {', '.join(FRAMES)}; leave it out to use a room")
    frames = [fit(scenes[0].read(name), SIZE) for name in FRAMES]
    local, poses = (
        np.stack(part).astype(np.float32) for part in zip(*((points(f), f.pose) for f in frames), strict=True)
    )
    return torch.from_numpy(local), torch.from_numpy(poses), float(frames[0].intrinsics[0, 0])


def noisy(scene: Scene, seed: int) -> Predictions:
    """What a network with 2 % noise would say of all pairs; unknown pixels have no confidence."""
    local, poses, _ = scene
    g, parts = torch.Generator().manual_seed(seed), []
    for i, j in complete(len(poses)):
        move, unit = torch.linalg.inv(poses[i]) @ poses[j], 0.5 + 1.5 * torch.rand((), generator=g)
        maps = [local[i] * unit, placed(move[None], local[[j]])[0] * unit]
        maps = [m + 0.02 * m.norm(dim=-1, keepdim=True) * torch.randn(m.shape, generator=g) for m in maps]
        conf = [torch.where(local[view][..., 2] > 0, 4.0, 1.0) for view in (i, j)]
        parts.append((maps[0], conf[0], maps[1], conf[1]))
    return Predictions(complete(len(poses)), *(torch.stack(part) for part in zip(*parts, strict=True)))


@command_line
def main(arguments: list[str] | None = None) -> None:
    """Print both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds of encoding (default 9)")
    parser.add_argument("--sample", type=Path, help="a recording in 7-Scenes' layout; default: a room")
    given = parser.parse_args(arguments)
    if given.rounds < 1:
        raise InputError(f"--rounds {given.rounds}: expected 1 or more")
    torch.set_num_threads(1)
    scene = recorded(given.sample) if given.sample else room()
    ratios = encoding(given.rounds)
    print(f"each image encoded once: {statistics.median(ratios):.2f} times as fast as per pair "
          f"({ratios[0]:.2f} to {ratios[-1]:.2f} in {len(ratios)} rounds)")  # fmt: skip
    for seed in (0, 1):
        found = noisy(scene, seed)
        align(found, steps=1)
        times = [time.process_time()]
        for steps in (1, STEPS):
            result = align(found, steps=steps)
            times.append(time.process_time())
        per_step = 1000 * ((times[2] - times[1]) - (times[1] - times[0])) / (STEPS - 1)
        error, focal = trajectory_error(result.poses, scene[1]), (result.focals / scene[2] - 1).abs().max()
        print(f"alignment, noise {seed}: {per_step:.1f} ms a step, {KNOWN_MS / per_step:.1f} times as fast as "
              f"{KNOWN_MS:g} ms; centres {1000 * error:.1f} mm, focal lengths {focal:.2%}")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
