import numpy as np
import pytest
import sinter
import torch

from engines.errors import InputError
from trainables import evaluate, timing
from trainables.alphaqubit import compare, decisions, matching, metrics, rounds, sinter_csv
from trainables.alphaqubit.layout import layout_of
from trainables.alphaqubit.sampler import CLASSES, Experiment, fixed_shots
from trainables.checkpoint import model_hash
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
    # The definition, turned round: after two rounds the flips of both, or of neither, cancel.
    eps = extra["ler_per_round"]
    assert found["ler"] == pytest.approx(2 * eps * (1 - eps))
    p = torch.sigmoid(decisions.logits(model, shots["events"], shots["measurements"]))[:, 0].double().numpy()
    gaps = [p[(k <= 15 * p) & (15 * p < k + 1)].sum() - shots["label"][(k <= 15 * p) & (15 * p < k + 1), 0].sum()
            for k in range(15)]  # fmt: skip
    assert extra["ece"] == pytest.approx(np.abs(gaps).sum() / 3000, abs=2e-3)
    timed = timing.measure_latency(job)
    assert (
        timed["extra"]["us_per_shot"]
        == 1000 * timed["t_pair_p50_ms"]
        == pytest.approx(3 * timed["extra"]["us_per_round"])
    )
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


def counted(decoder, n, shots, *flips):
    return rounds.Counted(decoder, Experiment(3, n, 0.01), shots, min(sum(flips), shots), flips, 0.0)


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
    rows = [counted(line.decoder, line.json_metadata["r"], 4000, line.errors)
            for line in sorted(lines, key=lambda line: line.json_metadata["r"])]  # fmt: skip
    found = rounds.fits(rows, 1)
    assert found["exact"].eps < found["pymatching"].eps < found["idle"].eps
    assert all(fit.low < fit.eps < fit.high and fit.r2 > 0.95 for fit in found.values())
    cell = next(line for line in said if line.startswith("exact")).split("  ")
    assert f"{found['exact'].eps:.6f} [{found['exact'].low:.6f}" in "  ".join(cell)
    assert {line.json_metadata.get("weights") for line in lines} == {model_hash(idle), None}
    assert rounds.main(given) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"{out}: 16 of 16 lines were there already and are not added again"
    )
    assert [line.shots for line in sinter.read_stats_from_csv_files(out)] == [4000] * 16


def test_each_of_two_observables_has_a_rate_of_its_own():
    """Either of two that flip by chance is wrong up to three quarters of the time: no line of rounds goes through that.

    Many rounds, so that either fails in more than half of the shots.
    """
    shots, rates = 10**9, (0.01, 0.02)
    wrong = {n: [round(shots * (1 - (1 - 2 * eps) ** n) / 2) for eps in rates] for n in (3, 9, 50)}
    rows = [counted("one", n, shots, *flips) for n, flips in wrong.items()]
    assert rows[-1].errors / shots > 0.5
    found = rounds.fits(rows, 1)
    assert {name: round(fit.eps, 6) for name, fit in found.items()} == {"one, X": 0.01, "one, Z": 0.02}
    said = rounds.table(rows, found).splitlines()
    assert [line.split("  ")[0] for line in said] == [
        "decoder", "one, X", "one, Z", "LERs are of one observable each, X or Z, not of either."
    ]  # fmt: skip


@pytest.mark.parametrize("outputs", ["xz", "ixyz"])
def test_rounds_of_a_decoder_of_both_observables(aq, tmp_path, outputs):
    path = aq.save(tmp_path / "both.pth", aq.new_decoder(basis="XZ", outputs=outputs))
    model = decisions.read(path).eval()
    experiment = rounds.experiment_of(model, 2, 0.02, "uniform")
    shots, label = (fixed_shots(Experiment(3, 2, 0.02, label=kind), 1, 500)[0] for kind in (outputs, "xz"))
    rows = rounds.count(model, experiment, 500, 1)
    for row in rows:
        if row.decoder in compare.FAST:
            wrong = matching.decode(row.decoder, experiment.circuit(), layout_of(experiment.circuit()).to_flat(
                shots["events"].numpy())) != label["label"].numpy()  # fmt: skip
            assert row.flips == tuple(wrong.sum(0)) and row.errors == wrong.any(1).sum()
        assert max(row.flips) <= row.errors <= sum(row.flips) and len(row.flips) == 2
    assert rows[-1].decoder == "exact" and rows[-1].errors < 60


def test_rate_per_round_of_one_ler():
    assert metrics.rate_per_round((1 - (1 - 2 * 0.01) ** 7) / 2, 7) == pytest.approx(0.01)
    assert metrics.rate_per_round(0.5, 7) is None and metrics.rate_per_round(0.0, 7) == 0


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
