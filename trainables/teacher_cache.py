"""Samples and teacher outputs, computed once by content and shared by every trial of every sweep.

One folder per content: hash of teacher weights, data code, seed and number of samples. Each kind of tensor is one
memory-mapped .npy file; `done.json` lists the finished blocks, so an interrupted build goes on, and a lock keeps two
processes from building at once.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from engines.errors import InputError
from trainables.domain import Batch, Domain

BLOCK = 256
STATES = "teacher_state_"


def model_hash(model: nn.Module) -> str:
    """16 hex digits of the weights' names, shapes and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class TeacherCache:
    """`count` training samples with the teacher's outputs; hidden states only where a trial needs them."""

    def __init__(self, folder: Path, domain: Domain, count: int, states: bool) -> None:
        self.count, self.states = count, states
        teacher = domain.teacher()
        identity = f"{model_hash(teacher)}{domain.data_id()}{count}{'states' if states else ''}"
        self.folder = folder / hashlib.sha256(identity.encode()).hexdigest()[:16]
        self._domain, self._teacher = domain, teacher
        self._arrays: dict[str, np.ndarray] = {}

    def build(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Compute what is missing. InputError when the disk cannot hold it; progress(done, count) after each block."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder / "lock"):
            done = self._done()
            for block in range(-(-self.count // BLOCK)):
                if block in done:
                    continue
                rows = torch.arange(block * BLOCK, min((block + 1) * BLOCK, self.count))
                batch = self._domain.samples("train", rows)
                batch |= self._domain.teacher_outputs(self._teacher, batch)
                if not self.states:
                    batch = {key: value for key, value in batch.items() if not key.startswith(STATES)}
                for name, array in self._open("r+", batch).items():
                    array[rows[0] : rows[-1] + 1] = batch[name].numpy()
                    array.flush()  # type: ignore[attr-defined]
                done.append(block)
                self._write_done(done)
                progress(int(rows[-1]) + 1, self.count)

    def rows(self, indices: Tensor) -> Batch:
        """The samples `indices` (B,) as a batch."""
        if not self._arrays:
            if len(self._done()) != -(-self.count // BLOCK):
                self.build()
            self._arrays = self._open("r", None)
        order = indices.numpy()
        return {name: torch.from_numpy(array[order]) for name, array in self._arrays.items()}

    def _done(self) -> list[int]:
        path = self.folder / "done.json"
        return list(json.loads(path.read_text())) if path.exists() else []

    def _write_done(self, done: list[int]) -> None:
        temporary = self.folder / f".done.{os.getpid()}"
        temporary.write_text(json.dumps(done))
        os.replace(temporary, self.folder / "done.json")

    def _open(self, mode: str, batch: Batch | None) -> dict[str, np.ndarray]:
        if batch is None:
            return {path.stem: np.load(path, mmap_mode="r") for path in sorted(self.folder.glob("*.npy"))}
        if not self._arrays:
            missing = [name for name in batch if not (self.folder / f"{name}.npy").exists()]
            size = sum(batch[name][0].numel() * batch[name].element_size() for name in missing) * self.count
            free = shutil.disk_usage(self.folder).free
            if size > 0.95 * free:
                raise InputError(
                    f"the teacher cache needs {size / 1e9:.1f} GB in {self.folder.parent}, which has "
                    f"{free / 1e9:.1f} GB free: choose another --storage or a smaller train_pairs={self.count}"
                )
            for name in missing:
                value = batch[name][:1].numpy()
                np.lib.format.open_memmap(
                    self.folder / f"{name}.npy", "w+", value.dtype, (self.count, *value.shape[1:])
                )
            self._arrays = {path.stem: np.load(path, mmap_mode="r+") for path in sorted(self.folder.glob("*.npy"))}
        return self._arrays


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def teacher_metrics(folder: Path, domain: Domain, split: str, full: bool) -> dict[str, Tensor]:
    """The teacher's metrics per sample on a fixed split, computed once by content (weights, code, protocol)."""
    teacher = domain.teacher()
    identity = f"{model_hash(teacher)}{domain.split_id(split)}{full}"
    path = folder / f"teacher_{split}_{hashlib.sha256(identity.encode()).hexdigest()[:16]}.npz"
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / "metrics.lock"):
        if not path.exists():
            values = {name: value.numpy() for name, value in domain.evaluate(teacher, split, full).items()}
            temporary = folder / f".{path.stem}.{os.getpid()}.npz"
            np.savez(temporary, allow_pickle=False, **values)
            os.replace(temporary, path)
        with np.load(path) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}
