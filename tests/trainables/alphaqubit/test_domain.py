import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from engines.errors import InputError
from sweeps.settings import DECODER, DECODER_SIZES, DECODER_WORKLOAD, resolve
from trainables import checkpoint
from trainables.alphaqubit.fusion import FusedTeacher
from trainables.alphaqubit.sampler import Sampler
from trainables.alphaqubit.settings import SIGNALS
from trainables.distill import Distill
from trainables.pretrain import Pretrain
from trainables.teacher_cache import teacher_metrics

ALL_ON = {"T": 2.0, "beta": {"linear": [0.7, 0.1]}, "transformer": 0.1, "rnn": 0.1, "readout": 0.3, "fused": 0.5}
NAMES = ["task", "final", "transformer", "rnn", "readout", "fused"]
GO_ON = """
import json, sys
import torch
from trainables.distill import Distill
torch.rand(5)
trial = Distill(json.loads(sys.argv[1]))
print(json.dumps([trial.step() for _ in range(2)]))
"""


def kept(config):
    state = checkpoint.load(Path(config["state_dir"]) / "state.pt")
    return {key: state[key] for key in ("epoch", "best", "trained", "optimizer", "rng")}


def test_resumed_in_a_fresh_process_is_uninterrupted(aq, tiny):
    """Two epochs with every signal on, so with adapters, probes and cached states."""
    params = {**ALL_ON, "rounds_weight": 0.1}
    straight, cut = (aq.config(name, params, fusion=str(aq.probes())) for name in ("straight", "cut"))
    trial = Distill(straight)
    expected = [trial.step(), trial.step()]
    first = Distill(cut).step()
    repeated, second = json.loads(tiny.python(GO_ON, json.dumps(cut)).splitlines()[-1])
    assert repeated == first
    assert list(map(tiny.without_clocks, [first, second])) == list(map(tiny.without_clocks, expected))
    assert tiny.same(kept(cut), kept(straight))
    assert {f"train_{name}" for name in NAMES} <= expected[0].keys()
    assert expected[1]["train_loss"] < expected[0]["train_loss"], "it does learn"


def test_each_signal_can_be_switched(aq):
    fusion = str(aq.probes())
    for name in SIGNALS:
        given = {**{key: 0 for key in SIGNALS}, name: 0.4}
        trial = Distill(aq.config(name, {**given, "alpha": 0.3, "fusion": fusion if name == "fused" else "none"}))
        total, parts = trial.loss(next(trial.batches(1)), 0.0)
        signal = {"beta": "final"}.get(name, name)
        assert parts.keys() == {"task", signal}
        assert float(total.detach()) == pytest.approx(float((0.3 * parts["task"] + 0.4 * parts[signal]).detach()))
        assert trial.heads.keys() == ({name} if name in ("transformer", "rnn") else set())
    trial = Distill(aq.config("none", {key: 0 for key in SIGNALS}))
    total, parts = trial.loss(next(trial.batches(1)), 0.0)
    assert parts.keys() == {"task"} and torch.equal(total, parts["task"])


def test_arms_of_a_seed_start_from_one_student_and_see_one_order(aq):
    arms = {"none": {}, "states": {"transformer": 0.1, "rnn": 0.1}, "fused": {"fused": 1, "fusion": str(aq.probes())}}
    trials = [Distill(aq.config(name, params)) for name, params in arms.items()]
    for trial in trials[1:]:
        assert all(map(torch.equal, trial.model.state_dict().values(), trials[0].model.state_dict().values()))
        ours, theirs = (next(one.batches(1)) for one in (trial, trials[0]))
        assert torch.equal(ours["events"], theirs["events"]) and torch.equal(ours["label"], theirs["label"])


def test_exported_student_is_one_plain_decoder(aq):
    config = aq.config("all", {**ALL_ON, "fusion": str(aq.probes())}, epochs=1)
    trial = Distill(config)
    trial.step()
    names = checkpoint.load(Path(config["state_dir"]) / "best.pth")["model"].keys()
    assert names == aq.domain().student(False).state_dict().keys()
    assert not [name for name in names if re.search("probe|adapter|heads.(transformer|rnn)|next|fus", name)]
    assert len(kept(config)["trained"]) > len(names), "adapters are part of the state"
    pretrained = aq.config("pre", next_weight=0.1, rounds_weight=0.1, epochs=1)
    own = Pretrain(pretrained)
    own.step()
    assert any(name.startswith("next_stabilizer") for name in own.model.state_dict())
    exported = checkpoint.load(Path(pretrained["state_dir"]) / "best.pth")
    assert exported["model"].keys() == names and not exported["config"]["next_stabilizer"]
    plain, inputs, _, _ = aq.domain().deployed(own.model)
    assert plain.decoder.state_dict().keys() == names and len(inputs) == 5 and inputs[0][0].shape == (1, 3, 8)


