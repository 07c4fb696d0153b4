import json
import os
import shutil
from functools import partial

import numpy as np
import pytest
import torch

from engines.errors import InputError
from trainables import teacher_cache
from trainables.domain import make_domain
from trainables.dust3r.domain import Dust3r
from trainables.teacher_cache import Layout, TeacherCache, teacher_metrics

# Builds a cache and notes who computes which samples; its first shard is not done before so many processes have begun.
BUILD = """
import json, os, sys, time
from functools import partial
from pathlib import Path
import torch
from trainables import teacher_cache
from trainables.dust3r.domain import Dust3r
teacher_cache.BLOCK, teacher_cache.SHARD = 16, 1
folder, settings, count = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
class Noted(Dust3r):
    def samples(self, split, indices):
        with open(folder / "blocks.log", "a") as log:
            log.write(f"{int(indices[0])} {len(indices)} {os.getpid()}\\n")
        if len(indices) > 1:
            (folder / f"began.{os.getpid()}").touch()
            while len(list(folder.glob("began.*"))) < int(sys.argv[4]):
                time.sleep(0.01)
        return super().samples(split, indices)
teacher_cache.TeacherCache(folder, partial(Noted, settings, 7), count, True).build()
"""


class Counted(Dust3r):
    """Notes what is computed; `fails_at` interrupts that block."""

    calls: list[list[int]] = []
    fails_at = None

    def samples(self, split, indices):
        if int(indices[0]) == self.fails_at and len(indices) > 1:
            raise KeyboardInterrupt
        self.calls.append(indices.tolist())
        return super().samples(split, indices)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(teacher_cache, "BLOCK", 16)
    monkeypatch.setattr(teacher_cache, "SHARD", 1)
    monkeypatch.setattr(Counted, "calls", [])
    monkeypatch.setattr(Counted, "fails_at", None)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.npy")}


def shard(cache, number):
    (path,) = cache.folder.glob(f"{number:05d}.*.npy")
    return path


def test_rows_are_what_the_teacher_says(tiny, tmp_path):
    make = partial(Dust3r, tiny.settings(), 7)
    cache = TeacherCache(tmp_path, make, 40, states=True)
    cache.build()
    domain = make()
    fresh = {}
    for block in torch.split(torch.arange(40), 16):
        batch = domain.samples("train", block)
        batch |= domain.teacher_outputs(domain.teacher(), batch)
        for name, value in batch.items():
            fresh.setdefault(name, []).append(value)
    fresh = {name: torch.cat(parts) for name, parts in fresh.items()}
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    rows = cache.rows(order)
    assert rows.keys() == fresh.keys()
    assert {"image", "points", "teacher_pts1", "teacher_conf2", "teacher_state_enc1"} <= rows.keys()
    assert all(tiny.same(value, fresh[name][order]) for name, value in rows.items())
    assert tiny.same(cache.rows(torch.tensor([3, 3]))["image"][1], fresh["image"][3])


def test_halves_are_within_their_rounding(tiny, tmp_path):
    """Half precision rounds to 11 bits: relative error 2^-11, below 2^-14 absolute 2^-25."""
    make = partial(Dust3r, tiny.settings(), 7)
    rows = TeacherCache(tmp_path, make, 20, states=True).rows(torch.arange(20))
    domain = make()
    exact = domain.forward(domain.teacher(), domain.samples("train", torch.arange(20)))
    names = {f"teacher_state_{name}": name for name in ("enc1", "enc2", "dec1", "dec2")}
    names |= {"teacher_conf1": "conf1", "teacher_conf2": "conf2"}
    for stored, name in names.items():
        bound = exact[name].abs() * 2**-11 + 2**-25 + 1e-5  # the last term: another batch size, other rounding
        assert ((rows[stored].float() - exact[name]).abs() <= bound).all(), name
    distance = [rows[f"teacher_pts{v}"].float().norm(dim=-1).flatten(1) for v in (1, 2)]
    assert torch.allclose(torch.cat(distance, 1).mean(1), torch.ones(20), atol=1e-3), "normalised: mean distance 1"


