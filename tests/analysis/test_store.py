"""Both readers give the same frames, and what cannot be read says so in one line."""

import math
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
from logged_sweep import PARENT_TAG, copy_store, forty, log_sweep, record, three
from mlflow.entities import Metric
from mlflow.tracking import MlflowClient
from polars.testing import assert_frame_equal

from analysis import readers
from analysis.frames import curve_frame, trial_frame
from analysis.readers import ClientStore, SqlStore, open_store
from analysis.store import load
from trainables.record import EXTRAS, FIELDS, InputError

KEYS = ("val_drop", "train_loss")


def test_a_sweep_comes_back_as_it_was_logged(uri: str) -> None:
    data = load(uri, "three", KEYS)
    assert data.name == "three" and data.settings["gate_at_most"] == "0.01"
    assert tuple(data.trials.columns[6:31]) == FIELDS
    assert tuple(data.trials.columns[31 : 31 + len(EXTRAS)]) == EXTRAS
    for row, (expected, drops) in zip(data.trials.to_dicts(), three(), strict=True):
        values = {k: v for k, v in expected.to_dict().items() if k != "beta"}
        assert {key: row[key] for key in values} == values
        curve = data.curves.filter((pl.col("run_id") == row["run_id"]) & (pl.col("key") == "val_drop"))
        assert curve["value"].to_list() == drops and curve["step"].to_list() == list(range(1, len(drops) + 1))
    assert data.trials["beta"].to_list() == [None, "0.5", "0.5", "0.5, then 0.7"]


@pytest.mark.parametrize("name", ["three", "forty"])
def test_sql_and_client_give_the_same_answer(uri: str, name: str) -> None:
    client = ClientStore(MlflowClient(tracking_uri=uri), "unreadable")
    with open_store(uri) as sql:
        assert isinstance(sql, SqlStore)
        assert [(r.run_id, r.name, r.status, r.start_ms) for r in sql.sweeps()] == [
            (r.run_id, r.name, r.status, r.start_ms) for r in client.sweeps()
        ]
        parent = next(run for run in sql.sweeps() if run.name == name)
        mirrored = next(run for run in client.sweeps() if run.name == name)
        assert dict(parent.params) == dict(mirrored.params) and dict(parent.tags) == dict(mirrored.tags)

        def ordered(reader: SqlStore | ClientStore) -> pl.DataFrame:
            return trial_frame(reader.children([parent.run_id]), [parent])

        assert_frame_equal(ordered(sql), ordered(client))
        curves = [curve_frame(reader.metrics([parent.run_id], KEYS)) for reader in (sql, client)]
        assert curves[0].height > 60
        assert_frame_equal(*curves)


