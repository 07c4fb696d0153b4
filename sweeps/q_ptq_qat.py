"""Q, quantize: round the teacher to INT8 (PTQ), train where that loses more than 1 % (QAT), build and time engines.

python sweeps/q_ptq_qat.py --profile demo                    # minutes on a laptop
python sweeps/q_ptq_qat.py                                   # the plan at CPU scale
python sweeps/q_ptq_qat.py --search optuna --samples 20      # search bits, calibration and SmoothQuant
python sweeps/q_ptq_qat.py --set model=student.pth           # quantize a model of your own
python sweeps/q_ptq_qat.py --resume                          # go on after an interruption
"""

from sweeps.launch import main
from sweeps.settings import QUANT, WORKLOAD
from sweeps.spec import Gate, Sweep, Trial, one_of, uniform
from trainables import evaluate
from trainables.quantize import Quantize

HALF = Gate("p50_ratio_fp32", at_least=2)  # p50 of the FP32 model in torch over that of the INT8 engine

Q = Sweep(
    stage="Q", domain="dust3r", trainable=Quantize, measure=evaluate, gate=Gate("drop", at_most=0.01),
    settings=(WORKLOAD, QUANT),
    trials=[
        Trial("Q-1", combo="PTQ", keyparams="keepLN", saves="ptq_int8.onnx", gates=[HALF]),
        Trial("Q-1", combo="PTQ", keyparams="calib128", calibration=128, gates=[HALF]),
        Trial("Q-1", combo="PTQ", keyparams="percentile", method="percentile", gates=[HALF]),
        Trial("Q-1", combo="PTQ", keyparams="entropy", method="entropy", gates=[HALF]),
        Trial("Q-1", combo="PTQ", keyparams="smooth05", smooth=0.5, gates=[HALF]),
        Trial("Q-2", combo="QAT", keyparams="W4", bits_w=4, gates=[HALF]),  # rounds too coarsely for PTQ
    ],
    space=dict(
        bits_w=one_of(4, 5, 6, 8), calibration=one_of(128, 256, 512), method=one_of("minmax", "percentile", "entropy"),
        mode=one_of("static", "dynamic"), smooth=uniform(0, 0.9),
    ),
    search_task="Q-search", best=("quant_ckpt.pth", "quantized_model.onnx", "quantized_model.trt"),
    log="quant_eval.json",
)  # fmt: skip

if __name__ == "__main__":
    main(Q)
