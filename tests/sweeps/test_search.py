import importlib
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from engines.errors import InputError
from sweeps.catalogue import PLANS
from sweeps.journal import TrialState
from sweeps.k_grid import K
from sweeps.launch import take_order
from sweeps.plan import Planned, Planner
from sweeps.search import STARTUP, Search, check_space, far_end
from sweeps.settings import DISTILL, WORKLOAD, Resolved, resolve
from sweeps.spec import Sweep, Trial, constant, linear, loguniform, one_of, step, uniform
from trainables.gates import Gate
from trainables.schedules import Schedule

SPACE = {
    "T": uniform(1, 10),
    "beta": one_of(constant, step, linear),
    "lr": loguniform(1e-5, 1e-3),
    "init": one_of("inherit", "scratch"),
}


def search(seed: int = 1) -> Search:
    sweep = Sweep(stage="K", domain="toy", trainable=SimpleNamespace, trials=[Trial("K-1", T=3)])
    return Search(SPACE, Planner(sweep, Resolved("small", {}, {}), seed), "K-search", seed)


def state(trial: Planned, drop: float | None, p50: float = 1.0) -> TrialState:
    record = {"drop": 0.9, "t_pair_p50_ms": p50}  # a test drop, which must steer nothing
    results = [] if drop is None else [(1, {"val_drop": drop}), (2, {"val_drop": drop + 0.5}), (3, {})]
    return TrialState(trial.trial_id, trial.exp_id, trial.task_id, "trial", {}, None, results=results, record=record)


def value(trial: Planned) -> float:
    return abs(float(trial.params["T"]) - 7) / 10


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"deptth": uniform(0.4, 0.9)}, "trial K-search: unknown key 'deptth': did you mean 'depth'"),
        ({"depth": uniform(0.4, 1.9)}, "trial K-search: depth=1.9: Input should be less than or equal to 1"),
        ({"gamma": uniform(-0.1, 0.3)}, "trial K-search: gamma=-0.1: Input should be greater"),
        ({"optimizer": one_of("adamw", "sgd")}, "trial K-search: optimizer='sgd'"),
        ({"gammma": one_of(constant, linear)}, "unknown key 'gammma'"),
    ],
)
def test_a_space_that_no_setting_can_take_is_refused_before_anything_runs(words: dict, said: str) -> None:
    sweep = replace(K, space={**K.space, **words})
    with pytest.raises(InputError, match=re.escape(said)):
        take_order(sweep, ["--profile", "demo", "--search", "optuna", "--samples", "2", "--dry-run"], "")


def test_the_space_of_every_stage_is_one_that_its_settings_take() -> None:
    checked = 0
    for stage in PLANS["all"]:
        found = vars(importlib.import_module(f"sweeps.{stage.path.stem}")).values()
        for sweep in (one for one in found if isinstance(one, Sweep) and one.space):
            for profile in ("demo", "small", "full"):
                given = {"fusion": "cached"} if stage.knows("fusion") else {}  # what a start of Stage 2 must say
                settings = resolve(sweep.settings, profile, given, sweep.changes.get(profile, {}))
                check_space(sweep.space, settings, sweep.search_task)
            checked += 1
    assert checked >= 8


def test_asks_within_the_space() -> None:
    asked = search().ask(40)
    assert len({trial.trial_id for trial in asked}) == 40
    kinds = {Schedule.from_data(trial.params["beta"]).kind for trial in asked}
    assert kinds == {"constant", "step", "linear"}
    for trial in asked:
        assert 1 <= trial.params["T"] <= 10 and 1e-5 <= trial.params["lr"] <= 1e-3
        assert all(0 <= weight <= 1 for weight in Schedule.from_data(trial.params["beta"]).values)


def test_learns_from_both_objectives() -> None:
    """Better values are asked for more often: by chance 10 of 20 lie in 2/9 of the range in under 1 %."""
    study = search()
    for _ in range(10):
        asked = study.ask(8)
        study.tell([state(trial, value(trial)) for trial in asked])
    later = study.ask(20)
    assert sum(value(trial) < 0.1 for trial in later) >= 10


