"""One frame of a recording: an image, its depth, its camera; how files are decoded and how a frame is cut to a size.

Conventions, the same for every layout: depth is z-depth in metres, 0 where it is unknown. Cameras look along +z with x
to the right and y down (OpenCV); a pose takes camera coordinates to the world's, metres. Pixel coordinates start at the
corner of the image, so the first pixel's centre is at (.5, .5) and a centred principal point at (W / 2, H / 2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from engines.errors import InputError

Floats = npt.NDArray[np.floating]

ORTHONORMAL = 0.02  # how far a recorded rotation may be from one; what is nearer is made one


class BrokenFrame(ValueError):
    """A frame that cannot be used; the message says why. Whoever reads frames skips and counts it."""


@dataclass(frozen=True)
class Frame:
    """image (H, W, 3) uint8 RGB, depth (H, W) float32, intrinsics (3, 3) and pose (4, 4) float64; see the module.

    Depths that are not finite or not positive become 0, the rotation is made orthonormal. Raises BrokenFrame for a
    camera that is none, a principal point outside of the image and a depth that is unknown everywhere.
    """

    image: npt.NDArray[np.uint8]
    depth: Floats
    intrinsics: Floats
    pose: Floats

    def __post_init__(self) -> None:
        depth = np.asarray(self.depth, np.float32)
        depth = np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(0))
        object.__setattr__(self, "depth", depth)
        if self.image.shape != (*depth.shape, 3):
            raise BrokenFrame(f"image of shape {self.image.shape} with a depth of {depth.shape}")
        if not depth.any():
            raise BrokenFrame("its depth is unknown everywhere")
        k, (height, width) = np.asarray(self.intrinsics, np.float64), depth.shape
        if k.shape != (3, 3) or not np.isfinite(k).all() or min(k[0, 0], k[1, 1]) <= 0:
            raise BrokenFrame(f"its intrinsics are not those of a camera: {k.round(2).tolist()}")
        if not (0 < k[0, 2] < width and 0 < k[1, 2] < height):
            raise BrokenFrame(f"its principal point ({k[0, 2]:g}, {k[1, 2]:g}) is outside of {width}x{height}")
        object.__setattr__(self, "intrinsics", k)
        object.__setattr__(self, "pose", _rigid(np.asarray(self.pose, np.float64)))


def _rigid(pose: Floats) -> Floats:
    if pose.shape != (4, 4) or not np.isfinite(pose).all():
        raise BrokenFrame("its pose is not finite")
    rotation = pose[:3, :3]
    if np.abs(rotation @ rotation.T - np.eye(3)).max() > ORTHONORMAL or np.linalg.det(rotation) < 0:
        raise BrokenFrame("its pose is no rotation and translation")
    u, _, vt = np.linalg.svd(rotation)
    rigid = np.eye(4)
    rigid[:3, :3], rigid[:3, 3] = u @ vt, pose[:3, 3]
    return rigid


@dataclass(frozen=True, eq=False)
class Scene:
    """One recording of a data set.

    frames: names in the order of capture. read: the frame of a name, or BrokenFrame. split: 'train' or 'test' where the
    layout says so. pairs: indices into `frames` where the layout lists pairs. place: what it shows, where others may
    show the same.
    """

    name: str
    frames: Sequence[str]
    read: Callable[[str], Frame]
    split: str | None = None
    pairs: Sequence[tuple[int, int]] | None = None
    place: str | None = None


def fit(frame: Frame, size: tuple[int, int]) -> Frame:
    """The largest part of `size` = (height, width)'s proportions that is centred on the principal point, at that size.

    Colours are averaged (Lanczos), depths taken from the nearest pixel; the principal point ends in the very centre. A
    portrait gives a landscape its middle, and the other way round. Raises BrokenFrame for a part smaller than `size`.
    """
    height, width = size
    k, (full_height, full_width) = frame.intrinsics, frame.depth.shape
    cx, cy = k[0, 2], k[1, 2]
    half = min(min(cx, full_width - cx) / width, min(cy, full_height - cy) / height)  # of one new pixel
    if 2 * half < 0.99:
        part = f"{2 * half * width:.0f}x{2 * half * height:.0f}"
        raise BrokenFrame(f"what is centred on its principal point, {part} of {full_width}x{full_height}, is too small")
    left, top = max(0.0, cx - half * width), max(0.0, cy - half * height)
    right, bottom = min(full_width, cx + half * width), min(full_height, cy + half * height)
    box = (left, top, right, bottom)
    image = Image.fromarray(frame.image).resize((width, height), Image.Resampling.LANCZOS, box=box)
    columns = _nearest(left, right, width, full_width)
    rows = _nearest(top, bottom, height, full_height)
    scale = np.array([[width / (right - left)], [height / (bottom - top)], [1.0]])
    moved = k.copy()
    moved[:2, 2] -= left, top
    return Frame(np.asarray(image), frame.depth[np.ix_(rows, columns)], moved * scale, frame.pose)


def _nearest(start: float, end: float, count: int, most: int) -> npt.NDArray[np.intp]:
    """The old pixels that hold the centres of `count` new ones between two edges."""
    centres = start + (np.arange(count) + 0.5) * (end - start) / count
    return np.minimum(centres.astype(np.intp), most - 1)


def points(frame: Frame) -> Floats:
    """Camera coordinates (H, W, 3) float64 of the pixels' centres; zeros where the depth is unknown."""
    height, width = frame.depth.shape
    v, u = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
    ray = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(frame.intrinsics).T
    found: Floats = ray * frame.depth[..., None]
    return found


