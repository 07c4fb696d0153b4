"""Where work runs: what a trial needs, which nodes have it, and the one kind of accelerator to measure latency on.

Nothing here asks Ray: nodes come in as data, so that every refusal can be tried without a GPU.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engines.errors import InputError

TYPE = "ray.io/accelerator-type"  # set by Ray from what it detects
GPU_MEMORY = "gpu-memory-gb"  # set by whoever starts a node; Ray knows no such thing
LARGEST_GB = 1024
LONGEST_MIN = 7 * 24 * 60
HOW_TO_LABEL = f"`ray start --labels={GPU_MEMORY}=80` says that a node's cards have 80 GB"


@dataclass(frozen=True)
class Placement:
    """What was asked for; None leaves it to what the cluster has. gpus, cpus: per trial. concurrent: trials at a time.
    gpu_memory: GB that a trial's card must have. latency_on: accelerator type. wait_min: for a node that fits. workers:
    of each trial; gpus and cpus are then those of each worker.
    """

    gpus: float | None = None
    cpus: float | None = None
    concurrent: int | None = None
    gpu_memory: int | None = None
    latency_on: str | None = None
    wait_min: float = 0.0
    workers: int = 1

    @property
    def labels(self) -> dict[str, str]:
        """What a node must say of itself, in Ray's words, to be given a trial."""
        if self.gpu_memory is None:
            return {}
        # Ray compares labels by equality alone, so that every size that would do is named.
        return {GPU_MEMORY: f"in({','.join(map(str, range(self.gpu_memory, LARGEST_GB + 1)))})"}


@dataclass(frozen=True)
class Node:
    """A living node: its name for people, what it offers (Ray's resources), what it says of itself (labels)."""

    node_id: str
    host: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> "Node":
        """From Ray's own description."""
        host = entry["NodeManagerHostname"] or entry["NodeManagerAddress"]
        return cls(entry["NodeID"], host, entry["Resources"], entry.get("Labels") or {})

    def offers(self, kind: str) -> float:
        """How much of a resource it has in all."""
        return float(self.resources.get(kind, 0.0))

    @property
    def memory(self) -> int | None:
        """GB of each of its cards, as its label says."""
        said = self.labels.get(GPU_MEMORY, "")
        return int(said) if said.isdigit() else None