@pytest.mark.parametrize("outputs", ["observable", "xz", "ixyz"])
def test_evaluate_counts_wrong_decisions(aq, outputs, tmp_path):
    basis = "Z" if outputs == "observable" else "XZ"
    model = aq.new_decoder(basis=basis, outputs=outputs)
    teacher = str(aq.save(tmp_path / "t.pth", model))
    domain = aq.domain(outputs=outputs, teacher=teacher)
    found, shots = domain.evaluate(domain.teacher(), "val", full=True), domain._fixed("val")
    with torch.no_grad():
        logits = model(shots["events"], shots["measurements"])
    if outputs == "ixyz":
        wrong = logits.argmax(1) != shots["label"][:, 0]
        nll = -logits.log_softmax(1)[torch.arange(300), shots["label"][:, 0].long()]
    else:
        wrong = (torch.sigmoid(logits).round() != shots["label"]).any(1)
        right = torch.where(shots["label"].bool(), torch.sigmoid(logits), torch.sigmoid(-logits))
        nll = -right.log().sum(1)
    assert torch.equal(found["ler"], wrong.float())
    torch.testing.assert_close(found["nll"], nll, rtol=1e-4, atol=1e-6)
    assert found.keys() == {"ler", "nll"} | ({"ler_exact"} if outputs == "observable" else set())
    config = aq.config("one", {"readout": 0.1}, outputs=outputs, teacher=teacher, epochs=1)
    assert 0 <= Distill(config).step()["val_quality"] <= 1


def test_posterior_rate_agrees_with_counting(aq):
    domain = aq.domain(test_shots=20000, p=0.01)
    found = domain.evaluate(domain.teacher(), "test", full=True)
    spread = float(found["ler"].std()) / 20000**0.5
    assert abs(float(found["ler"].mean() - found["ler_exact"].mean())) < 4 * spread
    primary = aq.domain(primary="ler_exact")
    assert primary.evaluate(primary.teacher(), "val").keys() == {"ler", "nll", "ler_exact"}
    assert not torch.equal(domain._fixed("test")["events"][:300], aq.domain(p=0.01)._fixed("val")["events"])


def test_identities_follow_what_they_stand_for(aq, tmp_path):
    domain = aq.domain()
    assert domain.data_id() == aq.domain().data_id() != aq.domain(seed=8).data_id()
    assert domain.data_id() != aq.domain(train_p=0.02).data_id()
    assert domain.split_id("val") == aq.domain(seed=8, train_p=0.02).split_id("val") != domain.split_id("test")
    assert domain.split_id("val") != aq.domain(p=0.03).split_id("val")
    assert domain.sampled() == aq.domain(seed=8).sampled() != aq.domain(workload_seed=1).sampled()
    before = teacher_metrics(tmp_path, domain, "val", full=False)["ler"]
    assert torch.equal(before, domain.evaluate(domain.teacher(), "val")["ler"])


def test_stage_two_goes_on_from_stage_one(aq, tmp_path):
    student = aq.domain().student(False)
    path = aq.save(tmp_path / "stage1.pth", student)
    trial = Distill(aq.config("two", {"beta": 0, "fused": 0.7, "fusion": str(aq.probes())}, model=str(path)))
    assert all(map(torch.equal, trial.model.state_dict().values(), student.state_dict().values()))
    assert isinstance(trial.domain.teacher(), FusedTeacher)


BAD_SETTINGS = [
    ({"distance": 4}, "distance=4.*even, use an odd distance such as 5"),
    ({"distance": 1}, "distance=1.*too small"),
    ({"rounds": 0}, "rounds=0.*too small, use 1 or more"),
    ({"p": 0}, "p=0.*between 0 and 0.5"),
    ({"p": 0.5}, "p=0.5.*between 0 and 0.5"),
    ({"train_p": 0.7}, "train_p=0.7"),
    ({"noise": "pink"}, "noise=pink.*use one of uniform, si1000"),
    ({"basis": "Y"}, "basis=Y.*use X or Z"),
    ({"transfomer": 0.1}, "transfomer.*did you mean 'transformer'"),
    ({"alpha": 0, "beta": 0}, "alpha=0 and all of beta, transformer, rnn, readout, fused 0.*set one above 0"),
    ({"fused": 0.5}, "fused is on without.*give fusion=cached"),
    ({"rnn": -0.1}, r"rnn=-0.1: weights \[-0.1\].*must be 0 or more"),
    ({"size": "tiny"}, "size=tiny: expected one of teacher, student, scaling, sycamore"),
    ({"distance": 5, "primary": "ler_exact"}, "primary=ler_exact: the exact decoder is for distance=3"),
]


@pytest.mark.parametrize(("given", "named"), BAD_SETTINGS, ids=lambda value: str(value)[:40])
def test_bad_settings_are_named_in_one_line(given, named):
    with pytest.raises(InputError, match=named) as caught:
        resolve((DECODER_WORKLOAD, DECODER_SIZES, DECODER), "demo", given)
    assert "\n" not in str(caught.value)


def test_trials_are_checked_like_settings(aq):
    resolved = resolve((DECODER_WORKLOAD, DECODER_SIZES, DECODER), "demo", {})
    with pytest.raises(InputError, match="trial T: alpha=0 and all of"):
        resolved.with_params({"alpha": 0, "beta": 0}, "T")
    with pytest.raises(ValidationError):
        aq.domain(distance=4)


