"""P1, K-only: distil a lighter student over temperature and beta schedule; a student may lose at most 1 %.

python sweeps/k_grid.py --profile demo                       # minutes on a laptop
python sweeps/k_grid.py                                      # the plan's 30 epochs at CPU scale
python sweeps/k_grid.py --search optuna --samples 20         # search beyond the plan's three trials
python sweeps/k_grid.py --set epochs=5 --set lr=3e-4         # change settings for one run
python sweeps/k_grid.py --resume                             # go on after an interruption
python sweeps/k_grid.py --address auto --profile full --set teacher=FILE.pth    # a GPU cluster
"""

from sweeps.launch import main
from sweeps.settings import DISTILL, WORKLOAD
from sweeps.spec import Gate, Sweep, Trial, constant, linear, loguniform, one_of, step, uniform
from trainables import evaluate
from trainables.distill import Distill

EVEN = Gate("late_rise", at_most=2)  # half widths of the interval: no late validation is worse than the best by more

K = Sweep(
    stage="K", domain="dust3r", trainable=Distill, measure=evaluate, gate=Gate("drop", at_most=0.01),
    settings=(WORKLOAD, DISTILL),
    trials=[
        Trial("K-1", T=3, beta=constant(0.5), gamma=0, saves="student_fp32_t3b05.pth"),
        Trial("K-2", T=5, beta=constant(0.5), gamma=0, saves="student_fp32_t5b05.pth"),
        Trial("K-3", T=3, beta=step(0.5, 0.7, at=0.7), gamma=0, saves="student_fp32_sched.pth", gates=[EVEN]),
    ],
    space=dict(
        T=uniform(1, 10), beta=one_of(constant, step, linear), gamma=uniform(0, 0.3),
        lr=loguniform(1e-5, 1e-2), depth=uniform(0.4, 0.9), dec_depth=uniform(0.6, 1), heads=uniform(0.5, 0.9),
        ffn=uniform(0.5, 0.9),
    ),
    search_task="K-search", best="student_fp32_best.pth", log="distill_log.json", sample_cpu_s=0.018,
)  # fmt: skip

if __name__ == "__main__":
    main(K)
