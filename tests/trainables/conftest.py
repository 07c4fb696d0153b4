"""A teacher of a few thousand random weights on 32 x 32 images, and what its trials need; handed out as fixtures."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import ray
import torch
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from sweeps.cluster import Wanted, connect
from trainables import checkpoint
from trainables.dust3r.domain import SMALL_TEACHER, Dust3r
from trainables.dust3r.model import from_reference_config

ROOT = Path(__file__).parents[2]
TINY = {
    **SMALL_TEACHER,
    **{"img_size": (32, 32), "enc_embed_dim": 32, "enc_depth": 3, "enc_num_heads": 4},
    **{"dec_embed_dim": 24, "dec_depth": 3, "dec_num_heads": 3},
}
SETTINGS = {
    **{"image_size": "32x32", "val_pairs": 12, "test_pairs": 20, "workload_seed": 42, "sampled_pairs": 20},
    **{
        "neighbours": 4,
        "views_per_scene": 8,
        "scene_views": 3,
        "scene_steps": 2,
        "scene_repeats": 2,
        "primary": "absrel",
        "warmup": 1,
        "repeats": 5,
        "threads": 1,
        "peers": False,
    },
    **{"epochs": 3, "samples_per_epoch": 24, "train_samples": 40, "batch_size": 8, "lr": 2e-3, "lr_end": 0.01},
    "peers": False,
    **{"optimizer": "muon", "lr_warmup": 0.1, "weight_decay": 0.01, "alpha": 1.0, "T": 3.0, "beta": 0.5, "gamma": 0.0},
    **{"precision": "float32", "accumulate": 1, "checkpointing": False},
    **{"depth": 0.7, "heads": 0.7, "ffn": 0.7, "init": "inherit"},
}
CLOCKS = ("seconds_train", "seconds_val", "seconds_data", "epoch_s", "cpu_s")


def new_model(seed=0, **config):
    """Random weights; the heads' bias puts the points before the camera, as any trained teacher's are."""
    torch.manual_seed(seed)
    model = from_reference_config(**{**TINY, **config})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.03)
        for head in (model.downstream_head1, model.downstream_head2):
            head.proj.bias.view(4, -1)[2] += 1.0
    return model.eval()


def save_model(path, model):
    checkpoint.save(path, {"model": model.state_dict(), "config": model.config})
    return path


def without_clocks(metrics):
    """What a step reports, less what a clock measured; NaN compares equal to NaN."""
    return {k: ("nan" if v != v else v) for k, v in metrics.items() if k not in CLOCKS}


def same(a, b):
    """Whether two nested structures hold bit for bit the same, NaN included."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b or (a != a and b != b)


def bits(tensor):
    return torch.from_numpy(tensor.detach().contiguous().numpy().reshape(-1).view(np.uint8).copy())


def python(code, *arguments, wait=True):
    """Run `code` in a fresh interpreter with the project on its path, one thread; its standard output."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    if not wait:
        return subprocess.Popen(command, cwd=ROOT, env=environment)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("teacher") / "teacher.pth", new_model())


@pytest.fixture
def tiny(teacher_file, tmp_path):
    """tiny.settings(**changes), tiny.domain(seed, **changes), tiny.config(name, params, **changes), tiny.job(...)."""

    def settings(**changes):
        return {**SETTINGS, "teacher": str(teacher_file), **changes}

    def config(name, params=None, cache="cache", **changes):
        return {
            **{
                "trial_id": name,
                "domain": "dust3r",
                "params": params or {},
                "seed": 7,
                "settings": settings(**changes),
            },
            **{"state_dir": str(tmp_path / "trials" / name), "cache_dir": str(tmp_path / cache)},
        }

    def job(weights=None, trains=True, **changes):
        (tmp_path / "work").mkdir(exist_ok=True)
        (tmp_path / "trials" / "job").mkdir(parents=True, exist_ok=True)
        return {
            **{"domain": "dust3r", "settings": settings(**changes), "params": {}, "seed": 7},
            "trials": [{}] if trains else [],
            **{"state_dir": str(tmp_path / "trials" / "job"), "workload_hash": "w"},
            **{"work_dir": str(tmp_path / "work"), "cache_dir": str(tmp_path / "cache")},
            "weights": str(weights) if weights else None,
        }

    return SimpleNamespace(
        **{"settings": settings, "config": config, "job": job, "teacher_file": teacher_file, "python": python},
        **{"new_model": new_model, "save_model": save_model, "same": same, "without_clocks": without_clocks},
        domain=lambda seed=7, **changes: Dust3r(settings(**changes), seed),
    )


@pytest.fixture(scope="module")
def cluster():
    with connect(Wanted(None)):
        yield


@pytest.fixture
def gang(cluster):
    """gang.lead(kind, config): the actor of a trial of two workers, placed as Tune places it; it takes the place of the
    last one. gang.followers(): the living processes of those that follow. gang.wait(condition): until it holds, or a
    failure after a minute.
    """
    groups = []

    def lead(kind, config):
        free()
        groups.append(placement_group([{"CPU": 0.5}] * 2))
        ray.get(groups[-1].ready(), timeout=60)
        place = PlacementGroupSchedulingStrategy(groups[-1], 0, placement_group_capture_child_tasks=True)
        return ray.remote(kind).options(num_cpus=0.5, scheduling_strategy=place).remote({**config, "workers": 2})

    def free():
        while groups:
            remove_placement_group(groups.pop())

    def followers():
        mine = psutil.Process().children(recursive=True)
        return [process for process in mine if named(process).startswith("ray::Follower")]

    def wait(condition):
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end, "in vain"
            time.sleep(0.05)

    yield SimpleNamespace(lead=lead, followers=followers, wait=wait)
    free()
    wait(lambda: not followers())


def named(process):
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_disk(tmp_path):
    """An empty disk of 1 MiB, mounted for the test."""
    folder = tmp_path / "small_disk"
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", b"") or str(error).encode()
        pytest.skip(f"mounting a tmpfs is not allowed here: {reason.decode().strip()}")
    yield folder
    with contextlib.suppress(subprocess.CalledProcessError):
        subprocess.run(["umount", "-l", folder], check=True, capture_output=True)