def test_confident_teacher_stays_finite(tiny, tmp_path):
    """Confidence is 1 + exp(..): beyond half precision it must not become infinite, or every student diverges."""
    model = tiny.new_model()
    with torch.no_grad():
        model.downstream_head1.proj.bias.view(4, -1)[3] += 12.0
    path = tiny.save_model(tmp_path / "confident.pth", model)
    rows = TeacherCache(tmp_path, partial(Dust3r, tiny.settings(teacher=str(path)), 7), 16, False).rows(
        torch.arange(16)
    )
    assert rows["teacher_conf1"].isfinite().all() and (rows["teacher_conf1"] > 6e4).any()


def test_states_only_where_asked_for(tiny, tmp_path):
    make = partial(Dust3r, tiny.settings(), 7)
    lean, full = TeacherCache(tmp_path, make, 20, False), TeacherCache(tmp_path, make, 20, True)
    assert lean.folder != full.folder
    a, b = lean.rows(torch.arange(20)), full.rows(torch.arange(20))
    assert {name for name in b if name not in a} == {f"teacher_state_{s}" for s in ("enc1", "enc2", "dec1", "dec2")}
    assert all(tiny.same(a[name], b[name]) for name in a)


def test_second_build_computes_nothing(tiny, tmp_path):
    make = partial(Counted, tiny.settings(), 7)
    TeacherCache(tmp_path, make, 40, False).build()
    # One sample first, for the shapes.
    assert [(rows[0], len(rows)) for rows in Counted.calls] == [(0, 1), (0, 16), (16, 16), (32, 8)]
    Counted.calls.clear()
    again = TeacherCache(tmp_path, make, 40, False)
    again.build()
    again.rows(torch.arange(40))
    assert Counted.calls == []


def test_interrupted_build_goes_on_where_it_stood(tiny, tmp_path):
    make = partial(Counted, tiny.settings(), 7)
    TeacherCache(tmp_path / "straight", make, 40, False).build()
    Counted.calls.clear()
    Counted.fails_at = 16
    broken = TeacherCache(tmp_path / "broken", make, 40, False)
    with pytest.raises(KeyboardInterrupt):
        broken.build()
    Counted.fails_at = None
    assert [path.name[:5] for path in broken.folder.glob("*.npy")] == ["00000"]
    Counted.calls.clear()
    going_on = TeacherCache(tmp_path / "broken", make, 40, False)
    going_on.rows(torch.arange(3))
    assert [rows[0] for rows in Counted.calls] == [16, 32]
    assert files(going_on.folder) == files(tmp_path / "straight" / broken.folder.name)


def test_a_shard_that_was_being_written_is_no_shard(tiny, tmp_path):
    """What a killed process leaves behind: its unfinished file, and the lock file without its lock."""
    make = partial(Counted, tiny.settings(), 7)
    cache = TeacherCache(tmp_path, make, 20, False)
    cache.folder.mkdir(parents=True)
    for name in (".00000.part", "00000.lock"):
        (cache.folder / name).write_bytes(b"torn")
    rows = TeacherCache(tmp_path, make, 20, False).rows(torch.arange(20))
    assert tiny.same(rows["points"], make().samples("train", torch.arange(20))["points"])
    assert not list(cache.folder.glob("*.part")) and not list(cache.folder.glob(".*.part"))


