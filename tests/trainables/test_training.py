import json
import math
import weakref
from itertools import pairwise

import pytest
import torch
from torch import nn

from engines.errors import InputError
from trainables import checkpoint
from trainables.training import Training, learning_rate


class Noisy(Training):
    """Regression with dropout: its steps draw random numbers. params: poison = first epoch whose data hold NaN."""

    lower_is_better = True

    def build(self):
        width = self.config["params"].get("width", 5)
        self.model = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Dropout(0.3), nn.Linear(width, 1))
        self.trained = nn.ModuleList([self.model])

    def batches(self, epoch):
        generator = torch.Generator().manual_seed(epoch)
        for _ in range(self.steps_per_epoch):
            x = torch.randn(self.settings["batch_size"], 3, generator=generator)
            yield {"x": x, "y": x.sum(1, keepdim=True).sin()}

    def loss(self, batch, progress):
        if self.epoch + 1 >= self.config["params"].get("poison", math.inf):
            batch["y"][0] = math.nan
        squared = (self.model(batch["x"]) - batch["y"]).square().mean()
        return squared, {"squared": squared, "progress": torch.tensor(progress)}

    def validate(self):
        x = torch.linspace(-1, 1, 30).reshape(10, 3)
        with torch.no_grad():
            quality = float((self.model(x) - x.sum(1, keepdim=True).sin()).square().mean())
        return {"val_drop": quality, "val_quality": quality}

    def exported(self):
        return {"model": self.model.state_dict(), "config": {}, "origin": {"epoch": self.epoch}}


class Higher(Noisy):
    lower_is_better = False

    def validate(self):
        quality = [0.5, 0.9, 0.7, math.nan][self.epoch - 1]
        return {"val_drop": 1 - quality, "val_quality": quality}


@pytest.fixture
def config(tmp_path):
    def make(name, seed=3, **params):
        settings = {"epochs": 4, "samples_per_epoch": 40, "batch_size": 8, "lr": 1e-2, "lr_end": 0.01}
        settings |= {"precision": "float32", "accumulate": 1, "checkpointing": False}
        return {
            **{"trial_id": name, "domain": "none", "params": params, "seed": seed, "state_dir": str(tmp_path / name)},
            "settings": {**settings, "lr_warmup": 0.1, "optimizer": "adamw", "weight_decay": 0.1},
        }

    return make


def state(folder):
    return checkpoint.load(folder / "state.pt")


def weights(folder):
    """What a trial leaves, without what a clock measured."""
    found = state(folder)
    return {key: found[key] for key in ("epoch", "best", "trained", "optimizer", "rng")}


@pytest.mark.parametrize("cuts", [[1], [3], [1, 2, 3], [2, 2]])
def test_resumed_is_uninterrupted(config, tmp_path, tiny, cuts):
    straight = Noisy(config("straight"))
    expected = [tiny.without_clocks(straight.step()) for _ in range(4)]
    found = {}
    trial = Noisy(config("cut"))
    for epoch in range(1, 5):
        found[epoch] = tiny.without_clocks(trial.step())
        for _ in range(cuts.count(epoch)):
            torch.rand(epoch)  # whatever else a process drew
            trial = Noisy(config("cut"))
            assert tiny.without_clocks(trial.step()) == found[epoch], "a restored trial repeats its last report"
    assert list(found.values()) == expected
    assert [metrics["epoch"] for metrics in expected] == [1, 2, 3, 4]
    assert tiny.same(weights(tmp_path / "cut"), weights(tmp_path / "straight"))
    assert tiny.same(checkpoint.load(tmp_path / "cut/best.pth"), checkpoint.load(tmp_path / "straight/best.pth"))


def test_restored_trial_repeats_its_report_before_it_trains_on(config, tmp_path):
    """The driver may have died before it wrote that report down: without it a sweep's record has a gap."""
    trial = Noisy(config("a"))
    trial.step()
    last = trial.step()
    again = Noisy(config("a"))
    before = (tmp_path / "a/state.pt").read_bytes()
    assert again.step() == last, "bit for bit, the times included: they make the hours of the record"
    assert (tmp_path / "a/state.pt").read_bytes() == before
    assert again.step()["epoch"] == 3


def test_trial_that_has_run_all_its_epochs_repeats_its_last_report(config, tmp_path):
    """The driver stops it by that: it must not train past its limit."""
    trial = Noisy(config("a"))
    reports = [trial.step() for _ in range(4)]
    before = (tmp_path / "a/state.pt").read_bytes()
    for _ in range(2):
        assert Noisy(config("a")).step() == reports[-1]
    assert (tmp_path / "a/state.pt").read_bytes() == before


