"""`python -m analysis verify` finds every change of what a campaign handed over."""

import json
import os
import shutil
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from analysis import verify
from analysis.__main__ import main as analysis
from analysis.manifest import Manifest
from analysis.store import load_all
from sweeps import campaign_run, deliverables
from sweeps.journal import CAMPAIGN, Journal
from sweeps.tracking import ENVIRONMENT

sys.path.append(str(Path(__file__).parent))
from made_campaign import NOTED, campaign


@pytest.fixture(scope="module")
def whole(tmp_path_factory, template) -> Path:
    """The deliverables of a campaign that met everything; not to be changed."""
    storage = tmp_path_factory.mktemp("whole")
    (storage / "mlflow.db").write_bytes(template.read_bytes())
    plan = campaign(storage)
    with Journal.open(plan.folder, CAMPAIGN) as journal:
        journal.append("campaign", name=plan.name, plan="toy", profile="small", seed=42, overrides={})
    found = deliverables.write(plan, {"K": [(0.0, 7200.0)]}, {})
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)  # which it would leave to other tests
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
    folder = deliverables.write(campaign(tmp_path), {}, {}).folder
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
        found = verify.check(deliverables.write(campaign(storage, profile, second_drop=0.5), {}, {}).folder)
        said = ("K-2: missed its hard line. drop 50 %, needed <= 1 %",)
        unlogged = ("manifest.json is not in MLflow, where a campaign's end puts it: its lines are believed",)
        assert (found.problems, found.notes) == ((said, unlogged) if profile == "small" else ((), (*unlogged, *said)))


def test_another_campaign_of_the_name_is_not_this_one(
    tmp_path: Path, template, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that was removed and begun anew, with the store kept: the sweeps of both have one tag."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "mlflow.db").write_bytes(template.read_bytes())
    folders = []
    for _ in range(2):
        plan = campaign(tmp_path, began=True)
        found = deliverables.write(plan, {}, {})
        campaign_run.log(plan, deliverables.draw_report(found, plan.tracking_uri))
        folders.append(plan.folder.rename(tmp_path / f"kept{len(folders)}"))
    for folder in folders:
        assert verify.check(folder / "deliverables", plan.tracking_uri).problems == ()
    data = load_all(plan.tracking_uri, campaign=plan.name)
    assert f"2 sweeps of another campaign named '{plan.name}' are left out" in data.notes and len(data.sweeps) == 2


def test_what_was_left_out_by_choice_is_one_problem(copy: Path) -> None:
    def change(data: dict) -> None:
        for row in data["tasks"]:
            row.update({"finished": False, "selected": row["stage"] != "K"})

    edited(copy, change)
    found = verify.check(copy).problems
    assert "3 of the plan's 4 tasks left out by choice: K-1, K-2, K-4" in found
    assert [one.partition(":")[0] for one in found if "not done" in one] == ["KQ-1"]


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
