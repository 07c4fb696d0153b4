"""The daily sheet of real stores: whose day it is, whose hours, and what cannot be."""

import csv
import io
import json
from datetime import date, datetime, timedelta
from pathlib import Path

import pytest
from logged_sweep import PARENT_TAG, copy_store, log_sweep, record, teacher
from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

from analysis import daily
from analysis.__main__ import main
from analysis.store import load
from trainables.record import InputError

DAY = date(2026, 3, 30)


def ms(day: date, hour: int) -> int:
    return int(datetime(day.year, day.month, day.day, hour).timestamp() * 1000)


def stamp(day: date) -> str:
    return datetime(day.year, day.month, day.day, 13).astimezone().isoformat()


@pytest.fixture
def uri(empty_uri, tmp_path) -> str:
    """A trial of two days, a teacher, and one each that runs, was interrupted, was killed; epochs of half an hour."""
    copied = copy_store(empty_uri, tmp_path)
    client = MlflowClient(tracking_uri=copied)
    done = record("K_T3B05_run1", datetime=stamp(DAY + timedelta(days=1)), stop_reason="plateau", notes="a | b\nc")
    parent = log_sweep(copied, "days", [(teacher(datetime=stamp(DAY)), []), (done, [])])
    experiment = client.get_run(parent).info.experiment_id
    client.set_tag(parent, "chosen", "K_T3B05_run1")
    runs = client.search_runs([experiment], f"tags.`{PARENT_TAG}` = '{parent}'")
    run = next(run for run in runs if run.info.run_name == "K_T3B05_run1").info.run_id
    client.set_tag(run, "saves", "student.pth")
    points = [(DAY, 1), (DAY, 2), (DAY + timedelta(days=1), 3)]
    busy = [("cpu_s", 1800.0), ("epoch_s", 7200.0)]
    client.log_batch(run, [Metric(k, v, ms(day, 10 + e), e) for day, e in points for k, v in busy])
    for name, status in (("K_runs_run1", "RUNNING"), ("K_cut_run1", "KILLED"), ("K_gone_run1", "RUNNING")):
        tags = {PARENT_TAG: parent, "role": "trial", "task_id": "K-2", "exp_id": name, "domain": "dust3r"}
        made = client.create_run(experiment, run_name=name, start_time=ms(DAY, 8), tags=tags).info.run_id
        client.log_param(made, "T", "5.0")
        client.log_batch(made, [Metric("cpu_s", 900.0, ms(DAY, 9), 1)])
        if name == "K_runs_run1":
            client.log_metric(made, "cpu_s", 360.0, step=2)  # now
        if status != "RUNNING":
            client.set_terminated(made, status)
    return copied


def rows(uri: str, day: date) -> dict[str, list[str]]:
    sheet = daily.compute(uri, day)
    lines = list(csv.reader(io.StringIO(daily.csv_text(sheet).removeprefix("\ufeff"))))
    assert lines[0] == ["日期", "任务ID", "输入/配置", "产出", "判定", "GPUh", "备注"]
    assert {line[0] for line in lines[1:]} == {str(day)}
    return {line[2].partition(" (chosen)")[0].partition(":")[0]: line for line in lines[1:]}


def test_hours_are_those_of_the_day_and_a_running_trial_is_on_todays(uri: str) -> None:
    first, second, today = (rows(uri, day) for day in (DAY, DAY + timedelta(days=1), date.today()))
    assert set(first) == {"K_teacher_run1", "K_T3B05_run1", "K_runs_run1", "K_cut_run1", "K_gone_run1"}
    assert first["K_T3B05_run1"][5] == "1.000 (CPU)" and second["K_T3B05_run1"][5] == "0.500 (CPU)"
    assert set(second) == {"K_T3B05_run1"} and set(today) == {"K_runs_run1"}
    assert first["K_runs_run1"][4] == "running" and first["K_cut_run1"][4] == "interrupted"
    assert first["K_gone_run1"][4] == "silent for days"
    assert first["K_runs_run1"][5] == "0.250 (CPU)" and today["K_runs_run1"][5] == "0.100 (CPU)"


def test_a_line_says_what_went_in_and_what_came_out(uri: str) -> None:
    line = rows(uri, DAY)["K_T3B05_run1"]
    assert line[1] == "K-1" and line[2] == "K_T3B05_run1 (chosen): days, T=3.0, beta=0.5, gamma=0.0, seed=42"
    assert line[3] == "student.pth; drop 0.80 % [0.20, 1.40]; p50 20 ms; 7.6 MB" and line[4] == "pass"
    assert line[6].startswith("plateau; drop 0.8 %")
    shown = daily.markdown(daily.compute(uri, DAY)).splitlines()
    assert shown[0].startswith("| 日期 | 任务ID |") and len(shown) == 2 + 5
    assert sum("a \\| b c" in line for line in shown) == 1


