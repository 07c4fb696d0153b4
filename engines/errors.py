"""The one error that a user's input can cause, and how a command line ends with it."""

import argparse
import functools
import sys
from collections.abc import Callable
from typing import NoReturn


class InputError(ValueError):
    """A value that a user gave and that cannot be used.

    The message is one line that names the value, says what was expected and what to do. Command lines print
    it as ``error: <message>`` and exit with code 2; everything else that is raised is a defect and keeps
    its traceback.
    """


class Parser(argparse.ArgumentParser):
    """Flags that cannot be are an InputError like any other bad input, not usage text of several lines."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse for what it cannot take."""
        raise InputError(f"{message} (--help lists the flags)")


def command_line(body: Callable[[list[str] | None], None]) -> Callable[..., int]:
    """A command line whose body takes the arguments (None: the process's own): returns its exit code."""

    @functools.wraps(body)
    def run(arguments: list[str] | None = None) -> int:
        try:
            body(arguments)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0

    return run
