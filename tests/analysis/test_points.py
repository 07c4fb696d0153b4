"""Where trials and other decoders stand in the plane."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
from logged_sweep import Trials, record, teacher

from analysis import page, style
from analysis.pareto import compute, write
from analysis.points import RATIO
from analysis.scale import Scale, unmap
from analysis.store import load

Fresh = Callable[..., str]
MATCHING = {"ler_over_matching": 0.8, "ler_over_matching_lo": 0.75, "ler_over_matching_hi": 0.85}


def timed(name: str, p50: float, ratio: float, **values: object) -> Trials:
    extra = {"p50_lo": 0.9 * p50, "p50_hi": 1.1 * p50, RATIO: ratio, f"{RATIO}_lo": 0.98 * ratio}
    return [(record(name, t_pair_p50_ms=p50, t_pair_p95_ms=9e3, extra=extra | {f"{RATIO}_hi": 1.02 * ratio}), [])]


def decoders(timed_too: bool) -> Trials:
    """A teacher of LER 0.02 and a student of 0.025; plain matching has 0.025 as well, the exact limit 0.016."""
    clock = {"us_per_shot_matching": 4.0} if timed_too else {}
    shared = {"domain": "alphaqubit", "quality": 0.02, "t_pair_p50_ms": 0.8, "t_pair_p95_ms": 0.9}
    extra = {RATIO: 1.0, f"{RATIO}_lo": 1.0, f"{RATIO}_hi": 1.0, **MATCHING, "ler_over_exact": 1.25, **clock}
    student = {"quality": 0.025, "drop": 0.25, "drop_lo": 0.2, "drop_hi": 0.3, "t_pair_p50_ms": 0.5}
    own = {RATIO: 2.0, f"{RATIO}_lo": 1.9, f"{RATIO}_hi": 2.1, "ler_over_matching": 1.0}
    return [
        (teacher(**shared, extra=extra), []),
        (record("AQ1_KD_run1", **(shared | student), verdict="fail", extra=own), []),
    ]


def test_trials_stand_at_the_teachers_p50_over_their_ratio(fresh: Fresh) -> None:
    """One trial was timed at three times the load of the other: as measured it would be the slowest of all."""
    trials = [*timed("K_teacher_run1", 40, 1.0), *timed("K_calm_run1", 20, 2.0), *timed("K_busy_run1", 60, 2.5)]
    found = compute(load(fresh("s", trials), "s"))
    x = {p.exp_id: p.x for p in found.points}
    assert (x["K_teacher_run1"].value, x["K_calm_run1"].value, x["K_busy_run1"].value) == (40, 20, 16)
    assert (x["K_busy_run1"].lo, x["K_busy_run1"].hi) == pytest.approx((16 / 1.02, 16 / 0.98))
    assert "40 ms (median of 3 timings)" in found.clock and "measured" not in found.clock
    assert "by the ratio to the teacher's" in style.axis_words(found)[0]
    assert "2.50 x the teacher's speed, same runtime  [2.45, 2.55]" in page.render(found)


def test_a_trial_without_a_ratio_stays_where_it_was_measured(fresh: Fresh) -> None:
    trials = [*timed("K_a_run1", 60, 2.5), (record("K_b_run1", t_pair_p50_ms=20.0), [])]
    found = compute(load(fresh("s", trials), "s"))
    by_name = {p.exp_id: p for p in found.points}
    assert by_name["K_a_run1"].x.value == 60 and by_name["K_b_run1"].x.value == 20
    assert by_name["K_b_run1"].ratio is None and "1 without a ratio: p50 as measured" in found.clock


@pytest.mark.parametrize("timed_too", [True, False])
def test_decoders_are_drawn_beside_matching_and_the_exact_limit(fresh: Fresh, tmp_path: Path, timed_too: bool) -> None:
    data = load(fresh("s", decoders(timed_too)), "s")
    found = compute(data)
    assert found.rate == pytest.approx(0.02) and found.words.time == "µs"
    assert [p.x.value for p in found.points] == pytest.approx([900, 450])  # the median of 800 and 1000 µs
    others = {other.name: other for other in found.others}
    matching, limit = others["PyMatching"], others["exact limit"]
    assert matching.drop.value == pytest.approx(25) and matching.record["quality"] == pytest.approx(0.025)
    assert (matching.drop.lo, matching.drop.hi) == pytest.approx((100 * (1 / 0.85 - 1), 100 * (1 / 0.75 - 1)))
    assert matching.x == (4.0 if timed_too else None)
    assert limit.is_limit and limit.drop.value == pytest.approx(-20) and limit.x is None
    left, right = style.y_ticks(found, style.axes(found))
    assert "0.02" in [label for _, label in left] and dict(map(reversed, right))["0"] == pytest.approx(0)  # type: ignore[arg-type]
    paths = write(data, found, tmp_path / "out")
    rows = {row["exp_id"]: row for row in csv.DictReader(paths[0].open(encoding="utf-8"))}
    assert rows["PyMatching"]["role"] == "other decoder" and float(rows["PyMatching"]["quality"]) == pytest.approx(
        0.025
    )
    assert float(rows["AQ1_KD_run1"]["x_us"]) == pytest.approx(450)
    assert rows["PyMatching"]["x_us"] == ("4.0" if timed_too else "")
    text = paths[2].read_text(encoding="utf-8")
    assert "exact limit" in text and "drop against the teacher (%)" in text


def test_rates_have_round_ticks_on_a_logarithmic_axis() -> None:
    scale = Scale(rates=True)
    drops = [-60.0, -5.0, 0.0, 3.0, 900.0]
    places = [scale.map(drop) for drop in drops]
    assert places == sorted(places) and [unmap(scale, place) for place in places] == pytest.approx(drops)
    assert scale.map(0.0) == 0 and scale.map(900.0) == pytest.approx(1)
    assert scale.map(-100.0) == scale.map(-99.9), "no error seen at all still has a place"
    assert ("0", 0.0) in [(label, round(value, 9)) for value, label in scale.ticks(-20, 30)]
    assert 2 <= len(scale.ticks(-60, 4900)) <= 9
