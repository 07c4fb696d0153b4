import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from engines.errors import InputError
from trainables.schedules import Schedule, constant, linear, step

WEIGHT = st.floats(0, 1)


def test_values_of_the_plans_schedules() -> None:
    sched = step(0.5, 0.7, at=0.7)
    assert [sched.value(epoch / 30) for epoch in (0, 20, 21, 29, 30)] == [0.5, 0.5, 0.7, 0.7, 0.7]
    assert constant(0.5).value(0.3) == 0.5
    assert linear(0.5, 0.1).value(0.25) == pytest.approx(0.4)
    assert linear(0.5, 0.1).value(1) == pytest.approx(0.1)


def test_yaml_forms_are_read() -> None:
    assert Schedule.from_data(yaml.safe_load("0.5")) == constant(0.5)
    assert Schedule.from_data(yaml.safe_load("{step: [0.5, 0.7], shares: [0.7, 0.3]}")) == step(0.5, 0.7, 0.7)
    assert Schedule.from_data(yaml.safe_load("{linear: [0.5, 0.1]}")) == linear(0.5, 0.1)


@given(
    st.one_of(
        WEIGHT.map(constant),
        st.builds(linear, WEIGHT, WEIGHT),
        st.builds(step, WEIGHT, WEIGHT, st.floats(0.01, 0.99)),
    )
)
def test_data_round_trip_and_range(schedule: Schedule) -> None:
    again = Schedule.from_data(json.loads(json.dumps(schedule.to_data())))
    assert again == schedule
    low, high = min(schedule.values), max(schedule.values)
    assert all(low - 1e-12 <= schedule.value(i / 10) <= high + 1e-12 for i in range(11))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"step": [0.5, 0.7], "shares": [0.7, 0.4]}, "sum to 1.1: they must sum to 1"),
        ({"step": [0.5, 0.7], "shares": [1.0]}, "one share per value"),
        ({"step": [0.5, 0.7]}, "expected a number"),
        ({"step": [0.5, 0.7], "shares": [1.3, -0.3]}, "each must lie in"),
        ({"linear": [0.5]}, "expected 2 value"),
        ({"linear": [0.5, "a"]}, "expected a number"),
        ({"cosine": [0.5, 0.1]}, "cosine"),
        (True, "True"),
        ("0.5", "'0.5'"),
        (None, "None"),
        (float("nan"), "finite"),
    ],
)
def test_bad_schedules_say_what_was_expected(data: object, said: str) -> None:
    with pytest.raises(InputError, match="schedule") as caught:
        Schedule.from_data(data)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_step_needs_a_share_inside_training() -> None:
    for at in (0, 1, -0.2, 1.5):
        with pytest.raises(InputError, match=f"at={at}"):
            step(0.5, 0.7, at=at)
