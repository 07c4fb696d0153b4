"""A scene as it is handed out: its cloud as PLY and picture, its cameras as JSON, and how near the truth they are."""

from __future__ import annotations

import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from engines.errors import InputError
from trainables.dust3r.align import Reconstruction, align
from trainables.dust3r.geometry import similarity
from trainables.dust3r.model import DUSt3R
from trainables.dust3r.pairs import SceneGraph
from trainables.dust3r.scene import cloud, picture, predict, write_ply

FILES = ("cloud.ply", "cloud.png", "poses.json")


def write(model: DUSt3R, graph: SceneGraph, folder: Path, known_poses: bool, steps: int) -> str:
    """Reconstruct the scene on the model's device and leave FILES in the folder; what came of it, in a few lines.

    known_poses: the recorded ones are kept, and the cloud is in metres; else its unit is free. Raises InputError where
    the folder cannot be written or the pointmaps cannot be aligned.
    """
    device = next(model.parameters()).device
    images = (graph.image.float() / 127.5 - 1).to(device)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {folder}: {error.strerror}; give a folder that can be written") from None
    poses = graph.pose.to(device) if known_poses else None
    predict(model, images, graph.edges[:1])  # what runs for the first time takes longer
    start = time.perf_counter()
    pairs = predict(model, images, graph.edges)
    float(pairs.conf2.sum())  # a GPU's work is finished when a number of it has arrived here
    in_pairs = time.perf_counter() - start
    align(pairs, poses=poses, steps=1)
    start = time.perf_counter()
    found = align(pairs, poses=poses, steps=steps)
    in_all = in_pairs + time.perf_counter() - start
    points, colours = cloud(found, images)
    unit = "metres" if known_poses else "free"
    cameras = [
        {"image": name, "pose": pose, "focal": focal}
        for name, pose, focal in zip(graph.names, found.poses.tolist(), found.focals.tolist(), strict=True)
    ]
    poses_json = json.dumps({"unit": unit, "t_scene_s": in_all, "pairs": graph.edges, "cameras": cameras,
                             "skipped_frames": dict(graph.skipped)})  # fmt: skip
    try:
        with TemporaryDirectory(dir=folder, prefix=".scene") as draft:  # a file appears whole or not at all
            write_ply(Path(draft) / "cloud.ply", points, colours)
            picture(found, points, colours, unit).savefig(Path(draft) / "cloud.png")
            (Path(draft) / "poses.json").write_text(poses_json)
            for name in FILES:
                (Path(draft) / name).replace(folder / name)
    except OSError as error:
        raise InputError(f"--out {folder}: {error.strerror or error}; free some space or give another folder") from None
    return "\n".join(
        [
            f"{len(images)} images ({graph.names[0]} to {graph.names[-1]}), {len(graph.edges)} directed pairs, "
            f"poses {'given' if known_poses else 'found'}",
            *_missing(graph),
            f"t_scene {in_all:.2f} s on {device.type}: pairs {in_pairs:.2f} s, each image encoded once, "
            f"alignment {in_all - in_pairs:.2f} s ({steps} steps, loss {found.loss[0]:.3f} to {found.loss[1]:.3f})",
            _beside_truth(found, graph, known_poses),
            f"{', '.join(str(folder / name) for name in FILES)}: {len(points):,} points",
        ]
    )


def _missing(graph: SceneGraph) -> list[str]:
    """A line where frames of the recording could not be used."""
    if not graph.skipped:
        return []
    count, (name, reason) = len(graph.skipped), next(iter(graph.skipped.items()))
    more = "" if count == 1 else "; poses.json lists all"
    return [f"{count} frame{'s' if count > 1 else ''} skipped ({name}: {reason}){more}"]


def _beside_truth(found: Reconstruction, graph: SceneGraph, known_poses: bool) -> str:
    focal = float((found.focals.cpu() / graph.intrinsics[:, 0, 0] - 1).abs().max())
    said = f"focal lengths within {focal:.2%} of the recorded ones"
    if known_poses:
        return said
    error, span = trajectory_error(found.poses.cpu(), graph.pose), float(graph.pose[:, :3, 3].norm(dim=1).max())
    return f"camera centres {error:.3f} m off the recorded ones, which lie up to {span:.2f} m apart; {said}"


def trajectory_error(poses: Tensor, true: Tensor) -> float:
    """ATE: root mean square distance of camera centres (n, 4, 4) after the best similarity, in the truth's unit."""
    ours, theirs = poses[:, :3, 3], true[:, :3, 3]
    scale, rotation, shift = similarity(ours, theirs, torch.ones(len(theirs)))
    return float(np.sqrt(float((scale * ours @ rotation.T + shift - theirs).square().sum(1).mean())))
