"""How many heads and channels stay, and where; no weights are needed."""

import itertools
import math

import pytest
import torch

from engines.errors import InputError
from engines.footprint import params_M
from trainables.dust3r.config import Config
from trainables.dust3r.domain import SMALL_TEACHER
from trainables.dust3r.model import DUSt3R
from trainables.dust3r.narrow import Part, narrowed, parts_of, partway

SMALL = Config(**SMALL_TEACHER)
GROUPS = ("enc_heads", "enc_ffn", "dec_heads", "dec_ffn")


def ratios(rho, residual=0.0):
    return {**dict.fromkeys(GROUPS, rho), "residual": residual}


def total(config, group):
    return sum(config.count(*part) for part in parts_of(config) if part.group == group)


def params(config):
    with torch.device("meta"):
        return params_M(DUSt3R(config))


@pytest.mark.parametrize("rho", [0.1, 0.3, 0.5])
def test_a_group_loses_its_channel_ratio_to_a_unit(rho):
    """30 and 64 heads of which whole ones leave, 3840 and 4096 channels of which eights do."""
    new = narrowed(SMALL, ratios(rho))
    for group, unit in zip(GROUPS, (1, 8, 1, 8), strict=True):
        removed = total(SMALL, group) - total(new, group)
        assert abs(removed - rho * total(SMALL, group)) <= unit / 2, group
    for part in parts_of(SMALL):
        units = SMALL.count(*part) / (8 if part.name == "mlp" else 1)
        removed = units * (1 - new.count(*part) / SMALL.count(*part))
        assert abs(removed - rho * units) < 1 + 1e-9, "uniform: no layer is off by a whole unit"


def test_achieved_ratio_of_parameters():
    whole = params(SMALL)
    assert params(narrowed(SMALL, ratios(0.1))) / whole == pytest.approx(0.905, abs=0.005)
    assert params(narrowed(SMALL, ratios(0.3))) / whole == pytest.approx(0.71, abs=0.005)
    assert params(narrowed(SMALL, ratios(0.3, residual=0.3))) / whole < 0.51


def test_narrowed_config_is_plain_data():
    new = narrowed(SMALL, ratios(0.3, residual=0.2))
    assert Config(**new.to_data()) == new and new.to_data()["layers"]["enc_blocks.attn"] == [3, 3, 3, 4, 4, 4]
    assert (new.enc_embed_dim, new.dec_embed_dim, new.head_width("enc")) == (128, 104, 32)
    assert narrowed(SMALL, ratios(0.0)).layers["dec_blocks2.cross_attn"] == (4, 4, 4, 4)


def test_where_units_leave_is_the_cheapest_choice():
    """Against all choices of how many heads each of the encoder's six layers loses."""
    heads = [part for part in parts_of(SMALL) if part.group == "enc_heads"]
    for seed, rho in itertools.product(range(4), (0.2, 0.4, 0.6)):
        g = torch.Generator().manual_seed(seed)
        costs = {part: float(torch.rand(1, generator=g) ** 2) + 0.02 for part in parts_of(SMALL)}
        new = narrowed(SMALL, ratios(rho), costs)
        removed = round(30 * rho)
        found = sum(costs[part] * ((5 - new.count(*part)) / 5) ** 2 for part in heads)
        best = min(
            sum(costs[part] * (k / 5) ** 2 for part, k in zip(heads, choice, strict=True))
            for choice in itertools.product(range(min(5, math.ceil(10 * rho) + 1)), repeat=6)
            if sum(choice) == removed
        )
        assert sum(5 - new.count(*part) for part in heads) == removed
        assert math.isclose(found, best, rel_tol=1e-9)


def test_no_part_loses_more_than_twice_its_share_however_cheap_it_seems():
    costs = dict.fromkeys(parts_of(SMALL), 1.0)
    costs[Part("enc_blocks", "attn", 2)] = costs[Part("enc_blocks", "mlp", 2)] = 0.0
    new = narrowed(SMALL, ratios(0.3), costs)
    assert new.layers["enc_blocks.attn"][2] == 2 and new.layers["enc_blocks.mlp"][2] == 256
    assert narrowed(SMALL, ratios(0.6), costs).layers["enc_blocks.attn"][2] == 1, "but everyone keeps something"


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_partway(share):
    new = narrowed(SMALL, ratios(0.3, residual=0.3))
    middle = partway(SMALL, new, share)
    if share == 1:
        assert middle == new
    for part in parts_of(SMALL):
        wide, narrow, between = SMALL.count(*part), new.count(*part), middle.count(*part)
        assert abs(between - (wide - (wide - narrow) * share)) <= (4 if part.name == "mlp" else 0.5)
    assert params(SMALL) > params(middle) >= params(new)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (ratios(0.9), "0.9 of enc_heads would remove all heads of a layer.*at most 0.8"),
        ({**ratios(0.3), "dec_heads": 0.8}, "0.8 of dec_heads.*at most 0.75"),
        ({**ratios(0.3), "enc_ffn": 0.9999}, "feed-forward channels.*at most 0.988"),
        (ratios(0.3, residual=0.99), "0.99 of the residual stream would remove all 160 channels"),
    ],
)
def test_a_ratio_that_leaves_nothing_is_one_line(given, named):
    with pytest.raises(InputError, match=named) as error:
        narrowed(SMALL, given)
    assert "\n" not in str(error.value)
