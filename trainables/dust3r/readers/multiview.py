"""BlendedMVS and MegaDepth as DUSt3R's preprocessing leaves them: NAME.{jpg,exr,npz} per image, and a list of pairs.

BlendedMVS: blendedmvs_pairs.npy with rows (seq_high, seq_low, img1, img2, score); a sequence's folder is its number in
24 hex digits, images are %08d, cameras R_cam2world and t_cam2world. MegaDepth: all_metadata.npz with scenes
('SCENE SUB'), images (names) and pairs (scene, image, image, score); cameras cam2world; scenes 0015 and 0022 are for
testing.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np

from engines.errors import InputError
from trainables.dust3r.frames import (
    BrokenFrame,
    Floats,
    Frame,
    Scene,
    from_centres,
    names_of_arrays,
    numbers,
    read_arrays,
    read_exr,
    read_image,
)

TESTS = ("0015", "0022")


def find(folder: Path) -> list[Scene]:
    """One scene per sequence, with its own pairs."""
    if (folder / "blendedmvs_pairs.npy").is_file():
        return _blended(folder, folder / "blendedmvs_pairs.npy")
    lists = folder / "all_metadata.npz"
    if not lists.is_file() or "sceneids" in names_of_arrays(lists):
        return []
    return _megadepth(folder, lists)


def _blended(folder: Path, lists: Path) -> list[Scene]:
    try:
        rows = np.load(lists, allow_pickle=False).tolist()
        named = [(f"{high:08x}{low:016x}", f"{a:08d}", f"{b:08d}") for high, low, a, b, *_ in rows]
    except Exception as error:  # of a damaged file numpy's header parser has its own
        raise InputError(f"{lists}: expected rows (seq_high, seq_low, img1, img2, score), {error}") from None
    return _scenes(folder, named, {})


def _megadepth(folder: Path, lists: Path) -> list[Scene]:
    try:
        scenes, images, pairs = read_arrays(lists, "scenes", "images", "pairs")
        places = ["/".join(str(name).split()) for name in scenes]
        names = [str(name).removesuffix(".jpg") for name in images]
        named = [(places[scene], names[a], names[b]) for scene, a, b, *_ in pairs.tolist()]
    except (BrokenFrame, ValueError, TypeError, IndexError) as error:
        raise InputError(f"{lists}: expected scenes, images, pairs (scene, image, image, score), {error}") from None
    return _scenes(folder, named, {place: "test" if place.startswith(TESTS) else "train" for place in places})


def _scenes(folder: Path, named: Iterable[tuple[str, str, str]], splits: dict[str, str]) -> list[Scene]:
    links: dict[str, list[tuple[str, str]]] = {}
    for place, first, second in named:
        links.setdefault(place, []).append((first, second))
    scenes = []
    for place, own in sorted(links.items()):
        frames = sorted({name for link in own for name in link})
        number = {name: k for k, name in enumerate(frames)}
        pairs = [(number[a], number[b]) for a, b in own]
        scenes.append(
            Scene(place, frames, partial(_read, folder / place), splits.get(place), pairs, place.split("/")[0])
        )
    return scenes


def _read(place: Path, name: str) -> Frame:
    path = place / f"{name}.npz"
    pose: Floats
    try:
        intrinsics, found = read_arrays(path, "intrinsics", "cam2world")
        pose = numbers(found, (4, 4))
    except BrokenFrame:
        intrinsics, rotation, position = read_arrays(path, "intrinsics", "R_cam2world", "t_cam2world")
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = numbers(rotation, (3, 3)), numbers(position, (3,), (3, 1), (1, 3)).ravel()
    return Frame(read_image(place / f"{name}.jpg"), read_exr(place / f"{name}.exr"), from_centres(intrinsics), pose)