def test_a_tracking_server_gives_the_same_frames(uri: str, tmp_path: Path) -> None:
    """A real server: paging and number formats on the wire are what could differ."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    copied = copy_store(uri, tmp_path)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", copied, "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--workers", "1", "--artifacts-destination", str(tmp_path)],
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(300):
            try:
                data = load(address, "forty")
                break
            except InputError:
                assert server.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.2)
        else:
            pytest.fail((tmp_path / "log").read_text())
        expected = load(uri, "forty")
        assert_frame_equal(data.trials, expected.trials)
        assert_frame_equal(data.curves, expected.curves)
    finally:
        os.killpg(server.pid, 9)
        server.wait()


def test_nan_and_infinity_survive_both_readers(empty_uri: str, tmp_path: Path) -> None:
    copied = copy_store(empty_uri, tmp_path)
    parent = log_sweep(copied, "odd", [(record("K_T3B05_run1"), [0.5, math.nan, math.inf, -math.inf])])
    values = load(copied, "odd").curves["value"].to_list()
    client = ClientStore(MlflowClient(tracking_uri=copied), "unreadable")
    mirrored = curve_frame(client.metrics([parent], ["val_drop"]))["value"].to_list()
    for found in (values, mirrored):
        assert found[0] == 0.5 and math.isnan(found[1]) and found[2:] == [math.inf, -math.inf]


def test_a_step_logged_twice_keeps_its_newest_value(empty_uri: str, tmp_path: Path) -> None:
    copied = copy_store(empty_uri, tmp_path)
    parent = log_sweep(copied, "again", [(record("K_T3B05_run1"), [0.5])])
    client = MlflowClient(tracking_uri=copied)
    run = client.search_runs(["1"], f"tags.`{PARENT_TAG}` = '{parent}'")[0]
    client.log_batch(run.info.run_id, metrics=[Metric("val_drop", 0.4, 1_800_000_000_000, 1)])
    assert load(copied, "again").curves["value"].to_list() == [0.4]


def test_a_running_trial_without_a_record_has_its_inputs(empty_uri: str, tmp_path: Path) -> None:
    copied = copy_store(empty_uri, tmp_path)
    parent = log_sweep(copied, "running", three())
    client = MlflowClient(tracking_uri=copied)
    tags = {
        PARENT_TAG: parent,
        "role": "trial",
        "trial_id": "abc",
        "exp_id": "K_T7B05_run1",
        "task_id": "K-9",
    }
    run = client.create_run("1", run_name="K_T7B05_run1", tags=tags)
    client.log_param(run.info.run_id, "T", "7.0")
    client.log_param(run.info.run_id, "epochs", "30")  # how many it may run
    client.log_metric(run.info.run_id, "val_drop", 0.2, step=3)
    row = load(copied, "running").trials.row(-1, named=True)
    assert (row["exp_id"], row["T"], row["task_id"], row["status"]) == ("K_T7B05_run1", 7.0, "K-9", "RUNNING")
    assert row["drop"] is None and row["epochs"] == 3


def test_deleted_runs_are_not_read(empty_uri: str, tmp_path: Path) -> None:
    copied = copy_store(empty_uri, tmp_path)
    log_sweep(copied, "kept", three())
    parent = log_sweep(copied, "dropped", three())
    client = MlflowClient(tracking_uri=copied)
    client.delete_run(parent)
    with pytest.raises(InputError, match="'dropped' is not in .*known: kept$"):
        load(copied, "dropped")


def test_one_name_twice_reads_the_newest_and_says_so(empty_uri: str, tmp_path: Path) -> None:
    copied = copy_store(empty_uri, tmp_path)
    old = log_sweep(copied, "twin", three())
    time.sleep(0.01)
    new = log_sweep(copied, "twin", three()[:2])
    data = load(copied, "twin")
    assert data.run_id == new and data.trials.height == 2
    assert len(data.notes) == 1 and old in data.notes[0]
    assert load(copied, old).trials.height == 4


def one_line(uri: str, sweep: str = "any") -> str:
    with pytest.raises(InputError) as caught:
        load(uri, sweep)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_unknown_sweep_lists_the_known(uri: str) -> None:
    text = one_line(uri, "k_grid")
    assert "'k_grid'" in text and "three" in text and "forty" in text


def test_empty_store(empty_uri: str) -> None:
    assert "no sweep is logged" in one_line(empty_uri)


def test_missing_database_is_named_and_not_created(tmp_path: Path) -> None:
    assert "no database file" in one_line(f"sqlite:///{tmp_path}/nothing.db")
    assert not list(tmp_path.iterdir())
    assert "no database file" in one_line("sqlite://")


def test_locked_database(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = copy_store(uri, tmp_path)
    monkeypatch.setattr(readers, "LOCK_WAIT_S", 0.1)
    with sqlite3.connect(tmp_path / "mlflow.db") as holder:
        holder.execute("begin exclusive")
        assert "locked" in one_line(copied, "three")
    holder.close()


@pytest.mark.parametrize("content", ["create table runs (id text)", "create table tags (key text, value text)"])
def test_database_of_something_else(tmp_path: Path, content: str) -> None:
    with sqlite3.connect(tmp_path / "other.db") as db:
        db.execute(content)
    db.close()
    assert "not an MLflow 3 store" in one_line(f"sqlite:///{tmp_path}/other.db")


def test_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("hello " * 1000)
    assert "cannot be read as a sqlite database" in one_line(f"sqlite:///{tmp_path}/text.db")


def test_a_file_s_name_alone_is_no_address() -> None:
    assert "--tracking-uri runs/mlflow.db: expected sqlite:///FILE" in one_line("runs/mlflow.db")


def test_dead_server_is_told_at_once() -> None:
    began = time.monotonic()
    assert "no MLflow server answers" in one_line("http://127.0.0.1:9")
    assert time.monotonic() - began < 10


def test_unusable_address() -> None:
    assert "cannot be read" in one_line("nonsense://somewhere")


def test_damaged_record_names_its_run(empty_uri: str, tmp_path: Path) -> None:
    copied = copy_store(empty_uri, tmp_path)
    parent = log_sweep(copied, "bad", three())
    client = MlflowClient(tracking_uri=copied)
    run = client.search_runs(["1"], f"tags.`{PARENT_TAG}` = '{parent}'")[0]
    client.set_tag(run.info.run_id, "record", "{cut off")
    assert run.info.run_id in one_line(copied, "bad")


def test_reading_leaves_the_database_as_it_is(uri: str) -> None:
    path = Path(uri.removeprefix("sqlite:///"))
    before = path.read_bytes()
    load(uri, "forty")
    assert path.read_bytes() == before and len(forty()) == load(uri, "forty").trials.height
