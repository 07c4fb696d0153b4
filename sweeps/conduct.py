"""Runs the stages of a campaign, each as its own process of the script that a user would start, in the plan's order.

Whether a stage is over is what its sweep's journal says, never what a process said: so a campaign that was killed at
any point goes on where its stages are.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from engines.errors import InputError
from sweeps.catalogue import Needs, Stage, stage_of
from sweeps.interrupts import INTERRUPTED
from sweeps.journal import Journal, check_free
from sweeps.outcome import Outcome
from sweeps.tracking import URI, masked

POLL_S = 0.3
PATIENCE_S = 120.0  # for a stage that was told to end: it finishes no epoch, but its files and MLflow
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What a campaign is made of. stages: of the whole plan; selected: those to run. folder: the campaign's own.

    overrides: --set by key, as typed. lenient: whether a failed gate holds nothing up. width: stages side by side.
    audit: share of the stops that run on.
    """

    name: str
    plan: str
    profile: str
    seed: int
    stages: Sequence[Stage]
    selected: Sequence[Stage]
    folder: Path
    tracking_uri: str
    flags: Sequence[str]
    overrides: Mapping[str, str] = field(default_factory=dict)
    lenient: bool = False
    width: int = 1
    audit: float = 0.0

    def sweep_folder(self, stage: Stage) -> Path:
        """Where the stage's sweep lies."""
        return self.folder / stage.sweep(self.profile, self.seed)

    def outcome(self, stage: Stage) -> Outcome:
        """What the stage has come to by now."""
        found = Outcome.read(stage, self.sweep_folder(stage))
        return replace(found, stale=self._stale(found))

    def _stale(self, outcome: Outcome) -> str | None:
        """Why the stage is not of what the campaign has now: it was made from a file that was replaced since."""
        for need in outcome.stage.needs if outcome.begun else ():
            source = self.source(need)
            file = source.file(need.file) if need.file else None
            owner = source.state.trials.get(file[1] or "") if file else None
            now = owner.record.get("weights") if owner and owner.record else None
            then = (outcome.state.header.get("settings") or {}).get(f"{need.setting}_content")
            if now and then and now != then:
                return (
                    f"made from another {need.file} than {source.stage.id} has now; "
                    f"move {outcome.folder} away, and --resume makes it anew"
                )
        return None

    def source(self, need: Needs) -> Outcome:
        """What the stage that is needed has come to."""
        return self.outcome(stage_of(self.stages, need.task))

    @property
    def environment(self) -> dict[str, str]:
        """Of the stages: the store is named there, as its address may hold a password and a command line is public."""
        return {**os.environ, URI: self.tracking_uri}

    def command(self, stage: Stage, share: float = 1.0) -> list[str]:
        """What to type for the stage, with --resume if it was begun."""
        words = [sys.executable, str(stage.path), "--profile", self.profile, "--seed", str(self.seed), *self.flags]
        words += ["--campaign", self.name]
        # For whoever types it again; an address with a password is in the environment alone.
        words += ["--tracking-uri", self.tracking_uri] if masked(self.tracking_uri) == self.tracking_uri else []
        settings = [text for key, text in self.overrides.items() if stage.knows(key)]
        for need in stage.needs:
            found = self.source(need).file(need.file) if need.file else None
            settings += [f"{need.setting}={found[0]}"] if found else []
        for text in settings:
            words += ["--set", text]
        words += ["--share", f"{share:.4g}"] if share < 1 else []
        return words + (["--resume"] if self.outcome(stage).begun else [])


@dataclass
class _Running:
    """A stage at work. process: None for one that an earlier campaign left behind when it was killed."""

    stage: Stage
    process: subprocess.Popen[bytes] | None
    since: float = field(default_factory=time.monotonic)


