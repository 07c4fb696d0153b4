"""Ctrl-C and SIGTERM: one line and exit code 130, from the first import on.

The first module that a sweep script imports. What comes next takes seconds, and libraries that are being imported may
swallow a KeyboardInterrupt: until `from_now_on` Ctrl-C ends the process at once, as there is nothing yet to put away.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

INTERRUPTED = 130


def _leave(number: int, frame: object) -> None:
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"Interrupted.\n")
    os._exit(INTERRUPTED)


if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, _leave)


def from_now_on() -> None:
    """The imports are over: Ctrl-C is a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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
