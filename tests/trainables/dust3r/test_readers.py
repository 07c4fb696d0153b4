"""Every reader on files written in its layout, and 7-Scenes on real frames where they are at hand."""

import contextlib
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engines.errors import InputError
from trainables.dust3r.frames import BrokenFrame, points
from trainables.dust3r.readers import layouts, sevenscenes

SPEC = importlib.util.spec_from_file_location("written_layouts", Path(__file__).parent / "layouts.py")
written = sys.modules.setdefault("written_layouts", importlib.util.module_from_spec(SPEC))
SPEC.loader.exec_module(written)
REAL = Path(__file__).parents[4] / "shared" / "data" / "sevenscenes"
COUNT = 5


def write(kind, folder):
    if kind.__name__ in {one.__name__ for one in written.EXR}:
        pytest.importorskip("OpenEXR")
    folder.mkdir()
    return kind(folder, COUNT)


@pytest.mark.parametrize("kind", written.WRITERS, ids=lambda kind: kind.__name__)
def test_frames_are_where_the_wall_is(kind, tmp_path):
    """Units, axes, the direction of poses and the pixels' origin: any of them wrong, and the wall is elsewhere."""
    expected = write(kind, tmp_path / "data")
    _, scenes = layouts.scenes(tmp_path / "data")
    assert {scene.name: scene.split for scene in scenes} == expected
    for scene in scenes:
        assert len(scene.frames) == COUNT == len(set(scene.frames))
        for number, name in enumerate(scene.frames):
            frame = scene.read(name)
            assert frame.image.shape == (*written.SIZE, 3) and frame.depth.shape == written.SIZE
            world = points(frame) @ frame.pose[:3, :3].T + frame.pose[:3, 3]
            known = frame.depth > 0
            assert known.mean() > 0.7
            most = 0.06 if kind.__name__ == "scannet" else 0.02
            assert np.abs(world @ written.NORMAL - written.OFFSET)[known].max() < most
            assert np.abs(frame.intrinsics - written.CAMERA).max() < 1e-5
            assert np.abs(frame.pose - written.shot(number)[2]).max() < 1e-5, "frames come in the order of capture"
            off = np.abs(frame.image.astype(int) - written.colours(world))[known]
            assert np.percentile(off, 99) <= 4, "image and depth show the same"


def test_invalid_depths_are_zero(tmp_path):
    write(written.sevenscenes, tmp_path / "data")
    frame = layouts.scenes(tmp_path / "data")[1][0]
    assert (frame.read(frame.frames[0]).depth[0, :4] > 0).tolist() == [False, False, False, True]


def test_a_frame_without_a_pose_is_listed_as_the_others_are(tmp_path):
    """So that whoever reads it counts it."""
    write(written.sevenscenes, tmp_path / "data")
    (tmp_path / "data/chess/seq-01/frame-000002.pose.txt").unlink()
    scene = layouts.scenes(tmp_path / "data")[1][0]
    assert len(scene.frames) == COUNT
    with pytest.raises(BrokenFrame, match="frame-000002.pose.txt: No such file"):
        scene.read("frame-000002")


def test_scannet_s_frames_are_those_of_any_file(tmp_path):
    """PNG images too; depths of 65535 are unknown; a frame that lacks a file is listed, so that it is counted."""
    (name,) = write(written.scannet, tmp_path / "data")
    place = tmp_path / "data" / name
    with Image.open(place / "color/1.jpg") as image:
        image.save(place / "color/1.png")
        (place / "color/1.jpg").unlink()
    with Image.open(place / "depth/1.png") as depth:
        raw = np.array(depth)
    raw[:12] = 65535
    Image.fromarray(raw.astype(np.uint16)).save(place / "depth/1.png")
    (place / "pose/2.txt").unlink()
    (place / "color/3.jpg").unlink()
    (scene,) = layouts.scenes(tmp_path / "data")[1]
    assert list(scene.frames) == [str(n) for n in range(COUNT)]
    found = scene.read("1").depth
    assert 0 < found.max() < 10 and (found[:20] == 0).all()
    with pytest.raises(BrokenFrame, match=r"2\.txt: No such file"):
        scene.read("2")
    with pytest.raises(BrokenFrame, match=r"3\.jpg: No such file"):
        scene.read("3")


