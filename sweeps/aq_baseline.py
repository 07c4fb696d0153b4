"""AQ-1, baseline distillation: a student learns from the teacher's final logits and the true flips.

python sweeps/aq_baseline.py --profile demo                   # minutes on a laptop
python sweeps/aq_baseline.py                                  # the plan at CPU scale
python sweeps/aq_baseline.py --search optuna --samples 20     # search T, weights and signals
python sweeps/aq_baseline.py --set distance=5 --set teacher=FILE.pth
python sweeps/aq_baseline.py --resume                         # go on after an interruption
"""

from sweeps.launch import main
from sweeps.settings import DECODER, DECODER_SIZES, DECODER_WORKLOAD
from sweeps.spec import Gate, Sweep, Trial, constant, linear, loguniform, one_of, uniform
from trainables import evaluate
from trainables.distill import Distill

AQ = Sweep(
    stage="AQ1", domain="alphaqubit", trainable=Distill, measure=evaluate, gate=Gate("drop", at_most=0.03),
    settings=(DECODER_WORKLOAD, DECODER_SIZES, DECODER),
    trials=[Trial("AQ-1", combo="KD", keyparams="final", saves="aq_baseline.pth")],
    space=dict(
        T=uniform(1, 4), alpha=uniform(0, 1), beta=one_of(constant, linear), transformer=one_of(0.0, 0.003, 0.01),
        rnn=one_of(0.0, 0.003, 0.01), readout=one_of(0.0, 0.1, 0.3), lr=loguniform(2e-3, 2e-2),
    ),
    search_task="AQ-search", best="aq_baseline_best.pth", log="aq_baseline.json", sample_cpu_s=0.0003,
)  # fmt: skip

if __name__ == "__main__":
    main(AQ)
