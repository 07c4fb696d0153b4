"""Weights that change over training, as data: constant, piecewise constant ("step") and linear.

Progress is the share of training done, from 0 (before the first epoch) to 1 (after the last). As data:

    0.5                                        constant
    {step: [0.5, 0.7], shares: [0.7, 0.3]}     0.5 for the first 70 % of training, then 0.7
    {linear: [0.5, 0.1]}                       from 0.5 at the start to 0.1 at the end
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from engines.errors import InputError

FORMS = "a number, {step: [0.5, 0.7], shares: [0.7, 0.3]} or {linear: [0.5, 0.1]}"


@dataclass(frozen=True)
class Schedule:
    """One weight over training; build it with `constant`, `step`, `linear` or `from_data`.

    `kind` is one of "constant" (one value), "step" (as many values as shares of training, which sum to 1) and
    "linear" (start and end). InputError names what does not fit.
    """

    kind: str
    values: tuple[float, ...]
    shares: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        wanted = {"constant": 1, "linear": 2, "step": len(self.shares)}.get(self.kind)
        if wanted is None:
            raise InputError(f"schedule kind {self.kind!r}: expected constant, step or linear")
        if not all(math.isfinite(value) for value in self.values):
            raise InputError(f"schedule values {list(self.values)}: expected finite numbers")
        if len(self.values) != wanted or not self.values:
            raise InputError(
                f"{self.kind} schedule with values {list(self.values)} and shares {list(self.shares)}: "
                + ("expected one share per value" if self.kind == "step" else f"expected {wanted} value(s)")
            )
        if self.kind != "step":
            if self.shares:
                raise InputError(f"{self.kind} schedule with shares {list(self.shares)}: only step takes shares")
            return
        if not all(0 < share <= 1 for share in self.shares):
            raise InputError(f"schedule shares {list(self.shares)}: each must lie in (0, 1]")
        total = math.fsum(self.shares)
        if abs(total - 1) > 1e-6:
            raise InputError(f"schedule shares {list(self.shares)} sum to {total:g}: they must sum to 1")

    def value(self, progress: float) -> float:
        """The weight at `progress` in [0, 1]; a step takes its new value from the boundary on."""
        if not 0 <= progress <= 1:
            raise ValueError(f"progress={progress}: expected a share of training in [0, 1]")
        if self.kind == "constant":
            return self.values[0]
        if self.kind == "linear":
            start, end = self.values
            return start + (end - start) * progress
        ends = accumulate(self.shares)
        # The tolerance keeps 21/30, which floats may put just below 0.7, on the later side of that boundary.
        inside = (value for value, end in zip(self.values, ends, strict=True) if progress < end - 1e-9)
        return next(inside, self.values[-1])

    def to_data(self) -> float | dict[str, list[float]]:
        """The YAML or JSON form; `from_data` reads it back to an equal schedule."""
        if self.kind == "constant":
            return self.values[0]
        if self.kind == "linear":
            return {"linear": list(self.values)}
        return {"step": list(self.values), "shares": list(self.shares)}

    @classmethod
    def from_data(cls, data: object) -> "Schedule":
        """Read the YAML or JSON form (or pass a Schedule through); InputError says what was expected."""
        if isinstance(data, Schedule):
            return data
        if isinstance(data, int | float) and not isinstance(data, bool):
            return constant(data)
        if isinstance(data, Mapping):
            keys = set(data)
            if keys == {"linear"}:
                return cls("linear", _numbers(data["linear"], data))
            if keys == {"step", "shares"}:
                return cls("step", _numbers(data["step"], data), _numbers(data["shares"], data))
        raise InputError(f"schedule {data!r}: expected {FORMS}")


def constant(value: float) -> Schedule:
    """The same weight throughout."""
    return Schedule("constant", (float(value),))


def step(first: float, second: float, at: float) -> Schedule:
    """`first` until the share `at` of training (in (0, 1)), `second` from there on."""
    if not 0 < at < 1:
        raise InputError(f"step schedule with at={at}: expected a share of training between 0 and 1")
    return Schedule("step", (float(first), float(second)), (float(at), round(1 - at, 12)))


def linear(start: float, end: float) -> Schedule:
    """A straight line from `start` to `end`."""
    return Schedule("linear", (float(start), float(end)))


def _numbers(values: Any, whole: object) -> tuple[float, ...]:
    right = isinstance(values, list | tuple) and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in values
    )
    if not right:
        raise InputError(f"schedule {whole!r}: expected {FORMS}")
    return tuple(float(value) for value in values)
