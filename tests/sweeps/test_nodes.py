"""Nodes that come late, and nodes that go while a sweep measures: several on this machine, with made-up cards."""

import contextlib
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray._raylet import AuthenticationTokenLoader, Config
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from sweeps import hosts
from sweeps.journal import SweepState
from sweeps.placement import TYPE

TOY = Path(__file__).with_name("toy_sweep.py")
NAME, ROOT = "toy_small_seed42", TOY.parents[2]


@pytest.fixture
def machines() -> Iterator[Cluster]:
    """A head without cores or cards, and the token that it asks for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("TOY_TIMING", "3")  # the nodes' own environment is that of what runs there
        read_environment()
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            yield cluster
        finally:
            cluster.shutdown()
    read_environment()


def read_environment() -> None:
    """Ray has read it when it was imported."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def drive(cluster: Cluster, storage: Path, *flags: str, out: Any = subprocess.PIPE) -> subprocess.Popen[str]:
    command = [sys.executable, str(TOY), "--storage", str(storage), "--address", cluster.address, *flags]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, text=True, env=env)


def lose(cluster: Cluster, node: Any) -> None:
    """As when the machine has no power: what ran there ends at once, too."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    for process in (raylet, *raylet.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    cluster.remove_node(node, allow_graceful=False)


def wait_for(sweep: subprocess.Popen[str], what: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not what():
        assert time.monotonic() < end and sweep.poll() is None, sweep.communicate(timeout=20)
        time.sleep(0.1)


def another_stim(folder: Path) -> None:
    """What lies in folder/other is another version to whoever has it in its PYTHONPATH."""
    (folder / "other" / "stim-0.1.dist-info").mkdir(parents=True)
    (folder / "other" / "stim-0.1.dist-info" / "METADATA").write_text("Name: stim\nVersion: 0.1\n")


def verdicts(storage: Path) -> list[str | None]:
    state = SweepState.replay(storage / NAME / "journal.jsonl")
    assert not any((trial.record or {}).get("unmeasured") for trial in state.trials.values())
    return [(trial.record or {}).get("verdict") for trial in state.trials.values()]


def test_latency_waits_for_its_kind_of_card_and_outlives_the_node_it_is_measured_on(
    machines: Cluster, tmp_path: Path
) -> None:
    """A cluster with one kind of card, asked for another: it is waited for, and when it goes another of it goes on."""
    machines.add_node(num_cpus=2, num_gpus=1, labels={TYPE: "A10G"})
    screen, waits = tmp_path / "screen", "waiting up to 2 min for a node that fits (--latency-on H100: no node"
    with screen.open("w") as out:
        sweep = drive(machines, tmp_path, "--latency-on", "H100", "--wait-for-nodes", "2", out=out)
    wait_for(sweep, lambda: waits in screen.read_text())
    time.sleep(5)
    assert sweep.poll() is None, sweep.communicate()
    assert not (tmp_path / NAME / "work").exists(), "it began without the card that it was to measure on"
    larger = machines.add_node(num_cpus=4, num_gpus=1, labels={TYPE: "H100"})
    smaller = machines.add_node(num_cpus=2, num_gpus=1, labels={TYPE: "H100"})
    timed = tmp_path / NAME / "work" / "timed"
    wait_for(sweep, lambda: timed.exists() and len(timed.read_text().split()) == 4)  # the second one is being timed
    lose(machines, larger)
    _, err = sweep.communicate(timeout=200)
    assert sweep.returncode == 0, err
    assert verdicts(tmp_path) == ["n/a", "pass", "fail"]
    lines = [line.split() for line in timed.read_text().splitlines()]
    assert [node for node, _ in lines] == 2 * [larger.node_id] + 2 * [smaller.node_id]
    assert len({name for _, name in lines[1:3]}) == 1, "what was being timed is timed again, on the other node"


def test_a_sweep_whose_last_node_goes_says_what_it_waits_for(
    machines: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once while it trains, once while it measures; a head without cores is a node, and of no use to it."""
    for key, value in {"TOY_SLEEP": "1", "TOY_QUALITY": "3", "TOY_LOOK": "1"}.items():
        monkeypatch.setenv(key, value)
    screen, none = tmp_path / "screen", "none of 1 nodes has what a trial needs (CPU 1, GPU 0): waiting for one"
    node = machines.add_node(num_cpus=2)
    with screen.open("w") as out:
        sweep = drive(machines, tmp_path, out=out)
        wait_for(sweep, lambda: any(tmp_path.glob(f"{NAME}/trials/*/steps.log")))
        lose(machines, node)
        wait_for(sweep, lambda: none in screen.read_text())
        node = machines.add_node(num_cpus=2)
        wait_for(sweep, lambda: "measuring, 0 of 6" in screen.read_text())
        lose(machines, node)
        wait_for(sweep, lambda: screen.read_text().count(none) == 2)
        machines.add_node(num_cpus=2)
        _, err = sweep.communicate(timeout=200)
    assert sweep.returncode == 0, err
    assert verdicts(tmp_path) == ["n/a", "pass", "fail"]
    assert screen.read_text().count("a node that has what a trial needs is up") == 2


