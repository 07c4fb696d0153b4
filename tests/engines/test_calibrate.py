import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.calibrate import _BINS, _Histogram, calibrate, channel_maxima
from engines.errors import InputError

Feeds = list[tuple[np.ndarray]]
NORM, PROBS = "/norm1/LayerNormalization_output_0", "/Softmax_output_0"


def seen(path: Path, feeds: Feeds, tensor: str) -> np.ndarray:
    """All values of a tensor, from a session of the test's own."""
    model = onnx.load(str(path))
    model.graph.output.append(onnx.ValueInfoProto(name=tensor))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.stack([session.run([tensor], {"image": x})[0] for (x,) in feeds])


def test_minmax_is_exact_and_plain_data(block_file: Path, feeds: Feeds) -> None:
    ranges = calibrate(block_file, feeds, ["image", NORM, PROBS], "minmax", 8)
    for name in (NORM, PROBS):
        values = seen(block_file, feeds, name)
        assert ranges[name] == (values.min(), values.max())
    assert ranges["image"] == (min(x.min() for (x,) in feeds), max(x.max() for (x,) in feeds))
    assert {k: tuple(v) for k, v in json.loads(json.dumps(ranges)).items()} == ranges
    assert not list(block_file.parent.glob(".*"))


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_clipping_methods_cut_an_outlier(block_file: Path, feeds: Feeds, method: str) -> None:
    rng = np.random.default_rng(1)
    many = [(rng.normal(size=(1, 3, 16, 16)).astype(np.float32),) for _ in range(64)]
    many[3][0][0, 0, 0, 0] = 50.0
    lo, hi = calibrate(block_file, many, ["image"], method, 64)["image"]
    assert 2.0 < hi < 6.0 and -6.0 < lo < -2.0


def test_percentile_agrees_with_numpy() -> None:
    histogram, rng = _Histogram(), np.random.default_rng(0)
    values = rng.normal(size=(10, 50_000)).astype(np.float32) * np.arange(1, 11, dtype=np.float32)[:, None] + 3
    for part in values:
        histogram.add(part, count=True)
    bin_width = 2 * histogram.width / _BINS
    want = np.quantile(values, [1e-4, 1 - 1e-4])
    np.testing.assert_allclose(histogram.range("percentile"), want, atol=2 * bin_width)


@settings(max_examples=30)
@given(st.lists(st.floats(-1e6, 1e6, width=32).map(float), min_size=1, max_size=30), st.integers(1, 5))
def test_histogram_loses_nothing_while_it_widens(numbers: list[float], step: int) -> None:
    histogram = _Histogram()
    for i in range(0, len(numbers), step):
        histogram.add(np.array(numbers[i : i + step], np.float32), count=True)
    whole = np.array(numbers, np.float32)
    assert histogram.counts.sum() == len(numbers)
    assert histogram.range("minmax") == (whole.min(), whole.max())
    want = np.histogram(whole, bins=_BINS, range=(-histogram.width, histogram.width))[0]
    # The same number of values at or below each edge, up to one bin of rounding at the edges.
    assert np.abs(np.cumsum(histogram.counts) - np.cumsum(want)).sum() <= len(numbers)


def test_channel_maxima(block_file: Path, feeds: Feeds) -> None:
    values = seen(block_file, feeds, NORM)
    found = channel_maxima(block_file, feeds, [NORM], 8)[NORM]
    np.testing.assert_array_equal(found, np.abs(values).reshape(-1, 16).max(0))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_activation_is_named(block_file: Path, feeds: Feeds, bad: float) -> None:
    broken = [*feeds[:2], (feeds[2][0].copy(),)]
    broken[2][0][0, 0, 0, 0] = bad
    with pytest.raises(InputError, match="sample 3: activation 'image' is NaN or infinite"):
        calibrate(block_file, broken, ["image"], "minmax", 3)


def test_too_few_samples_and_other_bad_input(block_file: Path, feeds: Feeds, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="8 calibration samples, asked for 9"):
        calibrate(block_file, iter(feeds), ["image"], "minmax", 9)
    with pytest.raises(InputError, match="no tensor '/nope'"):
        calibrate(block_file, feeds, ["/nope"], "minmax", 1)
    with pytest.raises(InputError, match="method='kl'"):
        calibrate(block_file, feeds, ["image"], "kl", 1)
    with pytest.raises(InputError, match="samples=0"):
        calibrate(block_file, feeds, ["image"], "minmax", 0)
    with pytest.raises(InputError, match="no such ONNX file"):
        calibrate(tmp_path / "none.onnx", feeds, ["image"], "minmax", 1)
    assert [p.name for p in block_file.parent.iterdir()] == ["block.onnx"]
