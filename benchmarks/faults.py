"""What a sweep over two hosts loses to each fault: nothing, or this says how much.

    python benchmarks/faults.py                            # all faults, about two minutes each; needs root
    python benchmarks/faults.py worker_killed network_cut

The hosts are network namespaces with Ray, a token, shared storage and a real MLflow server on the head. A fault strikes
while three trials train, at least one of them on the second host. Lost: epochs, MLflow steps, records and ends of runs
that are missing at the end; duplicated: those that stand twice, and processes of trials that outlive the sweep. Seconds
to recover: from the fault (from the repair, where nothing can go on before it) until every trial that was running has
reported a new epoch.
"""

import argparse
import contextlib
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from namespaces import RAY, ROOT, Host, joined_hosts, missing, no_memory_limits

from sweeps.journal import SweepState, read_events

TOY = ROOT / "tests" / "sweeps" / "toy_sweep.py"
EPOCHS, WAIT_S, CUT_S = 15, 400.0, 60.0
MLFLOW, PROXY = 5000, 5001
WRONG = {"always": "failed", "greedy": "out_of_memory"}  # trials that cannot end well, and how they are to end


@dataclass(frozen=True)
class Outcome:
    """What one fault cost."""

    fault: str
    lost: tuple[str, ...]
    duplicated: tuple[str, ...]
    recover_s: float | None


@dataclass
class Run:
    """One sweep of three trials on two hosts, alpha (the head, two cores) and beta (one core)."""

    alpha: Host
    beta: Host
    folder: Path
    port: int = MLFLOW
    trials: str = "steady"
    flags: tuple[str, ...] = ()
    mlflow: subprocess.Popen[bytes] | None = None
    driver: subprocess.Popen[bytes] | None = None
    began: float = field(default_factory=time.time)
    struck: float = 0.0
    running: dict[str, int] = field(default_factory=dict)

    @property
    def shared(self) -> Path:
        """The shared storage, seen from outside of both hosts."""
        return self.folder / "shared"

    @property
    def journal(self) -> Path:
        """The journal, from outside."""
        return self.shared / "toy_small_seed42" / "journal.jsonl"

    @property
    def state(self) -> SweepState:
        """What the journal says now."""
        return SweepState.replay(self.journal) if self.journal.is_file() else SweepState()

    def serve(self) -> None:
        """Start the MLflow server on the head."""
        place = self.alpha.folder / "mlflow"
        place.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
        command += ["--host", "127.0.0.1", "--port", str(MLFLOW), "--backend-store-uri", f"sqlite:///{place}/runs.db"]
        command += ["--artifacts-destination", str(place / "files")]
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self.mlflow = self.alpha.start_process(command, place / "log", **quiet)
        look = f"import urllib.request as u; u.urlopen('http://127.0.0.1:{MLFLOW}/health', timeout=5)"
        wait(
            "MLflow",
            lambda: not subprocess.run(self.alpha.inside(sys.executable, "-c", look), capture_output=True).returncode,
        )

    def drive(self, *more: str) -> None:
        """Start a driver on the head."""
        command = [sys.executable, str(TOY), "--address", "auto", "--storage", str(self.folder / "storage")]
        command += ["--tracking-uri", f"http://127.0.0.1:{self.port}", *self.flags, *more]
        env = {"TOY_TRIALS": self.trials, "TOY_SLEEP": "1.5", "TOY_EPOCHS": str(EPOCHS)}
        self.driver = self.alpha.start_process(command, self.folder / "driver.log", **env)

    def until_training(self, epochs: int = 9) -> None:
        """Until the trials have together reported so many epochs and beta has run one of them."""

        def training() -> bool:
            hosts = {place.read_text() for place in self.journal.parent.glob("trials/*/host")}
            enough = sum(trial.epoch for trial in self.state.trials.values()) >= epochs
            return enough and (self.trials != "steady" or "beta" in hosts)

        try:
            wait("training (on beta too)", training, self.driver)
        except RuntimeError as error:
            raise RuntimeError(f"{error}: {(self.folder / 'driver.log').read_text()[-2000:]}") from None
        # Seen here, or one that is left over would not be seen either.
        wait("the look at trials' processes", lambda: bool(list(at_work(self.alpha))), self.driver)

    def strike(self) -> None:
        """The fault is now (or its repair): what was running has to report again from here on."""
        self.struck = time.time()
        self.running = {
            key: trial.epoch for key, trial in self.state.trials.items() if trial.results and not trial.stop
        }

    def finish(self, code: int | None = 0) -> None:
        """Wait for the driver's end; RuntimeError for another exit code. None: any but 0."""
        if not self.driver:
            raise RuntimeError("no driver was started")
        found = self.driver.wait(WAIT_S)
        if (found == 0) if code is None else (found != code):
            raise RuntimeError(f"exit code {found}: {(self.folder / 'driver.log').read_text()[-2000:]}")

    def kill(self, process: subprocess.Popen[bytes] | None) -> None:
        """SIGKILL to what was started inside, with its children."""
        if process:
            for one in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            process.wait()

    def drain(self, host: Host, seconds: int) -> None:
        """Ray is told that the host will be taken away, as a spot instance is; nothing else happens to it."""
        spot = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        host.call(RAY, "drain-node", *spot, "--deadline-remaining-seconds", str(seconds))

    def recovered_s(self) -> float | None:
        """Seconds from the strike until all that was running had a new epoch; infinite where one never had, None where
        nothing had to recover.
        """
        if not self.running:
            return None
        first: dict[str, float] = {}
        for event in read_events(self.journal):
            if event["event"] == "result" and event["t"] > self.struck:
                first.setdefault(event["trial_id"], event["t"])
        return max(first.get(key, float("inf")) for key in self.running) - self.struck


