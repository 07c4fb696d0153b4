"""The report: one page and Markdown of everything that a store knows of some sweeps."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from logged_sweep import log_sweep, record, three
from mlflow.tracking import MlflowClient

from analysis.__main__ import main
from analysis.blocks import Heading, Items, Table, Text, to_html, to_markdown

Fresh = Callable[..., str]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CAMPAIGN = "night"
LEDGER = {"gpu_hours": 1.25, "stages": {"K": {"spent": 1.0, "saved": 0.5}}, "stops": [{"reason": "asha", "hours": 0.5}]}


def deliver(folder: Path, ledger: object) -> str:
    """Deliverables of a plan of three tasks: one passed, one never ran, one was left out."""
    k = dict(stage="K", files=[], missing=[], lines=[], judged=[], selected=True, finished=True)
    tasks = [
        k | dict(task="K-1", title="T=3, beta .5", verdict="pass", detail="drop 0.80 %, needed <= 1 %"),
        k | dict(task="KQ-1", stage="KQ", title="in <INT8>", verdict="fail", detail="not started", finished=False),
        k | dict(task="Q-1", stage="Q", title="an earlier start", verdict="pass", detail="met", selected=False),
        k | dict(task="P-1", stage="P", title="rho .1", verdict="n/a", detail="", finished=False, selected=False),
    ]
    head = dict(format=1, campaign=CAMPAIGN, plan="dust3r", profile="small", seed=42, git_commit=None, written="now")
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(head | dict(tasks=tasks, files=[])))
    (folder / "ledger.json").write_text(json.dumps(ledger))
    return str(folder)


@pytest.fixture(scope="module")
def folder(empty_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a campaign's two sweeps of different workloads, with its deliverables."""
    from logged_sweep import copy_store

    place = tmp_path_factory.mktemp("report")
    uri = copy_store(empty_uri, place)
    other = record("Q_PTQ_run1", workload_hash="ffff00001111", notes="</p><script>alert(1)</script>")
    for name, trials in (("k", three()), ("q", [(other, [])])):
        MlflowClient(tracking_uri=uri).set_tag(log_sweep(uri, name, trials), "campaign", CAMPAIGN)
    deliver(place / CAMPAIGN / "deliverables", LEDGER)  # where a campaign puts them, beside the store
    out = str(place / "out")
    given = ["--tracking-uri", uri, "--campaign", CAMPAIGN, "--out", out]
    assert main(["report", *given]) == 0
    return place / "out"


def test_the_page_says_everything_and_fetches_nothing(folder: Path) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8").replace("<wbr>", "")
    heads = re.findall(r"<h2[^>]*>(.*?)</h2>", text)
    planes = [f"Quality against latency: dust3r, workload {name}" for name in ("3fa9c02b77e1", "ffff00001111")]
    assert heads == ["Tasks of the plan", "Verdicts", *planes, "Learning curves", "Ledger", "Environment"]
    assert "<script" not in text and "default-src 'none'" in text
    assert not re.findall(r"""(?:src|srcset|href)="(?!data:image/png|#)""", text)
    assert text.count("✓ pass") >= 2 and "✗ fail" in text and "stop_loss" in text and "6da7cc3" not in heads
    for word in ("onnxruntime", "cpu (2 threads)", "mlflow 3.", "1.250", "asha", "Front over time"):
        assert word in text


def test_markdown_has_the_same_and_names_its_pictures(folder: Path) -> None:
    text = (folder / "report.md").read_text(encoding="utf-8")
    named = re.findall(r"!\[[^]]*\]\((.*?)\)", text)
    assert len(named) == 3 and all((folder / name).is_file() for name in named)
    (line,) = [
        line for line in text.splitlines() if line.startswith("| K_T3B05_run1") and "+0.80 [+0.20, +1.40]" in line
    ]
    assert "| pass |" in line
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_text_cannot_leave_its_place() -> None:
    bad = "</td><script>alert(1)</script>|x"
    blocks = [
        Heading(bad),
        Text(bad),
        Items([bad]),
        Table(("name",), [(bad,)], frozenset({"name"})),
        Table((), [(bad, bad)]),
    ]
    assert "<script" not in to_html(bad, blocks)
    assert "<script" not in to_markdown(bad, blocks) and "\\|x |" in to_markdown(bad, blocks)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 390])
