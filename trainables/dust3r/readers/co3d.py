"""Co3D and WildRGBD as DUSt3R's preprocessing leaves them: CATEGORY/SEQUENCE/ with a camera in a .npz per frame.

Co3D: selected_seqs_{train,test}.json {category: {sequence: [frame numbers]}}, images/frame%06d.{jpg,npz} and
depths/frame%06d.jpg.geometric.png, 65535 of which is the .npz' maximum_depth. WildRGBD: rgb/%05d.jpg, depth/%05d.png in
millimetres, metadata/%05d.npz; its lists have the same names and may be absent. Foreground masks are not used.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np

from engines.errors import InputError
from trainables.dust3r.frames import (
    BrokenFrame,
    Frame,
    Scene,
    enlarged,
    from_centres,
    numbers,
    read_arrays,
    read_depth,
    read_image,
)

SPLITS = ("train", "test")


def find(folder: Path) -> list[Scene]:
    """One scene per sequence, of the split whose list names it."""
    if next(folder.glob("*/*/metadata"), None):
        listed = _listed(folder, "{:05d}") or _found(folder)
        return [Scene(name, frames, partial(_wild, folder / name), split) for name, frames, split in listed]
    if not next(folder.glob("selected_seqs_*.json"), None):
        return []
    listed = _listed(folder, "frame{:06d}")
    return [Scene(name, frames, partial(_co3d, folder / name), split) for name, frames, split in listed]


def _listed(folder: Path, name: str) -> list[tuple[str, list[str], str | None]]:
    found: list[tuple[str, list[str], str | None]] = []
    for split in SPLITS:
        path = folder / f"selected_seqs_{split}.json"
        if not path.is_file():
            continue
        try:
            categories = json.loads(path.read_text())
            found += [
                (f"{category}/{sequence}", [name.format(int(number)) for number in numbers], split)
                for category, sequences in sorted(categories.items())
                for sequence, numbers in sorted(sequences.items())
            ]
        except (ValueError, AttributeError, TypeError):
            raise InputError(f"{path}: expected {{category: {{sequence: [frame numbers]}}}} in JSON") from None
    return found


def _found(folder: Path) -> list[tuple[str, list[str], str | None]]:
    places = sorted(path.parent for path in folder.glob("*/*/metadata"))
    return [(p.relative_to(folder).as_posix(), sorted(m.stem for m in p.glob("metadata/*.npz")), None) for p in places]


def _co3d(place: Path, name: str) -> Frame:
    pose, intrinsics, most = read_arrays(
        place / "images" / f"{name}.npz", "camera_pose", "camera_intrinsics", "maximum_depth"
    )
    farthest = float(numbers(most, (), (1,)).sum())
    if not np.isfinite(farthest):
        raise BrokenFrame(f"{name}.npz: maximum_depth={farthest}")
    depth = read_depth(place / "depths" / f"{name}.jpg.geometric.png", farthest / 65535)
    image = read_image(place / "images" / f"{name}.jpg")
    return Frame(image, depth, from_centres(intrinsics), numbers(pose, (4, 4)))


def _wild(place: Path, name: str) -> Frame:
    pose, intrinsics = read_arrays(place / "metadata" / f"{name}.npz", "camera_pose", "camera_intrinsics")
    image = read_image(place / "rgb" / f"{name}.jpg")
    depth = enlarged(read_depth(place / "depth" / f"{name}.png", 1e-3), image.shape[:2])
    return Frame(image, depth, from_centres(intrinsics), numbers(pose, (4, 4)))
