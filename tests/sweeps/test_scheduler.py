"""The scheduler inside of real Ray Tune, one test for each way in which schedulers went wrong there."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray import tune

from sweeps.cluster import Wanted, connect
from sweeps.scheduler import Audit, StopLossScheduler
from sweeps.stoploss import StopLossRule


class Replay(tune.Trainable):
    """Reports a given curve, one value per epoch, and keeps the epoch it is at in a file of its own.

    ``die_at``: the worker dies once, at the start of that epoch, its state two epochs back.
    """

    def setup(self, config: dict[str, Any]) -> None:
        self.state = Path(config["state_dir"]) / config["trial_id"]
        self.epoch = int(self.state.read_text()) if self.state.exists() else 0

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        died = self.state.with_suffix(".died")
        if self.epoch + 1 == self.config.get("die_at") and not died.exists():
            died.touch()
            self.state.write_text(str(self.epoch - 2))
            os._exit(1)
        self.epoch += 1
        self.state.write_text(str(self.epoch))
        with self.state.with_suffix(".ran").open("a") as ran:
            ran.write(f"{self.epoch}\n")
        curve = self.config["curve"]
        drop = curve[self.epoch - 1] if self.epoch <= len(curve) else curve[-1]
        end = self.epoch == self.config.get("done_at")
        return {"epoch": self.epoch, "val_drop": drop, "train_loss": 1.0 / self.epoch, "done": end}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    # At Ray's niceness of 15 a busy machine starves the workers.
    os.environ.update(TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1", RAY_worker_niceness="0")
    with connect(Wanted(None)):  # whatever an earlier test left of Ray's token in this process
        yield


class Sweep:
    """What a sweep left behind: the calls in their order, and the scheduler."""

    def __init__(
        self,
        tmp_path: Path,
        rule: StopLossRule,
        histories: dict[str, list[float]] | None = None,
        audited: tuple[str, ...] = (),
    ):
        self.tmp_path, self.calls = tmp_path, list[tuple[Any, ...]]()
        self.scheduler = StopLossScheduler(
            rule,
            lambda key, epoch, metrics: self.calls.append(("result", key, epoch, metrics)),
            lambda key, epoch, reason, detail: self.calls.append(("stop", key, epoch, reason, detail)),
            histories,
            Audit(audited.__contains__, lambda *stop: self.calls.append(("audit", *stop))),
        )

    def run(self, trials: dict[str, dict[str, Any]], reuse: bool = True, concurrent: int = 1) -> Sweep:
        keys = sorted({key for trial in trials.values() for key in trial})
        space: dict[str, Any] = {
            key: tune.sample_from(lambda config, key=key: trials[config["trial_id"]].get(key)) for key in keys
        }
        space |= {"trial_id": tune.grid_search(list(trials)), "state_dir": str(self.tmp_path)}
        tuner = tune.Tuner(
            tune.with_resources(Replay, {"cpu": 1}),
            param_space=space,
            tune_config=tune.TuneConfig(scheduler=self.scheduler, reuse_actors=reuse, max_concurrent_trials=concurrent),
            run_config=tune.RunConfig(
                storage_path=str(self.tmp_path / "ray"),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=1),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        assert tuner.fit().num_errors == 0
        return self

    def ran(self, key: str) -> list[int]:
        return [int(line) for line in (self.tmp_path / f"{key}.ran").read_text().split()]

    def epochs(self, key: str) -> list[int]:
        return [call[2] for call in self.calls if call[:2] == ("result", key)]

    def reason(self, key: str) -> tuple[str, int]:
        [(_, _, epoch, reason, _)] = [call for call in self.calls if call[:2] == ("stop", key)]
        return reason, epoch


def test_a_fifo_of_trials_on_one_actor_each_ends_for_its_own_reason(tmp_path: Path) -> None:
    rule = StopLossRule(budget=0.01, max_evals=8)
    sweep = Sweep(tmp_path, rule).run(
        {
            "nan": {"curve": [0.5, math.nan]},
            "none": {"curve": [0.5, 0.3, None]},
            "hopeless": {"curve": [0.5, 0.5, 0.5, 0.5]},
            "passed": {"curve": [0.02, 0.005, 0.006, 0.007, 0.006]},
            "full": {"curve": [0.4, 0.1, 0.05, 0.03, 0.02, 0.012, 0.009, 0.008]},
        }
    )
    assert sweep.reason("nan") == ("diverged", 2)
    assert sweep.reason("none") == ("diverged", 3)
    assert sweep.reason("hopeless")[0] == "stop_loss"
    assert sweep.reason("passed") == ("plateau", 5)
    assert sweep.reason("full") == ("completed", 8)
    assert sweep.ran("full") == sweep.epochs("full") == list(range(1, 9))
    assert sweep.scheduler.reasons["nan"] == "diverged"

    # The journal gets each result before the stop that follows from it, and a None as a number.
    kinds = [(call[0], call[1]) for call in sweep.calls]
    assert kinds[-9:] == [("result", "full")] * 8 + [("stop", "full")]
    metrics = next(call[3] for call in sweep.calls if call[1:3] == ("none", 3))
    assert math.isnan(metrics["val_drop"]) and metrics["train_loss"] == pytest.approx(1 / 3)
    assert set(metrics) == {"val_drop", "train_loss"}  # none of Ray's own


def test_a_rung_with_one_member_judges_nobody(tmp_path: Path) -> None:
    # Plain ASHA would end the second trial here: it is worse than the only other one.
    rule = StopLossRule(budget=0.05, max_evals=4)
    falling = {"a": {"curve": [0.3, 0.2, 0.12, 0.1]}, "b": {"curve": [0.5, 0.3, 0.15, 0.06]}}
    sweep = Sweep(tmp_path, rule).run(falling, concurrent=2)
    assert sweep.reason("b") == ("completed", 4)


def test_full_rungs_of_an_earlier_driver_count(tmp_path: Path) -> None:
    # Among the peers are one that diverged and one that was stopped: neither runs again, both are members.
    rule = StopLossRule(budget=0.01, max_evals=15)
    good = {"p1": [0.2, 0.06, 0.03], "p2": [0.2, 0.07, 0.04], "p3": [0.2, 0.05, 0.02]}
    peers = {**good, "gone": [0.9, 0.9, math.nan]}
    late = {"late": {"curve": [0.5, 0.5, 0.5, 0.5]}}
    alone = StopLossScheduler(rule, lambda *_: None, lambda *_: None, {"late": [0.5, 0.5, 0.5]})
    assert alone.judge("late") is None  # without its peers it would go on
    sweep = Sweep(tmp_path, rule, peers).run(late)
    assert sweep.reason("late") == ("asha", 3)
    assert {call[1] for call in sweep.calls} == {"late"}


def test_a_resumed_trial_goes_on_from_its_history_to_its_limit(tmp_path: Path) -> None:
    (tmp_path / "half").write_text("4")
    rule = StopLossRule(budget=0.01, max_evals=8)
    curve = [0.4, 0.1, 0.05, 0.03, 0.02, 0.012, 0.009, 0.008]
    sweep = Sweep(tmp_path, rule, {"half": curve[:5]}).run({"half": {"curve": curve}})
    assert sweep.ran("half") == [5, 6, 7, 8]
    assert sweep.epochs("half") == [6, 7, 8]  # the fifth was journaled before
    assert sweep.scheduler.histories["half"] == curve
    assert sweep.reason("half") == ("completed", 8)


def test_a_worker_that_dies_repeats_epochs_but_never_passes_the_limit(tmp_path: Path) -> None:
    rule = StopLossRule(budget=0.01, max_evals=8)
    curve = [0.4, 0.1, 0.05, 0.03, 0.02, 0.012, 0.009, 0.008, 0.007, 0.006]
    sweep = Sweep(tmp_path, rule).run({"dies": {"curve": curve, "die_at": 6}})
    assert sweep.ran("dies") == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8]
    assert sweep.epochs("dies") == list(range(1, 9))
    assert sweep.scheduler.histories["dies"] == curve[:8]
    assert sweep.reason("dies") == ("completed", 8)


def test_a_result_that_ray_hides_because_it_is_done_is_taken_in(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, StopLossRule(budget=0.01, max_evals=8)).run(
        {"early": {"curve": [0.3, 0.2, 0.1], "done_at": 2}}
    )
    assert sweep.epochs("early") == [1, 2]
    assert sweep.reason("early") == ("completed", 2)


def test_a_stop_that_a_killed_driver_did_not_write_is_found_before_the_trial_runs() -> None:
    rule = StopLossRule(budget=0.01, max_evals=4)
    histories = {"due": [0.4, 0.1, 0.02, 0.009], "nan": [0.4, math.nan], "open": [0.4, 0.1], "new": []}
    scheduler = StopLossScheduler(rule, lambda *_: None, lambda *_: None, histories)
    found = {key: (scheduler.judge(key) or ("", ""))[0] for key in histories}
    assert found == {"due": "completed", "nan": "diverged", "open": "", "new": ""}
    assert scheduler.judge("never seen") is None


def test_an_audited_trial_runs_on_to_its_end_and_keeps_the_reason_of_its_stop(tmp_path: Path) -> None:
    rule = StopLossRule(budget=0.01, max_evals=8)
    curves = {
        "missed": [0.5] * 8,
        "met": [0.5, 0.5, 0.5, 0.5, 0.5, 0.4, 0.2, 0.005],
        "gone": [0.5, 0.5, 0.5, 0.5, 0.5, math.nan],
        "nan": [0.5, math.nan],
        "passed": [0.02, 0.005, 0.006, 0.007, 0.006],
        "unchosen": [0.5] * 8,
    }
    chosen = tuple(key for key in curves if key != "unchosen")
    sweep = Sweep(tmp_path, rule, audited=chosen).run({key: {"curve": curve} for key, curve in curves.items()})
    due = {call[1]: (call[3], call[2]) for call in sweep.calls if call[0] == "audit"}
    plain = sweep.reason("unchosen")
    assert plain[0] == "stop_loss" and plain[1] < 8
    assert due == {"missed": plain, "met": plain, "gone": plain}  # divergence and a gate that is met are no question
    ends = {key: sweep.reason(key) for key in due}
    assert ends == {"missed": ("stop_loss", 8), "met": ("stop_loss", 8), "gone": ("diverged", 6)}
    assert sweep.reason("nan") == ("diverged", 2) and sweep.reason("passed") == ("plateau", 5)
    details = {call[1]: call[4] for call in sweep.calls if call[0] == "stop"}
    assert details["met"].endswith(f"ran on from evaluation {plain[1]} to 8: budget met")
    assert details["missed"].endswith("budget not met")
    assert details["gone"].endswith("it diverged at 6")


def test_an_audit_changes_no_other_trials_stop_and_survives_a_new_driver() -> None:
    rule = StopLossRule(budget=0.01, max_evals=30)
    stopped = {key: [0.2, drop, drop / 2] for key, drop in (("p1", 0.06), ("p2", 0.07), ("p3", 0.05), ("p4", 0.08))}
    late = [0.5, 0.4, 0.39, 0.38, 0.38, 0.37, 0.37, 0.37, 0.37]
    ran_on = {key: [*curve, *[0.02] * 6] for key, curve in stopped.items()}
    due = {key: (3, "stop_loss", "") for key in stopped}

    def told(peers: dict[str, list[float]], audit: Audit | None) -> object:
        histories = {**peers, "late": late}
        return StopLossScheduler(rule, lambda *_: None, lambda *_: None, histories, audit).judge("late")

    audit = Audit(lambda key: key != "late", lambda *_: None, due)
    assert told(ran_on, audit) == told(stopped, None)
    again = StopLossScheduler(rule, lambda *_: None, lambda *_: None, {"p1": ran_on["p1"]}, audit)
    assert again.judge("p1") is None and again.audit.due["p1"] == (3, "stop_loss", "")
