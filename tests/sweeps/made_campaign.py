"""A campaign of made-up journals, mirrored into a real store."""

from pathlib import Path

from sweeps.catalogue import Needs, Stage, Task, drop
from sweeps.conduct import Plan
from sweeps.journal import CAMPAIGN, Journal
from sweeps.ledger import campaign_began
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
    name, began = folder.name, campaign_began(plan.folder)
    journal.append(
        "sweep", sweep_id=f"id-{name}{began}", name=name, stage=stage.id, domain="dust3r", profile=profile, epochs=10,
        campaign=plan.name, campaign_began=began, config_hash="c", workload_hash="w1",
        settings={"lr": 0.1} | ({"model_content": "of K_good_run1"} if stage.needs else {}),
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
                        extra={"cpu_hours": 0.1 * given["epochs"], "p50_ratio_fp32": 2.5,
                               "weights": f"of {given['exp_id']}"})  # fmt: skip
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


def campaign(storage: Path, profile: str = "small", second_drop: float = 0.005, began: bool = False) -> Plan:
    """A whole campaign's plan, run. began: with a campaign's own journal."""
    name = f"toy_{profile}_seed42"
    plan = Plan(name, "toy", profile, 42, STAGES, STAGES, storage / name, f"sqlite:///{storage / 'mlflow.db'}", ())
    if began:
        with Journal.open(plan.folder, CAMPAIGN) as journal:
            journal.append("campaign", name=name, plan="toy", profile=profile, seed=42, overrides={})
    good = dict(exp_id="K_good_run1", files=["one.pth", "best.pth"], reason="completed", epochs=10, drop=0.002)
    second = dict(exp_id="K_second_run1", files=["two.pth"], reason="plateau", epochs=4, drop=second_drop)
    sweep(plan, STAGES[0], [good, second], profile)
    int8 = dict(exp_id="KQ_INT8_run1", files=["int8.trt"], reason="completed", epochs=1, drop=0.004)
    sweep(plan, STAGES[1], [int8], profile)
    return plan
