"""AQ-2, Stage 1: a student learns the teacher's intermediate representations; each signal can be switched off.

python sweeps/aq_stage1.py --profile demo                     # minutes on a laptop
python sweeps/aq_stage1.py                                    # the plan at CPU scale
python sweeps/aq_stage1.py --set readout=0                    # without the readout's response
python sweeps/aq_stage1.py --resume                           # go on after an interruption
"""

from sweeps.launch import main
from sweeps.settings import DECODER, DECODER_SIZES, DECODER_WORKLOAD
from sweeps.spec import Gate, Sweep, Trial, loguniform
from trainables import evaluate
from trainables.distill import Distill

AQ = Sweep(
    stage="AQ2", domain="alphaqubit", trainable=Distill, measure=evaluate, gate=Gate("drop", at_most=0.03),
    settings=(DECODER_WORKLOAD, DECODER_SIZES, DECODER),
    trials=[
        Trial("AQ-2", combo="stage1", keyparams="TRO", transformer=0.01, rnn=0.01, readout=0.3, saves="aq_stage1.pth"),
    ],
    space=dict(
        transformer=loguniform(0.001, 0.1), rnn=loguniform(0.001, 0.1), readout=loguniform(0.03, 1),
        lr=loguniform(2e-3, 2e-2),
    ),
    search_task="AQ-2-search", best="aq_stage1_best.pth", log="aq_stage1.json", sample_cpu_s=0.0004,
)  # fmt: skip

if __name__ == "__main__":
    main(AQ)
