"""The mirror within one process, against a real sqlite store."""

import json
import math

from sweeps.journal import SweepState
from sweeps.mlflow_writer import Mirror
from sweeps.tracking import default_uri
from trainables.record import Record


def mirrored(sweep, uri, over=False):
    """What one start of the mirror does; it begins from what the last one left on disk."""
    mirror = Mirror(sweep.journal.path, uri)
    mirror.read()
    mirror.sync(over)
    mirror.save(None)
    return mirror


def problem(sweep):
    return json.loads((sweep.folder / "tracked.json").read_text())["problem"]


def test_replaying_changes_nothing(storage, paper):
    sweep, uri = paper.Sweep(storage), default_uri(storage)
    for trial in "ab":
        sweep.whole(trial)
    sweep.start("n")
    sweep.result("n", 1, val_drop=math.nan)
    mirrored(sweep, uri)

    def state():
        return {
            key: (run.info.run_id, paper.steps_of(uri, run, "train_loss")) for key, run in paper.runs_of(uri).items()
        }

    before = state()
    assert [len(points) for _, points in before.values()].count(2) == 2
    mirrored(sweep, uri)
    assert state() == before
    (sweep.folder / "tracked.json").unlink()
    mirrored(sweep, uri)
    assert state() == before
    assert len(paper.steps_of(uri, paper.runs_of(uri)["n"])) == 1  # NaN is not equal to itself, yet the same point


def test_a_mirror_that_died_between_any_two_calls_leaves_no_gap_and_no_double(storage, paper, monkeypatch):
    """The store dies under the n-th writing call, before or after doing it; a new mirror takes over."""
    from mlflow.tracking import MlflowClient

    uri, calls = default_uri(storage), {"left": 0, "after": False}

    def dying(name):
        real = getattr(MlflowClient, name)

        def call(*args, **kwargs):
            calls["left"] -= 1
            if calls["left"] == 0 and not calls["after"]:
                raise ConnectionError("before")
            answer = real(*args, **kwargs)
            if calls["left"] == 0:
                raise ConnectionError("after")
            return answer

        monkeypatch.setattr(MlflowClient, name, call)

    for name in ("create_run", "log_batch", "set_terminated"):
        dying(name)
    for number in range(1, 7):
        for after in (False, True):
            for same_mirror in (False, True):
                sweep = paper.Sweep(storage, f"s{number}{after}{same_mirror}")
                sweep.whole("a")
                sweep.journal.append("end", status="finished")
                mirror = Mirror(sweep.journal.path, uri)
                mirror.read()
                calls |= {"left": number, "after": after}
                try:
                    mirror.sync()
                except ConnectionError:
                    mirror.save("gone")
                assert calls["left"] <= 0
                mirror.sync() if same_mirror else mirrored(sweep, uri)
                runs = {k: r for k, r in paper.runs_of(uri, sweep.id).items()}
                assert {k: r.info.status for k, r in runs.items()} == {None: "FINISHED", "a": "FINISHED"}
                assert [step for step, _ in paper.steps_of(uri, runs["a"])] == [1, 2]
                assert runs["a"].data.params["T"] == "3.0" and "record" in runs["a"].data.tags


def test_an_abandoned_sweep_has_nothing_running_and_goes_on_when_resumed(storage, paper):
    sweep, uri = paper.Sweep(storage), default_uri(storage)
    sweep.whole("a")
    sweep.start("b")
    sweep.result("b", 1)

    def statuses():
        return [paper.runs_of(uri)[key].info.status for key in (None, "a", "b")]

    mirrored(sweep, uri)
    assert statuses() == ["RUNNING", "FINISHED", "RUNNING"]
    mirrored(sweep, uri, over=True)
    assert statuses() == ["KILLED", "FINISHED", "KILLED"]
    sweep.journal.append("resume", command="--resume")
    sweep.result("b", 2)
    mirrored(sweep, uri)
    assert statuses() == ["RUNNING", "FINISHED", "RUNNING"]
    sweep.finish("b", 2)
    sweep.journal.append("end", status="finished")
    mirrored(sweep, uri)
    assert statuses() == ["FINISHED", "FINISHED", "FINISHED"]
    assert [step for step, _ in paper.steps_of(uri, paper.runs_of(uri)["b"])] == [1, 2]


