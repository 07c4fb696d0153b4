import errno
import fcntl
import json
import math
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from engines.errors import InputError
from sweeps import journal as journal_module
from sweeps.journal import Journal, SweepState, check_free, parse, read_events
from sweeps.ledger import Ledger, inspect

HEADER = dict(sweep_id="s1", name="k", stage="K", domain="dust3r", profile="demo", config_hash="c", workload_hash="w")
TRIAL = dict(exp_id="K_a_run1", task_id="K-1", role="trial", params={"T": 3.0, "note": "a"}, saves=None)
ROOT = Path(__file__).resolve().parents[2]


def write_example(folder):
    """A sweep of two trials with every kind of event; the path of its journal."""
    with Journal.open(folder) as journal:
        journal.append("sweep", **HEADER, settings={"lr": 0.001}, git_commit="abc", command="k_grid")
        for trial in ("a", "b"):
            journal.append("trial", trial_id=trial, **TRIAL)
            for epoch in (1, 2):
                journal.append("result", trial_id=trial, epoch=epoch, metrics={"val_drop": 0.1 / epoch, "ü": 1.0})
        journal.append("stop", trial_id="a", epoch=2, reason="completed", detail="")
        journal.append("record", trial_id="a", record={"exp_id": "K_a_run1", "notes": "NaN", "drop": None})
        journal.append("failed", trial_id="b", error="worker died")
        journal.append("file", path="files/x.png", trial_id=None)
        journal.append("end", status="interrupted")
        journal.append("resume", command="k_grid --resume")
    return journal.path


def test_replay_gives_the_state(tmp_path):
    state = SweepState.replay(write_example(tmp_path / "s"))
    assert state.header["sweep_id"] == "s1" and state.header["settings"] == {"lr": 0.001}
    a, b = state.trials["a"], state.trials["b"]
    assert a.drops == [0.1, 0.05] and a.epoch == 2 and a.params == TRIAL["params"]
    assert a.stop == (2, "completed", "") and a.record["notes"] == "NaN"  # a record holds no floats in disguise
    assert b.error == "worker died" and b.record is None and b.stop is None
    assert state.files == {"files/x.png": None} and state.ended is None
    first = json.loads((tmp_path / "s" / "journal.jsonl").read_text().splitlines()[0])
    assert list(first)[:2] == ["t", "event"]


def test_a_file_is_of_the_trial_that_wrote_it_last(tmp_path):
    path = write_example(tmp_path / "s")
    with Journal.open(tmp_path / "s") as journal:
        for trial_id in ("a", "b"):
            journal.append("file", path="files/best.pth", trial_id=trial_id)
    assert SweepState.replay(path).files == {"files/x.png": None, "files/best.pth": "b"}


def test_known_epochs_and_trials_change_nothing(tmp_path):
    path = write_example(tmp_path / "s")
    with Journal.open(tmp_path / "s") as journal:
        journal.append("result", trial_id="a", epoch=2, metrics={"val_drop": 9.0})
        journal.append("trial", trial_id="a", **TRIAL)
        journal.append("result", trial_id="b", epoch=3, metrics={})
    state = SweepState.replay(path)
    assert state.trials["a"].drops == [0.1, 0.05]
    assert state.trials["b"].error is None and math.isnan(state.trials["b"].drops[-1])


def test_non_finite_and_numpy_numbers_survive(tmp_path):
    numbers = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": np.float32(0.5), "e": np.int64(3)}
    with Journal.open(tmp_path) as journal:
        journal.append("trial", trial_id="x", **TRIAL)
        journal.append("result", trial_id="x", epoch=np.int64(1), metrics=numbers)
        with pytest.raises(TypeError):
            journal.append("result", trial_id="x", epoch=2, metrics={"a": object()})
        with pytest.raises(TypeError, match="epoch"):
            journal.append("result", trial_id="x", metrics={})
    for line in journal.path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    epoch, metrics = SweepState.replay(journal.path).trials["x"].results[0]
    assert epoch == 1 and math.isnan(metrics["a"])
    assert [metrics[k] for k in "bcde"] == [math.inf, -math.inf, 0.5, 3]


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    path = write_example(tmp_path_factory.mktemp("journal") / "s")
    return path.read_bytes(), list(read_events(path))


@settings(deadline=None, max_examples=60)
@given(data=st.data(), junk=st.binary(max_size=5).filter(lambda b: b"\n" not in b))
def test_cut_anywhere_it_replays_a_prefix_and_can_be_continued(tmp_path_factory, example, data, junk):
    content, events = example
    cut = data.draw(st.integers(0, len(content)))
    whole = content[:cut].count(b"\n")
    folder = tmp_path_factory.mktemp("cut")
    (folder / "journal.jsonl").write_bytes(content[:cut] + junk)
    assert list(read_events(folder / "journal.jsonl")) == events[:whole]
    with Journal.open(folder) as journal:
        assert journal.path.stat().st_size == len(b"".join(content.splitlines(True)[:whole]))
        journal.append("resume", command="again")
    after = list(read_events(folder / "journal.jsonl"))
    assert after[:-1] == events[:whole] and after[-1]["event"] == "resume"


