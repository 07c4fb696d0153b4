"""The computed picture: points, front, hypervolume, gate; then its files."""

import csv
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from logged_sweep import curve, forty, record, teacher, three
from mlflow.tracking import MlflowClient

from analysis import pareto
from analysis.__main__ import main
from analysis.captions import gate_of
from analysis.front import mark_front, split_at, steps
from analysis.pareto import compute
from analysis.points import Interval, Point
from analysis.store import load
from trainables.record import EXTRAS, FIELDS, InputError

Fresh = Callable[..., str]


def point(x: float, y: float, kind: str = "pass") -> Point:
    return Point("x", kind, Interval(x, x, x), Interval(y, y, y), False, None, {})  # type: ignore[arg-type]


def beaten(a: Point, b: Point) -> bool:
    xs, ys = a.x.value - b.x.value, a.drop.value - b.drop.value
    return xs >= 0 and ys >= 0 and (xs > 0 or ys > 0)


@pytest.mark.parametrize("seed", range(20))
def test_front_agrees_with_the_definition(seed: int) -> None:
    rng = random.Random(seed)
    points = [point(rng.randint(1, 8), rng.randint(-2, 5), rng.choice(["pass", "stopped"])) for _ in range(12)]
    able = [p for p in points if p.kind != "stopped"]
    expected = [p.kind != "stopped" and not any(beaten(p, q) for q in able) for p in points]
    assert [p.on_front for p in mark_front(points)] == expected


def test_hypervolume_is_the_area_between_front_and_reference(fresh: Fresh) -> None:
    trials = [
        (teacher(t_pair_p50_ms=40.0, t_pair_p95_ms=44.0), []),
        (record("K_a_run1", t_pair_p50_ms=20.0, drop=0.008), []),
        (record("K_b_run1", t_pair_p50_ms=30.0, t_pair_p95_ms=33.0, drop=0.004), []),
        (
            record("K_c_run1", t_pair_p50_ms=10.0, t_pair_p95_ms=12.0, drop=0.05, drop_hi=0.06, verdict="fail"),
            [],
        ),
    ]
    found = compute(load(fresh("area", trials), "area"))
    assert found.reference == (40.0, 1.0)
    # (40-20) ms * (1-0.8) % + (40-30) ms * (0.8-0.4) %; what lies beyond the gate adds nothing
    assert found.hypervolume == pytest.approx(20 * 0.2 + 10 * 0.4)
    assert [p.exp_id for p in found.front] == ["K_c_run1", "K_a_run1", "K_b_run1", "K_teacher_run1"]


def test_points_have_kinds_units_and_intervals(uri: str) -> None:
    found = compute(load(uri, "three"))
    by_name = {p.exp_id: p for p in found.points}
    assert {name: p.kind for name, p in by_name.items()} == {
        "K_teacher_run1": "teacher",
        "K_T3B05_run1": "pass",
        "K_T5B05_run1": "fail",
        "K_T3B05_sched_run1": "stopped",
    }
    passed = by_name["K_T3B05_run1"]
    assert (passed.drop.value, passed.drop.lo, passed.drop.hi) == pytest.approx((0.8, 0.2, 1.4))
    assert passed.x == Interval(20.0, 19.7, 20.4)
    assert by_name["K_T3B05_sched_run1"].stop_reason == "stop_loss" and passed.stop_reason is None
    assert found.gate is not None and found.gate.drop_pct == pytest.approx(1.0)
    assert "1 of 3 trials meet the gate" in found.headline and "1 stopped early" in found.headline
    assert any("3fa9c02b77e1" in part for part in found.caption)
    assert any("onnxruntime" in part for part in found.caption)


def test_a_trial_that_passes_counts_as_passed_though_it_was_stopped(fresh: Fresh) -> None:
    plateau = record("K_a_run1", stop_reason="plateau")
    (_, found) = compute(load(fresh("s", [(teacher(), []), (plateau, [])]), "s")).points
    assert found.kind == "pass" and found.stop_reason == "plateau" and found.on_front


def test_trials_without_a_place_are_named(uri: str) -> None:
    found = compute(load(uri, "forty"))
    assert [left[1:] for left in found.left_out] == [("K_search40_run1", "no p50 and no drop; stopped: diverged")]
    assert len(found.points) == 41


def test_a_bar_never_has_a_negative_length(fresh: Fresh) -> None:
    odd = record("K_a_run1", drop=0.02, drop_lo=0.03, drop_hi=0.04, verdict="fail")
    (found,) = compute(load(fresh("s", [(odd, [])]), "s")).points
    assert found.drop.lo <= found.drop.value <= found.drop.hi


