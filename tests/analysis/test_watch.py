"""The screen of a sweep that still runs, and the command on a verdict."""

import threading
from pathlib import Path

import pytest
from logged_sweep import PARENT_TAG, copy_store, log_sweep, record, teacher
from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

from analysis import watch
from analysis.__main__ import main


@pytest.fixture
def uri(empty_uri, tmp_path) -> str:
    """A sweep with a teacher, a trial that passed, one that was stopped, one that failed, and one at epoch 3 of 30."""
    copied = copy_store(empty_uri, tmp_path)
    client = MlflowClient(tracking_uri=copied)
    done = [(record("K_a_run1", stop_reason="completed"), []), (record("K_b_run1", verdict="fail"), [])]
    parent = log_sweep(copied, "long", [(teacher(), []), *done])
    client.update_run(parent, "RUNNING")
    if "epochs" not in client.get_run(parent).data.params:
        client.log_param(parent, "epochs", "30")
    experiment = client.get_run(parent).info.experiment_id
    for run in client.search_runs([experiment], f"tags.`{PARENT_TAG}` = '{parent}'"):
        client.set_tag(
            run.info.run_id, "verdict", {"K_a_run1": "pass", "K_b_run1": "fail"}.get(run.info.run_name, "n/a")
        )
        client.set_tag(run.info.run_id, "stop_reason", {"K_b_run1": "plateau"}.get(run.info.run_name, "completed"))
    for name, status in (("K_runs_run1", "RUNNING"), ("K_broken_run1", "FAILED")):
        tags = {PARENT_TAG: parent, "role": "trial", "exp_id": name}
        made = client.create_run(experiment, run_name=name, tags=tags).info.run_id
        points = [Metric("val_drop", drop, epoch, epoch) for epoch, drop in enumerate((0.5, 0.004, float("nan")), 1)]
        client.log_batch(made, [*points, *(Metric("epoch_s", 60.0, epoch, epoch) for epoch in (1, 2, 3))])
        if status != "RUNNING":
            client.set_terminated(made, status)
    return copied


def test_the_screen_says_what_runs_and_why_the_others_ended(uri: str) -> None:
    view = watch.look(uri, "long")
    assert view.running == (watch.Running("K_runs_run1", 3, 0.004, 60.0),)
    assert view.ended == {"completed": 1, "plateau": 1, "failed": 1}
    assert view.verdicts == {"K_a_run1": "pass", "K_b_run1": "fail"}
    assert view.left_s == 27 * 60 and view.hours == pytest.approx(6 * 60 / 3600)
    shown = "\n".join(watch.lines(view))
    assert "1 running, 3 ended (1 completed, 1 failed, 1 plateau)" in shown and "at most 27 min" in shown
    assert "K_runs_run1: epoch 3, best drop 0.40 %" in shown and "validation drop 0.40 %" in shown


def test_a_verdict_that_is_new_runs_the_command(uri: str, tmp_path: Path) -> None:
    """Told once, and only what came after the first look."""
    client = MlflowClient(tracking_uri=uri)
    parent = next(r for r in client.search_runs(["0", "1"]) if r.info.run_name == "long").info.run_id
    out, looks = tmp_path / "told", []

    def show(view: watch.View) -> None:
        looks.append(view)
        run = next(r for r in client.search_runs(["0", "1"]) if r.info.run_name == "K_runs_run1").info.run_id
        if len(looks) == 1:
            client.set_tag(run, "verdict", "fail")
        if len(looks) == 2:
            client.set_terminated(parent)

    watch.follow(uri, "long", 0.01, f'echo "$SLIMSWEEP_TRIAL $SLIMSWEEP_VERDICT" >> {out}', show)
    assert out.read_text() == "K_runs_run1 fail\n" and len(looks) == 3


def test_a_store_that_is_away_for_a_while_is_looked_at_again(
    uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, away = Path(uri.removeprefix("sqlite:///")), tmp_path / "away.db"
    client = MlflowClient(tracking_uri=uri)
    parent = next(r for r in client.search_runs(["0", "1"]) if r.info.run_name == "long").info.run_id
    looks = []

    def show(view: watch.View) -> None:
        looks.append(view)
        if len(looks) == 1:
            client.set_terminated(parent)
            store.rename(away)
            threading.Timer(1.0, away.rename, [store]).start()

    watch.follow(uri, "long", 0.2, None, show)
    assert [view.status for view in looks] == ["RUNNING", "FINISHED"]
    assert "looking again in 0.2 s" in capsys.readouterr().err


def test_one_look_and_what_cannot_be(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", "--tracking-uri", uri, "--sweep", "long", "--every", "0"]) == 0
    assert capsys.readouterr().out.startswith("long: running; 1 running")
    assert main(["watch", "--tracking-uri", uri, "--sweep", "lost"]) == 2
    assert "known: long" in capsys.readouterr().err
    assert main(["watch", "--tracking-uri", uri, "--sweep", "long", "--every", "-1"]) == 2
