"""Ray: start it on this machine, or join a running cluster; one line of help when that cannot be."""

import contextlib
import logging
import os
import re
import secrets
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.errors import InputError
from sweeps.placement import TYPE, Cluster, Node, Placement, place

PACKAGES = ("sweeps", "trainables", "engines", "analysis")
HOW_TO_START = (
    "start one with `ray get-auth-token --generate` and `RAY_AUTH_MODE=token ray start --head`, "
    "or leave --address out to run on this machine alone"
)
HOW_TO_TOKEN = (
    "put the cluster's token into ~/.ray/auth_token (mode 600), or set RAY_AUTH_TOKEN_PATH to its file "
    "(`ray get-auth-token` prints it on the head)"
)
# Of the workers, on other hosts too: a trial without an accelerator sees none, rather than all.
WORKERS = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}
# Ray reads these when it is imported. What they silence: callbacks that write files nobody reads, a
# handler that hides Ctrl-C from the driver, a chdir that would break relative paths, and notices about
# future versions.
ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "100000000",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_THRESHOLD_S": "60",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    # Ray's default of 15 starves trials beside any other program, and latency would be measured like that.
    "RAY_worker_niceness": "0",
    **WORKERS,
}

LOOK_S = 30.0  # between two looks at whether there is still a node


@dataclass(frozen=True)
class Wanted:
    """Which Ray a sweep wants. address: None starts one here; `auto` or host:port joins one. share: part of its slots
    that the sweep uses, at least one. needs_gpu: whether cores alone will not do.
    """

    address: str | None
    share: float = 1.0
    placement: Placement = Placement()
    needs_gpu: bool = False


