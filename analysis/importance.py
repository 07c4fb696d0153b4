"""What the parameters of a search did: their importance for quality and latency, with what chance alone would give."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SHUFFLES, LEAST, CHANCE = 100, 8, 0.95
BETTER = 0.25  # of 20 trials the usual tenth would be two


@dataclass(frozen=True)
class Importance:
    """How much of what separates the better quarter of trials from all of them lies in one parameter, by PED-ANOVA
    (Watanabe 2023).

    value: a share, all parameters sum to 1. chance: what the most important parameter of 95 % of shuffles of the
    objective stays below, in the same unit, so that of all parameters together chance shows one in 5 % of searches.
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
    evaluate = _evaluator([{name: row[name] for name in names} for row in params])
    own, rng = evaluate(values), np.random.default_rng(seed)
    shuffled = [evaluate(rng.permutation(values).tolist()) for _ in range(SHUFFLES)]
    total = sum(own.values()) or 1.0
    chance = float(np.quantile([max(one.values()) for one in shuffled], CHANCE)) / total
    return [Importance(name, objective, own[name] / total, chance) for name in sorted(names, key=lambda n: -own[n])]


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


def _evaluator(params: Sequence[Mapping[str, Any]]) -> Callable[[Sequence[float]], dict[str, float]]:
    """What gives the importances for any values of the trials: one study serves all shuffles."""
    import optuna

    space = {name: _distribution([row[name] for row in params]) for name in params[0]}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="minimize")
    study.add_trials([optuna.trial.create_trial(params=dict(row), distributions=space, value=0.0) for row in params])

    def evaluate(values: Sequence[float]) -> dict[str, float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the evaluator is experimental, and says that less must be better
            evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=BETTER)
            return dict(
                optuna.importance.get_param_importances(
                    study, evaluator=evaluator, params=list(space), normalize=False,
                    target=lambda trial: float(values[trial.number]),
                )
            )  # fmt: skip

    return evaluate


def _distribution(values: Sequence[Any]) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if all(isinstance(value, float) for value in values):
        low, high = min(values), max(values)
        return FloatDistribution(low, high, log=low > 0 and high > 20 * low)
    return CategoricalDistribution(sorted(set(values), key=str))