def test_no_width_makes_the_page_scroll_sideways(folder: Path, tmp_path: Path, width: int) -> None:
    """Wide tables scroll on their own; the page is laid out in a frame, as windows have a least width."""
    text = (folder / "report.html").read_text(encoding="utf-8")
    inner = tmp_path / "inner.html"
    inner.write_text(text.replace("style-src", "script-src 'unsafe-inline'; style-src").replace("</body>",
        "<script>onload = () => parent.postMessage((document.documentElement.scrollWidth <= innerWidth) + ', ' + "
        "[...document.images].map((one) => one.naturalWidth > 0) + ' ' + performance.getEntriesByType('resource')"
        ".filter((one) => !one.name.startsWith('data:')).length, '*')</script></body>"), encoding="utf-8")  # fmt: skip
    outer = tmp_path / "outer.html"
    outer.write_text(
        "<p id='said'>nothing</p><script>addEventListener('message', (e) => "
        "{document.getElementById('said').textContent = e.data});</script>"
        f"<iframe width='{width}' height='800' style='border:0' src='inner.html'></iframe>"
    )
    done = subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--enable-logging=stderr", "--virtual-time-budget=6000", "--window-size=1400,900", "--dump-dom",
         f"--user-data-dir={tmp_path / 'profile'}", outer.as_uri()],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    assert "true, true,true,true 0" in done.stdout


def test_what_the_plan_wanted_and_never_ran_is_said(folder: Path) -> None:
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "| K-1 | T=3, beta .5 | pass | drop 0.80 %, needed &lt;= 1 % |" in text
    assert "| not run | not started |" in text and "| P-1 |" not in text
    assert (
        "unfinished: 1 of 3 tasks, KQ-1" in text
        and "| Q-1 | an earlier start | pass |" in text
        and "left out by choice: P-1" in text
    )
    assert "in <INT8>" not in (folder / "report.html").read_text(encoding="utf-8")


def test_a_sweep_that_still_runs_is_said_to(fresh: Fresh, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = fresh("k", three())
    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs(["1"], "tags.role = 'sweep'")
    client.update_run(run.info.run_id, status="RUNNING")
    assert main(["report", "--tracking-uri", uri, "--sweep", "k", "--out", str(tmp_path)]) == 0
    assert "k is running, or its driver was killed" in (tmp_path / "report.md").read_text()


def test_the_folder_says_which_of_two_campaigns_of_one_name_is_meant(
    empty_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from logged_sweep import copy_store

    uri = copy_store(empty_uri, tmp_path)
    for name, began, trials in (("k", "1.0", three()), ("k", "2.0", three()[:1])):
        run = log_sweep(uri, name, trials)
        MlflowClient(tracking_uri=uri).set_tag(run, "campaign", CAMPAIGN)
        MlflowClient(tracking_uri=uri).set_tag(run, "campaign_began", began)
    folder = Path(deliver(tmp_path / "of the first", LEDGER))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"began": "1.0"}))
    given = ["report", "--tracking-uri", uri, "--campaign", CAMPAIGN, "--deliverables", str(folder)]
    assert main([*given, "--out", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.startswith("# Report: night\n\nOne sweep · 3 trials: ")


def test_deliverables_that_are_none_or_of_another_are_one_line(
    fresh: Fresh, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = fresh("k", three())
    given = ["--tracking-uri", uri, "--sweep", "k", "--out", str(tmp_path / "out"), "--deliverables"]
    folder = deliver(tmp_path / "deliverables", [1, 2])

    def refused(reason: str, folder: str = folder) -> None:
        assert main(["report", *given, folder]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and reason in said and said.count("\n") == 1, said
        assert not (tmp_path / "out").exists()

    refused("No such file or directory; expected the deliverables of a campaign", str(tmp_path / "none"))
    refused("of a campaign night to which k of this store does not belong")
    (run,) = MlflowClient(tracking_uri=uri).search_runs(["1"], "tags.role = 'sweep'")
    MlflowClient(tracking_uri=uri).set_tag(run.info.run_id, "campaign", CAMPAIGN)
    refused("ledger.json cannot be read (not a JSON object)")
