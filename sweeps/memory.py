"""A trial whose host runs out of memory fails by itself; Ray Tune would end the whole sweep.

Ray's memory monitor kills the largest worker of a full node. What its owner then gets is an OutOfMemoryError, which is
neither an error of an actor nor of a task, and Tune's actor manager (2.60) raises whatever is neither.
"""

import re
from typing import Any

from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import OutOfMemoryError, RayActorError

_tune_failed = RayActorManager._actor_task_failed


class WorkerOutOfMemoryError(RayActorError):
    """In the place of Ray's error: the worker of a trial is dead, and this says of what."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.args = (text,)

    def __str__(self) -> str:
        return f"{type(self).__name__}: {self.args[0]}"


def told(message: str) -> str:
    """Ray's page about a node without memory in one line: what was used of how much, and by its largest worker."""
    used = re.search(r"([\d.]+) ?GB used / ([\d.]+) ?GB", message)
    largest = re.search(r"(?m)^\d+\s+([\d.]+)\s+ray::", message)
    where = f"its host had {used[1]} of {used[2]} GB in use" if used else "its host had none left"
    who = f"; its largest worker held {largest[1]} GB" if largest else ""
    return f"out of memory: {where}{who}"


def contain() -> None:
    """From now on Tune takes such a death for that of the trial's actor, as which it is retried and then recorded."""

    def failed(self: RayActorManager, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, OutOfMemoryError):
            exception = WorkerOutOfMemoryError(told(str(exception)))
        _tune_failed(self, tracked_actor_task, exception)

    RayActorManager._actor_task_failed = failed  # type: ignore[method-assign]
