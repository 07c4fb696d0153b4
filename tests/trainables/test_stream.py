"""Samples drawn ahead by a thread: the same numbers whatever the timing, an end, and errors that surface."""

import threading
import time
from itertools import count

import pytest
import torch

from engines.errors import InputError
from trainables.alphaqubit.sampler import Experiment, Sampler
from trainables.stream import Stream, fresh


def test_batches_are_in_order_whatever_the_timing():
    sampler, running = Sampler(Experiment(3, 2, 0.01), 3), threading.active_count()
    whole = sampler.shots(500, 1200)
    for slow_draw, slow_use in ((0, 0), (0.002, 0), (0, 0.002)):

        def draw(index, pause=slow_draw):
            time.sleep(pause)
            return sampler.at(index)

        found = []
        for batch in fresh(draw, 500, 12, 100):
            time.sleep(slow_use)
            found.append(batch)
        assert len(found) == 12 and threading.active_count() == running, "the thread ends with the batches"
        for name, value in whole.items():
            assert torch.equal(torch.cat([batch[name] for batch in found]), value)


def test_no_more_is_drawn_than_may_wait():
    drawn = []

    def source():
        for step in count():
            drawn.append(step)
            yield {"step": torch.tensor(step)}

    with Stream(source(), depth=3) as stream:
        assert int(next(stream)["step"]) == 0
        deadline = time.monotonic() + 20
        while len(drawn) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        assert drawn == [0, 1, 2, 3, 4], "one was used, three wait, one is in hand"
    assert next(stream, None) is None and stream.cpu_seconds > 0


def test_an_abandoned_epoch_ends_its_thread():
    running = threading.active_count()
    batches = fresh(lambda index: {"index": index}, 0, 100, 4)
    next(batches)
    assert threading.active_count() == running + 1
    batches.close()
    assert threading.active_count() == running


def test_an_error_of_the_thread_reaches_the_caller():
    def source():
        yield from ({"step": torch.tensor(step)} for step in range(2))
        raise InputError("step 2")

    with Stream(source()) as stream:
        assert [int(next(stream)["step"]) for _ in range(2)] == [0, 1]
        for _ in range(2):
            with pytest.raises(InputError, match="step 2"):
                next(stream)
