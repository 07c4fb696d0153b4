"""ScanNet++ and ARKitScenes as DUSt3R's preprocessing leaves them: all_metadata.npz lists every image and every pair.

Its arrays: scenes (names), sceneids and images (scene and file name of each image), intrinsics (N, 3, 3), trajectories
(N, 4, 4; camera to world), pairs (P, 2; numbers of images; a third column is a score). ScanNet++: SCENE/images/*.jpg,
SCENE/depth/*.png. ARKitScenes: {Training,Test}/all_metadata.npz, SCENE/vga_wide/*.jpg, SCENE/lowres_depth/*.png. Depths
in millimetres.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engines.errors import InputError
from trainables.dust3r.frames import (
    BrokenFrame,
    Frame,
    Scene,
    enlarged,
    from_centres,
    names_of_arrays,
    numbers,
    read_arrays,
    read_depth,
    read_image,
)

_ARRAYS = ("scenes", "sceneids", "images", "intrinsics", "trajectories", "pairs")


def find(folder: Path) -> list[Scene]:
    """One scene per name in the lists."""
    found: list[Scene] = []
    for part, split in (("", None), ("Training", "train"), ("Test", "test")):
        lists = folder / part / "all_metadata.npz"
        if lists.is_file() and "sceneids" in names_of_arrays(lists):
            found += _scenes(lists, split)
    return found


def _scenes(lists: Path, split: str | None) -> list[Scene]:
    try:
        names, ids, images, intrinsics, poses, pairs = read_arrays(lists, *_ARRAYS)
    except BrokenFrame as error:
        raise InputError(f"{lists}: {error}; expected the arrays {', '.join(_ARRAYS)}") from None
    flat = names.ndim == ids.ndim == images.ndim == 1
    if not flat or pairs.ndim != 2 or pairs.shape[1] < 2 or not _counts(ids, pairs[:, :2]):
        raise InputError(f"{lists}: expected scenes (S,), images (N,), sceneids (N,) and pairs (P, 2 or more)")
    ids, pairs = ids.astype(np.int64), pairs[:, :2].astype(np.int64)  # a third column is the pair's score
    if not len(ids) == len(images) == len(intrinsics) == len(poses) or (pairs.size and pairs.max() >= len(ids)):
        raise InputError(f"{lists}: its arrays disagree on the number of images")
    first, second = pairs[:, 0], pairs[:, 1]
    scenes = []
    for number, name in enumerate(names.tolist()):
        own = np.flatnonzero(ids == number)
        inside = (ids[first] == number) & (ids[second] == number)
        links = [(int(np.searchsorted(own, a)), int(np.searchsorted(own, b))) for a, b in pairs[inside]]
        frames = [_stem(str(image)) for image in images[own]]
        at = dict(zip(frames, own.tolist(), strict=True))
        read = partial(_read, lists.parent / str(name), at, intrinsics, poses)
        scenes.append(Scene(str(name), frames, read, split, links))
    return scenes


def _counts(*arrays: npt.NDArray[np.generic]) -> bool:
    """Whether they hold numbers from 0 on."""
    return all(array.dtype.kind in "fiu" and bool((array.astype(np.float64) >= 0).all()) for array in arrays)


def _stem(name: str) -> str:
    """A file name without its ending: names hold dots (ARKitScenes' are numbers with decimals)."""
    return name[:-4] if name.lower().endswith((".jpg", ".png")) else name


def _read(
    place: Path,
    at: dict[str, int],
    intrinsics: npt.NDArray[np.generic],
    poses: npt.NDArray[np.generic],
    name: str,
) -> Frame:
    images, depths = ("vga_wide", "lowres_depth") if (place / "vga_wide").is_dir() else ("images", "depth")
    image = read_image(place / images / f"{name}.jpg")
    depth = enlarged(read_depth(place / depths / f"{name}.png", 1e-3), image.shape[:2])
    return Frame(image, depth, from_centres(intrinsics[at[name]]), numbers(poses[at[name]], (4, 4)))
