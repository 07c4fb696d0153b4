"""7-Scenes: frame-%06d.{color.png,depth.png,pose.txt} in a folder, or SCENE/seq-%02d/ with SCENE/TestSplit.txt.

Depth in millimetres, 0 and 65535 unknown; poses are camera to world. One pinhole camera for colour and depth: 585
pixels, in the middle of 640x480, unless a camera-intrinsics.txt (3 x 3, from the image's corner) lies beside them.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engines.errors import InputError
from trainables.dust3r.frames import Floats, Frame, Scene, published, read_depth, read_image, read_numbers

SIZE = (480, 640)
OWN = np.array([[585.0, 0, SIZE[1] / 2], [0, 585.0, SIZE[0] / 2], [0, 0, 1]])
UNKNOWN = 65535


def find(folder: Path) -> list[Scene]:
    """One scene per sequence."""
    places = sorted({path.parent for depth in ("", "*/", "*/*/") for path in folder.glob(f"{depth}frame-*.pose.txt")})
    return [_scene(folder, place) for place in places]


def _scene(folder: Path, place: Path) -> Scene:
    # By any of its files: a frame that lacks one is broken, and counted by whoever reads it.
    frames = sorted({path.name.split(".")[0] for path in place.glob("frame-*.*.*")})
    name = place.relative_to(folder).as_posix() if place != folder else place.name
    return Scene(name, frames, partial(_read, place), _split(place), place=place.parent.name)


def _split(place: Path) -> str | None:
    """What TestSplit.txt beside the sequences says, one 'sequence3' a line."""
    listed = place.parent / "TestSplit.txt"
    number = re.fullmatch(r"seq-(\d+)", place.name)
    if number is None or not listed.is_file():
        return None
    tests = {int(found) for found in re.findall(r"\d+", listed.read_text(errors="replace"))}
    if not tests:
        raise InputError(f"{listed}: names no sequence; expected lines such as 'sequence3', or no such file")
    return "test" if int(number[1]) in tests else "train"


def _read(place: Path, name: str) -> Frame:
    colour = place / f"{name}.color.png"
    image = read_image(colour if colour.exists() else colour.with_suffix(".jpg"))
    depth = read_depth(place / f"{name}.depth.png", 1e-3, UNKNOWN)
    return Frame(image, depth, _camera(place, image), read_numbers(place / f"{name}.pose.txt", (4, 4)))


def _camera(place: Path, image: npt.NDArray[np.uint8]) -> Floats:
    own = place / "camera-intrinsics.txt"
    return read_numbers(own, (3, 3)) if own.is_file() else published(OWN, SIZE, image)
