"""Several workers for one trial: a step of all of them is the step that one worker makes with the whole batch.

The trial's own actor leads (rank 0): it alone validates, writes and reports. The others, each in a bundle of its own of
the trial's placement group, build the same trial and train the same epochs on their shares of every batch; gradients
are summed by NCCL between GPUs, by Gloo between cores. A worker that ends takes the leader's epoch with it, so that
the trial as a whole goes on from its last state; when the leader's actor ends, Ray ends the followers with it.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psutil
import ray
import torch
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor, nn
from torch.distributed import distributed_c10d as c10d

from engines.errors import InputError

if TYPE_CHECKING:
    from trainables.training import Training

TIMEOUT = timedelta(minutes=10)  # of one collective: workers wait for the slowest
BLAME_S = 10.0  # until Ray knows of a worker's end, which the others have felt


def refuse_uneven(settings: Mapping[str, Any], workers: int) -> None:
    """InputError where a batch does not cut into equal pieces for so many workers, as `accumulate` alone must."""
    pieces = workers * int(settings.get("accumulate", 1))
    size = int(settings.get("batch_size", 2 * pieces))
    if workers > 1 and size % (2 * pieces):
        raise InputError(
            f"--workers-per-trial {workers}: batch_size={size} with accumulate={pieces // workers} cannot be cut into "
            f"{pieces} equal pieces of an even size; give a batch_size that {2 * pieces} divides"
        )


class Gang:
    """One worker's place among all of its trial. A worker alone (size 1) calls the same methods, which do nothing."""

    def __init__(self, size: int = 1, rank: int = 0) -> None:
        """rank: 0 leads."""
        self.size, self.rank = size, rank
        # Not torch's default group: modelopt synchronises over that one by itself wherever it finds it.
        self._group: Any = None
        self._device = torch.device("cpu")
        self._followers: list[Any] = []
        self._built: list[Any] = []

    # ------------------------------------------------------------------ what every worker does
    def share(self, samples: Tensor) -> Tensor:
        """This worker's part of the numbers of a batch's samples (or groups of them), (B, ...) -> (B / size, ...)."""
        return samples.tensor_split(self.size)[self.rank]

    def align(self, module: nn.Module) -> None:
        """Take over the leader's weights, whatever another kind of processor made of them."""
        if self.size > 1:
            weights = [value for value in module.state_dict().values() if value.is_floating_point()]
            self._together(weights, lambda flat: self._group.broadcast(flat, 0))

    def sum_gradients(self, parameters: Iterable[nn.Parameter], losses: Iterable[Tensor]) -> None:
        """Sum both over the workers, in place. A parameter that no worker used keeps none: zero would be a step."""
        if self.size == 1:
            return
        weights = list(parameters)
        found = [weight.grad if weight.grad is not None else torch.zeros_like(weight) for weight in weights]
        used = torch.tensor([float(weight.grad is not None) for weight in weights])
        self._together([*found, used, *losses], self._sum)
        for weight, gradient, uses in zip(weights, found, used.tolist(), strict=True):
            weight.grad = gradient if uses else None

    def any(self, here: bool) -> bool:
        """Whether it holds for one of the workers."""
        if self.size == 1:
            return here
        count = torch.tensor([float(here)])
        self._together([count], self._sum)
        return count.item() > 0

    def _sum(self, flat: Tensor) -> Any:
        return self._group.allreduce([flat])

    @torch.no_grad()
    def _together(self, tensors: list[Tensor], collective: Callable[[Tensor], Any]) -> None:
        """One call for all tensors of a dtype, in place: every call costs a round trip."""
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            own = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.to(self._device).flatten() for tensor in own])
            try:
                collective(flat).wait()
            except RuntimeError as error:
                raise ConnectionError(f"worker {self.rank} of {self.size} lost the others: {_line(error)}") from error
            for tensor, found in zip(own, torch.split(flat, [tensor.numel() for tensor in own]), strict=True):
                tensor.copy_(found.view_as(tensor))

    def join(self, device: torch.device, store: c10d.Store) -> None:
        """Connect to the others, who meet at the leader's store."""
        self._device = device
        prefixed = c10d.PrefixStore(device.type, store)
        if device.type == "cuda":
            options = c10d.ProcessGroupNCCL.Options()
            options._timeout = TIMEOUT
            self._group = c10d.ProcessGroupNCCL(prefixed, self.rank, self.size, options)
        else:
            self._group = c10d.ProcessGroupGloo(prefixed, self.rank, self.size, TIMEOUT)

    def leave(self) -> None:
        """Close the connections, which the others feel at once."""
        self._group = None

    # ------------------------------------------------------------------ what the leader does
    def assemble(self, kind: type[Training], config: dict[str, Any]) -> None:
        """Let the followers build the trial while the leader builds it, too."""
        if self.size == 1 or self.rank > 0:
            return
        if not self._followers:
            self._followers = [_start(rank) for rank in range(1, self.size)]
        self._built = [
            follower.build.remote(kind, {**config, "rank": rank}) for rank, follower in enumerate(self._followers, 1)
        ]

    def connect(self, device: torch.device, progress: tuple[int, int]) -> None:
        """Wait until all have built the trial as far as the leader; the first time, connect them.

        progress: epochs done, and steps of the next one.

        Raises what a follower raised, and RuntimeError for one whose host still sees an older state in the storage.
        """
        if not self._built:
            return
        for rank, found in enumerate(ray.get(self._built), 1):
            if found != progress:
                there, here = (f"epoch {epochs} and {steps} steps" for epochs, steps in (found, progress))
                raise RuntimeError(f"worker {rank} of {self.size} found the state after {there}, not {here}")
        if self._group is not None:
            return
        host = _own_address()
        listening = socket.create_server((host, 0))
        port = listening.getsockname()[1]
        joined = [follower.join.remote(host, port) for follower in self._followers]
        self.join(device, _store(host, port, self.size, listening))
        ray.get(joined)

    @contextmanager
    def epoch(self) -> Iterator[list[float]]:
        """The followers train the epoch that the leader trains in this context; afterwards their CPU seconds.

        Raises RuntimeError that names the follower whose end is why the leader could not go on.
        """
        running = [follower.train.remote() for follower in self._followers]
        seconds: list[float] = []
        try:
            yield seconds
        except ConnectionError as lost:
            ray.wait(running, num_returns=len(running), timeout=BLAME_S)
            if blamed := self._blamed(running):
                raise blamed from lost
            raise
        seconds += ray.get(running) if running else []  # without a gang there may be no Ray to ask

    def _blamed(self, running: list[Any]) -> RuntimeError | None:
        for rank, ref in enumerate(running, 1):
            try:
                ray.get(ref, timeout=0)
            except (ConnectionError, ray.exceptions.GetTimeoutError):  # a victim, too
                continue
            except ray.exceptions.RayError as error:
                return RuntimeError(f"worker {rank} of {self.size}: {_line(getattr(error, 'cause', None) or error)}")
        return None

    def disband(self) -> None:
        """End the followers."""
        self.leave()
        for follower in self._followers:
            ray.kill(follower)
        self._followers = []