def test_next_trial_of_a_process_has_no_trace_of_the_first(config, tmp_path, tiny):
    fresh = Noisy(config("fresh", width=4))
    expected = [tiny.without_clocks(fresh.step()) for _ in range(4)]
    reused = Noisy(config("first", seed=9, poison=2))
    for _ in range(3):
        reused.step()
    first = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    assert reused.reset_config(config("second", width=4))
    assert [tiny.without_clocks(reused.step()) for _ in range(4)] == expected
    assert tiny.same(weights(tmp_path / "second"), weights(tmp_path / "fresh"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()} == first
    assert reused.reset_config(config("first", seed=9))
    assert [reused.step()["epoch"] for _ in range(2)] == [3, 4], "and back: the first goes on where it stood"


def test_nan_in_the_data_keeps_the_last_finite_weights(config, tmp_path):
    trial = Noisy(config("late", poison=3))
    qualities = [trial.step()["val_quality"] for _ in range(2)]
    assert math.isfinite(sum(qualities))
    kept = (tmp_path / "late/best.pth").read_bytes()
    report = trial.step()
    assert math.isnan(report["val_drop"]) and math.isnan(report["train_loss"])
    assert (tmp_path / "late/best.pth").read_bytes() == kept
    for value in checkpoint.load(tmp_path / "late/best.pth")["model"].values():
        assert value.isfinite().all()
    assert state(tmp_path / "late")["best"] == min(qualities)
    again = Noisy(config("late", poison=3))
    assert math.isnan(again.step()["val_drop"]), "a diverged trial stays diverged after a restart"


def test_nan_from_the_start_leaves_no_best_weights(config, tmp_path):
    assert math.isnan(Noisy(config("early", poison=1)).step()["val_drop"])
    assert not (tmp_path / "early/best.pth").exists()


def test_best_weights_follow_the_metric(config, tmp_path):
    trial = Higher(config("high"))
    for _ in range(4):
        trial.step()
    assert checkpoint.load(tmp_path / "high/best.pth")["origin"]["epoch"] == 2
    assert trial.best == 0.9


def test_a_state_that_cannot_be_written_stops_the_trial_and_keeps_the_last(config, tmp_path, monkeypatch, tiny):
    trial = Noisy(config("a"))
    trial.step()
    expected = (tmp_path / "a/state.pt").read_bytes()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "fsync", full)
        with pytest.raises(OSError, match="no space left on the device; the earlier checkpoint is kept"):
            trial.step()
    assert (tmp_path / "a/state.pt").read_bytes() == expected
    again = Noisy(config("a"))
    found = [tiny.without_clocks(again.step()) for _ in range(2)]
    straight = Noisy(config("straight"))
    assert found == [tiny.without_clocks(straight.step()) for _ in range(2)]


def test_truncated_state_is_one_line(config, tmp_path):
    Noisy(config("a")).step()
    path = tmp_path / "a/state.pt"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="state .*state.pt cannot be read") as error:
        Noisy(config("a"))
    assert "\n" not in str(error.value)


def test_reports_are_plain_numbers(config):
    report = Noisy(config("a")).step()
    assert json.loads(json.dumps(report)) == report
    assert report["train_loss"] == report["train_squared"]
    # 5 steps of 20: progress 0, .05, ... .2
    assert report["train_progress"] == pytest.approx(0.1)
    assert report["lr"] == learning_rate(5 / 20, 1e-2, 0.01, 0.1)
    assert {"seconds_train", "seconds_val", "seconds_data", "epoch", "val_drop"} <= report.keys()


def test_learning_rate():
    rates = [learning_rate(i / 1000, 0.5, 0.02, 0.1) for i in range(1001)]
    assert rates[0] == 0 and rates[50] == pytest.approx(0.25) and rates[100] == pytest.approx(0.5)
    assert rates[550] == pytest.approx(0.5 * 0.51) and rates[-1] == pytest.approx(0.01)
    assert all(a < b for a, b in pairwise(rates[:101])) and all(a > b for a, b in pairwise(rates[100:]))
    assert max(abs(a - b) for a, b in pairwise(rates)) < 0.006, "no jump"
    assert learning_rate(0.0, 0.5, 0.02, 0.0) == 0.5


def test_a_batch_in_pieces_makes_the_same_step(config):
    """The loss is a mean over samples, so the mean of the pieces' gradients is that of the batch."""
    whole, pieces = Noisy(config("whole")), Noisy(config("pieces"))
    pieces.settings["accumulate"] = 4
    for trial in (whole, pieces):
        trial.model[2].p = 0.0  # dropout would draw once per piece
    for _ in range(2):
        expected, found = whole.step(), pieces.step()
        assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
        assert found["val_quality"] == pytest.approx(expected["val_quality"], rel=1e-4)


def test_the_next_trial_starts_when_the_memory_of_the_last_is_free(config):
    """A card may have room for one of them: nothing of the old model may be left when the new one is built."""
    held, left = [], []

    class Watched(Noisy):
        def build(self):
            left.append([ref() is not None for ref in held])
            super().build()
            held.append(weakref.ref(next(self.model.parameters())))

    trial = Watched(config("first"))
    trial.train()
    assert trial.reset_config(config("second"))
    assert left == [[], [False]] and trial.train()["epoch"] == 1
