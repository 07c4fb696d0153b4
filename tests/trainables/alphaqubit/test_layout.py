import numpy as np
import pytest
import stim

from engines.errors import InputError
from trainables.alphaqubit.layout import rotated


@pytest.mark.parametrize("basis", ["X", "Z"])
@pytest.mark.parametrize("distance", [3, 5, 7])
def test_stabilizers_lie_where_stim_puts_its_detectors(distance, basis):
    circuit = stim.Circuit.generated(f"surface_code:rotated_memory_{basis.lower()}", distance=distance, rounds=3)
    x, y, t = np.array(list(circuit.get_detector_coordinates().values())).T
    layout = rotated(distance, basis)
    for cells, seen in ((layout.cells, t == 1), (layout.cells[layout.on_basis], t == 0)):
        assert cells.tolist() == sorted((np.stack((y, x), axis=1)[seen] // 2).tolist())
    assert layout.cells.dtype == np.int64 and len(layout.cells) == distance**2 - 1


@pytest.mark.parametrize(
    ("distance", "basis", "named"), [(4, "Z", "distance=4"), (1, "Z", "=1"), (3, "z", "basis='z'")]
)
def test_what_is_no_such_code_is_named(distance, basis, named):
    with pytest.raises(InputError, match=named):
        rotated(distance, basis)
