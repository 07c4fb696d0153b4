"""Hosts made of Linux namespaces: each has its own network, mounts, host name and processes, as a machine has.

They are joined by cables (veth). All vanishes with its first process, so that nothing is left to clean up:
killing that one is pulling the plug. Needs root; `missing` says why where it cannot be.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup/memory")
RAY = str(Path(sys.executable).with_name("ray"))
ROOT = Path(__file__).resolve().parents[1]
PORT = 6379
SOCKETS = Path("/tmp/ray")  # each host sees a folder of its own there
START_S = 120.0


def missing() -> str | None:
    """Why there can be no such hosts here; None where there can."""
    for tool in ("unshare", "nsenter", "ip", "mount"):
        if not shutil.which(tool):
            return f"no {tool} here"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "ip", "link", "set", "lo", "up"],
        capture_output=True,
        text=True,
    )
    return f"namespaces are not allowed here: {tried.stderr.strip()}" if tried.returncode else None


def no_memory_limits() -> str | None:
    """Why no host can be given less memory than this machine has; None where it can."""
    return None if os.access(CGROUPS / "cgroup.procs", os.W_OK) else f"no control groups in {CGROUPS} to write"


@dataclass
class Host:
    """One host. holder: the process in whose hands it is; pid: the host's first process; folder: its own disk."""

    name: str
    address: str
    folder: Path
    holder: subprocess.Popen[bytes]
    pid: int
    env: dict[str, str]
    ray: subprocess.Popen[bytes] | None = None
    memory: Path | None = None  # the control group that its processes share

    @classmethod
    def start(cls, name: str, address: str, folder: Path) -> "Host":
        """A host without a network cable, whose /tmp is its own."""
        folder.mkdir(parents=True)
        spaces = ["--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        holder = subprocess.Popen(["unshare", *spaces, "sleep", "infinity"])
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children")
        end = time.monotonic() + START_S
        while not (found := children.read_text().split()):
            if time.monotonic() > end or holder.poll() is not None:
                raise RuntimeError(f"host {name} did not start")
            time.sleep(0.02)
        host = cls(name, address, folder, holder, int(found[0]), {**os.environ, "PYTHONPATH": str(ROOT)})
        time.sleep(0.2)  # it may still be mounting /proc
        host.call("hostname", name)
        host.call("ip", "link", "set", "lo", "up")
        return host

    def start_process(self, command: Sequence[str], log: Path, **env: str) -> subprocess.Popen[bytes]:
        """Start something there; its output goes to `log`."""
        with log.open("ab") as out:
            return subprocess.Popen(
                self.inside(*command), stdin=subprocess.DEVNULL, stdout=out, stderr=out, env={**self.env, **env}
            )

    def inside(self, *command: str) -> list[str]:
        """The command as it is typed outside."""
        spaces = ["--net", "--mount", "--uts", "--pid"]
        words = ["nsenter", "--target", str(self.pid), *spaces, f"--wd={self.folder}", "--", *command]
        if self.memory is None:
            return words
        return ["sh", "-c", f'echo $$ > {self.memory}/cgroup.procs && exec "$@"', "sh", *words]

    def limit_memory(self, limit: int) -> None:
        """From now on this host has so many bytes. Needs control groups of version 1 (`no_memory_limits`)."""
        self.memory = CGROUPS / f"slimsweep-{self.holder.pid}"
        self.memory.mkdir()
        (self.memory / "memory.limit_in_bytes").write_text(str(limit))
        self.mount(self.memory, CGROUPS)

    def call(self, *command: str) -> str:
        """What a short command there prints; CalledProcessError when it fails."""
        done = subprocess.run(self.inside(*command), capture_output=True, text=True, check=True, env=self.env)
        return done.stdout

    def mount(self, source: Path, target: Path) -> None:
        """Show a folder of the outside at a path of this host alone."""
        self.call("mount", "--bind", str(source), str(target))

    def start_ray(self, head: "Host | None" = None, cpus: int = 2, options: Sequence[str] = ()) -> None:
        """Ray, until it has joined. head: None starts one."""
        log, seconds = self.folder / "ray.log", START_S
        ours = ["--head", f"--port={PORT}", "--include-dashboard=false"] if head is None else []
        joins = [] if head is None else [f"--address={head.address}:{PORT}"]
        command = [RAY, "start", "--block", *ours, *joins, f"--node-ip-address={self.address}", f"--num-cpus={cpus}"]
        log.unlink(missing_ok=True)
        self.ray = self.start_process([*command, "--object-store-memory=100000000", *options], log)
        end = time.monotonic() + seconds
        while "Ray runtime started" not in log.read_text():
            if time.monotonic() > end or self.ray.poll() is not None:
                raise RuntimeError(f"Ray did not start on {self.name}: {log.read_text()[-2000:]}")
            time.sleep(0.2)

    def cable(self, up: bool) -> None:
        """Pull the network cable (of the first host: that to the second), or put it back."""
        self.call("ip", "link", "set", "eth0", "up" if up else "down")

    def kill(self) -> None:
        """Pull the plug: every process there is gone at once."""
        if self.holder.poll() is None:  # else the number may be another process's by now
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.holder.wait()
        if self.memory:
            while (self.memory / "cgroup.procs").read_text():
                time.sleep(0.05)
            self.memory.rmdir()
            self.memory = None


@contextlib.contextmanager
def joined_hosts(
    folder: Path, env: Mapping[str, str] | None = None, names: Sequence[str] = ("alpha", "beta")
) -> Iterator[list[Host]]:
    """Hosts on one network; Ray asks each for a token, and has its files on a disk of its own.

    folder/storage is a mount point without anything mounted; folder/shared is what hosts may mount there.
    """
    token = folder / "auth_token"
    token.write_text("0123456789abcdef" * 2)
    token.chmod(0o600)
    SOCKETS.mkdir(exist_ok=True)
    for name in ("storage", "shared"):
        (folder / name).mkdir(exist_ok=True)
    hosts: list[Host] = []
    try:
        for number, name in enumerate(names, 1):
            host = Host.start(name, f"10.213.0.{number}", folder / name)
            hosts.append(host)
            host.env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_worker_niceness": "0"}
            # The same path on all, as Ray wants it, but not the same disk. Short: the path of a socket, of which some
            # lie deep below it, has 107 bytes at most.
            (host.folder / "ray").mkdir()
            host.mount(host.folder / "ray", SOCKETS)
            host.env |= {"RAY_TMPDIR": str(SOCKETS), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
            host.env |= env or {}
            # The address is a bridge's, not a cable's: it stays when another host, and so its cable, is gone.
            host.call("ip", "link", "add", "lan", "type", "bridge")
            host.call("ip", "address", "add", f"{host.address}/24", "dev", "lan")
            host.call("ip", "link", "set", "lan", "up")
        first, *others = hosts
        for number, other in enumerate(others):  # the first one's bridge joins them all
            port = f"eth{number}"
            subprocess.run(
                ["ip", "link", "add", port, "netns", str(first.pid), "type", "veth"]
                + ["peer", "name", "eth0", "netns", str(other.pid)],
                check=True,
            )
            for host, end in ((first, port), (other, "eth0")):
                host.call("ip", "link", "set", end, "master", "lan")
                host.call("ip", "link", "set", end, "up")
        yield hosts
    finally:
        for host in hosts:
            host.kill()
