"""What a stage of a campaign came to, by its sweep's journal alone: whether it is over, the verdicts, the files."""

import json
from dataclasses import dataclass
from pathlib import Path

from sweeps.catalogue import Stage, Task
from sweeps.journal import NAME, SweepState, TrialState
from sweeps.tracking import CURSOR, noted
from trainables.gates import BROKEN, Verdict, judge_any
from trainables.record import Record


@dataclass(frozen=True)
class Outcome:
    """A stage, the folder of its sweep, and what the journal there says; an empty state before its first line. stale:
    why what it left is not of this campaign any more.
    """

    stage: Stage
    folder: Path
    state: SweepState
    stale: str | None = None

    @classmethod
    def read(cls, stage: Stage, folder: Path) -> "Outcome":
        """InputError for a damaged journal."""
        known = (folder / NAME).is_file()
        return cls(stage, folder, SweepState.replay(folder / NAME) if known else SweepState())

    @property
    def begun(self) -> bool:
        """Whether the sweep was started, so that only --resume goes on with it."""
        return bool(self.state.header)

    @property
    def finished(self) -> bool:
        """Whether the sweep came to its end, and from what the campaign has."""
        return self.state.ended == "finished" and not self.stale

    @property
    def whole(self) -> bool:
        """Whether --resume would find nothing to try again: nothing failed, nothing could not be measured."""
        return not any(trial.error or (trial.record or {}).get("unmeasured") for trial in self.state.trials.values())

    def mirrored(self, tracking_uri: str) -> bool:
        """Whether this MLflow is known to have all of the journal; a start with --resume sends the rest."""
        try:
            cursor = json.loads((self.folder / CURSOR).read_bytes())
            return (
                cursor["uri"] == noted(tracking_uri)
                and not cursor["problem"]
                and bool(cursor["offset"] >= (self.folder / NAME).stat().st_size)
            )
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def file(self, name: str) -> tuple[Path, str | None] | None:
        """A file that the sweep left and the trial that it is of; None where it is missing."""
        for path, trial_id in self.state.files.items():
            found = self.folder / path
            inside = found.resolve().is_relative_to(self.folder.resolve())  # the journal may be of somebody else
            if Path(path).name == name and inside and found.is_file():
                return found, trial_id
        return None

    def judged(self, task: Task) -> list[TrialState]:
        """The trials that the task is judged by: the one whose file it delivers; else its own; else the one that the
        sweep chose; else all.
        """
        trials = self.state.trials
        owners = [found[1] for name in task.files if (found := self.file(name)) and found[1]]
        if owners:
            return [trials[owners[0]]]
        measured = [trial for trial in trials.values() if trial.role == "trial" and trial.record]
        own = [trial for trial in measured if trial.task_id == task.id]
        chosen = [trial for trial in measured if trial.exp_id == self.state.chosen]
        return own or chosen or measured

    def verdict(self, task: Task) -> Verdict:
        """Whether one of the trials that the task is judged by meets all its gates; n/a before the end, or without any.

        The teacher's own record is judged by its sweep.
        """
        if not self.finished:
            return Verdict("n/a", self.stale or ("not finished" if self.begun else "not started"))
        records = [(trial.role, trial.record) for trial in self.judged(task) if trial.record]
        if [role for role, _ in records] == ["teacher"]:
            record = records[0][1]
            return Verdict(str(record.get("verdict")), str(record.get("verdict_detail")))
        if not task.gates:
            return self._ungated()
        return judge_any((Record.from_dict(record) for _, record in records), task.gates)

    def _ungated(self) -> Verdict:
        """Of a task without a hard line: it fails only where no trial came to an end of its own."""
        trials = [trial for trial in self.state.trials.values() if trial.role == "trial"]
        broken = [trial for trial in trials if not trial.record or trial.record.get("stop_reason") in BROKEN]
        if not broken:
            return Verdict("n/a", "no hard line")
        why = ", ".join(f"{trial.exp_id} {trial.stop[1] if trial.stop else 'failed'}" for trial in broken[:3])
        said = f"{len(broken)} of {len(trials)} trials broke: {why}{', ...' * (len(broken) > 3)}"
        return Verdict("fail" if len(broken) == len(trials) else "n/a", f"no hard line; {said}")

    def missing(self, task: Task) -> list[str]:
        """Files of the task that the sweep did not leave, each with the reason where one is known."""
        why = [str(t.record["trt"]) for t in self.state.trials.values() if t.record and "trt" in t.record]
        names = [name for name in task.files if not self.file(name)]
        return [
            f"{name} ({why[0]})" if why and name.endswith((".trt", ".trt.json", ".qdq.onnx")) else name
            for name in names
        ]
