"""MLflow's own pages on a sweep, in a browser: its runs, a comparison, an artifact, each with a picture.

python tests/analysis/mlflow_pages.py runs/mlflow.db k_grid_demo_seed42 docs       # the pictures of the README
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from browser import WAIT_S, Page, page
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

METRICS = ("drop", "p50_ratio_same_runtime")
COLUMNS = (*(f"metrics.`{name}`" for name in METRICS), "params.`T`", "tags.`verdict`", "tags.`stop_reason`")
WIDTH, MENU = 1280, 198  # CSS pixels; of the window, and of MLflow's menu at its left


@contextmanager
def served(store: Path) -> Iterator[str]:
    """`mlflow ui` on a sqlite file, as a user starts it; gives its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", f"sqlite:///{store.resolve()}"]
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        process = subprocess.Popen([*command, "--port", str(port), "--workers", "1"], cwd=folder, stdout=nowhere,
                                   stderr=nowhere, env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"},
                                   start_new_session=True)  # fmt: skip
        try:
            end = time.monotonic() + WAIT_S
            while not _answers(f"http://127.0.0.1:{port}/health"):
                assert process.poll() is None and time.monotonic() < end, "mlflow ui does not start"
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/"
        finally:
            process.terminate()
            process.wait()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def settle(at: Page, base: str, experiment: str) -> None:
    """The window, the assistant out of the way, and the columns that a sweep is read by, as MLflow remembers them."""
    at.size(WIDTH, 620)
    at.open(base)
    at.click("document.querySelector('[data-component-id=\"mlflow.assistant.chat_panel.close\"]')")
    key = f'MLflowLocalStorage-1.1-ExperimentPage-["{experiment}"]-ReactComponentState'
    at.ask(f"localStorage.setItem({json.dumps(key)}, {json.dumps(json.dumps({'selectedColumns': COLUMNS}))})")


def runs(at: Page, base: str, experiment: str, children: int) -> list[list[str]]:
    """The experiment's page with the newest parent unfolded; the cells of each row."""
    at.open(f"{base}#/experiments/{experiment}/runs?workflowType=machine_learning")
    at.click("document.querySelector('.ag-row [data-component-id*=runnamecellrenderer]')")
    at.until(f"document.querySelectorAll('.ag-pinned-left-cols-container .ag-row').length == {children + 1}")
    at.click("document.querySelector('h2')")  # away from the row, which would be shown as chosen
    cells = "[...document.querySelectorAll('.ag-row')].map(e => [e.getAttribute('row-index'), e.innerText])"
    found: dict[int, list[str]] = {}
    for index, text in at.ask(cells):  # a row stands in several parts, as its first columns stay when it is scrolled
        found.setdefault(int(index), []).extend(text.split("\n"))
    return [found[index] for index in sorted(found)]


def compare(at: Page, base: str, experiment: str, run_ids: Sequence[str]) -> list[str]:
    """The comparison of runs, its parallel coordinates over T and METRICS; the names of its axes."""
    asked = urllib.parse.urlencode({"runs": json.dumps(list(run_ids)), "experiments": json.dumps([experiment])})
    at.open(f"{base}#/compare-runs?{asked}")
    at.until("document.querySelector('h2')?.innerText.startsWith('Comparing')")
    for number, wanted in (1, ("T",)), (2, METRICS):
        box = f"document.querySelectorAll('.du-bois-light-select')[{number - 1}]"
        chosen = f"[...{box}.querySelectorAll('.du-bois-light-select-selection-item-content')].map(e => e.innerText)"
        at.until(f"!!{box}")
        for name in [name for name in at.ask(chosen) if name not in wanted]:
            item = f"[...{box}.querySelectorAll('.du-bois-light-select-selection-item')]"
            at.click(f"{item}.find(e => e.innerText == '{name}').querySelector('.anticon')")
            at.until(f"!{chosen}.includes('{name}')")
        for name in wanted:
            if name not in at.ask(chosen):
                at.click(f"{box}.querySelector('.du-bois-light-select-selector')")
                at.type(name)
                options = "[...document.querySelectorAll('.du-bois-light-select-item-option')]"
                at.click(f"{options}.find(e => e.title == '{name}')")
                at.until(f"{chosen}.includes('{name}')")
        at.click("document.querySelector('h2')")
    at.until(f"document.querySelectorAll('.parcoords .axis-title').length == {1 + len(METRICS)}")
    return list(at.ask("[...document.querySelectorAll('.parcoords .axis-title')].map(e => e.textContent)"))


def artifact(at: Page, base: str, experiment: str, run_id: str, name: str) -> str:
    """The Pareto page of a run in MLflow's viewer, all of it there; its title, as its own frame says it."""
    at.open(f"{base}#/experiments/{experiment}/runs/{run_id}/artifacts/{name}")
    at.until("!!document.querySelector('iframe.mlflow-html-iframe')")
    end = time.monotonic() + WAIT_S
    ready = "document.getElementById('name')?.textContent ? document.title : ''"  # the last that its script fills
    while not (titles := [title for title in at.ask_frames(ready) if title]):
        assert time.monotonic() < end, f"{name} does not appear"
        time.sleep(0.2)
    return str(titles[0])


def pictures(store: Path, sweep: str, folder: Path) -> None:
    """mlflow_runs.png, mlflow_compare.png and mlflow_artifact.png of a sweep, without what tells of the machine."""
    parent, children = ids(store, sweep)
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as profile, served(store) as base, page(Path(profile)) as at:
        experiment = parent.info.experiment_id
        settle(at, base, experiment)
        runs(at, base, experiment, len(children))
        _picture(at, folder / "mlflow_runs.png", 420)
        compare(at, base, experiment, [run.info.run_id for run in children if run.data.tags["role"] == "trial"][:3])
        _picture(at, folder / "mlflow_compare.png", 600)
        at.size(1500, 960)
        artifact(at, base, experiment, parent.info.run_id, "pareto.html")
        # Where the store keeps the file is this machine's affair.
        place = "[...document.querySelectorAll('main *')].find(e => !e.children.length && /file:/.test(e.innerText))"
        at.ask(f"{place}.parentElement.style.visibility = 'hidden'")
        _picture(at, folder / "mlflow_artifact.png", 872, 1500)


def _picture(at: Page, path: Path, height: int, width: int = WIDTH) -> None:
    time.sleep(3)  # until nothing moves any more
    at.picture(path, MENU, 0, width - MENU, height)


def ids(store: Path, sweep: str) -> tuple[Run, list[Run]]:
    """A sweep's own run, and those of its trials and its teacher."""
    client = MlflowClient(f"sqlite:///{store.resolve()}")
    found = client.search_runs([client.get_experiment_by_name("slimsweep").experiment_id])
    parent = next(run for run in found if run.info.run_name == sweep)
    return parent, [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]


if __name__ == "__main__":
    pictures(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
