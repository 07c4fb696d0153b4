"""Stores in MLflow's format, filled as the tracker fills them."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

sys.path.insert(0, str(Path(__file__).parent))  # test modules are imported by path: neighbours need this

from logged_sweep import Trials, copy_store, forty, log_sweep, three


@pytest.fixture(scope="session")
def empty_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store with MLflow's tables and no run."""
    folder = tmp_path_factory.mktemp("empty")
    uri = f"sqlite:///{folder}/mlflow.db"
    MlflowClient(tracking_uri=uri).create_experiment("slimsweep", artifact_location=str(folder / "artifacts"))
    return uri


@pytest.fixture(scope="session")
def uri(empty_uri: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store with two sweeps, not to be written to: `three` and `forty`."""
    filled = copy_store(empty_uri, tmp_path_factory.mktemp("filled"))
    log_sweep(filled, "three", three())
    log_sweep(filled, "forty", forty())
    return filled


@pytest.fixture
def fresh(empty_uri: str, tmp_path: Path) -> Callable[..., str]:
    """fresh("name", trials, **params) -> the URI of a new store with that sweep."""

    def make(name: str, trials: Trials, **params: str) -> str:
        copied = copy_store(empty_uri, tmp_path)
        log_sweep(copied, name, trials, **params)
        return copied

    return make
