"""On a cluster every host runs the same Python, Ray, requirements and project, and sees and may write the same storage.
Hosts that are up are asked before the first trial, later ones by the first work that they are given. What differs is
named, with its host.
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import secrets
import shutil
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from engines.errors import InputError
from sweeps.cluster import PACKAGES, nodes
from sweeps.placement import Cluster, Node
from sweeps.progress import Progress

# Those whose numbers or files differ between versions.
REQUIREMENTS = ("ray", "torch", "numpy", "onnx", "onnxruntime", "nvidia-modelopt", "stim", "pymatching")
ANSWER_S = 120.0
HOW_TO_SHARE = (
    "mount one folder at this path on every host (NFS 4, Lustre, CephFS), or name another --storage that they all have"
)
PAUSE_S = 10.0
Answer = Mapping[str, str]


class UnfitError(Exception):
    """A node on which this sweep cannot run; its work belongs on another."""

    def __init__(self, node_id: str, why: str) -> None:
        super().__init__(node_id, why)
        self.node_id, self.why = node_id, why

    def __str__(self) -> str:
        return self.why


def check(storage: Path) -> Answer:
    """Ask every host; InputError names the first that does not fit. Returns the versions that all have. storage: the
    folder of the sweep, which exists.
    """
    living = nodes()
    folder = storage / f".hosts-{secrets.token_hex(4)}"
    try:
        folder.mkdir()
        (folder / "driver").write_text(folder.name)
        refs = {_on(node).remote(str(folder), node.node_id): node for node in living}
        answered, late = ray.wait(list(refs), num_returns=len(refs), timeout=ANSWER_S)
        for ref in late:
            raise InputError(f"host {refs[ref].host} does not answer within {ANSWER_S:g} s; end its Ray or wait for it")
        asked = [(refs[ref], _answer(ref, refs[ref])) for ref in answered]
        seen = {path.name for path in folder.iterdir()}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    answers = [(node, answer) for node, answer in asked if answer]
    here = _versions()
    for node, answer in answers:
        if differs := _differences(here, answer):
            raise InputError(f"host {node.host}: {differs}")
    for node, answer in answers:
        if answer["storage"]:
            raise InputError(f"host {node.host} cannot use --storage {storage.parent}: {answer['storage']}")
        if node.node_id not in seen:
            raise InputError(f"--storage {storage.parent}: host {node.host}'s files are not seen here; {HOW_TO_SHARE}")
    return here


def ask(versions: Answer, folder: Path) -> None:
    """On a host that work was sent to, and on those of a trial's further workers: raises UnfitError when one has other
    versions, or may not write to the folder.

    Only after a pause: it is free, and would be given the next work, and the next, while others are busy.
    """
    _ask(versions, folder)
    group = ray.util.get_current_placement_group()
    if group is None:
        return
    others = range(1, len(group.bundle_specs))
    places = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle) for bundle in others]
    asked = [ray.remote(num_cpus=0, scheduling_strategy=place)(_ask).remote(versions, folder) for place in places]
    try:
        ray.get(asked)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def _ask(versions: Answer, folder: Path) -> None:
    why = _differences(versions, _versions())
    if not why and not os.access(folder, os.W_OK):
        why = f"{folder} is not there, or may not be written; {HOW_TO_SHARE}"
    if why:
        time.sleep(PAUSE_S)
        raise UnfitError(ray.get_runtime_context().get_node_id(), f"host {socket.gethostname()}: {why}")


def exclude(cluster: Cluster, progress: Progress, error: UnfitError) -> None:
    """From now on the node is none of those that the sweep has; why is said the first time."""
    if error.node_id not in cluster.unfit:
        cluster.unfit[error.node_id] = error.why
        progress.line(error.why)


def _on(node: Node) -> Any:
    at = NodeAffinitySchedulingStrategy(node_id=node.node_id, soft=False)
    options: dict[str, Any] = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": at}
    return ray.remote(**options)(_look)


def _answer(ref: Any, node: Node) -> Answer | None:
    """None of a host that is gone: for half a minute Ray lists one that has died among the living."""
    try:
        answer: Answer = ray.get(ref)
    except ray.exceptions.RayError as error:
        if node.node_id not in {living.node_id for living in nodes()}:
            return None
        lines = str(getattr(error, "cause", None) or error).strip().splitlines()
        how = "install the project's pinned requirements there (constraints.txt)"
        raise InputError(f"host {node.host} cannot run the project ({lines[-1][:200]}); {how}") from None
    return answer


def _look(folder: str, node_id: str) -> Answer:
    """Runs on each host: its versions, and what is wrong with the storage there (empty: nothing)."""
    return {**_versions(), "storage": _storage(Path(folder), node_id)}


def _storage(folder: Path, node_id: str) -> str:
    try:
        if (folder / "driver").read_text() != folder.name:
            return f"another folder of that name; {HOW_TO_SHARE}"
        (folder / node_id).write_text(socket.gethostname())
    except FileNotFoundError:
        return f"the folder there is not the one here; {HOW_TO_SHARE}"
    except OSError as error:
        return f"{error.strerror}; let the user that runs Ray there write to it"
    return ""


@functools.cache
def _versions() -> Answer:
    found = {"Python": platform.python_version(), "the project": _source()}
    for name in REQUIREMENTS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def _source() -> str:
    """Hash of the project's source as this process would import it."""
    whole = hashlib.sha256()
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        root = Path(spec.origin).parent if spec and spec.origin else Path()
        for path in sorted([*root.rglob("*.py"), *root.rglob("*.yaml")]):
            whole.update(f"{package}/{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return whole.hexdigest()[:12]


def _differences(here: Answer, there: Answer) -> str:
    """In words, with what to do; empty where there are none."""
    differ = [f"{what} is {there[what]} there, {here[what]} here" for what in here if there[what] != here[what]]
    how = "install the same there (pip install -c constraints.txt) and start its Ray again"
    return f"{'; '.join(differ)}; {how}" if differ else ""
