"""AQ-KQ, joint: quantize the best decoder student, of AQ-1's baseline distillation, by the same policy.

python sweeps/aq_joint.py --profile demo          # after: python sweeps/aq_baseline.py --profile demo
python sweeps/aq_joint.py                         # after: python sweeps/aq_baseline.py
python sweeps/aq_joint.py --set model=FILE.pth    # another student: aq_stage2_best.pth of AQ-4, or a pruned one
"""

from sweeps.launch import main
from sweeps.settings import DECODER_QUANT, DECODER_WORKLOAD
from sweeps.spec import Gate, Sweep, Trial, one_of, uniform
from trainables import evaluate
from trainables.quantize import Quantize

# The student may have lost 3 % against the teacher before (AQ-1's gate); rounding it may cost it 1 % of its own.
ROUNDING = Gate("drop_to_student", at_most=0.01)

AQ = Sweep(
    stage="AQKQ", domain="alphaqubit", trainable=Quantize, measure=evaluate, gate=Gate("drop", at_most=0.03),
    settings=(DECODER_WORKLOAD, DECODER_QUANT), starts_from=("AQ1", "aq_baseline_best.pth"),
    trials=[Trial("AQ-KQ", combo="INT8", keyparams="", gates=[ROUNDING])],
    space=dict(bits_w=one_of(4, 5, 6, 8), calibration=one_of(128, 256, 512), smooth=uniform(0, 0.9)),
    search_task="AQ-KQ-search", best=("aq_student_int8.pth", "aq_student_int8.onnx", "aq_student_int8.trt"),
    log="aq_joint_eval.json", sample_cpu_s=0.0004,
)  # fmt: skip

if __name__ == "__main__":
    main(AQ)
