import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from engines.errors import InputError
from engines.export import export_onnx
from engines.runtimes import OnnxRuntime
from trainables.alphaqubit import decisions
from trainables.alphaqubit.sampler import Experiment, fixed_shots
from trainables.alphaqubit.streaming import Streaming, export


@pytest.mark.parametrize(
    ("distance", "changes"),
    [
        (3, {"layers": 2, "dilations": (1, 2), "next_stabilizer": True}),
        (5, {}),
        (3, {"outputs": "ixyz", "basis": "XZ"}),
    ],
)
def test_round_by_round_is_the_whole_graph(aq, tmp_path, distance, changes):
    model = aq.new_decoder(distance, **changes)
    shots = fixed_shots(Experiment(distance, 4, 0.03, label=changes.get("outputs", "observable")), 1, 60)[0]
    inputs = (shots["events"].int(), shots["measurements"].int())
    path = tmp_path / "whole.onnx"
    export_onnx(model, tuple(part[:1] for part in inputs), path, ["events", "measurements"], ["logits"])
    whole, stream = OnnxRuntime(path, "cpu", 1), Streaming(model)
    with torch.no_grad():
        expected = model.features(*inputs)["readout"].numpy()
    answers, wholes = [], []
    for k in range(60):
        events, measurements = (part[k].numpy() for part in inputs)
        stream.start()
        for t in range(5):
            stream.push(events[t], measurements[t], last=t == 4)
            np.testing.assert_allclose(stream.logits(), expected[k, t], rtol=1e-4, atol=1e-5)
        answers.append(stream.logits())
        wholes.append(whole.run(tuple(part[k : k + 1].numpy() for part in inputs))[0][0])
    decide = (lambda x: np.argmax(x, 1)) if changes.get("outputs") == "ixyz" else (lambda x: x > 0)
    assert np.array_equal(decide(np.array(answers)), decide(np.array(wholes)))
    np.testing.assert_allclose(answers, wholes, rtol=1e-4, atol=1e-5)


def test_the_step_is_a_graph_of_state_and_bits_alone(aq, tmp_path):
    step, read = export(aq.new_decoder(), tmp_path)
    graphs = [onnx.load(str(path)).graph for path in (step, read)]
    assert [[one.name for one in graph.input] for graph in graphs] == [["state", "codes"], ["state"]]
    assert [[one.name for one in graph.output] for graph in graphs] == [["next_state"], ["logits"]]


def test_the_readmes_example_runs_and_decides_as_the_decoder(capsys):
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    names = {}
    exec(
        re.search(r"```python\n(from trainables.alphaqubit import decisions, streaming.*?)```", readme, re.S)[1], names
    )
    model, shots = decisions.read(decisions.SHIPPED).eval(), names["shots"]
    flipped = bool(decisions.logits(model, shots["events"], shots["measurements"])[0, 0] > 0)
    assert capsys.readouterr().out == ("flipped\n" if flipped else "not flipped\n")


def test_bad_rounds_are_named(aq):
    stream = Streaming(aq.new_decoder())
    with pytest.raises(InputError, match=r"events \(24,\), measurements \(8,\): expected \(8,\)"):
        stream.push(np.zeros(24), np.zeros(8))
    stream.push(np.zeros(8), np.zeros(8), last=True)
    with pytest.raises(InputError, match="after the last round: call start"):
        stream.push(np.zeros(8), np.zeros(8))
    stream.start()
    stream.push(np.zeros(8), np.zeros(8))
