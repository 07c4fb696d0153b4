"""A campaign of real toy sweeps, killed at two levels and resumed; what it leaves; what it refuses."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow.tracking import MlflowClient

from analysis import verify
from analysis.__main__ import main as analysis
from analysis.manifest import Manifest
from sweeps.campaign import run
from sweeps.journal import SweepState, read_events
from trainables.record import FIELDS, read_csv

HERE = Path(__file__).parent
NAME = "toy_small_seed42"
WAIT_S = 900  # the machine may be loaded: generous, and reached only by a failure


class Toys:
    """A storage with the scripts of the toy stages, and how to start campaigns in it."""

    def __init__(self, folder: Path) -> None:
        self.scripts, self.storage = folder / "scripts", folder / "runs"
        self.scripts.mkdir()
        for name in ("first", "second", "third", "fourth"):
            (self.scripts / f"{name}.py").write_text(f'import toy_stage\n\ntoy_stage.run("{name}")\n')
        self.folder = self.storage / NAME

    def start(self, *flags: str, **env: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(HERE / "toy_campaign.py"), str(self.scripts), "--plan", "toy"]
        paths = os.pathsep.join([str(HERE), str(HERE.parents[1])])
        pipe = subprocess.PIPE
        return subprocess.Popen([*command, "--storage", str(self.storage), *flags], stdout=pipe, stderr=pipe, text=True,
                                env={**os.environ, "PYTHONPATH": paths, **env})  # fmt: skip

    def finish(self, process: subprocess.Popen[str]) -> tuple[int, str, str]:
        out, err = process.communicate(timeout=WAIT_S)
        return process.returncode, out, err

    def sweep(self, name: str) -> Path:
        return self.folder / f"{name}_small_seed42"

    def state(self, name: str) -> SweepState:
        return SweepState.replay(self.sweep(name) / "journal.jsonl")

    def wait_for(self, name: str, epochs: int, process: subprocess.Popen[str]) -> int:
        """Until the stage has reported so many epochs; the process id of its driver."""
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end and process.poll() is None:
            known = (self.sweep(name) / "journal.jsonl").is_file()
            if known and sum(len(trial.results) for trial in self.state(name).trials.values()) >= epochs:
                return int((self.sweep(name) / "journal.lock").read_text().split()[1])
            time.sleep(0.1)
        raise AssertionError(f"{name} has no {epochs} epochs: {process.poll()} {self.finish(process)}")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A campaign whose first stage was killed, then itself while the second ran, which was left to itself; resumed."""
    toys, slow = Toys(tmp_path_factory.mktemp("campaign")), {"TOY_SLEEP_FIRST": "1.5", "TOY_SLEEP_SECOND": "1.5"}
    first = toys.start(**slow)
    os.kill(toys.wait_for("first", 3, first), signal.SIGKILL)
    one = toys.finish(first)
    third = (toys.sweep("third") / "journal.jsonl").read_bytes()
    before = [(trial.task_id, len(trial.results)) for trial in toys.state("first").trials.values()]

    second = toys.start("--resume", **slow)
    orphan = toys.wait_for("second", 1, second)
    os.kill(orphan, signal.SIGSTOP)  # so that it is still there when the campaign comes back, however busy the machine
    second.kill()
    second.wait()  # its output stays open as long as the stage that it left behind
    again = toys.start("--resume", **slow)
    said = ""
    while "still at work" not in said and again.poll() is None:
        said += again.stdout.readline() if again.stdout else ""
    os.kill(orphan, signal.SIGCONT)
    code, out, err = toys.finish(again)
    return SimpleNamespace(toys=toys, one=one, two=(code, said + out, err), third=third, before=dict(before))


@pytest.mark.slow
def test_a_killed_stage_holds_up_what_needs_it_and_the_rest_goes_on(killed: SimpleNamespace) -> None:
    code, out, err = killed.one
    assert code == 1 and "Traceback" not in out + err
    assert "A: killed by signal 9; go on with --resume" in out
    assert "B: not run, A is not finished" in out
    assert "C-1: fail. drop 30 %" in out
    assert "D: not run, C-1 missed its hard line: drop 30 %" in out and "--keep-going would go on" in out


