"""A scene from images: each encoded once, every pair decoded, all aligned into one cloud; as PLY and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from engines.errors import InputError
from engines.halves import split
from engines.latency import measure
from engines.runtimes import OnnxRuntime, Runtime, torch_threads
from trainables.config import WorkloadSettings
from trainables.dust3r.align import Predictions, Reconstruction, align
from trainables.dust3r.model import DUSt3R
from trainables.dust3r.pairs import SceneGraph

BATCH = 8  # images, then pairs, that go through the model at once
MIN_CONFIDENCE = 3.0  # of points that a cloud shows; confidences start at 1


@torch.no_grad()
def predict(model: DUSt3R, images: Tensor, edges: Sequence[tuple[int, int]]) -> Predictions:
    """Pointmaps of all pairs. images (n, 3, H, W) in [-1, 1] on the model's device; edges (i, j), i the first view.

    An image is encoded once, however many pairs it is in; the result is that of one pass per pair.
    """
    _check(images, edges)
    size = (images.shape[-2], images.shape[-1])
    features = torch.cat([model.encode(batch) for batch in torch.split(images, BATCH)])
    parts = []
    for batch in torch.split(torch.tensor(edges, device=images.device), BATCH):
        parts.append(model.pair(features[batch[:, 0]], size, features[batch[:, 1]], size))
    pts1, conf1, pts2, conf2 = (torch.cat(part) for part in zip(*parts, strict=True))
    return Predictions(edges, pts1, conf1, pts2, conf2)


def predict_deployed(
    encoder: Runtime, decoder: Runtime, images: Tensor, edges: Sequence[tuple[int, int]]
) -> Predictions:
    """The same by a deployed file's two halves (engines/halves.py), two images and one pair at a time, on the host."""
    _check(images, edges)
    arrays, last = np.split(images.numpy(), len(images)), len(images) - 1
    tokens = [one for k in range(0, last + 1, 2) for one in encoder.run((arrays[k], arrays[min(k + 1, last)]))[0]]
    parts = [decoder.run((np.stack((tokens[i], tokens[j])),)) for i, j in edges]
    pts1, conf1, pts2, conf2 = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True))
    return Predictions(edges, pts1, conf1, pts2, conf2)


def _check(images: Tensor, edges: Sequence[tuple[int, int]]) -> None:
    unknown = [edge for edge in edges if not all(0 <= view < len(images) for view in edge)]
    if unknown or not edges:
        raise InputError(f"pairs {unknown or list(edges)}: expected one or more of {len(images)} images, from 0 on")


def pace(
    model: DUSt3R, file: Path | None, graph: SceneGraph, workload: WorkloadSettings, device: str
) -> dict[str, float | str]:
    """Seconds from images to one cloud, medians of `scene_repeats` runs: t_scene_s in all, t_scene_pairs_s for the
    pairs, of which each image is encoded once.

    file: the deployed ONNX file that is timed; None: `model` is, in torch. Where the pointmaps cannot be aligned,
    scene_error says so instead.
    """
    images = graph.image.float() / 127.5 - 1
    with TemporaryDirectory() as folder, torch_threads(workload.threads):
        pairs: Callable[[], Predictions]
        if file:
            encoder, decoder = (OnnxRuntime(half, device, workload.threads) for half in split(file, Path(folder)))

            def pairs() -> Predictions:
                return predict_deployed(encoder, decoder, images, graph.edges).to(device)
        else:
            model.to(device)

            def pairs() -> Predictions:
                return predict(model, images.to(device), graph.edges)

        def scene() -> Reconstruction:
            return align(pairs(), steps=workload.scene_steps)

        first = pairs()  # warms up; an error in here is a defect, not the model's
        try:
            align(first, steps=1)
            times = measure({"pairs": pairs, "scene": scene}, 0, workload.scene_repeats, workload.workload_seed)
        except InputError as error:
            return {"scene_error": str(error)}
    seconds = {name: float(np.median(found)) / 1000 for name, found in times.items()}
    return {"t_scene_s": seconds["scene"], "t_scene_pairs_s": seconds["pairs"], "scene_images": len(images),
            "scene_pairs": len(graph.edges)}  # fmt: skip


def cloud(found: Reconstruction, images: Tensor, least: float = MIN_CONFIDENCE) -> tuple[np.ndarray, np.ndarray]:
    """Points (N, 3) float32 of at least that confidence and their colours (N, 3) uint8; images as of predict.

    Where nothing is that certain, the more certain half is shown.
    """
    least = min(least, float(found.confidence.median()))
    shown = (found.confidence >= least).cpu()
    colours = ((images.cpu().permute(0, 2, 3, 1)[shown] + 1) * 127.5).round().clamp(0, 255).byte()
    return found.points.cpu()[shown].float().numpy(), colours.numpy()


def write_ply(path: Path, points: np.ndarray, colours: np.ndarray) -> None:
    """A binary PLY of coloured points."""
    kinds = [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("red", "u1"), ("green", "u1"), ("blue", "u1")]
    rows = np.empty(len(points), dtype=kinds)
    for column, (name, _) in enumerate(kinds):
        rows[name] = points[:, column] if column < 3 else colours[:, column - 3]
    words = {"<f4": "float", "u1": "uchar"}
    properties = "".join(f"property {words[kind]} {name}\n" for name, kind in kinds)
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(rows)}\n{properties}end_header\n"
    path.write_bytes(header.encode() + rows.tobytes())


def picture(found: Reconstruction, points: np.ndarray, colours: np.ndarray, unit: str) -> Figure:
    """The cloud from above and from the side, with the cameras; unit: of the reconstruction, metres or free."""
    figure = Figure(figsize=(11, 5), dpi=110, layout="constrained")
    first, last = found.loss
    figure.suptitle(f"{len(found.poses)} images, {len(points):,} points, loss {first:.3f} to {last:.3f}")
    pick = np.random.default_rng(0).permutation(len(points))[:40_000]
    centres = found.poses[:, :3, 3].cpu().numpy()
    ahead = centres + found.poses[:, :3, 2].cpu().numpy() * float(found.depth.median()) * 0.15
    low, high = np.percentile(points, [1, 99], axis=0)
    shown = "m" if unit == "metres" else "unit is free"
    for place, (x, y, title) in enumerate(((0, 2, "from above"), (2, 1, "from the side")), start=1):
        axes = figure.add_subplot(1, 2, place)
        axes.scatter(points[pick, x], points[pick, y], c=colours[pick] / 255.0, s=1, linewidths=0, rasterized=True)
        for number, (start, end) in enumerate(zip(centres, ahead, strict=True)):
            axes.plot([start[x], end[x]], [start[y], end[y]], color="#d1495b", linewidth=1.5)
            axes.annotate(str(number), (start[x], start[y]), color="#d1495b", fontsize=8)
        both = np.concatenate((np.stack((low, high)), centres, ahead))
        axes.set_xlim(both[:, x].min(), both[:, x].max())
        axes.set_ylim(both[:, y].min(), both[:, y].max())
        axes.set_aspect("equal", adjustable="box")
        axes.set(title=title, xlabel=f"{'xyz'[x]} [{shown}]", ylabel=f"{'xyz'[y]} [{shown}]")
        if y == 1:
            axes.invert_yaxis()  # y points down
    return figure
