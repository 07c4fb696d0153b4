"""A wall that is known exactly, seen by moving cameras, and writers of it in every layout that is read.

The wall's colours tell where on it a pixel lies, so that a reader's units, axes and pixel conventions all show.
"""

import json

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation

NORMAL, OFFSET = np.array([0.1, -0.2, 1.0]), 3.0  # n . X = offset, metres
SIZE = (48, 64)
CAMERA = np.array([[60.0, 0, 32.5], [0, 61.0, 23.5], [0, 0, 1]])  # from the first pixel's corner
CENTRED = CAMERA - np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])  # from its centre, as most layouts have it
FARTHEST = 8.0


def shot(number, intrinsics=CAMERA, size=SIZE):
    """(image, depth, pose) of camera `number` of a path along the wall."""
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_rotvec([0.05, 0.04 * number - 0.1, 0.02 * number]).as_matrix()
    pose[:3, 3] = 0.15 * number - 0.3, 0.05 * number, 0.02 * number
    v, u = np.meshgrid(np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5, indexing="ij")
    ray = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(intrinsics).T
    along = ray @ pose[:3, :3].T
    depth = (OFFSET - NORMAL @ pose[:3, 3]) / (along @ NORMAL)
    return colours(along * depth[..., None] + pose[:3, 3]), depth, pose


def colours(world):
    paint = np.stack([40 * world[..., 0] + 128, 40 * world[..., 1] + 128, 25 * world[..., 2] + 40], -1)
    return paint.clip(0, 255).round().astype(np.uint8)


def save_image(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **({"quality": 97, "subsampling": 0} if path.suffix == ".jpg" else {}))


def save_depth(path, depth, unit=1e-3):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((depth / unit).round().astype(np.uint16)).save(path)


def save_exr(path, depth):
    import OpenEXR

    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    OpenEXR.File(header, {"Y": depth.astype(np.float32)}).write(str(path))


def sevenscenes(folder, count):
    """One scene in two sequences, of which the second is for testing."""
    for sequence, numbers in (("seq-01", range(count)), ("seq-02", range(count))):
        place = folder / "chess" / sequence
        for n in numbers:
            image, depth, pose = shot(n)
            depth[0, :3] = 65.535
            save_image(place / f"frame-{n:06d}.color.png", image)
            save_depth(place / f"frame-{n:06d}.depth.png", depth)
            np.savetxt(place / f"frame-{n:06d}.pose.txt", pose)
        np.savetxt(place / "camera-intrinsics.txt", CAMERA)
    (folder / "chess" / "TestSplit.txt").write_text("sequence2\n")
    return {"chess/seq-01": "train", "chess/seq-02": "test"}


def tum(folder, count):
    """Depth runs 5 ms behind the images, the poses at five times their rate."""
    place = folder / "rgbd_dataset_freiburg9_wall"
    lines = {"rgb": ["# color images"], "depth": ["# depth maps"], "groundtruth": ["# timestamp tx ty tz qx qy qz qw"]}
    for n in range(count):
        image, depth, pose = shot(n)
        time = 1305031102.175304 + n / 30
        save_image(place / f"rgb/{time:.6f}.png", image)
        save_depth(place / f"depth/{time + 0.005:.6f}.png", depth, 1 / 5000)
        lines["rgb"].append(f"{time:.6f} rgb/{time:.6f}.png")
        lines["depth"].append(f"{time + 0.005:.6f} depth/{time + 0.005:.6f}.png")
        for k in range(-2, 3):  # the nearest in time is the true one
            other = shot(n + 9 * k)[2]
            numbers = [*other[:3, 3], *Rotation.from_matrix(other[:3, :3]).as_quat()]
            lines["groundtruth"].append(f"{time + k / 150:.4f} " + " ".join(f"{x:.6f}" for x in numbers))
    for name, text in lines.items():
        (place / f"{name}.txt").write_text("\n".join(text) + "\n")
    np.savetxt(place / "camera-intrinsics.txt", CENTRED)
    return {place.name: None}


def scannet(folder, count):
    """Depth at half the resolution, with intrinsics of its own."""
    own = np.array([[28.0, 0, 16.5], [0, 29.0, 11.5], [0, 0, 1]])
    for n in range(count):
        image, _, pose = shot(n)
        place = folder / "scene0000_00"
        save_image(place / f"color/{n}.jpg", image)
        save_depth(place / f"depth/{n}.png", shot(n, own, (24, 32))[1])
        (place / "pose").mkdir(exist_ok=True)
        np.savetxt(place / f"pose/{n}.txt", pose)
    (place / "intrinsic").mkdir()
    for name, k in (("color", CAMERA), ("depth", own)):
        whole = np.eye(4)
        whole[:3, :3] = k - [[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]]
        np.savetxt(place / f"intrinsic/intrinsic_{name}.txt", whole)
    return {"scene0000_00": None}


