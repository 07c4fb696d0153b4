"""The plan as data: every task with what it is, what it leaves, its hard lines, what it needs and what it costs.

A stage is one script, one sweep and so one process; it covers the plan's rows whose trials it runs.
`sweeps/campaign.py` runs them, `sweeps/deliverables.py` collects their files. The order here is the order on one
machine: the main line first. A test compares it with the scripts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engines.errors import InputError
from sweeps.settings import (
    DECODER,
    DECODER_FUSION,
    DECODER_PRUNE,
    DECODER_QUANT,
    DECODER_SIZES,
    DECODER_WORKLOAD,
    DISTILL,
    PRUNE,
    QUANT,
    WORKLOAD,
)
from sweeps.spec import SettingsFile
from trainables.gates import Gate

Range = tuple[float, float]


@dataclass(frozen=True)
class Task:
    """One row of the plan. files: what it delivers, by the plan's names. gates: its hard lines. gpu_hours: the plan's
    estimate at profile full, from and to.
    """

    id: str
    title: str
    files: tuple[str, ...] = ()
    gates: tuple[Gate, ...] = ()
    gpu_hours: Range = (0, 0)


@dataclass(frozen=True)
class Needs:
    """What a stage waits for. gate: whether the task must have met its hard lines, or only be over. file: what of the
    task's stage becomes the setting of the stage that waits.
    """

    task: str
    gate: bool = True
    file: str | None = None
    setting: str | None = None


@dataclass(frozen=True)
class Stage:
    """One sweep of the plan. script: of sweeps/, or an absolute path. settings: the files of its keys. cpu_hours: what
    its training once took without a GPU, by profile.
    """

    id: str
    domain: str
    script: str
    settings: Sequence[SettingsFile]
    tasks: Sequence[Task]
    needs: Sequence[Needs] = ()
    cpu_hours: Mapping[str, float] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The script's file."""
        return Path(__file__).parent / self.script

    def sweep(self, profile: str, seed: int) -> str:
        """The name that the sweep has."""
        return f"{self.path.stem}_{profile}_seed{seed}"

    def task(self, task_id: str) -> Task:
        """Its task of that id."""
        return next(task for task in self.tasks if task.id == task_id)

    def knows(self, key: str) -> bool:
        """Whether `--set key=...` means anything to its script."""
        return any(key in file.model.model_fields for file in self.settings)

    @property
    def gpu_hours(self) -> Range:
        """The plan's estimate for all its tasks."""
        return sum(t.gpu_hours[0] for t in self.tasks), sum(t.gpu_hours[1] for t in self.tasks)


def drop(limit: float) -> Gate:
    """May lose at most this share against the teacher."""
    return Gate("drop", at_most=limit)


HALF = Gate("p50_ratio_fp32", at_least=2)  # half the time of its own FP32 form in torch
SMALLER = Gate("params_down", at_least=0.25)
RUNS = Gate("t_pair_p50_ms", at_least=0)  # it ran and was timed

