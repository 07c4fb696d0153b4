"""Whether the node that this process runs on is about to be taken away.

A spot instance is told so a while before (AWS two minutes, others thirty seconds); who hears it tells Ray (the
autoscaler, or `ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION`), and Ray starts nothing new there.
"""

import time

import ray
from ray._private.state import state

ASK_S = 2.0  # often enough for a notice of half a minute, and nothing beside a step

_asked = 0.0


def noticed() -> bool:
    """Whether this node is to go, as of at most ASK_S seconds ago; False outside Ray."""
    global _asked
    if time.monotonic() - _asked < ASK_S or not ray.is_initialized():
        return False
    _asked = time.monotonic()
    return ray.get_runtime_context().get_node_id() in state.get_draining_nodes()
