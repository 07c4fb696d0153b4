"""K->Q, joint: quantize the best student of the K sweep by the Q sweep's policy; build and measure its engines.

python sweeps/kq_joint.py --profile demo          # after: python sweeps/k_grid.py --profile demo
python sweeps/kq_joint.py                         # after: python sweeps/k_grid.py
python sweeps/kq_joint.py --set model=FILE.pth    # a student of your own instead of the K sweep's in MLflow
"""

from sweeps.launch import main
from sweeps.settings import QUANT, WORKLOAD
from sweeps.spec import Gate, Sweep, Trial, one_of, uniform
from trainables import evaluate
from trainables.quantize import Quantize

HALF = Gate("p50_ratio_fp32", at_least=2)  # p50 of the FP32 student in torch over that of the INT8 engine

KQ = Sweep(
    stage="KQ", domain="dust3r", trainable=Quantize, measure=evaluate, gate=Gate("drop", at_most=0.01),
    settings=(WORKLOAD, QUANT), starts_from=("K", "student_fp32_best.pth"),
    trials=[Trial("KQ-1", combo="INT8", keyparams="", gates=[HALF])],
    space=dict(bits_w=one_of(4, 5, 6, 8), calibration=one_of(128, 256, 512), smooth=uniform(0, 0.9)),
    search_task="KQ-search", best=("student_int8.pth", "student_int8.onnx", "student_int8.trt"),
    log="kq_eval.json",
)  # fmt: skip

if __name__ == "__main__":
    main(KQ)
