"""What a campaign hands over, on made-up journals mirrored into a real store."""

import contextlib
import json
import os
import shutil
import sqlite3
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from analysis import verify
from analysis.manifest import Manifest
from engines.errors import InputError
from sweeps import campaign_screen as screen
from sweeps import deliverables, hours
from sweeps.audit import FalseStops
from sweeps.campaign import _walls, run
from sweeps.catalogue import PLANS
from sweeps.cluster import cores
from sweeps.conduct import Plan
from sweeps.journal import CAMPAIGN, Journal, SweepState, TrialState, check_free
from sweeps.outcome import Outcome
from sweeps.progress import duration
from trainables.gates import Verdict

sys.path.append(str(Path(__file__).parent))
from made_campaign import STAGES, campaign


def test_writing_again_changes_nothing_but_the_manifests_time(tmp_path: Path, template) -> None:
    (tmp_path / "mlflow.db").write_bytes(template.read_bytes())
    plan = campaign(tmp_path)
    first = deliverables.write(plan, {}, {})
    (first.folder / "mine.txt").write_text("put here by a person")
    again = deliverables.write(plan, {}, {})
    assert again.manifest.files == first.manifest.files and again.manifest.tasks == first.manifest.tasks
    assert (again.folder / "mine.txt").exists() and not [p for p in again.folder.iterdir() if p.suffix == ".tmp"]
    source = plan.sweep_folder(STAGES[0]) / "files" / "one.pth"
    assert os.path.samefile(source, again.folder / "one.pth"), "a file was copied where a link would have done"
    # A file that the plan's stage lost is no deliverable any more.
    source.unlink()
    assert "one.pth" not in {file.file for file in deliverables.write(plan, {}, {}).manifest.files}
    assert not (again.folder / "one.pth").exists()


@pytest.fixture
def resumed(tmp_path: Path, template) -> Callable[[], tuple[Plan, int]]:
    """A campaign whose stages have all ended, and which only has to close."""
    (tmp_path / "mlflow.db").write_bytes(template.read_bytes())
    plan = campaign(tmp_path)
    with Journal.open(plan.folder, CAMPAIGN) as journal:
        journal.append("campaign", name=plan.name, plan="toy", profile="small", seed=42, overrides={})
    return lambda: (plan, run(["--plan", "toy", "--resume", "--storage", str(tmp_path)], {"toy": STAGES}))


def test_a_campaign_ends_in_a_report_that_the_manifest_lists(resumed, capsys: pytest.CaptureFixture[str]) -> None:
    plan, code = resumed()
    said = capsys.readouterr()
    folder = plan.folder / "deliverables"
    page = folder / "report" / "report.html"
    assert code == 0 and f"\nReport: {page}\n" in said.out and not said.err
    text = page.read_text().replace("<wbr>", "")
    for word in ("K_good_run1", "KQ_INT8_run1", "Verdicts", "Ledger", ">plateau 0.600<"):
        assert word in text
    inside = {f"report/{path.name}" for path in page.parent.iterdir()}
    assert inside >= {"report/report.html", "report/report.md"}
    assert {file.file for file in Manifest.read(folder / "manifest.json").files if "/" in file.file} == inside
    assert not verify.check(folder).problems and not list(plan.folder.glob(".report*"))
    for change, name in {"changed": "report.html", "added": "else.html", "link": "report.md"}.items():
        copied = plan.folder / change
        shutil.copytree(folder, copied)
        (copied / "report" / name).unlink(missing_ok=True)
        if change == "link":
            (copied / "report" / name).symlink_to(page)
        else:
            (copied / "report" / name).write_text("else")
        (problem,) = verify.check(copied, plan.tracking_uri).problems
        assert f"report/{name}" in problem
    shutil.rmtree(copied / "report")
    (copied / "report").symlink_to(page.parent)
    assert "'report': a link that manifest.json does not list" in verify.check(copied, plan.tracking_uri).problems
    # The campaign's own run has it, and knows this manifest.
    with contextlib.closing(sqlite3.connect(plan.folder.parent / "mlflow.db")) as store:
        ask = (
            "select artifact_uri, status from runs join tags using (run_uuid) where key = 'role' and value = 'campaign'"
        )
        ((place, status),) = store.execute(ask)
    logged = Path(place.removeprefix("file://"))
    assert status == "FINISHED" and (logged / "manifest.json").read_bytes() == (folder / "manifest.json").read_bytes()
    assert {f"report/{path.name}" for path in (logged / "report").iterdir()} == inside
    # What somebody else put there is none of it.
    (page.parent / "more.txt").symlink_to("/etc/hostname")
    assert resumed()[1] == 0 and not (logged / "report" / "more.txt").exists()
    (page.parent / "more.txt").unlink()
    # A stage that ends later makes the report one of yesterday, and the manifest one that MLflow does not know yet.
    assert not deliverables.write(plan, {}, {}).report and not page.parent.exists()
    (problem,) = verify.check(folder).problems
    assert problem.startswith("manifest.json: not the one that the campaign logged")
    assert resumed()[1] == 0 and not verify.check(folder).problems
    with contextlib.closing(sqlite3.connect(plan.folder.parent / "mlflow.db")) as store:
        assert len(store.execute(ask).fetchall()) == 1


