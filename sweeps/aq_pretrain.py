"""AQ-0, the teacher: train a decoder from scratch on simulated shots; the result ships with the package.

python sweeps/aq_pretrain.py                      # the shipped teacher: distance 3, about an hour of one core
python sweeps/aq_pretrain.py --profile demo       # a minute, to see that it runs
python sweeps/aq_pretrain.py --set distance=5     # another code
python sweeps/aq_pretrain.py --set size=sycamore  # another size of sweeps/settings/alphaqubit.yaml
python sweeps/aq_pretrain.py --resume             # go on after an interruption
"""

from sweeps.launch import main
from sweeps.settings import DECODER_PRETRAIN, DECODER_SIZES, DECODER_WORKLOAD
from sweeps.spec import Sweep, Trial
from trainables.pretrain import Pretrain

AQ = Sweep(
    stage="AQ0", domain="alphaqubit", trainable=Pretrain,
    settings=(DECODER_WORKLOAD, DECODER_SIZES, DECODER_PRETRAIN),
    changes={"demo": dict(size="teacher"), "small": dict(size="teacher"), "full": dict(size="scaling")},
    trials=[Trial("AQ-0", combo="pretrain", saves="teacher_decoder.pth")],
    log="aq_pretrain_log.json", sample_cpu_s=0.00025,
)  # fmt: skip

if __name__ == "__main__":
    main(AQ)
