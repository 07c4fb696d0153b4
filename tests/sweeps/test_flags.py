from pathlib import Path

import pytest

from engines.errors import InputError
from sweeps.flags import parse

DOC = "One line.\n\n    python sweeps/toy.py --profile demo    # minutes\n"


def test_defaults() -> None:
    given = parse(DOC, [])
    assert (given.profile, given.search, given.samples, given.seed) == ("small", "grid", 0, 42)
    assert given.storage == Path.cwd() / "runs" and given.address is None and given.tracking_uri is None
    assert not given.resume and not given.dry_run and given.overrides == {} and given.audit == 0


def test_everything_given() -> None:
    words = "--address auto --profile full --search optuna --samples 7 --set lr=3e-4 --set epochs=3 --storage /s "
    given = parse(DOC, [*words.split(), "--tracking-uri", "http://h:5000", "--resume", "--dry-run", "--seed", "7"])
    assert given.address == "auto" and given.samples == 7 and given.seed == 7 and given.resume and given.dry_run
    assert given.overrides == {"lr": "3e-4", "epochs": 3} and given.storage == Path("/s")
    assert given.tracking_uri == "http://h:5000"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--search", "optuna", "--samples", "0"], "--samples 0: expected 1 or more"),
        (["--search", "optuna", "--samples", "-3"], "--samples -3"),
        (["--search", "optuna", "--samples", "many"], "many"),
        (["--search", "optuna"], "expected --samples N"),
        (["--samples", "5"], "only --search optuna"),
        (["--samples", "-5"], "--samples -5: expected 1 or more"),
        (["--share", "2"], "--share 2: expected a part of the cluster"),
        (["--storage", "/dev/null"], "--storage /dev/null: /dev/null is no folder"),
        (["--storage", "/dev/null/runs"], "--storage /dev/null/runs: /dev/null is no folder"),
        (["--search", "random"], "random"),
        (["--profile", "huge"], "huge"),
        (["--seed", "-1"], "--seed -1"),
        (["--storage", "s3://bucket/runs"], "--storage s3://bucket/runs: expected a folder"),
        (["--audit", "20"], "--audit 20: expected a share from 0 to 1"),
        (["--audit", "nan"], "--audit nan"),
        (["--audit", "-0.1"], "--audit -0.1"),
        (["--set", "epochs"], "--set epochs: expected key=value"),
        (["--set", "epochs=3", "--set", "epochs=4"], "given twice"),
        (["--set", "beta={step: [1"], "not YAML"),
        (["--epoch", "3"], "--epoch"),
        (["extra"], "extra"),
    ],
)
def test_bad_flags_end_in_one_line(argv: list[str], said: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(DOC, argv)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_storage_that_may_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)  # root may write everywhere
    with pytest.raises(InputError, match=f"--storage {tmp_path}/a/b: {tmp_path} may not be written"):
        parse(DOC, ["--storage", str(tmp_path / "a" / "b")])


def test_search_needs_a_space() -> None:
    with pytest.raises(InputError, match="no search space"):
        parse(DOC, ["--search", "optuna", "--samples", "3"], searchable=False)


def test_help_shows_the_scripts_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(DOC, ["--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0 and "python sweeps/toy.py --profile demo" in out
    for flag in [
        "address",
        "profile",
        "search",
        "samples",
        "set",
        "storage",
        "tracking-uri",
        "resume",
        "dry-run",
        "seed",
        "audit",
    ]:
        assert f"--{flag}" in out