class Follower:
    """The actor around a worker that follows. It reads the trial's state from its folder and writes none there."""

    def __init__(self) -> None:
        self._trial: Training | None = None

    def build(self, kind: type[Training], config: dict[str, Any]) -> tuple[int, int]:
        """Build the trial, or the next one; epochs done, and steps of the next one."""
        if self._trial is None:
            self._trial = kind.__new__(kind)  # Ray's own constructor makes a folder at home for each
            self._trial.setup(config)
        else:
            self._trial.reset_config(config)
        return self._trial.epoch, self._trial.taken

    def join(self, host: str, port: int) -> None:
        """Connect to the others at the leader's address."""
        assert self._trial
        gang = self._trial.gang
        gang.join(self._trial.device, _store(host, port, gang.size))

    def train(self) -> float:
        """One epoch; the CPU seconds it took."""
        assert self._trial
        before = time.process_time()
        try:
            self._trial.train_epoch()
        except Exception:
            self._trial.gang.leave()  # or the others would wait for this worker until their timeout
            raise
        return time.process_time() - before


def _start(rank: int) -> Any:
    """A follower in the bundle `rank` of the placement group in which this actor runs."""
    group = ray.util.get_current_placement_group()
    if group is None:
        raise RuntimeError("several workers for one trial need its placement group: a bundle for each")
    bundle = group.bundle_specs[rank]
    place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
    needs = {"num_cpus": bundle.get("CPU", 0), "num_gpus": bundle.get("GPU", 0)}
    return ray.remote(Follower).options(scheduling_strategy=place, **needs).remote()


def _store(host: str, port: int, size: int, listening: socket.socket | None = None) -> c10d.Store:
    """Where the workers find each other. listening: the leader's socket, bound to this host's address alone."""
    own = _own_address()
    names = (name for name, found in psutil.net_if_addrs().items() if own in [one.address for one in found])
    if interface := next(names, None):  # else both would listen where the host's name leads
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    leads = listening is not None
    store: c10d.Store = torch.distributed.TCPStore(  # type: ignore[attr-defined]
        host, port, size, leads, TIMEOUT, wait_for_workers=False,
        master_listen_fd=listening.detach() if listening else None,
    )  # fmt: skip
    return store


def _own_address() -> str:
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return address


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