def test_a_resumed_search_asks_the_same() -> None:
    first = search()
    batches = [first.ask(STARTUP), []]
    first.tell([state(trial, value(trial)) for trial in batches[0]])
    batches[1] = first.ask(4)

    again = search()
    known = [again.again(trial.tags["search"]["params"]) for trial in batches[0]]
    again.tell([state(trial, value(trial)) for trial in known])
    rest = again.ask(4)
    assert [trial.trial_id for trial in [*known, *rest]] == [trial.trial_id for trial in batches[0] + batches[1]]


def test_trials_without_numbers_count_as_failed() -> None:
    study = search()
    asked = study.ask(3)
    study.tell([state(asked[0], None), state(asked[1], 0.1)])
    states = [trial.state.name for trial in study._study.trials]
    assert states == ["FAIL", "COMPLETE", "RUNNING"]


def test_random_trials_come_at_once_then_as_many_as_run_side_by_side() -> None:
    study = search()
    assert study.batch(slots=2, left=50) == STARTUP
    study.ask(STARTUP)
    assert study.batch(slots=2, left=50) == 2 and study.batch(slots=2, left=1) == 1


def test_the_plans_own_trials_are_learned_where_they_lie_in_the_space() -> None:
    study = search()
    sweep = Sweep(stage="K", domain="toy", trainable=SimpleNamespace, trials=[Trial("K-1", T=3)])
    planner = Planner(sweep, Resolved("small", {}, {}), 1)
    inside = planner.plan(Trial("K-3", T=3, beta=step(0.5, 0.7, at=0.7), init="inherit"))
    outside = planner.plan(Trial("K-9", T=30, beta=constant(0.5), init="inherit"))
    states = {trial.trial_id: state(trial, 0.02, 3.0) for trial in (inside, outside)}
    study.learn([inside, outside], states, {"lr": 5e-4})
    told = study._study.trials
    assert len(told) == 1 and told[0].values == [0.02, 3.0]
    assert told[0].params["T"] == 3 and told[0].params["beta"] == "step" and told[0].params["beta_at"] == 0.7


def test_the_far_end_of_a_space_is_a_trial_with_all_of_it_on() -> None:
    assert far_end(SPACE) == {"T": 10, "beta": 1.0, "lr": 1e-3, "init": "scratch"}
    point = far_end(K.space)
    assert point["gamma"] > 0
    resolve([WORKLOAD, DISTILL], "demo", {}).with_params(point, "far end")


def test_search_keeps_to_its_gates() -> None:
    """The objectives alone draw it to rho = 0; the gate asks for at least 0.5, the budget for at most 0.8.

    It ends up on both sides of the gate's edge, where the best trial that is allowed lies: of 20 trials drawn by chance
    15 or more lie in these 0.4 of the range in 0.2 % of the cases.
    """

    def told(study: Search, count: int) -> list[float]:
        asked = study.ask(count)
        study.tell([measured(trial) for trial in asked])
        return [float(trial.params["rho"]) for trial in asked]

    def measured(trial: Planned) -> TrialState:
        rho = float(trial.params["rho"])
        found = state(trial, 0.1 * rho, 1.0 + rho)
        found.record |= {"params_down": rho}  # type: ignore[operator]
        return found

    near = {}
    for gates in ([Gate("params_down", at_least=0.5)], []):
        sweep = Sweep(
            stage="P", domain="toy", trainable=SimpleNamespace, trials=[Trial("P-1")], search_gates=gates,
            gate=Gate("drop", at_most=0.08),
        )  # fmt: skip
        study = Search({"rho": uniform(0, 1)}, Planner(sweep, Resolved("small", {}, {}), 3), "P-3", 3)
        rhos = [rho for _ in range(20) for rho in told(study, 2)][-20:]
        near[bool(gates)] = sum(0.4 <= rho <= 0.8 for rho in rhos)
    assert near[True] >= 15 and near[False] <= 3, near
