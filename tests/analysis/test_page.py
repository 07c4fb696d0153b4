"""The HTML page: one file, nothing fetched, and it really works in a browser (skipped without one)."""

import html
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from logged_sweep import record, teacher, three

from analysis import page
from analysis.pareto import compute
from analysis.store import load

Fresh = Callable[..., str]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def text(uri: str) -> str:
    return page.render(compute(load(uri, "three")))


def markup(text: str) -> str:
    """The page without its scripts."""
    return re.sub(r"<script[^>]*>.*?</script>", "", text, flags=re.S)


def test_nothing_is_referred_to_from_outside(text: str) -> None:
    assert not re.findall(r"""(?:src|href)\s*=|@import|url\(""", markup(text))
    assert "default-src 'none'" in text
    assert all(not re.search(r"\bsrc=", tag) for tag in re.findall(r"<script[^>]*>", text))


def test_no_button_sends_the_data_away(text: str) -> None:
    config = text[text.rindex("displaylogo") :].split("}", 1)[0]
    assert '"modeBarButtons": [["toImage"' in config and "Cloud" not in config
    assert "form-action 'none'" in text


def test_every_record_is_in_the_page(text: str) -> None:
    for rec, _ in three():
        assert f'"exp_id": "{rec.exp_id}"' in text
    assert '"t_pair_p95_ms": 44.0' in text and '"verdict_detail"' in text


def test_hostile_names_cannot_leave_their_place(fresh: Fresh) -> None:
    bad = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    trials = [(teacher(), []), (record("K_a_run1", notes=bad, device=bad, stop_reason=bad), [])]
    found = page.render(compute(load(fresh("s", trials), "s")))
    assert bad not in found and "<img" not in markup(found)


def in_browser(path: Path, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    return subprocess.run(
        [
            BROWSER,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
            *("--enable-logging=stderr", "--virtual-time-budget=6000", "--window-size=1200,800"),
            f"--user-data-dir={folder / 'profile'}",
            *flags,
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_it_renders_in_a_browser_without_an_error(text: str, tmp_path: Path) -> None:
    path = tmp_path / "pareto.html"
    # The last line does what a mouse would: points at the third point drawn.
    hover = '<script>Plotly.Fx.hover("pareto", [{curveNumber: 2, pointNumber: 0}]);</script></body>'
    path.write_text(text.replace("</body>", hover), encoding="utf-8")
    done = in_browser(path, tmp_path, "--dump-dom")
    assert "CONSOLE" not in done.stderr, done.stderr
    assert "modebar-btn" in done.stdout and "upload" not in str(re.findall(r"data-title=.*?>", done.stdout))
    for shape in ("scatterlayer", "gate: drop", "meets the gate", "stopped early"):
        assert shape in done.stdout
    assert re.search(r'<h2 id="name">K_\w+</h2>', done.stdout)
    assert "hovertext" in done.stdout and html.escape("p50 ") in done.stdout


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_it_works_in_a_sandboxed_frame(text: str, tmp_path: Path) -> None:
    """As MLflow shows artifacts: scripts allowed, nothing else. The frame tells what it drew by a message, and what the
    filter and the slider then left of it.
    """
    report = """<script>
      const points = () => document.querySelectorAll("#pareto .points path").length + " points";
      const said = [points() + ", " + document.getElementById("name").textContent];
      function set(id, value) {
        const input = document.getElementById(id);
        input.value = value;
        input.dispatchEvent(new Event("input"));
        said.push(id + " " + value + ": " + document.getElementById("said").textContent);
      }
      set("filter", "T>3");
      set("filter", "verdict=fail t3b05");
      set("filter", "drop<1.5%");
      set("filter", "");
      set("moment", "0");
      const asked = performance.getEntriesByType("resource").length;
      parent.postMessage([...said, asked + " requests"].join("; "), "*");
    </script></body>"""
    frame = html.escape(text.replace("</body>", report))
    outer = tmp_path / "outer.html"
    outer.write_text(
        "<!DOCTYPE html><meta charset='utf-8'><p id='said'>nothing</p><script>"
        "addEventListener('message', (e) => {document.getElementById('said').textContent = e.data});</script>"
        f'<iframe sandbox="allow-scripts" width="1100" height="700" srcdoc="{frame}"></iframe>',
        encoding="utf-8",
    )
    done = in_browser(outer, tmp_path, "--dump-dom")
    assert "CONSOLE" not in done.stderr, done.stderr
    assert "4 points, K_T3B05_run1; " in done.stdout
    assert "filter T&gt;3: 1 of 4 points; " in done.stdout
    assert "filter verdict=fail t3b05: 1 of 4 points; " in done.stdout
    near = sum(rec.drop is not None and rec.drop < 0.015 for rec, _ in three())
    assert f"filter drop&lt;1.5%: {near} of 4 points; " in done.stdout
    assert "filter : ; moment 0: after 1 measured (K_teacher_run1): hypervolume 0; 0 requests" in done.stdout