def co3d(folder, count):
    for split, sequence in (("train", "110_13051_23361"), ("test", "189_20393_38136")):
        place = folder / "apple" / sequence
        for n in range(count):
            image, depth, pose = shot(n)
            save_image(place / f"images/frame{n:06d}.jpg", image)
            camera = {"camera_pose": pose.astype(np.float32), "camera_intrinsics": CENTRED.astype(np.float32)}
            np.savez(place / f"images/frame{n:06d}.npz", maximum_depth=np.float32(FARTHEST), **camera)
            save_depth(place / f"depths/frame{n:06d}.jpg.geometric.png", depth, FARTHEST / 65535)
            save_image(place / f"masks/frame{n:06d}.png", image[..., 0])
        listed = {"apple": {sequence: list(range(count))}}
        (folder / f"selected_seqs_{split}.json").write_text(json.dumps(listed))
    return {"apple/110_13051_23361": "train", "apple/189_20393_38136": "test"}


def wildrgbd(folder, count):
    place = folder / "cup" / "scenes_001"
    for n in range(count):
        image, depth, pose = shot(n)
        save_image(place / f"rgb/{n:05d}.jpg", image)
        save_depth(place / f"depth/{n:05d}.png", depth)
        (place / "metadata").mkdir(exist_ok=True)
        np.savez(place / f"metadata/{n:05d}.npz", camera_pose=pose, camera_intrinsics=CENTRED)
    return {"cup/scenes_001": None}


def blendedmvs(folder, count):
    high, low = 0x5A3CA9CB, 0x270F0E3F14D0EDDB
    place = folder / f"{high:08x}{low:016x}"
    for n in range(count):
        image, depth, pose = shot(n)
        save_image(place / f"{n:08d}.jpg", image)
        save_exr(place / f"{n:08d}.exr", depth)
        camera = {"R_cam2world": pose[:3, :3], "t_cam2world": pose[:3, 3]}
        np.savez(place / f"{n:08d}.npz", intrinsics=CENTRED, **camera)
    fields = [
        ("seq_high", np.uint32),
        ("seq_low", np.uint64),
        ("img1", np.uint32),
        ("img2", np.uint32),
        ("score", "f4"),
    ]
    rows = [(high, low, i, i + 1, 0.5) for i in range(count - 1)]
    np.save(folder / "blendedmvs_pairs.npy", np.array(rows, fields))
    return {place.name: None}


def megadepth(folder, count):
    places, images, pairs = ["0001 0", "0022 1"], [], []
    for scene, name in enumerate(places):
        first = len(images)
        for n in range(count):
            image, depth, pose = shot(n)
            place = folder / name.replace(" ", "/")
            images.append(f"{scene}{n}_photo.of_it_o")
            save_image(place / f"{images[-1]}.jpg", image)
            save_exr(place / f"{images[-1]}.exr", np.where(depth > 3.4, 0, depth))
            np.savez(place / f"{images[-1]}.npz", intrinsics=CENTRED, cam2world=pose)
        pairs += [(scene, first + i, first + i + 1, 0.4) for i in range(count - 1)]
    fields = [("scene", np.int64), ("im1", np.int64), ("im2", np.int64), ("score", np.float64)]
    np.savez(folder / "all_metadata.npz", scenes=places, images=images, pairs=np.array(pairs, fields))
    return {"0001/0": "train", "0022/1": "test"}


def _indexed(folder, scenes, count, colour, depths, ending):
    names, ids, poses = [], [], []
    for scene, name in enumerate(scenes):
        for n in range(count):
            image, depth, pose = shot(n)
            stem = f"{4100 + scene}_{n}.{n}71"
            save_image(folder / name / colour / f"{stem}.jpg", image)
            save_depth(folder / name / depths / f"{stem}.png", depth)
            names.append(stem + ending), ids.append(scene), poses.append(pose)
    total = len(names)
    pairs = [(i, j) for i in range(total) for j in range(i) if ids[i] == ids[j] and i - j < 3]
    np.savez(
        folder / "all_metadata.npz",
        scenes=scenes,
        sceneids=ids,
        images=names,
        intrinsics=np.repeat(CENTRED[None], total, 0).astype(np.float32),
        trajectories=np.stack(poses).astype(np.float32),
        pairs=pairs,
    )


def scannetpp(folder, count):
    _indexed(folder, ["0a5c013435", "0a7cc12c0e"], count, "images", "depth", "")
    return {"0a5c013435": None, "0a7cc12c0e": None}


def arkitscenes(folder, count):
    for part, scenes in (("Training", ["40753679"]), ("Test", ["41069021"])):
        (folder / part).mkdir()
        _indexed(folder / part, scenes, count, "vga_wide", "lowres_depth", ".png")
    return {"40753679": "train", "41069021": "test"}


WRITERS = (sevenscenes, tum, scannet, co3d, wildrgbd, blendedmvs, megadepth, scannetpp, arkitscenes)
EXR = (blendedmvs, megadepth)
