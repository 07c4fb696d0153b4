"""AQ-5L, labels: what the teacher's final logits add to hard labels alone, at equal steps; paired over seeds and shots.

python sweeps/aq_labels.py --profile demo                 # two minutes on a laptop
python sweeps/aq_labels.py                                # five seeds of 81,920 shots per arm
python sweeps/aq_labels.py --set samples_per_epoch=409600 # ten times the steps: what is left of a short budget's gain
python sweeps/aq_labels.py --set primary=ler_exact        # the same error rate by exact posteriors, with less noise
"""

from sweeps.launch import main
from sweeps.settings import DECODER, DECODER_SIZES, DECODER_WORKLOAD
from sweeps.spec import Sweep, Trial
from trainables import evaluate
from trainables.distill import Distill

AQ = Sweep(
    stage="AQ5L", domain="alphaqubit", trainable=Distill, measure=evaluate, latency=False,
    settings=(DECODER_WORKLOAD, DECODER_SIZES, DECODER), seeds=5,
    changes={
        "demo": dict(epochs=4, train_samples=81920),
        "small": dict(epochs=2, samples_per_epoch=40960, train_samples=81920),
    },
    trials=[
        Trial("AQ-5L", combo="hard", keyparams="", alpha=1.0, beta=0),
        Trial("AQ-5L", combo="soft", keyparams=""),  # the settings as they are: .3 hard, .7 of the teacher's
    ],
    reference="hard", log="ablation_labels.json", sample_cpu_s=0.00025,
)  # fmt: skip

if __name__ == "__main__":
    main(AQ)
