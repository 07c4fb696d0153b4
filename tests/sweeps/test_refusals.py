"""Bad input ends in one line and exit code 2, with --dry-run as without, and touches nothing that is there."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from sweeps.journal import Journal, SweepState
from sweeps.k_grid import K
from sweeps.launch import run
from sweeps.spec import Sweep
from trainables.alphaqubit.decisions import SHIPPED as DECODER
from trainables.dust3r.domain import SHIPPED

ROOT = Path(__file__).resolve().parents[2]
TOY = Path(__file__).with_name("toy_sweep.py")
NAME = "toy_small_seed42"


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOY.parent))
    spec = importlib.util.spec_from_file_location("toy_sweep", TOY)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The storage of a finished sweep."""
    storage = tmp_path_factory.mktemp("finished")
    subprocess.run([sys.executable, TOY, "--storage", storage], check=True, capture_output=True, timeout=400)
    return storage


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    """All files below a folder, with the time of their last change."""
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def refused(capsys: pytest.CaptureFixture[str], module: ModuleType, *argv: str) -> str:
    """The one line with which a start ends, and a dry run too."""
    said = []
    for dry in ([], ["--dry-run"]):
        assert run(module.SWEEP, [*argv, *dry]) == 2
        out, err = capsys.readouterr()
        assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in out + err and not out
        said.append(err)
    assert said[0] == said[1]
    return said[0]


def teacher_file(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.pth"
    if kind != "missing":
        torch.save({"model": {"weight": torch.zeros(1000)}, "config": {"width": 7}}, path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:500])
    return path


