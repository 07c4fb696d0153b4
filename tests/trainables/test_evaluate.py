import json
import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from trainables import checkpoint, evaluate
from trainables.checkpoint import model_hash
from trainables.distill import Distill
from trainables.dust3r import rooms
from trainables.record import Record


@pytest.fixture(autouse=True)
def one_worker(monkeypatch):
    """Two workers are tried in test_teacher_cache.py."""
    real = evaluate.environment
    monkeypatch.setattr(evaluate, "environment", lambda: {**real(), "cores": 1})


@pytest.fixture
def rendered(monkeypatch):
    """(split, scenes) of all that is rendered."""
    calls = []
    real = rooms.render

    def render(seed, split, scenes, views=2, size=(64, 64)):
        calls.append((split, set(scenes.tolist())))
        return real(seed, split, scenes, views, size)

    monkeypatch.setattr(rooms, "render", render)
    return calls


@pytest.fixture
def student(tiny, tmp_path):
    path = tmp_path / "best.pth"
    checkpoint.save(path, {**tiny.domain().export(tiny.domain().student(inherit=False)), "origin": {"seed": 7}})
    return path


def test_preparing_leaves_trials_nothing_to_wait_for(tiny, rendered, tmp_path):
    job = tiny.job(train_samples=40)
    job["report"] = str(tmp_path / "report")
    evaluate.prepare(job)
    assert json.loads(Path(job["report"]).read_text()) == ["samples of the teacher's outputs", 40, 40]
    cache = Path(job["cache_dir"])
    assert len(list(cache.glob("teacher_val_*.npz"))) == 1 and not list(cache.glob("teacher_test_*"))
    assert len(list(cache.glob("*/layout.json"))) == 1
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*.np*")}
    evaluate.prepare(job)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.np*")} == before


def test_preparing_a_sweep_that_only_measures_computes_no_cache(tiny):
    job = tiny.job(trains=False)
    evaluate.prepare(job)
    assert not list(Path(job["cache_dir"]).rglob("*.np*"))


def test_what_the_settings_stand_for_is_known_beforehand(tiny, tmp_path):
    contents, sampled = evaluate.identify(tiny.job())
    assert contents == {"teacher": checkpoint.model_hash(tiny.domain().teacher())}
    assert len(sampled["pairs (scene, view, view)"]) == 20 and evaluate.identify(tiny.job()) == (contents, sampled)
    assert evaluate.identify(tiny.job(workload_seed=43))[1] != sampled
    assert not (tmp_path / "cache").exists()


def _cached_states(cache):
    (layout,) = cache.glob("*/layout.json")
    return sum(name.startswith("teacher_state_") for name, _, _ in json.loads(layout.read_text())["fields"])


def test_one_cache_serves_trials_with_and_without_states(tiny):
    """What a search may turn on counts from the start: no trial of it builds a cache of its own."""
    job = tiny.job(train_samples=24)
    job["trials"] = [{}, {"gamma": 0.3}]
    evaluate.prepare(job)
    cache = Path(job["cache_dir"])
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*.np*")}
    assert _cached_states(cache) == 4
    for gamma in (0.0, 0.1):
        trial = Distill(tiny.config(f"g{gamma}", {"gamma": gamma}, train_samples=24))
        states = [name for name in trial.cache.rows(torch.arange(2)) if name.startswith("teacher_state_")]
        assert bool(states) == bool(gamma)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.np*")} == before


def test_states_are_cached_where_the_settings_use_them(tiny):
    job = tiny.job(gamma=0.1)
    evaluate.prepare(job)
    assert _cached_states(Path(job["cache_dir"])) == 4


def test_test_pairs_are_seen_in_the_final_measurement_only(tiny, student, rendered):
    job, test_pairs = tiny.job(student), set(range(20))
    evaluate.prepare(job)
    evaluate.measure_latency(job)
    early = [scenes for split, scenes in rendered if split == "test"]
    assert early and not any(scenes & test_pairs for scenes in early), "only the scenes beside the test pairs"
    assert {split for split, _ in rendered} == {"train", "val", "test"}
    rendered.clear()
    evaluate.measure_quality(job)
    assert {split for split, _ in rendered} == {"test", "val"}, "the mean depth map beside it is of validation"
    assert set().union(*(scenes for split, scenes in rendered if split == "test")) == test_pairs


