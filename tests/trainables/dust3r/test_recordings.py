"""From a folder of frames to batches: splits, picked frames, pair graphs, what is skipped, and a domain that trains."""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from engines.errors import InputError
from sweeps.settings import DISTILL, WORKLOAD, resolve
from trainables import evaluate
from trainables.config import WorkloadSettings
from trainables.dust3r.__main__ import main
from trainables.dust3r.frames import Scene
from trainables.dust3r.recordings import BLOCKS, Recordings, splits

SPEC = importlib.util.spec_from_file_location("written_layouts", Path(__file__).parent / "layouts.py")
written = sys.modules.setdefault("written_layouts", importlib.util.module_from_spec(SPEC))
SPEC.loader.exec_module(written)
FEW = {"val_pairs": 3, "test_pairs": 3, "sampled_pairs": 4, "views_per_scene": 30, "neighbours": 3, "workload_seed": 42}


@pytest.fixture(scope="module")
def wall(tmp_path_factory):
    """One sequence of 30 frames in 7-Scenes' layout."""
    folder = tmp_path_factory.mktemp("recorded")
    written.sevenscenes(folder / "whole", 30)
    (folder / "whole/chess/seq-01").rename(folder / "wall")
    return folder / "wall"


def workload(folder, **changes):
    return WorkloadSettings(data=str(folder), image_size="48x32", **{**FEW, **changes})


def recordings(folder, train_pairs=8, seed=7, **changes):
    return Recordings(Path(folder), workload(folder, **changes), seed, train_pairs)


def names(listing):
    return {(link.scene.name, name) for link in listing.links for name in (link.first, link.second)}


def test_a_batch_is_the_wall_from_camera_1(wall):
    data = recordings(wall)
    batch = data.pairs("train", torch.arange(6))
    assert batch["image"].shape == (6, 2, 3, 32, 48) and batch["image"].dtype == torch.uint8
    assert batch["points"].shape == (6, 2, 32, 48, 3) and batch["points"].dtype == torch.float32
    assert batch["intrinsics"].shape == (6, 2, 3, 3) and batch["pose"].shape == (6, 4, 4)
    for row, link in enumerate(data.listing("train").links[:6]):
        first, second = (written.shot(int(name[-6:]))[2] for name in (link.first, link.second))
        assert torch.allclose(batch["pose"][row].double(), torch.from_numpy(np.linalg.inv(first) @ second), atol=1e-5)
        for view in (0, 1):
            local = batch["points"][row, view].double().numpy()
            world = local @ first[:3, :3].T + first[:3, 3]
            known = np.isfinite(local).all(-1)
            assert np.abs(world @ written.NORMAL - written.OFFSET)[known].max() < 0.03
            paint = np.abs(batch["image"][row, view].permute(1, 2, 0).numpy() - written.colours(world).astype(int))
            assert np.percentile(paint[known], 95) <= 3
    again = data.pairs("train", torch.tensor([3, 11, 0]))
    assert torch.equal(again["image"][0], again["image"][1]), "behind the last of 8 pairs they begin anew"
    assert torch.equal(again["image"][2], batch["image"][0]) and again["points"].isfinite().all()


def test_unknown_depths_are_no_points(wall, tmp_path):
    folder = shutil.copytree(wall, tmp_path / "wall")
    for path in folder.glob("*.depth.png"):
        depth = written.shot(int(path.name[6:12]))[1]
        depth[:, :20] = 0
        written.save_depth(path, depth)
    points = recordings(folder).pairs("val", torch.arange(3))["points"]
    unknown = points.isnan().all(-1)
    assert torch.equal(unknown, points.isnan().any(-1)) and 0.1 < unknown.float().mean() < 0.4
    assert unknown[..., :4].all() and not unknown[..., 20:].any()


def test_one_sequence_is_cut_into_blocks(wall):
    data = recordings(wall)
    used = {split: names(data.listing(split)) for split in BLOCKS}
    numbers = {split: sorted(int(name[-6:]) for _, name in found) for split, found in used.items()}
    assert numbers["train"][-1] < 18 <= numbers["val"][0] and numbers["val"][-1] < 24 <= numbers["test"][0]
    assert all(len(data.listing(split).links) == {"train": 8, "val": 3, "test": 3}[split] for split in BLOCKS)
    for link in data.listing("test").links:
        assert abs(int(link.first[-6:]) - int(link.second[-6:])) >= 1


def scenes(*named):
    return [Scene(name, ("a", "b"), None, split, place=place) for name, split, place in named]


@pytest.mark.parametrize("seed", range(5))
def test_no_place_is_in_two_splits(seed):
    listed = [(f"p{k // 3}/s{k}", None, f"p{k // 3}") for k in range(60)]
    found = splits(scenes(*listed), seed)
    places = {split: {scene.place for scene in part} for split, part in found.items()}
    assert {split: len(part) for split, part in places.items()} == {"train": 16, "val": 2, "test": 2}
    assert len(set.union(*places.values())) == 20 and sum(map(len, found.values())) == 60
    assert splits(scenes(*listed[::-1]), seed)["test"][0].place in places["test"], "the order does not matter"
    other = [scene.place for scene in splits(scenes(*listed), seed + 100)["test"]]
    assert set(other) != places["test"] or seed == 0


