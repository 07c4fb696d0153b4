"""Two workers on one trial, over Gloo: real actors in real placement groups.

One worker that takes a batch in two pieces adds the same numbers in the same order, so there the comparison is bit for
bit; with the whole batch at once the sums within a layer round differently, which Muon's orthogonalised steps amplify
to 1e-3 of the weights in six steps.
"""

import signal
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import ray
import torch

from engines.errors import InputError
from trainables import checkpoint, preemption
from trainables import gang as gangs
from trainables.distill import Distill
from trainables.gang import refuse_uneven
from trainables.pretrain import Pretrain
from trainables.prune import Prune
from trainables.quantize import Quantize

CHANGING = {
    Prune: {"epochs": 4, "steps": 2, "rho": 0.3},
    Quantize: {
        **{"model": "teacher", "bits_w": 8, "bits_a": 8, "keep": ["layernorm", "softmax", "attention"]},
        **{"mode": "static", "calibration": 8, "method": "minmax", "smooth": 0.0, "reduce_range": False},
        **{"skip_slower": False, "epochs": 4, "qat_share": 0.5, "frozen_share": 0.2},
    },
}


class Faulty(Distill):
    """params: sick = the rank whose second epoch raises. A collective waits for three seconds."""

    def setup(self, config):
        gangs.TIMEOUT = timedelta(seconds=3)
        self.sick = config["params"].get("sick")
        super().setup(config)

    def _train(self):
        if self.epoch == 1 and self.gang.rank == self.sick:
            raise InputError("no room on this card")
        return super()._train()


class Leaving(Distill):
    """The follower's node is to be taken away after the second step of the second epoch."""

    def setup(self, config):
        preemption.noticed = lambda: self.gang.rank == 1 and (self.epoch, self.taken) == (1, 2)
        super().setup(config)


def steps(leader, count):
    return [ray.get(leader.step.remote()) for _ in range(count)]


def state(config):
    found = checkpoint.load(Path(config["state_dir"]) / "state.pt")
    return {key: found[key] for key in ("epoch", "best", "trained", "optimizer")}


def distance(config, other):
    """Of the weights after training, relative."""
    own, others = (torch.cat([v.flatten() for v in state(c)["trained"].values()]) for c in (config, other))
    return float((own - others).norm() / others.norm())


def alone(kind, config, count):
    trial = kind(config)
    return [trial.step() for _ in range(count)]


def values(reports, *names):
    return [report[name] for report in reports for name in names]


def test_two_workers_are_one_with_the_same_batch(gang, tiny):
    config, changes = tiny.config, {"gamma": 0.1}
    leader = gang.lead(Distill, config("two", changes))
    found = steps(leader, 3)
    whole, pieces = config("whole", changes), config("pieces", changes, accumulate=2)
    expected = alone(Distill, pieces, 3)
    assert tiny.same(state(config("two")), state(pieces))
    assert values(found, "val_drop", "val_absrel", "kept") == values(expected, "val_drop", "val_absrel", "kept")
    names = ("train_loss", "train_task", "train_kl", "train_feature", "lr")
    assert values(found, *names) == pytest.approx(values(expected, *names), rel=1e-6)
    expected = alone(Distill, whole, 3)
    assert values(found, *names) == pytest.approx(values(expected, *names), rel=1e-4)
    assert values(found, "val_absrel") == pytest.approx(values(expected, "val_absrel"), rel=1e-3)
    assert 0 < distance(config("two"), whole) < 1e-2
    assert {report["workers"] for report in found} == {2} and "workers" not in expected[0]

    # The next trial of these processes: pieces on each worker, checkpointing, another optimiser.
    before = {process.pid for process in gang.followers()}
    other = {"optimizer": "adamw", "checkpointing": True}
    assert ray.get(leader.reset_config.remote({**config("next", accumulate=2, **other), "workers": 2}))
    found = steps(leader, 2)
    assert {process.pid for process in gang.followers()} == before and len(before) == 1
    four = config("four", accumulate=4, **other)
    expected = alone(Distill, four, 2)
    assert values(found, "train_loss") == pytest.approx(values(expected, "train_loss"), rel=1e-5)
    assert 0 < distance(config("next"), four) < 1e-4, "(a + b) + (c + d) is not ((a + b) + c) + d"

    # And one that a single worker began.
    first = alone(Distill, config("cut", changes, accumulate=2), 1)
    ray.get(leader.reset_config.remote({**config("cut", changes), "workers": 2}))
    assert steps(leader, 1) == first, "a restored trial repeats its last report, and nobody trains"
    steps(leader, 2)
    assert tiny.same(state(config("cut")), state(config("two")))
    ray.get(leader.stop.remote())
    gang.wait(lambda: not gang.followers())


@pytest.mark.slow
def test_pretraining_draws_each_workers_own_scenes(gang, tiny):
    found = steps(gang.lead(Pretrain, tiny.config("two")), 2)
    pieces, whole = tiny.config("pieces", accumulate=2), tiny.config("whole")
    expected = alone(Pretrain, pieces, 2)
    assert tiny.same(state(tiny.config("two")), state(pieces))
    assert values(found, "train_loss") == pytest.approx(values(expected, "train_loss"), rel=1e-6)
    assert values(alone(Pretrain, whole, 2), "train_loss") == pytest.approx(values(found, "train_loss"), rel=1e-4)


