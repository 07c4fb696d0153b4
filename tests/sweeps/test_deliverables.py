"""What a campaign hands over, on made-up journals mirrored into a real store; `analysis verify` finds every change."""

import contextlib
import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from analysis import verify
from analysis.__main__ import main as analysis
from analysis.manifest import Manifest
from engines.errors import InputError
from sweeps import campaign_run, deliverables
from sweeps import campaign_screen as screen
from sweeps.audit import FalseStops
from sweeps.campaign import run
from sweeps.catalogue import Needs, Stage, Task, drop
from sweeps.conduct import Plan
from sweeps.journal import CAMPAIGN, Journal, check_free
from sweeps.mlflow_writer import Mirror
from trainables.gates import Gate
from trainables.record import Record

STAGES = (
    Stage("K", "dust3r", "one.py", (), [
        Task("K-1", "first", ("workload.yaml", "one.pth"), (drop(0.01),), (8, 12)),
        Task("K-2", "second", ("two.pth",), (drop(0.01),), (8, 12)),
        Task("K-4", "best", ("best.pth", "log.json"), (drop(0.01), Gate("p50_ratio_fp32", at_least=2)), (2, 4)),
    ]),
    Stage("KQ", "dust3r", "two.py", (), [Task("KQ-1", "int8", ("int8.trt",), (drop(0.01),))],
          [Needs("K-4", file="best.pth", setting="model")]),
)  # fmt: skip


NOTED: dict[str, str] = {}  # fields that every record of a sweep has beside the usual ones


def sweep(plan: Plan, stage: Stage, trials: list[dict], profile: str) -> None:
    """A finished sweep: its journal, files and runs in MLflow. A trial: exp_id, files, reason, epochs, drop."""
    folder = plan.sweep_folder(stage)
    journal = Journal.open(folder)
    name = folder.name
    journal.append(
        "sweep", sweep_id=f"id-{name}", name=name, stage=stage.id, domain="dust3r", profile=profile, epochs=10,
        campaign=plan.name, config_hash="c", workload_hash="w1", settings={"lr": 0.1},
    )  # fmt: skip
    (folder / "files").mkdir()
    for number, given in enumerate(trials):
        trial_id, reason = f"t{number}", given["reason"]
        task = f"{stage.id}-{number + 1}"
        journal.append("trial", trial_id=trial_id, exp_id=given["exp_id"], task_id=task, role="trial",
                       params={"T": 3.0}, saves=given["files"][0])  # fmt: skip
        for epoch in range(1, given["epochs"] + 1):
            journal.append("result", trial_id=trial_id, epoch=epoch,
                           metrics={"val_drop": 0.1, "epoch_s": 900.0, "cpu_s": 360.0})  # fmt: skip
        journal.append("stop", trial_id=trial_id, epoch=given["epochs"], reason=reason, detail="as told")
        record = Record(exp_id=given["exp_id"], task_id=task, domain="dust3r", profile=profile, T=3, seed=7,
                        absrel=0.125, stop_reason=reason, epochs=given["epochs"], workload_hash="w1",
                        drop=given["drop"], verdict="pass" if given["drop"] <= 0.01 else "fail",
                        datetime="2026-03-01T12:00:00+01:00", **NOTED,
                        extra={"cpu_hours": 0.1 * given["epochs"], "p50_ratio_fp32": 2.5})  # fmt: skip
        journal.append("record", trial_id=trial_id, record=record.to_dict())
        for file in given["files"]:
            (folder / "files" / file).write_text(f"{file} of {given['exp_id']}")
            journal.append("file", path=f"files/{file}", trial_id=trial_id)
    for file in ("log.json", "workload.yaml") if stage.id == "K" else ():
        path = folder / ("files" if file == "log.json" else ".") / file
        path.write_text("workload_hash: w1\n" if file == "workload.yaml" else "{}")
        journal.append("file", path=str(path.relative_to(folder)), trial_id=None)
    journal.append("choice", exp_id=trials[0]["exp_id"], why="told")
    journal.append("end", status="finished")
    journal.close()
    mirror = Mirror(journal.path, plan.tracking_uri)
    mirror.read()
    mirror.sync(over=True)
    mirror.save(None)


