import os
import pickle
import random
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from engines.errors import InputError
from trainables import checkpoint


def content(value, size=10):
    return {"model": {"w": torch.full((size,), float(value))}, "epoch": value, "best": float("nan"), "names": ["a"]}


def one_line(error):
    text = str(error.value)
    assert text and "\n" not in text
    return text


def test_what_is_saved_is_loaded_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "state.pt"
    checkpoint.save(path, content(1))
    checkpoint.save(path, content(2))
    loaded = checkpoint.load(path)
    assert loaded["epoch"] == 2 and loaded["names"] == ["a"] and loaded["best"] != loaded["best"]
    assert torch.equal(loaded["model"]["w"], torch.full((10,), 2.0))
    assert os.listdir(tmp_path) == ["state.pt"]


class Unwritable:
    def __init__(self, error):
        self.error = error

    def __reduce__(self):
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("broke"), RuntimeError(), TypeError("no pickle"), KeyboardInterrupt()])
def test_a_write_that_fails_half_way_keeps_the_old_file(tmp_path, error):
    path = tmp_path / "state.pt"
    checkpoint.save(path, content(1))
    before = path.read_bytes()
    with pytest.raises((OSError, TypeError, KeyboardInterrupt)) as found:
        checkpoint.save(path, {**content(2), "bad": Unwritable(error)})
    if isinstance(error, RuntimeError):
        assert str(path) in one_line(found) and "the earlier checkpoint is kept" in one_line(found)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["state.pt"]


def test_a_failing_rename_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    checkpoint.save(path, content(1))

    def refuse(*paths):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint.os, "replace", refuse)
    with pytest.raises(OSError, match="Input/output error; the earlier checkpoint is kept") as error:
        checkpoint.save(path, content(2))
    assert str(path) in one_line(error)
    assert checkpoint.load(path)["epoch"] == 1 and os.listdir(tmp_path) == ["state.pt"]


def test_a_missing_folder_is_said_in_one_line(tmp_path):
    with pytest.raises(OSError, match="there was no earlier checkpoint") as error:
        checkpoint.save(tmp_path / "nowhere" / "state.pt", content(1))
    assert "No such file" in one_line(error)


@pytest.mark.parametrize("floats", [250_000, 4_000_000])
def test_full_disk_keeps_the_old_file_and_says_so(small_disk, floats):
    """The second file does not fit beside the first: just so, and by far."""
    path = small_disk / "state.pt"
    checkpoint.save(path, content(1, 100_000))
    before = path.read_bytes()
    with pytest.raises(OSError) as error:
        checkpoint.save(path, content(2, floats))
    text = one_line(error)
    assert "no space left on the device" in text and "the earlier checkpoint is kept" in text and str(path) in text
    assert path.read_bytes() == before and os.listdir(small_disk) == ["state.pt"]
    checkpoint.save(small_disk / "after.pt", content(3, 100_000))  # what the failed file took is free again


def test_full_disk_before_the_first_file(small_disk):
    with pytest.raises(OSError, match="no space left on the device; there was no earlier checkpoint"):
        checkpoint.save(small_disk / "state.pt", content(1, 4_000_000))
    assert os.listdir(small_disk) == []


def test_unusable_files_end_in_one_line(tmp_path):
    good = tmp_path / "good.pth"
    checkpoint.save(good, content(1, 1000))
    whole = good.read_bytes()
    cases = {"empty": b"", "half": whole[: len(whole) // 2], "tail": whole[:-1], "text": b"hello world\n" * 50}
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match="cannot be read") as error:
            checkpoint.load(tmp_path / name, "teacher")
        assert one_line(error).startswith(f"teacher {tmp_path / name}")
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("hello", "world")
    with pytest.raises(InputError, match="cannot be read") as error:
        checkpoint.load(tmp_path / "zip")
    one_line(error)
    for missing in (tmp_path / "missing.pth", tmp_path):
        with pytest.raises(InputError, match="does not exist") as error:
            checkpoint.load(missing)
        one_line(error)
    torch.save([1, 2], tmp_path / "list")
    with pytest.raises(InputError, match="holds a list") as error:
        checkpoint.load(tmp_path / "list")
    one_line(error)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_file_that_would_run_code_is_refused(tmp_path):
    exploded = tmp_path / "exploded"
    torch.save({"model": Bomb(exploded)}, tmp_path / "bomb.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"model": Bomb(exploded)}))
    for name in ("bomb.pth", "plain.pth"):
        with pytest.raises(InputError, match="cannot be read") as error:
            checkpoint.load(tmp_path / name)
        one_line(error)
    assert not exploded.exists()
    with open(tmp_path / "bomb.pth", "rb") as file:  # it is a bomb: unpickling it does run its code
        torch.load(file, weights_only=False)
    assert exploded.exists()


def draws():
    return [torch.rand(3).tolist(), np.random.rand(3).tolist(), np.random.randn(1).tolist(), random.random()]


def test_random_states_survive_the_file(tmp_path):
    torch.manual_seed(3), np.random.seed(4), random.seed(5)
    np.random.randn(1)  # leaves a cached second normal number, which is part of the state
    random.gauss(0, 1)
    checkpoint.save(tmp_path / "rng.pt", {"rng": checkpoint.rng_states()})
    expected = [draws(), random.gauss(0, 1)]
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    checkpoint.restore_rng(checkpoint.load(tmp_path / "rng.pt")["rng"])
    assert [draws(), random.gauss(0, 1)] == expected


def test_model_hash_tells_bits_names_and_shapes_apart():
    def model(shape=(2, 3), name="a", bump=0.0):
        module = nn.Module()
        module.register_buffer(name, torch.arange(6.0).reshape(shape) + bump)
        return module

    assert checkpoint.model_hash(model()) == checkpoint.model_hash(model())
    others = [model((3, 2)), model(name="b"), model(bump=1e-6)]
    assert len({checkpoint.model_hash(m) for m in [model(), *others]}) == 4
