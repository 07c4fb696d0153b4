"""ScanNet as its own tool exports it: SCENE/{color/%d.jpg, depth/%d.png, pose/%d.txt, intrinsic/intrinsic_*.txt}.

Depth in millimetres, 0 and 65535 unknown, at a resolution and with intrinsics of its own; poses are camera to world,
-inf where tracking was lost. Images may be PNG files as well.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from trainables.dust3r.frames import Frame, Scene, depth_onto, from_centres, read_depth, read_image, read_numbers

UNKNOWN = 65535


def find(folder: Path) -> list[Scene]:
    """One scene per export: the folder itself, or those in it."""
    places = [place for place in (folder, *sorted(folder.glob("*/"))) if (place / "intrinsic").is_dir()]
    return [Scene(place.name, _frames(place), partial(_read, place)) for place in places]


def _frames(place: Path) -> list[str]:
    # By any of its files: a frame that lacks one is broken, and counted by whoever reads it.
    names = {path.stem for kind in ("color", "depth", "pose") for path in place.glob(f"{kind}/*.*")}
    return sorted((name for name in names if name.isdecimal()), key=int)


def _read(place: Path, name: str) -> Frame:
    colour, own = (
        from_centres(read_numbers(place / "intrinsic" / f"intrinsic_{sensor}.txt", (4, 4)))
        for sensor in ("color", "depth")
    )
    picture = place / "color" / f"{name}.png"
    image = read_image(picture if picture.exists() else picture.with_suffix(".jpg"))
    depth = depth_onto(read_depth(place / "depth" / f"{name}.png", 1e-3, UNKNOWN), own, colour, image.shape[:2])
    return Frame(image, depth, colour, read_numbers(place / "pose" / f"{name}.txt", (4, 4)))