def wait(what: str, done: Callable[[], bool], process: subprocess.Popen[bytes] | None = None) -> None:
    """Until `done`; RuntimeError after a while, or when `process` ends before."""
    end = time.monotonic() + WAIT_S
    while not done():
        ended = process.poll() if process else None
        if time.monotonic() > end or ended is not None:
            raise RuntimeError(f"{what}: waited in vain" + ("" if ended is None else f", exit code {ended}"))
        time.sleep(0.2)


def account(run: Run) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What is lost and what stands twice, in the journal, in MLflow and among the processes."""
    lost, twice = [], []
    state = run.state
    lines = Counter((e["trial_id"], e["epoch"]) for e in read_events(run.journal) if e["event"] == "result")
    twice += [f"journal: epoch {epoch} of {key}" for (key, epoch), count in lines.items() if count > 1]
    if state.ended != "finished":
        lost.append(f"the sweep's end ({state.ended})")
    with contextlib.closing(sqlite3.connect(run.alpha.folder / "mlflow" / "runs.db")) as store:
        runs = store.execute("select run_uuid, name, status from runs").fetchall()
        steps = {
            uuid: Counter(s for (s,) in store.execute(
                "select step from metrics where run_uuid = ? and key = 'val_drop'", (uuid,)))
            for uuid, _, _ in runs
        }  # fmt: skip
    names = Counter(name for _, name, _ in runs)
    twice += [f"MLflow: run {name}" for name, count in names.items() if count > 1]
    lost += [f"MLflow: end of {name} ({status})" for _, name, status in runs if status == "RUNNING"]
    by_name = {name: uuid for uuid, name, _ in runs}
    for trial in state.trials.values():
        wrong = next((reason for name, reason in WRONG.items() if name in trial.exp_id), None)
        whole = set(range(1, trial.epoch + 1 if wrong else EPOCHS + 1))
        if trial.role == "trial":
            there, sent = {epoch for epoch, _ in trial.results}, steps.get(by_name.get(trial.exp_id, ""), Counter())
            lost += [f"journal: epoch {epoch} of {trial.exp_id}" for epoch in sorted(whole - there)]
            lost += [f"MLflow: epoch {epoch} of {trial.exp_id}" for epoch in sorted(there - sent.keys())]
            twice += [f"MLflow: epoch {epoch} of {trial.exp_id}" for epoch, count in sent.items() if count > 1]
        record = trial.record or {}
        if not record.get("verdict") or (wrong and record["stop_reason"] != wrong):
            lost.append(f"verdict of {trial.exp_id} ({record.get('verdict')}, {record.get('stop_reason')})")
        if (record.get("cpu_hours") or 0) > (time.time() - run.began) / 3600:
            twice.append(f"hours of {trial.exp_id}: {record['cpu_hours']}")
    end = time.monotonic() + 20  # to end takes a process a moment
    while time.monotonic() < end and any(list(at_work(host)) for host in (run.alpha, run.beta)):
        time.sleep(0.5)
    twice += [f"process of a trial on {host.name}" for host in (run.alpha, run.beta) for _ in at_work(host)]
    return tuple(lost), tuple(twice)


def at_work(host: Host) -> Iterator[str]:
    """Processes of trials on a host, by what Ray calls them there."""
    if host.holder.poll() is None:
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                same = os.readlink(path / "ns" / "net") == os.readlink(f"/proc/{host.pid}/ns/net")
                if same and b"ray::ResourceTrainable" in (path / "cmdline").read_bytes():
                    yield path.name


# ------------------------------------------------------------------ the faults
def worker_killed(run: Run) -> None:
    """The second host loses its power."""
    run.strike()
    run.beta.kill()
    run.finish()


def killed_between_trials(run: Run) -> None:
    """Every worker dies just after the last report of each of its eight trials, while it becomes the next one."""
    run.finish()


def network_cut(run: Run) -> None:
    """The cable is out for a minute; both hosts live on."""
    run.strike()
    run.beta.cable(up=False)
    time.sleep(CUT_S)
    run.beta.cable(up=True)
    run.finish()


def head_killed(run: Run) -> None:
    """Ray on the head dies, and with it the driver. Started again (on the second host too, as what supervises Ray
    there does), the sweep goes on with --resume: what Ray knew is not kept, the journal is.
    """
    run.strike()
    run.kill(run.alpha.ray)
    run.finish(code=None)
    run.kill(run.beta.ray)
    run.alpha.start_ray(cpus=2)
    run.beta.start_ray(run.alpha, cpus=1)
    run.drive("--resume")
    run.finish()


def node_preempted(run: Run) -> None:
    """The second host has a notice of 20 s, and is gone then: its trial has left by that time."""
    run.drain(run.beta, seconds=20)
    gone = time.monotonic() + 20
    wait("leaving", lambda: not list(at_work(run.beta)))
    run.strike()
    if time.monotonic() > gone:
        raise RuntimeError("a trial was still on the host when it went")
    time.sleep(gone - time.monotonic())
    run.beta.kill()
    run.finish()


def clock_wrong(run: Run) -> None:
    """The second host's clock is an hour ahead, from the start on."""
    ahead = float(run.beta.call("date", "+%s")) - time.time()
    if abs(ahead - 3600) > 60:
        raise RuntimeError(f"the clock of beta is {ahead:.0f} s ahead")
    run.finish()


