"""fusion=cached: probes trained once by content; one cache per seed, before the trials; arms of a seed start alike."""

from pathlib import Path

import pytest
import torch

from trainables import checkpoint, evaluate
from trainables.alphaqubit.fusion import FusedTeacher
from trainables.alphaqubit.model import Decoder, build
from trainables.distill import Distill
from trainables.domain import make_domain
from trainables.schedules import step

SIZES = {"size": "student", "sizes": {"student": {"dim": 16, "key_dim": 4, "conv_channels": 16, "readout_layers": 1}}}
SETTINGS = {
    **{"distance": 3, "rounds": 2, "val_shots": 64, "test_shots": 64, "fusion": "cached", **SIZES},
    **{"epochs": 1, "samples_per_epoch": 64, "train_samples": 300, "batch_size": 32, "lr": 3e-3, "lr_end": 0.01},
    **{"precision": "float32", "accumulate": 1, "checkpointing": False},
    **{"optimizer": "adamw", "lr_warmup": 0.1, "weight_decay": 0.0, "alpha": 0.3, "workload_seed": 42},
}
HARD = {"alpha": 1.0, "beta": 0}
STAGES = {"rnn": step(0.1, 0, at=0.5).to_data(), "fused": step(0, 0.7, at=0.5).to_data()}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A narrower decoder than the student with random weights, so that features need adapters."""
    torch.manual_seed(3)
    model = build(dim=8, key_dim=4, conv_channels=16, bias_dim=8, readout_dim=16, distance=3, basis="Z")
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    checkpoint.save(path, {"model": model.state_dict(), "config": model.config})
    return str(path)


@pytest.fixture
def job(tmp_path, teacher):
    settings = {**SETTINGS, "teacher": teacher}
    folders = {name: str(tmp_path / name) for name in ("cache_dir", "work_dir", "state_dir")}
    for folder in folders.values():
        Path(folder).mkdir()
    return {"domain": "alphaqubit", "settings": settings, "seed": 7, "seeds": [7, 8], "params": {},
            "trials": [HARD, STAGES], **folders}  # fmt: skip


def test_probes_are_trained_once_and_leave_the_random_state_alone(job):
    cache = Path(job["cache_dir"])
    domain = make_domain("alphaqubit", job["settings"], {}, 7, cache)
    torch.manual_seed(5)
    first = domain.teacher()
    after_training = torch.rand(3)
    (probes,) = cache.glob("probes_*.pth")
    before = probes.stat().st_mtime_ns
    assert isinstance(first, FusedTeacher) and not list(cache.glob(".probes.*"))
    shots = domain.samples("train", torch.arange(8))
    assert domain.teacher_outputs(first, shots)["teacher_fused"].shape == (8, 1)
    torch.manual_seed(5)
    other = make_domain("alphaqubit", job["settings"], STAGES, 8, cache).teacher()
    assert checkpoint.model_hash(other) == checkpoint.model_hash(first) and probes.stat().st_mtime_ns == before
    assert torch.equal(torch.rand(3), after_training)


def test_a_driver_without_a_cache_sees_the_plain_teacher_and_writes_nothing(job):
    assert isinstance(make_domain("alphaqubit", job["settings"], STAGES, 7).teacher(), Decoder)
    del job["cache_dir"]
    assert evaluate.identify(job)[0].keys() == {"teacher"}


def test_each_seed_has_one_cache_before_its_trials_and_its_arms_start_alike(job, monkeypatch):
    monkeypatch.setattr(evaluate, "environment", lambda: {"cores": 1})  # starting processes takes longer than this
    evaluate.prepare(job)
    cache = Path(job["cache_dir"])
    made = {path.parent.name for path in cache.glob("*/layout.json")}
    assert len(made) == 2 and all("teacher_fused" in (cache / name / "layout.json").read_text() for name in made)
    events = {}
    for seed in (7, 8):
        arms = {}
        for name, params in (("hard", HARD), ("stages", STAGES)):
            state = Path(job["state_dir"]) / f"{name}{seed}"
            arms[name] = Distill({**job, "seed": seed, "params": params, "state_dir": str(state)})
        hard, stages = arms["hard"], arms["stages"]
        assert hard.cache.folder == stages.cache.folder and hard.cache.folder.name in made
        theirs = stages.model.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in hard.model.state_dict().items())
        assert stages.heads and not hard.heads
        rows = [[batch["events"] for batch in arm.batches(1)] for arm in (hard, stages)]
        assert all(torch.equal(a, b) for a, b in zip(*rows, strict=True))
        events[seed] = torch.cat(rows[0])
        assert stages.step()["train_fused"] > 0
    assert not torch.equal(events[7], events[8])
    assert {path.parent.name for path in cache.glob("*/layout.json")} == made


def test_probes_change_nothing_of_what_a_student_is_compared_with(job):
    """Reference, drop, the share of parameters that are gone, and the teacher's own record: of the decoder alone."""
    domain = make_domain("alphaqubit", job["settings"], {}, 7)
    weights = Path(job["state_dir"]) / "student.pth"
    checkpoint.save(weights, domain.export(domain.student(inherit=False)))
    job |= {"weights": str(weights), "workload_hash": "w"}
    plain = {**job, "settings": {**job["settings"], "fusion": "none"}, "trials": [HARD]}
    fused, alone = (evaluate.measure_quality(one) for one in (job, plain))
    assert fused == alone and fused["extra"]["reference"].startswith("teacher:")
    teachers = [evaluate.measure_quality({**one, "weights": None}) for one in (job, plain)]
    assert teachers[0] == teachers[1]
    assert fused["extra"]["reference"] == f"teacher:{teachers[0]['extra']['weights']}"
    assert list(Path(job["cache_dir"]).glob("probes_*.pth"))
    assert len(list(Path(job["cache_dir"]).glob("teacher_test_*.npz"))) == 1, "its answers are computed once"
