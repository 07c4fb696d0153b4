"""The README's deployment section on three hosts that are network namespaces, from nothing: deploy/on_premise.yaml's
commands as Ray's launcher types them, k_grid on both workers with the MLflow server's login, a host that dies, the
driver that dies, and the rest as a Ray job.
"""

import contextlib
import ipaddress
import os
import shlex
import shutil
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml
from ray.autoscaler._private.command_runner import _with_interactive

from sweeps.journal import SweepState, read_events

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from faults import at_work
from namespaces import ROOT, Host, joined_hosts, missing

pytestmark = [pytest.mark.cluster, pytest.mark.slow]  # four minutes
PASSWORD, TOKEN = "fedcba98765432100123456789abcdef", "0123456789abcdef" * 2
EPOCHS, HEAD = 8, "10.213.0.1"
SMALL = dict(
    epochs=EPOCHS, grace=EPOCHS, samples_per_epoch=256, train_samples=256, val_pairs=16, test_pairs=16, repeats=5,
    warmup=1, scene_steps=5, scene_repeats=2,
)  # fmt: skip
WAIT_S = 400.0


@dataclass(frozen=True)
class Cluster:
    """alpha: the head, without cores for trials; beta, gamma: workers. shared: the storage, from outside of them."""

    alpha: Host
    beta: Host
    gamma: Host
    shared: Path

    @property
    def storage(self) -> Path:
        """The storage, as the hosts see it."""
        return self.shared.with_name("storage")

    @property
    def sweep(self) -> Path:
        """The sweep's folder, from outside."""
        return self.shared / "runs" / "k_grid_demo_seed42"

    @property
    def state(self) -> SweepState:
        path = self.sweep / "journal.jsonl"
        return SweepState.replay(path) if path.is_file() else SweepState()

    @property
    def command(self) -> str:
        """What a user types in the project's folder."""
        words = "python sweeps/k_grid.py --address auto --profile demo --cpus-per-trial 1"
        words += f" --storage {self.storage}/runs --tracking-uri http://127.0.0.1:5000"
        return words + "".join(f" --set {key}={value}" for key, value in SMALL.items())


def home(host: Host) -> Path:
    return host.folder / "home"


def typed(host: Host, line: str) -> list[str]:
    """A line as Ray's launcher has it typed in the user's login shell there."""
    return ["env", "-i", f"HOME={home(host)}", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "OMP_NUM_THREADS=1",
            "RAY_worker_niceness=0", "RAY_USAGE_STATS_ENABLED=0",
            f"RAY_HEAD_IP={HEAD}", *shlex.split(" ".join(_with_interactive(line)))]  # fmt: skip


