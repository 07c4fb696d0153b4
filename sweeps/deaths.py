"""How a worker may end without its trial, or the whole sweep, paying for it. What Ray Tune 2.60 would do:

- Ray's memory monitor kills the largest worker of a full node. What its owner then gets is an OutOfMemoryError, which
  is neither an error of an actor nor of a task, and Tune's actor manager raises whatever is neither: the sweep ends.
- A worker that dies after its trial's last report, before it has become the next trial, fails that one twice at once,
  as its actor and as its task, and the second time gives it up.
- A trial that leaves a node that is taken away, or that does not fit, counts as failed.
"""

import re
from collections.abc import Callable
from typing import Any

from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import OutOfMemoryError, RayActorError

from sweeps.hosts import UnfitError

LEFT = "exit_actor() is called"  # Ray's words for a trial that heard that its node goes (trainables/preemption.py)
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


def contain(unfit: Callable[[UnfitError], None]) -> None:
    """From now on Tune takes each of these deaths for one, of the trial's actor, and counts those that are the trial's
    own fault. unfit: is told of nodes that do not fit.
    """

    def failed(self: RayActorManager, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, OutOfMemoryError):
            exception = WorkerOutOfMemoryError(told(str(exception)))
        worker = tracked_actor_task._tracked_actor
        tune: Any = getattr(worker._on_error, "__self__", None)
        trial = tune._actor_to_trial.get(worker) if tune else None
        cause = getattr(exception, "cause", None)
        if isinstance(cause, UnfitError):
            unfit(cause)
        not_begun = bool(trial and isinstance(exception, RayActorError) and trial in tune._resetting_trials)
        if trial and (not_begun or isinstance(cause, UnfitError) or LEFT in str(exception)):
            trial.run_metadata.num_failures -= 1  # Tune counts it next, and then asks whether that is one too many
        if not_begun:
            tune._resetting_trials.discard(trial)  # else it would wait for this worker for ever
            tracked_actor_task._on_error = None
        _tune_failed(self, tracked_actor_task, exception)

    RayActorManager._actor_task_failed = failed  # type: ignore[method-assign]
