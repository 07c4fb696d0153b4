import math

import pytest
import torch
from torch.nn import functional as F

from engines.errors import InputError
from trainables.alphaqubit.config import Config
from trainables.alphaqubit.losses import (
    SIGNALS,
    adapters,
    feature_loss,
    label_loss,
    next_stabilizer_loss,
    signal_loss,
    soft_loss,
    task_loss,
)

N, LAYERS, S = 6, 4, 8


def features(dim=3, k=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    readout = 2 * draw(N, LAYERS, k)
    states = {name: draw(N, LAYERS, S, dim) for name in ("transformer", "rnn")}
    return {**states, "readout": readout, "logits": readout[:, -1], "fused": draw(N, k), "next": draw(N, LAYERS - 1, S)}


def bernoulli_kl(t, s):
    p, q = 1 / (1 + math.exp(-t)), 1 / (1 + math.exp(-s))
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("k", [1, 2])
def test_soft_loss_of_flips_equals_the_sum_over_outcomes(k, temperature):
    t, s = features(k=k)["logits"], features(k=k, seed=1)["logits"]
    expected = [bernoulli_kl(a / temperature, b / temperature) for a, b in zip(t.flatten(), s.flatten(), strict=True)]
    assert soft_loss(t, s, temperature).item() == pytest.approx(temperature**2 * sum(expected) / (N * k), rel=1e-9)
    assert soft_loss(t, t, temperature).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_loss_of_classes_equals_the_sum_over_outcomes(temperature):
    t, s = features(k=4)["logits"], features(k=4, seed=1)["logits"]
    p, q = (t / temperature).softmax(-1), (s / temperature).softmax(-1)
    expected = temperature**2 * (p * (p / q).log()).sum() / N
    assert soft_loss(t, s, temperature, "ixyz").item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize(("outputs", "k"), [("observable", 1), ("ixyz", 4)])
def test_the_gradient_keeps_its_size_whatever_the_temperature(outputs, k):
    t, student = features(k=k)["logits"], features(k=k, seed=1)["logits"]
    sizes = []
    for temperature in (10.0, 40.0, 160.0):
        s = student.clone().requires_grad_()
        soft_loss(t, s, temperature, outputs).backward()
        sizes.append(s.grad.norm().item())
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1) and sizes[2] == pytest.approx(sizes[1], rel=0.02)


def test_the_teacher_gets_no_gradient():
    theirs = {name: value.requires_grad_() for name, value in features().items()}
    ours = {name: value.requires_grad_() for name, value in features(seed=1).items()}
    sum(signal_loss(name, theirs, ours, 2.0) for name in SIGNALS).backward()
    assert all(value.grad is None for value in theirs.values())
    used = {name for name, value in ours.items() if value.grad is not None}
    assert used == {"transformer", "rnn", "readout", "logits"}


def test_each_signal_compares_what_its_name_says():
    t, s = features(), features(seed=1)
    assert torch.equal(signal_loss("final", t, s, 3.0), soft_loss(t["logits"], s["logits"], 3.0))
    assert torch.equal(signal_loss("fused", t, s, 3.0), soft_loss(t["fused"], s["logits"], 3.0))
    every = [soft_loss(t["readout"][:, i], s["readout"][:, i], 3.0) for i in range(LAYERS)]
    torch.testing.assert_close(signal_loss("readout", t, s, 3.0), torch.stack(every).mean())
    for name in ("transformer", "rnn"):
        wanted = ((t[name] - s[name]) ** 2).mean() / ((t[name] - t[name].mean(0)) ** 2).mean()
        torch.testing.assert_close(signal_loss(name, t, s, 3.0), wanted)


def test_features_are_in_the_teachers_units():
    t, s = features()["rnn"], features(seed=1)["rnn"]
    torch.testing.assert_close(feature_loss(10 * t, 10 * s), feature_loss(t, s))
    assert feature_loss(t, t.mean(0).expand_as(t)).item() == pytest.approx(1)
    assert feature_loss(t[:1], 0 * t[:1]).item() == pytest.approx(1)


def test_adapters_exist_only_for_features_of_another_width():
    wide, narrow = Config(dim=5), Config(dim=3)
    assert not adapters(wide, Config(dim=5), SIGNALS)
    assert set(adapters(wide, narrow, ("final", "rnn", "readout"))) == {"rnn"}
    heads = adapters(wide, narrow, SIGNALS).double()
    assert set(heads) == {"transformer", "rnn"}
    t, s = features(dim=5), features(dim=3, seed=1)
    mapped = s["rnn"] @ heads["rnn"].weight.T + heads["rnn"].bias
    expected = feature_loss(t["rnn"], mapped)
    torch.testing.assert_close(signal_loss("rnn", t, s, 1.0, adapters=heads), expected)
    with pytest.raises(InputError, match="adapter is needed"):
        signal_loss("rnn", t, s, 1.0)


def test_task_loss_with_and_without_rounds():
    f, g = features(), torch.Generator().manual_seed(3)
    label = torch.randint(0, 2, (N, 1), generator=g, dtype=torch.uint8)
    rounds = torch.randint(0, 2, (N, LAYERS - 1), generator=g, dtype=torch.uint8)
    last = F.binary_cross_entropy(f["logits"].sigmoid(), label.double())
    early = F.binary_cross_entropy(f["readout"][:, :-1, 0].sigmoid(), rounds.double())
    torch.testing.assert_close(task_loss(f, label), last)
    torch.testing.assert_close(task_loss(f, label, round_labels=rounds), last)
    torch.testing.assert_close(task_loss(f, label, round_labels=rounds, round_weight=0.5), last + 0.5 * early)
    classes, four = torch.arange(N)[:, None] % 4, features(k=4)
    expected = -four["logits"].log_softmax(-1).gather(1, classes).mean()
    torch.testing.assert_close(task_loss(four, classes.to(torch.uint8), "ixyz"), expected)


def test_next_stabilizer_loss_is_about_the_layer_that_follows():
    f, events = features(), (torch.rand(N, LAYERS, S) < 0.5).to(torch.uint8)
    expected = F.binary_cross_entropy(f["next"].sigmoid(), events[:, 1:].double())
    torch.testing.assert_close(next_stabilizer_loss(f, events), expected)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda f: signal_loss("attention", f, f, 1.0), "'attention'"),
        (lambda f: adapters(Config(), Config(), ["cnn"]), "'cnn'"),
        (lambda f: soft_loss(f["logits"], f["logits"], 0.0), "temperature=0"),
        (lambda f: soft_loss(f["logits"], f["logits"][:3], 1.0), r"\(6, 1\).*\(3, 1\)"),
        (lambda f: label_loss(f["logits"], torch.zeros(N, 2), "observable"), "outputs='observable'"),
        (lambda f: label_loss(f["logits"], torch.zeros(N, 1), "ixyz"), "outputs='ixyz'"),
        (
            lambda f: task_loss(features(k=2), torch.zeros(N, 2), "xz", torch.zeros(N, LAYERS - 1), 1.0),
            "outputs='xz'",
        ),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(call, named):
    with pytest.raises(InputError, match=named) as caught:
        call(features())
    assert "\n" not in str(caught.value)