def out_of_memory(run: Run) -> None:
    """One trial takes all memory of its host, every time it is started: recorded as such, the other goes on."""
    run.finish()


def driver_killed(run: Run) -> None:
    """kill -9 of the driver and its MLflow mirror; then --resume."""
    run.strike()
    run.kill(run.driver)
    run.drive("--resume")
    run.finish()


def driver_and_mlflow_killed(run: Run) -> None:
    """Both at once; the server is started again, then the sweep."""
    run.strike()
    run.kill(run.mlflow)
    run.kill(run.driver)
    run.serve()
    run.drive("--resume")
    run.finish()


def mlflow_slow(run: Run) -> None:
    """Every call takes two seconds more, from the start on."""
    run.finish()


def storage_full(run: Run) -> None:
    """The shared disk fills up, which ends the sweep with a line that says so; freed, it goes on with --resume."""
    filler = run.shared / "filler"
    with contextlib.suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(bytes(1 << 16))
            file.flush()
    run.finish(code=2)
    filler.unlink()
    run.strike()
    run.drive("--resume")
    run.finish()


def trial_hangs(run: Run) -> None:
    """Two trials stop reporting, one of them again after it was started anew: that one is recorded as failed. A third
    raises once before every epoch, more often than a trial may fail at one place.
    """
    run.strike()
    run.running = {key: epoch for key, epoch in run.running.items() if "always" not in run.state.trials[key].exp_id}
    run.finish()


