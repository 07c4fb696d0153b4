import dataclasses
import json

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional as F

from engines.errors import InputError
from sweeps.settings import DECODER_PRETRAIN, DECODER_SIZES, resolve
from sweeps.spec import SettingsFile
from trainables.alphaqubit.blocks import GridConv, softmax
from trainables.alphaqubit.config import OUTPUTS, Config, from_data
from trainables.alphaqubit.layout import rotated
from trainables.alphaqubit.model import Decoder, build, without_training_heads
from trainables.alphaqubit.settings import DecoderSizes, Size

TINY = {
    **{"dim": 8, "layers": 2, "heads": 2, "key_dim": 4, "conv_channels": 6, "dilations": (1, 2), "bias_dim": 4},
    **{"readout_dim": 5, "readout_layers": 1},
}


def decoder(distance=3, basis="Z", **changes):
    """Every weight is moved: where some start at zero, their removal would show nothing."""
    torch.manual_seed(0)
    model = Decoder(Config(**{**TINY, **changes}), rotated(distance, basis))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def bits(shots=6, rounds=4, distance=3, basis="Z", seed=1):
    """Events and the measurements they belong to, silent where a memory experiment is."""
    g = torch.Generator().manual_seed(seed)
    events = (torch.rand(shots, rounds + 1, distance**2 - 1, generator=g) < 0.3).to(torch.uint8)
    off = ~torch.from_numpy(rotated(distance, basis).on_basis)
    events[:, 0, off] = events[:, -1, off] = 0
    measurements = (events.cumsum(1) % 2).to(torch.uint8)
    measurements[:, -1, off] = 0
    return events, measurements


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("distance", [3, 5])
def test_every_weight_gets_a_gradient(distance, outputs):
    model = decoder(distance, outputs=outputs, next_stabilizer=True)
    features = model.features(*bits(distance=distance))
    (features["logits"].square().sum() + features["next"].square().sum()).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-6]
    assert silent == []


PARTS = [
    "embedding.inputs",
    "embedding.final_inputs",
    "embedding.off_basis",
    "embedding.stabilizer",
    "embedding.resnet",
    "pair_inputs",
    "pair_resnet",
    "layers.1.attention.layout",
    "layers.1.attention.events",
    "layers.1.attention.qkv",
    "layers.1.attention.out",
    "layers.1.dense",
    "layers.1.grid.convs.0",
    "layers.1.grid.convs.1",
    "layers.1.grid.convs.0.padding",
    "layers.1.grid.out",
    "readout.qubits",
    "readout.qubits.padding",
    "readout.lines",
    "readout.heads",
]


@pytest.mark.parametrize("part", PARTS)
def test_without_a_part_the_answer_is_another(part):
    model = decoder()
    with torch.no_grad():
        before = model(*bits())
        weights = [p for name, p in model.named_parameters() if f"{name}.".startswith(f"{part}.")]
        for p in weights:
            p.zero_()
        assert weights and (model(*bits()) - before).abs().max() > 1e-4


@pytest.mark.parametrize("distance", [3, 5])
@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (3, 2), (2, 1)])
def test_convolutions_are_those_of_the_grid(distance, kernel, dilation):
    cells, side = rotated(distance, "Z").cells, distance + 1
    convs = [GridConv(cells, distance, (3, 5), kernel, dilation, dense) for dense in (True, False)]
    with torch.no_grad():
        convs[0].padding.normal_()
        convs[0].bias.normal_()
    convs[1].load_state_dict(convs[0].state_dict())
    x = torch.randn(4, len(cells), 3)
    grid = convs[0].padding.expand(4, side, side, 3).clone()
    grid[:, cells[:, 0], cells[:, 1]] = x
    edge = dilation if kernel == 3 else 0
    out = F.conv2d(grid.permute(0, 3, 1, 2), convs[0].weight, convs[0].bias, padding=edge, dilation=dilation)
    out = out.permute(0, 2, 3, 1)
    expected = out[:, cells[:, 0], cells[:, 1]] if kernel == 3 else out.flatten(1, 2)
    for conv in convs:
        torch.testing.assert_close(conv(x, conv.constants()), expected)


def test_attention_is_softmax_of_products_layout_and_event_terms():
    attention = decoder().layers[0].attention
    x, codes = torch.randn(3, 8, 8), torch.randint(0, 4, (3, 8), dtype=torch.int32)
    pairs = torch.randn(8, 8, 4)
    q, k, v = attention.qkv(F.layer_norm(x, (8,))).view(3, 8, 2, 3, 4).permute(3, 0, 2, 1, 4)
    e, p = (codes // 2).float(), (codes % 2).float()
    u, w = torch.stack((torch.ones_like(e), e, p), -1), torch.stack((e, p, e * p), -1)
    scores = q @ k.mT / 2 + attention.bias(pairs) + torch.einsum("nia,hab,njb->nhij", u, attention.events, w)
    expected = x + attention.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(3, 8, 8))
    torch.testing.assert_close(attention(x, codes, attention.constants(pairs)), expected)


