"""AQ-Q, quantize a decoder: round it to INT8 (PTQ), train where that loses more than 1 % (QAT), build and time engines.

python sweeps/aq_quantize.py --profile demo                  # minutes on a laptop
python sweeps/aq_quantize.py                                 # the shipped teacher at CPU scale
python sweeps/aq_quantize.py --set model=aq_baseline.pth     # a student or a pruned decoder, compared with the teacher
python sweeps/aq_quantize.py --set teacher=aq_baseline.pth   # a student, compared with itself
python sweeps/aq_quantize.py --search optuna --samples 20    # search bits, calibration and SmoothQuant
python sweeps/aq_quantize.py --resume                        # go on after an interruption
"""

from sweeps.launch import main
from sweeps.settings import DECODER_QUANT, DECODER_WORKLOAD
from sweeps.spec import Gate, Sweep, Trial, one_of, uniform
from trainables import evaluate
from trainables.quantize import Quantize

AQ = Sweep(
    stage="AQQ", domain="alphaqubit", trainable=Quantize, measure=evaluate, gate=Gate("drop", at_most=0.01),
    settings=(DECODER_WORKLOAD, DECODER_QUANT),
    trials=[
        Trial("AQ-Q1", combo="PTQ", keyparams="keepLN", saves="aq_ptq_int8.onnx"),
        Trial("AQ-Q1", combo="PTQ", keyparams="percentile", method="percentile"),
        Trial("AQ-Q1", combo="PTQ", keyparams="dynamic", mode="dynamic"),
        Trial("AQ-Q2", combo="QAT", keyparams="W4", bits_w=4),  # the coarsest weights that a policy may ask for
    ],
    space=dict(
        bits_w=one_of(4, 5, 6, 8), calibration=one_of(128, 256, 512), method=one_of("minmax", "percentile", "entropy"),
        mode=one_of("static", "dynamic"), smooth=uniform(0, 0.9),
    ),
    search_task="AQ-Q-search", best=("aq_int8.pth", "aq_int8.onnx", "aq_int8.trt"), log="aq_quant_eval.json",
    sample_cpu_s=0.0004,
)  # fmt: skip

if __name__ == "__main__":
    main(AQ)