def test_damage_in_the_middle_is_not_thrown_away(tmp_path):
    path = write_example(tmp_path)
    lines = path.read_bytes().splitlines(True)
    path.write_bytes(b"".join([*lines[:3], b"#" + lines[3], *lines[4:]]))
    damaged = path.read_bytes()
    for read in (lambda: list(read_events(path)), lambda: Journal.open(tmp_path)):
        with pytest.raises(InputError, match="line 4"):
            read()
    assert path.read_bytes() == damaged


@pytest.mark.parametrize(("key", "name"), [("saves", "../../x.pth"), ("saves", "/tmp/x.pth"), ("trial_id", "../evil")])
def test_a_journal_of_somebody_else_names_no_paths(tmp_path, key, name):
    """Both become paths below the sweep's folder, which --resume writes."""
    path = write_example(tmp_path)
    event = {"t": 1.0, "event": "trial", **TRIAL, "trial_id": "c", key: name}
    path.write_bytes(path.read_bytes() + json.dumps(event).encode() + b"\n")
    with pytest.raises(InputError, match="is no plain name; it is not ours"):
        SweepState.replay(path)


@pytest.mark.parametrize("name", ["journal.jsonl", "journal.lock"])
def test_a_link_is_not_written_through(tmp_path, name):
    victim, folder = tmp_path / "victim", tmp_path / "s"
    victim.write_text("precious")
    folder.mkdir()
    (folder / name).symlink_to(victim)
    with pytest.raises((InputError, OSError), match="symbolic links"):
        Journal.open(folder)
    assert victim.read_text() == "precious"


def test_a_line_that_is_being_written_is_no_damage(tmp_path, monkeypatch):
    """It is read up to its middle, finished, and followed by another, all within one reading."""
    path = write_example(tmp_path)
    lines = path.read_bytes().splitlines(True)
    half = len(lines[-2]) // 2
    path.write_bytes(b"".join(lines[:-2]) + lines[-2][:half])

    def slow(line):
        if not line.endswith(b"\n"):
            with path.open("ab") as file:
                file.write(lines[-2][half:] + lines[-1])
        return parse(line)

    monkeypatch.setattr("sweeps.journal.parse", slow)
    assert len(list(read_events(path))) == len(lines) - 2


@pytest.mark.parametrize("place", ["files", "trials/a", "trials/b/best.pth", "tracking.log", "tracked.json.tmp"])
def test_a_folder_with_a_link_is_not_gone_on_in(tmp_path, place):
    """What a sweep writes by these names would land where the link leads."""
    folder, victim = tmp_path / "s", tmp_path / "victim"
    folder.mkdir()
    victim.mkdir()
    write_example(folder)
    (folder / place).parent.mkdir(parents=True, exist_ok=True)
    (folder / place).symlink_to(victim)
    for go_on in (lambda: Ledger.open(folder, resume=True), lambda: inspect(folder, True, {"config_hash": "c"})):
        with pytest.raises(InputError, match=f"{place}: a symbolic link, which no sweep makes; remove it"):
            go_on()
    check_free(folder)


def test_an_event_of_another_version_is_kept(tmp_path):
    path = write_example(tmp_path)
    path.write_bytes(path.read_bytes() + b'{"t":1,"event":"telepathy"}\n')
    content = path.read_bytes()
    with pytest.raises(InputError, match="event 'telepathy' is unknown or incomplete: of another version"):
        Journal.open(tmp_path)
    assert path.read_bytes() == content


def test_a_file_system_without_locks_is_not_taken_for_a_held_one(tmp_path, monkeypatch):
    write_example(tmp_path)

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    for look in (lambda: Journal.open(tmp_path), lambda: check_free(tmp_path)):
        with pytest.raises(InputError, match="no file locks .No locks available."):
            look()


def test_looking_at_a_lock_opens_it_as_nfs_wants_it(tmp_path, monkeypatch):
    """NFS gives an exclusive lock on what is open for writing alone (flock(2))."""
    write_example(tmp_path)
    real = fcntl.flock

    def flock(fd, how):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        return real(fd, how)

    monkeypatch.setattr("fcntl.flock", flock)
    check_free(tmp_path)


def test_zeros_after_a_power_cut_are_dropped(tmp_path):
    path = write_example(tmp_path)
    good = path.read_bytes()
    path.write_bytes(good + b"\0" * 100 + b"\n")
    Journal.open(tmp_path).close()
    assert path.read_bytes() == good