def test_a_killed_follower_ends_the_step_by_name_and_the_trial_goes_on_from_its_last_epoch(gang, tiny):
    config = tiny.config("killed", samples_per_epoch=400)
    leader = gang.lead(Distill, config)
    steps(leader, 1)
    before = state(config)
    second = leader.step.remote()
    (follower,) = gang.followers()
    gang.wait(lambda: psutil.Process(follower.pid).cmdline()[0] == "ray::Follower.train")
    follower.kill()
    with pytest.raises(RuntimeError, match=r"worker 1 of 2: .*(died|killed)"):
        ray.get(second, timeout=120)
    assert tiny.same(state(config), before), "nothing of the broken epoch is kept"
    ray.get(leader.stop.remote())
    again = gang.lead(Distill, config)
    steps(again, 2)
    pieces = tiny.config("pieces", samples_per_epoch=400, accumulate=2)
    alone(Distill, pieces, 2)
    assert tiny.same(state(config), state(pieces))


@pytest.mark.slow
def test_all_leave_in_the_middle_of_an_epoch_when_one_has_to(gang, tiny):
    config, pieces = tiny.config("leaves"), tiny.config("pieces", accumulate=2)
    leader = gang.lead(Leaving, config)
    first = steps(leader, 1)
    with pytest.raises(ray.exceptions.RayError):
        steps(leader, 1)
    gang.wait(lambda: not gang.followers())
    assert checkpoint.load(Path(config["state_dir"]) / "state.pt")["part"]["taken"] == 2
    again = gang.lead(Leaving, config)
    assert steps(again, 1) == first
    found, expected = steps(again, 1), alone(Distill, pieces, 2)
    assert values(found, "train_loss", "val_drop") == values(expected[1:], "train_loss", "val_drop")
    assert tiny.same(state(config), state(pieces))


@pytest.mark.slow
def test_no_worker_waits_for_one_that_raised_or_hangs(gang, tiny):
    leader = gang.lead(Faulty, tiny.config("follower", {"sick": 1}))
    steps(leader, 1)
    with pytest.raises(RuntimeError, match="worker 1 of 2: no room on this card"):
        steps(leader, 1)
    ray.get(leader.stop.remote())
    leader = gang.lead(Faulty, tiny.config("leader", {"sick": 0}))
    steps(leader, 1)
    with pytest.raises(InputError, match="no room on this card"):
        steps(leader, 1)
    ray.get(leader.stop.remote())
    gang.wait(lambda: not gang.followers())

    leader = gang.lead(Faulty, tiny.config("hangs", samples_per_epoch=400))
    steps(leader, 1)
    (follower,) = gang.followers()
    follower.send_signal(signal.SIGSTOP)
    with pytest.raises(ConnectionError, match="worker 0 of 2 lost the others: .*Timed out"):
        steps(leader, 1)
    ray.kill(leader)
    gang.wait(lambda: not gang.followers())


@pytest.mark.slow
def test_a_follower_that_cannot_be_built_or_sees_an_older_state_says_so(gang, tiny):
    class Elsewhere(Distill):
        def build(self):
            if self.gang.rank:
                raise InputError("teacher.pth does not exist")
            super().build()

    class Stale(Distill):
        def _restore(self, state):
            super()._restore(state)
            self.epoch -= self.gang.rank

    with pytest.raises(ray.exceptions.RayError, match="teacher.pth does not exist"):
        steps(gang.lead(Elsewhere, tiny.config("elsewhere")), 1)
    alone(Distill, tiny.config("stale"), 1)
    with pytest.raises(ray.exceptions.RayError, match="worker 1 of 2 found the state after epoch 0 .*, not epoch 1"):
        steps(gang.lead(Stale, tiny.config("stale")), 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CHANGING)
def test_models_that_change_while_they_train(gang, tiny, kind):
    """Pruning in two steps, and fake quantization from the middle on, restored in between."""
    config, pieces = tiny.config("two", **CHANGING[kind]), tiny.config("pieces", accumulate=2, **CHANGING[kind])
    for one in (config, pieces):
        one["budget"] = -1.0  # rounding alone never does
    first = gang.lead(kind, config)
    steps(first, 3)
    ray.get(first.stop.remote())
    found = steps(gang.lead(kind, config), 2)
    expected = alone(kind, pieces, 4)
    assert values(found, "val_drop") == values(expected[2:], "val_drop")
    assert tiny.same(state(config), state(pieces))


def test_batches_that_do_not_cut_are_refused_in_one_line():
    refuse_uneven({"batch_size": 24, "accumulate": 2}, 3)
    refuse_uneven({"batch_size": 5}, 1)
    refuse_uneven({"floor": 0.1}, 3)
    with pytest.raises(InputError) as error:
        refuse_uneven({"batch_size": 32, "accumulate": 2}, 3)
    said = "--workers-per-trial 3: batch_size=32 with accumulate=2 cannot be cut into 6 equal pieces of an even size"
    assert str(error.value) == f"{said}; give a batch_size that 12 divides"
    with pytest.raises(InputError, match="that 4 divides"):
        refuse_uneven({"batch_size": 30}, 2)