def run(host: Host, line: str, timeout: float = WAIT_S) -> str:
    """What it prints, to either stream; AssertionError where it fails."""
    done = subprocess.run(
        host.inside(*typed(host, line)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, f"{line}: {done.stdout[-3000:]}"
    return done.stdout


def wait(what: str, done: Callable[[], object], driver: subprocess.Popen[bytes], log: Path) -> None:
    """Until `done`, while the driver lives."""
    end = time.monotonic() + WAIT_S
    while not done():
        assert time.monotonic() < end and driver.poll() is None, f"{what}: in vain. {log.read_text()[-3000:]}"
        time.sleep(0.3)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if why := missing():
        pytest.skip(why)
    pytest.importorskip("flask_wtf", reason="mlflow[auth] is not installed")
    for tool in ("ss", "curl"):
        if not shutil.which(tool):
            pytest.skip(f"no {tool} here")
    folder = tmp_path_factory.mktemp("d")
    config = yaml.safe_load((ROOT / "deploy" / "on_premise.yaml").read_text())
    with joined_hosts(folder, names=("alpha", "beta", "gamma")) as (alpha, beta, gamma):
        for host in (alpha, beta, gamma):
            host.mount(folder / "shared", folder / "storage")
            # What file_mounts copies, and what pip would install.
            (home(host) / ".ray").mkdir(parents=True)
            (home(host) / "slimsweep").symlink_to(ROOT)
            (home(host) / "venv").symlink_to(sys.prefix)
            (home(host) / ".bashrc").touch()
            for name, secret in (("auth_token", TOKEN), ("mlflow_password", PASSWORD)):
                (home(host) / ".ray" / name).write_text(secret)
            for line in config["setup_commands"]:
                if "pip install" not in line:  # the environment is this one
                    run(host, line.replace("/shared", str(folder / "storage")))
        for line in config["head_setup_commands"]:
            run(alpha, line)
        started = [(alpha, line) for line in config["head_start_ray_commands"]]
        started += [(host, line) for host in (beta, gamma) for line in config["worker_start_ray_commands"]]
        for host, line in started:
            if line != "ray stop":  # nothing is there to be stopped
                line = line.replace("10.0.0.1", HEAD).replace("--autoscaling-config=~/ray_bootstrap_config.yaml", "")
                # A worker's cores are said: it would take this machine's, which the hosts share.
                line += " --num-cpus=2" if host is not alpha else ""
                run(host, line + (" --object-store-memory=100000000" if "ray start" in line else ""))
        yield Cluster(alpha, beta, gamma, folder / "shared")


def processes(host: Host) -> dict[int, str]:
    """All that run on a host, with what they were started with."""
    space, found = os.readlink(f"/proc/{host.pid}/ns/net"), {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(path / "ns" / "net") == space:
                found[int(path.name)] = (path / "cmdline").read_text().replace("\0", " ")
    return found


def listeners(host: Host) -> dict[int, str]:
    """Ports on which somebody listens beyond the loopback, and who."""
    lines = host.call("ss", "--tcp", "--listening", "--numeric", "--processes", "--no-header").splitlines()
    found = {}
    for line in lines:
        fields = line.split()
        address, _, port = fields[3].rpartition(":")
        address = address.strip("[]").partition("%")[0]
        if address == "*" or not ipaddress.ip_address(address).is_loopback:
            found[int(port)] = fields[5] if len(fields) > 5 else "?"
    return found


def test_a_sweep_outlives_a_host_and_its_driver_and_ends_as_a_job(cluster: Cluster) -> None:
    alpha, beta, gamma = cluster.alpha, cluster.beta, cluster.gamma
    log = alpha.folder / "driver.log"
    driver = alpha.start_process(typed(alpha, f"cd ~/slimsweep && {cluster.command}"), log)
    wait("training on both workers", lambda: all(list(at_work(host)) for host in (beta, gamma)), driver, log)
    wait("two epochs", lambda: sum(trial.epoch for trial in cluster.state.trials.values()) >= 2, driver, log)

    # Beyond the loopback Ray alone listens, which asks for its token; MLflow and the dashboard do not.
    here = [line for host in (alpha, beta, gamma) for line in processes(host).values()]
    assert any("mlflow" in line for line in here) and any("k_grid.py" in line for line in here)
    for host in (alpha, beta, gamma):
        outside = listeners(host)
        assert outside and not {5000, 8265} & outside.keys(), outside
        assert not [who for who in outside.values() if "mlflow" in who or "gunicorn" in who or "uvicorn" in who]
    loopback = alpha.call("ss", "--tcp", "--listening", "--numeric", "--no-header")
    assert "127.0.0.1:5000" in loopback and "127.0.0.1:8265" in loopback
    assert not [line for line in here for secret in (TOKEN, PASSWORD) if secret in line]

    beta.kill()
    running = {key: trial.epoch for key, trial in cluster.state.trials.items() if trial.results and not trial.stop}
    wait(
        "a new epoch of every trial that ran",
        lambda: all(trial.epoch > running.get(key, -1) or trial.stop for key, trial in cluster.state.trials.items()
                    if key in running),
        driver, log,
    )  # fmt: skip
    for one in (*psutil.Process(driver.pid).children(recursive=True), psutil.Process(driver.pid)):
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    driver.wait()
    before = cluster.state
    assert before.ended is None, "the driver was to die in the middle"

    job = f"set -a; . ~/.ray/mlflow.env; cd ~/slimsweep; {cluster.command} --resume"
    submit = "RAY_AUTH_MODE=token ray job submit --address http://127.0.0.1:8265 --no-wait --submission-id rest -- "
    run(alpha, submit + shlex.join(["sh", "-c", job]))
    ask = "RAY_AUTH_MODE=token ray job {} --address http://127.0.0.1:8265 rest"
    end = time.monotonic() + WAIT_S
    while cluster.state.ended is None:  # rather than ask again and again: Ray's command line takes seconds to start
        assert time.monotonic() < end, run(alpha, ask.format("logs"))
        time.sleep(1)
    said = run(alpha, ask.format("logs --follow"))
    said += run(alpha, ask.format("status"))
    assert "succeeded" in said, said[-3000:]

    state = cluster.state
    assert state.ended == "finished"
    trials = [trial for trial in state.trials.values() if trial.role == "trial"]
    assert len(trials) == 3 and all(trial.record and trial.record["verdict"] in ("pass", "fail") for trial in trials)
    reported = Counter(
        (event["trial_id"], event["epoch"])
        for event in read_events(cluster.sweep / "journal.jsonl")
        if event["event"] == "result"
    )
    assert set(reported) == {(trial.trial_id, epoch) for trial in trials for epoch in range(1, EPOCHS + 1)}
    assert set(reported.values()) == {1}

    # The server has each of them once, and let nobody in without the login.
    with contextlib.closing(sqlite3.connect(home(alpha) / "mlflow" / "mlflow.db")) as store:
        steps = store.execute(
            "select name, step, count(*) from runs join metrics using (run_uuid) where key = 'val_drop' and step > 0 "
            "group by run_uuid, step"
        ).fetchall()
        statuses = Counter(status for (status,) in store.execute("select status from runs"))
    assert {(name, step) for name, step, _ in steps} == {
        (trial.exp_id, epoch) for trial in trials for epoch in range(1, EPOCHS + 1)
    } and {count for *_, count in steps} == {1}
    assert set(statuses) == {"FINISHED"} and statuses["FINISHED"] == 5, statuses  # sweep, teacher, three trials
    anyone = "curl --silent --output /dev/null --write-out %{http_code} http://127.0.0.1:5000/api/2.0/mlflow/experiments/get-by-name"
    assert run(alpha, f"{anyone}?experiment_name=Default").endswith("401")

    # Token and password stand in their own files of mode 600, and nowhere else.
    own = {home(host) / ".ray" / name for host in (alpha, beta, gamma)
           for name in ("auth_token", "mlflow_password", "mlflow.env")}  # fmt: skip
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in own if path.exists())
    places = (cluster.shared, *(host.folder for host in (alpha, beta, gamma)))
    written = [path for place in places for path in place.rglob("*") if path.is_file() and not path.is_symlink()]
    assert {"journal.jsonl", "mlflow.db", "driver.log", "server.log"} <= {path.name for path in written}
    leaks = [path for path in written if path not in own
             for secret in (TOKEN, PASSWORD) if secret.encode() in path.read_bytes()]  # fmt: skip
    assert not leaks
    assert PASSWORD not in said and TOKEN not in said