FAULTS = {
    "a file is where it belongs": lambda plan: (plan.folder / "deliverables" / "report").write_text("mine"),
    "no such store": lambda plan: (plan.folder.parent / "mlflow.db").unlink(),
    "a link lies there": lambda plan: (plan.folder / "deliverables" / "report").symlink_to("/etc"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_prevents_the_report_costs_nothing_else(fault, resumed, capsys: pytest.CaptureFixture[str]) -> None:
    plan, _ = resumed()
    deliverables.write(plan, {}, {})
    FAULTS[fault](plan)
    capsys.readouterr()
    _, code = resumed()
    out, err = capsys.readouterr()
    assert code == 0 and "Deliverables: " in out and "Report: " not in out
    assert err.startswith("warning: no report (") and "--resume tries again" in err
    if fault == "no such store":  # nor is there one to log to
        assert "\nwarning: manifest and report are not in MLflow (" in err
    else:
        assert err.count("\n") == 1 and not set(verify.check(plan.folder / "deliverables").problems) - {
            "'report': a file that manifest.json does not list", "'report': a link that manifest.json does not list"
        }  # fmt: skip
    assert Manifest.read(plan.folder / "deliverables" / "manifest.json").campaign == plan.name
    assert not list(plan.folder.glob(".report*"))


def test_hours_saved_are_the_epochs_not_run_at_the_trials_own_pace(tmp_path: Path, template) -> None:
    (tmp_path / "mlflow.db").write_bytes(template.read_bytes())
    ledger = json.loads(
        (deliverables.write(campaign(tmp_path), {"K": [(0.0, 7200.0)]}, {}).folder / "ledger.json").read_text()
    )
    second = next(row for row in ledger["trials"] if row["exp_id"] == "K_second_run1")
    assert (second["hours"], second["unit"]) == (pytest.approx(0.4), "CPU")  # CPU time, not the clock's
    assert second["saved"] == pytest.approx(0.6)
    k, kq = ledger["stages"]
    assert (k["hours"], k["saved"]) == (pytest.approx(1.4), {"plateau": pytest.approx(0.6)})
    assert k["wall_h"] == 2 and kq["wall_h"] is None
    # An INT8 trial that ended within its gate did what it was meant to: nothing was saved.
    assert kq["saved"] == {} and ledger["campaign"]["hours"] == pytest.approx(1.5)


def test_the_ledger_has_what_an_audit_found(tmp_path: Path, template) -> None:
    (tmp_path / "mlflow.db").write_bytes(template.read_bytes())
    plan = campaign(tmp_path)
    for stage, audited, false in zip(STAGES, (3, 1), (1, 0), strict=True):
        with Journal.open(plan.sweep_folder(stage)) as journal:
            journal.append("summary", metrics=FalseStops(audited, false).metrics)
    found = deliverables.write(plan, {}, {})
    said = "Audit: 1 of 4 stops that were run on to the end met the gate after all: 25 % false stops [1, 81]."
    assert found.total.sentence.endswith(said)
    ledger = json.loads((found.folder / "ledger.json").read_text())
    assert [one["audited_stops"] for one in (ledger["campaign"], *ledger["stages"])] == [4, 3, 1]
    assert ledger["campaign"]["false_stop_rate_hi"] == pytest.approx(0.806, abs=1e-3)


def test_a_dry_run_says_which_hours_were_measured_here(
    tmp_path: Path, template, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mlflow.db").write_bytes(template.read_bytes())
    plan = campaign(tmp_path)
    again = replace(plan, name="again", folder=tmp_path / "again")
    screen.preview(Console(width=140), again, tmp_path)
    least = ", at least {} on " + f"{cores()} cores, measuring not counted"
    said = least.format(duration(3600 * 1.5 / cores()))
    assert f"Hours: 1.5 CPU-hours of training, as measured here{said}\n" in capsys.readouterr().out
    screen.preview(Console(width=140), plan, tmp_path)
    assert "Hours: 2 of 2 stages finished\n" in capsys.readouterr().out
    shutil.rmtree(plan.sweep_folder(STAGES[1]))
    screen.preview(Console(width=140), again, tmp_path)
    said = least.format(duration(3600 * 1.4 / cores()))
    assert f"Hours: 1.4 CPU-hours of training, as measured here{said}; unknown for KQ\n" in capsys.readouterr().out
    screen.preview(Console(width=140), plan, tmp_path)
    assert "Hours: unknown for KQ; 1 of 2 stages finished\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "settings", "given", "counts"),
    [
        ("python sweeps/k_grid.py --profile demo", {}, [], True),
        ("python sweeps/k_grid.py --set epochs=2", {}, [], False),
        ("python sweeps/k_grid.py --set=epochs=2", {}, [], False),
        ("python sweeps/k_grid.py", {}, ["epochs=400"], False),
        ("python sweeps/k_grid.py --set epochs=400 --resume", {}, ["epochs=400", "distance=5"], True),
        ("python sweeps/k_grid.py --seeds 2", {"seeds": 2}, [], False),
    ],
)
def test_hours_of_a_sweep_with_other_settings_say_nothing(
    tmp_path: Path, command: str, settings: dict, given: list[str], counts: bool
) -> None:
    stages = PLANS["all"]
    overrides = {text.partition("=")[0]: text for text in given}
    plan = Plan("c", "all", "demo", 42, stages, stages, tmp_path, "sqlite:///none.db", (), overrides=overrides)
    k = next(stage for stage in stages if stage.id == "K")
    assert screen._alike(plan, k, {"command": command, "settings": settings}) == counts


def test_the_clock_of_a_stage_outlives_the_campaign_that_was_killed(tmp_path: Path, template) -> None:
    (tmp_path / "mlflow.db").write_bytes(template.read_bytes())
    plan = campaign(tmp_path)
    events = [
        {"t": 0.0, "event": "start", "stage": "K"},  # killed with the campaign, when K's journal says
        {"t": 1e12, "event": "start", "stage": "K"},
        {"t": 1e12 + 60, "event": "exit", "stage": "K", "code": 0, "wall_s": 50.0},
        {"t": 1e12 + 70, "event": "start", "stage": "KQ"},  # went on when the campaign was killed; a later one waited
        {"t": 1e12 + 100, "event": "exit", "stage": "KQ", "code": None, "wall_s": 5.0},
    ]
    (plan.folder / CAMPAIGN).write_text("".join(json.dumps({"command": [], **event}) + "\n" for event in events))
    last = json.loads((plan.sweep_folder(STAGES[0]) / "journal.jsonl").read_text().splitlines()[-1])["t"]
    # Started once more by a campaign that was killed, and ended by itself: nobody wrote that down.
    with (plan.folder / CAMPAIGN).open("a") as file:
        file.write(json.dumps({"command": [], "t": last - 7, "event": "start", "stage": "K"}) + "\n")
    assert _walls(plan) == {
        "K": [(0.0, last), (1e12 + 10, 1e12 + 60), (last - 7, last)],
        "KQ": [(1e12 + 70, 1e12 + 100)],
    }


def test_stages_side_by_side_take_the_time_of_one(tmp_path: Path, template) -> None:
    (tmp_path / "mlflow.db").write_bytes(template.read_bytes())
    walls = {"K": [(0.0, 3600.0), (7200.0, 9000.0)], "KQ": [(1800.0, 7200.0)]}
    ledger = json.loads((deliverables.write(campaign(tmp_path), walls, {}).folder / "ledger.json").read_text())
    assert [one["wall_h"] for one in (ledger["campaign"], *ledger["stages"])] == [2.5, 1.5, 1.5]


def test_hours_after_a_resume_on_other_devices_are_of_one_kind() -> None:
    """Three epochs on a CPU and one on an accelerator: what was saved costs what the accelerator's epoch did."""
    state = SweepState(header={"epochs": 10})
    state.trials["t"] = TrialState("t", "K_a_run1", "K-1", "trial", {}, None)
    slow, fast = {"cpu_s": 9000.0, "epoch_s": 9000.0}, {"gpus": 1.0, "epoch_s": 3600.0}
    state.trials["t"].results = [(1, slow), (2, slow), (3, slow), (4, fast)]
    state.trials["t"].stop = (4, "stop_loss", "")
    (row,) = hours.of_trials("K", state)
    assert (row.unit, row.hours, row.epochs, row.saved) == ("GPU", 1.0, 4, 6.0)


def test_what_was_made_from_a_student_that_was_replaced_is_not_delivered(
    resumed, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, _ = resumed()
    with Journal.open(plan.sweep_folder(STAGES[0])) as journal:  # as when a trial that failed is run again, and wins
        journal.append("file", path="files/best.pth", trial_id="t1")
        journal.append("choice", exp_id="K_second_run1", why="told")
        journal.append("end", status="finished")
    capsys.readouterr()
    _, code = resumed()
    said = "made from another best.pth than K has now"
    assert code == 1 and f"KQ: not run, {said}" in capsys.readouterr().out
    assert not (plan.folder / "deliverables" / "int8.trt").exists()
    problems = verify.check(plan.folder / "deliverables").problems
    assert any(problem.startswith(f"KQ-1: not done ({said}") for problem in problems)


def test_finished_in_another_store_is_not_finished_in_this_one(tmp_path: Path, template) -> None:
    (tmp_path / "mlflow.db").write_bytes(template.read_bytes())
    plan = campaign(tmp_path)
    outcome = plan.outcome(STAGES[0])
    assert outcome.mirrored(plan.tracking_uri) and not outcome.mirrored(f"sqlite:///{tmp_path / 'new.db'}")


def test_a_task_without_a_hard_line_fails_where_no_trial_ended_well(tmp_path: Path) -> None:
    trials = {name: TrialState(name, name, "ABL-1", "trial", {}, None, stop=(3, "completed", "")) for name in "ab"}
    for trial in trials.values():
        trial.record = {"exp_id": trial.exp_id, "stop_reason": "completed"}
    stage = next(one for one in PLANS["all"] if one.id == "ABL-1")
    outcome = Outcome(stage, tmp_path, SweepState(header={"name": "s"}, trials=trials, ended="finished"))
    assert outcome.verdict(stage.tasks[0]) == Verdict("n/a", "no hard line")
    assert outcome.whole
    trials["a"].record, trials["a"].stop, trials["a"].error = None, None, "lost its card"
    assert not outcome.whole, "--resume has something to try again"
    assert outcome.verdict(stage.tasks[0]) == Verdict("n/a", "no hard line; 1 of 2 trials broke: a failed")
    trials["b"].record["stop_reason"], trials["b"].stop = "out_of_memory", (1, "out_of_memory", "")
    said = "no hard line; 2 of 2 trials broke: a failed, b out_of_memory"
    assert outcome.verdict(stage.tasks[0]) == Verdict("fail", said)


def test_a_folder_that_cannot_be_written_leaves_the_manifest_as_it_was(tmp_path: Path, template, monkeypatch) -> None:
    (tmp_path / "mlflow.db").write_bytes(template.read_bytes())
    plan = campaign(tmp_path)
    folder = deliverables.write(plan, {}, {}).folder
    before = (folder / "manifest.json").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(deliverables, "write_csv", full)
    with pytest.raises(OSError):
        deliverables.write(plan, {}, {})
    assert (folder / "manifest.json").read_bytes() == before
    assert not verify.check(folder).problems


def test_the_campaigns_journal_is_held_while_open(tmp_path: Path) -> None:
    with Journal.open(tmp_path, "campaign.jsonl"):
        with pytest.raises(InputError, match="is in use by process"):
            Journal.open(tmp_path, "campaign.jsonl")
        check_free(tmp_path)  # a sweep's own journal is another one