def test_no_gate_and_no_teacher(fresh: Fresh) -> None:
    uri = fresh("s", [(record("K_a_run1", verdict="n/a"), [])], gate_metric="None")
    found = compute(load(uri, "s"))
    assert found.gate is None and found.points[0].kind == "unjudged"
    assert found.reference == pytest.approx((22.0, 0.88)) and found.hypervolume == pytest.approx(2.0 * 0.08)


@pytest.mark.parametrize(
    ("settings", "text", "line"),
    [
        ({"gate_metric": "drop", "gate_at_most": "0.03"}, "drop ≤ 3 %", 3.0),
        ({"gate_metric": "p50_ratio", "gate_at_least": "2"}, "p50_ratio ≥ 2", None),
    ],
)
def test_gates(settings: dict[str, str], text: str, line: float | None) -> None:
    found = gate_of(settings)
    assert found is not None and found.text == text and found.drop_pct == line


def test_step_line_splits_at_the_gate() -> None:
    line = steps([(1, 4), (2, 0.5), (5, 0)], top=6, right=7)
    assert line == [(1, 6), (1, 4), (2, 4), (2, 0.5), (5, 0.5), (5, 0), (7, 0)]
    above, below = split_at(line, 1.0)
    assert above == [(1, 6), (1, 4), (2, 4), (2, 1.0)] and below == [(2, 1.0), *line[3:]]
    assert split_at(line, None) == ([], line)
    assert split_at(line, -1.0) == (line, [])


def test_different_workloads_are_refused_and_listed(fresh: Fresh) -> None:
    uri = fresh("mixed", [(teacher(), []), (record("K_a_run1", workload_hash="ffff00001111"), [])])
    with pytest.raises(InputError, match="2 different workloads") as caught:
        pareto.run(uri, "mixed", "unused")
    assert all(word in str(caught.value) for word in ("3fa9c02b77e1", "ffff00001111", "K_a_run1", "K_teacher_run1"))
    assert not Path("unused").exists()


def test_files_and_table_have_the_fields_first(uri: str, tmp_path: Path) -> None:
    paths = pareto.run(uri, "forty", tmp_path / "new" / "folder", log=False)
    assert [path.name for path in paths] == ["pareto.csv", "pareto.png", "pareto.html", "curves.png"]
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == sorted(p.name for p in paths)
    rows = list(csv.reader(paths[0].open(encoding="utf-8")))
    assert tuple(rows[0][:25]) == FIELDS and tuple(rows[0][25 : 25 + len(EXTRAS)]) == EXTRAS
    assert rows[0][-3:] == ["kind", "on_front", "left_out"]
    assert len(rows) == 1 + len(forty())
    written = {row[0]: float(row[FIELDS.index("t_pair_p50_ms")]) for row in rows[1:-1]}
    assert written == {r.exp_id: r.t_pair_p50_ms for r, _ in forty()[:-1]}
    for path in (paths[1], paths[3]):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 20_000


def test_a_sweep_with_nothing_measured_still_gives_files(fresh: Fresh, tmp_path: Path) -> None:
    bare = record("K_a_run1", t_pair_p50_ms=None, t_pair_p95_ms=None, drop=None, drop_lo=None, drop_hi=None)
    paths = pareto.run(fresh("s", [(bare, curve(0.1, 3))]), "s", tmp_path / "out", log=False)
    assert "No trial has both" in paths[2].read_text(encoding="utf-8")


def test_command_line_logs_the_files_to_the_sweep(
    fresh: Fresh, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = fresh("three", three())
    arguments = ["pareto", "--tracking-uri", uri, "--sweep", "three", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert "pareto.html" in capsys.readouterr().out
    client = MlflowClient(tracking_uri=uri)
    parent = load(uri, "three").run_id
    names = {item.path for item in client.list_artifacts(parent)}
    assert names == {"pareto.csv", "pareto.png", "pareto.html", "curves.png"}
    # Another picture of the same name stays out of it.
    before = Path(client.download_artifacts(parent, "pareto.csv", str(tmp_path))).read_bytes()
    assert main([*arguments, "--x", "size_MB"]) == 0
    assert "attached" not in capsys.readouterr().out
    again = client.download_artifacts(parent, "pareto.csv", str(tmp_path))
    assert Path(again).read_bytes() == before != (tmp_path / "out" / "pareto.csv").read_bytes()


def test_unwritable_folder_is_one_line(uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    out = str(tmp_path / "file" / "out")
    assert main(["pareto", "--tracking-uri", uri, "--sweep", "three", "--out", out, "--no-log"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --out") and error.count("\n") == 1


@pytest.mark.parametrize("command", ["pareto", "table"])
def test_unknown_sweep_ends_with_exit_code_2(uri: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--out", "unused"] if command == "pareto" else []
    assert main([command, "--tracking-uri", uri, "--sweep", "nothing", *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --sweep 'nothing'") and error.count("\n") == 1