def test_a_second_process_is_refused_with_the_name_of_the_first(tmp_path):
    code = "import sys; from sweeps.journal import Journal; Journal.open(sys.argv[1])"
    run = [sys.executable, "-c", code, str(tmp_path)]
    with Journal.open(tmp_path):
        second = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
        assert second.returncode != 0 and f"process {os.getpid()} on {os.uname().nodename}" in second.stderr
        with pytest.raises(InputError, match="in use by process"):
            Journal.open(tmp_path)
    assert subprocess.run(run, cwd=ROOT).returncode == 0


def test_missing_or_unusable_places_are_named(tmp_path):
    with pytest.raises(InputError, match="no such journal"):
        SweepState.replay(tmp_path / "nothing" / "journal.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        Journal.open(tmp_path / "file" / "s")
    path = write_example(tmp_path / "s")
    path.write_bytes(b"".join(path.read_bytes().splitlines(True)[2:]))
    with pytest.raises(InputError, match="never announced"):
        SweepState.replay(path)


def test_a_full_disk_leaves_whole_lines_and_a_clear_error(tmp_path):
    """A file size limit makes the kernel cut the write short and then refuse it, as a full disk does."""
    path = write_example(tmp_path)
    before = list(read_events(path))
    size = path.stat().st_size
    line = len('{"t":1700000000.000,"event":"resume","command":"x"}\n')
    code = f"""
import resource, signal
from sweeps.journal import Journal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
journal = Journal.open({str(tmp_path)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, ({size + line + line // 2}, resource.RLIM_INFINITY))
try:
    journal.append_many([("resume", {{"command": "x"}})] * 3)
except OSError as error:
    print(error.errno, error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
journal.append("end", status="finished")
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.startswith(str(errno.EFBIG)) and "free some space" in run.stdout
    assert run.stdout.count("\n") == 1
    kinds = [event["event"] for event in read_events(path)]
    assert kinds == [event["event"] for event in before] + ["resume", "end"]
    assert path.read_bytes().endswith(b"\n")
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_trial_that_is_tried_again_leaves_its_failure_behind(tmp_path):
    path = write_example(tmp_path / "s")
    with Journal.open(tmp_path / "s") as journal:
        journal.append("record", trial_id="b", record={"exp_id": "K_b_run1", "stop_reason": "failed"})
        assert SweepState.replay(path).trials["b"].record and SweepState.replay(path).trials["b"].error
        journal.append("result", trial_id="b", epoch=3, metrics={"val_drop": 0.1})
        trial = SweepState.replay(path).trials["b"]
        assert trial.record is None and trial.error is None
        journal.append("record", trial_id="b", record={"exp_id": "K_b_run1"})
        journal.append("stop", trial_id="b", epoch=3, reason="completed", detail="")
        assert SweepState.replay(path).trials["b"].record is None
        journal.append("record", trial_id="b", record={"exp_id": "K_b_run1"})
    assert SweepState.replay(path).trials["b"].record


def test_a_lock_on_a_removed_file_is_no_lock(tmp_path, monkeypatch):
    """A driver that abandons its sweep removes the lock file between our opening and locking it."""
    folder = tmp_path / "s"
    take, calls = journal_module._take, []

    def slow(lock, folder):
        if not calls:
            (folder / "journal.lock").unlink()
        calls.append(lock)
        take(lock, folder)

    monkeypatch.setattr(journal_module, "_take", slow)
    with Journal.open(folder):
        assert len(calls) == 2
        with pytest.raises(InputError, match="in use by process"):
            Journal.open(folder)


def test_an_abandoned_sweep_leaves_nothing_and_frees_its_folder(tmp_path):
    ledger = Ledger.open(tmp_path / "s", resume=False)
    ledger.abandon()
    assert not (tmp_path / "s").exists()
    Ledger.open(tmp_path / "s", resume=False).abandon()


def test_every_append_reaches_the_disk_before_close_returns(tmp_path, monkeypatch):
    """`synced` holds the file's size at the start of each fsync: the last one covers all that was written."""
    synced, fsync = [], os.fsync

    def slow(fd):
        synced.append(os.fstat(fd).st_size)
        time.sleep(0.02)
        fsync(fd)

    with Journal.open(tmp_path) as journal:
        monkeypatch.setattr(os, "fsync", slow)
        for epoch in range(1, 40):
            journal.append("result", trial_id="a", epoch=epoch, metrics={})
            time.sleep(0.001)
    assert synced[-1] == journal.path.stat().st_size
    assert len(synced) < 39  # appends do not wait for the disk


def test_a_disk_that_fails_later_is_told_at_the_next_append(tmp_path, monkeypatch):
    failed = threading.Event()

    def fails(fd):
        failed.set()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Journal.open(tmp_path) as journal:
        monkeypatch.setattr(os, "fsync", fails)
        journal.append("end", status="interrupted")
        assert failed.wait(10)
        time.sleep(0.1)
        with pytest.raises(OSError, match="cannot write the journal") as caught:
            journal.append("end", status="interrupted")
        assert caught.value.errno == errno.EIO
