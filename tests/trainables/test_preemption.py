"""A trial that leaves its node in the middle of an epoch goes on elsewhere as if nothing had been."""

from pathlib import Path

import pytest
import ray

from sweeps.training import failure
from trainables import checkpoint, memory, preemption, training
from trainables.distill import Distill
from trainables.prune import Prune
from trainables.quantize import Quantize
from trainables.training import Training


class Left(BaseException):
    """In place of the end of the actor's process."""


@pytest.fixture
def leaving(monkeypatch):
    """From now on every optimiser step is the last one of its process."""

    def leave():
        raise Left

    def start():
        monkeypatch.setattr(preemption, "noticed", lambda: True)
        monkeypatch.setattr(training, "exit_actor", leave)

    return start


def to_the_end(kind, config, epochs):
    """The results of the epochs, each told once, however often the trial has to leave; and how often that was."""
    told, left = {}, 0
    while len(told) < epochs:
        trial = kind(config)
        try:
            while len(told) < epochs:
                result = trial.step()
                assert told.setdefault(result["epoch"], result) == result
        except Left:
            left += 1
    return list(told.values()), left


def quantize(tiny, name):
    own = {
        "model": "teacher",
        "bits_w": 8,
        "bits_a": 8,
        "keep": ["layernorm", "softmax"],
        "mode": "static",
        "smooth": 0.5,
    }
    own |= {"calibration": 8, "method": "minmax", "reduce_range": False, "skip_slower": False}
    own |= {"epochs": 4, "qat_share": 0.5, "frozen_share": 0.25, "samples_per_epoch": 16}
    return {**tiny.config(name, {}, **own), "budget": -1.0}


def prune(tiny, name):
    own = {"rho": 0.4, "steps": 2, "ratios": "uniform", "residual": 0.0, "beta": 0.5}
    own |= dict.fromkeys(("enc_heads", "enc_ffn", "dec_heads", "dec_ffn"), 1.0)
    return tiny.config(name, {}, epochs=4, samples_per_epoch=16, **own)


def distill(tiny, name):
    return tiny.config(name, {"gamma": 0.1}, epochs=2)


@pytest.mark.parametrize(
    ("kind", "make", "epochs"), [(Distill, distill, 2), (Prune, prune, 4), (Quantize, quantize, 4)]
)
def test_a_trial_that_leaves_after_every_step_equals_one_that_stays(tiny, leaving, kind, make, epochs):
    straight, cut = make(tiny, "straight"), make(tiny, "cut")
    stays = kind(straight)
    expected = [stays.step() for _ in range(epochs)]
    leaving()
    found, left = to_the_end(kind, cut, epochs)
    trained = epochs - (kind is Quantize)  # its first epoch only rounds
    assert left == trained * stays.steps_per_epoch >= 4
    assert list(map(tiny.without_clocks, found)) == list(map(tiny.without_clocks, expected))
    states = [checkpoint.load(Path(c["state_dir"]) / "state.pt") for c in (straight, cut)]
    for key in ("trained", "optimizer", "rng", "best"):
        assert tiny.same(states[0][key], states[1][key]), key


def test_the_time_of_an_epoch_counts_what_was_done_before_leaving(tiny, leaving):
    config = distill(tiny, "a")
    leaving()
    with pytest.raises(Left):
        Distill(config).step()
    path = Path(config["state_dir"]) / "state.pt"
    state = checkpoint.load(path)
    assert state["part"]["taken"] == 1 and min(state["part"]["spent"]) > 0
    state["part"]["spent"] = [1000.0, 500.0]
    checkpoint.save(path, state)
    found, _ = to_the_end(Distill, config, 1)
    assert 1000 < found[0]["epoch_s"] < 1100 and 500 < found[0]["cpu_s"] < 600


def test_no_notice_outside_ray():
    assert not ray.is_initialized() and not preemption.noticed()


def test_more_memory_than_there_is_is_named_with_the_peak(tiny, monkeypatch):
    """torch's own refusal of an allocation, in the middle of a step, and while the trial is built."""
    import torch

    monkeypatch.setattr(Training, "train_step", lambda self, batch, step, total: {"loss": torch.empty(1 << 50)})
    with pytest.raises(
        memory.OutOfMemoryError, match=r"out of memory: [\d.]+ GB of main memory at the peak; a smaller"
    ) as e:
        Distill(distill(tiny, "a")).step()
    monkeypatch.setattr(Distill, "build", lambda self: torch.empty(1 << 50))
    with pytest.raises(memory.OutOfMemoryError, match=r"GB of main memory at the peak"):
        Distill(distill(tiny, "b"))
    assert (
        failure(f"trainables.memory.OutOfMemoryError: {e.value}") == "out_of_memory"
        and failure("ValueError") == "failed"
    )


def test_other_errors_of_a_step_stay_as_they_are(tiny, monkeypatch):
    def broken(self, batch, step, total):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Training, "train_step", broken)
    with pytest.raises(RuntimeError, match="mat1") as error:
        Distill(distill(tiny, "a")).step()
    assert type(error.value) is RuntimeError
