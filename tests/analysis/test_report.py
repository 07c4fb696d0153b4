"""The report: one page and Markdown of everything that a store knows of some sweeps."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from logged_sweep import log_sweep, record, three

from analysis.__main__ import main
from analysis.blocks import Heading, Items, Table, Text, to_html, to_markdown

Fresh = Callable[..., str]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LEDGER = {"gpu_hours": 1.25, "stages": {"K": {"spent": 1.0, "saved": 0.5}}, "stops": [{"reason": "asha", "hours": 0.5}]}


@pytest.fixture(scope="module")
def folder(empty_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of two sweeps of different workloads, with a ledger."""
    from logged_sweep import copy_store

    place = tmp_path_factory.mktemp("report")
    uri = copy_store(empty_uri, place)
    log_sweep(uri, "k", three())
    log_sweep(
        uri, "q", [(record("Q_PTQ_run1", workload_hash="ffff00001111", notes="</p><script>alert(1)</script>"), [])]
    )
    (place / "ledger.json").write_text(json.dumps(LEDGER))
    out = str(place / "out")
    given = ["--tracking-uri", uri, "--sweep", "k", "q", "--ledger", str(place / "ledger.json"), "--out", out]
    assert main(["report", *given]) == 0
    return place / "out"


def test_the_page_says_everything_and_fetches_nothing(folder: Path) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8").replace("<wbr>", "")
    heads = re.findall(r"<h2[^>]*>(.*?)</h2>", text)
    planes = [f"Quality against latency: dust3r, workload {name}" for name in ("3fa9c02b77e1", "ffff00001111")]
    assert heads == ["Verdicts", *planes, "Learning curves", "Ledger", "Environment"]
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


def test_a_ledger_that_is_none_is_one_line(fresh: Fresh, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ledger.json").write_text("[1, 2]")
    given = ["--tracking-uri", fresh("k", three()), "--sweep", "k", "--out", str(tmp_path / "out")]
    for name, reason in (("ledger.json", "not a JSON object"), ("none.json", "No such file")):
        assert main(["report", *given, "--ledger", str(tmp_path / name)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: --ledger") and reason in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()