DUST3R = (
    Stage("P0", "dust3r", "baseline.py", (WORKLOAD, DISTILL), [
        Task("P0-1", "sample the pairs, K=4 pair graph, seed 42", ("workload.yaml",)),
        Task("P0-2", "teacher: quality, efficiency, resources", ("teacher_eval.json",), gpu_hours=(4, 6)),
    ], cpu_hours={"demo": 0, "small": 0}),
    Stage("K", "dust3r", "k_grid.py", (WORKLOAD, DISTILL), [
        Task("K-1", "T=3, beta .5", ("student_fp32_t3b05.pth",), (drop(0.01),), (8, 12)),
        Task("K-2", "T=5, beta .5", ("student_fp32_t5b05.pth",), (drop(0.01),), (8, 12)),
        Task("K-3", "T=3, beta .5 for 70 % of the epochs, then .7", ("student_fp32_sched.pth",),
             (drop(0.01), Gate("late_rise", at_most=2)), (8, 12)),
        Task("K-4", "the three on one protocol; the best", ("student_fp32_best.pth", "distill_log.json"),
             (drop(0.01),), (2, 4)),
    ], [Needs("P0-2")], {"demo": 0.049, "small": 1.1}),
    Stage("KQ", "dust3r", "kq_joint.py", (WORKLOAD, QUANT), [
        Task("KQ-1", "the best student by Q's policy", ("student_int8.pth",), (drop(0.01),), (5, 8)),
        Task("KQ-2", "its engines", ("student_int8.onnx", "student_int8.qdq.onnx", "student_int8.trt",
             "student_int8.trt.json"), (RUNS,), (2, 3)),
        Task("KQ-3", "measured", ("kq_eval.json",), (drop(0.01), HALF), (3, 5)),
    ], [Needs("K-4", file="student_fp32_best.pth", setting="model")], {"demo": 0.011, "small": 0.0028}),
    Stage("Q", "dust3r", "q_ptq_qat.py", (WORKLOAD, QUANT), [
        Task("Q-1", "PTQ W8A8, at least 512 calibration images", ("ptq_int8.onnx",), (drop(0.01),), (2, 3)),
        Task("Q-2", "QAT where rounding loses more than 1 %", ("quant_ckpt.pth",), (drop(0.01),), (6, 10)),
        Task("Q-3", "engines", ("quantized_model.onnx", "quantized_model.qdq.onnx", "quantized_model.trt",
             "quantized_model.trt.json"), (RUNS,), (2, 3)),
        Task("Q-4", "measured", ("quant_eval.json",), (HALF,), (2, 4)),
    ], [Needs("P0-2")], {"demo": 0.037, "small": 0.43}),
    Stage("P", "dust3r", "p_prune.py", (WORKLOAD, PRUNE), [
        Task("P-1", "rho .1, fine-tuned", ("pruned_r010.pth",), (drop(0.03),), (8, 12)),
        Task("P-2", "rho .3, fine-tuned", ("pruned_r030.pth",), (drop(0.03),), (10, 14)),
        Task("P-3", "measured", ("prune_eval.json",), (drop(0.03), SMALLER), (2, 4)),
    ], [Needs("P0-2")], {"demo": 0.030, "small": 0.4}),
    Stage("ABL-1", "dust3r", "abl_keep_list.py", (WORKLOAD, QUANT), [
        Task("ABL-1", "keep-list without LayerNorm, without Softmax", ("ablation_keep.json",), (), (2, 3)),
    ], [Needs("P0-2")], {"demo": 0.013, "small": 0.054}),
    Stage("ABL-2", "dust3r", "abl_calibration.py", (WORKLOAD, QUANT), [
        Task("ABL-2", "calibration with 128, 256, 512", ("ablation_calib.json",), (), (2, 3)),
    ], [Needs("P0-2")], {"demo": 0.013, "small": 0.027}),
    Stage("ABL-3", "dust3r", "abl_loss.py", (WORKLOAD, DISTILL), [
        Task("ABL-3", "KL against KL and features", ("ablation_loss.json",), (), (2, 4)),
    ], [Needs("P0-2")], {"demo": 0.070, "small": 0.18}),
)  # fmt: skip

