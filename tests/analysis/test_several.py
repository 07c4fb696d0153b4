"""Several sweeps together, campaigns, and other costs than latency across."""

from collections.abc import Callable
from pathlib import Path

import pytest
from logged_sweep import copy_store, log_sweep, record, teacher, three
from mlflow.tracking import MlflowClient

from analysis import style
from analysis.__main__ import main
from analysis.pareto import compute, frame
from analysis.store import load, load_all

Fresh = Callable[..., str]
PRUNED = {"task_id": "P-1", "t_pair_p50_ms": 25.0, "t_pair_p95_ms": 27.0}


@pytest.fixture
def uri(empty_uri: str, tmp_path: Path) -> str:
    """Sweeps k and p of one workload and of one campaign, and q of another workload."""
    copied = copy_store(empty_uri, tmp_path)
    client = MlflowClient(tracking_uri=copied)
    pruned = record("P_r010_run1", **PRUNED, drop=0.025, drop_lo=0.02, drop_hi=0.03)
    parents = [
        log_sweep(copied, "k", three()),
        log_sweep(copied, "p", [(teacher(), []), (pruned, [])], gate_at_most="0.03"),
    ]
    for parent in parents:
        client.set_tag(parent, "campaign", "plan")
    log_sweep(copied, "q", [(record("Q_PTQ_run1", workload_hash="ffff00001111"), [])])
    return copied


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command ends with."""
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


@pytest.mark.parametrize("which", [{"sweeps": ["k", "p"]}, {"campaign": "plan"}])
def test_sweeps_of_one_workload_share_a_plane(uri: str, which: dict[str, object]) -> None:
    data = load_all(uri, **which)  # type: ignore[arg-type]
    found = compute(data)
    names = [p.exp_id for p in found.points]
    assert names == ["K_teacher_run1", "K_T3B05_run1", "K_T5B05_run1", "K_T3B05_sched_run1", "P_r010_run1"]
    assert found.gate is not None and found.gate.drop_pct == 3 and "of some sweeps 1 %" in found.gate.text
    assert data.trials["sweep"].to_list() == ["k"] * 4 + ["p"] * 2
    assert frame(data, found)["sweep"].to_list() == ["k"] * 4 + ["p"] * 2
    assert [one.name for one in data.each()] == ["k", "p"]
    (single,) = [one for one in data.each() if one.name == "p"]
    alone = load(uri, "p")
    same = ["run_id", "exp_id", "T", "drop", "t_pair_p50_ms", "seed", "verdict"]
    assert single.trials.select(same).equals(alone.trials.select(same)) and single.settings == alone.settings


def test_different_workloads_are_refused_with_their_sweeps(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(["pareto", "--tracking-uri", uri, "--sweep", "k", "q", "--out", "unused"], capsys)
    assert all(word in said for word in ("2 different workloads", "k/K_teacher_run1", "q/Q_PTQ_run1", "ffff00001111"))
    assert not Path("unused").exists()


def test_drops_against_different_references_are_refused(fresh: Fresh, capsys: pytest.CaptureFixture[str]) -> None:
    uri = fresh("a", [(record("K_a_run1", extra={"reference": "teacher:1"}), [])])
    log_sweep(uri, "b", [(record("K_b_run1", extra={"reference": "teacher:2"}), [])])
    said = refused(["pareto", "--tracking-uri", uri, "--sweep", "a", "b", "--out", "unused"], capsys)
    assert "2 different references" in said and "teacher:1" in said and "b/K_b_run1" in said


def test_an_unknown_campaign_lists_the_known(uri: str, fresh: Fresh, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(["report", "--tracking-uri", uri, "--campaign", "all", "--out", "unused"], capsys)
    assert "--campaign 'all'" in said and "known: plan" in said
    assert "--sweep 'z'" in refused(["pareto", "--tracking-uri", uri, "--sweep", "k", "z", "--out", "u"], capsys)


def test_of_a_campaigns_sweeps_with_one_name_the_newest_counts(uri: str) -> None:
    again = log_sweep(uri, "k", three()[:2])
    MlflowClient(tracking_uri=uri).set_tag(again, "campaign", "plan")
    assert load_all(uri, campaign="plan").trials["sweep"].to_list() == ["p"] * 2 + ["k"] * 2


@pytest.mark.parametrize(
    ("x", "key", "title"),
    [("p95", "t_pair_p95_ms", "p95 latency per pair (ms)"), ("size_MB", "size_MB", "size on disk (MB)"),
     ("params_M", "params_M", "parameters (M)"), ("gpu_hours", "cpu_hours", "CPU-hours of its own training")],
)  # fmt: skip
def test_other_costs_lie_across(fresh: Fresh, x: str, key: str, title: str) -> None:
    costs = {"size_MB": 5.0, "params_M": 2.0, "extra": {"cpu_hours": 0.25, "p95_lo": 21.0, "p95_hi": 23.0}}
    found = compute(load(fresh("s", [(teacher(), []), (record("K_a_run1", **costs), [])]), "s"), x)
    (point,) = [p for p in found.points if p.kind != "teacher"]
    assert point.x.value == point.record[key] and title in style.axis_words(found)[0]
    assert (point.x.lo, point.x.hi) == ((21.0, 23.0) if x == "p95" else (point.x.value, point.x.value))
    assert ("no CPU-hours" in str(found.left_out)) == (x == "gpu_hours")  # nobody trained the teacher here


def test_a_cost_that_no_trial_has_is_one_line(fresh: Fresh, capsys: pytest.CaptureFixture[str]) -> None:
    uri = fresh("s", [(record("K_a_run1"), [])])
    said = refused(["pareto", "--tracking-uri", uri, "--sweep", "s", "--x", "gpu_hours", "--out", "unused"], capsys)
    assert "--x gpu_hours: no trial of s has both gpu_hours and a drop" in said and not Path("unused").exists()