@pytest.mark.parametrize("damage", ["one byte", "truncated", "empty"])
def test_a_damaged_shard_is_found_and_computed_again(tiny, tmp_path, capsys, damage):
    make = partial(Counted, tiny.settings(), 7)
    cache = TeacherCache(tmp_path, make, 40, False)
    cache.build()
    before, path = files(cache.folder), shard(cache, 1)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes({"one byte": content, "truncated": content[:-100], "empty": b""}[damage])
    if damage != "one byte":  # which shows in the checksum alone
        with pytest.raises(InputError, match=rf"{path.name} cannot be read .*--resume") as error:
            TeacherCache(tmp_path, make, 40, False).rows(torch.tensor([0, 20]))
        assert "\n" not in str(error.value)
    Counted.calls.clear()
    TeacherCache(tmp_path, make, 40, False).build()
    assert [rows[0] for rows in Counted.calls] == [16] and files(cache.folder) == before
    said = capsys.readouterr().err
    assert f"1 of 3 shards are damaged and computed again ({path.name})" in said and len(said.splitlines()) == 1


def test_small_samples_share_a_shard_and_large_ones_are_computed_in_pieces(tiny, tmp_path, monkeypatch):
    make = partial(Counted, tiny.settings(), 7)
    one = Layout.of({"a": torch.zeros(1, 10, dtype=torch.float16), "b": torch.zeros(1, 3, dtype=torch.uint8)}, 2)
    assert (one.samples, one.piece, one.row().itemsize) == (16, 16, 23)
    monkeypatch.setattr(teacher_cache, "SHARD", 16 * 23 * 4 + 1)
    assert Layout.of({"a": torch.zeros(1, 23, dtype=torch.uint8)}, 2).samples == 5 * 16
    monkeypatch.setattr(teacher_cache, "PIECE", 23 * 7)
    assert Layout.of({"a": torch.zeros(1, 23, dtype=torch.uint8)}, 2).piece == 6, "whole groups"
    monkeypatch.setattr(teacher_cache, "SHARD", 1)
    monkeypatch.setattr(teacher_cache, "PIECE", 1)
    rows = TeacherCache(tmp_path, make, 20, False).rows(torch.arange(20))
    assert [len(rows) for rows in Counted.calls] == [1, *[2] * 10]
    assert tiny.same(rows["image"], make().samples("train", torch.arange(20))["image"])


def test_other_content_has_another_folder(tiny, tmp_path, monkeypatch):
    def folder(seed=7, count=40, **changes):
        return TeacherCache(tmp_path, partial(Dust3r, tiny.settings(**changes), seed), count, False).folder

    other = tiny.save_model(tmp_path / "other.pth", tiny.new_model(seed=1))
    big = tiny.save_model(tmp_path / "big.pth", tiny.new_model(img_size=(48, 48)))
    found = [
        folder(),
        folder(seed=8),
        folder(count=41),
        folder(teacher=str(other)),
        folder(teacher=str(big), image_size="48x48"),
    ]
    assert len(set(found)) == len(found)
    copy = tmp_path / "copy.pth"
    shutil.copy(tiny.teacher_file, copy)
    assert folder(teacher=str(copy), T=5.0, beta=0.9, epochs=9, batch_size=4) == found[0], "by content"


