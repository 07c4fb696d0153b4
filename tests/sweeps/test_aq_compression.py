"""The decoder's quantization and pruning sweeps as scripts: what they plan and what they refuse."""

import re
from pathlib import Path

import pytest

from sweeps.aq_joint import AQ as KQ
from sweeps.aq_prune import AQ as P
from sweeps.aq_quantize import AQ as Q
from sweeps.launch import run


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        (Q, ["AQ-Q1", "AQQ_PTQ_keepLN_run1", "aq_ptq_int8.onnx", "AQQ_QAT_W4_run1", "aq_int8.trt", "13 epochs"]),
        (P, ["AQ-P1", "AQP_r020_run1", "aq_pruned_r020.pth", "AQP_r040_run1", "aq_pruned_r040.pth", "10 epochs"]),
    ],
)
def test_dry_run_shows_the_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path, sweep, words: list[str]) -> None:
    flags = ["--dry-run", "--storage", str(tmp_path / "runs"), "--search", "optuna", "--samples", "4"]
    assert run(sweep, flags) == 0
    out = capsys.readouterr().out
    assert [word for word in [*words, "4 trials that Optuna chooses"] if word not in out] == []
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("sweep", "flags", "said"),
    [
        (Q, ["--set", "keep=[layernorn]", "--profile", "demo"], "keep pattern 'layernorn' matches no eligible layer"),
        (Q, ["--set", "model=none.pth"], "none.pth does not exist"),
        (P, ["--set", "conv=3"], "rho=0.4 x conv=3 removes all there is"),
        (KQ, [], "no finished sweep of stage AQ1, profile small.*aq_baseline.py"),
    ],
)
def test_refused_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, sweep, flags, said) -> None:
    assert run(sweep, [*flags, "--storage", str(tmp_path / "runs")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert re.search(said, err)
