import gc
import random
import statistics
import time
from collections.abc import Callable

import numpy as np
import pytest

from engines.errors import InputError
from engines.latency import environment, interleaved, measure, summarise


def percentile(values: list[float], share: float) -> float:
    """Linear interpolation between order statistics, written out."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def lognormal(seed: int, n: int, median: float, spread: float = 0.3) -> np.ndarray:
    return median * np.exp(np.random.default_rng(seed).normal(0, spread, n))


def test_point_values_against_a_plain_computation() -> None:
    samples = {"a": lognormal(1, 37, 10.0), "b": lognormal(2, 37, 4.0)}
    result = summarise(samples, "a", seed=0)
    for name, values in samples.items():
        got, plain = result[name], list(values)
        assert got.p50_ms == pytest.approx(statistics.median(plain))
        assert got.p95_ms == pytest.approx(percentile(plain, 0.95))
        assert got.ratio == pytest.approx(statistics.median(samples["a"]) / statistics.median(plain))
        assert got.p50_lo <= got.p50_ms <= got.p50_hi and got.p95_lo <= got.p95_ms <= got.p95_hi
        assert got.repeats == 37
    assert result["a"].ratio == result["a"].ratio_lo == result["a"].ratio_hi == 1


def test_intervals_against_a_slow_bootstrap() -> None:
    noise = lognormal(3, 60, 1.0)
    a, b = list(noise * lognormal(4, 60, 9.0, 0.1)), list(noise * lognormal(5, 60, 3.0, 0.1))
    got = summarise({"ref": np.array(a), "own": np.array(b)}, "ref", seed=1)["own"]
    rng = random.Random(7)
    p50, p95, ratio = [], [], []
    for _ in range(4000):
        rounds = [rng.randrange(60) for _ in range(60)]
        mine = [b[i] for i in rounds]
        p50.append(statistics.median(mine))
        p95.append(percentile(mine, 0.95))
        ratio.append(statistics.median([a[i] for i in rounds]) / p50[-1])
    # Both are Monte-Carlo estimates of the same quantiles: allow a part of the interval's own width.
    for lo, hi, slow in (
        (got.p50_lo, got.p50_hi, p50),
        (got.p95_lo, got.p95_hi, p95),
        (got.ratio_lo, got.ratio_hi, ratio),
    ):
        margin = 0.15 * (hi - lo)
        assert lo == pytest.approx(percentile(slow, 0.025), abs=margin)
        assert hi == pytest.approx(percentile(slow, 0.975), abs=margin)


def test_pairing_cancels_what_all_candidates_share() -> None:
    noise = lognormal(6, 80, 1.0, spread=1.0)
    result = summarise({"ref": noise * 6, "own": noise * 2}, "ref", seed=0)["own"]
    assert result.ratio_lo == pytest.approx(3) and result.ratio_hi == pytest.approx(3)
    assert result.p50_hi / result.p50_lo > 1.3  # while the latency itself is uncertain


def test_intervals_cover_the_truth() -> None:
    # 200 data sets of 50 rounds, 95 % intervals of a median bootstrap: with a true coverage of .93 or more,
    # fewer than 174 hits (.87) have a probability below .002; the seeds are fixed.
    hits = ratio_hits = 0
    for seed in range(200):
        samples = {"ref": lognormal(1000 + seed, 50, 8.0), "own": lognormal(5000 + seed, 50, 4.0)}
        got = summarise(samples, "ref", seed=seed)["own"]
        hits += got.p50_lo <= 4.0 <= got.p50_hi
        ratio_hits += got.ratio_lo <= 2.0 <= got.ratio_hi
    assert hits >= 174 and ratio_hits >= 174


def test_same_seed_same_interval() -> None:
    samples = {"a": lognormal(1, 30, 10.0), "b": lognormal(2, 30, 4.0)}
    assert summarise(samples, "a", seed=3) == summarise(samples, "a", seed=3)
    assert summarise(samples, "a", seed=3) != summarise(samples, "a", seed=4)


@pytest.mark.parametrize("bad", [[1.0], [1.0, float("nan")], [1.0, 0.0], [1.0, float("inf")]])
def test_bad_samples_are_refused(bad: list[float]) -> None:
    with pytest.raises(InputError, match="samples"):
        summarise({"a": np.array(bad)}, "a", seed=0)


def test_unequal_rounds_and_unknown_reference_are_refused() -> None:
    with pytest.raises(InputError, match=r"shapes .*'b': \(3,\)"):
        summarise({"a": np.ones(2), "b": np.ones(3)}, "a", seed=0)
    with pytest.raises(InputError, match=r"reference='c'.*\['a', 'b'\]"):
        summarise({"a": np.ones(2), "b": np.ones(2)}, "c", seed=0)


def recorder(names: str, log: list[str]) -> dict[str, Callable[[], object]]:
    return {name: (lambda name=name: log.append(name)) for name in names}


def rounds_of(seed: int, warmup: int, repeats: int) -> list[str]:
    log: list[str] = []
    times = measure(recorder("abc", log), warmup, repeats, seed)
    assert {name: len(t) for name, t in times.items()} == dict.fromkeys("abc", repeats)
    assert len(log) == 3 * (warmup + repeats)
    return ["".join(log[i : i + 3]) for i in range(0, len(log), 3)]


def test_every_round_runs_all_candidates_in_a_random_order() -> None:
    rounds = rounds_of(seed=5, warmup=3, repeats=60)
    assert {"".join(sorted(r)) for r in rounds} == {"abc"}
    assert len(set(rounds)) == 6  # all orders occur: a missing one has a probability below 1e-4
    assert rounds == rounds_of(seed=5, warmup=3, repeats=60) != rounds_of(seed=6, warmup=3, repeats=60)


def test_order_of_speeds_is_found_through_a_drifting_machine() -> None:
    calls = 0

    def sleeper(base: float) -> Callable[[], object]:
        def call() -> None:
            nonlocal calls
            calls += 1
            time.sleep(base * (1 + calls / 45))  # becomes twice as slow on the way

        return call

    result = interleaved({"slow": sleeper(0.008), "mid": sleeper(0.002), "fast": sleeper(0.0005)}, "mid", 1, 15, 0)
    assert result["fast"].p50_ms < result["mid"].p50_ms < result["slow"].p50_ms
    assert result["slow"].ratio_hi < 1 < result["fast"].ratio_lo
    assert result["slow"].p50_ms >= 8  # milliseconds: a sleep is never shorter than asked


def test_collector_is_off_while_timing_and_back_after_a_failure() -> None:
    seen: list[bool] = []
    measure({"a": lambda: seen.append(gc.isenabled())}, 0, 2, 0)
    assert seen == [False, False] and gc.isenabled()

    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        measure({"a": fail}, 0, 2, 0)
    assert gc.isenabled()
    gc.disable()
    try:
        measure({"a": lambda: None}, 0, 2, 0)
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize(("warmup", "repeats"), [(-1, 5), (0, 1), (0, 0)])
def test_bad_counts_are_refused(warmup: int, repeats: int) -> None:
    with pytest.raises(InputError, match=f"warmup={warmup}, repeats={repeats}"):
        measure({"a": lambda: None}, warmup, repeats, 0)


def test_nothing_runs_before_the_reference_is_known() -> None:
    log: list[str] = []
    with pytest.raises(InputError, match="reference='z'"):
        interleaved(recorder("ab", log), "z", 1, 2, 0)
    with pytest.raises(InputError, match="no candidates"):
        measure({}, 1, 2, 0)
    assert not log


def test_environment_describes_this_machine() -> None:
    env = environment()
    assert set(env) == {"cpu", "isa", "cores", "load_1m", "gpu"}
    assert env["cpu"] and isinstance(env["cores"], int) and env["cores"] >= 1
    assert isinstance(env["load_1m"], float) and env["load_1m"] >= 0
    assert isinstance(env["isa"], str)


@pytest.mark.gpu
def test_cuda_work_is_waited_for() -> None:
    import torch

    x = torch.randn(4096, 4096, device="cuda")

    def launch(n: int) -> Callable[[], object]:
        return lambda: [x @ x for _ in range(n)]

    result = interleaved({"one": launch(1), "many": launch(20)}, "one", 3, 10, 0)
    assert result["many"].p50_ms > 5 * result["one"].p50_ms
