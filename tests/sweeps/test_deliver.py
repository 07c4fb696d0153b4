"""What a sweep leaves, on a made-up journal."""

from pathlib import Path

from sweeps.deliver import choose, tidy
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


def test_without_weights_there_is_no_choice(tmp_path: Path) -> None:
    ledger = a_sweep(tmp_path, a=([0.01], "pass"))
    (ledger.state_dir("a") / "best.pth").unlink()
    assert choose(ledger).trial is None


def test_exports_that_no_record_refers_to_are_removed(tmp_path: Path) -> None:
    ledger = a_sweep(tmp_path, a=([0.1], "pass"), b=([0.1], "pass"))
    ledger.append("record", trial_id="a", record={"exp_id": "a", "weights": "aaaa"})
    work = tmp_path / "s" / "work"
    (work / ".own_bbbb.onnx.x7").mkdir(parents=True)
    for name in ("own_aaaa.onnx", "own_aaaa.onnx.12.data", "own_bbbb.onnx", "own_bbbb.onnx.34.data", "note.txt"):
        (work / name).write_text("x")
    tidy(ledger)
    assert {path.name for path in work.iterdir()} == {"own_aaaa.onnx", "own_aaaa.onnx.12.data", "note.txt"}
