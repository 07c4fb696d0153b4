"""A pretraining sweep's folder becomes package data with a card that says what it is."""

import json
from pathlib import Path

import pytest
import torch

from engines.errors import InputError
from trainables import checkpoint
from trainables.domain import make_domain
from trainables.pretrain import Pretrain
from trainables.ship import ship

SETTINGS = {
    **{"primary": "ler", "workload_seed": 1, "val_shots": 200, "test_shots": 300, "p": 0.02},
    **{"epochs": 2, "samples_per_epoch": 128, "batch_size": 64, "optimizer": "adamw", "lr": 5e-3, "lr_end": 0.01},
    **{"precision": "float32", "accumulate": 1, "checkpointing": False},
    **{"lr_warmup": 0.1, "weight_decay": 0.0, "train_p": 0.02, "seed": 3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What sweeps/aq_pretrain.py leaves, after two short epochs."""
    root: Path = tmp_path_factory.mktemp("sweep")
    state = root / "state"
    config = {"trial_id": "a", "state_dir": str(state), "domain": "alphaqubit", "params": {}, "settings": SETTINGS}
    trial = Pretrain({**config, "seed": 3, "budget": 0.01})
    curve = [trial.step() for _ in range(2)]
    files = root / "files"
    files.mkdir()
    (state / "best.pth").rename(files / "teacher_decoder.pth")
    sweep = {
        "domain": "alphaqubit",
        "command": "/here/bin/python sweeps/aq_pretrain.py --seed 3 --storage /there",
        "settings": SETTINGS,
    }
    log = {"sweep": sweep, "trials": [{"curve": curve}]}
    (files / "aq_pretrain_log.json").write_text(json.dumps(log))
    return root


def test_the_file_is_the_trained_model_and_the_card_is_of_that_file(folder, tmp_path):
    target = tmp_path / "weights" / "teacher.safetensors"
    card = ship(folder, target, note="short")
    assert json.loads(target.with_suffix(".json").read_text()) == card
    assert card["command"] == "python sweeps/aq_pretrain.py --seed 3", "nothing of the machine it was made on"
    domain = make_domain("alphaqubit", SETTINGS, {}, 3)
    model, trained = domain.load(target).eval(), checkpoint.load(folder / "files" / "teacher_decoder.pth")
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained["model"][name].half().float()), name
    assert card["samples"] == 256 and len(card["curve"]) == 2 and card["seed"] == 3 and card["note"] == "short"
    found = domain.evaluate(model, "test", full=True)
    assert card["metrics"]["test"]["ler"] == pytest.approx(float(found["ler"].mean()), abs=1e-5)
    assert card["beside"]["ler_over_matching"] > 0


def test_a_folder_without_a_teacher_is_named(tmp_path):
    with pytest.raises(InputError, match=r"0 pretraining logs and 0 teachers; give the folder"):
        ship(tmp_path)