def campaign(storage: Path, profile: str = "small", second_drop: float = 0.005) -> Plan:
    """A whole campaign's plan, run."""
    name = f"toy_{profile}_seed42"
    plan = Plan(name, "toy", profile, 42, STAGES, STAGES, storage / name, f"sqlite:///{storage / 'mlflow.db'}", ())
    good = dict(exp_id="K_good_run1", files=["one.pth", "best.pth"], reason="completed", epochs=10, drop=0.002)
    second = dict(exp_id="K_second_run1", files=["two.pth"], reason="plateau", epochs=4, drop=second_drop)
    sweep(plan, STAGES[0], [good, second], profile)
    int8 = dict(exp_id="KQ_INT8_run1", files=["int8.trt"], reason="completed", epochs=1, drop=0.004)
    sweep(plan, STAGES[1], [int8], profile)
    return plan


@pytest.fixture(scope="module")
def whole(tmp_path_factory, template) -> Path:
    """The deliverables of a campaign that met everything; not to be changed."""
    storage = tmp_path_factory.mktemp("whole")
    (storage / "mlflow.db").write_bytes(template.read_bytes())
    plan = campaign(storage)
    found = deliverables.write(plan, {"K": 7200.0})
    campaign_run.log(plan, found)
    return found.folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A copy to tamper with, beside a copy of its store."""
    shutil.copytree(whole, tmp_path / "c" / "deliverables")
    shutil.copy(whole.parents[1] / "mlflow.db", tmp_path / "mlflow.db")
    return tmp_path / "c" / "deliverables"


def test_a_whole_folder_has_no_problem(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert analysis(["verify", str(whole)]) == 0
    out = capsys.readouterr().out
    assert out == "toy_small_seed42: 9 files, 3 records, 4 tasks with hard lines; no problem\n"


def test_writing_again_changes_nothing_but_the_manifests_time(whole: Path, tmp_path: Path, template) -> None:
    (tmp_path / "mlflow.db").write_bytes(template.read_bytes())
    plan = campaign(tmp_path)
    first = deliverables.write(plan, {})
    (first.folder / "mine.txt").write_text("put here by a person")
    again = deliverables.write(plan, {})
    assert again.manifest.files == first.manifest.files and again.manifest.tasks == first.manifest.tasks
    assert (again.folder / "mine.txt").exists() and not [p for p in again.folder.iterdir() if p.suffix == ".tmp"]
    source = plan.sweep_folder(STAGES[0]) / "files" / "one.pth"
    assert os.path.samefile(source, again.folder / "one.pth"), "a file was copied where a link would have done"
    # A file that the plan's stage lost is no deliverable any more.
    source.unlink()
    assert "one.pth" not in {file.file for file in deliverables.write(plan, {}).manifest.files}
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
    # A stage that ends later makes the report one of yesterday, and the manifest one that MLflow does not know yet.
    assert not deliverables.write(plan, {}).report and not page.parent.exists()
    (problem,) = verify.check(folder).problems
    assert problem.startswith("manifest.json: not the one that the campaign logged")
    assert resumed()[1] == 0 and not verify.check(folder).problems
    with contextlib.closing(sqlite3.connect(plan.folder.parent / "mlflow.db")) as store:
        assert len(store.execute(ask).fetchall()) == 1


FAULTS = {
    "a file is where it belongs": lambda plan: (plan.folder / "deliverables" / "report").write_text("mine"),
    "no such store": lambda plan: (plan.folder.parent / "mlflow.db").unlink(),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_prevents_the_report_costs_nothing_else(fault, resumed, capsys: pytest.CaptureFixture[str]) -> None:
    plan, _ = resumed()
    deliverables.write(plan, {})
    FAULTS[fault](plan)
    capsys.readouterr()
    _, code = resumed()
    out, err = capsys.readouterr()
    assert code == 0 and "Deliverables: " in out and "Report: " not in out
    assert err.startswith("warning: no report (") and "--resume tries again" in err and err.count("\n") == 1
    assert Manifest.read(plan.folder / "deliverables" / "manifest.json").campaign == plan.name
    assert not list(plan.folder.glob(".report*"))


def test_hours_saved_are_the_epochs_not_run_at_the_trials_own_pace(whole: Path) -> None:
    ledger = json.loads((whole / "ledger.json").read_text())
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
    found = deliverables.write(plan, {})
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
    assert "Hours: 1.5 as measured here\n" in capsys.readouterr().out
    screen.preview(Console(width=140), plan, tmp_path)
    assert "Hours: every stage is finished\n" in capsys.readouterr().out
    shutil.rmtree(plan.sweep_folder(STAGES[1]))
    screen.preview(Console(width=140), again, tmp_path)
    assert "Hours: 1.4 CPU-hours, as once taken, and as measured here; unknown for KQ\n" in capsys.readouterr().out
    screen.preview(Console(width=140), plan, tmp_path)
    assert "Hours: unknown for 1 of 2 stages, the others are finished; unknown for KQ\n" in capsys.readouterr().out


def edited(folder: Path, change) -> None:
    """The manifest after `change(data)`."""
    data = json.loads((folder / "manifest.json").read_text())
    change(data)
    (folder / "manifest.json").write_text(json.dumps(data))


def listed(folder: Path, name: str) -> None:
    """Make the manifest agree with what a file holds now."""
    described = deliverables._described(folder / name)

    def change(data: dict) -> None:
        entry = next(file for file in data["files"] if file["file"] == name)
        entry |= {"sha256": described.sha256, "bytes": described.bytes}

    edited(folder, change)


def in_table(folder: Path, old: str, new: str) -> None:
    """A changed cell of the table, with a manifest that agrees: only MLflow can tell."""
    path = folder / "result_table.csv"
    text = path.read_text()
    assert old in text
    path.unlink()
    path.write_text(text.replace(old, new, 1))
    listed(folder, "result_table.csv")


def in_store(folder: Path, change: Callable[[str], str]) -> None:
    """Another record in MLflow's tag, which is what pictures and reports show; its metrics stay."""
    run = Manifest.read(folder / "manifest.json").tasks[0].judged[0]
    with sqlite3.connect(folder.parents[1] / "mlflow.db") as store:
        (before,) = store.execute("select value from tags where key = 'record' and run_uuid = ?", (run,)).fetchone()
        assert change(before) != before
        store.execute("update tags set value = ? where key = 'record' and run_uuid = ?", (change(before), run))


