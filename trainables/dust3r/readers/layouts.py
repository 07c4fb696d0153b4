"""Which layout a folder has. A new one is a module with `find` and its place in LAYOUTS."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from engines.errors import InputError
from trainables.dust3r.frames import Scene
from trainables.dust3r.readers import co3d, indexed, multiview, scannet, sevenscenes, tum

LAYOUTS: dict[str, Callable[[Path], list[Scene]]] = {
    "7-Scenes": sevenscenes.find,
    "TUM RGB-D": tum.find,
    "ScanNet": scannet.find,
    "Co3D or WildRGBD": co3d.find,
    "ScanNet++ or ARKitScenes": indexed.find,
    "BlendedMVS or MegaDepth": multiview.find,
}


def scenes(folder: Path) -> tuple[str, list[Scene]]:
    """The layout's name and the scenes of a folder, those with two frames at least. InputError for another layout."""
    if not folder.is_dir():
        raise InputError(f"data={folder}: no such folder; expected 'rooms' or a folder of RGB-D recordings")
    for name, find in LAYOUTS.items():
        found = find(folder)
        if found:
            return name, [scene for scene in found if len(scene.frames) > 1]
    raise InputError(f"data={folder}: of no known layout, which are {', '.join(LAYOUTS)}; README.md describes them")
