"""Samples and teacher outputs, computed once by content and shared by every trial of every sweep.

One folder per content: hash of teacher weights, data code, seed and number of samples. A shard is a memory-mapped .npy
file of consecutive samples, one row each, with the hash of its bytes in its name: it appears whole by one rename. Any
number of processes, on any node of the storage, fill the shards side by side; a lock per shard lets each be computed
once. What is there when a build starts is checked against its hash first.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from engines.errors import InputError
from trainables import checkpoint, fast_linear
from trainables.checkpoint import model_hash
from trainables.domain import Batch, Domain, answering

BLOCK = 256  # samples of a shard at least, and computed at a time at most
SHARD = 2**25  # bytes of a shard at least: of small samples it holds many, or a batch would come from as many files
PIECE = 2**28  # bytes computed at a time at most
OPEN = 256  # shards that a reader keeps open
FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Layout:
    """How samples lie in shards: so many to a shard, computed so many at a time, each a row of these fields.

    Hidden states come last, so that a reader without them reads the beginning of a row.
    """

    samples: int
    piece: int
    fields: list[tuple[str, str, list[int]]]

    @classmethod
    def of(cls, one: Batch, group: int) -> Layout:
        """Of a batch of one sample; `group` samples are computed together."""
        arrays = {name: one[name].numpy() for name in sorted(one, key=lambda name: (_of_states(name), name))}
        size = sum(array[0].nbytes for array in arrays.values())
        piece = group * max(1, min(BLOCK, PIECE // size) // group)
        fields = [(name, array.dtype.str, list(array.shape[1:])) for name, array in arrays.items()]
        return cls(BLOCK * -(-SHARD // (BLOCK * size)), piece, fields)

    def row(self, states: bool = True) -> np.dtype[Any]:
        """A sample's dtype."""
        wanted = [field for field in self.fields if states or not _of_states(field[0])]
        return np.dtype([(name, kind, tuple(shape)) for name, kind, shape in wanted])


