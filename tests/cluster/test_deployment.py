"""The README's deployment section on hosts that are network namespaces, from nothing: its lines typed on a laptop, so
`ray up deploy/on_premise.yaml` over ssh, k_grid on two workers with the MLflow server's login, a host that dies, the
driver that dies, and the rest as a Ray job.
"""

import contextlib
import ipaddress
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sweeps.journal import SweepState, read_events

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from faults import at_work
from namespaces import ROOT, Host, joined_hosts, missing

pytestmark = [pytest.mark.cluster, pytest.mark.slow]  # some six minutes
EPOCHS = 8
SMALL = dict(
    epochs=EPOCHS, grace=EPOCHS, samples_per_epoch=256, train_samples=256, val_pairs=16, test_pairs=16, repeats=5,
    warmup=1, scene_steps=5, scene_repeats=2,
)  # fmt: skip
WAIT_S = 400.0
TOOLS = ("sshd", "ssh-keygen", "rsync", "tmux", "script", "openssl", "ss", "curl")


@dataclass(frozen=True)
class Cluster:
    """alpha: the head, without cores for trials; beta, gamma: workers. shared: the storage, from outside of them."""

    alpha: Host
    beta: Host
    gamma: Host
    laptop: Host
    shared: Path

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
        """What a user types in the project's folder on the head."""
        words = "python sweeps/k_grid.py --address auto --profile demo --cpus-per-trial 1 --max-concurrent 3"
        words += f" --wait-for-nodes 5 --storage {self.shared.with_name('storage')}/runs --tracking-uri http://127.0.0.1:5000"
        return words + "".join(f" --set {key}={value}" for key, value in SMALL.items())


def home(host: Host) -> Path:
    return host.folder / "home"


def typed(host: Host, line: str) -> list[str]:
    """A line as it is typed in a shell of that host, in the project's folder."""
    env = [f"HOME={home(host)}", "TERM=xterm", f"PATH={home(host)}/venv/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
    return host.inside("env", "-i", *env, "bash", "-c", f". ~/.bashrc; cd ~/slimsweep; {line}")


def run(host: Host, line: str, timeout: float = WAIT_S) -> str:
    """What it prints, to either stream; AssertionError where it fails."""
    done = subprocess.run(
        typed(host, line), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, f"{line}: {done.stdout[-3000:]}"
    return done.stdout


def readme(number: int) -> list[str]:
    """The commands of the deployment section's block `number`, as they stand there."""
    section = (ROOT / "README.md").read_text().partition("## Run on a cluster")[2]
    block = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)[number]
    return [re.sub(r"\s{2,}#.*", "", line) for line in block.replace("\\\n", "").splitlines()]


def move_in(host: Host) -> None:
    """A home of its own for the machine's user, and an environment of which it alone sees its changes.

    pip finds everything installed but the project, and asks no network for the rest.
    """
    place = home(host)
    (place / ".ssh").mkdir(parents=True, mode=0o700)
    users = (host.folder / "passwd", Path("/etc/passwd"))
    own = re.sub(r"^((?:[^:\n]*:){2}0:0:[^:]*:)[^:]*", rf"\g<1>{place}", users[1].read_text(), flags=re.MULTILINE)
    users[0].write_text(own)
    host.mount(*users)
    upper, work = host.folder / "venv", host.folder / "venv.work"
    upper.mkdir(), work.mkdir()
    layers = f"lowerdir={sys.prefix},upperdir={upper},workdir={work}"
    host.call("mount", "-t", "overlay", "overlay", "-o", layers, sys.prefix)
    (place / "venv").symlink_to(sys.prefix)
    # pip takes the value of a --no-... option for that of the option without no.
    lines = ("PIP_NO_INDEX=1", "PIP_NO_BUILD_ISOLATION=0", "RAY_USAGE_STATS_ENABLED=0")
    shutil.copytree("/etc/skel", place, dirs_exist_ok=True)  # as a new user's
    first = "".join(f"export {line}\n" for line in lines)
    (place / ".bashrc").write_text(first + (place / ".bashrc").read_text())


def listen(host: Host, key: str) -> None:
    """An ssh server for who holds the key."""
    (home(host) / ".ssh" / "authorized_keys").write_text(key)
    Path("/run/sshd").mkdir(exist_ok=True)
    own = host.folder / "host_key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", own], check=True)
    host.start_process(
        [shutil.which("sshd") or "", "-D", "-e", "-f", "/dev/null", "-h", str(own)], host.folder / "sshd.log"
    )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if why := missing():
        pytest.skip(why)
    pytest.importorskip("flask_wtf", reason="mlflow[auth] is not installed")
    for tool in TOOLS:
        if not shutil.which(tool):
            pytest.skip(f"no {tool} here (apt-get install openssh-server rsync tmux curl)")
    folder = tmp_path_factory.mktemp("d")
    with joined_hosts(folder, names=("alpha", "beta", "gamma", "laptop")) as (alpha, beta, gamma, laptop):
        for host in (alpha, beta, gamma, laptop):
            move_in(host)
        key = home(laptop) / ".ssh" / "id_ed25519"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        for host in (alpha, beta, gamma):
            host.mount(folder / "shared", folder / "storage")
            listen(host, key.with_suffix(".pub").read_text())
        project = home(laptop) / "slimsweep"
        subprocess.run(["rsync", "-a", "--filter=:- .gitignore", "--exclude=.git", f"{ROOT}/", project], check=True)
        config = project / "deploy" / "on_premise.yaml"
        changes = {
            "10.0.0.1": alpha.address, "[10.0.0.2, 10.0.0.3]": f"[{beta.address}, {gamma.address}]",
            "ssh_user: ubuntu": "ssh_user: root", " /shared": f" {folder}/storage",
            # The hosts share this machine's memory and cores; each would take them all.
            "ray start --head": "ray start --object-store-memory=100000000 --head",
            "ray start --address": "ray start --object-store-memory=100000000 --num-cpus=2 --address",
        }  # fmt: skip
        text = config.read_text()
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        config.write_text(text)
        install, token, password, up, *_ = readme(0)
        for line in (install, token, password, up.replace("ray_cluster.yaml", "-y deploy/on_premise.yaml")):
            print(line, run(laptop, line))
        yield Cluster(alpha, beta, gamma, laptop, folder / "shared")


