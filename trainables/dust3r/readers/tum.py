"""TUM RGB-D: rgb.txt, depth.txt and groundtruth.txt list times, files and poses; they are matched by time.

Depth is in 1/5000 m. Poses are camera to world, 'tx ty tz qx qy qz qw'. Intrinsics are the published calibration of the
Freiburg set that the folder is named after (640x480), or a camera-intrinsics.txt (3 x 3, from the first pixel's centre)
in it.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.spatial.transform import Rotation

from engines.errors import InputError
from trainables.dust3r.frames import (
    BrokenFrame,
    Floats,
    Frame,
    Scene,
    from_centres,
    published,
    read_depth,
    read_image,
    read_numbers,
)

UNIT = 1 / 5000
APART = 0.02  # seconds between an image and its depth or pose, at most
SIZE = (480, 640)
CALIBRATED = {  # set -> fx, fy, cx, cy of the colour camera
    "1": (517.3, 516.5, 318.6, 255.3),
    "2": (520.9, 521.0, 325.1, 249.7),
    "3": (535.4, 539.2, 320.1, 247.6),
}
_LISTS = ("rgb.txt", "depth.txt", "groundtruth.txt")


def find(folder: Path) -> list[Scene]:
    """One scene per sequence: the folder itself, or those in it."""
    places = (folder, *sorted(folder.glob("*/")))
    return [_scene(place) for place in places if all((place / name).is_file() for name in _LISTS)]


def _scene(place: Path) -> Scene:
    images, depths, poses = (_rows(place / name) for name in _LISTS)
    frames = {Path(words[0]).stem: (time, words[0]) for time, words in images}
    return Scene(place.name, list(frames), partial(_read, place, frames, depths, poses))


def _rows(path: Path) -> list[tuple[float, list[str]]]:
    """(time, words) of every line that is no comment, by time."""
    rows = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        words = line.split("#")[0].split()
        if not words:
            continue
        try:
            rows.append((float(words[0]), words[1:]))
        except ValueError:
            raise InputError(f"{path} line {number}: {line[:40]!r} does not begin with a time in seconds") from None
        if len(words) < 2:
            raise InputError(f"{path} line {number}: {line[:40]!r} holds a time alone, without file or pose")
    return sorted(rows)


def _read(
    place: Path,
    frames: dict[str, tuple[float, str]],
    depths: list[tuple[float, list[str]]],
    poses: list[tuple[float, list[str]]],
    name: str,
) -> Frame:
    time, file = frames[name]
    image = read_image(place / file)
    depth = read_depth(place / _nearest(depths, time, "depth")[0], UNIT)
    return Frame(image, depth, _camera(place, image), _pose(_nearest(poses, time, "pose")))


def _nearest(rows: list[tuple[float, list[str]]], time: float, what: str) -> list[str]:
    gap, words = min(((abs(at - time), words) for at, words in rows), default=(np.inf, []))
    if gap > APART:
        raise BrokenFrame(f"no {what} within {1000 * APART:g} ms")
    return words


def _pose(words: list[str]) -> Floats:
    try:
        numbers = np.array(words[:7], dtype=np.float64)
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = Rotation.from_quat(numbers[3:7]).as_matrix(), numbers[:3]
    except (ValueError, IndexError):
        raise BrokenFrame(f"its pose {' '.join(words)!r} is not tx ty tz qx qy qz qw") from None
    return pose


def _camera(place: Path, image: npt.NDArray[np.uint8]) -> Floats:
    own = place / "camera-intrinsics.txt"
    if own.is_file():
        return from_centres(read_numbers(own, (3, 3)))
    number = re.search(r"freiburg([123])", place.resolve().name)
    if number is None:
        raise InputError(
            f"{place}: its name holds no freiburg1, 2 or 3, so its camera is unknown: add camera-intrinsics.txt (3 x 3)"
        )
    fx, fy, cx, cy = CALIBRATED[number[1]]
    return published(from_centres(np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])), SIZE, image)
