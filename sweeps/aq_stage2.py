"""AQ-4, Stage 2: the student of Stage 1 goes on with the fused logits as its target, feature terms decaying to 0.

python sweeps/aq_stage2.py --profile demo --set fusion=runs/aq_fusion_demo_seed42/files/aq_probes.pth
python sweeps/aq_stage2.py --set fusion=runs/aq_fusion_small_seed42/files/aq_probes.pth
python sweeps/aq_stage2.py --set fusion=PROBES --set model=STAGE1.pth    # a Stage 1 student of your own
"""

from sweeps.launch import main
from sweeps.settings import DECODER, DECODER_SIZES, DECODER_WORKLOAD
from sweeps.spec import Gate, Sweep, Trial, linear, loguniform, one_of, uniform
from trainables import evaluate
from trainables.distill import Distill

AQ = Sweep(
    stage="AQ4", domain="alphaqubit", trainable=Distill, measure=evaluate, gate=Gate("drop", at_most=0.03),
    settings=(DECODER_WORKLOAD, DECODER_SIZES, DECODER), starts_from=("AQ2", "aq_stage1_best.pth"),
    changes={"small": dict(epochs=6)},
    trials=[
        Trial("AQ-4", combo="stage2", keyparams="fused", beta=0, fused=0.7, saves="aq_stage2.pth"),
        Trial("AQ-4", combo="stage2", keyparams="decayed", beta=0, fused=0.7, transformer=linear(0.01, 0),
              rnn=linear(0.01, 0)),
    ],
    space=dict(
        T=uniform(1, 4), beta=one_of(0.0, 0.3), fused=uniform(0.2, 1), transformer=one_of(0.0, linear(0.01, 0)),
        rnn=one_of(0.0, linear(0.01, 0)), readout=one_of(0.0, 0.3), lr=loguniform(1e-3, 1e-2),
    ),
    search_task="AQ-4-search", best="aq_stage2_best.pth", log="aq_stage2.json", sample_cpu_s=0.0003,
)  # fmt: skip

if __name__ == "__main__":
    main(AQ)