# ---------------------------------------------------------------------- files
def read_image(path: Path) -> npt.NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB of a JPEG or PNG file. BrokenFrame for what is missing, truncated or no image."""
    return np.asarray(_opened(path).convert("RGB"))


def read_depth(path: Path, unit: float, unknown: int | None = None) -> Floats:
    """(H, W) float32 metres of a 16-bit PNG whose numbers are `unit` metres each; 0 and `unknown` become 0."""
    picture = _opened(path)
    if not picture.mode.startswith("I"):
        raise BrokenFrame(f"{path.name}: expected one channel of 16 bits, found mode {picture.mode}")
    raw = np.asarray(picture)
    metres: Floats = raw.astype(np.float32) * np.float32(unit)
    return metres if unknown is None else np.where(raw == unknown, np.float32(0), metres)


def read_exr(path: Path) -> Floats:
    """(H, W) float32, the one channel of an OpenEXR file."""
    try:
        import OpenEXR
    except ImportError:
        raise InputError(f"{path}: depth in OpenEXR files needs a package: pip install OpenEXR") from None
    try:
        with OpenEXR.File(str(path)) as file:
            channels = [channel.pixels for channel in file.channels().values()]
    except (OSError, RuntimeError, ValueError) as error:
        raise BrokenFrame(f"{path.name}: {_line(error)}") from None
    if len(channels) != 1 or channels[0].ndim != 2:
        raise BrokenFrame(f"{path.name}: expected one channel of depth, found {len(channels)}")
    return np.asarray(channels[0], np.float32)


def read_numbers(path: Path, shape: tuple[int, int]) -> Floats:
    """A matrix from a text file, float64."""
    try:
        found = np.array(path.read_text().split(), dtype=np.float64)
    except (OSError, ValueError) as error:
        raise BrokenFrame(f"{path.name}: {_line(error)}") from None
    if found.size != shape[0] * shape[1]:
        raise BrokenFrame(f"{path.name}: expected {shape[0]} x {shape[1]} numbers, found {found.size}")
    return found.reshape(shape)


def read_arrays(path: Path, *names: str) -> list[npt.NDArray[np.generic]]:
    """Arrays of a .npz file by name; nothing in it is unpickled."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return [file[name] for name in names]
    except Exception as error:  # of a damaged file zip, zlib and numpy's header parser each have their own
        raise BrokenFrame(f"{path.name}: {_line(error)}") from None


def names_of_arrays(path: Path) -> list[str]:
    """What a .npz file that lists a data set holds. InputError where it is none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return list(file.files)
    except Exception as error:  # as in read_arrays
        raise InputError(f"{path}: no .npz file ({_line(error)})") from None


def numbers(array: npt.NDArray[np.generic], *shapes: tuple[int, ...]) -> Floats:
    """float64 of what a file holds. BrokenFrame where that is no number, or of none of the shapes."""
    if array.dtype.kind not in "fiu" or array.shape not in shapes:
        wanted = " or ".join(map(str, shapes))
        raise BrokenFrame(f"found {array.dtype} of shape {array.shape}, expected numbers of shape {wanted}")
    return array.astype(np.float64)


def from_centres(intrinsics: npt.NDArray[np.generic]) -> Floats:
    """Intrinsics in this module's convention, of some whose coordinates start at the first pixel's CENTRE (OpenCV)."""
    k = numbers(intrinsics, (3, 3), (4, 4))[:3, :3]
    k[:2, 2] += 0.5
    return k


def published(camera: Floats, size: tuple[int, int], image: npt.NDArray[np.uint8]) -> Floats:
    """A data set's own `camera`, of images of `size` = (H, W). BrokenFrame for an image of another size."""
    if image.shape[:2] != size:
        raise BrokenFrame(
            f"{image.shape[1]}x{image.shape[0]} pixels, the data set's own camera takes {size[1]}x{size[0]}: "
            f"add camera-intrinsics.txt (3 x 3)"
        )
    return camera


def depth_onto(depth: Floats, own: Floats, camera: Floats, size: tuple[int, int]) -> Floats:
    """Depth (h, w) of intrinsics `own` at the pixels of an image of `size` = (H, W) with intrinsics `camera`.

    Both sensors are taken to stand in one place; what falls outside of the depth image is 0.
    """
    height, width = size
    x = (np.arange(width) + 0.5 - camera[0, 2]) / camera[0, 0] * own[0, 0] + own[0, 2]
    y = (np.arange(height) + 0.5 - camera[1, 2]) / camera[1, 1] * own[1, 1] + own[1, 2]
    rows, columns = np.floor(y).astype(np.intp), np.floor(x).astype(np.intp)
    inside = (rows >= 0)[:, None] & (rows < depth.shape[0])[:, None] & (columns >= 0) & (columns < depth.shape[1])
    taken = depth[np.ix_(rows.clip(0, depth.shape[0] - 1), columns.clip(0, depth.shape[1] - 1))]
    return np.where(inside, taken, np.float32(0))


def enlarged(depth: Floats, size: tuple[int, int]) -> Floats:
    """Depth at the size of its image, which shows the same from the same place."""
    if depth.shape == size:
        return depth
    return depth[np.ix_(*(_nearest(0, have, want, have) for have, want in zip(depth.shape, size, strict=True)))]


def _opened(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture.copy()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BrokenFrame(f"{path.name}: {_line(error)}") from None


def _line(error: BaseException) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:120]