class Conductor:
    """Starts what can start, waits, and says what became of it. on_end: called after each stage."""

    def __init__(self, plan: Plan, journal: Journal, say: Say, on_end: Callable[[], object]) -> None:
        self.plan, self.held = plan, dict[str, str]()  # stage -> why it did not run or did not finish
        self._journal, self._say, self._on_end = journal, say, on_end
        self._waiting = list(plan.selected)
        self._running: list[_Running] = []

    def run(self) -> None:
        """All that can run has ended when this returns. KeyboardInterrupt: the stages were told, and have ended too."""
        try:
            while self._waiting or self._running:
                self._start_what_can()
                self._wait()
        except BaseException:
            self._stop()
            raise

    def _start_what_can(self) -> None:
        ready: list[Stage] = []
        for stage in list(self._waiting):
            outcome = self.plan.outcome(stage)
            if outcome.finished and outcome.whole and outcome.mirrored(self.plan.tracking_uri):
                self._waiting.remove(stage)
                self._say(f"{stage.id}: finished before")
                continue
            why = self._hold(stage)
            if why is None:
                why = outcome.stale
            if why is None and len(self._running) + len(ready) < self.plan.width:
                ready.append(stage)
            elif why:
                self._waiting.remove(stage)
                self.held[stage.id] = why
                self._say(f"{stage.id}: not run, {why}")
        for stage in ready:
            self._waiting.remove(stage)
            self._start(stage, 1 / (len(self._running) + len(ready) - ready.index(stage)))

    def _hold(self, stage: Stage) -> str | None:
        """None: it can start; "": it must wait; else why it cannot run at all."""
        busy = {one.id for one in self._waiting} | {one.stage.id for one in self._running}
        for need in stage.needs:
            source = self.plan.source(need)
            if source.stage.id in busy:
                return ""
            if not source.finished:
                if need.file or (need.gate and source.stage.id in self.held):
                    return f"{source.stage.id} is not finished"
                continue  # it is not part of this campaign, or only came first
            verdict = source.verdict(source.stage.task(need.task))
            if need.gate and verdict.verdict == "fail" and not self.plan.lenient:
                return f"{need.task} missed its hard line: {verdict.detail} (--keep-going would go on)"
            if need.file and not source.file(need.file):
                return f"{source.stage.id} left no {need.file}"
        return None

    def _start(self, stage: Stage, share: float) -> None:
        folder, alone = self.plan.sweep_folder(stage), self.plan.width == 1
        if holder := _holder(folder):
            self._say(f"{stage.id}: still at work since before; waiting for it ({holder})")
            self._running.append(_Running(stage, None))
            return
        command = self.plan.command(stage, share)
        self._journal.append("start", stage=stage.id, command=command)
        log = self.plan.folder / f"{stage.id}.log"
        self._say(f"{stage.id}: {'goes on' if '--resume' in command else 'starts'}" + ("" if alone else f", see {log}"))
        # A session of its own: Ctrl-C is for the campaign, which then ends its stages in order.
        if alone:
            process = subprocess.Popen(command, start_new_session=True, env=self.plan.environment)
        else:
            with log.open("ab") as file:
                process = subprocess.Popen(
                    command, start_new_session=True, stdout=file, stderr=file, env=self.plan.environment
                )
        self._running.append(_Running(stage, process))

    def _wait(self) -> None:
        """Until a stage has ended, where any is running."""
        while self._running:
            over = [one for one in self._running if self._over(one)]
            for one in over:
                self._running.remove(one)
                self._ended(one)
            if over:
                return
            time.sleep(POLL_S)

    def _over(self, one: _Running) -> bool:
        if one.process is not None:
            return one.process.poll() is not None
        return _holder(self.plan.sweep_folder(one.stage)) is None

    def _ended(self, one: _Running) -> None:
        stage, outcome = one.stage, self.plan.outcome(one.stage)
        code = one.process.returncode if one.process else None
        self._journal.append("exit", stage=stage.id, code=code, wall_s=round(time.monotonic() - one.since, 1))
        if not outcome.finished and (one.process is None or _holder(outcome.folder)):
            # Left behind by a campaign that was killed, and ended early; or it took the folder before we did.
            self._waiting.insert(0, stage)
            return
        if not outcome.finished:
            self.held[stage.id] = _died(code)
            self._say(f"{stage.id}: {self.held[stage.id]}")
        else:
            for task in stage.tasks:
                verdict = outcome.verdict(task)
                self._say(f"{task.id}: {verdict.verdict}. {verdict.detail}")
        self._on_end()

    def _stop(self) -> None:
        """Tell each stage once, and wait; a second Ctrl-C, or a stage that does not end, is killed."""
        own = [one.process for one in self._running if one.process is not None]
        for process in own:
            process.terminate()
        try:
            end = time.monotonic() + PATIENCE_S
            for process in own:
                process.wait(max(0.0, end - time.monotonic()))
        except (KeyboardInterrupt, subprocess.TimeoutExpired):
            for process in own:
                process.kill()
        for one in self._running:
            if one.process is None:
                self._say(f"{one.stage.id}: was started by an earlier campaign and goes on by itself")
            else:
                wall_s = round(time.monotonic() - one.since, 1)
                self._journal.append("exit", stage=one.stage.id, code=one.process.wait(), wall_s=wall_s)


def _holder(folder: Path) -> str | None:
    """Who holds the sweep's folder."""
    try:
        check_free(folder)
    except InputError as error:
        return str(error).partition(" is in use by ")[2].partition(":")[0] or None
    return None


def _died(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by signal {-code}; go on with --resume"
    if code == INTERRUPTED:
        return "interrupted; go on with --resume"
    return f"ended with exit code {code} before it was complete; its last lines say why, go on with --resume"
