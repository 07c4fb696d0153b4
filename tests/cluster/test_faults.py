"""Each fault of benchmarks/faults.py on two hosts: nothing is lost, nothing stands twice, and the sweep goes on."""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import faults

pytestmark = pytest.mark.cluster


OFTEN = (faults.node_preempted,)  # a host that leaves and then is gone; the others are slow: a minute or two each


@pytest.mark.parametrize(
    "fault",
    [pytest.param(fault, marks=[] if fault in OFTEN else [pytest.mark.slow]) for fault in faults.FAULTS],
    ids=lambda fault: fault.__name__,
)
def test_nothing_is_lost(fault: Callable[[faults.Run], None], tmp_path: Path) -> None:
    if why := faults.cannot(fault):
        pytest.skip(why)
    found = faults.suffer(fault, tmp_path)
    assert not found.lost and not found.duplicated
    assert found.recover_s is None or math.isfinite(found.recover_s)


def test_the_account_sees_what_is_missing_and_what_stands_twice(tmp_path: Path) -> None:
    """The account itself, on a made-up sweep that lost an epoch and doubled another."""
    import sqlite3
    from types import SimpleNamespace

    from sweeps.journal import Journal

    folder = tmp_path / "shared" / "toy_small_seed42"
    with Journal.open(folder) as journal:
        header = {
            key: "x" for key in ("sweep_id", "name", "stage", "domain", "profile", "config_hash", "workload_hash")
        }
        journal.append("sweep", **header)
        journal.append("trial", trial_id="t", exp_id="T_a_run1", task_id="T-1", role="trial", params={}, saves=None)
        for epoch in [1, 2, 2, *range(4, faults.EPOCHS + 1)]:
            journal.append("result", trial_id="t", epoch=epoch, metrics={})
        journal.append("end", status="finished")
    (tmp_path / "alpha" / "mlflow").mkdir(parents=True)
    with sqlite3.connect(tmp_path / "alpha" / "mlflow" / "runs.db") as store:
        store.execute("create table runs (run_uuid, name, status)")
        store.execute("create table metrics (run_uuid, key, step)")
        store.execute("insert into runs values ('r', 'T_a_run1', 'RUNNING')")
        steps = [step for step in range(1, faults.EPOCHS + 1) if step != 5]
        store.executemany("insert into metrics values ('r', 'val_drop', ?)", [(step,) for step in [1, *steps]])
    gone = SimpleNamespace(name="alpha", folder=tmp_path / "alpha", holder=SimpleNamespace(poll=lambda: 0))
    lost, twice = faults.account(faults.Run(gone, gone, tmp_path))  # type: ignore[arg-type]
    assert lost == (
        "MLflow: end of T_a_run1 (RUNNING)",
        "journal: epoch 3 of T_a_run1",
        "MLflow: epoch 5 of T_a_run1",
        "verdict of T_a_run1 (None, None)",
    )
    assert twice == ("journal: epoch 2 of t", "MLflow: epoch 1 of T_a_run1")
