"""What the parameters of a search did: their importance for quality and latency, with what chance alone would give."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SHUFFLES, LEAST, CHANCE = 200, 8, 0.95


@dataclass(frozen=True)
class Importance:
    """How much of what separates the better trials from all lies in one parameter, by PED-ANOVA (Watanabe 2023).

    value: a share, all parameters sum to 1. chance: what 95 % of shuffles of the objective stay below.
    """

    parameter: str
    objective: str
    value: float
    chance: float

    @property
    def shown(self) -> bool:
        """Whether it is more than chance gives."""
        return self.value > self.chance


def importances(
    params: Sequence[Mapping[str, Any]], objective: str, values: Sequence[float], seed: int = 0
) -> list[Importance]:
    """Of all parameters, the most important first; empty for fewer than ``LEAST`` trials or nothing that varies.

    params: a number or text per parameter, the same ones for all trials. values: lower is better, finite.
    """
    names = [key for key in params[0] if len({row[key] for row in params}) > 1] if len(params) >= LEAST else []
    if not names or len(set(values)) < 2:
        return []
    space = {name: _distribution([row[name] for row in params]) for name in names}
    kept = [{name: row[name] for name in names} for row in params]
    own = _evaluate(space, kept, values)
    rng = np.random.default_rng(seed)
    shuffled = [_evaluate(space, kept, rng.permutation(values)) for _ in range(SHUFFLES)]
    chance = {name: float(np.quantile([one[name] for one in shuffled], CHANCE)) for name in names}
    return [Importance(name, objective, own[name], chance[name]) for name in sorted(names, key=lambda n: -own[n])]


def sentence(found: Sequence[Importance], trials: int) -> str:
    """What is shown of one objective's parameters, and what is not."""
    shown = [f"{one.parameter} ({one.value:.2f}, chance {one.chance:.2f})" for one in found if one.shown]
    rest = [one.parameter for one in found if not one.shown]
    said = f"{found[0].objective}: of {trials} trials "
    verb = "matters" if len(shown) == 1 else "matter"
    said += f"{', '.join(shown)} {verb} more than chance explains" if shown else ""
    said += "; " if shown and rest else ""
    said += f"no influence of {', '.join(rest)} is shown" if rest else ""
    return f"{said}."


def _evaluate(space: Mapping[str, Any], params: Sequence[Mapping[str, Any]], values: Sequence[float]) -> dict[str, Any]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(direction="minimize")
        study.add_trials(
            [
                optuna.trial.create_trial(params=dict(row), distributions=dict(space), value=float(value))
                for row, value in zip(params, values, strict=True)
            ]
        )
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        return dict(optuna.importance.get_param_importances(study, evaluator=evaluator, params=list(space)))


def _distribution(values: Sequence[Any]) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if all(isinstance(value, float) for value in values):
        low, high = min(values), max(values)
        return FloatDistribution(low, high, log=low > 0 and high > 20 * low)
    return CategoricalDistribution(sorted(set(values), key=str))
