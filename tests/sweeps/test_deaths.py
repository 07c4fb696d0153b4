"""What Ray Tune would make more of than the death of one trial's worker."""

import pickle
from types import SimpleNamespace

import pytest
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import OutOfMemoryError, RayActorError

from sweeps import deaths, training

PAGE = """1 worker(s) were killed due to the node running low on deaths. Memory on the node (IP: 10.0.0.2) was \
1.92GB used / 2.00GB limit (0.957870)
OOM kill reason: Memory usage 2048114688B exceeded threshold of 2040109440B (95.0% of 2147483648B limit)
Top 10 memory users: PID\tMEM(GB)\tCOMMAND
335\t0.19\tpython -m sweeps.mlflow_writer
412\t1.25\tray::Toy.train
160\t0.19\tray::IDLE
"""


def test_the_page_becomes_a_line_with_the_peak() -> None:
    line = "out of memory: its host had 1.92 of 2.00 GB in use; its largest worker held 1.25 GB"
    assert deaths.told(PAGE) == line and deaths.told("something else") == "out of memory: its host had none left"
    error = deaths.WorkerOutOfMemoryError(line)
    again = pickle.loads(pickle.dumps(error))  # Tune writes it to a file and reads it back
    assert isinstance(again, RayActorError) and str(again) == f"WorkerOutOfMemoryError: {line}" and not again.preempted
    assert (
        training.last_error(f"Failure # 1\n{again}\n") == str(again) and training.failure(str(again)) == "out_of_memory"
    )


def test_tune_itself_would_end_the_sweep_and_is_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the first half fails, Ray has mended it, and that part of sweeps/deaths.py can go."""
    task = type("Task", (), {"_tracked_actor": SimpleNamespace(_on_error=None)})()
    manager = RayActorManager.__new__(RayActorManager)
    monkeypatch.setattr(RayActorManager, "_actor_task_failed", deaths._tune_failed)
    with pytest.raises(RuntimeError, match="unexpected"):
        manager._actor_task_failed(task, OutOfMemoryError(PAGE))
    heard: list[Exception] = []
    monkeypatch.setattr(deaths, "_tune_failed", lambda manager, task, error: heard.append(error))
    deaths.contain(print)
    manager._actor_task_failed(task, OutOfMemoryError(PAGE))
    manager._actor_task_failed(task, KeyError("other"))
    assert [type(error) for error in heard] == [deaths.WorkerOutOfMemoryError, KeyError]