def put(folder: Path, name: str, text: str) -> None:
    """Other content; the deliverable may be a link to the sweep's own file."""
    (folder / name).unlink()
    (folder / name).write_text(text)


def link(folder: Path, name: str, target: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)


def rename(folder: Path, old: str, new: str) -> None:
    edited(folder, lambda data: next(file for file in data["files"] if file["file"] == old).update(file=new))


TAMPERED = {
    "changed": (lambda f: put(f, "one.pth", "one.pth of K_evil_run1"), "one.pth: its content is not that of"),
    "cut": (lambda f: put(f, "one.pth", "one"), "one.pth: 3 bytes, manifest.json says"),
    "removed": (lambda f: (f / "two.pth").unlink(), "two.pth: missing"),
    "added": (lambda f: (f / "extra.pth").write_text("x"), "'extra.pth': a file that manifest.json does not list"),
    "folder": (lambda f: (f / "sub").mkdir(), "'sub': a folder or device"),
    "pipe": (lambda f: ((f / "one.pth").unlink(), os.mkfifo(f / "one.pth")), "one.pth: refused, it is a link or no"),
    "link": (lambda f: link(f, "two.pth", "/etc/hostname"), "two.pth: refused, it is a link or no file"),
    "extra link": (lambda f: link(f, "x", "/etc/hostname"), "'x': a link that manifest.json does not list"),
    "table link": (lambda f: link(f, "result_table.csv", "/etc/hostname"), "result_table.csv: refused"),
    "upwards": (lambda f: rename(f, "one.pth", "../../mlflow.db"), "'../../mlflow.db': refused"),
    "in another folder": (lambda f: rename(f, "one.pth", "sub/one.pth"), "'sub/one.pth': refused"),
    "hidden in the report": (lambda f: rename(f, "one.pth", "report/.x"), "'report/.x': refused"),
    "out of the report": (lambda f: rename(f, "one.pth", "report/../../mlflow.db"), "mlflow.db': refused"),
    "absolute": (lambda f: rename(f, "one.pth", "/etc/hostname"), "'/etc/hostname': refused"),
    "terminal": (lambda f: rename(f, "one.pth", "\x1b[2Jone.pth"), r"'\x1b[2Jone.pth': refused"),
    "unlisted": (lambda f: edited(f, lambda d: d["files"].pop(0)), "that manifest.json does not list"),
    "no table": (lambda f: edited(f, lambda d: d.update(files=[x for x in d["files"] if x["file"] != verify.TABLE])),
                 "result_table.csv: manifest.json does not list it"),
    "number": (lambda f: in_table(f, "0.125", "0.12"), "absrel is 0.12 in result_table.csv, 0.125 in MLflow"),
    "input": (lambda f: in_table(f, ",3.0,", ",5.0,"), "T is 5.0 in result_table.csv, 3.0 in MLflow"),
    "emptied": (lambda f: in_table(f, ",0.125,", ",,"), "absrel is nothing in result_table.csv, 0.125 in MLflow"),
    "word": (lambda f: in_table(f, ",plateau,", ",completed,"),
             "stop_reason is 'completed' in result_table.csv, 'plateau' in MLflow"),
    "cell": (lambda f: in_table(f, ",plateau,", f",{'x' * 140_000},"), "field larger than field limit"),
    "shown record": (lambda f: in_store(f, lambda record: record.replace('"drop":0.002', '"drop":0.001')),
                     "drop is 0.002 in result_table.csv, 0.001 in MLflow"),
    "no record": (lambda f: in_store(f, lambda record: record[:-1]), "the record in MLflow cannot be read"),
    "row": (lambda f: in_table(f, (f / "result_table.csv").read_text().splitlines()[2] + "\n", ""),
            "in MLflow, but not in result_table.csv"),
    "run": (lambda f: in_table(f, Manifest.read(f / "manifest.json").tasks[0].judged[0], "feed"),
            "run feed is not in MLflow with a record"),
    "columns": (lambda f: in_table(f, "exp_id,combo", "combo,exp_id"), "columns are not those of the record"),
    "text": (lambda f: in_table(f, ",7,", ",seven,"), "seed='seven' is text"),
    "verdict": (lambda f: edited(f, lambda d: d["tasks"][0].update(verdict="fail")),
                "K-1: manifest.json says fail, the table pass"),
    "softened": (lambda f: edited(f, lambda d: d["tasks"][1].update(judged=[])), "K-2: manifest.json says pass"),
    "dropped": (lambda f: edited(f, lambda d: d["tasks"].pop(1)),
                "K-2: one_small_seed42 ran it, manifest.json does not list it"),
    "workload": (lambda f: (put(f, "workload.yaml", "workload_hash: w2\n"), listed(f, "workload.yaml")),
                 "K_good_run1: measured on workload w1, workload.yaml is w2"),
    "profile": (lambda f: edited(f, lambda d: d.update(profile="demo")), "profile small, manifest.json says demo"),
    "loosened": (lambda f: edited(f, lambda d: d["tasks"][0]["lines"][0].update(at_most=0.5)),
                 "manifest.json: not the one that the campaign logged to MLflow"),
    "lines": (lambda f: edited(f, lambda d: d["tasks"][0]["lines"][0].update(at_most=None)), "expected one limit"),
}  # fmt: skip