def test_what_the_layout_says_is_kept():
    listed = [(f"s{k}", "test" if k in (3, 8) else "train", None) for k in range(12)]
    found = splits(scenes(*listed), 0)
    assert {scene.name for scene in found["test"]} == {"s3", "s8"} and len(found["val"]) == 1
    # One place alone: its recordings are told apart; two recordings: blocks of frames.
    one = splits(scenes(("a", "train", "p"), ("b", "test", "p"), ("c", "train", "p")), 0)
    assert [scene.name for scene in one["test"]] == ["b"] and {len(part) for part in one.values()} == {1}
    two = splits(scenes(("a", None, None), ("b", None, None)), 0)
    assert all([scene.name for scene in part] == ["a", "b"] for part in two.values())


def test_broken_frames_are_skipped_and_counted(wall, tmp_path, capsys):
    folder = shutil.copytree(wall, tmp_path / "wall")
    image = folder / "frame-000003.color.png"
    image.write_bytes(image.read_bytes()[:300])
    np.savetxt(folder / "frame-000019.pose.txt", np.full((4, 4), -np.inf))
    written.save_depth(folder / "frame-000025.depth.png", np.zeros(written.SIZE))
    (folder / "frame-000028.depth.png").unlink()
    data = recordings(folder)
    said = data.sampled()["skipped_frames"]
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "4 frames skipped" in warning and str(folder) in warning
    expected = {"000003": "truncated", "000019": "finite", "000025": "unknown everywhere", "000028": "No such file"}
    assert {name[-6:] for name in said} == expected.keys()
    assert all(why in said[f"wall/frame-{name}"] for name, why in expected.items())
    assert data.sampled()["frames"] == {"val": 5, "test": 4}
    for split in BLOCKS:
        assert not {name[-6:] for _, name in names(data.listing(split))} & expected.keys()
        assert data.pairs(split, torch.arange(3))["image"].shape[0] == 3
    with pytest.raises(InputError, match=r"too few pairs for .*; 4 frames skipped \(wall/frame-"):
        recordings(folder, val_pairs=100).sampled()
    for path in folder.glob("*.pose.txt"):
        path.write_text("nothing")
    with pytest.raises(InputError, match=r"no pair for (train|val|test).*frames skipped.*pose.txt") as error:
        recordings(folder).sampled()
    assert "\n" not in str(error.value)


def test_too_few_pairs_are_named_with_the_fix(wall):
    many = {"val_pairs": 100, "test_pairs": 90, "sampled_pairs": 200}
    with pytest.raises(InputError) as error:
        recordings(wall, 1000, **many).sampled()
    text = str(error.value)
    fixes = dict(re.findall(r"\(--set (\w+)=(\d+)\)", text))
    assert set(fixes) == {"train_samples", *many} and "\n" not in text
    assert "pair_graph=complete may give more" in text
    counts = {key: int(value) for key, value in fixes.items()}
    train = counts.pop("train_samples") // 2
    fitting = recordings(wall, train, **counts)
    assert len(fitting.sampled()["pairs (scene, frame, frame)"]) == counts["sampled_pairs"]
    assert len(fitting.listing("train").links) == train


def test_images_too_small_for_the_workload_are_one_line(wall):
    large = WorkloadSettings(data=str(wall), image_size="128x128", **FEW)
    with pytest.raises(InputError, match=r"18 frames skipped \(.*too small.*--set image_size= .now 128x128"):
        Recordings(wall, large, 7, 8).sampled()


def test_listed_pairs_are_used(tmp_path):
    (tmp_path / "data").mkdir()
    written.scannetpp(tmp_path / "data", 20)
    data = recordings(tmp_path / "data")
    for split in BLOCKS:
        for link in data.listing(split).links:
            numbers = [int(name.split("_")[1].split(".")[0]) for name in (link.first, link.second)]
            assert abs(numbers[0] - numbers[1]) in (1, 2)
    complete = recordings(tmp_path / "data", pair_graph="complete", train_pairs=60)
    far = {abs(int(a.first.split("_")[1][0]) - int(a.second.split("_")[1][0])) for a in complete.listing("train").links}
    assert max(far) > 2


