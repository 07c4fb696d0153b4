"""The arms of a sweep as a design: what differs between them, and which contrasts that allows; no numbers here."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

from analysis.contrasts import Contrast, against, interaction, main_effect

Arms = Mapping[str, Mapping[str, str]]  # arm -> parameter -> value


def contrasts(arms: Arms) -> list[Contrast]:
    """Every arm against the first, every factor's main effect, and every two factors' interaction, as far as the arms
    have the pairs (equal in all else) and the squares for it. A main effect of a single pair is that of its arms.
    """
    names = list(arms)
    found = [against(arm, names[0]) for arm in names[1:]]
    varied = [key for key in sorted({key for arm in arms.values() for key in arm}) if len(_levels(arms, key)) > 1]
    for key in varied:
        for low, high in combinations(_levels(arms, key), 2):
            pairs = [(new, old) for new, old in _pairs(arms, {key}) if (arms[new].get(key), arms[old].get(key)) ==
                     (high, low)]  # fmt: skip
            if len(pairs) > 1:
                found.append(main_effect(f"{key} {high} instead of {low}", *pairs))
    for one, other in combinations(varied, 2):
        found += _squares(arms, one, other)
    return found


def _levels(arms: Arms, key: str) -> list[str | None]:
    return list(dict.fromkeys(arm.get(key) for arm in arms.values()))


def _pairs(arms: Arms, but: set[str]) -> Iterator[tuple[str, str]]:
    """Ordered pairs of arms that are equal in everything but the factors given, and differ in all of those."""
    for new in arms:
        for old in arms:
            keys = {*arms[new], *arms[old]}
            if {key for key in keys if arms[new].get(key) != arms[old].get(key)} == but:
                yield new, old


def _squares(arms: Arms, one: str, other: str) -> Sequence[Contrast]:
    """The interaction of two factors wherever all four combinations of two levels each were run."""
    found = []
    order = list(arms)
    for both, neither in _pairs(arms, {one, other}):
        first = _like(arms, neither, one, arms[both].get(one))
        second = _like(arms, neither, other, arms[both].get(other))
        if first and second and order.index(neither) < min(map(order.index, (both, first, second))):
            name = f"{one} {arms[both].get(one)} x {other} {arms[both].get(other)}"
            found.append(interaction(name, both=both, one=first, other=second, neither=neither))
    return found


def _like(arms: Arms, arm: str, key: str, value: str | None) -> str | None:
    """The arm that differs from another in one factor's value alone."""
    wanted = {**arms[arm], key: value}
    return next((name for name, own in arms.items() if {**own, key: own.get(key)} == wanted), None)