@dataclass(frozen=True)
class Cluster:
    """What can be used. slots: trials at a time; workers: of each trial; gpus, cpus: of each worker; shared_cores:
    whether a few trials more than slots may share the cores; labels: of the nodes that may have one; latency_on:
    accelerator type to measure on; wait_min: for a node of it, should none be there; versions: of what every host must
    have, empty on one machine; unfit: nodes that were found not to have them, and why.
    """

    slots: int
    gpus: float = 0.0
    cpus: float = 1.0
    shared_cores: bool = True
    labels: Mapping[str, str] = field(default_factory=dict)
    latency_on: str | None = None
    workers: int = 1
    gpu_memory: int | None = None
    wait_min: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)
    unfit: dict[str, str] = field(default_factory=dict)

    @property
    def needs(self) -> str:
        """What a worker of a trial takes of its node, in words."""
        card = f", a card of {self.gpu_memory} GB or more" if self.gpu_memory else ""
        return f"CPU {self.cpus:g}, GPU {self.gpus:g}{card}"

    def trains_on(self, node: Node) -> bool:
        """Whether a worker of a trial has room there once the node is free."""
        return self._fits(node) and node.offers("GPU") >= self.gpus and node.offers("CPU") >= self.cpus

    def measures_on(self, node: Node) -> bool:
        """Whether latency may be measured there: on a card of that type, and no smaller than trials asked for."""
        offers = node.offers("CPU") >= 1 and node.offers("GPU") >= math.ceil(self.gpus)  # a head may have neither
        kind = self.latency_on is None or node.labels.get(TYPE) == self.latency_on
        return offers and kind and self._fits(node)

    def _fits(self, node: Node) -> bool:
        large = self.gpu_memory is None or (node.memory or 0) >= self.gpu_memory
        return large and node.node_id not in self.unfit


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of placement."""
    add = parser.add_argument
    add("--gpus-per-trial", type=float, metavar="X", help="0 to 1; .5: two trials a card (default: 1 where there are)")
    add("--cpus-per-trial", type=float, metavar="X", help="cores of each trial (default: 1)")
    many = "GPUs (or cores) that train a trial together; the two flags above are of each (default: %(default)s)"
    add("--workers-per-trial", type=int, default=1, metavar="N", help=many)
    add("--max-concurrent", type=int, metavar="N", help="trials at a time (default: as many as there is room for)")
    add("--gpu-memory", type=int, metavar="GB", help=f"only cards of that size or larger (label {GPU_MEMORY})")
    add("--latency-on", metavar="TYPE", help="accelerator type on which latency is measured, e.g. H100")
    add("--wait-for-nodes", type=float, default=0.0, metavar="MIN", help="with --address: for an autoscaler's")


def words(asked: Placement) -> list[str]:
    """The flags that ask for this, as they are typed: a campaign hands them to its stages."""
    given = {
        "--gpus-per-trial": asked.gpus,
        "--cpus-per-trial": asked.cpus,
        "--workers-per-trial": asked.workers if asked.workers > 1 else None,
        "--max-concurrent": asked.concurrent,
        "--gpu-memory": asked.gpu_memory,
        "--latency-on": asked.latency_on,
        "--wait-for-nodes": asked.wait_min or None,
    }
    return [word for flag, value in given.items() if value is not None for word in (flag, str(value))]


def read_flags(given: argparse.Namespace) -> Placement:
    """InputError for what no cluster could give."""
    gpus, cpus = given.gpus_per_trial, given.cpus_per_trial
    if gpus is not None and not 0 <= gpus <= 1:
        raise InputError(f"--gpus-per-trial {gpus:g}: expected 0 to 1; --workers-per-trial 2 trains on two")
    if given.workers_per_trial < 1:
        raise InputError(f"--workers-per-trial {given.workers_per_trial}: expected 1 or more")
    if given.workers_per_trial > 1 and gpus is not None and 0 < gpus < 1:
        raise InputError(
            f"--gpus-per-trial {gpus:g}: of --workers-per-trial {given.workers_per_trial} each needs a whole card; "
            "leave the first out, or give 0 to train on cores"
        )
    if cpus is not None and (not 0 < cpus < math.inf or (cpus > 1 and cpus != int(cpus))):
        raise InputError(f"--cpus-per-trial {cpus:g}: expected a part of a core, or a whole number of them")
    if given.max_concurrent is not None and given.max_concurrent < 1:
        raise InputError(f"--max-concurrent {given.max_concurrent}: expected 1 or more")
    if given.gpu_memory is not None and not 1 <= given.gpu_memory <= LARGEST_GB:
        raise InputError(f"--gpu-memory {given.gpu_memory}: expected GB of one card, 1 to {LARGEST_GB}")
    if given.gpu_memory is not None and gpus == 0:
        raise InputError(f"--gpu-memory {given.gpu_memory}: these trials have no accelerator; drop --gpus-per-trial 0")
    if given.latency_on is not None and gpus == 0:
        raise InputError(f"--latency-on {given.latency_on}: these trials have no accelerator; drop --gpus-per-trial 0")
    if not 0 <= given.wait_for_nodes <= LONGEST_MIN:
        raise InputError(f"--wait-for-nodes {given.wait_for_nodes:g}: expected minutes, 0 to {LONGEST_MIN}")
    if given.wait_for_nodes and given.address is None:
        raise InputError(f"--wait-for-nodes {given.wait_for_nodes:g}: no node joins this machine; add --address")
    return Placement(
        gpus, cpus, given.max_concurrent, given.gpu_memory, given.latency_on, given.wait_for_nodes,
        given.workers_per_trial,
    )  # fmt: skip


def place(asked: Placement, nodes: Sequence[Node], share: float, needs_gpu: bool) -> Cluster:
    """What a sweep may use of these nodes; InputError names what none of them has.

    share: part of the slots, at least one. needs_gpu: whether the profile is one for accelerators.
    """
    gpus = asked.gpus
    if gpus is None:
        gpus = 1.0 if needs_gpu or asked.gpu_memory or any(node.offers("GPU") >= 1 for node in nodes) else 0.0
    cpus = asked.cpus or 1.0
    fitting = [node for node in nodes if node.offers("GPU") >= gpus and (not gpus or _is_large(asked, node))]
    if not fitting:
        raise InputError(_no_gpu(asked, gpus, nodes))
    room = sum(_room(node, gpus, cpus) for node in fitting)
    if not room:
        most = max(fitting, key=lambda node: node.offers("CPU"))
        raise InputError(
            f"--cpus-per-trial {cpus:g}: no node has so many; the most is {most.offers('CPU'):g}, on {most.host}; "
            "give at most that"
        )
    if room < asked.workers:
        raise InputError(
            f"--workers-per-trial {asked.workers}: the cluster has room for {room} workers at a time; give at most that"
        )
    slots = max(1, int(room // asked.workers * share)) if asked.concurrent is None else asked.concurrent
    if asked.latency_on is not None and not gpus:
        raise InputError(f"--latency-on {asked.latency_on}: these trials have no accelerator; leave it out")
    latency_on = _latency_type(asked, [node for node in fitting if _room(node, gpus, cpus)]) if gpus else None
    alone = not gpus and asked == Placement()
    return Cluster(slots, gpus, cpus, alone, asked.labels, latency_on, asked.workers, asked.gpu_memory, asked.wait_min)


def _is_large(asked: Placement, node: Node) -> bool:
    return asked.gpu_memory is None or (node.memory or 0) >= asked.gpu_memory


def _room(node: Node, gpus: float, cpus: float) -> int:
    """Workers at a time; a hundredth forgives that .1 is not quite a tenth."""
    by_cpu = math.floor(node.offers("CPU") / cpus + 0.01)
    return min(by_cpu, math.floor(node.offers("GPU") / gpus + 0.01)) if gpus else by_cpu


def _no_gpu(asked: Placement, gpus: float, nodes: Sequence[Node]) -> str:
    with_gpu = [node for node in nodes if node.offers("GPU") > 0]
    if not with_gpu:
        if asked.gpu_memory is not None:
            return f"--gpu-memory {asked.gpu_memory}: none of {len(nodes)} nodes has a card; add one, or leave it out"
        why = f"--gpus-per-trial {gpus:g}" if asked.gpus is not None else "this profile trains on accelerators"
        return f"{why}: none of {len(nodes)} nodes has one; add such a node, or --gpus-per-trial 0 to train on cores"
    if asked.gpu_memory is not None:
        there = ", ".join(f"{node.host} {f'{node.memory} GB' if node.memory else 'says nothing'}" for node in with_gpu)
        return f"--gpu-memory {asked.gpu_memory}: no card is so large ({there}); ask for less. {HOW_TO_LABEL}"
    most = max(with_gpu, key=lambda node: node.offers("GPU"))
    return f"--gpus-per-trial {gpus:g}: the most is {most.offers('GPU'):g}, on {most.host}; give at most that"


def _latency_type(asked: Placement, fitting: Sequence[Node]) -> str | None:
    """p50s of two kinds of card do not compare: where there are several, one must be named."""
    types = sorted({node.labels[TYPE] for node in fitting if TYPE in node.labels})
    there = ", ".join(types) or "no type at all"
    if asked.latency_on is not None and asked.latency_on not in types:
        raise InputError(f"--latency-on {asked.latency_on}: no node that trials may use has one; there is {there}")
    if asked.latency_on is None and len(types) > 1:
        raise InputError(f"--latency-on: the nodes have {there}, and their p50s do not compare; name one of them")
    return asked.latency_on or (types[0] if types else None)
