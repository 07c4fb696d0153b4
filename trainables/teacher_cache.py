"""Samples and teacher outputs, computed once by content and shared by every trial of every sweep.

One folder per content: hash of teacher weights, data code, seed and number of samples. Each kind of tensor is one
memory-mapped .npy file; `done.json` lists the finished blocks, so an interrupted build goes on, and a lock keeps two
processes from building at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from engines.errors import InputError
from trainables import checkpoint, fast_linear
from trainables.checkpoint import model_hash
from trainables.domain import Batch, Domain

BLOCK = 256


class TeacherCache:
    """`count` training samples with the teacher's outputs; hidden states only where a trial needs them."""

    def __init__(self, folder: Path, make: Callable[[], Domain], count: int, states: bool) -> None:
        """`make` builds the domain; it must pickle where several processes fill the cache."""
        self.count, self.states, self._make = count, states, make
        domain = make()
        content = (model_hash(domain.teacher()), domain.data_id(), count)
        self.folder = folder / _digest(*content, True)  # a complete cache with states serves trials without, too
        if not states and len(self._done()) < self._blocks:
            self.folder = folder / _digest(*content, False)
        self._arrays: dict[str, np.ndarray] = {}

    def build(self, workers: int = 1, report: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Compute what is missing. InputError when the disk cannot hold it.

        report: told at the start and after each block how many of the missing samples are done.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / "lock"):
            done = self._done()
            missing = [block for block in range(self._blocks) if block not in done]
            if not missing:
                return
            fill = _Filler(self._make, self.folder, self.count, self.states)
            if not done:
                fill.allocate()
            total = min(len(missing) * BLOCK, self.count)
            report(0, total)
            with contextlib.ExitStack() as stack:
                blocks: Iterator[int] = map(fill, missing)
                if workers > 1:
                    context = multiprocessing.get_context("spawn")
                    pool = ProcessPoolExecutor(workers, context, initializer=_start_filling, initargs=(fill,))
                    blocks = stack.enter_context(pool).map(_fill, missing)
                for ready, block in enumerate(blocks, 1):
                    self._write_done(done := [*done, block])
                    report(min(ready * BLOCK, total), total)

    @property
    def _blocks(self) -> int:
        return -(-self.count // BLOCK)

    def rows(self, indices: Tensor) -> Batch:
        """The samples `indices` (B,) as a batch."""
        if not self._arrays:
            if len(self._done()) != self._blocks:
                self.build()
            paths = [path for path in sorted(self.folder.glob("*.npy")) if self.states or not _of_states(path.stem)]
            self._arrays = {path.stem: np.load(path, mmap_mode="r") for path in paths}
        order = indices.numpy()
        return {name: torch.from_numpy(array[order]) for name, array in self._arrays.items()}

    def _done(self) -> list[int]:
        path = self.folder / "done.json"
        return list(json.loads(path.read_text())) if path.exists() else []

    def _write_done(self, done: list[int]) -> None:
        temporary = self.folder / f".done.{os.getpid()}"
        temporary.write_text(json.dumps(done))
        os.replace(temporary, self.folder / "done.json")


class _Filler:
    """Computes one block of samples and writes it to the arrays of a cache folder; pickles to other processes."""

    def __init__(self, make: Callable[[], Domain], folder: Path, count: int, states: bool) -> None:
        self.make, self.folder, self.count, self.states = make, folder, count, states

    def __call__(self, block: int) -> int:
        rows = torch.arange(block * BLOCK, min((block + 1) * BLOCK, self.count))
        for name, value in self._compute(rows).items():
            array = np.load(self.folder / f"{name}.npy", mmap_mode="r+")
            array[rows[0] : rows[-1] + 1] = value.numpy()
            array.flush()
        return block

    def allocate(self) -> None:
        """Create the arrays at full size, after a look at the free disk space."""
        probe = {name: value[:1].numpy() for name, value in self._compute(torch.arange(1)).items()}
        size, free = self.count * sum(value.nbytes for value in probe.values()), shutil.disk_usage(self.folder).free
        if size > 0.95 * free:
            raise InputError(
                f"the teacher cache needs {size / 1e9:.1f} GB in {self.folder.parent}, which has "
                f"{free / 1e9:.1f} GB free: choose another --storage or a smaller train_samples={self.count}"
            )
        for name, value in probe.items():
            path = self.folder / f"{name}.npy"
            np.lib.format.open_memmap(path, "w+", value.dtype, (self.count, *value.shape[1:]))
            # Takes the room on the disk now: filling a hole of a mapped file on a full disk is a bus error.
            with open(path, "rb+") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)

    @cached_property
    def _models(self) -> tuple[Domain, nn.Module]:
        torch.set_num_threads(1)
        domain = self.make()
        teacher = domain.teacher()
        fast_linear.install(teacher)
        return domain, teacher.to("cuda" if torch.cuda.is_available() else "cpu")

    def _compute(self, rows: Tensor) -> Batch:
        domain, teacher = self._models
        batch = domain.samples("train", rows)
        device = next(teacher.parameters()).device
        found = domain.teacher_outputs(teacher, {name: value.to(device) for name, value in batch.items()})
        batch |= {name: value.cpu() for name, value in found.items()}
        return {name: value for name, value in batch.items() if self.states or not _of_states(name)}

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in vars(self).items() if key != "_models"}


def _of_states(name: str) -> bool:
    return name.startswith("teacher_state_")


_filler: _Filler


def _start_filling(filler: _Filler) -> None:
    global _filler
    _filler = filler


def _fill(block: int) -> int:
    return _filler(block)


def _digest(*identity: object) -> str:
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file lock: what is computed inside is computed by one process at a time, on every node of the storage."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def teacher_metrics(folder: Path, domain: Domain, split: str, full: bool) -> dict[str, Tensor]:
    """The teacher's metrics per sample on a fixed split, computed once by content (weights, code, protocol)."""
    teacher = domain.teacher()
    path = folder / f"teacher_{split}_{_digest(model_hash(teacher), domain.split_id(split), full)}.npz"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "metrics.lock"):
        if not path.exists():
            values = {name: value.numpy() for name, value in domain.evaluate(teacher, split, full).items()}
            if not all(np.isfinite(value).all() for value in values.values()):
                raise InputError(f"the teacher's {split} metrics are not finite: give another teacher=PATH")
            temporary = folder / f".{path.stem}.{os.getpid()}.npz"
            np.savez(temporary, allow_pickle=False, **values)
            os.replace(temporary, path)
        with np.load(path) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}


def inherited(folder: Path, domain: Domain) -> nn.Module:
    """The student filled from the teacher. That takes seconds and is the same for many trials: it is done once."""
    path = folder / f"inherited_{domain.student_id()}.pth"
    with locked(folder / "inherit.lock"):
        if not path.exists():
            checkpoint.save(path, domain.export(domain.student(inherit=True)))
    return domain.load(path)


def pruned(folder: Path, domain: Domain, steps: int) -> nn.Module:
    """The teacher after the first of the pruning steps, made once by content like :func:`inherited`."""
    path = folder / f"pruned_{_digest(domain.pruned_id(), steps)}.pth"
    with locked(folder / "prune.lock"):
        if not path.exists():
            checkpoint.save(path, domain.export(domain.pruned(domain.teacher(), 1 / steps)))
    return domain.load(path)
