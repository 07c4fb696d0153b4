"""The scripts at profile full, small: a checkpoint in the released format, recorded images, from P0 to chosen student.

On the real sample where it lies beside the checkout, else on frames that are written in its layout.
"""

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from trainables import checkpoint
from trainables.checkpoint import model_hash
from trainables.dust3r import released
from trainables.dust3r.model import from_reference_config
from trainables.record import read_csv

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT.parent / "shared" / "data" / "sevenscenes"
LAYOUTS = ROOT / "tests" / "trainables" / "dust3r" / "layouts.py"
ARGUMENTS = {
    "pos_embed": "RoPE100", "patch_embed_cls": "ManyAR_PatchEmbed", "img_size": (512, 512), "head_type": "dpt",
    "output_mode": "pts3d", "depth_mode": ("exp", -math.inf, math.inf), "conf_mode": ("exp", 1, math.inf),
    "enc_embed_dim": 48, "enc_depth": 4, "enc_num_heads": 4, "dec_embed_dim": 32, "dec_depth": 4, "dec_num_heads": 4,
}  # fmt: skip
FEW = ("views_per_scene=40", "val_pairs=12", "test_pairs=14", "sampled_pairs=20", "train_samples=64",
       "samples_per_epoch=64", "epochs=2", "scene_steps=20")  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The published training code's file: an argparse.Namespace with the constructor's call as text, and tensors."""
    torch.manual_seed(0)
    plain = {"patch_embed_cls": "PatchEmbedDust3R", "landscape_only": False}
    narrow = {"feature_dim": 16, "last_dim": 12, "layer_dims": (8, 12, 16, 20)}
    model = from_reference_config(**{**ARGUMENTS, **plain, **narrow})
    with torch.no_grad():  # points before the camera, as any trained model's are
        for head in (model.downstream_head1, model.downstream_head2):
            head.dpt.head[4].bias[2] += 1
    words = ", ".join(f"{key}={value!r}" for key, value in ARGUMENTS.items())
    args = argparse.Namespace(model=f"AsymmetricCroCo3DStereo({words})", lr=1e-4, amp=True, pretrained=None)
    path = tmp_path_factory.mktemp("released") / "DUSt3R_tiny.pth"
    torch.save({"args": args, "model": model.state_dict(), "epoch": 90, "best_so_far": math.inf}, path)
    return path


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """(folder, image_size) of 40 frames in 7-Scenes' layout."""
    if SAMPLE.is_dir():
        return SAMPLE, "64x48"
    spec = importlib.util.spec_from_file_location("written_layouts", LAYOUTS)
    written = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(written)
    folder = tmp_path_factory.mktemp("recorded")
    written.sevenscenes(folder, 40)
    return folder / "chess" / "seq-01", "48x32"


@pytest.fixture(scope="module")
def storage(teacher, recorded, tmp_path_factory):
    """Where both scripts left their sweeps."""
    folder, size = recorded
    storage = tmp_path_factory.mktemp("runs")
    sets = [word for item in (f"teacher={teacher}", f"data={folder}", f"image_size={size}", *FEW)
            for word in ("--set", item)]  # fmt: skip
    for script in ("baseline.py", "k_grid.py"):
        command = [sys.executable, str(ROOT / "sweeps" / script), "--profile", "full", "--storage", str(storage), *sets]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=storage, env=env, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr[-2000:]
    return storage


@pytest.mark.slow
def test_the_teacher_is_measured_on_recorded_pairs(storage, teacher):
    folder = storage / "baseline_full_seed42"
    record = json.loads((folder / "files" / "teacher_eval.json").read_text())
    model = from_reference_config(**released.read(teacher)[0])
    assert record["params_M"] == pytest.approx(sum(p.numel() for p in model.parameters()) / 1e6)
    for field in ("flops_G", "size_MB", "chamfer", "absrel", "rmse", "delta1", "t_pair_p50_ms", "t_scene_s"):
        assert record[field] is not None and record[field] >= 0, field
    workload = yaml.safe_load((folder / "workload.yaml").read_text())
    assert len(workload["pairs (scene, frame, frame)"]) == 20 and len(workload["scene"]["views"]) > 2


@pytest.mark.slow
def test_every_trial_ends_with_a_record_a_file_and_a_verdict(storage, teacher):
    files = storage / "k_grid_full_seed42" / "files"
    rows = {record.exp_id: record for record in read_csv(files / "result_table.csv")}
    trials = [record for record in rows.values() if record.task_id and record.task_id.startswith("K-")]
    assert len(trials) == 3 and {record.profile for record in rows.values()} == {"full"}
    (config, weights) = released.read(teacher)
    whole = from_reference_config(**config)
    whole.load_state_dict(weights)
    for record in trials:
        assert record.verdict in ("pass", "fail") and record.absrel is not None and record.t_scene_s is not None
        assert record.parent == f"teacher:{model_hash(whole)}"
    for name in ("student_fp32_t3b05.pth", "student_fp32_t5b05.pth", "student_fp32_sched.pth", "student_fp32_best.pth"):
        config, _ = checkpoint.read_model(files / name)
        assert (config["enc_depth"], config["dec_depth"], config["head_type"]) == (3, 3, "dpt")