class TeacherCache:
    """`count` training samples with the teacher's outputs; hidden states only where a trial needs them."""

    def __init__(self, folder: Path, make: Callable[[], Domain], count: int, states: bool) -> None:
        """`make` builds the domain; it must pickle where several processes fill the cache."""
        self.count, self.states, self._make = count, states, make
        domain = make()
        content = (model_hash(domain.teacher()), domain.data_id(), count)
        self.folder = folder / _digest(*content, True)  # a complete cache with states serves trials without, too
        if not states and not self._complete():
            self.folder = folder / _digest(*content, False)
        self._shard = lru_cache(OPEN)(self._read)

    def build(self, workers: int = 1, report: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Check what is there and compute what is missing or damaged. InputError when the disk cannot hold it.

        report: told at the start and after each shard how many of the missing samples are done.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        fill = _Filler(self._make, self.folder, self.count, self.states)
        there = _shards(self.folder)
        with ThreadPoolExecutor(workers) as threads:  # hashing leaves the interpreter to others
            sound = dict(zip(there, threads.map(_is_sound, there.values()), strict=True))
        damaged = [there[shard].name for shard in there if not sound[shard]]
        if damaged:
            print(f"warning: {self.folder}: {len(damaged)} of {len(there)} shards are damaged and computed again "
                  f"({', '.join(damaged[:2])})", file=sys.stderr)  # fmt: skip
        ranges = fill.ranges()
        missing = {shard: len(rows) for shard, rows in enumerate(ranges) if not sound.get(shard)}
        if not missing:
            return
        total, done = sum(missing.values()), 0
        fill.start(total)
        report(0, total)
        with contextlib.ExitStack() as stack:
            run: Callable[[Callable[..., bool], list[int], list[bool]], Iterable[bool]] = map
            work: Callable[[int, bool], bool] = fill
            if workers > 1:
                context = multiprocessing.get_context("spawn")
                pool = ProcessPoolExecutor(workers, context, initializer=_start_filling, initargs=(fill,))
                run, work = stack.enter_context(pool).map, _fill
            for wait in (False, True):  # what another process is at comes last, when it is likely to be done
                shards = list(missing)
                for shard, filled in zip(shards, run(work, shards, [wait] * len(shards)), strict=True):
                    if filled:
                        done += missing.pop(shard)
                        report(done, total)

    def rows(self, indices: Tensor) -> Batch:
        """The samples `indices` (B,) as a batch."""
        order, row = indices.numpy(), self._layout.row(self.states)
        found = np.empty((len(order), row.itemsize), np.uint8)
        shards, inside = np.divmod(order, self._layout.samples)
        for shard in np.unique(shards):
            at = np.flatnonzero(shards == shard)
            found[at] = self._shard(int(shard))[inside[at]]
        table = found.view(row)[:, 0]
        return {name: torch.from_numpy(table[name].copy()) for name in row.names or ()}

    @cached_property
    def _layout(self) -> Layout:
        if not self._complete():
            self.build()
        return _layout(self.folder)

    @cached_property
    def _paths(self) -> dict[int, Path]:
        return _shards(self.folder)

    def _complete(self) -> bool:
        if not (self.folder / "layout.json").exists():
            return False
        return len(_shards(self.folder)) == -(-self.count // _layout(self.folder).samples)

    def _read(self, shard: int) -> npt.NDArray[np.uint8]:
        """A shard's rows as bytes, as far as they are wanted."""
        path = self._paths[shard]
        try:
            table = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"teacher cache {path} cannot be read ({error}): start the sweep again with --resume, "
                             "which computes it anew") from None  # fmt: skip
        rows: npt.NDArray[np.uint8] = table.view(np.uint8).reshape(len(table), -1)
        return rows[:, : self._layout.row(self.states).itemsize]


class _Filler:
    """Computes shards of a cache folder; pickles to other processes."""

    def __init__(self, make: Callable[[], Domain], folder: Path, count: int, states: bool) -> None:
        self.make, self.folder, self.count, self.states = make, folder, count, states

    def __call__(self, shard: int, wait: bool) -> bool:
        """Whether the shard is there now. wait: for another process that is at it, else it is left to that one."""
        with locked(self.folder / f"{shard:05d}.lock", wait) as held:
            if held:
                path = _shards(self.folder).get(shard)
                if path and not _is_sound(path):
                    path.unlink()
                    path = None
                if not path:
                    self._write(shard)
            return held

    def ranges(self) -> list[range]:
        """The samples of each shard."""
        size = self.layout.samples
        return [range(start, min(start + size, self.count)) for start in range(0, self.count, size)]

    def start(self, missing: int) -> None:
        """Write down the layout, after a look at the free disk space for so many samples."""
        size, free = missing * self.layout.row().itemsize, shutil.disk_usage(self.folder).free
        if size > 0.95 * free:
            raise InputError(
                f"the teacher cache needs {size / 1e9:.1f} GB in {self.folder.parent}, which has "
                f"{free / 1e9:.1f} GB free: choose another --storage or a smaller train_samples={self.count}"
            )
        temporary = self.folder / f".layout.{os.getpid()}"
        temporary.write_text(json.dumps(vars(self.layout)))
        os.replace(temporary, self.folder / "layout.json")

    @cached_property
    def layout(self) -> Layout:
        """As it was written down, else as one sample has it."""
        if (self.folder / "layout.json").exists():
            return _layout(self.folder)
        return Layout.of(self._compute(torch.arange(1)), self._models[0].group)

    def _write(self, shard: int) -> None:
        samples, row = self.ranges()[shard], self.layout.row()
        header, digest = io.BytesIO(), hashlib.sha256()
        shape: dict[str, Any] = {"shape": (len(samples),), "fortran_order": False, "descr": row.descr}
        np.lib.format.write_array_header_1_0(header, shape)
        temporary = self.folder / f".{shard:05d}.part"
        try:
            with open(temporary, "wb") as file:
                digest.update(header.getvalue())
                file.write(header.getvalue())
                for rows in torch.split(torch.arange(samples.start, samples.stop), self.layout.piece):
                    table = np.empty(len(rows), row)
                    for name, value in self._compute(rows).items():
                        table[name] = value.numpy()
                    written = table.tobytes()
                    digest.update(written)
                    file.write(written)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            temporary.unlink(missing_ok=True)
            if error.errno not in FULL:
                raise
            raise InputError(f"the disk of {self.folder.parent} became full: the teacher cache keeps the shards it "
                             "has; free some room, and --resume goes on") from None  # fmt: skip
        os.replace(temporary, self.folder / f"{shard:05d}.{digest.hexdigest()[:16]}.npy")

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


def _layout(folder: Path) -> Layout:
    return Layout(**json.loads((folder / "layout.json").read_text()))


def _shards(folder: Path) -> dict[int, Path]:
    """The finished shards by number."""
    return {int(path.name.split(".")[0]): path for path in folder.glob("[0-9]*.npy")}


def _is_sound(path: Path) -> bool:
    """Whether a shard's bytes are those that its name says; not where another process has just removed it."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16] == path.name.split(".")[1]
    except FileNotFoundError:
        return False


def _of_states(name: str) -> bool:
    return name.startswith("teacher_state_")


_filler: _Filler


def _start_filling(filler: _Filler) -> None:
    global _filler
    _filler = filler


def _fill(shard: int, wait: bool) -> bool:
    return _filler(shard, wait)


def _digest(*identity: object) -> str:
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a file lock: what is computed inside is computed by one process at a time, on every node of the storage.

    Without `wait` the lock may be another's: False then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def teacher_metrics(folder: Path, domain: Domain, split: str, full: bool) -> dict[str, Tensor]:
    """The teacher's metrics per sample on a fixed split, computed once by content (weights, code, protocol)."""
    teacher = answering(domain.teacher())
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