@pytest.mark.slow
def test_resume_runs_nothing_twice_and_waits_for_what_still_runs(killed: SimpleNamespace) -> None:
    code, out, err = killed.two
    toys = killed.toys
    assert code == 1, err  # C missed its hard line, as before
    assert "A: finished before" in out and "C: finished before" in out
    assert "B: still at work since before" in out and "B-1: pass" in out
    assert (toys.sweep("third") / "journal.jsonl").read_bytes() == killed.third
    state = toys.state("first")
    assert state.ended == "finished" and sum(killed.before.values()) >= 3
    for trial in [*state.trials.values(), *toys.state("second").trials.values()]:
        log = toys.folder.rglob(f"{trial.trial_id}/steps.log")
        for steps in (path.read_text().split() for path in log):
            assert steps == [str(epoch) for epoch in range(1, len(steps) + 1)], "a finished epoch ran again"
    starts = [event["stage"] for event in read_events(toys.folder / "campaign.jsonl") if event["event"] == "start"]
    assert starts == ["A", "C", "A", "B"]
    # What second was given is the file that first chose.
    header = toys.state("second").header
    assert header["settings"]["model"] == str(toys.sweep("first") / "files" / "first_best.pth")


@pytest.mark.slow
def test_all_runs_have_the_campaigns_tag_and_stand_once(killed: SimpleNamespace) -> None:
    client = MlflowClient(f"sqlite:///{killed.toys.storage / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("slimsweep").experiment_id], max_results=1000)
    assert {run.data.tags.get("campaign") for run in runs} == {NAME}
    keys = [(run.data.tags.get("sweep_id"), run.data.tags.get("trial_id")) for run in runs]
    assert len(keys) == len(set(keys)) == 1 + 3 + 2 + 1 + 1 + 3  # the campaign, three sweeps, their trials, teachers
    assert {run.info.status for run in runs} <= {"FINISHED", "KILLED"}


@pytest.mark.slow
def test_deliverables_are_the_plans_files_by_content(killed: SimpleNamespace) -> None:
    toys = killed.toys
    folder = toys.folder / "deliverables"
    names = {"good.pth", "first_best.pth", "first.json", "second.pth", "third.pth"}
    assert {p.name for p in folder.iterdir()} == names | {
        "result_table.csv", "ledger.json", "ledger.csv", "manifest.json", "report"
    }  # fmt: skip
    for name in names:
        sources = [path for path in toys.folder.glob(f"*/files/{name}")]
        assert len(sources) == 1 and sources[0].read_bytes() == (folder / name).read_bytes()
    with (folder / "result_table.csv").open() as table:
        assert tuple(next(csv.reader(table))[:25]) == FIELDS
    records = read_csv(folder / "result_table.csv")
    assert [record.extra["stage"] for record in records] == ["A"] * 3 + ["B"] * 2 + ["C"] * 2
    manifest = Manifest.read(folder / "manifest.json")
    listed = {file.file for file in manifest.files if not file.file.startswith("report/")}
    assert listed == names | {"result_table.csv", "ledger.json", "ledger.csv"}
    assert [row.verdict for row in manifest.tasks] == ["pass", "n/a", "pass", "pass", "fail", "n/a"]
    assert all(file.run_id for file in manifest.files if file.stage)


@pytest.mark.slow
def test_the_ledger_adds_up_and_says_what_stopping_saved(killed: SimpleNamespace) -> None:
    toys = killed.toys
    ledger = json.loads((toys.folder / "deliverables" / "ledger.json").read_text())
    bad = next(row for row in ledger["trials"] if row["exp_id"] == "T_bad_run1")
    trial = next(trial for trial in toys.state("first").trials.values() if trial.exp_id == "T_bad_run1")
    assert trial.stop and bad["stop_reason"] == trial.stop[1] == "stop_loss" and bad["epochs"] < bad["planned"] == 6
    spent = sum(metrics["epoch_s"] for _, metrics in trial.results) / 3600
    assert bad["hours"] == pytest.approx(spent) and bad["unit"] == "CPU"
    assert bad["saved"] == pytest.approx(spent / bad["epochs"] * (6 - bad["epochs"]))
    good = next(row for row in ledger["trials"] if row["exp_id"] == "T_good_run1")
    assert good["saved"] == 0
    total, stages = ledger["campaign"], ledger["stages"]
    assert total["hours"] == pytest.approx(sum(stage["hours"] for stage in stages))
    assert total["hours"] == pytest.approx(sum(row["hours"] for row in ledger["trials"]))
    assert total["saved"]["stop_loss"] == pytest.approx(sum(row["saved"] for row in ledger["trials"]))
    assert [stage["name"] for stage in stages] == ["A", "B", "C"] and total["wall_h"] > 0
    assert total["estimate"] == pytest.approx([0.003, 0.003])
    assert "stopping saved" in killed.two[1] and "stop_loss" in killed.two[1]
    rows = list(csv.DictReader((toys.folder / "deliverables" / "ledger.csv").open()))
    assert [row["exp_id"] for row in rows] == [row["exp_id"] for row in ledger["trials"]]


@pytest.mark.slow
def test_it_ends_in_a_report_of_all_its_sweeps(killed: SimpleNamespace) -> None:
    page = killed.toys.folder / "deliverables" / "report" / "report.html"
    assert f"\nReport: {page}\n" in killed.two[1]
    text = page.read_text().replace("<wbr>", "")
    sweeps = [f"{name}_small_seed42" for name in ("first", "second", "third")]
    for name in (*sweeps, "T_bad_run1", "stop_loss", "Ledger"):
        assert name in text


@pytest.mark.slow
def test_verify_names_the_missed_line_and_what_was_not_done_and_nothing_else(killed: SimpleNamespace) -> None:
    found = verify.check(killed.toys.folder / "deliverables")
    assert len(found.problems) == 2, found.problems
    assert found.problems[0].startswith("D-1: not done (C-1 missed its hard line") and "fourth.pth" in found.problems[0]
    assert found.problems[1].startswith("C-1: missed its hard line. drop 30 %")


@pytest.mark.slow
def test_the_daily_sheet_has_every_trial(killed: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    uri = f"sqlite:///{killed.toys.storage / 'mlflow.db'}"
    assert analysis(["daily", "--tracking-uri", uri, "--csv", str(killed.toys.storage / "daily.csv")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("| 日期 | 任务ID | 输入/配置 | 产出 | 判定 | GPUh | 备注 |\n")
    rows = list(csv.reader((killed.toys.storage / "daily.csv").open(encoding="utf-8-sig")))
    assert len(rows) == 1 + 7 and sum("T_bad_run1" in row[2] for row in rows) == 1
    bad = next(row for row in rows if "T_bad_run1" in row[2])
    assert bad[1] == "A-2" and "bad.pth; drop 30.00 %" in bad[3] and bad[4] == "fail" and "stop_loss" in bad[6]
    trial = next(t for t in killed.toys.state("first").trials.values() if t.exp_id == "T_bad_run1")
    assert bad[5] == f"{sum(m['epoch_s'] for _, m in trial.results) / 3600:.3f} (CPU)"


@pytest.mark.slow
def test_keep_going_does_the_rest(killed: SimpleNamespace) -> None:
    """And a dry run says what is left, and starts nothing."""
    toys = killed.toys
    before = (toys.folder / "campaign.jsonl").read_bytes()
    code, out, err = toys.finish(toys.start("--resume", "--keep-going", "--dry-run"))
    assert code == 0 and "finished" in out and "fourth.pth" in out, err
    assert (toys.folder / "campaign.jsonl").read_bytes() == before and not toys.sweep("fourth").exists()

    code, out, err = toys.finish(toys.start("--resume", "--keep-going"))
    assert code == 0, err
    assert "D-1: pass" in out and toys.state("fourth").ended == "finished"
    found = verify.check(toys.folder / "deliverables")
    assert [problem.partition(":")[0] for problem in found.problems] == ["C-1"]


@pytest.mark.slow
def test_sigterm_ends_campaign_and_stage_in_order(tmp_path: Path) -> None:
    toys = Toys(tmp_path)
    process = toys.start("--only", "A", TOY_SLEEP_FIRST="3")
    toys.wait_for("first", 1, process)
    process.send_signal(signal.SIGTERM)
    code, out, err = toys.finish(process)
    assert code == 130 and "nothing finished is lost. Go on with:" in out and "--resume" in out, err
    assert toys.state("first").ended == "interrupted"
    events = [event["event"] for event in read_events(toys.folder / "campaign.jsonl")]
    assert events == ["campaign", "selected", "start", "exit", "end"]


def test_a_campaign_of_which_nothing_began_says_why_and_no_more(tmp_path: Path) -> None:
    toys = Toys(tmp_path)
    late = 'import sys\n\nif "--dry-run" not in sys.argv:\n    sys.exit("error: refused at its start")\n'
    (toys.scripts / "first.py").write_text(late)
    code, out, err = toys.finish(toys.start("--only", "A"))
    assert code == 1 and err == "error: refused at its start\n"
    assert "A: ended with exit code 1 before it was complete" in out and "not run" in out
    assert "Check them" not in out and "Compare" not in out and "Report" not in out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--plan dust3r --only X-9", "unknown stage 'X-9': the plan has P0, K, KQ"),
        ("--plan dust3r --from AQ-1", "unknown stage 'AQ-1'"),
        ("--plan dust3r --only K --skip K", "leave no stage"),
        ("--plan dust3r --only KQ", "stage KQ needs student_fp32_best.pth of stage K, which is not selected"),
        ("--plan alphaqubit --skip AQ-3", "stage AQ-4 needs aq_probes.pth of stage AQ-3"),
        ("--plan nothing", "--plan: invalid choice: 'nothing'"),
        ("--profile demo", "--plan"),
        ("--plan all --resume", "--resume: no campaign all_small_seed42"),
        ("--plan all --set epochz=3", "--set epochz: no stage of this campaign has that setting"),
        ("--plan all --set epochs=many", "--set epochs=many"),
        ("--plan dust3r --set teacher=missing.pth", "/missing.pth: no such file or folder"),
        ("--plan dust3r --set data=/nowhere", "--set data=/nowhere: no such file or folder"),
        ("--plan all --set teacher=x.pth", "--set teacher: each domain has a teacher of its own; run --plan dust3r"),
        ("--plan all --set model=x.pth", "--set model: stage KQ takes it from an earlier one"),
        ("--plan all --side-by-side 2", "--side-by-side 2: expected 1, or more with --address"),
        ("--plan all --campaign ../x", "--campaign '../x': expected a name"),
        ("--plan all --audit 20", "--audit 20: expected a share from 0 to 1"),
        ("--plan all --seed -1", "--seed -1: expected 0 or more"),
        ("--plan all --tracking-uri nonsense", "--tracking-uri 'nonsense': expected"),
        ("--plan dust3r --profile demo --gpus-per-trial .5", "stage P0: --gpus-per-trial 0.5: none of 1 nodes has one"),
        (
            "--plan dust3r --profile demo --cpus-per-trial 4096 --dry-run",
            "stage P0: --cpus-per-trial 4096: no node has so many",
        ),
        ("--plan dust3r --profile demo --address 127.0.0.1:1", "stage P0: --address"),
        ("--plan all --hang-after 0", "--hang-after 0: expected minutes"),
        ("--plan dust3r --profile full", "stage P0: image_size=512x512: teacher 'shipped' takes 64x64 images; give"),
    ],
)
def test_bad_input_is_one_line_and_touches_nothing(
    flags: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*flags.split(), "--storage", str(tmp_path / "runs")]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err and not out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_exists_needs_resume_and_the_same_flags(killed: SimpleNamespace) -> None:
    toys = killed.toys
    for flags, said in {
        "": "already holds this campaign: add --resume",
        "--resume --set floor=0.5": "--resume: campaign toy_small_seed42 was started otherwise (overrides was {}",
        "--resume --campaign other": "--resume: no campaign other in",
    }.items():
        code, out, err = toys.finish(toys.start(*flags.split()))
        assert code == 2 and said in err and err.count("\n") == 1 and not out