FAULTS = (
    worker_killed, killed_between_trials, network_cut, head_killed, driver_killed, driver_and_mlflow_killed,
    mlflow_slow, storage_full, node_preempted, clock_wrong, trial_hangs, out_of_memory,
)  # fmt: skip
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


def cannot(fault: Callable[[Run], None]) -> str | None:
    """Why this fault cannot be had here; None where it can."""
    if fault is clock_wrong and FAKETIME is None:
        return "no libfaketime here (apt-get install libfaketime)"
    return no_memory_limits() if fault is out_of_memory else missing()


def suffer(fault: Callable[[Run], None], folder: Path) -> Outcome:
    """Two fresh hosts, a sweep, the fault, and the account. folder: empty."""
    disk = folder / "shared"
    disk.mkdir()
    with contextlib.ExitStack() as after:
        if fault is storage_full:  # before the hosts start: later mounts would not be seen there
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "disk", str(disk)], check=True)
            after.callback(subprocess.run, ["umount", "--lazy", str(disk)], check=True)
        alpha, beta = after.enter_context(joined_hosts(folder))
        for host in (alpha, beta):
            host.mount(disk, folder / "storage")
        if fault is clock_wrong:
            beta.env |= {"LD_PRELOAD": str(FAKETIME), "FAKETIME": "+1h"}
        if fault is out_of_memory:
            alpha.limit_memory(6 << 30)
            beta.limit_memory(3 << 30)
        alpha.start_ray(cpus=2)
        beta.start_ray(alpha, cpus=1)
        run = Run(alpha, beta, folder)
        run.serve()
        if fault is mlflow_slow:
            run.port = PROXY
            alpha.start_process(
                [sys.executable, str(ROOT / "benchmarks" / "slow_proxy.py"), str(PROXY), str(MLFLOW), "2"],
                folder / "proxy.log",
            )
        if fault is trial_hangs:
            run.trials, run.flags = "hanging", ("--hang-after", "0.2")
        if fault is out_of_memory:
            run.trials = "greedy"
        if fault is killed_between_trials:
            run.trials = "leaving"
        run.drive()
        run.until_training(epochs=9 if run.trials == "steady" else 2)
        fault(run)
        return Outcome(fault.__name__, *account(run), run.recovered_s())


def main() -> None:
    """Run the named faults and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [fault.__name__ for fault in FAULTS]
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"of {', '.join(names)} (default: all)")
    given = parser.parse_args().faults
    unknown = [name for name in given if name not in names]
    if unknown:
        parser.error(f"{', '.join(unknown)}: expected some of {', '.join(names)}")
    print(f"{'fault':26} {'lost':>5} {'duplicated':>11} {'seconds to recover':>19}")
    for fault in FAULTS:
        if not given or fault.__name__ in given:
            if why := cannot(fault):
                print(f"{fault.__name__:26} not run: {why}")
                continue
            with tempfile.TemporaryDirectory(prefix="f") as folder:
                found = suffer(fault, Path(folder))
            seconds = "-" if found.recover_s is None else f"{found.recover_s:.1f}"
            print(f"{found.fault:26} {len(found.lost):5} {len(found.duplicated):11} {seconds:>19}", flush=True)
            for line in (*found.lost, *found.duplicated):
                print(f"    {line}")


if __name__ == "__main__":
    main()
