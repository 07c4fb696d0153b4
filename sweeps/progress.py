"""What a person sees while a sweep runs: a live table on a terminal, a line now and then elsewhere; where time went.
What Prometheus sees is told from here, too.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import psutil
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sweeps.journal import TrialState
from sweeps.metrics import Metrics

PLAIN_EVERY_S = 10.0
NAMED = 20  # of those that run, so many are shown


@dataclass
class Progress:
    """Counts epochs and measurements, and estimates the time left from the pace so far. metrics: None exports none."""

    console: Console
    epochs: int
    metrics: Metrics | None = None
    trials: dict[str, TrialState] = field(default_factory=dict)
    running: set[str] = field(default_factory=set)
    phase_s: dict[str, float] = field(default_factory=dict)
    _phase: str = ""
    _since: float = 0.0
    _counted_since: float = 0.0
    _took_s: float = 0.0
    _reported: int = 0
    _width: int = 0
    _total: int = 0
    _done: int = 0
    _item: str = ""
    _said: float = 0.0
    _live: Live | None = None

    @contextmanager
    def show(self) -> Iterator[None]:
        """The live display for as long as this is open; nothing but plain lines where there is no
        terminal.
        """
        with self.metrics or nullcontext(), self._live_display():
            yield

    @contextmanager
    def _live_display(self) -> Iterator[None]:
        if not self.console.is_terminal:
            yield
            return
        with Live(get_renderable=self._render, console=self.console, transient=True) as live:
            self._live = live
            try:
                yield
            finally:
                self._live = None

    @contextmanager
    def phase(self, name: str, total: int = 0) -> Iterator[None]:
        """A part of the sweep; its seconds add up in `phase_s`."""
        self._phase, self._since, self._total, self._done, self._item = name, time.monotonic(), total, 0, ""
        self._counted_since, self._width, self._took_s, self._reported = self._since, 0, 0.0, 0
        self._say(force=True)
        try:
            yield
        finally:
            self.phase_s[name] = self.phase_s.get(name, 0.0) + time.monotonic() - self._since

    def watch(self, trials: dict[str, TrialState]) -> None:
        """The trials to count; the dict is the sweep's own and grows with it."""
        self.trials = trials
        if self.metrics:
            self.metrics.watch(trials.values())

    def started(self, trial: TrialState) -> None:
        """A trial runs."""
        self.running.add(trial.trial_id)
        self._width = max(self._width, len(self.running))
        if self.metrics:
            self.metrics.started(trial)
        self._say()

    def result(self, trial: TrialState) -> None:
        """An epoch ended."""
        took = trial.results[-1][1].get("epoch_s", math.nan)
        if took > 0:
            self._took_s, self._reported = self._took_s + took, self._reported + 1
        if self.metrics:
            self.metrics.result(trial)
        self._say()

    def decided(self, seconds: float) -> None:
        """Whether a trial goes on was decided, so long after its report."""
        if self.metrics:
            self.metrics.decided(seconds)

    def stopped(self, trial: TrialState) -> None:
        """A trial's training is over."""
        self._ended(trial)
        epoch, reason, detail = trial.stop or (0, "", "")
        self.line(f"{trial.exp_id}: {reason} after epoch {epoch}. {detail}")

    def failed(self, trial: TrialState) -> None:
        """A trial was given up."""
        self._ended(trial)
        self.line(f"{trial.exp_id}: failed. {trial.error}")

    def measured(self, trial: TrialState) -> None:
        """A trial has its record."""
        self._ended(trial)

    def item(self, name: str, done: int, total: int | None = None) -> None:
        """`done` of the phase's items (of `total`, where the phase did not know it before) are ready; `name` is at
        work."""
        if total not in (None, self._total):
            self._total, self._counted_since = total, time.monotonic()
        self._item, self._done = name, done
        self._say()

    def line(self, text: str) -> None:
        """A line of its own, which stays."""
        self._said = time.monotonic()
        self.console.print(Text(text), soft_wrap=True)

    def time_left_s(self) -> float | None:
        """Estimate for the present phase in seconds, None before its first item ended."""
        if self._phase == "training":
            return self._training_left_s()
        spent = time.monotonic() - self._counted_since
        return spent / self._done * (self._total - self._done) if self._done > 0 else None

    def _training_left_s(self) -> float | None:
        """From the seconds of the epochs themselves: the clock of the phase also holds the start of the workers and,
        for trials side by side, epochs that are nearly done."""
        left = [self.epochs - t.epoch for t in self._mine() if t.stop is None and t.error is None]
        if not self._reported or not left:
            return None
        return self._took_s / self._reported * max(sum(left) / max(1, self._width), *left)

    def _ended(self, trial: TrialState) -> None:
        self.running.discard(trial.trial_id)
        if self.metrics:
            self.metrics.ended(trial)

    def _mine(self) -> list[TrialState]:
        return [trial for trial in list(self.trials.values()) if trial.role == "trial"]

    def _headline(self) -> str:
        mine = self._mine()
        over = sum(trial.stop is not None or trial.error is not None for trial in mine)
        early = sum(trial.stop is not None and trial.stop[1] != "completed" for trial in mine)
        left = self.time_left_s()
        words = [self._phase or "starting"]
        if self._phase == "training" and mine:
            words.append(f"{over} of {len(mine)} trials done" + (f", {early} stopped early" if early else ""))
        elif self._total:
            words.append(f"{self._done} of {self._total}" + (f" ({self._item})" if self._item else ""))
        if left is not None:
            words.append(f"about {duration(left)} left" + (" before measuring" if self._phase == "training" else ""))
        elif (self._phase == "training" and mine) or self._total:
            words.append("estimating the time left")
        return ", ".join(words)

    def _say(self, force: bool = False) -> None:
        if self._live is None and (force or time.monotonic() - self._said > PLAIN_EVERY_S):
            running, more = self._shown()
            said = [f"{trial.exp_id} {trial.epoch}/{self.epochs} {percent(_last(trial))}" for trial in running]
            self.line("; ".join([self._headline(), *said, *more]))

    def _shown(self) -> tuple[list[TrialState], list[str]]:
        """Trials that train and are named, and in words how many are not."""
        if self._phase != "training":
            return [], []
        running = [trial for trial in self._mine() if trial.trial_id in self.running]
        return running[:NAMED], [f"and {len(running) - NAMED} more"] if len(running) > NAMED else []

    def _render(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        running, more = self._shown()
        for trial in running:
            bar = ProgressBar(total=self.epochs, completed=trial.epoch, width=20)
            table.add_row(trial.exp_id, bar, f"epoch {trial.epoch}/{self.epochs}", percent(_last(trial)))
        return Group(Text(self._headline()), table, *map(Text, more))


def _last(trial: TrialState) -> float | None:
    return trial.drops[-1] if trial.results else None


def percent(drop: float | None) -> str:
    """A drop in words: "drop 1.23 %"; a dash where there is none."""
    return "-" if drop is None or not math.isfinite(drop) else f"drop {100 * drop:.2f} %"


def duration(seconds: float) -> str:
    """Seconds as a person says them: 45 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


@dataclass
class Clock:
    """Wall time by phase, from the start of the process."""

    seconds: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=lambda: psutil.Process().create_time())

    def mark(self, phase: str) -> None:
        """The time since the last mark belongs to `phase`."""
        now = time.time()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now
