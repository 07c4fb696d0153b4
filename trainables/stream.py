"""Training samples drawn in the background: a thread prepares the next batches while the present one is used."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

Batch = dict[str, Tensor]


def fresh(draw: Callable[[Tensor], Batch], first: int, steps: int, size: int) -> Iterator[Batch]:
    """`steps` batches of `size` consecutive samples, from sample number `first` on, drawn ahead of their use.

    draw: the samples of given numbers, (size,) int64; what it gives must depend on these alone, so not on any global
    random state: then a step sees the same samples however fast anything runs, and after a resume.
    """
    starts = range(first, first + steps * size, size)
    with Stream(draw(torch.arange(start, start + size)) for start in starts) as stream:
        yield from stream


class Stream:
    """The batches of `source` in its order, computed by a thread; its errors are raised where a batch is asked for.

    Close it, or use it in a `with`. cpu_seconds: CPU time that the thread has spent in `source`.
    """

    def __init__(self, source: Iterable[Batch], depth: int = 2) -> None:
        """depth: batches that wait, at most."""
        self.cpu_seconds = 0.0
        self._source = iter(source)
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(depth)
        self._stop = threading.Event()
        self._ended: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="stream", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._ended is None:
            if self._stop.is_set():
                raise StopIteration
            item = self._queue.get()
            if not isinstance(item, BaseException):
                return item
            self._ended = item
        raise self._ended

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread; batches that wait are dropped."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        item: Batch | BaseException | None = None
        while not self._stop.is_set() and not isinstance(item, BaseException):
            start = time.thread_time()
            try:
                item = next(self._source)
            except BaseException as error:  # StopIteration, the end, too
                item = error
            self.cpu_seconds += time.thread_time() - start
            while not self._stop.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