def test_hours_of_an_accelerator_are_the_clocks(empty_uri, tmp_path) -> None:
    copied = copy_store(empty_uri, tmp_path)
    client = MlflowClient(tracking_uri=copied)
    parent = log_sweep(copied, "gpu", [(record("K_T3B05_run1", datetime=stamp(DAY)), [])])
    run = client.search_runs([client.get_run(parent).info.experiment_id], f"tags.`{PARENT_TAG}` = '{parent}'")[0]
    client.delete_tag(run.info.run_id, "record")  # while it trains there is none: its epochs say what they ran on
    for step, workers, gpus, said in ((1, 1.0, 1.0, "2.000"), (2, 4.0, 4.0, "10.000"), (3, 1.0, 0.5, "11.000")):
        epoch = {"epoch_s": 7200.0, "cpu_s": 9.0, "workers": workers, "gpus": gpus}
        client.log_batch(run.info.run_id, [Metric(key, value, ms(DAY, 8 + step), step) for key, value in epoch.items()])
        assert rows(copied, DAY)["K_T3B05_run1"][5] == said


def test_a_trial_is_told_by_what_it_used_and_has_of_its_own(empty_uri, tmp_path) -> None:
    """A model that was only rounded had no use for the settings' temperature; its calibration was not the sweep's."""
    copied = copy_store(empty_uri, tmp_path)
    client = MlflowClient(tracking_uri=copied)
    rounded = record("Q_PTQ_run1", datetime=stamp(DAY), T=None, beta=None, gamma=None, bits_w=8)
    parent = log_sweep(copied, "q", [(rounded, [])], calibration="512", beta="0.5")
    (run,) = client.search_runs([client.get_run(parent).info.experiment_id], f"tags.`{PARENT_TAG}` = '{parent}'")
    for key, value in {"beta": "0.5", "calibration": "128"}.items():
        client.log_param(run.info.run_id, key, value)
    said = rows(copied, DAY)["Q_PTQ_run1"][2]
    assert said.endswith("q, bits_w=8, seed=42, calibration=128")


@pytest.mark.parametrize(
    ("edit", "said"),
    [({"drop": "small"}, "drop is 'small', expected a number"), ({"datetime": "yesterday"}, "isoformat.*'yesterday'")],
)
def test_a_record_that_was_edited_is_one_line(empty_uri, tmp_path, edit: dict, said: str) -> None:
    copied = copy_store(empty_uri, tmp_path)
    client = MlflowClient(tracking_uri=copied)
    parent = log_sweep(copied, "edited", [(record("K_T3B05_run1", datetime=stamp(DAY)), [])])
    run = client.search_runs([client.get_run(parent).info.experiment_id], f"tags.`{PARENT_TAG}` = '{parent}'")[0]
    client.set_tag(run.info.run_id, "record", json.dumps(json.loads(run.data.tags["record"]) | edit))
    for read in (lambda: daily.compute(copied, DAY), lambda: load(copied, "edited")):
        with pytest.raises(InputError, match=rf"K_T3B05_run1.*{said}"):
            read()


@pytest.mark.parametrize("text", ["yesterday", "2026-02-30", "30.3.2026", "2026-3-1x", ""])
def test_no_such_day(text: str) -> None:
    with pytest.raises(InputError, match="no such day, expected YYYY-MM-DD"):
        daily.parse_date(text)


def test_what_cannot_be_is_one_line(
    uri: str, empty_uri: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cases = {
        ("--date", "2020-01-01", "--tracking-uri", uri): "nothing ran on that day; the last days with runs are 2026-",
        ("--date", "2026-13-01", "--tracking-uri", uri): "no such day",
        ("--date", "", "--tracking-uri", uri): "--date '': no such day",
        ("--day", "2026-01-01", "--tracking-uri", uri): "unrecognized arguments: --day 2026-01-01 (--help lists",
        ("--date", "2026-01-01"): "sqlite:///runs/mlflow.db: there is no database file",
        ("--tracking-uri", empty_uri): "no sweep is logged there yet",
        ("--tracking-uri", "sqlite:///nowhere.db"): "there is no database file",
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)  # without runs/, where it looks unless told otherwise
    for flags, said in cases.items():
        assert main(["daily", *flags]) == 2
        out, err = capsys.readouterr()
        assert not out and said in err and err.count("\n") == 1
