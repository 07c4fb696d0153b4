"""manifest.json of a campaign's deliverables: what the folder holds, what the plan wanted, and how it was judged."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainables.gates import Gate
from trainables.record import InputError

NAME, TABLE, FORMAT = "manifest.json", "result_table.csv", 1
CAMPAIGN_ROLE, MANIFEST_TAG = "campaign", "manifest_sha256"  # of the campaign's own run in MLflow
REPORT = "report"  # the one folder within: the page, its Markdown and the pictures
LONGEST = 10_000_000  # bytes that a manifest may have: a plan of a thousand tasks has a tenth of it


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class File(_Part):
    """One file of the folder. file: its name, with `report/` before it for those of the report. sha256: 64 hex digits.
    run_id: the run of the trial that it is of, or of the sweep.
    """

    file: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)
    stage: str | None = None
    run_id: str | None = None


def may_list(name: str) -> bool:
    """Whether a manifest may list that name: a plain one, of a file beside it or in the report's folder."""
    plain = name.removeprefix(f"{REPORT}/")
    return Path(plain).name == plain and "\\" not in plain and plain.isprintable() and not plain.startswith(".")


class Line(_Part):
    """One hard line: see `trainables.gates.Gate`."""

    metric: str
    at_most: float | None = None
    at_least: float | None = None

    @property
    def gate(self) -> Gate:
        """The gate that judges; InputError for limits that make none."""
        return Gate(self.metric, self.at_most, self.at_least)


class Row(_Part):
    """One task of the plan. selected: whether the campaign was to run it. judged: run ids of the trials of which one
    must meet all lines. missing: files that its stage did not leave, with reasons.
    """

    task: str
    stage: str
    title: str
    selected: bool
    finished: bool
    files: tuple[str, ...]
    missing: tuple[str, ...]
    lines: tuple[Line, ...]
    judged: tuple[str, ...]
    verdict: str
    detail: str


class Manifest(_Part):
    """The whole. written: ISO 8601 with an offset. began: the tag `campaign_began` of its sweeps in MLflow, as others
    may have the same name; "" in folders from before there was one.
    """

    format: int = Field(ge=FORMAT, le=FORMAT)
    campaign: str
    began: str = ""
    plan: str
    profile: str
    seed: int
    git_commit: str | None
    written: str
    tasks: tuple[Row, ...]
    files: tuple[File, ...]

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """InputError, in one line, for a file that is no manifest."""
        try:
            if path.stat().st_size > LONGEST:
                raise InputError(f"{path}: {path.stat().st_size} bytes; expected a manifest of at most {LONGEST}")
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; expected the deliverables of a campaign") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "it"
            raise InputError(f"{path}: no manifest of this version ({where}: {first['msg']})") from None
