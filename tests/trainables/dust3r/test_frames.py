import numpy as np
import pytest
from PIL import Image

from trainables.dust3r.frames import (
    BrokenFrame,
    Frame,
    depth_onto,
    enlarged,
    fit,
    points,
    read_depth,
    read_image,
    read_numbers,
)


def camera(fx=100.0, fy=100.0, cx=80.0, cy=60.0):
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])


def plane(size, intrinsics, normal=(0.1, -0.2, 1.0), offset=2.0):
    """A slanted wall n . X = offset: its depth follows from each pixel's ray; its colour from the ray, too."""
    v, u = np.meshgrid(np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5, indexing="ij")
    ray = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(intrinsics).T
    image = np.stack([60 * ray[..., 0] + 128, 60 * ray[..., 1] + 128, 0 * u + 40], -1)
    return Frame(image.round().astype(np.uint8), offset / (ray @ np.array(normal)), intrinsics, np.eye(4))


@pytest.mark.parametrize("size", [(30, 40), (40, 30), (48, 48), (60, 80)], ids=str)
@pytest.mark.parametrize(
    ("full", "intrinsics"),
    [
        ((120, 160), camera()),
        ((120, 160), camera(cx=71.3, cy=66.8)),
        ((160, 120), camera(cx=62.5, cy=75.25)),
        ((120, 160), camera(fx=110, fy=90)),
    ],
    ids=["centred", "off centre", "portrait", "fx not fy"],
)
def test_a_cut_frame_is_the_same_wall_from_the_same_place(size, full, intrinsics):
    whole = plane(full, intrinsics)
    part = fit(whole, size)
    assert part.image.shape == (*size, 3) and part.depth.shape == size
    k = part.intrinsics
    assert (k[0, 2], k[1, 2]) == pytest.approx((size[1] / 2, size[0] / 2)), "the principal point is the centre"
    assert k[0, 0] / k[1, 1] == pytest.approx(intrinsics[0, 0] / intrinsics[1, 1]), "no side is stretched"
    # Every point lies on the wall within half an old pixel's slant; colours tell the ray.
    there = points(part)
    distance = there @ np.array([0.1, -0.2, 1.0]) / np.linalg.norm([0.1, -0.2, 1.0])
    assert np.abs(distance - 2 / np.linalg.norm([0.1, -0.2, 1.0])).max() < 0.01
    ray = there / there[..., 2:]
    inner = (slice(2, -2), slice(2, -2))
    assert np.abs(60 * ray[..., :2] + 128 - part.image[..., :2])[inner].max() < 1.2
    # As large as it can be: it touches an edge of the old image on at least one side.
    scale = k[0, 0] / intrinsics[0, 0]
    sides = np.array([intrinsics[0, 2], full[1] - intrinsics[0, 2], intrinsics[1, 2], full[0] - intrinsics[1, 2]])
    assert np.abs(sides - np.array([size[1], size[1], size[0], size[0]]) / (2 * scale)).min() < 1e-9


def test_depths_are_picked_and_not_averaged():
    frame = plane((120, 160), camera())
    depth = np.where(np.arange(160) % 2, np.float32(1), np.float32(3)) * np.ones((120, 1), np.float32)
    depth[:, :40] = 0
    part = fit(Frame(frame.image, depth, frame.intrinsics, frame.pose), (30, 40))
    assert set(np.unique(part.depth)) <= {0.0, 1.0, 3.0} and (part.depth[:, :10] == 0).all()
    assert (part.depth[:, 10:] > 0).all() and part.depth.dtype == np.float32


