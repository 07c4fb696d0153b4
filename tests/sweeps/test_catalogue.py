"""The plan as data agrees with the scripts that it names, and with itself."""

import importlib
from pathlib import Path

import pytest

from engines.errors import InputError
from sweeps.catalogue import PLANS, Stage, select, stage_of
from sweeps.spec import Sweep

ALL = PLANS["all"]


def sweep_of(stage: Stage) -> Sweep:
    module = importlib.import_module(f"sweeps.{stage.path.stem}")
    return next(value for value in vars(module).values() if isinstance(value, Sweep))


@pytest.mark.parametrize("stage", ALL, ids=lambda stage: stage.id)
def test_a_stage_is_what_its_script_says(stage: Stage) -> None:
    sweep = sweep_of(stage)
    assert stage.path.is_file() and (stage.domain, tuple(stage.settings)) == (sweep.domain, tuple(sweep.settings))
    made = {*(trial.saves for trial in sweep.trials), *sweep.best_files, sweep.log, sweep.baseline}
    made |= set(sweep.effect_files)
    engines = [Path(name).stem for name in made if name and name.endswith(".trt")]
    made |= {f"{stem}.{kind}" for stem in engines for kind in ("trt.json", "qdq.onnx")} | {"workload.yaml"}
    for task in stage.tasks:
        assert task.files and set(task.files) <= made
    by_id = {task.id: task for task in stage.tasks}
    assert {trial.task_id for trial in sweep.trials} <= by_id.keys()
    # A row's hard lines are its trials' own, as far as the plan asks for them.
    for trial in sweep.trials:
        gates = [*([sweep.gate] if sweep.gate else []), *trial.gates]
        task = by_id[trial.task_id]
        owned = trial.saves is None or trial.saves in task.files
        assert not owned or all(gate in gates or gate.metric.startswith("gain_") for gate in task.gates), task.id
    # A stage that is started with an earlier stage's file takes the one that the script alone would look for.
    if sweep.starts_from:
        (own,) = [need for need in stage.needs if need.setting == "model"]
        source = sweep_of(stage_of(ALL, own.task))
        assert (source.stage, own.file) == sweep.starts_from


@pytest.mark.parametrize("name", PLANS)
def test_needs_come_first_and_name_what_is_there(name: str) -> None:
    stages = PLANS[name]
    ids = [task.id for stage in stages for task in stage.tasks]
    files = [file for stage in stages for task in stage.tasks for file in task.files]
    assert len(ids) == len(set(ids)) and len(files) == len(set(files)), "deliverables share one folder"
    for place, stage in enumerate(stages):
        for need in stage.needs:
            source = stage_of(stages, need.task)
            assert stages.index(source) < place and (need.file is None) == (need.setting is None)
            if need.file:
                sweep = sweep_of(source)
                assert need.file in {*sweep.best_files, *(trial.saves for trial in sweep.trials)}
                assert stage.knows(str(need.setting))


def test_every_row_of_the_plan_is_there() -> None:
    """The ids and the file names of the plan's table."""
    ids = {task.id for stage in ALL for task in stage.tasks}
    rows = "P0-1 P0-2 K-1 K-2 K-3 K-4 Q-1 Q-2 Q-3 Q-4 KQ-1 KQ-2 KQ-3 P-1 P-2 P-3 ABL-1 ABL-2 ABL-3 AQ-1 AQ-2 AQ-3 AQ-4"
    assert ids >= {*rows.split(), "AQ-5"}
    files = {file for stage in ALL for task in stage.tasks for file in task.files}
    assert files >= {"workload.yaml", "teacher_eval.json", "student_fp32_t3b05.pth", "student_fp32_t5b05.pth",
                     "student_fp32_sched.pth", "student_fp32_best.pth", "distill_log.json", "ptq_int8.onnx",
                     "quant_ckpt.pth", "quantized_model.trt", "quant_eval.json", "student_int8.trt", "kq_eval.json",
                     "pruned_r010.pth", "pruned_r030.pth", "prune_eval.json", "ablation_keep.json",
                     "ablation_calib.json", "ablation_loss.json", "aq_baseline.pth", "aq_stage1.pth", "aq_stage2.pth",
                     "ablation_signals.json", "ablation_stages.json"}  # fmt: skip
    assert all(stage.gpu_hours[1] >= stage.gpu_hours[0] > 0 for stage in PLANS["dust3r"])


def test_every_sweep_script_is_in_the_plan_but_for_training_a_teacher() -> None:
    folder = Path(__file__).resolve().parents[2] / "sweeps"
    scripts = {path.name for path in folder.glob("*.py") if "\n    main(" in path.read_text()}
    assert scripts - {stage.script for stage in ALL} == {"campaign.py", "pretrain.py", "aq_pretrain.py"}


def test_selection() -> None:
    def ids(*args: object, **kwargs: object) -> list[str]:
        return [stage.id for stage in select(PLANS["dust3r"], *args, **kwargs)]  # type: ignore[arg-type]

    assert ids() == ["P0", "K", "KQ", "Q", "P", "ABL-1", "ABL-2", "ABL-3"]
    assert ids(["KQ", "K-2"]) == ["K", "KQ"]
    assert ids(start="P-2") == ["P", "ABL-1", "ABL-2", "ABL-3"]
    assert ids(start="Q", skip=["ABL-1", "P-1"]) == ["Q", "ABL-2", "ABL-3"]
    with pytest.raises(InputError, match="unknown stage 'k'"):
        ids(["k"])
    with pytest.raises(InputError, match="leave no stage"):
        ids(["K"], start="Q")
