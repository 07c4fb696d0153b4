"""ABL-3, the loss: what the feature term (gamma .1) adds to the KL term; paired over seeds.

python sweeps/abl_loss.py --profile demo          # minutes on a laptop
python sweeps/abl_loss.py --set epochs=30         # as long as K trains; by default 2 epochs for every arm
"""

from sweeps.launch import main
from sweeps.settings import DISTILL, WORKLOAD
from sweeps.spec import Sweep, Trial
from trainables import evaluate
from trainables.distill import Distill

ABL = Sweep(
    stage="ABL3", domain="dust3r", trainable=Distill, measure=evaluate, settings=(WORKLOAD, DISTILL), seeds=3,
    latency=False, changes={"demo": dict(epochs=3), "small": dict(epochs=2)},
    trials=[
        Trial("ABL-3", combo="KL", keyparams="", gamma=0),
        Trial("ABL-3", combo="KLfeature", keyparams="", gamma=0.1),
    ],
    reference="KL", log="ablation_loss.json",
)  # fmt: skip

if __name__ == "__main__":
    main(ABL)
