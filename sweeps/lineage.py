"""Which file a later stage starts from: what the newest finished sweep of an earlier stage chose, by MLflow."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from engines.errors import InputError
from sweeps.tracking import EXPERIMENT, check_reachable, sqlite_path

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

SCRIPTS = {"K": "k_grid.py", "AQ1": "aq_baseline.py", "AQ2": "aq_stage1.py"}  # stages that others start from


def best_of(uri: str, stage: str, file: str, domain: str, profile: str, folder: Path) -> Path:
    """Download `file` of the trial that the newest finished sweep of `stage` chose; the path below `folder`.

    Only sweeps of the same domain and profile count. The file is kept under the hash of its content, so that a path
    stands for one content for ever.

    Raises:
        InputError: no store answers, no such sweep, or it left no such file.
    """
    check_reachable(uri)
    script = f" (python sweeps/{SCRIPTS[stage]} --profile {profile})" if stage in SCRIPTS else ""
    missing = InputError(
        f"{uri}: no finished sweep of stage {stage}, profile {profile}, is in there to take {file} from; run "
        f"that sweep first{script}, or give a file with --set model=PATH"
    )
    path = sqlite_path(uri)
    if path and not path.exists():
        raise missing  # opening it would create it
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        raise missing
    wanted = f"tags.role = 'sweep' and tags.stage = '{stage}' and tags.domain = '{domain}'"
    query = f"{wanted} and tags.profile = '{profile}' and attributes.status = 'FINISHED'"
    found = client.search_runs([experiment.experiment_id], query, order_by=["attributes.start_time DESC"])
    if not found:
        raise missing
    run = _holder(client, experiment.experiment_id, found[0], file)
    if run is None:
        raise InputError(f"sweep {found[0].info.run_name} left no {file}; run it again, or give --set model=PATH")
    folder.mkdir(parents=True, exist_ok=True)
    local = Path(client.download_artifacts(run.info.run_id, file, str(folder)))
    with local.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    kept = folder / f"{local.stem}_{digest}{local.suffix}"
    os.replace(local, kept)
    return kept


def _holder(client: MlflowClient, experiment: str, sweep: Run, file: str) -> Run | None:
    """The trial of the sweep whose artifacts hold the file: the one that was chosen, where a resume chose anew."""
    query = f"tags.`mlflow.parentRunId` = '{sweep.info.run_id}'"
    runs = client.search_runs([experiment], query, max_results=1000)
    for run in sorted(runs, key=lambda run: run.info.run_name != sweep.data.tags.get("chosen")):
        if any(artifact.path == file for artifact in client.list_artifacts(run.info.run_id)):
            return run
    return None