# ------------------------------------------------------------------ the domain on recordings
def test_identities_follow_what_the_frames_hold(tiny, wall, tmp_path):
    def ids(folder, **changes):
        domain = tiny.domain(data=str(folder), image_size="48x32", **{**FEW, **changes}, train_samples=16, batch_size=8)
        return domain.contents()["data"], domain.split_id("val"), domain.split_id("test")

    teacher = tiny.save_model(tmp_path / "t.pth", tiny.new_model(img_size=(32, 48)))

    def workload_hash(folder):
        said = {"data": str(folder), "image_size": "48x32", "teacher": str(teacher), **FEW, "train_samples": 16}
        resolved = resolve((WORKLOAD, DISTILL), "demo", {**said, "batch_size": 8, "samples_per_epoch": 16})
        job = {"domain": "dust3r", "settings": dict(resolved.values), "seed": 7, "trials": []}
        return resolved.identified(*evaluate.identify(job)).workload_hash

    moved = shutil.copytree(wall, tmp_path / "moved" / "wall")
    assert ids(wall) == ids(moved) and workload_hash(wall) == workload_hash(moved), "where they lie does not count"
    before = ids(moved), workload_hash(moved)
    for number, changed in ((3, [True, False, False]), (19, [False, True, False]), (25, [False, False, True])):
        path = moved / f"frame-{number:06d}.pose.txt"
        pose = np.loadtxt(path)
        pose[0, 3] += 0.01
        np.savetxt(path, pose)
        after = ids(moved), workload_hash(moved)
        assert [a != b for a, b in zip(after[0], before[0], strict=True)] == changed
        assert (after[1] != before[1]) == any(changed[1:]), "training frames are not part of the protocol"
        before = after


def test_a_student_trains_on_frames_with_holes(tiny, wall, tmp_path):
    folder = shutil.copytree(wall, tmp_path / "wall")
    for path in folder.glob("*.depth.png"):
        depth = written.shot(int(path.name[6:12]))[1]
        depth[10:30, 5:40] = 0
        written.save_depth(path, depth)
    teacher = tiny.save_model(tmp_path / "t.pth", tiny.new_model(img_size=(32, 48)))
    few = {**FEW, "data": str(folder), "image_size": "48x32", "train_samples": 16, "batch_size": 8}
    domain = tiny.domain(teacher=str(teacher), **few)
    batch = domain.samples("train", torch.arange(8))
    unknown = batch["points"].isnan().any(-1)
    assert unknown.any() and batch["points"].dtype == torch.float16
    assert torch.equal(batch["image"][0::2], batch["image"][1::2].flip(1)), "each pair is seen both ways"
    batch |= domain.teacher_outputs(domain.teacher(), batch)
    student = domain.student(inherit=True)
    outputs = domain.forward(student, batch)
    loss = domain.task_loss(outputs, batch) + domain.signal_loss("kl", outputs, batch, domain.adapters())
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)
    filled = {**batch, "points": batch["points"].clone()}
    filled["points"][unknown] = torch.nan
    assert torch.equal(domain.task_loss(outputs, filled), domain.task_loss(outputs, batch))
    found = domain.evaluate(student.eval(), "test", full=True)
    assert all(value.shape == (3,) and value.isfinite().all() for value in found.values())
    beside = domain.compare(found, "test")
    assert beside["absrel_lo"] <= float(found["absrel"].mean()) <= beside["absrel_hi"]
    assert 0 < beside["absrel_mean_depth_map"] < 1


def test_the_scene_is_of_test_frames_that_pairs_join(wall):
    data = recordings(wall)
    found = data.scene()
    frames = data.listing("test").links[0].scene.frames
    assert 2 < len(found.names) <= 8 and {name.split("/")[-1] for name in found.names} <= set(frames)
    assert found.image.shape == (len(found.names), 3, 32, 48) and found.image.dtype == torch.uint8
    poses = [written.shot(int(name[-6:]))[2] for name in found.names]
    for k, pose in enumerate(poses):
        assert np.allclose(found.pose[k], np.linalg.inv(poses[0]) @ pose, atol=1e-5)
    assert all((j, i) in found.edges for i, j in found.edges)
    few = recordings(wall, scene_views=2).scene()
    assert len(few.names) == 2 and sorted(few.edges) == [(0, 1), (1, 0)]
    assert found.skipped == {}
    assert data.sampled()["scene"] == {"views": found.names, "pairs": [list(edge) for edge in found.edges]}


def test_a_scene_says_which_frames_it_lacks(tiny, wall, tmp_path, capsys):
    folder = shutil.copytree(wall, tmp_path / "wall")
    for number in (3, 25):  # of training and of the scene
        np.savetxt(folder / f"frame-{number:06d}.pose.txt", np.full((4, 4), -np.inf))
    teacher = tiny.save_model(tmp_path / "t.pth", tiny.new_model(img_size=(32, 48)))
    few = ("views_per_scene=30", "scene_views=3", "scene_steps=2", "image_size=48x32")
    sets = [word for item in few for word in ("--set", item)]
    command = ["scene", "--model", str(teacher), "--data", str(folder), "--out", str(tmp_path / "out"), "--known-poses"]
    assert main([*command, *sets]) == 0
    assert "1 frame skipped (wall/frame-000025: its pose is not finite)" in capsys.readouterr().out
    listed = json.loads((tmp_path / "out" / "poses.json").read_text())["skipped_frames"]
    assert listed == {"wall/frame-000025": "its pose is not finite"}