@pytest.mark.slow
def test_latency_waits_when_its_last_node_goes(machines: Cluster, tmp_path: Path) -> None:
    """On the head, which has no core, nothing is measured."""
    node, screen = machines.add_node(num_cpus=2), tmp_path / "screen"
    timed = tmp_path / NAME / "work" / "timed"
    with screen.open("w") as out:
        sweep = drive(machines, tmp_path, "--wait-for-nodes", "2", out=out)
        wait_for(sweep, lambda: timed.exists() and len(timed.read_text().split()) == 4)
        lose(machines, node)
        wait_for(sweep, lambda: "measuring: none of its nodes is left; waiting up to 2 min" in screen.read_text())
        machines.add_node(num_cpus=2)
        _, err = sweep.communicate(timeout=200)
    assert sweep.returncode == 0, err
    assert verdicts(tmp_path) == ["n/a", "pass", "fail"]


def test_a_trials_first_worker_asks_the_hosts_of_the_others(
    machines: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines.add_node(num_cpus=1, resources={"first": 1})
    another_stim(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'other'}:{ROOT}")
    unfit = machines.add_node(num_cpus=1, resources={"second": 1})
    ray.init(machines.address, log_to_driver=False)
    try:
        workers = placement_group([{"CPU": 1, "first": 1}, {"CPU": 1, "second": 1}])
        leads = PlacementGroupSchedulingStrategy(workers, placement_group_bundle_index=0)
        asked = ray.remote(num_cpus=1, scheduling_strategy=leads)(hosts.ask).remote(hosts._versions(), tmp_path)
        with pytest.raises(hosts.UnfitError, match="stim is 0.1 there") as caught:
            ray.get(asked)
        assert caught.value.node_id == unfit.node_id
    finally:
        ray.shutdown()


@pytest.mark.slow
def test_a_node_that_joins_with_another_version_is_given_nothing_for_long(
    machines: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the larger one, on which latency would be measured. The trial that it was given runs elsewhere."""
    for key, value in {"TOY_SLEEP": "4", "TOY_QUALITY": "3", "TOY_TRIALS": "steady"}.items():
        monkeypatch.setenv(key, value)
    good, screen = machines.add_node(num_cpus=1), tmp_path / "screen"
    another_stim(tmp_path)
    with screen.open("w") as out:
        sweep = drive(machines, tmp_path, "--max-concurrent", "2", out=out)
        wait_for(sweep, lambda: any(tmp_path.glob(f"{NAME}/trials/*/steps.log")))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "other"))
        machines.add_node(num_cpus=2)
        _, err = sweep.communicate(timeout=300)
    assert sweep.returncode == 0, err
    assert re.findall(r"host \S+: stim is 0\.1 there, [\d.]+ here; install the same there", screen.read_text())
    state = SweepState.replay(tmp_path / NAME / "journal.jsonl")
    assert [trial.error for trial in state.trials.values()] == [None] * 4
    assert verdicts(tmp_path) == ["n/a", "pass", "pass", "pass"]
    timed = (tmp_path / NAME / "work" / "timed").read_text().splitlines()
    assert {line.split()[0] for line in timed} == {good.node_id}
