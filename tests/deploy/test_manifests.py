"""ray_cluster.yaml and deploy/: what Ray's launcher would refuse, and what must not slip out."""

import copy
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.aws.config import _configure_security_group
from ray.autoscaler._private.command_runner import _with_interactive
from ray.autoscaler._private.local.config import prepare_local
from ray.autoscaler._private.util import fillout_defaults, validate_config

from sweeps import flags

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ("ray_cluster.yaml", "deploy/on_premise.yaml")


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text())


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """As `ray up` would have it before it starts machines."""
    if config["provider"]["type"] == "local":
        return prepare_local(config)[0]
    return {"cluster_synced_files": [], **config}


@pytest.mark.parametrize("name", LAUNCHER)
def test_ray_takes_the_cluster(name: str) -> None:
    config = read(name)
    jsonschema_ok = prepared(config) | {"cluster_synced_files": []}
    validate_config(jsonschema_ok)
    with pytest.raises(jsonschema.ValidationError):  # the check sees a slip of the pen
        validate_config(jsonschema_ok | {"max_worker": 3})
    filled = fillout_defaults(config) if name == "ray_cluster.yaml" else jsonschema_ok
    assert filled["head_node_type"] in filled["available_node_types"]


@pytest.mark.parametrize("name", LAUNCHER)
def test_every_ray_has_a_token_and_nothing_but_ray_listens_outside(name: str) -> None:
    config = read(name)
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    rays = [line for line in starts if "ray start" in line]
    assert len(rays) == 2 and all("RAY_AUTH_MODE=token ray start" in line for line in rays)
    assert "--dashboard-host=127.0.0.1" in rays[0] and "0.0.0.0" not in (ROOT / name).read_text()
    assert "~/.ray/auth_token" in config["file_mounts"]
    assert any(re.search(r"chmod 600 .*auth_token", line) for line in config["setup_commands"])
    assert any("-c ~/slimsweep/constraints.txt" in line for line in config["setup_commands"]), "nothing is pinned"
    assert any("deploy/mlflow_server.sh" in line for line in config["head_start_ray_commands"])


def test_the_clouds_nodes_are_in_a_group_that_ray_leaves_alone() -> None:
    """What Ray makes or adds to admits ssh from everywhere; of groups that every node type names it touches none."""
    config = fillout_defaults(read("ray_cluster.yaml"))
    assert "security_group" not in config["provider"]
    before = copy.deepcopy(config["available_node_types"])
    assert _configure_security_group(config)["available_node_types"] == before
    assert len({tuple(node["node_config"]["SecurityGroupIds"]) for node in before.values()}) == 1


def test_where_nodes_come_when_asked_for_a_sweep_says_how_many_it_wants() -> None:
    whole = r"python sweeps/k_grid.py --address auto[^\n`]*(?:\n +--[^\n`]*)*"
    texts = [(ROOT / name).read_text() for name in ("README.md", "deploy/kuberay_job.yaml")]
    commands = [line for text in texts for line in re.findall(whole, text)]
    waiting = [line for line in commands if "--wait-for-nodes" in line]
    assert len(waiting) >= 3 and all("--max-concurrent" in line for line in waiting)


def test_the_head_is_told_its_address_by_itself() -> None:
    """Ray's launcher sets RAY_HEAD_IP for workers only; on the head, `ray start --node-ip-address=` is refused."""
    for name in LAUNCHER:
        assert not [line for line in read(name)["head_start_ray_commands"] if "RAY_HEAD_IP" in line]
    own = read("deploy/on_premise.yaml")
    start = next(line for line in own["head_start_ray_commands"] if "ray start" in line)
    assert f"--node-ip-address={own['provider']['head_ip']} " in start
    assert "RAY_enable_autoscaler_v2=0 " in start  # the second starts a worker too few