def test_portraits_are_not_taken_for_what_the_data_set_s_camera_sees(tmp_path):
    (tmp_path / "data").mkdir()
    for turned, size in ((False, (480, 640)), (True, (640, 480))):
        written.save_image(tmp_path / "data/frame-000000.color.png", np.zeros((*size, 3), np.uint8))
        written.save_depth(tmp_path / "data/frame-000000.depth.png", np.ones(size))
        np.savetxt(tmp_path / "data/frame-000000.pose.txt", np.eye(4))
        (scene,) = sevenscenes.find(tmp_path / "data")
        if turned:
            with pytest.raises(BrokenFrame, match="480x640 pixels, .* takes 640x480: add camera-intrinsics.txt"):
                scene.read(scene.frames[0])
        else:
            assert scene.read(scene.frames[0]).intrinsics.tolist() == [[585, 0, 320], [0, 585, 240], [0, 0, 1]]


@pytest.mark.parametrize("kind", [*written.EXR, written.scannetpp, written.arkitscenes], ids=lambda kind: kind.__name__)
def test_listed_pairs_are_those_of_the_layout(kind, tmp_path):
    write(kind, tmp_path / "data")
    for scene in layouts.scenes(tmp_path / "data")[1]:
        apart = {abs(a - b) for a, b in scene.pairs}
        exr = kind.__name__ in {one.__name__ for one in written.EXR}
        assert apart == ({1} if exr else {1, 2}) and max(map(max, scene.pairs)) == COUNT - 1


def test_folders_of_no_layout_are_one_line(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        layouts.scenes(tmp_path / "missing")
    with pytest.raises(InputError, match=r"no known layout.*7-Scenes.*ScanNet") as error:
        layouts.scenes(tmp_path)
    assert "\n" not in str(error.value)


def test_lists_that_are_none_are_one_line(tmp_path):
    cases = {
        "co3d": ("selected_seqs_train.json", b"[1, 2"),
        "co3d list": ("selected_seqs_train.json", b"[1, 2]"),
        "mvs": ("blendedmvs_pairs.npy", b"nothing"),
        "mvs empty": ("blendedmvs_pairs.npy", b""),
        "mega": ("all_metadata.npz", b"nothing"),
    }
    for name, (file, data) in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / file).write_bytes(data)
        with pytest.raises(InputError, match=file) as error:
            layouts.scenes(folder)
        assert "\n" not in str(error.value)

    write(written.sevenscenes, tmp_path / "scenes")
    (tmp_path / "scenes" / "chess" / "TestSplit.txt").write_bytes(b"\xff none")
    with pytest.raises(InputError, match=r"TestSplit.txt: names no sequence"):
        layouts.scenes(tmp_path / "scenes")


@pytest.mark.parametrize(
    "change",
    [{"scenes": 1.0}, {"images": "x"}, {"sceneids": ["a"]}, {"pairs": 3}, {"pairs": [1, 2]}, {"pairs": [[0, -1]]}],
    ids=str,
)
def test_lists_of_other_shapes_are_one_line(change, tmp_path):
    write(written.scannetpp, tmp_path / "data")
    lists = tmp_path / "data" / "all_metadata.npz"
    np.savez(lists, **{**np.load(lists), **change})
    with pytest.raises(InputError, match="all_metadata.npz") as error:
        layouts.scenes(tmp_path / "data")
    assert "\n" not in str(error.value)


def test_listed_pairs_may_have_scores(tmp_path):
    write(written.scannetpp, tmp_path / "data")
    plain = layouts.scenes(tmp_path / "data")[1]
    lists = tmp_path / "data" / "all_metadata.npz"
    arrays = dict(np.load(lists))
    arrays["pairs"] = np.column_stack([arrays["pairs"], np.full(len(arrays["pairs"]), 0.7)])
    np.savez(lists, **arrays)
    assert [scene.pairs for scene in layouts.scenes(tmp_path / "data")[1]] == [scene.pairs for scene in plain]


