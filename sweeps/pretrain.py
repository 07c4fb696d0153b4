"""P0, the small teacher: train it from scratch on procedural rooms; the result ships with the package.

python sweeps/pretrain.py                      # the shipped teacher: about 80 minutes of one core
python sweeps/pretrain.py --profile demo       # a minute, to see that it runs
python sweeps/pretrain.py --resume             # go on after an interruption
"""

from sweeps.launch import main
from sweeps.settings import PRETRAIN, WORKLOAD
from sweeps.spec import Sweep, Trial
from trainables.pretrain import Pretrain

P0 = Sweep(
    stage="P0", domain="dust3r", trainable=Pretrain, settings=(WORKLOAD, PRETRAIN),
    trials=[Trial("P0-0", combo="pretrain", saves="teacher_small.pth")],
    log="pretrain_log.json", sample_cpu_s=0.028,
)  # fmt: skip

if __name__ == "__main__":
    main(P0)
