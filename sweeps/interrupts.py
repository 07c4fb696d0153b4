"""Ctrl-C and SIGTERM: one line and exit code 130, from the first import on.

The first module that a sweep script imports; importing it sets the hook, for what comes next takes seconds.
"""

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import TracebackType

INTERRUPTED = 130


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print("Interrupted.", file=sys.stderr)
    sys.exit(INTERRUPTED)


sys.excepthook = _hook


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM, which schedulers of clusters send, ends a sweep as Ctrl-C does."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