def test_too_small_a_part_is_refused():
    with pytest.raises(BrokenFrame, match="too small"):
        fit(plane((120, 160), camera()), (128, 160))
    with pytest.raises(BrokenFrame, match="80x60 of 160x120"):
        fit(plane((120, 160), camera(cx=40)), (100, 100 * 80 // 60))


def test_what_is_no_frame_is_named():
    good = plane((12, 16), camera(cx=8, cy=6))
    rough = np.eye(4)
    rough[:3, :3] += 1e-4
    assert np.abs(Frame(good.image, good.depth, good.intrinsics, rough).pose[:3, :3] - np.eye(3)).max() < 1e-3
    turned = Frame(good.image, good.depth, good.intrinsics, rough).pose[:3, :3]
    assert np.allclose(turned @ turned.T, np.eye(3), atol=1e-14)
    holes = good.depth.copy()
    holes[0, :4] = np.nan, np.inf, -1, 0
    assert (Frame(good.image, holes, good.intrinsics, good.pose).depth[0, :4] == 0).all()
    lost, scaled, mirror = np.full((4, 4), -np.inf), np.diag([2.0, 2, 2, 1]), np.diag([1.0, 1, -1, 1])
    wrong = {
        "finite": dict(pose=lost),
        "no rotation": dict(pose=scaled),
        "rotation": dict(pose=mirror),
        "unknown everywhere": dict(depth=np.zeros((12, 16))),
        "with a depth of": dict(depth=np.ones((6, 8))),
        "principal point": dict(intrinsics=camera(cx=99, cy=6)),
        "intrinsics": dict(intrinsics=camera(fx=np.nan)),
    }
    for said, change in wrong.items():
        with pytest.raises(BrokenFrame, match=said) as error:
            Frame(**{**vars(good), **change})
        assert "\n" not in str(error.value)


def test_files_come_back_and_broken_ones_are_named(tmp_path):
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 65536, (20, 30)).astype(np.uint16)
    raw[0, :2] = 0, 65535
    Image.fromarray(raw).save(tmp_path / "d.png")
    depth = read_depth(tmp_path / "d.png", 1e-3, 65535)
    assert depth.dtype == np.float32 and (depth[0, :2] == 0).all()
    assert np.allclose(depth[1:], np.where(raw == 65535, 0, raw)[1:] / 1000)
    colours = rng.integers(0, 256, (20, 30, 3)).astype(np.uint8)
    Image.fromarray(colours).save(tmp_path / "c.png")
    assert np.array_equal(read_image(tmp_path / "c.png"), colours)
    for name in ("c.png", "d.png"):
        whole = (tmp_path / name).read_bytes()
        for k, data in enumerate((whole[: len(whole) // 2], b"", b"hello")):
            path = tmp_path / f"{k}{name}"
            path.write_bytes(data)
            with pytest.raises(BrokenFrame, match=path.name):
                read_image(path) if name == "c.png" else read_depth(path, 1e-3)
    with pytest.raises(BrokenFrame, match="16 bits"):
        read_depth(tmp_path / "c.png", 1e-3)
    with pytest.raises(BrokenFrame, match="No such file"):
        read_image(tmp_path / "missing.png")
    for text in ("1 2 3", "a b", ""):
        (tmp_path / "pose.txt").write_text(text)
        with pytest.raises(BrokenFrame, match="pose.txt"):
            read_numbers(tmp_path / "pose.txt", (4, 4))


def test_depth_of_another_camera_lands_where_the_ray_goes():
    """The wall as a sensor with its own resolution and intrinsics sees it, put onto the colour camera's pixels."""
    colour, own = camera(fx=200, fy=198, cx=150, cy=121), camera(fx=90, fy=92, cx=70, cy=55)
    moved = depth_onto(plane((110, 140), own).depth, own, colour, (240, 300))
    exact = plane((240, 300), colour).depth
    seen = moved > 0
    assert 0.8 < seen.mean() < 1 and np.abs(moved / exact - 1)[seen].max() < 0.01
    assert np.array_equal(enlarged(exact, (240, 300)), exact)
    assert np.array_equal(enlarged(np.array([[1.0, 2], [3, 4]]), (4, 6))[::2, ::3], [[1, 2], [3, 4]])