@pytest.mark.parametrize(
    "change",
    [{"camera_pose": "x"}, {"camera_pose": np.eye(3)}, {"camera_intrinsics": 1.0}, {"camera_intrinsics": np.eye(2)},
     {"maximum_depth": []}, {"maximum_depth": "far"}],
    ids=str,
)  # fmt: skip
def test_a_camera_that_is_none_breaks_its_frame_alone(change, tmp_path):
    write(written.co3d, tmp_path / "data")
    (scene, *_) = layouts.scenes(tmp_path / "data")[1]
    camera = tmp_path / "data" / scene.name / "images" / f"{scene.frames[0]}.npz"
    np.savez(camera, **{**np.load(camera), **change})
    with pytest.raises(BrokenFrame, match="expected numbers of shape"):
        scene.read(scene.frames[0])
    scene.read(scene.frames[1])


def test_damaged_arrays_break_their_frame_alone(tmp_path):
    write(written.wildrgbd, tmp_path / "data")
    (scene,) = layouts.scenes(tmp_path / "data")[1]
    camera = tmp_path / "data" / scene.name / "metadata" / f"{scene.frames[0]}.npz"
    np.savez_compressed(camera, **np.load(camera))
    whole = camera.read_bytes()
    for place in range(0, len(whole), 7):  # local headers, streams, directory: zip, zlib and numpy have a say each
        camera.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with contextlib.suppress(BrokenFrame):
            scene.read(scene.frames[0])
    np.save(camera.open("wb"), np.zeros(3))
    with pytest.raises(BrokenFrame, match="npz"):
        scene.read(scene.frames[0])


def test_pickles_in_lists_are_refused(tmp_path):
    np.save(tmp_path / "blendedmvs_pairs.npy", np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(InputError, match="blendedmvs_pairs"):
        layouts.scenes(tmp_path)


def test_tum_needs_times_that_match_and_a_known_camera(tmp_path):
    (name,) = write(written.tum, tmp_path / "data")
    place = tmp_path / "data" / name
    lines = (place / "depth.txt").read_text().splitlines()
    (place / "depth.txt").write_text("\n".join([*lines[:2], *lines[3:]]))
    (scene,) = layouts.scenes(tmp_path / "data")[1]
    scene.read(scene.frames[0])
    with pytest.raises(BrokenFrame, match="no depth within 20 ms"):
        scene.read(scene.frames[1])
    (place / "camera-intrinsics.txt").unlink()
    with pytest.raises(InputError, match="camera-intrinsics"):
        layouts.scenes(tmp_path / "data")[1][0].read(scene.frames[0])
    place.rename(place.with_name("rgbd_dataset_freiburg2_wall"))
    (scene,) = layouts.scenes(tmp_path / "data")[1]
    with pytest.raises(BrokenFrame, match="64x48 pixels, .* takes 640x480: add camera-intrinsics.txt"):
        scene.read(scene.frames[0])
    (tmp_path / "data" / scene.name / "rgb.txt").write_text("now rgb/1.png\n")
    with pytest.raises(InputError, match="rgb.txt line 1"):
        layouts.scenes(tmp_path / "data")


@pytest.mark.skipif(not REAL.is_dir(), reason="the real frames are not beside this checkout")
def test_real_frames_reproject_onto_each_other():
    """Median relative depth error .5 to 1.1 %, 93 to 97 % of what both see within 5 %, as measured independently."""
    (scene,) = layouts.scenes(REAL)[1]
    assert len(scene.frames) == 40 and scene.split is None
    for first, second, overlap in ((0, 54, 0.75), (0, 108, 0.35), (54, 216, 0.29)):
        a, b = (scene.read(f"frame-{number:06d}") for number in (first, second))
        local = points(a)[a.depth > 0] @ a.pose[:3, :3].T + a.pose[:3, 3]
        local = (local - b.pose[:3, 3]) @ b.pose[:3, :3]
        pixel = local @ b.intrinsics.T
        u, v = (pixel[:, :2] / pixel[:, 2:].clip(1e-6)).T
        inside = (local[:, 2] > 0) & (u >= 0) & (u < 640) & (v >= 0) & (v < 480)
        there = b.depth[v[inside].astype(int), u[inside].astype(int)]
        error = np.abs(local[inside, 2] / np.where(there > 0, there, np.nan) - 1)
        seen = error < 0.2  # what is hidden behind something else is not co-visible
        assert np.median(error[seen]) < 0.012 and (error[seen] < 0.05).mean() > 0.92
        assert seen.sum() / (a.depth > 0).sum() == pytest.approx(overlap, abs=0.1)