def test_two_processes_fill_one_cache_side_by_side_and_compute_nothing_twice(tiny, tmp_path):
    arguments = (tmp_path, json.dumps(tiny.settings()), 80, 2)
    processes = [tiny.python(BUILD, *arguments, wait=False) for _ in range(2)]
    try:
        assert [process.wait(120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    noted = [line.split() for line in (tmp_path / "blocks.log").read_text().splitlines()]
    filled = [(int(first), int(count)) for first, count, _ in noted if count != "1"]  # one sample shows the sizes
    assert sorted(filled) == [(k, 16) for k in range(0, 80, 16)]
    assert len({process for _, count, process in noted if count != "1"}) == 2, "both have worked"
    make = partial(Counted, tiny.settings(), 7)
    cache = TeacherCache(tmp_path, make, 80, True)
    rows = cache.rows(torch.arange(0, 80, 7))
    assert Counted.calls == [], "and a third one reads what they made"
    assert tiny.same(rows["image"], make().samples("train", torch.arange(0, 80, 7))["image"])


def test_a_killed_process_leaves_its_shard_to_another(tiny, tmp_path):
    arguments = (tmp_path, json.dumps(tiny.settings()), 240, 1)
    first = tiny.python(BUILD, *arguments, wait=False)
    while not list(tmp_path.glob("*/00003.*.npy")):
        assert first.poll() is None
    first.kill()
    first.wait()
    (cache,) = (path.parent for path in tmp_path.glob("*/layout.json"))
    kept = files(cache)
    TeacherCache(tmp_path, partial(Counted, tiny.settings(), 7), 240, True).build()
    assert {rows[0] // 16 for rows in Counted.calls} == set(range(15)) - {int(name[:5]) for name in kept}
    assert len(files(cache)) == 15 and kept.items() <= files(cache).items()


def test_two_workers_make_what_one_makes(tiny, tmp_path, monkeypatch):
    for name, value in (("BLOCK", 256), ("SHARD", 2**25)):  # workers are new processes: they know the module as it is
        monkeypatch.setattr(teacher_cache, name, value)
    settings = tiny.settings()
    make = partial(make_domain, "dust3r", settings, {}, 7)
    one, two = (TeacherCache(tmp_path / name, make, 1030, True) for name in ("one", "two"))
    one.build(workers=1)
    two.build(workers=2)
    assert files(one.folder) == files(two.folder) and len(files(one.folder)) == 2


def test_no_room_on_the_disk_is_found_before_anything_is_written(tiny, small_disk):
    make = partial(Counted, tiny.settings(), 7)
    cache = TeacherCache(small_disk, make, 4096, False)
    with pytest.raises(InputError, match="teacher cache needs 0.1 GB .* --storage .* train_samples=4096") as error:
        cache.build()
    assert "\n" not in str(error.value) and str(small_disk) in str(error.value)
    assert list(cache.folder.iterdir()) == []
    assert len(Counted.calls) == 1, "one sample, for the sizes"


def test_room_that_vanishes_in_mid_build_is_one_line_and_what_is_there_is_kept(tiny, small_disk):
    class Greedy(Counted):
        def samples(self, split, indices):
            if int(indices[0]) == 16 and len(indices) > 1:
                free = os.statvfs(small_disk)
                (small_disk / "other").write_bytes(b"x" * (free.f_bavail - 1) * free.f_frsize)
            return super().samples(split, indices)

    cache = TeacherCache(small_disk, partial(Greedy, tiny.settings(), 7), 24, False)
    with pytest.raises(InputError, match=r"became full: .*--resume goes on") as error:
        cache.build()
    assert "\n" not in str(error.value)
    kept = {path.name.split(".")[0] for path in cache.folder.glob("*.npy")}
    assert kept == {"00000"} and not list(cache.folder.glob(".*.part"))
    (small_disk / "other").unlink()
    Counted.calls.clear()
    TeacherCache(small_disk, partial(Counted, tiny.settings(), 7), 24, False).build()
    assert [rows[0] for rows in Counted.calls] == [16]


def test_teacher_metrics_are_computed_once(tiny, tmp_path, monkeypatch):
    domain = tiny.domain()
    found = teacher_metrics(tmp_path, domain, "val", full=False)
    expected = domain.evaluate(domain.teacher(), "val")
    assert found.keys() == expected.keys() and all(tiny.same(found[k], expected[k]) for k in found)
    monkeypatch.setattr(Dust3r, "evaluate", None)
    again = teacher_metrics(tmp_path, tiny.domain(T=9.0), "val", full=False)
    assert all(tiny.same(again[k], expected[k]) for k in again)
    for other in ({"workload_seed": 43}, {"val_pairs": 10}, {"primary": "rmse"}):
        with pytest.raises(TypeError):
            teacher_metrics(tmp_path, tiny.domain(**other), "val", full=False)
    with pytest.raises(TypeError):
        teacher_metrics(tmp_path, domain, "val", full=True)
    assert all(isinstance(np.load(path, allow_pickle=False)["absrel"], np.ndarray) for path in tmp_path.glob("*.npz"))
