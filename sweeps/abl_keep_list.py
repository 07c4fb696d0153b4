"""ABL-1, the keep-list: what it costs to round LayerNorm, Softmax, or both; paired over calibration seeds.

python sweeps/abl_keep_list.py --profile demo     # minutes on a laptop
python sweeps/abl_keep_list.py --seeds 5          # more seeds, narrower intervals
"""

from sweeps.launch import main
from sweeps.settings import QUANT, WORKLOAD
from sweeps.spec import Sweep, Trial
from trainables import evaluate
from trainables.quantize import Round

ABL = Sweep(
    stage="ABL1", domain="dust3r", trainable=Round, measure=evaluate, settings=(WORKLOAD, QUANT), seeds=3,
    trials=[
        Trial("ABL-1", combo="keepBoth", keyparams="", keep=["layernorm", "softmax", "attention", "conv"]),
        Trial("ABL-1", combo="LayerNormOut", keyparams="", keep=["softmax", "attention", "conv"]),
        Trial("ABL-1", combo="SoftmaxOut", keyparams="", keep=["layernorm", "attention", "conv"]),
        Trial("ABL-1", combo="bothOut", keyparams="", keep=["attention", "conv"]),
    ],
    reference="keepBoth", log="ablation_keep.json",
)  # fmt: skip

if __name__ == "__main__":
    main(ABL)
