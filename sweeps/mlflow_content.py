"""What the MLflow runs of a sweep must show, computed from the journal's state alone; nothing here talks to
MLflow.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sweeps.journal import SweepState, TrialState
from sweeps.settings import WORKLOADS, flat_params
from trainables.record import INPUTS

Point = tuple[str, float, int, int]  # name, value, ms since the epoch, step

_LONGEST_TAG, _LONGEST_PARAM = 8000, 6000  # MLflow's limits, in characters
_REALS = {"rho", "T", "beta", "gamma"}
_SHARED = (
    *("sweep_id", "campaign", "campaign_began", "stage", "domain", "profile"),
    *("workload_hash", "config_hash", "git_commit"),
)
_TEXTS = ("verdict", "verdict_detail", "stop_reason", "engine", "device", "parent", "notes")


def status(state: SweepState, trial: TrialState | None, over: bool) -> str:
    """MLflow's status of the sweep (trial None) or of one trial; `over`: nobody drives the sweep any more."""
    if trial is None:
        running = "KILLED" if over or state.ended else "RUNNING"
        return "FINISHED" if state.ended == "finished" else running
    if trial.error:
        return "FAILED"
    reason = trial.stop[1] if trial.stop else (trial.record or {}).get("stop_reason")
    if trial.record or ((over or state.ended) and trial.stop):
        return "FINISHED" if reason in (None, "completed") else "KILLED"
    return "KILLED" if over or state.ended else "RUNNING"


def name(state: SweepState, trial: TrialState | None) -> str:
    """The run's name: that of the sweep, or the trial's exp_id."""
    return str(trial.exp_id if trial else state.header["name"])


def tags(state: SweepState, trial: TrialState | None, parent_run: str) -> dict[str, str]:
    """All tags that the run should have now; grows as the trial stops and is measured."""
    header = state.header
    shown = {key: header.get(key) for key in _SHARED}
    shown |= {
        "mlflow.source.name": header.get("command"),
        "mlflow.source.git.commit": header.get("git_commit"),
    }
    if trial is None:
        shown |= {"role": "sweep", "chosen": state.chosen}
    else:
        names = ("trial_id", "exp_id", "task_id", "role", "number", "saves")
        shown |= {key: getattr(trial, key) for key in names} | {"mlflow.parentRunId": parent_run}
        shown["stop_reason"] = trial.stop[1] if trial.stop else None
        shown["error"] = trial.error
        record = trial.record or {}
        shown |= {key: record[key] for key in (*_SHARED, *_TEXTS) if record.get(key) is not None}
        if trial.record:
            shown["record"] = _record_tag(trial.record)
    return {key: str(value)[:_LONGEST_TAG] for key, value in shown.items() if value not in (None, "")}


def params(state: SweepState, trial: TrialState | None, common: Mapping[str, Any]) -> dict[str, str]:
    """The run's inputs as strings that are plain numbers wherever they can be: T=3.0, beta=0.5, seed=42.

    common: `training` of the sweep's settings.
    """
    if trial is None:
        shown = dict(state.header.get("settings") or {})
    else:
        record = trial.record or {}
        shown = {key: record[key] for key in INPUTS if record.get(key) is not None} | trial.params
        if trial.role == "trial":
            shown = {**common, **shown}
    return {key: _param(key, value)[:_LONGEST_PARAM] for key, value in shown.items() if value is not None}


def training(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the settings say of training, for what a trial leaves to them: else comparisons of runs would have holes."""
    other = {"search", "seed", *(key for file in WORKLOADS for key in file.model.model_fields)}
    other |= {key for key, value in settings.items() if _is_table(value) or key.startswith(("gate_", "trial "))}
    return flat_params({key: value for key, value in settings.items() if key not in other})


def _is_table(value: Any) -> bool:
    """Whether a setting is a choice of named things, which the sweep's run shows."""
    return isinstance(value, dict) and any(isinstance(one, dict) for one in value.values())


def points(event: Mapping[str, Any], ms: int) -> list[Point]:
    """The metrics of one event: a result's curves at its epoch; a record's or the sweep's own numbers at step 0."""
    if event["event"] == "result":
        numbers, step = event["metrics"], event["epoch"]
    elif event["event"] == "record":
        numbers, step = {key: value for key, value in event["record"].items() if key not in INPUTS}, 0
    elif event["event"] == "summary":
        numbers, step = event["metrics"], 0
    else:
        return []
    return [
        (key, float(value), ms, step)
        for key, value in numbers.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]


def _param(key: str, value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and key in _REALS:
        return repr(float(value))
    return value if isinstance(value, str) else json.dumps(value)


def _record_tag(record: Mapping[str, Any]) -> str:
    """Compact JSON within MLflow's limit: a cut tag would be no JSON at all, so the longest texts are cut
    instead.
    """
    record = dict(record)
    while True:
        text = json.dumps(record, separators=(",", ":"), ensure_ascii=False)
        longest = max((key for key in record if isinstance(record[key], str)), key=lambda k: len(record[k]))
        if len(text) <= _LONGEST_TAG or len(record[longest]) < 10:
            return text
        record[longest] = record[longest][: len(record[longest]) // 2] + "..."
