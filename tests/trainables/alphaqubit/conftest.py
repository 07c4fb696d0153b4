"""A decoder of a few hundred random weights for distance 3, and what its trials need; handed out as `aq`."""

from types import SimpleNamespace

import pytest
import torch

from trainables import checkpoint
from trainables.alphaqubit.domain import AlphaQubit
from trainables.alphaqubit.fusion import probes_for
from trainables.alphaqubit.model import build

SMALL = {
    **{"dim": 8, "layers": 1, "heads": 2, "key_dim": 4, "widening": 1, "conv_channels": 6, "bias_dim": 4},
    **{"readout_dim": 6, "readout_layers": 1},
}
SETTINGS = {
    **{"distance": 3, "rounds": 2, "noise": "uniform", "p": 0.02, "basis": "Z", "outputs": "observable"},
    **{"workload_seed": 42, "sampled_shots": 5, "val_shots": 300, "test_shots": 600, "primary": "ler"},
    **{"warmup": 1, "repeats": 5, "threads": 1, "peers": False, "batch_size": 32},
    **{"epochs": 2, "samples_per_epoch": 128, "train_samples": 256, "lr": 1e-2, "optimizer": "adamw"},
    **{"precision": "float32", "accumulate": 1, "checkpointing": False},
    **{"lr_end": 0.01, "lr_warmup": 0.03, "weight_decay": 1e-5, "alpha": 1.0, "T": 1.0, "beta": 0.5},
    **{"size": "student", "sizes": {"student": {"dim": 16, "key_dim": 4, "readout_dim": 16, "readout_layers": 1}}},
}


def new_decoder(distance=3, basis="Z", seed=0, **sizes):
    torch.manual_seed(seed)
    model = build(**{**SMALL, **sizes}, distance=distance, basis=basis)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def save(path, model):
    checkpoint.save(path, {"model": model.state_dict(), "config": model.config})
    return path


@pytest.fixture(scope="session")
def decoder_file(tmp_path_factory):
    return save(tmp_path_factory.mktemp("decoder") / "teacher.pth", new_decoder())


@pytest.fixture
def aq(decoder_file, tmp_path):
    """aq.settings(**changes), aq.domain(**changes), aq.config(name, params, **changes), aq.job(weights, **changes)."""

    def settings(**changes):
        return {**SETTINGS, "teacher": str(decoder_file), **changes}

    def config(name, params=None, **changes):
        given = {"trial_id": name, "domain": "alphaqubit", "params": params or {}, "seed": 7}
        folders = {"state_dir": str(tmp_path / "trials" / name), "cache_dir": str(tmp_path / "cache")}
        return {**given, **folders, "settings": settings(**changes)}

    def job(weights=None, **changes):
        for folder in ("work", "trials/job"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        given = config("job", **changes)
        more = {"trials": [{}], "workload_hash": "w", "work_dir": str(tmp_path / "work")}
        return {**given, **more, "weights": str(weights) if weights else None}

    def probes(decoder=None):
        return save(tmp_path / "probes.pth", probes_for(decoder or new_decoder()))

    return SimpleNamespace(
        settings=settings, config=config, job=job, probes=probes, teacher_file=decoder_file,
        new_decoder=new_decoder, save=save, domain=lambda seed=7, **changes: AlphaQubit(settings(**changes), seed),
    )  # fmt: skip
