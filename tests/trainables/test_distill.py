import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from engines.errors import InputError
from sweeps.stoploss import StopLossRule, decide
from trainables import checkpoint
from trainables.distill import Distill
from trainables.pretrain import Pretrain

# Goes on with each given config for some epochs, in a process that has seen nothing of what came before.
GO_ON = """
import json, random, sys
import numpy, torch
from trainables.distill import Distill
from trainables.pretrain import Pretrain
torch.set_num_threads(1)
for name, config, steps in json.loads(sys.argv[1]):
    torch.rand(5), numpy.random.rand(5)
    trial = {"Distill": Distill, "Pretrain": Pretrain}[name](config)
    print(json.dumps([trial.step() for _ in range(steps)]))
"""
STATES = ("epoch", "best", "trained", "optimizer", "rng")


def kept(config):
    state = checkpoint.load(Path(config["state_dir"]) / "state.pt")
    return {key: state[key] for key in STATES}, checkpoint.load(Path(config["state_dir"]) / "best.pth")


def steps(trial, count):
    return [trial.step() for _ in range(count)]


def test_resumed_in_a_fresh_process_is_uninterrupted(tiny):
    """All parts on: KL with a schedule, hidden states with adapters, inheritance, cosine learning rate."""
    params = {"T": 2.0, "beta": {"step": [0.5, 0.7], "shares": [0.7, 0.3]}, "gamma": 0.1}
    pairs = []
    for kind, given in ((Distill, params), (Pretrain, {})):
        straight, cut = tiny.config(f"{kind.__name__}_straight", given), tiny.config(f"{kind.__name__}_cut", given)
        pairs.append((kind.__name__, straight, cut, steps(kind(straight), 3), steps(kind(cut), 1)))
    done = tiny.python(GO_ON, json.dumps([(name, cut, 3) for name, _, cut, _, _ in pairs]))
    for (name, straight, cut, expected, first), line in zip(pairs, done.splitlines(), strict=True):
        repeated, *others = json.loads(line)
        assert repeated == first[0], f"{name} repeats the report that may not have been written down"
        found = [*first, *others]
        assert list(map(tiny.without_clocks, found)) == list(map(tiny.without_clocks, expected)), name
        assert [report["epoch"] for report in found] == [1, 2, 3]
        assert tiny.same(kept(cut)[0], kept(straight)[0]), name
        assert tiny.same(kept(cut)[1]["model"], kept(straight)[1]["model"]), name
    losses = [report["train_loss"] for report in pairs[1][3]]
    assert losses[-1] < losses[0], "it does learn"


def test_next_trial_of_a_process_has_no_trace_of_the_first(tiny):
    fresh = tiny.config("fresh", {"T": 5.0, "beta": 0.3})
    expected = steps(Distill(fresh), 2)
    reused = Distill(tiny.config("first", {"T": 2.0, "beta": 0.0, "gamma": 0.5, "depth": 1.0}))
    reused.step()
    second = tiny.config("second", {"T": 5.0, "beta": 0.3})
    assert reused.reset_config(second)
    assert list(map(tiny.without_clocks, steps(reused, 2))) == list(map(tiny.without_clocks, expected))
    assert tiny.same(kept(second)[0], kept(fresh)[0])


@pytest.mark.parametrize("kind", [Distill, Pretrain])
def test_trial_that_has_run_all_its_epochs_repeats_its_last_report(tiny, kind):
    config = tiny.config("a", epochs=1)
    report = kind(config).step()
    before = kept(config)
    assert kind(config).step() == report
    assert tiny.same(kept(config), before)


def test_batches_pass_over_the_whole_cache_again_and_again(tiny):
    trial = Distill(tiny.config("a", samples_per_epoch=24, train_samples=40, batch_size=8))
    rows = []
    trial.cache.rows = lambda indices: rows.append(indices.tolist())
    for epoch in (1, 2, 3, 4, 5):
        list(trial.batches(epoch))
    assert [len(row) for row in rows] == [8] * 15
    stream = sum(rows, [])
    assert all(b == a + 1 and a % 2 == 0 for a, b in zip(stream[0::2], stream[1::2], strict=True)), "both directions"
    turns = [stream[k : k + 40] for k in (0, 40, 80)]
    assert all(sorted(turn) == list(range(40)) for turn in turns)
    assert turns[0] != turns[1] != turns[2]
    rows.clear()
    list(Distill(tiny.config("b", {"T": 5.0, "gamma": 1.0})).batches(3))
    trial.reset_config(tiny.config("c"))
    trial.cache.rows = lambda indices: rows.append(indices.tolist())
    list(trial.batches(3))
    assert sum(rows, []) == stream[48:72], "the same samples whatever the trial, and from the epoch alone"


