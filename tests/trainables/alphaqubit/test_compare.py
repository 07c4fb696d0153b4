import numpy as np
import pytest
import sinter
import torch

from engines.errors import InputError
from trainables import evaluate, timing
from trainables.alphaqubit import compare, decisions, matching, rounds, sinter_csv
from trainables.alphaqubit.sampler import CLASSES, Experiment, fixed_shots
from trainables.gates import paired_drop


def test_record_holds_the_decoder_beside_others_on_the_same_shots(aq, tmp_path):
    student = aq.save(tmp_path / "student.pth", aq.domain().student(inherit=False))
    job = aq.job(student, test_shots=3000)
    found = evaluate.measure_quality(job)
    extra, domain = found["extra"], aq.domain(test_shots=3000)
    shots, model = domain._fixed("test"), domain.load(student)
    wrong = domain.evaluate(model, "test")["ler"].double()
    assert extra["ler_lo"] < found["ler"] < extra["ler_hi"] and found["ler"] == pytest.approx(float(wrong.mean()))
    for name, said in compare.NAMES.items():
        theirs = compare.wrong(name, domain.workload.experiment, shots)
        assert extra[f"ler_{said}"] == pytest.approx(theirs.mean())
        assert extra[f"ler_over_{said}"] == pytest.approx(float(wrong.mean()) / theirs.mean())
        assert extra[f"ler_over_{said}_lo"] < extra[f"ler_over_{said}"] < extra[f"ler_over_{said}_hi"]
    assert extra["ler_limit"] < extra["ler_matching"] and extra["ler_over_exact"] > 1
    assert extra["ler_over_exact"] == pytest.approx(found["ler_exact"] / extra["ler_limit"])
    p = torch.sigmoid(decisions.logits(model, shots["events"], shots["measurements"]))[:, 0].double().numpy()
    gaps = [p[(k <= 15 * p) & (15 * p < k + 1)].sum() - shots["label"][(k <= 15 * p) & (15 * p < k + 1), 0].sum()
            for k in range(15)]  # fmt: skip
    assert extra["ece"] == pytest.approx(np.abs(gaps).sum() / 3000, abs=2e-3)
    timed = timing.measure_latency(job)
    assert timed["extra"]["us_per_shot"] == 1000 * timed["t_pair_p50_ms"] == 3 * timed["extra"]["us_per_round"]
    assert 0 < timed["extra"]["us_per_shot_1024"] < timed["extra"]["us_per_shot"]
    assert timed["extra"]["us_per_shot_matching"] > 0 and timed["extra"]["us_per_shot_correlated"] > 0


@pytest.mark.parametrize("label", ["xz", "ixyz"])
def test_both_observables_are_compared_as_pairs_of_flips(label):
    experiment = Experiment(3, 2, 0.02, label=label)
    shots = fixed_shots(experiment, 1, 2000)[0]
    pairs = fixed_shots(Experiment(3, 2, 0.02, label="xz"), 1, 2000)[0]["label"].numpy()
    assert np.array_equal(decisions.label_flips(shots["label"], label), pairs)
    assert compare.wrong("pymatching", experiment, shots).mean() < pairs.any(1).mean()
    classes = torch.nn.functional.one_hot(torch.arange(4)).float()
    assert [int(CLASSES[x, z]) for x, z in decisions.flips(classes, "ixyz")] == [0, 1, 2, 3]


def test_interval_of_decisions_is_that_of_all_pairs():
    """Drawing equal pairs together gives the same distribution: quantiles agree within 10 % of the width."""
    draw = np.random.default_rng(0)
    own, other = (draw.random((2, 1500)) < np.array([[0.11], [0.1]])).astype(float)
    together = paired_drop(own, other, True, seed=1, n=3000)
    apart = paired_drop(own + draw.random(1500) * 1e-9, other, True, seed=1, n=3000)
    assert [together.lo, together.hi] == pytest.approx([apart.lo, apart.hi], abs=0.1 * (apart.hi - apart.lo))
    assert compare.ratio(own, np.zeros(1500), 0) is None
    assert compare.binomial(0, 100)[0] == 0 and compare.binomial(0, 100)[1] == pytest.approx(0.0362, abs=1e-4)


def test_rate_per_round_of_a_file(aq, capsys, tmp_path):
    idle = aq.new_decoder()
    with torch.no_grad():
        idle.readout.heads["Z"].bias -= 20  # never predicts a flip, which is worse than matching and better than a coin
    path, out = aq.save(tmp_path / "idle.pth", idle), tmp_path / "rounds.csv"
    given = [str(path), "--rounds", "1", "2", "3", "5", "--p", "0.01", "--shots", "4000", "--csv", str(out)]
    assert rounds.main(given) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == ["decoder", "decoder", "pymatching", "pymatching_correlated", "exact"]
    lines = sinter.read_stats_from_csv_files(out)
    assert {(line.decoder, line.json_metadata["r"]) for line in lines} == {
        (name, n) for name in ("idle", "pymatching", "pymatching_correlated", "exact") for n in (1, 2, 3, 5)
    }
    flipped = fixed_shots(Experiment(3, 5, 0.01), 1, 4000)[0]["label"]
    five = next(line for line in lines if line.decoder == "idle" and line.json_metadata["r"] == 5)
    assert (five.shots, five.errors) == (4000, int(flipped.sum()))
    rows = [rounds.Counted(line.decoder, Experiment(3, line.json_metadata["r"], 0.01), 4000, line.errors, 0.0)
            for line in sorted(lines, key=lambda line: line.json_metadata["r"])]  # fmt: skip
    found = rounds.fits(rows, 1)
    assert found["exact"].eps < found["pymatching"].eps < found["idle"].eps
    assert all(fit.low < fit.eps < fit.high and fit.r2 > 0.95 for fit in found.values())
    cell = next(line for line in said if line.startswith("exact")).split("  ")
    assert f"{found['exact'].eps:.6f} [{found['exact'].low:.6f}" in "  ".join(cell)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--rounds", "1", "3"], "a fit needs two numbers of rounds"),
        (["--rounds", "0", "3", "5"], "rounds=0 is too small"),
        (["--p", "0.6"], "p=0.6 is no error probability"),
        (["--noise", "pink"], "noise 'pink' is unknown"),
        (["--shots", "0"], "count=0 of test shots is too small"),
    ],
)
def test_bad_flags_of_the_fit_end_in_one_line(aq, capsys, given, named):
    assert rounds.main([str(aq.teacher_file), *given]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and named in said and said.count("\n") == 1


def test_other_decoders_where_installed():
    assert set(compare.FAST) <= set(matching.available())
    with pytest.raises(InputError, match="not the folder of a finished sweep"):
        sinter_csv.of_run(decisions.SHIPPED.parent / "none")
