"""AQ-2, Stage 1: a student learns the teacher's intermediate representations; each signal can be switched off.

python sweeps/aq_stage1.py --profile demo                     # minutes on a laptop
python sweeps/aq_stage1.py                                    # the plan at CPU scale
python sweeps/aq_stage1.py --set readout=0                    # without the readout's response
python sweeps/aq_stage1.py --resume                           # go on after an interruption
"""

from sweeps.launch import main
from sweeps.settings import DECODER, DECODER_SIZES, DECODER_WORKLOAD, PROFILES
from sweeps.spec import Gate, Sweep, Trial, loguniform, one_of, uniform
from trainables import evaluate
from trainables.distill import Distill

AQ = Sweep(
    stage="AQ2", domain="alphaqubit", trainable=Distill, measure=evaluate, gate=Gate("drop", at_most=0.03),
    settings=(DECODER_WORKLOAD, DECODER_SIZES, DECODER),
    changes=dict.fromkeys(PROFILES, dict(transformer=0.01, rnn=0.01, readout=0.3)),
    trials=[Trial("AQ-2", combo="stage1", saves="aq_stage1.pth")],
    space=dict(
        T=uniform(1, 4), transformer=one_of(0.0, 0.003, 0.01, 0.03), rnn=one_of(0.0, 0.003, 0.01, 0.03),
        readout=one_of(0.0, 0.1, 0.3, 1.0), lr=loguniform(2e-3, 2e-2),
    ),
    search_task="AQ-2-search", best="aq_stage1_best.pth", log="aq_stage1.json", sample_cpu_s=0.0004,
)  # fmt: skip

if __name__ == "__main__":
    main(AQ)
