"""What others wrote is read as data or refused in one line: never run, never more memory than the file has bytes."""

import io
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.errors import InputError
from engines.untrusted import DEEPEST, LARGEST, refuse_inflating, yaml_data
from trainables import checkpoint

BOMB = "a: &a [x, x, x, x]\n" + "".join(
    f"{new}: &{new} [*{old}, *{old}, *{old}, *{old}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "uses the alias"),
        ("[" * 100_000, "nested deeper"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "nested deeper"),
        ("x" * (LARGEST + 1), "expected at most"),
        ("!!python/object/apply:os.system ['touch RUN']", "not YAML"),
        ("a: [1", "line 1: not YAML"),
        ("when: 2026-13-45", "not YAML"),
        ("\x00", "not YAML"),
        ("!!bool maybe", "not YAML"),
        ("!!int ''", "not YAML"),
        ("!!timestamp foo", "not YAML"),
    ],
)
def test_hostile_yaml_is_refused_in_one_line(text: str, said: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=said) as caught:
        yaml_data(text, "some.yaml")
    assert str(caught.value).startswith("some.yaml") and "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert not list(tmp_path.iterdir())


def test_yaml_at_the_limits_is_read() -> None:
    assert yaml_data("[" * DEEPEST + "]" * DEEPEST, "deep") is not None
    assert yaml_data("a: {b: [1, 2.5, x, null]}", "plain") == {"a": {"b": [1, 2.5, "x", None]}}


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="[]{}:&*a-1,'\"!|>\n #%@`", max_size=60))
def test_no_text_raises_anything_else(text: str) -> None:
    try:
        found = yaml_data(text, "some.yaml")
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert found == yaml.safe_load(text)


def packed(path: Path, compression: int) -> Path:
    """The same weights, as a zip file written anew."""
    whole = io.BytesIO()
    torch.save({"model": {"weight": torch.zeros(1 << 20)}}, whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    return path


def test_a_checkpoint_that_grows_is_refused_before_it_is_read(tmp_path: Path) -> None:
    bomb = packed(tmp_path / "bomb.pth", zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 20_000
    with pytest.raises(InputError, match="bytes in a file of") as caught:
        checkpoint.load(bomb)
    assert "\n" not in str(caught.value)
    assert checkpoint.load(packed(tmp_path / "plain.pth", zipfile.ZIP_STORED))["model"]["weight"].numel() == 1 << 20


def test_what_is_no_zip_file_is_left_to_its_reader(tmp_path: Path) -> None:
    for content in (b"", b"PK", b"PK\x05\x06" + bytes(18), bytes(100)):
        (tmp_path / "x").write_bytes(content)
        refuse_inflating(tmp_path / "x", "file")