def test_loss_is_the_weighted_sum_of_its_parts(tiny):
    params = {"T": 2.0, "beta": {"linear": [0.5, 0.1]}, "gamma": 0.3, "alpha": 0.7}
    trial = Distill(tiny.config("a", params))
    batch = next(trial.batches(1))
    for progress, beta in ((0.0, 0.5), (0.5, 0.3), (1.0, 0.1)):
        total, parts = trial.loss(batch, progress)
        assert parts.keys() == {"task", "kl", "feature"}
        expected = 0.7 * parts["task"] + beta * parts["kl"] + 0.3 * parts["feature"]
        assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    total.backward()
    assert all(p.grad is not None and p.grad.any() for p in trial.heads.parameters()), "adapters are trained"
    alone = Distill(tiny.config("b", {"beta": 0.0, "gamma": 0.0}))
    total, parts = alone.loss(batch, 0.5)
    assert parts.keys() == {"task"} and total == parts["task"] and len(alone.heads) == 0


def test_adapters_are_not_exported(tiny):
    config = tiny.config("a", {"gamma": 0.5}, epochs=1)
    trial = Distill(config)
    trial.step()
    exported = checkpoint.load(Path(config["state_dir"]) / "best.pth")
    assert exported["model"].keys() == trial.model.state_dict().keys()
    assert exported["origin"] == {"params": {"gamma": 0.5}, "seed": 7, "epoch": 1}
    student = trial.domain.load(Path(config["state_dir"]) / "best.pth")
    assert tiny.same(dict(student.state_dict()), dict(trial.model.state_dict()))
    adapters = {f"1.{name}" for name in trial.heads.state_dict()}
    assert adapters and adapters <= kept(config)[0]["trained"].keys(), "but they are part of the state"


def test_inherited_student_is_made_once_and_the_same_for_all(tiny, monkeypatch):
    first = Distill(tiny.config("a", {"T": 2.0}))
    weights = {name: value.clone() for name, value in first.model.state_dict().items()}

    def never(*arguments):
        raise AssertionError("inherited again")

    monkeypatch.setattr("trainables.dust3r.inherit.inherit", never)
    second = Distill(tiny.config("b", {"T": 5.0, "gamma": 0.1}))
    assert tiny.same(dict(second.model.state_dict()), weights)
    scratch = Distill(tiny.config("c", {"init": "scratch"}))
    assert scratch.model.config == second.model.config
    assert not tiny.same(dict(scratch.model.state_dict()), weights)
    with pytest.raises(AssertionError, match="inherited again"):
        Distill(tiny.config("d", {"ffn": 0.5}))


def test_inherited_student_starts_nearer_to_its_teacher(tiny):
    kl = {}
    for init in ("inherit", "scratch"):
        trial = Distill(tiny.config(init, {"init": init}))
        kl[init] = float(trial.loss(next(trial.batches(1)), 0.0)[1]["kl"].detach())
    assert kl["inherit"] < 0.5 * kl["scratch"]


def test_from_scratch_does_not_depend_on_what_is_cached(tiny):
    params = {"init": "scratch", "gamma": 0.1}
    trials = [Distill(tiny.config(name, params, cache=cache)) for name, cache in (("a", "x"), ("b", "x"), ("c", "y"))]
    states = [dict(trial.model.state_dict()) for trial in trials]
    assert tiny.same(states[0], states[1]) and tiny.same(states[0], states[2])


def test_drop_is_against_the_teacher(tiny):
    trial = Distill(tiny.config("a"))
    report = trial.step()
    domain = tiny.domain()
    reference = float(domain.evaluate(domain.teacher(), "val")["absrel"].mean())
    own = float(domain.evaluate(trial.model, "val")["absrel"].mean())
    assert report["val_quality"] == report["val_absrel"] == pytest.approx(own, rel=1e-5)
    assert report["val_drop"] == pytest.approx((own - reference) / reference, rel=1e-4, abs=1e-5)
    better = Distill(tiny.config("b", primary="delta1"))
    report = better.step()
    sign = math.copysign(1, float(better.reference.mean()) - report["val_quality"])
    assert math.copysign(1, report["val_drop"]) == sign, "a higher share of good pixels is better"


