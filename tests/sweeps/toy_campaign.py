"""A campaign of toy stages: `python toy_campaign.py SCRIPTS FLAGS`."""

import sys
from pathlib import Path

import toy_stage

from sweeps.campaign import main

if __name__ == "__main__":
    main(sys.argv[2:], {"toy": toy_stage.plan(Path(sys.argv[1]))})
