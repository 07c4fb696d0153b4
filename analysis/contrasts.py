"""What an ablation compares, as data: sums of arms with weights. A sweep's script declares them; nothing is slow here.

A contrast is sum over arms of weight x error, as a share of the mean error of one of them. An arm against its reference
has the weights +1 and -1; with factors A and B crossed, A's main effect is the mean of what A changes without B and
with it, and the interaction is [AB] - [A] - [B] + [neither], which is 0 where their changes add up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainables.record import InputError

Kind = Literal["arm", "main", "interaction"]


@dataclass(frozen=True)
class Contrast:
    """name: an arm's, or what is said of several. weights: by arm, with sum 0, so that what all arms share cancels.
    unit: the arm in shares of whose mean error the effect is given. kind: how a result is put in words.
    """

    name: str
    weights: Mapping[str, float]
    unit: str
    kind: Kind = "arm"

    def __post_init__(self) -> None:
        said = ", ".join(f"{weight:+g} {arm}" for arm, weight in self.weights.items())
        if not any(self.weights.values()) or abs(sum(self.weights.values())) > 1e-9:
            raise InputError(f"contrast {self.name!r} of {said or 'no arm'}: expected weights with sum 0, not all 0")
        if self.unit not in self.weights:
            raise InputError(f"contrast {self.name!r} of {said}: its unit {self.unit!r} is not among these arms")


def against(arm: str, reference: str) -> Contrast:
    """What one arm changes against another."""
    if arm == reference:
        raise InputError(f"contrast of {arm!r} against itself: expected two arms")
    return Contrast(arm, {arm: 1.0, reference: -1.0}, reference)


def each(arms: Sequence[str], reference: str) -> list[Contrast]:
    """Every one of the arms against the reference."""
    return [against(arm, reference) for arm in arms]


def main_effect(name: str, *pairs: tuple[str, str]) -> Contrast:
    """The mean of what a factor changes over `pairs` of arms (with it, without it), alike in everything else.

    Given in shares of the error of the first pair's arm without it.
    """
    if not pairs:
        raise InputError(f"main effect {name!r}: expected pairs of arms, with and without it")
    weights: Counter[str] = Counter()
    for with_it, without in pairs:
        weights.update({with_it: 1})
        weights.subtract({without: 1})
    return Contrast(name, {arm: count / len(pairs) for arm, count in weights.items()}, pairs[0][1], "main")


def interaction(name: str, *, both: str, one: str, other: str, neither: str) -> Contrast:
    """[both] - [one] - [other] + [neither], in shares of the error of `neither`."""
    if len({both, one, other, neither}) < 4:
        raise InputError(f"interaction {name!r} of {both}, {one}, {other}, {neither}: expected four different arms")
    return Contrast(name, {both: 1.0, one: -1.0, other: -1.0, neither: 1.0}, neither, "interaction")


@dataclass(frozen=True)
class Comparison:
    """One result file of an ablation (JSON, with a picture beside it): its title and what it compares."""

    file: str
    title: str
    contrasts: Sequence[Contrast]

    def __post_init__(self) -> None:
        if not self.file.endswith(".json") or Path(self.file).name != self.file:
            raise InputError(f"comparison {self.file!r}: expected a plain file name that ends with .json")
        keys = [(one.name, one.unit, one.kind) for one in self.contrasts]
        twice = [name for name, unit, kind in keys if keys.count((name, unit, kind)) > 1]
        if twice or not keys:
            raise InputError(f"comparison {self.file}: {twice[0]!r} stands twice" if twice
                             else f"comparison {self.file}: expected one contrast or more")  # fmt: skip

    @property
    def arms(self) -> tuple[str, ...]:
        """All arms that play a part, in the order of their first mention."""
        return tuple(dict.fromkeys(arm for one in self.contrasts for arm in one.weights))

    @property
    def picture(self) -> str:
        """Name of the picture."""
        return str(Path(self.file).with_suffix(".png"))
