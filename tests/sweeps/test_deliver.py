"""What a sweep leaves, on a made-up journal."""

from pathlib import Path

from sweeps import mlflow_content
from sweeps.deliver import choose
from sweeps.journal import NAME, SweepState
from sweeps.ledger import Ledger


def a_sweep(storage: Path, **trials: tuple[list[float], str]) -> Ledger:
    """A ledger of trials with weights: their validation drops, and the verdict on the test split."""
    ledger = Ledger.open(storage / "s", resume=False)
    names = ("name", "stage", "domain", "profile", "config_hash", "workload_hash")
    ledger.begin(dict.fromkeys(names, "s"), "s")
    for trial_id, (drops, verdict) in trials.items():
        ledger.append(
            "trial", trial_id=trial_id, exp_id=trial_id, task_id="K-1", role="trial", params={}, saves=f"{trial_id}.pth"
        )
        for epoch, drop in enumerate(drops, 1):
            ledger.append("result", trial_id=trial_id, epoch=epoch, metrics={"val_drop": drop})
        ledger.append("record", trial_id=trial_id, record={"exp_id": trial_id, "verdict": verdict})
        ledger.state_dir(trial_id).mkdir(parents=True)
        (ledger.state_dir(trial_id) / "best.pth").write_text(trial_id)
    return ledger


def test_validation_alone_chooses_the_student(tmp_path: Path) -> None:
    """The one that passes by the test split is not the one with the best validation: it is not chosen."""
    nan = float("nan")
    ledger = a_sweep(tmp_path, lucky=([0.04, 0.02], "pass"), best=([0.005, nan, 0.03], "fail"), bad=([nan], "fail"))
    choice = choose(ledger)
    assert choice.trial is not None and choice.trial.exp_id == "best"
    assert choice.why == (
        "best: it has the lowest validation drop of 2 trials, 0.50 %; its verdict on the test split is fail"
    )


def test_the_choice_is_a_tag_of_the_sweeps_run_and_the_last_one_counts(tmp_path: Path) -> None:
    ledger = a_sweep(tmp_path, a=([0.02], "pass"), b=([0.01], "pass"))
    assert "chosen" not in mlflow_content.tags(ledger.state, None, "")
    for name in ("a", "b"):
        ledger.append("choice", exp_id=name, why="the lowest validation drop")
    state = SweepState.replay(tmp_path / "s" / NAME)
    assert state.chosen == "b" and mlflow_content.tags(state, None, "")["chosen"] == "b"
    assert "chosen" not in mlflow_content.tags(state, state.trials["b"], "")


def test_without_weights_there_is_no_choice(tmp_path: Path) -> None:
    ledger = a_sweep(tmp_path, a=([0.01], "pass"))
    (ledger.state_dir("a") / "best.pth").unlink()
    assert choose(ledger).trial is None