def test_a_worker_that_is_killed_whenever_it_prepares_is_one_line(tmp_path: Path) -> None:
    command, env = [sys.executable, str(TOY), "--storage", str(tmp_path)], {**os.environ, "TOY_PREPARE": "killed"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert (
        done.returncode == 2 and done.stderr.startswith("error: WorkerCrashedError: ") and done.stderr.count("\n") == 1
    )
    assert "while it prepared what all trials share; start the sweep again" in done.stderr
    assert not (tmp_path / NAME / "journal.jsonl").exists()


def test_a_teacher_that_cannot_serve_is_named_by_the_script(finished: Path, tmp_path: Path) -> None:
    """Started for real, in a storage that holds a finished sweep, of which not a byte changes."""
    before, environment = content(finished), {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = {}
    for kind in ("missing", "truncated", "architecture"):
        path = teacher_file(kind, tmp_path)
        command = [sys.executable, "sweeps/k_grid.py", "--set", f"teacher={path}", "--storage", str(finished)]
        pipe = subprocess.PIPE
        started[path] = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)
    for path, process in started.items():
        out, err = process.communicate(timeout=400)
        assert process.returncode == 2 and not out, err
        assert err.startswith("error: ") and str(path) in err and err.count("\n") == 1
    assert content(finished) == before


@pytest.mark.parametrize("kind", ["missing", "truncated", "architecture"])
def test_a_dry_run_opens_the_teacher_too(capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str) -> None:
    path = teacher_file(kind, tmp_path)
    storage = str(tmp_path / "runs")
    assert run(K, ["--dry-run", "--set", f"teacher={path}", "--storage", storage]) == 2
    assert str(path) in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_a_teacher_counts_by_its_content(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the file lies, also relative to here; other weights under the same name are another sweep."""
    from safetensors.torch import load_file, save_file

    def trials(teacher: str) -> list[str]:
        assert run(K, ["--dry-run", "--set", f"teacher={teacher}", "--storage", str(tmp_path / "runs")]) == 0
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith(("P0-", "K-"))]

    (tmp_path / "elsewhere").mkdir()
    for path in (tmp_path / "teacher.safetensors", tmp_path / "elsewhere" / "same.safetensors"):
        path.write_bytes(SHIPPED.read_bytes())
    monkeypatch.chdir(tmp_path)
    first = trials("teacher.safetensors")
    assert len(first) == 4
    assert first == trials(str(tmp_path / "elsewhere" / "same.safetensors")) == trials("shipped")
    weights = load_file(SHIPPED)
    name = min(weights)
    weights[name] = weights[name] + 1e-2
    header = json.loads(SHIPPED.read_bytes()[8 : 8 + int.from_bytes(SHIPPED.read_bytes()[:8], "little")])
    save_file(weights, "teacher.safetensors", header["__metadata__"])
    second = trials("teacher.safetensors")
    assert not set(first) & set(second)


def test_dry_run_starts_nothing(capsys: pytest.CaptureFixture[str], toy: ModuleType, tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    assert run(toy.SWEEP, ["--dry-run", "--storage", str(storage)]) == 0
    out, _ = capsys.readouterr()
    assert "T_good_run1" in out and "good.pth" in out and "2 trials x 4 epochs" in out
    assert not storage.exists()


def test_a_dry_resume_counts_what_is_left(capsys: pytest.CaptureFixture[str], toy: ModuleType, finished: Path) -> None:
    before = content(finished)
    assert run(toy.SWEEP, ["--dry-run", "--resume", "--storage", str(finished)]) == 0
    assert "of which 0 epochs are left" in capsys.readouterr().out
    assert content(finished) == before
    assert SweepState.replay(finished / NAME / "journal.jsonl").ended == "finished"


def test_resume_of_an_unknown_sweep(capsys: pytest.CaptureFixture[str], toy: ModuleType, tmp_path: Path) -> None:
    said = refused(capsys, toy, "--resume", "--storage", str(tmp_path / "runs"))
    assert "no sweep toy_small_seed42" in said and "--storage" in said
    assert not (tmp_path / "runs").exists()


def test_storage_that_cannot_be_written(capsys: pytest.CaptureFixture[str], toy: ModuleType, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("keep me")
    assert str(blocked) in refused(capsys, toy, "--storage", str(blocked))
    assert blocked.read_text() == "keep me"


def test_a_folder_that_another_driver_holds(
    capsys: pytest.CaptureFixture[str], toy: ModuleType, tmp_path: Path
) -> None:
    journal = Journal.open(tmp_path / NAME)
    said = refused(capsys, toy, "--storage", str(tmp_path))
    assert f"in use by process {os.getpid()}" in said and "--storage" in said
    journal.close()


def test_unreachable_mlflow(capsys: pytest.CaptureFixture[str], toy: ModuleType, tmp_path: Path) -> None:
    said = refused(capsys, toy, "--storage", str(tmp_path / "runs"), "--tracking-uri", "http://127.0.0.1:9")
    assert "127.0.0.1:9" in said
    assert not (tmp_path / "runs").exists()


def test_a_password_in_an_address_stays_off_the_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = str(tmp_path / "runs")
    for address in ("http://me:hush@127.0.0.1:9", "ftp://me:hush@host/x"):  # nothing listens there; no such kind
        assert run(K, ["--profile", "demo", "--storage", storage, "--tracking-uri", address]) == 2
        error = capsys.readouterr().err
        assert "hush" not in error and "me:***@" in error and len(error.strip().splitlines()) == 1
    assert not Path(storage).exists()


@pytest.mark.parametrize(
    ("sweep", "setting", "said"),
    [
        ("q_ptq_qat", "keep=[layernorm, head_typo*]", "keep pattern 'head_typo*' matches no eligible layer"),
        ("q_ptq_qat", "calibration=9999", "calibration=9999 needs as many distinct training samples"),
        ("p_prune", "enc_heads=3.3", "would remove all heads of a layer"),
        ("aq_prune", "heads=2.4", "would remove all 4 heads of a layer"),
        ("aq_quantize", "keep=[softmux]", "keep pattern 'softmux' matches no eligible layer"),
    ],
)
def test_what_shows_on_the_model_is_refused_before_anything_starts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, sweep: str, setting: str, said: str
) -> None:
    module = importlib.import_module(f"sweeps.{sweep}")
    (own,) = (value for value in vars(module).values() if isinstance(value, Sweep))
    for dry in ([], ["--dry-run"]):
        assert run(own, ["--profile", "demo", "--set", setting, "--storage", str(tmp_path / "runs"), *dry]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and said in error, error
    assert not (tmp_path / "runs").exists()


def test_a_teacher_with_a_broken_weight_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    weights = load_file(SHIPPED)
    header = json.loads(SHIPPED.read_bytes()[8 : 8 + int.from_bytes(SHIPPED.read_bytes()[:8], "little")])
    weights["dec_norm.weight"][3] = float("nan")
    path = tmp_path / "broken.pth"
    torch.save({"model": weights, "config": json.loads(header["__metadata__"]["config"])}, path)
    assert run(K, ["--dry-run", "--set", f"teacher={path}", "--storage", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert f"teacher={path}: its weight dec_norm.weight holds NaN" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("sweep", "settings", "said"),
    [
        ("aq_stage2", ["fusion=cached", "model=scratch"], "goes on from a student of AQ2; give its file"),
        ("aq_stage2", ["fusion=cached", f"model={DECODER}"], "is of another shape than size=student"),
        ("aq_fusion", ["teacher=/none.pth"], "/none.pth does not exist"),
        ("aq_fusion", ["distance=7"], "none of distance 7 comes with the package"),
        ("aq_fusion", ["outputs=xz"], "is of basis=Z, the workload of basis=XZ"),
        ("aq_baseline", ["noise=si1000", "train_p=0.2"], "0.2"),
        ("aq_pretrain", ["noise=si1000", "mixed_p=[0.2]"], "0.2"),
        ("aq_pretrain", ["outputs=ixyz", "rounds_weight=0.1"], "--set rounds_weight=0"),
    ],
)
def test_a_decoder_sweep_that_cannot_be_is_refused_at_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, sweep: str, settings: list[str], said: str
) -> None:
    module = importlib.import_module(f"sweeps.{sweep}")
    (own,) = (value for value in vars(module).values() if isinstance(value, Sweep))
    words = [word for setting in settings for word in ("--set", setting)]
    assert run(own, ["--dry-run", "--profile", "demo", "--storage", str(tmp_path / "runs"), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error, error
    assert not (tmp_path / "runs").exists()
