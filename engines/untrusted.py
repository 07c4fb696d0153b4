"""Reads what others may have written: YAML without the parts that blow up, zip files that do not grow when read."""

import zipfile
from pathlib import Path
from typing import Any

import yaml

from engines.errors import InputError

LARGEST = 16 << 20  # characters; the longest list of pairs that a workload has is a tenth of it
DEEPEST = 40


def yaml_data(text: str, what: str) -> Any:
    """Plain data of a YAML text. what: names it in an InputError, of one line, for YAML that is damaged, larger than
    `LARGEST`, deeper than `DEEPEST`, or that uses aliases, by which ten lines can stand for gigabytes.
    """
    if len(text) > LARGEST:
        raise InputError(f"{what}: {len(text)} characters of YAML, expected at most {LARGEST}; it is not ours")
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            opened = isinstance(event, yaml.CollectionStartEvent)
            depth += opened - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise InputError(f"{what}: nested deeper than {DEEPEST} levels; expected plain settings")
            if isinstance(event, yaml.AliasEvent):
                raise InputError(f"{what}: uses the alias *{event.anchor}; write the value out")
        return yaml.safe_load(text)
    # Beside YAML's own: a date in month 13, and what the constructors of `!!bool maybe` and the like raise.
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        said = getattr(error, "problem", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{what}{line}: not YAML ({said})") from None


def refuse_inflating(path: Path, what: str) -> None:
    """InputError for a zip file whose content is larger than itself; anything else is left to who reads it.

    Weights are stored as they are; a compressed entry, or two of the same bytes, lets a small file fill the memory.
    """
    try:
        with zipfile.ZipFile(path) as file:
            inside = sum(entry.file_size for entry in file.infolist())
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return
    size = path.stat().st_size
    if inside > size:
        raise InputError(f"{what} {path}: {inside} bytes in a file of {size}; expected weights that are not compressed")
