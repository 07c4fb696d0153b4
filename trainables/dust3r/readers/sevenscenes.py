"""7-Scenes: frame-%06d.{color.png,depth.png,pose.txt} in a folder, or SCENE/seq-%02d/ with SCENE/TestSplit.txt.

Depth in millimetres, 0 and 65535 unknown; poses are camera to world. One pinhole camera for colour and depth: 585
pixels, centred, unless a camera-intrinsics.txt (3 x 3) lies beside the frames.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import numpy as np

from engines.errors import InputError
from trainables.dust3r.frames import Floats, Frame, Scene, read_depth, read_image, read_numbers

FOCAL, WIDTH, HEIGHT = 585.0, 640, 480
UNKNOWN = 65535


def find(folder: Path) -> list[Scene]:
    """One scene per sequence."""
    places = sorted({path.parent for depth in ("", "*/", "*/*/") for path in folder.glob(f"{depth}frame-*.pose.txt")})
    return [_scene(folder, place) for place in places]


def _scene(folder: Path, place: Path) -> Scene:
    frames = sorted(path.name.removesuffix(".pose.txt") for path in place.glob("frame-*.pose.txt"))
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
    return Frame(image, depth, _camera(place), read_numbers(place / f"{name}.pose.txt", (4, 4)))


def _camera(place: Path) -> Floats:
    own = place / "camera-intrinsics.txt"
    if own.is_file():
        return read_numbers(own, (3, 3))
    return np.array([[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1]])