def test_what_mlflow_refuses_is_told_and_holds_up_nothing_else(storage, paper):
    sweep, uri = paper.Sweep(storage), default_uri(storage)
    sweep.start("a")
    sweep.result("a", 1)
    mirror = mirrored(sweep, uri)
    paper.client_of(uri).delete_run(paper.runs_of(uri)["a"].info.run_id)
    sweep.result("a", 2)
    sweep.whole("b")
    sweep.journal.append("file", path="never.png", trial_id=None)
    mirror.read()
    mirror.sync()
    mirror.save(None)
    assert "K_a_run1" in problem(sweep) and "never.png" in problem(sweep)
    assert paper.runs_of(uri)["b"].info.status == "FINISHED"
    (sweep.folder / "never.png").write_text("now")
    mirrored(sweep, uri)  # a new start tries it all again
    assert problem(sweep) is None
    assert [step for step, _ in paper.steps_of(uri, paper.runs_of(uri)["a"])] == [1, 2]


def test_what_a_server_made_twice_is_dropped(storage, paper):
    """Its answer came too late, the run was asked for again, and then it did both."""
    sweep, uri = paper.Sweep(storage), default_uri(storage)
    sweep.whole("a")
    sweep.journal.append("end", status="finished")
    mirrored(sweep, uri)
    client, runs = paper.client_of(uri), paper.runs_of(uri)
    for run in runs.values():
        tags = {key: run.data.tags[key] for key in ("sweep_id", "trial_id", "role") if key in run.data.tags}
        client.create_run(run.info.experiment_id, tags=tags, run_name=run.info.run_name)
    mirrored(sweep, uri, over=True)
    active = client.search_runs([runs[None].info.experiment_id])
    assert {run.info.run_id for run in active} == {run.info.run_id for run in runs.values()}
    assert {run.info.status for run in active} == {"FINISHED"}


def test_no_file_from_outside_of_the_sweeps_folder_is_logged(storage, paper):
    """The journal of somebody else may name any file of this machine, or a link to one."""
    sweep, uri = paper.Sweep(storage), default_uri(storage)
    sweep.whole("a")
    (storage / "private.txt").write_text("hush")
    (sweep.folder / "link.txt").symlink_to(storage / "private.txt")
    (sweep.folder / "own.txt").write_text("fine")
    for path in ("../private.txt", str(storage / "private.txt"), "link.txt", "own.txt"):
        sweep.journal.append("file", path=path, trial_id=None)
    mirrored(sweep, uri)
    run = paper.runs_of(uri)[None]
    assert [file.path for file in paper.client_of(uri).list_artifacts(run.info.run_id)] == ["own.txt"]
    assert problem(sweep).count("lies outside of the sweep's folder") >= 2


def test_a_cursor_for_another_store_is_not_believed(storage, paper, tmp_path):
    sweep, uri = paper.Sweep(storage), default_uri(storage)
    sweep.whole("a")
    mirrored(sweep, uri)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mlflow.db").write_bytes((storage / "mlflow.db").read_bytes())
    other = default_uri(tmp_path / "other")
    for known in paper.runs_of(other).values():
        paper.client_of(other).delete_run(known.info.run_id)
    mirrored(sweep, other)
    assert [step for step, _ in paper.steps_of(other, paper.runs_of(other)["a"])] == [1, 2]


def test_long_texts_and_many_points_fit_mlflows_limits(storage, paper):
    sweep, uri = paper.Sweep(storage), default_uri(storage)
    sweep.start("a", note="x" * 9000, **{f"p{i}": i for i in range(150)})
    sweep.result("a", 1, **{f"m{i}": float(i) for i in range(1100)})
    sweep.finish("a", 1, notes="n" * 20_000)
    mirrored(sweep, uri)
    assert problem(sweep) is None
    run = paper.runs_of(uri)["a"]
    assert len(run.data.metrics) >= 1100 and len(run.data.params) >= 150
    kept = Record.from_json(run.data.tags["record"])
    assert kept.absrel == 0.125 and kept.notes.startswith("nnn") and kept.notes.endswith("...")
    assert len(SweepState.replay(sweep.journal.path).trials["a"].record["notes"]) == 20_000
