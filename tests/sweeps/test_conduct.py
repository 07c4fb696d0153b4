"""The conductor with real processes that are no sweeps: each script writes the journal that a sweep would, at once."""

import json
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sweeps.campaign import take_order
from sweeps.catalogue import Needs, Stage, Task, drop
from sweeps.conduct import Conductor, Plan
from sweeps.journal import Journal, read_events
from sweeps.tracking import noted

SCRIPT = '''"""Writes what it was told and a sweep's journal, as the text file beside it says."""
import json, os, sys, time
from pathlib import Path
from sweeps.journal import Journal
from sweeps.tracking import URI, noted

own, words = Path(sys.argv[0]), sys.argv[1:]
flags = dict(zip(words, words[1:]))
told = json.loads(own.with_suffix(".txt").read_text())
(own.parent / "order.log").open("a").write(json.dumps([own.stem, words]) + "\\n")
(own.parent / f"{own.stem}.here").touch()
for name in told.get("meets", []):  # stages that must be at work at the same time
    for _ in range(6000):
        if (own.parent / f"{name}.here").exists():
            break
        time.sleep(0.02)
    else:
        sys.exit(9)
if told.get("code"):
    sys.exit(told["code"])
folder = Path(flags["--storage"]) / flags["--campaign"] / f"{own.stem}_{flags['--profile']}_seed{flags['--seed']}"
with Journal.open(folder) as journal:
    names = ("sweep_id", "name", "stage", "domain", "profile", "config_hash", "workload_hash")
    if "--resume" not in words:
        journal.append("sweep", **dict.fromkeys(names, own.stem))
        journal.append("trial", trial_id="t", exp_id="t", task_id=own.stem, role="trial", params={}, saves=None)
    while told.get("waits") and not (own.parent / "release").exists():
        time.sleep(0.02)
    if told.get("dies") and "--resume" not in words:
        os._exit(7)
    if told.get("fails"):
        other = dict(trial_id="u", exp_id="u", task_id=own.stem, role="trial", params={}, saves=None)
        if "--resume" not in words:
            journal.append("trial", **other)
            journal.append("failed", trial_id="u", error="lost its card")
        else:
            journal.append("stop", trial_id="u", epoch=1, reason="completed", detail="")
    drop = told.get("drop", 0.0)
    record = dict(exp_id="t", task_id=own.stem, drop=drop, datetime="2026-03-01T12:00:00+01:00")
    journal.append("record", trial_id="t", record=record)
    (folder / "files").mkdir(exist_ok=True)
    for file in told.get("leaves", [f"{own.stem}.pth"]):
        (folder / "files" / file).write_text(file)
        journal.append("file", path=f"files/{file}", trial_id="t")
    journal.append("end", status="finished")
    size = journal.path.stat().st_size
(folder / "tracked.json").write_text(json.dumps({"offset": size, "problem": None, "uri": noted(os.environ[URI])}))
'''


class Stages:
    """A plan of such scripts below a folder. told: by stage, what its script does."""

    def __init__(self, folder: Path, needs: dict[str, list[Needs]], **told: dict) -> None:
        self.folder, self.said = folder, list[str]()
        self.stages = []
        for name, own in needs.items():
            (folder / f"{name}.py").write_text(SCRIPT)
            (folder / f"{name}.txt").write_text(json.dumps(told.get(name, {})))
            task = Task(name, name, (f"{name}.pth",), (drop(0.01),))
            self.stages.append(Stage(name, "toy", str(folder / f"{name}.py"), (), [task], own))

    def campaign(self, selected: list[str] | None = None, **options: object) -> Plan:
        chosen = [stage for stage in self.stages if selected is None or stage.id in selected]
        storage = self.folder / "runs"
        return Plan("c", "toy", "small", 42, self.stages, chosen, storage / "c", "sqlite:///none.db",
                    ["--storage", str(storage)], **options)  # type: ignore[arg-type]  # fmt: skip

    def run(self, selected: list[str] | None = None, **options: object) -> Conductor:
        plan = self.campaign(selected, **options)
        with Journal.open(plan.folder, "campaign.jsonl") as journal:
            conductor = Conductor(plan, journal, self.said.append, lambda: None)
            conductor.run()
        return conductor

    @property
    def started(self) -> list[str]:
        return [name for name, _ in self.calls]

    @property
    def calls(self) -> list[tuple[str, list[str]]]:
        return [tuple(json.loads(line)) for line in (self.folder / "order.log").read_text().splitlines()]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))


def test_stages_run_in_order_each_with_the_files_that_it_needs(tmp_path: Path) -> None:
    needs = {"a": [], "b": [Needs("a", file="a.pth", setting="model")], "c": [], "d": [Needs("c"), Needs("b")]}
    stages = Stages(tmp_path, needs)
    assert stages.run().held == {} and stages.started == ["a", "b", "c", "d"]
    words = dict(stages.calls)["b"]
    assert words[words.index("--set") + 1] == f"model={tmp_path / 'runs' / 'c' / 'a_small_seed42' / 'files' / 'a.pth'}"
    assert "--share" not in words and "--resume" not in words
    assert stages.run().held == {} and stages.started == ["a", "b", "c", "d"], "finished stages ran again"


def test_a_missed_gate_holds_up_what_asks_for_it_alone(tmp_path: Path) -> None:
    needs = {"a": [], "b": [Needs("a")], "c": [Needs("b")], "d": [Needs("a", gate=False)], "e": []}
    stages = Stages(tmp_path, needs, a={"drop": 0.5})
    held = stages.run().held
    assert stages.started == ["a", "d", "e"] and set(held) == {"b", "c"}
    assert "a missed its hard line: drop 50 %, needed <= 1 % (--keep-going would go on)" in held["b"]
    assert held["c"] == "b is not finished"
    assert stages.run(lenient=True).held == {} and stages.started == ["a", "d", "e", "b", "c"]


