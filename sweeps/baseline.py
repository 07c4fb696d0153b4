"""P0: the workload (20 sampled pairs, K=4 pair graph, seed 42, its hash) and the teacher measured on it.

python sweeps/baseline.py                      # workload.yaml and files/teacher_eval.json
python sweeps/baseline.py --set teacher=PATH   # another teacher
python sweeps/baseline.py --dry-run
"""

from sweeps.launch import main
from sweeps.settings import DISTILL, WORKLOAD
from sweeps.spec import Sweep
from trainables import evaluate
from trainables.distill import Distill

P0 = Sweep(
    stage="P0", domain="dust3r", trainable=Distill, measure=evaluate, settings=(WORKLOAD, DISTILL),
    baseline="teacher_eval.json",
)  # fmt: skip

if __name__ == "__main__":
    main(P0)
