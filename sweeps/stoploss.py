"""When to give a trial up: one pure function over learning curves (no Ray, no torch).

A trial's history is its drop against the teacher (fraction, 0.01 = 1 %, positive = worse) after each
evaluation. The gate is met once the best drop so far is at most the budget, for the best checkpoint is the
one that is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engines.errors import InputError
from sweeps.forecast import forecast

History = Sequence[float | None]

# A stop may be wrong with at most this probability for a whole run saved; for a part of one, times its square root.
RISK = 0.015
FLAT_RISK = 0.02  # the same for a plateau: the flat trend is a second witness
RANK_RISK = 0.03  # and for asha: a weak witness, as slow starters begin in the last ranks and pass


@dataclass(frozen=True)
class StopLossRule:
    """What a trial is judged by.

    Attributes:
        budget: largest drop that passes the gate (fraction, 0.01 = 1 %).
        max_evals: evaluations of a full run.
        grace: evaluations before which only a diverged trial is stopped.
        patience: evaluations without a better drop that make a plateau.
        eta: a rung (evaluation grace * eta^k) lets the top 1/eta through.
        min_peers: other trials that must have reached a rung before it judges.

    Raises:
        InputError: a value is out of range.
    """

    budget: float
    max_evals: int
    grace: int = 3
    patience: int = 3
    eta: int = 3
    min_peers: int = 4

    def __post_init__(self) -> None:
        if not math.isfinite(self.budget):
            raise InputError(f"budget = {self.budget}: expected a finite drop, for example 0.01 for 1 %")
        for name, least in (("max_evals", 1), ("grace", 1), ("patience", 1), ("eta", 2), ("min_peers", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name} = {value!r}: expected a whole number of at least {least}")


@dataclass(frozen=True)
class Decision:
    """Whether to stop, why (``diverged``, ``stop_loss``, ``plateau`` or ``asha``), and the numbers in one
    sentence."""

    stop: bool
    reason: str | None
    detail: str


def decide(history: History, peers: Sequence[History], rule: StopLossRule) -> Decision:
    """Judge a trial after its latest evaluation; deterministic, and blind to the order of the peers.

    Args:
        history: the trial's drops so far, latest last; None, NaN and infinite mean that an evaluation
            diverged.
        peers: the other trials' histories, of any length, finished, stopped or running; only looked at where
            `is_rung` holds.
        rule: budget and patience.
    """
    evals = len(history)
    if evals == 0:
        return Decision(False, None, "no evaluation yet")
    if not is_finite(history[-1]):
        return Decision(True, "diverged", f"the drop is {history[-1]} at evaluation {evals}")
    best = best_drop(history)
    standing = f"best drop {_percent(best)} against budget {_percent(rule.budget)}"
    if evals < rule.grace or rule.max_evals <= rule.grace:
        return Decision(False, None, f"{standing}: in grace at evaluation {evals}")
    if evals >= rule.max_evals:
        return Decision(False, None, f"{standing}: last evaluation {evals}")

    since = evals - 1 - [v if is_finite(v) else math.inf for v in history].index(best)
    stale = f"no better drop than {_percent(best)} for {since} evaluations"
    if best <= rule.budget:  # it has passed: only its own plateau ends it
        if since >= rule.patience:
            return Decision(True, "plateau", f"{stale}, budget {_percent(rule.budget)} is met")
        return Decision(False, None, f"{standing}: met, still improving")

    ahead = forecast(history, rule.max_evals)
    worth = math.sqrt(1 - evals / rule.max_evals)
    chance, bound = ahead.chance(rule.budget), ahead.quantile(RISK * worth)
    told = (
        f"forecast {_percent(ahead.median)} [optimistic {_percent(bound)}] "
        f"at {rule.max_evals} evaluations, budget {_percent(rule.budget)}"
    )
    if bound > rule.budget:
        return Decision(True, "stop_loss", f"{told}: out of reach after {evals}")
    if since >= rule.patience and chance < FLAT_RISK * worth and not _improving(history, rule):
        return Decision(True, "plateau", f"{stale} and no trend; {told}")
    behind = _behind(best, evals, peers, rule)
    if behind is not None and chance < RANK_RISK * worth:
        return Decision(True, "asha", f"{behind}; {told}")
    return Decision(False, None, f"{told}: chance {_percent(chance)}")


def is_rung(evals: int, rule: StopLossRule) -> bool:
    """Whether a trial is compared with its peers after so many evaluations."""
    rung = rule.grace
    while rung < evals:
        rung *= rule.eta
    return rung == evals


def _behind(best: float, evals: int, peers: Sequence[History], rule: StopLossRule) -> str | None:
    """Say how far outside of its rung's top 1/eta a trial is; None inside of it and where no rung judges."""
    rung = evals
    if not is_rung(rung, rule):
        return None
    # A diverged peer is the worst of any rung, even of one that it did not live to see. A plain loop: there may be
    # thousands of peers.
    reached: list[float] = []
    long = 0
    for peer in peers:
        long += len(peer) >= rung
        if _diverged(peer):
            reached.append(math.inf)
        elif len(peer) >= rung:
            reached.append(best_drop(peer[:rung]))
    if long < rule.min_peers:
        return None
    # The same count that ASHA promotes, at least one; whoever equals the last of them is kept as well.
    kept = max(1, (len(reached) + 1) // rule.eta)
    better = sum(other < best for other in reached)
    if better < kept:
        return None
    return f"{better} of {len(reached)} peers beat {_percent(best)} at evaluation {rung}, {kept} may go on"


def _improving(history: History, rule: StopLossRule) -> bool:
    """Whether the recent past falls faster than its noise explains (Theil-Sen slope, robust spread)."""
    finite = [(i, v) for i, v in enumerate(history) if v is not None and math.isfinite(v)]
    at, value = np.array(finite[-(2 * rule.patience + 1) :], dtype=float).T
    i, j = np.triu_indices(len(at), k=1)
    if len(i) == 0:
        return False
    slope = float(np.median((value[j] - value[i]) / (at[j] - at[i])))
    rest = value - slope * at
    spread = 1.4826 * float(np.median(np.abs(rest - np.median(rest))))
    error = spread / math.sqrt(float(((at - at.mean()) ** 2).sum()))
    return slope < -error


def is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _diverged(history: History) -> bool:
    return len(history) > 0 and not is_finite(history[-1])


def best_drop(history: History) -> float:
    return min([v for v in history if v is not None and math.isfinite(v)], default=math.inf)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2g} %" if abs(fraction) < 0.1 else f"{100 * fraction:.0f} %"
