"""AQ-3, fused logits: probes on the frozen teacher's states, fused with its readout; a module for Stage 2.

python sweeps/aq_fusion.py --profile demo                            # a minute
python sweeps/aq_fusion.py                                           # the plan at CPU scale
python sweeps/aq_fusion.py --set 'fusion_weights=[1, 1, 2]'          # fixed weights instead of the mean
"""

from sweeps.launch import main
from sweeps.settings import DECODER_FUSION, DECODER_WORKLOAD
from sweeps.spec import Sweep, Trial
from trainables.alphaqubit import probe_quality
from trainables.alphaqubit.fusion import Fuse

AQ = Sweep(
    stage="AQ3", domain="alphaqubit", trainable=Fuse, measure=probe_quality, latency=False,
    settings=(DECODER_WORKLOAD, DECODER_FUSION),
    trials=[Trial("AQ-3", combo="fusion", saves="aq_probes.pth")],
    log="aq_fusion.json", sample_cpu_s=0.0001,
)  # fmt: skip

if __name__ == "__main__":
    main(AQ)