@pytest.mark.parametrize(("poisoned_after", "best"), [(0, False), (1, True)])
def test_nan_in_the_data_is_divergence(tiny, poisoned_after, best):
    config = tiny.config("a", train_samples=24)
    folder = Path(config["state_dir"])
    trial = Distill(config)
    history = [trial.step()["val_drop"] for _ in range(poisoned_after)]
    before = (folder / "best.pth").read_bytes() if best else b""
    trial.cache.rows(torch.arange(1))  # is built
    shard = np.load(trial.cache.folder / next(trial.cache.folder.glob("00000.*.npy")), mmap_mode="r+")
    shard["teacher_conf1"][3, 5, 5] = np.nan  # points may be unknown, NaN
    shard.flush()
    history.append(trial.step()["val_drop"])
    assert all(map(math.isfinite, history[:-1])) and not math.isfinite(history[-1])
    decision = decide(history, [], StopLossRule(budget=0.01, max_evals=3))
    assert decision.stop and decision.reason == "diverged"
    assert (folder / "best.pth").exists() == best
    if best:
        assert (folder / "best.pth").read_bytes() == before
        weights = checkpoint.load(folder / "best.pth")["model"]
        assert all(value.isfinite().all() for value in weights.values())


def test_teacher_that_knows_nothing_is_one_line(tiny, tmp_path):
    """Not-a-number weights: no drop against such a teacher has a size."""
    model = tiny.new_model()
    with torch.no_grad():
        model.enc_norm.weight[0] = math.nan
    path = tiny.save_model(tmp_path / "nan.pth", model)
    with pytest.raises(InputError) as error:
        trial = Distill(tiny.config("a", {"init": "scratch"}, teacher=str(path)))
        trial.step()
    assert "\n" not in str(error.value)


def test_pretraining_sees_every_scene_once(tiny):
    trial = Pretrain(tiny.config("a"))
    seen = []
    trial.domain.pretraining_samples = lambda scenes: seen.append(scenes.tolist())
    for epoch in (1, 2, 3):
        list(trial.batches(epoch))
    assert [len(scenes) for scenes in seen] == [4] * 9
    assert sum(seen, []) == list(range(36))


def test_pretraining_drop_is_the_rise_above_its_own_best(tiny, monkeypatch):
    trial = Pretrain(tiny.config("a", epochs=5))
    qualities = iter([0.5, 0.4, 0.6, math.nan])
    monkeypatch.setattr(trial.domain, "evaluate", lambda model, split: {"absrel": torch.tensor([next(qualities)])})
    reports = steps(trial, 4)
    assert [report["val_drop"] for report in reports[:3]] == pytest.approx([0, -0.2, 0.5])
    assert math.isnan(reports[3]["val_drop"])


def test_less_memory_is_the_same_training(tiny):
    """Activations that are computed again, and batches in pieces, change a curve by rounding alone; 16 bits by more."""
    curves = {}
    for name, change in {
        "plain": {}, "checkpointing": {"checkpointing": True}, "accumulate": {"accumulate": 2},
        "bfloat16": {"precision": "bfloat16"},
    }.items():  # fmt: skip
        trial = Distill(tiny.config(name, {"gamma": 0.1, **change}))
        curves[name] = [report["train_loss"] for report in steps(trial, 2)]
        assert all(weight.dtype == torch.float32 for weight in trial.trained.parameters())
    assert curves["checkpointing"] == pytest.approx(curves["plain"], rel=1e-6)
    assert curves["accumulate"] == pytest.approx(curves["plain"], rel=1e-3)
    assert curves["bfloat16"] == pytest.approx(curves["plain"], rel=0.05) and curves["bfloat16"] != curves["plain"]


def test_checkpointed_blocks_keep_less(tiny):
    def kept(trial):
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            held.append(tensor)
            return tensor

        held = []
        batch = next(iter(trial.batches(1)))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            trial.model.train()
            trial.loss(batch, 0.0)
        return sum(sizes.values())

    plain, checked = (Distill(tiny.config(str(on), {"checkpointing": on})) for on in (False, True))
    assert kept(checked) < 0.75 * kept(plain)
