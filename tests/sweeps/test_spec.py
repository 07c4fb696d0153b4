import pytest

from engines.errors import InputError
from sweeps.plan import Planner, label, refuse_hidden
from sweeps.settings import DISTILL, WORKLOAD, resolve
from sweeps.spec import Sweep, Trial, constant, linear, loguniform, one_of, step, uniform

SHIPPED = (WORKLOAD, DISTILL)


class Work:
    """Stands where a trainable does; planning asks only its name."""


def sweep(*trials: Trial, **more: object) -> Sweep:
    return Sweep(stage="K", domain="dust3r", trainable=Work, trials=trials, settings=SHIPPED, **more)  # type: ignore[arg-type]


PLAN = (
    Trial("K-1", T=3, beta=constant(0.5), gamma=0),
    Trial("K-2", T=5, beta=constant(0.5), gamma=0),
    Trial("K-3", T=3, beta=step(0.5, 0.7, at=0.7), gamma=0),
)


def planner(seed: int = 42, **changes: object) -> Planner:
    return Planner(sweep(*PLAN), resolve(SHIPPED, "small", changes), seed)


def test_exp_ids_are_the_plans() -> None:
    plan = planner()
    assert [plan.plan(trial).exp_id for trial in PLAN] == [
        "K_T3B05_run1",
        "K_T5B05_run1",
        "K_T3B05_sched_run1",
    ]
    assert plan.plan(PLAN[0]).exp_id == "K_T3B05_run2"
    assert plan.teacher().exp_id == "P0_teacher_run1"
    assert plan.plan(Trial("Q-2", combo="QAT", keyparams="keepLN", T=3)).exp_id == "K_QAT_keepLN_run1"
    assert label({"rho": 0.1}) == ("r010", "")
    assert label({"T": 2.5, "beta": 0.25, "gamma": 0.1, "lr": 3e-5}) == ("T2p5B025", "gamma0p1_lr3em05")


def test_further_seeds_leave_files_of_their_own() -> None:
    plan, trial = planner(), Trial("K-1", saves="student_fp32_t3b05.pth", T=3, beta=constant(0.5), gamma=0)
    names = [plan.plan(trial, seed=seed).saves for seed in (42, 43, 44)]
    assert names == ["student_fp32_t3b05.pth", "student_fp32_t3b05_run2.pth", "student_fp32_t3b05_run3.pth"]


def test_a_trial_is_the_hash_of_its_inputs() -> None:
    same = planner().plan(PLAN[0]).trial_id
    assert same == planner().plan(PLAN[0]).trial_id and len(same) == 12
    others = [
        planner(seed=7).plan(PLAN[0]),
        planner(lr=1e-4).plan(PLAN[0]),
        planner(sampled_pairs=5).plan(PLAN[0]),
    ]
    assert len({same, planner().plan(PLAN[1]).trial_id, *(other.trial_id for other in others)}) == 5


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"T": 0}, "T=0"),
        ({"T": -1.0}, "T=-1.0"),
        ({"gamma": -0.1}, "gamma=-0.1"),
        ({"Temp": 3}, "'Temp'"),
        ({"depth": 1.5}, "depth=1.5"),
        ({"beta": {"step": [0.5, 0.7], "shares": [0.7, 0.4]}}, "sum to 1.1"),
    ],
)
def test_bad_parameters_name_the_trial(params: dict[str, object], said: str) -> None:
    with pytest.raises(InputError) as caught:
        planner().plan(Trial("K-9", **params))
    assert said in str(caught.value) and "K-9" in str(caught.value)


def test_a_set_that_no_trial_would_see_is_refused() -> None:
    refuse_hidden(sweep(*PLAN), {"lr": 1e-4})
    with pytest.raises(InputError, match="--set T: every trial of this sweep sets T itself"):
        refuse_hidden(sweep(*PLAN), {"T": 4})


def test_search_words_refuse_what_cannot_be() -> None:
    for wrong in (
        lambda: uniform(1, 1),
        lambda: uniform(2, 1),
        lambda: loguniform(0, 1),
        lambda: uniform(0, float("inf")),
    ):
        with pytest.raises(InputError, match="expected"):
            wrong()
    with pytest.raises(InputError, match="at least one"):
        one_of()


def test_files_of_a_sweep_must_differ_and_stay_in_its_folder() -> None:
    for names in (("a.pth", "a.pth"), ("../a.pth", "b.pth")):
        with pytest.raises(InputError, match="a.pth"):
            sweep(Trial("K-1", saves=names[0]), Trial("K-2", saves=names[1]))
    with pytest.raises(InputError, match="expected trials, a search space"):
        sweep()


def test_schedules_become_data() -> None:
    assert Trial("K-1", beta=linear(0.5, 0.1), T=3).params == {"beta": {"linear": [0.5, 0.1]}, "T": 3}