@contextlib.contextmanager
def connect(wanted: Wanted, say: Callable[[str], None] = print) -> Iterator[Cluster]:
    """Ray for the length of a sweep. say: is given a line while a node is waited for.

    Raises InputError when no cluster answers, its token is missing or wrong, or no node has what a trial needs.
    """
    address = wanted.address
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    before = os.environ.get("RAY_AUTH_MODE")
    if address is not None:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        _check_token()
        _check_port(address)
    else:
        # Whoever may start a task runs code as this user. In the environment nobody else can read the token.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    import ray
    from ray._private import ray_constants, utils
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    for name in ("ray", "ray.tune", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address is None:
        options |= {"address": "local", "num_cpus": cores(), "include_dashboard": False}
        options |= {"_node_ip_address": "127.0.0.1"}
        # As if ray[default] were not installed: no exporter, and no port of a fixed number that a real head would need.
        utils.get_dashboard_dependency_error = lambda: ImportError("a sweep on this machine needs no dashboard")
    else:
        root = Path(__file__).resolve().parent.parent
        options |= {
            "address": address,
            "runtime_env": {"py_modules": [str(root / package) for package in PACKAGES], "env_vars": WORKERS},
        }
    # Without this Ray takes the machine's outside address in place of the one above, and listens on every interface.
    beyond = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = address is not None
    Config.initialize("")  # the script may have imported Ray, which read the environment as it was then
    AuthenticationTokenLoader.instance().reset_cache()
    try:
        with _muted() if address else contextlib.nullcontext():
            ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise _explained(address, error) from error
    try:
        yield _placed(wanted, say)
    finally:
        ray.shutdown()
        ray_constants.ENABLE_RAY_CLUSTER = beyond
        if address is None:  # what else this process may do with Ray has nothing to do with our token
            del os.environ["RAY_AUTH_TOKEN"], os.environ["RAY_AUTH_MODE"]
            if before is not None:
                os.environ["RAY_AUTH_MODE"] = before
            Config.initialize("")
            AuthenticationTokenLoader.instance().reset_cache()


def check(wanted: Wanted) -> None:
    """InputError for what `connect` would refuse. Where a node is waited for, only a start can tell what will come."""
    if wanted.address and wanted.placement.wait_min:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        _check_token()
        _check_port(wanted.address)
    elif wanted.address or wanted.placement != Placement():
        with connect(wanted):
            pass


def _placed(wanted: Wanted, say: Callable[[str], None]) -> Cluster:
    """Where trials can run. Where an autoscaler has no fitting node up, asking for one makes it start one."""
    asked = wanted.placement
    try:
        return place(asked, nodes(), wanted.share, wanted.needs_gpu)
    except InputError as error:
        if not asked.wait_min:
            raise
        say(f"waiting up to {asked.wait_min:g} min for a node that fits ({error})")
    gpus = asked.gpus if asked.gpus is not None else float(wanted.needs_gpu or asked.gpu_memory is not None)
    labels = asked.labels | ({TYPE: asked.latency_on} if asked.latency_on else {})  # a first node that can measure, too
    _bring(gpus, asked.cpus or 1.0, labels, asked.workers, asked.wait_min)
    return place(asked, nodes(), wanted.share, wanted.needs_gpu)


def measuring_node(found: Cluster, say: Callable[[str], None]) -> Node:
    """The node to measure on: of those alive always the same one, so that its times compare. say: is given a line while
    one is waited for.

    Raises InputError where there is none, and none came while there was time to wait for one.
    """
    there = [node for node in nodes() if found.measures_on(node)]
    kind = f"--latency-on {found.latency_on}" if found.latency_on else "measuring"
    if not there and found.wait_min:
        say(f"{kind}: none of its nodes is left; waiting up to {found.wait_min:g} min for one")
        labels = {**found.labels, **({TYPE: found.latency_on} if found.latency_on else {})}
        _bring(found.gpus, found.cpus, labels, 1, found.wait_min)
        there = [node for node in nodes() if found.measures_on(node)]
    if not there:
        why = "; ".join(found.unfit.values()) or "its nodes are gone; add one"
        raise InputError(f"{kind}: {why}; then go on with --resume")
    return max(there, key=lambda node: (node.offers("GPU"), node.offers("CPU"), node.node_id))


class Lookout:
    """Looks now and then for a node that what is still to run could have; `say` is given a line when there is none, and
    one when there is again. To Ray such work is only pending.
    """

    def __init__(self, cluster: Cluster, say: Callable[[str], None]) -> None:
        self._cluster, self._say = cluster, say
        self._looked, self._waits = time.monotonic(), False

    def look(self) -> None:
        """To be called often. Raises OSError when Ray has no node at all."""
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return
        self._looked, alive = now, nodes()
        if not alive:
            raise OSError("Ray has no node left, so that nothing can run; start it again and go on with --resume")
        waits = not any(self._cluster.trains_on(node) for node in alive)
        if waits != self._waits:
            none = f"none of {len(alive)} nodes has what a trial needs ({self._cluster.needs}): waiting for one"
            self._say(none if waits else "a node that has what a trial needs is up")
        self._waits = waits


def _bring(gpus: float, cpus: float, labels: Mapping[str, str], count: int, minutes: float) -> None:
    """Ask for room on nodes with these labels, so that an autoscaler starts them, until it is there or time is up."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    bundle = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    room = placement_group([bundle] * count, bundle_label_selector=[dict(labels)] * count)
    try:
        ray.wait([room.ready()], timeout=60 * minutes)
    finally:
        remove_placement_group(room)


def nodes() -> list[Node]:
    """The nodes that are alive, always in the same order."""
    import ray

    known = sorted(ray.nodes(), key=lambda node: str(node["NodeID"]))  # type: ignore[no-untyped-call]
    return [Node.of(node) for node in known if node["Alive"]]


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_token() -> None:
    if os.environ["RAY_AUTH_MODE"] != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        found, mode = path.read_text().strip(), path.stat().st_mode & 0o777
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", "no text")
        raise InputError(f"--address: no cluster token in {path} ({said}); {HOW_TO_TOKEN}") from error
    if not found:
        raise InputError(f"--address: the token file {path} is empty; {HOW_TO_TOKEN}")
    if mode & 0o077:  # as Ray itself writes it; whoever reads it runs code on every node
        raise InputError(f"--address: others may read the token file {path} (mode {mode:o}); `chmod 600 {path}`")


def _check_port(address: str) -> None:
    """Ray itself takes a minute to find that nobody listens."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", "auto")
    if address == "auto":
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if (
        address.startswith("ray://")
        or not colon
        or not host
        or not (port.isascii() and port.isdigit())
        or int(port) > 65535
    ):
        raise InputError(f"--address {address}: expected `auto` or HOST:PORT of the head, e.g. 10.0.0.1:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, ValueError) as error:  # ValueError: no name that a resolver would take
        said = getattr(error, "strerror", None) or str(error)
        raise InputError(f"--address {address}: no Ray cluster answers ({said}); {HOW_TO_START}") from error


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """While Ray tries to join, its core writes a line per try straight to file descriptor 2."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _explained(address: str | None, error: Exception) -> InputError:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    first = lines[0]
    if "ersion mismatch" in first:
        versions = ", ".join(line for line in lines if re.match(r"(Ray|Python):", line))
        how = "start this script with the cluster's Python and Ray (constraints.txt pins them)"
        return InputError(f"--address {address}: versions of the cluster, then of this driver: {versions}; {how}")
    if address is None:
        return InputError(f"Ray could not start on this machine ({first}); see /tmp/ray for its logs")
    refused = type(error).__name__ == "AuthenticationError" or "token" in first.lower()
    if refused or "Failed to connect" in first:
        return InputError(f"--address {address}: the cluster refused this driver ({first}); {HOW_TO_TOKEN}")
    return InputError(f"--address {address}: no Ray cluster found ({first}); {HOW_TO_START}")
