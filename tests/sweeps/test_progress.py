"""The words that a person sees while a sweep runs, and the time that it says is left."""

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from sweeps import progress as module
from sweeps.journal import TrialState
from sweeps.progress import Progress


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    yield clock


def shown() -> Progress:
    return Progress(Console(file=io.StringIO(), width=200), epochs=10)


def text(progress: Progress) -> str:
    assert isinstance(progress.console.file, io.StringIO)
    return progress.console.file.getvalue()


def trials(*epochs: int) -> dict[str, TrialState]:
    found = {}
    for number, done in enumerate(epochs):
        state = TrialState(f"t{number}", f"K_t{number}_run1", "K-1", "trial", {}, None, number)
        state.results = [(epoch, {"val_drop": 0.1, "epoch_s": 30.0}) for epoch in range(1, done + 1)]
        found[state.trial_id] = state
    return found


def test_the_preparation_counts_and_estimates_from_when_it_began_to_count(clock: Clock) -> None:
    progress = shown()
    with progress.phase("preparing what all trials share"):
        clock.now += 30  # before there is anything to count
        progress.item("pairs of the teacher's outputs", 0, 1000)
        assert progress.time_left_s() is None
        clock.now += 20
        progress.item("pairs of the teacher's outputs", 400, 1000)
        assert progress.time_left_s() == pytest.approx(30)
    assert "preparing what all trials share, 400 of 1000 (pairs of the teacher's outputs), about 30 s left" in text(
        progress
    )
    assert progress.phase_s["preparing what all trials share"] == 50


def test_training_is_estimated_from_its_own_epochs_and_not_before_there_is_one(clock: Clock) -> None:
    """An earlier driver's epochs, the start of the workers and epochs in progress beside it do not count."""
    progress, states = shown(), trials(2, 0, 0, 0)
    progress.watch(states)
    with progress.phase("training"):
        clock.now += 40
        for state in list(states.values())[:2]:
            progress.started(state)
        assert progress.time_left_s() is None and "estimating the time left" in text(progress)
        states["t1"].results.append((1, {"val_drop": 0.1, "epoch_s": 6.0}))
        clock.now += 20
        progress.result(states["t1"])
        assert progress.time_left_s() == pytest.approx(6.0 * (8 + 9 + 10 + 10) / 2)
        for name in ("t0", "t2", "t3"):
            states[name].stop = (3, "stop_loss", "")
        assert progress.time_left_s() == pytest.approx(6.0 * 9), "one trial alone cannot be trained by two"
    assert "about" in text(progress)


def test_of_many_trials_that_run_a_few_are_named(clock: Clock) -> None:
    progress, states = shown(), trials(*[0] * 1000)
    progress.watch(states)
    with progress.phase("training"):
        for state in states.values():
            progress.running.add(state.trial_id)
        clock.now += 11
        progress.started(states["t0"])
    line = text(progress).strip().splitlines()[-1]
    assert line.endswith("K_t19_run1 0/10 -; and 980 more"), line
