"""The verdict table in its three forms."""

import csv
import io
from pathlib import Path

import pytest
from logged_sweep import copy_store, interrupted, record, teacher, three
from rich.console import Console

from analysis import curves, pareto, table
from analysis.__main__ import main
from analysis.points import RATIO
from analysis.store import load
from trainables.record import InputError, Record

SETTINGS = {"test_pairs": "2048"}


def dicts(records: list[Record]) -> list[dict[str, object]]:
    return [{**r.to_dict(), "role": "teacher" if "teacher" in r.exp_id else "trial"} for r in records]


def shown(records: list[Record]) -> str:
    console = Console(width=160, file=io.StringIO(), force_terminal=False)
    console.print(table.render(dicts(records), SETTINGS, "k_grid_demo_seed42"))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_says_what_was_measured_and_what_came_out() -> None:
    text = shown([r for r, _ in three()])
    head = text.splitlines()[0]
    for word in ("k_grid_demo_seed42", "3fa9c02b77e1", "against dust3r_teacher", "2048 test pairs", "onnxruntime"):
        assert word in head
    (line,) = [line for line in text.splitlines() if "K_T3B05_sched_run1" in line]
    for word in ("0.5, then 0.7", "9", "+9.30 [+7.00, +12.00]", "20.90", "fail", "stop_loss"):
        assert word in line


def test_the_teacher_stands_first_and_missing_numbers_are_dashes() -> None:
    bare = record("K_a_run1", drop=None, drop_lo=None, drop_hi=None, t_pair_p50_ms=None, T=None, verdict=None)
    rows = table.rows(dicts([bare, teacher()]))
    assert [row.exp_id for row in rows] == ["K_teacher_run1", "K_a_run1"]
    assert rows[1].cells() == ("K_a_run1", "–", "0.5", "–", "30", *["–"] * 7, "completed")


def test_markup_in_a_name_stays_text() -> None:
    text = shown([record("K_a_run1", beta="[red]0.5[/red]", stop_reason="[/]")])
    assert "[red]0.5[/red]" in text and "[/]" in text


def test_csv_keeps_full_precision() -> None:
    exact = record("K_a_run1", drop=1 / 300, t_pair_p50_ms=19.123456789)
    (row,) = csv.DictReader(io.StringIO(table.csv_text(dicts([exact]))))
    assert float(row["drop_pct"]) == 100 * (1 / 300) and float(row["p50_ms"]) == 19.123456789
    assert row["verdict"] == "pass" and row["stop_reason"] == "completed"


def test_markdown_is_a_table() -> None:
    records = dicts([r for r, _ in three()])
    lines = table.markdown(records, SETTINGS).splitlines()
    assert "2048 test pairs" in lines[0]
    assert len({line.count("|") for line in lines[2:8]}) == 1 and lines[8:] == [
        "",
        *table.foot(records),
    ]


def test_different_workloads_are_refused() -> None:
    with pytest.raises(InputError, match="different workloads"):
        table.rows(dicts([record("K_a_run1"), record("K_b_run1", workload_hash="0000")]))


def test_command_line(uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(tmp_path / name) for name in ("v.csv", "v.md")]
    arguments = [
        "table",
        "--tracking-uri",
        uri,
        "--sweep",
        "three",
        "--csv",
        files[0],
        "--markdown",
        files[1],
    ]
    assert main(arguments) == 0
    assert "K_T5B05_run1" in capsys.readouterr().out
    records = load(uri, "three").trials.to_dicts()
    assert Path(files[0]).read_text(encoding="utf-8") == table.csv_text(records)
    assert "| K_T5B05_run1 |" in Path(files[1]).read_text(encoding="utf-8")


def test_it_is_clear_what_is_test_and_what_validation() -> None:
    text = " ".join(shown([r for r, _ in three()]).split())
    assert "test drop % [95 %]" in text and "on the test pairs" in text
    assert "Validation pairs alone chose the weights and the best student" in text


@pytest.mark.parametrize(("load", "warned"), [(1.9, False), (2.1, True)])
def test_a_load_above_the_cores_is_told(load: float, warned: bool) -> None:
    records = [record("K_a_run1", extra={"load_1m": load, "cores": 2}), record("K_b_run1")]
    assert ("load 2.1 on 2 cores" in shown(records)) == warned
    assert ("load 2.1 on 2 cores" in table.markdown(dicts(records), SETTINGS)) == warned