def test_what_needs_a_file_that_is_not_there_is_held_up_even_when_lenient(tmp_path: Path) -> None:
    stages = Stages(tmp_path, {"a": [], "b": [Needs("a", False, "a.pth", "model")]}, a={"leaves": []})
    assert stages.run(lenient=True).held == {"b": "a left no a.pth"}


def test_a_stage_that_dies_is_resumed_and_one_that_never_began_is_started(tmp_path: Path) -> None:
    stages = Stages(tmp_path, {"a": [], "b": [], "c": [Needs("a")]}, a={"dies": True}, b={"code": 2})
    held = stages.run().held
    assert set(held) == {"a", "b", "c"} and "exit code 7" in held["a"] and "exit code 2" in held["b"]
    (tmp_path / "b.txt").write_text("{}")
    assert stages.run().held == {}
    calls = stages.calls[2:]
    assert [(name, "--resume" in words) for name, words in calls] == [("a", True), ("b", False), ("c", False)]
    codes = [event["code"] for event in read_events(tmp_path / "runs" / "c" / "campaign.jsonl") if "code" in event]
    assert codes == [7, 2, 0, 0, 0]


def test_a_stage_that_outlived_its_campaign_is_waited_for(tmp_path: Path) -> None:
    """Started by hand here, as one is left by a campaign that was killed; it ends once it is seen to be waited for."""
    stages = Stages(tmp_path, {"a": [], "b": [Needs("a", file="a.pth", setting="model")]}, a={"waits": True})
    plan = stages.campaign()
    orphan = subprocess.Popen(plan.command(stages.stages[0]), env=plan.environment)
    while not (plan.sweep_folder(stages.stages[0]) / "journal.jsonl").exists():
        time.sleep(0.05)

    def say(text: str) -> None:
        stages.said.append(text)
        if "a: still at work since before" in text:
            (tmp_path / "release").touch()

    with Journal.open(plan.folder, "campaign.jsonl") as journal:
        conductor = Conductor(plan, journal, say, lambda: None)
        conductor.run()
    assert conductor.held == {} and orphan.wait() == 0 and stages.started == ["a", "b"]
    assert f"(process {orphan.pid} on " in stages.said[0]
    assert "--resume" not in dict(stages.calls)["b"]


def test_side_by_side_stages_share_the_cluster(tmp_path: Path) -> None:
    """b and c wait for each other: in a row they would not end."""
    needs = {"a": [], "b": [Needs("a")], "c": [Needs("a")], "d": [Needs("a")], "e": [Needs("d")]}
    stages = Stages(tmp_path, needs, b={"meets": ["c"]}, c={"meets": ["b"]})
    assert stages.run(width=2).held == {}
    shares = {name: words[words.index("--share") + 1] if "--share" in words else "1" for name, words in stages.calls}
    assert shares["a"] == "1" and shares["b"] == shares["c"] == "0.5"
    assert set(shares) == set(needs) and (tmp_path / "runs" / "c" / "b.log").exists()


def test_only_what_is_selected_runs_and_what_was_not_is_not_waited_for(tmp_path: Path) -> None:
    stages = Stages(tmp_path, {"a": [], "b": [Needs("a")], "c": []})
    assert stages.run(["b"]).held == {} and stages.started == ["b"]


def test_an_error_in_the_campaign_leaves_no_stage_behind(tmp_path: Path) -> None:
    """The folder of the deliverables cannot be written, say, while another stage is at work."""
    stages = Stages(tmp_path, {"a": [], "b": []}, b={"meets": ["never"]})
    plan = stages.campaign(width=2)

    def full() -> None:
        raise OSError(28, "No space left on device")

    with Journal.open(plan.folder, "campaign.jsonl") as journal, pytest.raises(OSError):
        Conductor(plan, journal, stages.said.append, full).run()
    ends = {e["stage"]: e["code"] for e in read_events(plan.folder / "campaign.jsonl") if e["event"] == "exit"}
    assert ends == {"a": 0, "b": -15}


def test_a_trial_that_failed_is_tried_again_by_the_next_resume_alone(tmp_path: Path) -> None:
    stages = Stages(tmp_path, {"a": [], "b": []}, a={"fails": True})
    assert stages.run().held == {} and stages.started == ["a", "b"]
    assert stages.run().held == {} and stages.started == ["a", "b", "a"] and "--resume" in stages.calls[-1][1]
    assert stages.run().held == {} and stages.started == ["a", "b", "a"]


def test_the_stores_password_is_in_no_command_line(tmp_path: Path) -> None:
    stages = Stages(tmp_path, {"a": []})
    plan = replace(stages.campaign(), tracking_uri="postgresql://me:s3cret@127.0.0.1:9/db")
    assert plan.environment["SLIMSWEEP_TRACKING_URI"] == plan.tracking_uri
    assert "s3cret" not in str(plan.command(stages.stages[0])) and "s3cret" not in noted(plan.tracking_uri)
    # What holds no secret is there, for whoever types the command again.
    words = stages.campaign().command(stages.stages[0])
    assert words[words.index("--tracking-uri") + 1] == "sqlite:///none.db"
    order = take_order(["--plan", "p", "--storage", str(tmp_path), "--tracking-uri", plan.tracking_uri],
                       {"p": stages.stages}, "")  # fmt: skip
    assert order.plan.tracking_uri == plan.tracking_uri and "s3cret" not in str(order.plan.command(stages.stages[0]))