def processes(host: Host) -> dict[int, str]:
    """All that run on a host, with what they were started with."""
    space, found = os.readlink(f"/proc/{host.pid}/ns/net"), {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(path / "ns" / "net") == space:
                found[int(path.name)] = (path / "cmdline").read_text().replace("\0", " ")
    return found


def drivers(host: Host) -> list[int]:
    return [pid for pid, line in processes(host).items() if line.startswith("python sweeps/k_grid.py")]


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
    alpha, beta, gamma, laptop = cluster.alpha, cluster.beta, cluster.gamma, cluster.laptop
    screen = laptop.folder / "screen"
    attach = readme(0)[4].replace("ray_cluster.yaml", "deploy/on_premise.yaml")
    shell = subprocess.Popen(
        typed(laptop, f"exec script --quiet --flush --command {shlex.quote(attach)} {screen}"),
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
    )  # fmt: skip

    def wait(what: str, done: Callable[[], object], driver: bool = True) -> None:
        """Until `done`, while the shell on the head is there (and the driver, if it is to be)."""
        end = time.monotonic() + WAIT_S
        while not done():
            alive = shell.poll() is None and (not driver or drivers(alpha))
            assert time.monotonic() < end and alive, f"{what}: in vain. {screen.read_text(errors='replace')[-3000:]}"
            time.sleep(0.3)

    assert shell.stdin
    wait("a shell on the head", lambda: any("tmux" in line for line in processes(alpha).values()), driver=False)
    shell.stdin.write(f"cd ~/slimsweep && {cluster.command}\n".encode())
    shell.stdin.flush()
    wait("a driver", lambda: drivers(alpha), driver=False)
    wait("training on both workers", lambda: all(list(at_work(host)) for host in (beta, gamma)))
    wait("two epochs", lambda: sum(trial.epoch for trial in cluster.state.trials.values()) >= 2)

    # Beyond the loopback Ray listens, which asks for its token, and sshd; MLflow and the dashboard do not.
    here = [line for host in (alpha, beta, gamma, laptop) for line in processes(host).values()]
    assert any("mlflow" in line for line in here) and any("k_grid.py" in line for line in here)
    for host in (alpha, beta, gamma, laptop):
        outside = listeners(host)
        assert not {5000, 8265} & outside.keys(), outside
        assert bool(outside) == (host is not laptop)
        assert not [who for who in outside.values() if "mlflow" in who or "gunicorn" in who or "uvicorn" in who]
    loopback = alpha.call("ss", "--tcp", "--listening", "--numeric", "--no-header")
    assert "127.0.0.1:5000" in loopback and "127.0.0.1:8265" in loopback
    token, password = ((home(laptop) / ".ray" / name).read_text().strip() for name in ("auth_token", "mlflow_password"))
    assert len(token) >= 32 and len(password) == 32
    assert not [line for line in here for secret in (token, password) if secret in line]

    beta.kill()
    running = {key: trial.epoch for key, trial in cluster.state.trials.items() if trial.results and not trial.stop}
    wait(
        "a new epoch of every trial that ran",
        lambda: all(trial.epoch > running.get(key, -1) or trial.stop for key, trial in cluster.state.trials.items()
                    if key in running),
    )  # fmt: skip
    for pid in drivers(alpha):
        os.kill(pid, signal.SIGKILL)
    assert cluster.state.ended is None, "the driver was to die in the middle"

    # From the laptop, to which the shell forwards the head's port.
    submit = " ".join(readme(1))
    full = re.search(r"python sweeps/k_grid.py [^']*", submit)
    assert full
    said = run(laptop, submit.replace(full[0], f"{cluster.command} --resume"))
    number = re.search(r"raysubmit_\w+", said)
    assert number, said
    ask = f"RAY_AUTH_MODE=token ray job {{}} --address http://127.0.0.1:8265 {number[0]}"
    wait("the job's driver", lambda: drivers(alpha), driver=False)
    end = time.monotonic() + WAIT_S
    while cluster.state.ended is None:  # rather than ask again and again: Ray's command line takes seconds to start
        assert time.monotonic() < end and drivers(alpha), run(laptop, ask.format("logs"))
        time.sleep(1)
    said += run(laptop, ask.format("logs --follow"))
    said += run(laptop, ask.format("status"))
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

    # The server has each of them once, shows itself on the laptop, and lets nobody in without the login.
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
    ask = "curl --silent --output /dev/null --write-out %{http_code} http://127.0.0.1:5000/api/2.0/mlflow/experiments/get-by-name"
    assert run(laptop, f"{ask}?experiment_name=Default").endswith("401")
    known = f"{ask}?experiment_name=Default --config <(echo user = admin:$(cat ~/.ray/mlflow_password))"
    assert run(laptop, known).endswith("200")

    # The runs come home, and the cluster ends; one host of it is dead already.
    home_again, down, _ = (line.replace("ray_cluster.yaml", "deploy/on_premise.yaml") for line in readme(2))
    run(laptop, home_again)
    with contextlib.closing(sqlite3.connect(home(laptop) / "slimsweep" / "mlflow" / "mlflow.db")) as store:
        assert store.execute("select count(*) from runs").fetchone() == (5,)
    assert list((home(laptop) / "slimsweep" / "mlflow" / "artifacts").rglob("pareto.html"))
    assert any("raylet" in line for line in processes(gamma).values())
    run(laptop, down + " --yes")
    end = time.monotonic() + WAIT_S  # a worker's Ray ends when it has missed its head for a minute
    while any("raylet" in line for host in (alpha, gamma) for line in processes(host).values()):
        assert time.monotonic() < end, "Ray still runs"
        time.sleep(1)

    # Token and password stand in their own files of mode 600, and nowhere else.
    hosts = (alpha, beta, gamma, laptop)
    own = {home(host) / ".ray" / name for host in hosts for name in ("auth_token", "mlflow_password", "mlflow.env")}
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in own if path.exists())
    places = (cluster.shared, *(host.folder for host in hosts))
    written = [path for place in places for path in place.rglob("*") if path.is_file() and not path.is_symlink()]
    assert {"journal.jsonl", "mlflow.db", "screen", "server.log"} <= {path.name for path in written}
    leaks = [path for path in written if path not in own
             for secret in (token, password) if secret.encode() in path.read_bytes()]  # fmt: skip
    assert not leaks
    assert password not in said and token not in said