def test_an_interrupted_sweep_is_said_to_be_one_in_the_plans_order(
    empty_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = copy_store(empty_uri, tmp_path)
    open_, passed, missed, _ = [record("K_open_run1"), *(r for r, _ in three()[1:])]
    interrupted(uri, "cut", [(open_, [0.5, 0.3]), (teacher(), []), (passed, [0.1]), (missed, [0.2])])
    assert main(["table", "--tracking-uri", uri, "--sweep", "cut"]) == 0
    out = capsys.readouterr().out
    assert (
        "cut was interrupted before it was complete; go on with: python sweeps/k_grid.py --profile demo --resume"
        in (" ".join(out.split()))
    )
    (line,) = [line for line in out.splitlines() if "K_open_run1" in line]
    assert "interrupted" in line
    lines = [line for line in out.splitlines() if "_run1" in line and "│" in line]
    order = ["K_teacher_run1", "K_T3B05_run1", "K_T5B05_run1", "K_open_run1"]
    assert [next(name for name in order if name in line) for line in lines] == order
    data = load(uri, "cut")
    computed = pareto.compute(data)
    assert "1 not finished" in computed.headline and computed.headline.endswith("the sweep was interrupted")
    assert [left[1:] for left in computed.left_out] == [("K_open_run1", "no p50 and no drop; interrupted")]
    assert {c.exp_id: c.kind for c in curves.compute(data)}["K_open_run1"] == "open"
    pareto.write(data, computed, tmp_path / "pictures")


def test_command_line_with_an_unwritable_file(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", "--tracking-uri", uri, "--sweep", "three", "--csv", "/nowhere/at/all.csv"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_decoders_have_shots_microseconds_and_error_rates() -> None:
    decoder = record(
        "AQ1_KD_run1",
        domain="alphaqubit",
        t_pair_p50_ms=0.3891,
        extra={"ler": 0.0236, RATIO: 1.45, f"{RATIO}_lo": 1.4, f"{RATIO}_hi": 1.5},
    )
    text = table.markdown(dicts([decoder]), {"test_shots": "40000"}, chosen="AQ1_KD_run1")
    assert "40000 test shots" in text and "on the test shots" in text and "pairs" not in text
    assert "| test LER |" in text and "| p50 µs |" in text and "| x teacher [95 %] |" in text
    assert "| AQ1_KD_run1 (chosen) |" in text and "| 0.02360 |" in text and "| 389.1 | 1.45 [1.40, 1.50] |" in text
    assert text.count("completed") == 1
    (row,) = csv.DictReader(io.StringIO(table.csv_text(dicts([decoder]), "AQ1_KD_run1")))
    assert float(row["p50_ms"]) == 0.3891 and float(row[RATIO]) == 1.45 and row["chosen"] == "True"


def test_a_stage_has_its_own_columns_and_no_empty_ones():
    common = {"exp_id": "a", "drop": 0.01, "verdict": "pass", "role": "trial", "params_down": 0.289}
    pruned = table.columns(table.rows([{**common, "rho": 0.3}]))
    assert "rho" in pruned and "params down %" in pruned and "T" not in pruned and "x FP32 torch" not in pruned
    text = table.markdown([{**common, "rho": 0.3}], {})
    assert "| a | 0.3 | – | +1.00 | 28.9 |" in text
    int8 = table.markdown([{**common, "bits_w": 8, "p50_ratio_fp32": 3.75}], {})
    assert "x FP32 torch" in int8 and "| 3.75 |" in int8 and "params down" not in int8


def test_what_all_trials_share_stands_above_the_table():
    pair = [record("P_r010_run1", T=1.0, beta=0.7, rho=0.1), record("P_r030_run1", T=1.0, beta=0.7, rho=0.3)]
    records = dicts([teacher(), *pair])
    head, _, names, *_ = table.markdown(records, {}).splitlines()
    assert head.endswith("  ·  T 1, beta 0.7") and "| rho |" in names and "T |" not in names and "beta" not in names
    alone = table.columns(table.rows(records[:2]))
    assert "T" in alone and "T 1" not in table.title(records[:2], {}), "one trial shares nothing"
