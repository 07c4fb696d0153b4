"""best_of: the file that the newest finished sweep chose, from a real store, kept under the hash of its content."""

import pytest
from mlflow.tracking import MlflowClient

from engines.errors import InputError
from sweeps.lineage import best_of
from sweeps.tracking import EXPERIMENT

FILE = "student_fp32_best.pth"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    client = MlflowClient(uri)
    experiment = client.create_experiment(EXPERIMENT, (folder / "artifacts").as_uri())

    def sweep(content, start, *, status="FINISHED", profile="demo", stage="K", chosen=True):
        tags = {"role": "sweep", "stage": stage, "domain": "dust3r", "profile": profile, "chosen": "K-2"}
        parent = client.create_run(experiment, start_time=start, tags=tags, run_name=f"k_grid_{content}").info.run_id
        for name in ("K-1", "K-2"):
            child = client.create_run(
                experiment, start_time=start, run_name=name, tags={"mlflow.parentRunId": parent, "role": "trial"}
            ).info.run_id
            if name == "K-2" and chosen:
                (folder / FILE).write_text(content)
                client.log_artifact(child, str(folder / FILE))
            if name == "K-1" and content == "newest":  # which it chose before a resume
                (folder / FILE).write_text("of a trial that is not chosen any more")
                client.log_artifact(child, str(folder / FILE))
            client.set_terminated(child)
        client.set_terminated(parent, status)

    sweep("oldest", 1_000)
    sweep("newest", 3_000)
    sweep("older", 2_000)
    sweep("interrupted", 4_000, status="KILLED")
    sweep("small", 5_000, profile="small", chosen=False)
    sweep("quantized", 6_000, stage="Q")
    return uri


def test_the_newest_finished_sweep_of_that_stage_and_profile_gives_the_file_that_it_chose(store, tmp_path):
    path = best_of(store, "K", FILE, "dust3r", "demo", tmp_path / "models")
    assert path.read_text() == "newest" and path.suffix == ".pth"
    again = best_of(store, "K", FILE, "dust3r", "demo", tmp_path / "models")
    assert again == path and [p.name for p in path.parent.iterdir()] == [path.name]


def test_what_is_missing_is_said_with_the_command_that_makes_it(store, tmp_path):
    with pytest.raises(InputError, match=r"no finished sweep of stage K, profile full.*k_grid.py --profile full"):
        best_of(store, "K", FILE, "dust3r", "full", tmp_path)
    with pytest.raises(InputError, match=f"k_grid_small left no {FILE}"):
        best_of(store, "K", FILE, "dust3r", "small", tmp_path)
    with pytest.raises(InputError, match="no finished sweep"):
        best_of(f"sqlite:///{tmp_path / 'new.db'}", "K", FILE, "dust3r", "demo", tmp_path)
    with pytest.raises(InputError, match="no finished sweep of stage AQ2, profile demo.*aq_stage1.py --profile demo"):
        best_of(f"sqlite:///{tmp_path / 'new.db'}", "AQ2", "aq_stage1_best.pth", "alphaqubit", "demo", tmp_path)
    assert list(tmp_path.iterdir()) == []