@pytest.mark.parametrize("name", LAUNCHER)
def test_the_files_of_secrets_are_made_as_ray_has_them_typed(name: str, tmp_path: Path) -> None:
    """Ray wraps each command (`... && (COMMAND)`) before a shell reads it; these really run, in a home of their own."""
    home = tmp_path / "home"
    (home / ".ray").mkdir(parents=True)
    (home / "slimsweep").symlink_to(ROOT)
    (home / "venv").symlink_to(sys.prefix)
    (home / ".bashrc").write_text("")
    for secret in ("auth_token", "mlflow_password"):
        (home / ".ray" / secret).write_text("0123456789abcdef\n")
    config = read(name)
    lines = [line for line in config["setup_commands"] if "shared" not in line and "pip" not in line]
    assert len(lines) == 2
    for line in [*lines, *config["head_setup_commands"]] * 2:  # setup runs again at every `ray up`
        words = shlex.split(" ".join(_with_interactive(line)))
        env = {"HOME": str(home), "PATH": "/usr/bin:/bin"}
        done = subprocess.run(words, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, f"{line}: {done.stderr}"
    made = {path.name: path.stat().st_mode & 0o777 for path in (home / ".ray").iterdir()}
    assert made == dict.fromkeys(("auth_token", "mlflow_password", "mlflow.env"), 0o600)
    assert (home / ".bashrc").read_text().count("\n") == 2
    shell = shlex.split(" ".join(_with_interactive("echo $RAY_AUTH_MODE $MLFLOW_TRACKING_PASSWORD; command -v ray")))
    seen = subprocess.run(shell, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout.split()
    assert seen == ["token", "0123456789abcdef", str(home / "venv" / "bin" / "ray")]


def test_workers_of_the_cloud_are_spot_gpus_with_labels_and_the_head_runs_no_trials() -> None:
    config = read("ray_cluster.yaml")
    types = dict(config["available_node_types"])
    head = types.pop(config["head_node_type"])
    assert head["resources"] == {"CPU": 0, "GPU": 0} and "InstanceMarketOptions" not in head["node_config"]
    for worker in types.values():
        assert worker["resources"]["GPU"] >= 1 and worker["min_workers"] == 0 < worker["max_workers"]
        assert worker["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
        assert int(worker["labels"]["gpu-memory-gb"]) > 0 and worker["labels"]["ray.io/accelerator-type"]


def test_the_manifests_of_kubernetes_fit_together() -> None:
    documents = list(yaml.safe_load_all((ROOT / "deploy" / "kuberay.yaml").read_text()))
    assert [one["kind"] for one in documents] == [*["PersistentVolumeClaim"] * 2, "NetworkPolicy", "RayCluster"]
    by_kind = {document["kind"]: document for document in documents}
    cluster, job = by_kind["RayCluster"], yaml.safe_load((ROOT / "deploy" / "kuberay_job.yaml").read_text())
    assert job["kind"] == "RayJob"
    assert job["spec"]["clusterSelector"]["ray.io/cluster"] == cluster["metadata"]["name"]
    assert cluster["apiVersion"] == job["apiVersion"] == "ray.io/v1"
    spec = cluster["spec"]
    pinned = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned and spec["rayVersion"] == pinned[1] and spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    claims = {one["metadata"]["name"]: one["spec"]["accessModes"] for one in documents[:2]}
    assert claims == {"shared": ["ReadWriteMany"], "mlflow": ["ReadWriteOnce"]}
    selected = by_kind["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        template = group["template"]
        assert selected.items() <= template["metadata"]["labels"].items(), "the policy passes this pod by"
        pod = template["spec"]
        volumes = {v["name"]: v for v in pod["volumes"]}
        assert "shared" in volumes and all(v["persistentVolumeClaim"]["claimName"] in claims for v in volumes.values())
        assert pod["securityContext"]["runAsNonRoot"]
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes.keys()
    mlflow = spec["headGroupSpec"]["template"]["spec"]["containers"][1]
    assert mlflow["volumeMounts"][0]["name"] == "mlflow", "the runs would end with the pod"
    assert f"mlflow_server.sh {mlflow['volumeMounts'][0]['mountPath']}/" in mlflow["command"][-1]
    worker = spec["workerGroupSpecs"][0]
    assert worker["minReplicas"] == 0 < worker["maxReplicas"] and worker["labels"]["gpu-memory-gb"]
    limits = worker["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "1"


def test_the_commands_that_the_manifests_give_are_taken_by_the_scripts() -> None:
    """Every sweep command in them, with its own flags, as a dry run of its parser."""
    from sweeps import flags

    for name in (*LAUNCHER, "deploy/kuberay_job.yaml"):
        text = re.sub(r"\s*\n#?\s*", " ", (ROOT / name).read_text())
        for found in re.findall(r"sweeps/k_grid\.py ([^.']*?)(?: \.\.\.|')", text):
            given = flags.parse("doc", found.split())
            assert given.address == "auto" and given.profile == "full" and str(given.storage) == "/shared/runs"


def test_the_environment_of_mlflow_is_for_a_shell_to_read(tmp_path: Path) -> None:
    script = ROOT / "deploy" / "mlflow_env.py"
    secret = tmp_path / "password"
    secret.write_text("0123456789abcdef\n")
    command = [sys.executable, str(script), str(secret)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    shell = ["env", "-i", "sh", "-c", f"set -a; {out}\nenv"]
    seen = subprocess.run(shell, capture_output=True, text=True, check=True).stdout
    assert "MLFLOW_TRACKING_PASSWORD=0123456789abcdef" in seen and "MLFLOW_AUTH_ADMIN_PASSWORD=" in seen
    for bad in ("short", "has space in it", "$(reboot)aaaaaaaaaaaa", ""):
        secret.write_text(bad)
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.startswith("error: ") and not done.stdout
        assert not bad or bad not in done.stderr, "the refusal shows the password"


@pytest.mark.parametrize("name", [*LAUNCHER, "deploy/kuberay_job.yaml", "README.md"])
def test_the_sweeps_that_are_started_take_the_flags_that_they_are_given(name: str) -> None:
    text = (ROOT / name).read_text().replace("\\\n", " ")
    commands = re.findall(r"python (?:/\S+/)?sweeps/k_grid\.py([^'`\n#|]*)", text)
    assert commands or name in LAUNCHER
    for words in commands:
        flags.parse("", shlex.split(words.replace("...", "")))