def test_softmax_and_its_gradient():
    scores = torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(softmax(scores), scores.softmax(-1))
    assert torch.autograd.gradcheck(softmax, (scores,))
    assert softmax(torch.tensor([[1e4, 0.0]])).tolist() == [[1.0, 0.0]]


def test_the_embedding_is_the_sum_of_projections_through_a_resnet():
    model = decoder()
    own, (events, measurements) = model.embedding, bits(rounds=1)
    both = torch.stack((measurements, events), -1).float()
    first = own.resnet(own.inputs(both[:, 0]) + own.stabilizer)
    last = torch.where(own.on_basis[:, 0], own.final_inputs(both[:, 1]), own.off_basis) + own.stabilizer
    inputs, codes = model._inputs(events, measurements, model.constants())
    torch.testing.assert_close(inputs[0], first / 2**0.5)
    torch.testing.assert_close(inputs[1], own.resnet(last) / 2**0.5)
    assert torch.equal(codes[0], 2 * events[:, 0].int())
    assert torch.equal(codes[1], 2 * events[:, 1].int() + events[:, 0])


@pytest.mark.parametrize("distance", [3, 5])
@pytest.mark.parametrize("rounds", [1, 4, 7])
def test_steps_are_exactly_the_whole_pass(distance, rounds):
    model = decoder(distance)
    events, measurements = bits(rounds=rounds, distance=distance)
    with torch.no_grad():
        whole, features, const = model(events, measurements), model.features(events, measurements), model.constants()
        state, before = model.initial_state(len(events)), torch.zeros_like(events[:, 0])
        for t in range(rounds + 1):
            final = torch.tensor(t == rounds).int() if t % 2 else t == rounds
            state = model.step(state, events[:, t], before, measurements[:, t], final, const)
            before = events[:, t]
            assert torch.equal(state, features["rnn"][:, t])
        assert torch.equal(model.read(state, const), whole) and torch.equal(model.read(state), whole)
    torch.testing.assert_close(features["logits"], whole)
    assert features["transformer"].shape == features["rnn"].shape == (6, rounds + 1, distance**2 - 1, 8)
    assert features["readout"].shape == (6, rounds + 1, 1)
    assert (features["transformer"] - features["rnn"]).abs().max() > 0.01


def test_one_shot_does_not_depend_on_the_others():
    model, (events, measurements) = decoder(), bits(shots=9)
    order = torch.randperm(9)
    torch.testing.assert_close(model(events[order], measurements[order]), model(events, measurements)[order])
    torch.testing.assert_close(model(events[:1], measurements[:1]), model(events, measurements)[:1])
    assert torch.equal(model(events.bool(), measurements.long()), model(events, measurements))


def test_without_knowledge_of_place_the_code_turned_half_around_decodes_alike():
    # Turning the rotated code by 180 degrees maps stabilizers, bases and lines to each other. The parts that know
    # places are silenced or made even: stabilizer vectors, offsets and coordinates, the kernels' orientation.
    model, turn = decoder(), np.arange(8)[::-1].copy()
    layout = rotated(3, "Z")
    assert (layout.cells[turn] == 3 - layout.cells).all() and (layout.on_basis[turn] == layout.on_basis).all()
    with torch.no_grad():
        model.embedding.stabilizer.zero_()
        model.pair_inputs.weight[:, :6] = 0
        for conv in (m for m in model.modules() if isinstance(m, GridConv)):
            conv.weight.copy_((conv.weight + conv.weight.flip(2, 3)) / 2)
        events, measurements = bits()
        turned = model(events[..., turn], measurements[..., turn])
        torch.testing.assert_close(turned, model(events, measurements))
        other = model(events[..., torch.tensor([1, 0, 2, 3, 4, 5, 6, 7])], measurements)
        assert (other - turned).abs().max() > 1e-4


def test_final_measurements_off_the_basis_say_nothing():
    model, (events, measurements) = decoder(), bits()
    off = ~torch.from_numpy(rotated(3, "Z").on_basis)
    noise = measurements.clone()
    noise[:, -1, off] = 1
    assert torch.equal(model(events, noise), model(events, measurements))


