"""AQ-P, structured pruning: a decoder with fewer heads and channels, fine-tuned; it may lose at most 3 %.

python sweeps/aq_prune.py --profile demo                     # minutes on a laptop
python sweeps/aq_prune.py                                    # the shipped teacher at CPU scale
python sweeps/aq_prune.py --set teacher=aq_baseline.pth      # another decoder, compared with itself
python sweeps/aq_prune.py --search optuna --samples 20       # search ratios for 25 % fewer parameters within the 3 %
python sweeps/aq_prune.py --resume                           # go on after an interruption
"""

from sweeps.launch import main
from sweeps.settings import DECODER_PRUNE, DECODER_WORKLOAD
from sweeps.spec import Gate, Sweep, Trial, uniform
from trainables import evaluate
from trainables.prune import Prune

SMALLER = Gate("params_down", at_least=0.25)

AQ = Sweep(
    stage="AQP", domain="alphaqubit", trainable=Prune, measure=evaluate, gate=Gate("drop", at_most=0.03),
    settings=(DECODER_WORKLOAD, DECODER_PRUNE),
    trials=[
        Trial("AQ-P1", rho=0.2, saves="aq_pruned_r020.pth"),
        Trial("AQ-P2", rho=0.4, saves="aq_pruned_r040.pth", gates=[SMALLER]),
    ],
    space=dict(rho=uniform(0.2, 0.6), heads=uniform(0, 1.4), hidden=uniform(0, 1.4), conv=uniform(0, 1.4)),
    search_task="AQ-P-search", search_gates=[SMALLER], best="aq_pruned_best.pth", log="aq_prune_eval.json",
    sample_cpu_s=0.0004,
)  # fmt: skip

if __name__ == "__main__":
    main(AQ)