def test_quality_of_the_teacher_is_the_reference(tiny):
    found = evaluate.measure_quality(tiny.job())
    assert (found["drop"], found["drop_lo"], found["drop_hi"]) == (0.0, 0.0, 0.0)
    assert found["parent"] is None and found["quality"] == found["absrel"]
    domain = tiny.domain()
    own = domain.evaluate(domain.teacher(), "test", full=True)
    for name in ("chamfer", "absrel", "rmse", "delta1"):
        assert found[name] == pytest.approx(float(own[name].mean()), rel=1e-6)


def test_quality_of_a_student(tiny, student):
    found = evaluate.measure_quality(tiny.job(student))
    teacher = evaluate.measure_quality(tiny.job())
    assert found["drop"] == pytest.approx(found["absrel"] / teacher["absrel"] - 1, rel=1e-5)
    assert found["drop_lo"] < found["drop"] < found["drop_hi"]
    assert found["parent"] == f"teacher:{model_hash(tiny.domain().teacher())}"
    assert found["extra"]["test_samples"] == 20
    assert evaluate.measure_quality(tiny.job(student)) == found, "the interval is seeded"


def test_the_teachers_own_weights_as_a_student_lose_nothing(tiny):
    found = evaluate.measure_quality(tiny.job(tiny.teacher_file))
    assert (found["drop"], found["drop_lo"], found["drop_hi"]) == (0.0, 0.0, 0.0)


def test_diverged_weights_have_no_quality(tiny, tmp_path):
    model = tiny.new_model()
    with torch.no_grad():
        model.dec_norm.weight.fill_(math.nan)
    found = evaluate.measure_quality(tiny.job(tiny.save_model(tmp_path / "nan.pth", model)))
    assert math.isnan(found["quality"]) and math.isnan(found["drop"])


def test_latency_fields(tiny, student):
    # Pairs of the same sizes in one run; what is timed is checked in tests/engines.
    found = evaluate.measure_latency(tiny.job(student))
    own, teacher = tiny.domain().load(student), tiny.domain().teacher()
    assert found["params_M"] == pytest.approx(sum(p.numel() for p in own.parameters()) / 1e6)
    assert found["params_M"] < sum(p.numel() for p in teacher.parameters()) / 1e6
    assert found["flops_G"] > 0 and found["size_MB"] > 0
    assert 0 < found["t_pair_p50_ms"] <= found["t_pair_p95_ms"]
    assert found["pairs_per_sec"] == pytest.approx(1000 / found["t_pair_p50_ms"])
    assert found["t_scene_s"] > found["extra"]["t_scene_pairs_s"] > 0
    extra = found["extra"]
    assert extra["p50_lo"] <= found["t_pair_p50_ms"] <= extra["p50_hi"]
    assert extra["p50_ratio_lo"] <= extra["p50_ratio"] <= extra["p50_ratio_hi"]
    same = [extra[f"p50_ratio_same_runtime{end}"] for end in ("_lo", "", "_hi")]
    assert 0 < same[0] <= same[1] <= same[2] and same[0] < same[2]
    assert extra["p50_torch_ms"] > 0 and extra["threads"] == 1
    assert 0 <= extra["export_error"] < 1e-3
    assert (found["vram_GB"] is None) == ("ram_GB" in extra)


def test_both_measurements_make_a_record(tiny, student):
    job = tiny.job(student)
    quality, latency = evaluate.measure_quality(job), evaluate.measure_latency(job)
    extra = quality.pop("extra") | latency.pop("extra")
    known = {field.name for field in fields(Record)}
    extra |= {name: quality.pop(name) for name in [*quality] if name not in known}  # as sweeps/measure.py does
    record = Record(exp_id="K_x_run1", datetime="2026-03-01T12:00:00+01:00", extra=extra, **quality, **latency)
    assert Record.from_dict(record.to_dict()) == record
    assert all(isinstance(value, str | int | float) for value in extra.values())


def test_latency_of_the_teacher_is_its_own_reference(tiny):
    found = evaluate.measure_latency(tiny.job())
    # The teacher against itself, round by round: were the rounds not paired, the interval would have a width.
    assert {found["extra"][f"p50_ratio_same_runtime{end}"] for end in ("_lo", "", "_hi")} == {1.0}
    # The same model in both runtimes: their ratio is that of their medians.
    assert np.isclose(found["extra"]["p50_ratio"], found["extra"]["p50_torch_ms"] / found["t_pair_p50_ms"])
