"""The workers of ray_cluster.yaml really come and go: Ray's autoscaler, with its provider of made-up machines."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from sweeps.journal import SweepState

ROOT = Path(__file__).resolve().parents[2]
TOY = ROOT / "tests" / "sweeps" / "toy_sweep.py"
HEAD_ID = "f" * 51 + "00000"  # what the provider calls its head
RAY = str(Path(sys.executable).with_name("ray"))
# The nodes, once one is left or two minutes have passed.
LOOK = """
import json, ray, sys, time
ray.init(address=sys.argv[1], logging_level="ERROR")
end = time.time() + 120
while sum(node["Alive"] for node in ray.nodes()) > 1 and time.time() < end:
    time.sleep(0.5)
print(json.dumps([(node["Alive"], node["Labels"].get("gpu-memory-gb")) for node in ray.nodes()]))
"""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def autoscaler(port: int) -> dict[str, object]:
    """The node types of ray_cluster.yaml as they stand, on made-up machines, of which idle ones go after 12 s."""
    described = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    types = {name: {**kind, "node_config": {}} for name, kind in described["available_node_types"].items()}
    types["ray.head.default"] = {**types.pop(described["head_node_type"]), "max_workers": 0}
    module = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    provider = {"type": "external", "module": module, "gcs_address": f"127.0.0.1:{port}"}
    empty = [f"{which}setup_commands" for which in ("", "head_", "worker_")]
    empty += [
        "cluster_synced_files",
        "rsync_exclude",
        "rsync_filter",
        "initialization_commands",
        "head_start_ray_commands",
        "worker_start_ray_commands",
    ]
    return {
        "cluster_name": "made-up",
        "max_workers": described["max_workers"],
        "upscaling_speed": described["upscaling_speed"],
        "idle_timeout_minutes": 0.2,
        "provider": provider | {"launch_multiple": True, "head_node_id": HEAD_ID},
        "available_node_types": types,
        "head_node_type": "ray.head.default",
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{key: [] for key in empty},
    }


@pytest.mark.cluster
@pytest.mark.slow
def test_workers_come_for_a_sweep_and_go_after_it(tmp_path: Path) -> None:
    """From a head alone: trials that need 40 GB make the large kind come, and no other; idle, it goes."""
    port, temp = free_port(), Path("/tmp") / f"ray-scale-{os.getpid()}"
    (tmp_path / "cluster.json").write_text(json.dumps(autoscaler(port)))
    env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 2, "RAY_FAKE_CLUSTER": "1"}
    env |= {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": HEAD_ID}
    env |= {"RAY_TMPDIR": str(temp), "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    command = [RAY, "start", "--head", "--block", f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=0"]
    command += ["--num-gpus=0", "--include-dashboard=false", f"--autoscaling-config={tmp_path / 'cluster.json'}"]
    command += [f"--temp-dir={temp}", "--object-store-memory=100000000"]
    with (tmp_path / "head.log").open("w") as log:
        head = subprocess.Popen(
            command, stdout=log, stderr=log, env={**env, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID}
        )
    try:
        end = time.monotonic() + 90
        while "Ray runtime started" not in (tmp_path / "head.log").read_text():
            assert time.monotonic() < end and head.poll() is None, (tmp_path / "head.log").read_text()
            time.sleep(0.3)
        sweep = [sys.executable, str(TOY), "--storage", str(tmp_path / "runs"), "--address", f"127.0.0.1:{port}"]
        refused = subprocess.run(
            [*sweep, "--gpu-memory", "40"], capture_output=True, text=True, env={**env, "PYTHONPATH": str(ROOT)}
        )
        assert refused.returncode == 2 and "none of 1 nodes has a card" in refused.stderr
        waits = ["--gpu-memory", "40", "--gpus-per-trial", "1", "--wait-for-nodes", "3", "--max-concurrent", "2"]
        done = subprocess.run(
            [*sweep, *waits], capture_output=True, text=True, timeout=400, env={**env, "PYTHONPATH": str(ROOT)}
        )
        assert done.returncode == 0, done.stderr
        state = SweepState.replay(tmp_path / "runs" / "toy_small_seed42" / "journal.jsonl")
        assert [(t.record or {}).get("verdict") for t in state.trials.values()] == ["n/a", "pass", "fail"]
        known = subprocess.run(
            [sys.executable, "-c", LOOK, f"127.0.0.1:{port}"], capture_output=True, text=True, env=env, timeout=200
        )
        nodes = json.loads(known.stdout.splitlines()[-1])
        assert [alive for alive, _ in nodes].count(True) == 1, "an idle worker stayed"
        assert {memory for _, memory in nodes} == {None, "80"}, "a card of another size came"
    finally:
        family = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
        head.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=20)
        for one in alive:
            one.kill()
        head.wait(20)
        shutil.rmtree(temp, ignore_errors=True)
