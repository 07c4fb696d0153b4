"""MLflow's own pages on a real sweep, in a real browser (skipped without one)."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import mlflow_pages as pages
import pytest
from browser import BROWSER, page

ROOT = Path(__file__).parents[2]
SMALL = {"epochs": 1, "samples_per_epoch": 64, "train_samples": 64, "val_pairs": 16, "test_pairs": 16, "repeats": 5}
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")]


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The plan's three students, trained and measured as briefly as can be; `mlflow ui` on them; a browser."""
    folder = tmp_path_factory.mktemp("ui")
    command = [sys.executable, "sweeps/k_grid.py", "--profile", "demo", "--storage", str(folder / "runs")]
    for key, value in SMALL.items():
        command += ["--set", f"{key}={value}"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=1800, stdout=subprocess.DEVNULL)
    store = folder / "runs" / "mlflow.db"
    parent, children = pages.ids(store, "k_grid_demo_seed42")
    with pages.served(store) as base, page(folder) as window:
        experiment = parent.info.experiment_id
        pages.settle(window, base, experiment)
        yield SimpleNamespace(page=window, base=base, experiment=experiment, parent=parent, children=children)


@pytest.fixture(autouse=True)
def no_error(at: SimpleNamespace) -> Iterator[None]:
    """Whatever is looked at, the console stays clean but for what MLflow says of itself: it has no login to ask."""
    yield
    assert not [error for error in at.page.errors if "/ajax-api/2.0/mlflow/users/current" not in error]


def test_trials_lie_under_their_sweep_with_drop_verdict_and_reason(at: SimpleNamespace) -> None:
    rows = pages.runs(at.page, at.base, at.experiment, len(at.children))
    assert "k_grid_demo_seed42" in rows[0] and len(rows) == 1 + len(at.children) == 5
    for run in at.children:
        (cells,) = [row for row in rows if run.info.run_name in row]
        numbers = [float(cell) for cell in cells if cell.replace(".", "").lstrip("-").isdigit()]
        assert {run.data.metrics[name] for name in pages.METRICS} <= set(numbers)
        assert {run.data.tags["verdict"], run.data.tags.get("stop_reason", "-")} <= set(cells)


def test_three_trials_compare_in_parallel_coordinates(at: SimpleNamespace) -> None:
    trials = [run.info.run_id for run in at.children if run.data.tags["role"] == "trial"]
    assert pages.compare(at.page, at.base, at.experiment, trials) == ["T", *pages.METRICS]
    text = at.page.ask("document.body.innerText")
    assert "Comparing 3 Runs from 1 Experiment" in text
    # T is a number: its axis has a scale from 3 to 5, not two words.
    ticks = at.page.ask("[...document.querySelectorAll('.parcoords .y-axis')[0].querySelectorAll('text')]"
                        ".map(e => parseFloat(e.textContent))")  # fmt: skip
    assert {3.0, 4.0, 5.0} <= set(ticks)


def test_the_pareto_page_works_in_mlflows_viewer(at: SimpleNamespace) -> None:
    title = pages.artifact(at.page, at.base, at.experiment, at.parent.info.run_id, "pareto.html")
    assert title == "Quality against latency: k_grid_demo_seed42"
    frame = "document.querySelector('iframe.mlflow-html-iframe').getAttribute('sandbox')"
    assert at.page.ask(frame) == "allow-scripts"
    (drawn,) = at.page.ask_frames("document.querySelectorAll('#pareto .points path').length")
    assert drawn == 4  # three students and their teacher