def test_the_mean_over_lines_may_go_before_the_last_linear_layer():
    readout = decoder(outputs="xz").readout
    x = torch.randn(4, 8, 8)
    qubits = F.gelu(readout.qubits(x, readout.qubits.constants())).view(4, 3, 3, 5)
    lines = {"X": [qubits[:, :, j].mean(1) for j in range(3)], "Z": [qubits[:, i].mean(1) for i in range(3)]}
    expected = [
        torch.stack([readout.heads[side](readout.lines[side](line)) for line in lines[side]]).mean(0) for side in "XZ"
    ]
    torch.testing.assert_close(readout(x, readout.qubits.constants()), torch.cat(expected, dim=1))


def test_shipped_sizes_are_the_published_ones_and_the_student_a_quarter_of_the_teacher():
    names = ("teacher", "student", "scaling", "sycamore")
    configs = {(name, d): shipped(name).config(d) for name in names for d in (3, 5)}
    counts = {
        (name, d): sum(p.numel() for p in Decoder(config, rotated(d, "Z")).parameters())
        for (name, d), config in configs.items()
    }
    for d in (3, 5):
        assert counts["scaling", d] == pytest.approx(5.4e6, rel=0.01)
        assert 5.4e6 < counts["sycamore", d] < 9e6  # "larger than 5.4 M"
        assert 20_000 <= counts["teacher", d] <= 60_000
        assert counts["student", d] <= 0.25 * counts["teacher", d]
    assert configs["sycamore", 5].dilations == (1, 1, 2) and configs["sycamore", 3].dilations == (1, 1, 1)
    assert configs["scaling", 3].dilations == configs["scaling", 5].dilations == (1, 2, 4)
    assert configs["teacher", 3] == Config(), "what a size leaves out is as in the shipped teacher"


def shipped(name):
    """The sizes of sweeps/settings/alphaqubit.yaml with this one chosen."""
    return DecoderSizes.among(resolve((DECODER_SIZES,), "small", {"size": name}).values)


def test_a_size_of_ones_own_is_built_and_all_that_is_wrong_with_it_is_named_at_once(tmp_path):
    assert Size.model_fields.keys() - {"dilations_from_5"} <= {field.name for field in dataclasses.fields(Config)}
    whole = yaml.safe_load(DECODER_SIZES.path.read_text())
    own = tmp_path / "own.yaml"

    def chosen(**tiny):
        whole["defaults"]["sizes"]["tiny"] = tiny
        own.write_text(yaml.safe_dump(whole))
        files = (SettingsFile(str(own), DecoderSizes), DECODER_PRETRAIN)
        return DecoderSizes.among(resolve(files, "demo", {"size": "tiny"}).values).config(3)

    assert chosen(dim=8, dilations=[1, 2]) == Config(dim=8, dilations=(1, 2))
    bad = {"dim": 0, "heads": "four", "width": 3, "dilations": []}
    with pytest.raises(InputError) as caught:
        chosen(**bad)
    assert all(f"own.yaml: sizes.tiny.{key}={value!r}: " in str(caught.value) for key, value in bad.items())
    with pytest.raises(InputError) as caught:
        resolve((DECODER_SIZES, DECODER_PRETRAIN), "demo", {"sizes": {"tiny": {"dim": 0}}, "epochs": 0})
    assert "--set sizes.tiny.dim=0: " in str(caught.value) and "--set epochs=0: " in str(caught.value)
    names = "teacher, student, scaling, sycamore, scaling_student"
    with pytest.raises(InputError, match=f"^--set size=big: expected one of {names}$"):
        resolve((DECODER_SIZES,), "demo", {"size": "big"})


def test_config_is_json_and_rebuilds_the_decoder_without_its_training_head():
    model = decoder(basis="X", next_stabilizer=True)
    again = build(**json.loads(json.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    plain = without_training_heads(again)
    inputs = bits(basis="X")
    assert torch.equal(plain(*inputs), model(*inputs)) and without_training_heads(plain) is plain
    assert not any("next" in name for name in plain.state_dict()) and "next" not in plain.features(*inputs)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Config(dim=0, outputs="y"), "dim=0.*outputs='y'"),
        (lambda: Config(dilations=(1, 0)), r"dilations=\(1, 0\)"),
        (lambda: Config(embed_layers=-1), "embed_layers=-1"),
        (lambda: from_data({"width": 3}), "width"),
        (lambda: from_data({"dim": "32"}), "dim='32'"),
        (lambda: from_data({"dilations": 1}), "dilations=1"),
        (lambda: build(dim=8, basis="Z"), "distance=None"),
        (lambda: build(distance=4, basis="Z"), "distance=4"),
        (lambda: decoder()(*bits(distance=5)), "distance 3 needs both"),
    ],
)
def test_bad_sizes_and_shapes_are_named_in_one_line(make, named):
    with pytest.raises(InputError, match=named) as caught:
        make()
    assert "\n" not in str(caught.value)