@pytest.mark.parametrize("case", TAMPERED)
def test_every_change_is_a_line(case: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, said = TAMPERED[case]
    change(copy)
    assert analysis(["verify", str(copy)]) == 1
    out, err = capsys.readouterr()
    problems = [line for line in out.splitlines() if line.startswith("problem: ")]
    assert any(said in line for line in problems), out
    assert out.endswith(f"; {len(problems)} problems\n") and not err


def test_a_text_that_mlflow_shows_cut_is_no_change(tmp_path: Path, template, monkeypatch) -> None:
    monkeypatch.setattr("sweeps.mlflow_content._LONGEST_TAG", 1100)
    (tmp_path / "mlflow.db").write_bytes(template.read_bytes())
    monkeypatch.setitem(NOTED, "notes", "a long note " * 40)
    folder = deliverables.write(campaign(tmp_path), {}).folder
    with sqlite3.connect(tmp_path / "mlflow.db") as store:
        shown = [text for (text,) in store.execute("select value from tags where key = 'record'")]
    assert shown and all('..."' in text for text in shown) and not verify.check(folder).problems
    in_table(folder, "a long note", "a false note")
    assert any("notes is 'a false note" in problem for problem in verify.check(folder).problems)


def test_a_missed_line_is_a_problem_but_for_the_demo(tmp_path: Path, template) -> None:
    for profile in ("small", "demo"):
        storage = tmp_path / profile
        storage.mkdir()
        (storage / "mlflow.db").write_bytes(template.read_bytes())
        found = verify.check(deliverables.write(campaign(storage, profile, second_drop=0.5), {}).folder)
        said = ("K-2: missed its hard line. drop 50 %, needed <= 1 %",)
        unlogged = ("manifest.json is not in MLflow, where a campaign's end puts it: its lines are believed",)
        assert (found.problems, found.notes) == ((said, unlogged) if profile == "small" else ((), (*unlogged, *said)))


def other_database(folder: Path) -> None:
    (folder.parents[1] / "mlflow.db").unlink()
    with sqlite3.connect(folder.parents[1] / "mlflow.db") as db:
        db.execute("create table runs (id text)")


UNUSABLE = {
    "no folder": (lambda f: shutil.rmtree(f), "no such folder"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json: no such file"),
    "a linked manifest": (lambda f: link(f, "manifest.json", "/etc/hostname"), "manifest.json: no such file"),
    "no JSON": (lambda f: (f / "manifest.json").write_text("{"), "no manifest of this version"),
    "another version": (lambda f: edited(f, lambda d: d.update(format=2)), "no manifest of this version (format"),
    "more than it may say": (lambda f: edited(f, lambda d: d.update(more=1)), "no manifest of this version (more"),
    "no store": (lambda f: (f.parents[1] / "mlflow.db").unlink(), "name the store with --tracking-uri"),
    "another store": (other_database, "not an MLflow 3 store"),
    "another campaign": (lambda f: edited(f, lambda d: d.update(campaign="else")), "campaign 'else' is not in this"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_cannot_be_verified_is_one_line(case: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, said = UNUSABLE[case]
    change(copy)
    assert analysis(["verify", str(copy)]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and said in err and err.count("\n") == 1


def test_a_folder_that_cannot_be_written_leaves_the_manifest_as_it_was(tmp_path: Path, template, monkeypatch) -> None:
    (tmp_path / "mlflow.db").write_bytes(template.read_bytes())
    plan = campaign(tmp_path)
    folder = deliverables.write(plan, {}).folder
    before = (folder / "manifest.json").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(deliverables, "write_csv", full)
    with pytest.raises(OSError):
        deliverables.write(plan, {})
    assert (folder / "manifest.json").read_bytes() == before
    assert not verify.check(folder).problems


def test_the_campaigns_journal_is_held_while_open(tmp_path: Path) -> None:
    with Journal.open(tmp_path, "campaign.jsonl"):
        with pytest.raises(InputError, match="is in use by process"):
            Journal.open(tmp_path, "campaign.jsonl")
        check_free(tmp_path)  # a sweep's own journal is another one
