import csv
import math
from dataclasses import replace
from datetime import datetime

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given, settings

from trainables.record import (
    EXTRAS,
    FIELDS,
    UNITS,
    InputError,
    Record,
    exp_id,
    finite,
    now,
    read_csv,
    write_csv,
)

WHEN = "2026-03-01T12:00:00+01:00"
PLAN = (
    "exp_id combo rho T beta gamma bits_w bits_a keep_list params_M flops_G size_MB vram_GB chamfer absrel "
    "rmse delta1 t_pair_p50_ms t_pair_p95_ms t_scene_s pairs_per_sec gpu_hours notes seed datetime"
)

texts = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    [
        "",
        "null",
        "1",
        "1.0",
        " 2",
        "1_0",
        "nan",
        "inf",
        '"',
        '"x"',
        "a,b",
        "line\nbreak",
        "cr\rlf\r\n",
        "学生",
        "٣",
    ]
)
reals = st.floats(0, 1, allow_nan=False) | st.sampled_from([0.0, 1.0, 0.1 + 0.2 - 0.2, 5e-324])
values = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**62), 2**62) | texts | st.none()
records = st.builds(
    Record,
    exp_id=texts.filter(bool),
    datetime=st.datetimes(timezones=st.timezones()).map(datetime.isoformat),
    combo=st.none() | texts,
    T=st.none() | st.floats(0.1, 100),
    beta=st.none() | reals | texts,
    gamma=st.none() | reals | texts,
    bits_w=st.none() | st.integers(1, 32),
    absrel=st.none() | reals,
    notes=st.none() | texts,
    seed=st.none() | st.integers(0, 2**62),
    drop=st.none() | st.floats(-1e300, 1e300),
    verdict=st.sampled_from([None, "pass", "fail", "n/a"]),
    parent=st.none() | texts,
    extra=st.dictionaries(st.sampled_from(["ler", "p50_ratio", "ram_GB", "x", "y_1"]), values),
)


def test_the_25_fields_stand_first_and_in_the_plans_order():
    assert list(FIELDS) == PLAN.split()
    assert list(Record(exp_id="a", datetime=WHEN, extra={"ler": 1}).to_dict()) == [*FIELDS, *EXTRAS, "ler"]
    assert set(UNITS) == {*FIELDS, *EXTRAS} and all(UNITS.values())


@given(records)
@example(Record(exp_id="a", datetime=WHEN, beta="0.5", extra={"x": "null", "y_1": None}))
def test_json_and_dict_round_trips_are_exact(record):
    assert Record.from_json(record.to_json()) == record
    assert Record.from_dict(record.to_dict()) == record
    assert "\n" not in record.to_json()


def exactly(record):
    return sorted(map(repr, record.to_dict().items()))


@settings(deadline=None)
@given(st.lists(records, max_size=4))
@example([Record(exp_id="a", datetime=WHEN, extra={"x": None}), Record(exp_id="b", datetime=WHEN)])
def test_csv_round_trip_is_exact_to_the_type(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "rows.csv"
    write_csv(path, rows)
    back = read_csv(path)
    assert back == rows
    # 1 and 1.0 are equal, but not the same; extra keys may come back in another order.
    assert [exactly(record) for record in back] == [exactly(record) for record in rows]


def test_csv_is_plain_for_other_readers(tmp_path):
    write_csv(tmp_path / "r.csv", [Record(exp_id="a", datetime=WHEN, T=3, absrel=0.25, notes="x, y")])
    (row,) = csv.DictReader((tmp_path / "r.csv").open(newline=""))
    assert (row["T"], row["absrel"], row["notes"], row["rho"]) == ("3.0", "0.25", "x, y", "")
    assert not list(tmp_path.glob("*.tmp"))


def test_numbers_take_the_fields_type():
    record = Record(exp_id="a", datetime=WHEN, T=3, absrel=np.float32(0.5), seed=np.int64(4), bits_w=8.0)
    assert [type(x) for x in (record.T, record.absrel, record.seed, record.bits_w)] == [
        float,
        float,
        int,
        int,
    ]


def test_all_problems_are_listed_at_once():
    with pytest.raises(InputError) as error:
        Record(
            exp_id="a",
            datetime=WHEN,
            T=0,
            absrel=math.nan,
            delta1=1.5,
            seed="x",
            bits_w=True,
            extra={"T": 1, "b": []},
        )
    text = str(error.value)
    assert "\n" not in text
    for part in ("T=0.0", "absrel=nan", "delta1=1.5", "seed='x'", "bits_w=True", "extra 'T'", "b=[]"):
        assert part in text


@pytest.mark.parametrize(
    "wrong",
    [
        {"datetime": "2026-03-01T12:00:00"},
        {"datetime": "yesterday"},
        {"exp_id": ""},
        {"verdict": "passed"},
        {"drop": math.inf},
        {"drop_lo": 0.2, "drop_hi": 0.1},
        {"t_pair_p50_ms": 5, "t_pair_p95_ms": 4},
        {"notes": "\ud800"},
        {"seed": 2**63},
        {"extra": {"a b": 1}},
        {"extra": {"a": math.nan}},
    ],
)
def test_bad_values_are_refused(wrong):
    good = Record(exp_id="a", datetime=WHEN)
    with pytest.raises(InputError, match=next(iter(wrong.get("extra", wrong)))):
        replace(good, **wrong)


def test_damaged_files_are_refused(tmp_path):
    write_csv(tmp_path / "r.csv", [Record(exp_id="a", datetime=WHEN, T=3)])
    text = (tmp_path / "r.csv").read_text()
    for broken, word in (
        (text.replace("absrel", "abs"), "absrel"),
        (text.replace("3.0", "warm"), "warm"),
        (text + "b,\n", "cells"),
        ("", "missing"),
    ):
        (tmp_path / "bad.csv").write_text(broken)
        with pytest.raises(InputError, match=word):
            read_csv(tmp_path / "bad.csv")
    for text in ("{", "[]", "{}"):
        with pytest.raises(InputError):
            Record.from_json(text)


def test_exp_id_joins_what_there_is():
    assert exp_id("K", "T3B05", "sched") == "K_T3B05_sched_run1"
    assert exp_id("KQ", "INT8") == "KQ_INT8_run1"
    assert exp_id("Q", "QAT", "keepLN", run=2) == "Q_QAT_keepLN_run2"
    for bad in (("K", ""), ("K", "a b"), ("", "x"), ("K", "x", "a/b")):
        with pytest.raises(InputError):
            exp_id(*bad)
    with pytest.raises(InputError, match="run=0"):
        exp_id("K", "x", run=0)


def test_finite_and_now_fit_a_record():
    assert [finite(x) for x in (None, math.nan, -math.inf, 0.5)] == [None, None, None, 0.5]
    assert datetime.fromisoformat(Record(exp_id="a", datetime=now()).datetime).utcoffset() is not None