def test_bad_models_are_named_in_one_line(aq, tmp_path, teacher_file):
    """A Stage 1 checkpoint that is missing, damaged or of another shape; a teacher of another experiment."""
    other = aq.save(tmp_path / "other.pth", aq.new_decoder())
    cut = tmp_path / "cut.pth"
    cut.write_bytes(other.read_bytes()[:3000])
    wide = aq.save(tmp_path / "wide.pth", aq.new_decoder(distance=5))
    weights = checkpoint.load(other)["model"]
    checkpoint.save(
        tmp_path / "lost.pth", {"model": dict(list(weights.items())[1:]), "config": aq.new_decoder().config}
    )
    checkpoint.save(tmp_path / "odd.pth", {"model": weights, "config": {**aq.new_decoder().config, "dim": "8"}})
    cases = [
        (lambda: aq.domain(model=str(tmp_path / "no.pth")).student(False), "no.pth does not exist"),
        (lambda: aq.domain(model=str(cut)).student(False), "cut.pth cannot be read"),
        (lambda: aq.domain(model=str(other)).student(False), "of another shape than size=student: dim=8 instead of 16"),
        (lambda: aq.domain(teacher=str(wide)).teacher(), "of distance=5, the workload of distance=3.*--set distance=5"),
        (lambda: aq.domain(basis="X").teacher(), "of basis=Z, the workload of basis=X"),
        (lambda: aq.domain(outputs="xz").teacher(), "of basis=Z, the workload of basis=XZ|of outputs=observable"),
        (lambda: aq.domain().load(teacher_file), "teacher.pth: not a decoder"),
        (lambda: aq.domain().load(tmp_path / "lost.pth"), "lost.pth: not a decoder"),
        (lambda: aq.domain().load(tmp_path / "odd.pth"), "odd.pth: not a decoder.*dim='8'"),
    ]
    for call, named in cases:
        with pytest.raises(InputError, match=named) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_measures_do_not_touch_the_models_random_state(aq):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    domain = aq.domain(fusion=str(aq.probes(aq.new_decoder())))
    torch.set_rng_state(before)
    domain.teacher(), domain.load(aq.teacher_file), domain.deployed(domain.teacher())
    assert torch.equal(torch.get_rng_state(), before)
    assert np.isfinite(float(domain.evaluate(domain.teacher(), "val")["nll"].mean()))


def test_less_memory_is_the_same_training(aq):
    curves = {}
    for name, change in {
        "plain": {}, "checkpointing": {"checkpointing": True}, "accumulate": {"accumulate": 2},
        "bfloat16": {"precision": "bfloat16"},
    }.items():  # fmt: skip
        trial = Distill(aq.config(name, {"readout": 0.1, **change}))
        curves[name] = [trial.step()["train_loss"] for _ in range(2)]
    assert curves["checkpointing"] == pytest.approx(curves["plain"], rel=1e-6)
    assert curves["accumulate"] == pytest.approx(curves["plain"], rel=1e-3)
    assert curves["bfloat16"] == pytest.approx(curves["plain"], rel=0.05) and curves["bfloat16"] != curves["plain"]


def test_the_package_has_a_teacher_per_distance(aq):
    for distance in (3, 5):
        assert aq.domain(teacher="shipped", distance=distance).teacher().config["distance"] == distance
    with pytest.raises(InputError, match=r"none of distance 7 comes with the package \(of 3, 5\)"):
        aq.domain(teacher="shipped", distance=7).teacher()


def test_a_teacher_learns_probabilities_where_the_exact_decoder_gives_them(aq):
    both = {"mixed_p": [0.005, 0.01], "exact_labels": True}
    domain = aq.domain(**both)
    shots = domain.pretraining_samples(torch.arange(1000, 1048))  # the end of one block and the start of the next
    label = shots["label"]
    assert label.shape == (48, 1) and label.dtype == torch.float32 and ((label > 0) & (label < 1)).any()
    for p, rows in ((0.005, slice(0, 24)), (0.01, slice(24, 48))):
        own = Sampler(domain.workload.at(p), domain.seed, "pretrain").at(torch.arange(1000, 1048)[rows])
        assert torch.equal(shots["events"][rows], own["events"])
    many = domain.pretraining_samples(torch.arange(8192))
    flips = aq.domain(mixed_p=[0.005, 0.01]).pretraining_samples(torch.arange(8192))
    assert torch.equal(many["events"], flips["events"]) and set(flips["label"].unique().tolist()) == {0, 1}
    off = float((many["label"] - flips["label"].float()).mean())
    spread = float((many["label"] * (1 - many["label"])).sum().sqrt() / 8192)
    assert abs(off) < 4 * spread, "probabilities that come true"
    far = aq.domain(distance=5, **both).pretraining_samples(torch.arange(64))["label"]
    assert far.dtype == torch.uint8, "no exact decoder there: the flips themselves"
