from pathlib import Path

import pytest
import torch

from engines.errors import InputError
from sweeps.settings import DECODER_FUSION, DECODER_WORKLOAD, resolve
from trainables import checkpoint
from trainables.alphaqubit.fusion import HEADS, Fuse, FusedTeacher, Probes, load_probes, probes_for

WEIGHTS = {"fusion_weights": [1, 1, 2]}


def test_probes_are_trained_on_a_frozen_teacher_and_saved_on_their_own(aq):
    config = aq.config("fuse", **WEIGHTS)
    trial = Fuse(config)
    before = {name: value.clone() for name, value in trial.teacher.state_dict().items()}
    first, second = trial.step(), trial.step()
    assert second["train_loss"] < first["train_loss"]
    assert all(torch.equal(value, before[name]) for name, value in trial.teacher.state_dict().items())
    assert {f"ler_{name}" for name in (*HEADS, "fused")} <= second.keys()
    domain, path = aq.domain(), Path(config["state_dir"]) / "best.pth"
    own = float(domain.evaluate(domain.teacher(), "val")["ler"].mean())
    assert second["ler_readout"] == own
    assert second["val_drop"] == pytest.approx((second["ler_fused"] - own) / own)
    probes = load_probes(path, domain.teacher())
    assert probes.config["weights"] == [0.25, 0.25, 0.5]
    assert {name.split(".")[1] for name in checkpoint.load(path)["model"]} == {"transformer", "rnn"}


def test_fused_is_the_weighted_mean_of_the_heads(aq):
    model = aq.new_decoder(outputs="observable")
    shots = aq.domain()._fixed("val")
    features = model.features(shots["events"], shots["measurements"])
    found = probes_for(model, (1, 2, 3))(features)
    expected = (found["transformer"] + 2 * found["rnn"] + 3 * found["readout"]) / 6
    torch.testing.assert_close(found["fused"], expected)
    assert torch.equal(found["readout"], features["logits"])
    alone = probes_for(model, (0, 0, 1))(features)
    torch.testing.assert_close(alone["fused"], features["logits"])


def test_fused_teacher_answers_as_its_decoder(aq):
    domain = aq.domain(fusion=str(aq.probes()))
    teacher, shots = domain.teacher(), domain._fixed("val")
    assert isinstance(teacher, FusedTeacher) and not any(p.requires_grad for p in teacher.parameters())
    inputs = domain.inputs(shots)
    assert torch.equal(teacher(*inputs), teacher.decoder(*inputs))
    found = domain.teacher_outputs(teacher, shots)
    assert found.keys() == {
        f"teacher_{name}" for name in ("logits", "readout", "fused", "state_transformer", "state_rnn")
    }
    assert all(value.dtype == torch.float16 for value in found.values())
    plain = domain.deployed(teacher)[0]
    assert plain.decoder.state_dict().keys() == teacher.decoder.state_dict().keys(), "no probe is deployed"


def test_bad_probes_are_named_in_one_line(aq, tmp_path):
    other = aq.save(tmp_path / "other.pth", probes_for(aq.new_decoder(seed=1)))
    own = probes_for(aq.new_decoder())
    checkpoint.save(tmp_path / "lost.pth", {"model": {}, "config": own.config})
    cases = [
        (
            lambda: aq.domain(fusion=str(other)).teacher(),
            "other.pth: probes of another teacher; run python sweeps/aq_f",
        ),
        (lambda: aq.domain(fusion=str(aq.teacher_file)).teacher(), "probes of another teacher"),
        (lambda: aq.domain(fusion=str(tmp_path / "no.pth")).teacher(), "no.pth: no such file"),
        (lambda: aq.domain(fusion=str(tmp_path / "lost.pth")).teacher(), "lost.pth: not a file of probes"),
        (lambda: Probes(8, 1, (1, -1, 1)), r"fusion weights \[1, -1, 1\]"),
        (lambda: resolve((DECODER_WORKLOAD, DECODER_FUSION), "demo", {"fusion_weights": [0, 0, 0]}), "not all 0"),
    ]
    for call, named in cases:
        with pytest.raises(InputError, match=named) as caught:
            call()
        assert "\n" not in str(caught.value)