_DECODER = (DECODER_WORKLOAD, DECODER_SIZES, DECODER)
ALPHAQUBIT = (
    Stage("AQ-1", "alphaqubit", "aq_baseline.py", _DECODER, [
        Task("AQ-1", "baseline: final logits and true flips", ("aq_baseline.pth",), (drop(0.03),)),
    ], cpu_hours={"demo": 0.003, "small": 0.12}),
    Stage("AQ-2", "alphaqubit", "aq_stage1.py", _DECODER, [
        Task("AQ-2", "Stage 1: transformer, rnn and readout signals", ("aq_stage1.pth",), (drop(0.03),)),
    ], [Needs("AQ-1", gate=False)], {"demo": 0.004, "small": 0.14}),
    Stage("AQ-3", "alphaqubit", "aq_fusion.py", (DECODER_WORKLOAD, DECODER_FUSION), [
        Task("AQ-3", "fused logits: probes and readout", ("aq_probes.pth",),
             (Gate("gain_transformer", at_least=0), Gate("gain_rnn", at_least=0))),  # better than a constant answer
    ], cpu_hours={"demo": 0.005, "small": 0.018}),
    Stage("AQ-4", "alphaqubit", "aq_stage2.py", _DECODER, [
        Task("AQ-4", "Stage 2 from Stage 1, fused logits", ("aq_stage2.pth",), (drop(0.03),)),
    ], [Needs("AQ-2", gate=False, file="aq_stage1_best.pth", setting="model"),
        Needs("AQ-3", file="aq_probes.pth", setting="fusion")], {"demo": 0.008, "small": 0.13}),
    Stage("AQ-KQ", "alphaqubit", "aq_joint.py", (DECODER_WORKLOAD, DECODER_QUANT), [
        Task("AQ-KQ", "the baseline's student in INT8",
             ("aq_student_int8.pth", "aq_student_int8.onnx", "aq_student_int8.qdq.onnx", "aq_student_int8.trt",
              "aq_student_int8.trt.json", "aq_joint_eval.json"), (drop(0.03), Gate("drop_to_student", at_most=0.01))),
    ], [Needs("AQ-1", file="aq_baseline_best.pth", setting="model")], {"demo": 0.008}),
    Stage("AQ-Q", "alphaqubit", "aq_quantize.py", (DECODER_WORKLOAD, DECODER_QUANT), [
        Task("AQ-Q1", "the teacher rounded to INT8", ("aq_ptq_int8.onnx",), (drop(0.01),)),
        Task("AQ-Q2", "the best of PTQ and QAT, its engines",
             ("aq_int8.pth", "aq_int8.onnx", "aq_int8.qdq.onnx", "aq_int8.trt", "aq_int8.trt.json",
              "aq_quant_eval.json"), (drop(0.01),)),
    ], cpu_hours={"demo": 0.010, "small": 0.079}),
    Stage("AQ-P", "alphaqubit", "aq_prune.py", (DECODER_WORKLOAD, DECODER_PRUNE), [
        Task("AQ-P1", "rho .2, fine-tuned", ("aq_pruned_r020.pth",), (drop(0.03),)),
        Task("AQ-P2", "rho .4, fine-tuned", ("aq_pruned_r040.pth", "aq_prune_eval.json"), (drop(0.03), SMALLER)),
    ], cpu_hours={"demo": 0.010, "small": 0.19}),
    Stage("AQ-5", "alphaqubit", "aq_ablation.py", _DECODER, [
        Task("AQ-5", "signals, fusion and stages at equal steps", ("ablation_signals.json", "ablation_stages.json")),
    ], cpu_hours={"demo": 0.14, "small": 0.16}),
    Stage("AQ-5L", "alphaqubit", "aq_labels.py", _DECODER, [
        Task("AQ-5L", "the teacher's logits against hard labels alone, five seeds", ("ablation_labels.json",)),
    ], cpu_hours={"demo": 0.041, "small": 0.049}),
)  # fmt: skip

PLANS: Mapping[str, Sequence[Stage]] = {"dust3r": DUST3R, "alphaqubit": ALPHAQUBIT, "all": (*DUST3R, *ALPHAQUBIT)}


def stage_of(stages: Sequence[Stage], name: str) -> Stage:
    """The stage with this id, or that runs the task with this id; InputError for neither."""
    for stage in stages:
        if name == stage.id or any(name == task.id for task in stage.tasks):
            return stage
    raise InputError(f"unknown stage {name!r}: the plan has {', '.join(stage.id for stage in stages)}")


def select(
    stages: Sequence[Stage], only: Sequence[str] = (), start: str | None = None, skip: Sequence[str] = ()
) -> list[Stage]:
    """The stages to run, in the plan's order: `only` these, or those from `start` on, without `skip`.

    Stages or tasks are named; a task stands for its stage. InputError for names that the plan lacks, and when nothing
    is left.
    """
    wanted = {stage_of(stages, name).id for name in only}
    left_out = {stage_of(stages, name).id for name in skip}
    ids = [stage.id for stage in stages]
    first = ids.index(stage_of(stages, start).id) if start else 0
    chosen = [s for s in stages[first:] if (not wanted or s.id in wanted) and s.id not in left_out]
    if not chosen:
        raise InputError("--only, --from and --skip leave no stage; leave one of them out")
    return chosen
