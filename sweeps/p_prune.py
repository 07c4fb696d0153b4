"""P, structured pruning: the teacher with fewer heads and channels, fine-tuned; it may lose at most 3 %.

python sweeps/p_prune.py --profile demo                      # minutes on a laptop
python sweeps/p_prune.py                                     # the plan's two ratios at CPU scale
python sweeps/p_prune.py --search optuna --samples 20        # search ratios for 25 % fewer parameters within the 3 %
python sweeps/p_prune.py --set steps=3 --set ratios=sensitivity
python sweeps/p_prune.py --resume                            # go on after an interruption
python sweeps/p_prune.py --address auto --profile full       # a GPU cluster
"""

from sweeps.launch import main
from sweeps.settings import PRUNE, WORKLOAD
from sweeps.spec import Gate, Sweep, Trial, one_of, uniform
from trainables import evaluate
from trainables.prune import Prune

SMALLER = Gate("params_down", at_least=0.25)  # P-3's line; the plan's rho of .1 is not meant to reach it

P = Sweep(
    stage="P", domain="dust3r", trainable=Prune, measure=evaluate, gate=Gate("drop", at_most=0.03),
    settings=(WORKLOAD, PRUNE),
    trials=[
        Trial("P-1", rho=0.1, saves="pruned_r010.pth"),
        Trial("P-2", rho=0.3, saves="pruned_r030.pth", gates=[SMALLER]),
    ],
    space=dict(
        rho=uniform(0.1, 0.5), enc_heads=uniform(0, 1.5), enc_ffn=uniform(0, 1.5), dec_heads=uniform(0, 1.5),
        dec_ffn=uniform(0, 1.5), residual=one_of(0.0, 0.25, 0.5), ratios=one_of("uniform", "sensitivity"),
    ),
    search_task="P-3", search_gates=[SMALLER], log="prune_eval.json", sample_cpu_s=0.028,
)  # fmt: skip

if __name__ == "__main__":
    main(P)
