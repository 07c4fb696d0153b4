import tomllib
from pathlib import Path

import numpy as np
import pytest

from engines.errors import InputError
from trainables.alphaqubit import matching
from trainables.alphaqubit.circuits import both_observables_circuit, memory_circuit
from trainables.alphaqubit.layout import layout_of


@pytest.fixture(scope="module")
def shots():
    circuit = memory_circuit("Z", 3, 5, 0.01)
    events, label = circuit.compile_detector_sampler(seed=4).sample(2048, separate_observables=True)
    return circuit, events, label


def test_the_extra_installs_what_is_imported():
    root = Path(__file__).parents[3]
    wanted = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]["decoders"]
    assert {name.replace("-", "_") for name in wanted} == set(matching._MODULES.values()) - {"pymatching"}
    pinned = {line.split("==")[0] for line in (root / "constraints.txt").read_text().splitlines()}
    assert {*wanted, "ldpc"} <= pinned


@pytest.mark.parametrize("name", matching.available())
def test_every_decoder_that_is_installed(shots, name):
    """Rates within .0768 (exact) and .0914 (matching), four standard errors around them. The others are slow."""
    circuit, events, label = shots
    count = 2048 if name.startswith("pymatching") else 256
    found = matching.decode(name, circuit, events[:count])
    assert found.shape == (count, 1) and found.dtype == np.uint8 and found.max() == 1
    wrong = (found != label[:count]).mean()
    error = 4 * np.sqrt(0.08 * 0.92 / count)
    assert 0.0768 - error < wrong < 0.0914 + error
    assert not matching.decode(name, circuit, np.zeros((3, events.shape[1]), np.uint8)).any()
    both = both_observables_circuit(3, 1, 0.01)
    assert matching.decode(name, both, np.zeros((2, both.num_detectors), bool)).shape == (2, 2)


def test_plain_and_correlated_differ_and_take_a_dem(shots):
    circuit, events, _ = shots
    dem = circuit.detector_error_model(decompose_errors=True)
    plain, correlated = (matching.decode(name, dem, events) for name in ("pymatching", "pymatching_correlated"))
    assert np.array_equal(plain, matching.decode("pymatching", circuit, events))
    assert 0 < (plain != correlated).mean() < 0.1


@pytest.mark.parametrize("correlated", [False, True])
def test_one_shot_a_call_decides_as_all_at_once(shots, correlated):
    circuit, events, _ = shots
    decode = matching.single(circuit, correlated)
    found = np.stack([decode(row.astype(np.uint8)) for row in events[:300]])
    name = "pymatching_correlated" if correlated else "pymatching"
    assert np.array_equal(found, matching.decode(name, circuit, events[:300]))


def test_events_of_the_grid_are_the_same_events(shots):
    circuit, events, _ = shots
    placement = layout_of(circuit)
    grid = placement.to_flat(placement.to_grid(events))
    assert np.array_equal(matching.decode("pymatching", circuit, grid), matching.decode("pymatching", circuit, events))


def test_bad_input_ends_in_one_line(shots, monkeypatch):
    circuit, events, _ = shots
    with pytest.raises(InputError, match="decoder 'mwpm' is unknown, use one of pymatching, pymatching_correlated"):
        matching.decode("mwpm", circuit, events)
    with pytest.raises(InputError, match=r"events of shape \(2048, 39\): expected \(shots, 40 detectors\)"):
        matching.decode("pymatching", circuit, events[:, 1:])
    with pytest.raises(InputError, match="flips more than two detectors"):
        matching.decode("pymatching", circuit.detector_error_model(), events)
    monkeypatch.setattr(matching, "available", lambda: ("pymatching", "pymatching_correlated"))
    with pytest.raises(InputError, match=r"decoder 'tesseract' is not installed: pip .* -e '.\[decoders\]'"):
        matching.decode("tesseract", circuit, events)
