"""A campaign's own run in MLflow: its manifest and its report, and the manifest's hash, by which `python -m analysis
verify` knows the folder that was handed over.
"""

import hashlib
import os
from typing import TYPE_CHECKING

from analysis.manifest import CAMPAIGN_ROLE, MANIFEST_TAG, NAME, REPORT
from sweeps.conduct import Plan
from sweeps.deliverables import Delivered
from sweeps.ledger import campaign_began
from sweeps.tracking import ENVIRONMENT, EXPERIMENT

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


def log(plan: Plan, found: Delivered) -> None:
    """Log what was delivered; a second call, after a resume, brings the same run up to date.

    Raises whatever MLflow and its artifact store raise.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient  # seconds, which only a campaign's end takes

    client = MlflowClient(plan.tracking_uri)
    run_id = _run(client, plan)
    manifest = found.folder / NAME
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
    client.log_artifact(run_id, str(manifest))
    # The files that were drawn alone: the folder may hold others, and links, of whoever may write there.
    for name in (file.file for file in found.manifest.files if file.file.startswith(f"{REPORT}/")):
        if not (found.folder / name).is_symlink():
            client.log_artifact(run_id, str(found.folder / name), REPORT)
    # The hash last: it says that what it is of has arrived.
    client.set_tag(run_id, MANIFEST_TAG, digest)
    client.set_terminated(run_id)


def _run(client: "MlflowClient", plan: Plan) -> str:
    """The campaign's run, made where it is not there yet. Others may have given theirs the same name: it is known by
    the time at which its journal began.
    """
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        raise ValueError(f"no experiment {EXPERIMENT} in it")
    began = campaign_began(plan.folder)
    tags = {"role": CAMPAIGN_ROLE, "campaign": plan.name, "profile": plan.profile, "began": began}
    query = " and ".join(f"tags.{key} = '{value}'" for key, value in tags.items())
    for run in client.search_runs([experiment.experiment_id], query, max_results=1):
        return str(run.info.run_id)
    return str(client.create_run(experiment.experiment_id, tags=tags, run_name=plan.name).info.run_id)
