"""AQ-5, ablations: which signals help, whether fused logits do, and what stages add; paired over seeds and shots.

python sweeps/aq_ablation.py --profile demo               # about ten minutes on two cores
python sweeps/aq_ablation.py --seeds 5                    # more seeds, narrower intervals; small takes 1 GB per seed
python sweeps/aq_ablation.py --set fusion=PROBES.pth      # probes of python sweeps/aq_fusion.py, not trained here
python sweeps/aq_ablation.py --set primary=ler_exact      # the same error rate by exact posteriors, with less noise

All arms of a seed start from the same weights and train for as many steps on the same shots in the same order. A stage
is a share of a run: signals are on from the start to half of it (Stage 1), or from there on (Stage 2).
"""

from functools import partial

from sweeps.launch import main
from sweeps.settings import DECODER, DECODER_SIZES, DECODER_WORKLOAD
from sweeps.spec import Comparison, Sweep, Trial, each, interaction, main_effect, step
from trainables import evaluate
from trainables.distill import Distill

first = partial(step, second=0, at=0.5)  # a weight in Stage 1 alone

AQ = Sweep(
    stage="AQ5", domain="alphaqubit", trainable=Distill, measure=evaluate, latency=False,
    settings=(DECODER_WORKLOAD, DECODER_SIZES, DECODER), seeds=3,
    changes={
        "demo": dict(fusion="cached", epochs=4, train_samples=81920),
        "small": dict(fusion="cached", epochs=2, samples_per_epoch=40960, train_samples=81920),
        "full": dict(fusion="cached", epochs=20, train_samples=1024000),
    },
    trials=[
        Trial("AQ-5", combo="none", keyparams="", alpha=1.0, beta=0),
        Trial("AQ-5", combo="final", keyparams=""),  # the baseline of AQ-1: settings as they are
        Trial("AQ-5", combo="transformer", keyparams="", transformer=0.01),
        Trial("AQ-5", combo="rnn", keyparams="", rnn=0.01),
        Trial("AQ-5", combo="readout", keyparams="", readout=0.3),
        Trial("AQ-5", combo="transformer-rnn", keyparams="", transformer=0.01, rnn=0.01),
        Trial("AQ-5", combo="all", keyparams="", transformer=0.01, rnn=0.01, readout=0.3),  # Stage 1 alone
        Trial("AQ-5", combo="fused", keyparams="", beta=0, fused=0.7),
        Trial("AQ-5", combo="stage1-final", keyparams="", transformer=first(0.01), rnn=first(0.01), readout=first(0.3)),
        Trial("AQ-5", combo="stage1-fused", keyparams="", transformer=first(0.01), rnn=first(0.01), readout=first(0.3),
              beta=first(0.7), fused=step(0, 0.7, at=0.5)),
    ],
    comparisons=[
        Comparison("ablation_signals.json", "What each signal adds to hard labels and final logits", [
            *each(["none", "transformer", "rnn", "readout", "transformer-rnn", "all"], "final"),
            main_effect("transformer", ("transformer", "final"), ("transformer-rnn", "rnn")),
            main_effect("rnn", ("rnn", "final"), ("transformer-rnn", "transformer")),
            main_effect("readout", ("readout", "final"), ("all", "transformer-rnn")),
            interaction("transformer x rnn", both="transformer-rnn", one="transformer", other="rnn", neither="final"),
            interaction("readout x (transformer and rnn)", both="all", one="readout", other="transformer-rnn",
                        neither="final"),
        ]),
        Comparison("ablation_stages.json", "What fused logits and a first stage change, at equal steps", [
            *each(["fused", "stage1-final", "stage1-fused"], "final"),
            *each(["stage1-fused"], "fused"),  # fused alone against Stage 1 -> fused
            *each(["stage1-fused"], "all"),  # Stage 1 alone against Stage 1 -> 2
            main_effect("fused target", ("fused", "final"), ("stage1-fused", "stage1-final")),
            main_effect("Stage 1 first", ("stage1-final", "final"), ("stage1-fused", "fused")),
            interaction("fused target x Stage 1", both="stage1-fused", one="fused", other="stage1-final",
                        neither="final"),
        ]),
    ],
    log="aq_ablation.json", sample_cpu_s=0.00025,
)  # fmt: skip

if __name__ == "__main__":
    main(AQ)
