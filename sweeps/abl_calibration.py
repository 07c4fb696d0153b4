"""ABL-2, calibration: how much depends on calibrating with 128, 256 or 512 samples; paired over their seeds.

python sweeps/abl_calibration.py --profile demo   # minutes on a laptop
python sweeps/abl_calibration.py --seeds 5        # more seeds, narrower intervals
"""

from sweeps.launch import main
from sweeps.settings import QUANT, WORKLOAD
from sweeps.spec import Sweep, Trial
from trainables import evaluate
from trainables.quantize import Round

ABL = Sweep(
    stage="ABL2", domain="dust3r", trainable=Round, measure=evaluate, settings=(WORKLOAD, QUANT), seeds=3,
    latency=False,
    trials=[
        Trial("ABL-2", combo="calib512", keyparams="", calibration=512),
        Trial("ABL-2", combo="calib256", keyparams="", calibration=256),
        Trial("ABL-2", combo="calib128", keyparams="", calibration=128),
    ],
    reference="calib512", log="ablation_calib.json",
)  # fmt: skip

if __name__ == "__main__":
    main(ABL)
