"""The inputs of benchmarks/scenes.py: pointmaps that agree with the cameras, and what it refuses."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import scenes as bench

from trainables.dust3r.align import placed


def test_noisy_maps_are_the_scene_in_units_of_their_own():
    local, poses, _ = scene = bench.room()
    found = bench.noisy(scene, 0)
    assert local.shape == (4, 168, 224, 3) and len(found.edges) == 12
    units = []
    for k, (i, j) in enumerate(found.edges):
        unit = (found.pts1[k] / local[i])[..., 2].median()
        true = placed((torch.linalg.inv(poses[i]) @ poses[j])[None], local[[j]])[0] * unit
        off = (found.pts2[k] - true).norm(dim=-1) / true.norm(dim=-1)
        assert off.median() == pytest.approx(0.02 * 1.538, rel=0.05)  # the median length of a normal 3-vector
        units.append(float(unit))
    assert max(units) > 1.5 * min(units)


@pytest.mark.parametrize(("flags", "said"), [(["--rounds", "0"], "--rounds 0"), (["--sample", "nosuch"], "nosuch")])
def test_refused_in_one_line(capsys, flags, said):
    assert bench.main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and len(error.splitlines()) == 1
