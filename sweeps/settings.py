"""Settings: files under sweeps/settings/ -> defaults + profile + --set -> checked values, every problem
named at once.

A file has two keys: `defaults` holds every setting with its unit and meaning in comments, `profiles` maps
a profile to the settings in which it differs. Keys are unique across the files of a sweep, so `--set
epochs=3` finds its place.
"""

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from engines.errors import InputError
from engines.untrusted import yaml_data
from sweeps.spec import SettingsFile
from trainables.alphaqubit.settings import (
    DecoderFusionSettings,
    DecoderPretrainSettings,
    DecoderPruneSettings,
    DecoderQuantSettings,
    DecoderSettings,
    DecoderSizes,
    DecoderWorkload,
)
from trainables.config import (
    DistillSettings,
    Dust3rPruneSettings,
    Dust3rQuantSettings,
    PretrainSettings,
    Workload,
    WorkloadSettings,
)
from trainables.schedules import Schedule

PROFILES = ("demo", "small", "full")
WORKLOAD = SettingsFile("workload.yaml", WorkloadSettings)
DISTILL = SettingsFile("distill.yaml", DistillSettings)
QUANT = SettingsFile("quant.yaml", Dust3rQuantSettings)
PRUNE = SettingsFile("prune.yaml", Dust3rPruneSettings)
PRETRAIN = SettingsFile("pretrain.yaml", PretrainSettings)
DECODER_WORKLOAD = SettingsFile("decoder_workload.yaml", DecoderWorkload)
WORKLOADS = (WORKLOAD, DECODER_WORKLOAD)
DECODER_SIZES = SettingsFile("alphaqubit.yaml", DecoderSizes)
DECODER = SettingsFile("decoder_distill.yaml", DecoderSettings)
DECODER_FUSION = SettingsFile("decoder_fusion.yaml", DecoderFusionSettings)
DECODER_QUANT = SettingsFile("decoder_quant.yaml", DecoderQuantSettings)
DECODER_PRUNE = SettingsFile("decoder_prune.yaml", DecoderPruneSettings)
DECODER_PRETRAIN = SettingsFile("decoder_pretrain.yaml", DecoderPretrainSettings)


@dataclass(frozen=True)
class Resolved:
    """The settings of one run: `values` are flat and plain JSON; `models` are the same, checked, by file
    name.

    contents: hashes of the files that settings name, by setting. sampled: the samples that follow from the
    workload. Both are empty until `identified`.
    """

    profile: str
    values: Mapping[str, Any]
    models: Mapping[str, BaseModel]
    contents: Mapping[str, str] = field(default_factory=dict)
    sampled: Mapping[str, Any] = field(default_factory=dict)

    @property
    def workload(self) -> dict[str, Any]:
        """The part that says how everything is measured."""
        models = [model for model in self.models.values() if isinstance(model, Workload)]
        return models[0].model_dump(mode="json") if models else {}

    @property
    def workload_hash(self) -> str:
        """12 hex digits of the protocol and its samples; results of different workloads are never compared.

        Data on disk count by what they hold, which the samples say, not by where they lie.
        """
        protocol = {key: value for key, value in self.workload.items() if key not in self.contents}
        return digest({**protocol, **self.sampled})

    @property
    def identity(self) -> dict[str, Any]:
        """The values with what files hold in place of where they lie: equal identities give equal results."""
        return {**self.values, **self.contents}

    def identified(self, contents: Mapping[str, str], sampled: Mapping[str, Any]) -> "Resolved":
        """The same settings, and what they stand for."""
        return replace(self, contents=contents, sampled=sampled)

    def with_params(self, params: Mapping[str, Any], name: str) -> None:
        """Check a trial's own parameters as if they stood in the files; InputError names the trial."""
        if not self.models:
            return
        files = [SettingsFile(file, type(model)) for file, model in self.models.items()]
        problems: list[str] = []
        _check(files, {**self.values, **params}, problems, name)
        if problems:
            raise InputError("; ".join(problems))


def digest(data: object) -> str:
    """12 hex digits of the canonical JSON of plain data."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def resolve(
    files: Sequence[SettingsFile],
    profile: str,
    overrides: Mapping[str, Any],
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> Resolved:
    """Merge defaults, profile, the script's own changes and overrides and check them; InputError lists every problem
    in one line.
    """
    problems: list[str] = []
    values: dict[str, Any] = {}
    for file in files:
        values |= _read(file, profile, problems)
    known = _owners(files)
    for said, given in (("the script's change of ", changes), ("--set ", overrides)):
        problems += [f"{said}{key}: {_unknown(key, known)}" for key in given if key not in known]
        values |= {key: value for key, value in given.items() if key in known}
    models = _check(files, values, problems, None, overrides)
    if problems:
        raise InputError("; ".join(problems))
    flat = {key: value for model in models.values() for key, value in model.model_dump(mode="json").items()}
    return Resolved(profile, flat, models)


def parse_set(items: Sequence[str]) -> dict[str, Any]:
    """`key=value` strings -> {key: YAML value}; InputError for what is not one, or names a key twice."""
    values: dict[str, Any] = {}
    problems = []
    for item in items:
        key, sign, text = item.partition("=")
        key = key.strip()
        if not sign or not key.isidentifier():
            problems.append(f"--set {item}: expected key=value, e.g. --set epochs=3")
        elif key in values:
            problems.append(f"--set {key}: given twice")
        else:
            try:
                values[key] = yaml_data(text, f"--set {key}")
            except InputError:
                problems.append(f"--set {item}: the value is not YAML, e.g. 3, 1.5e-4 or '{{linear: [0.5, 0.1]}}'")
    if problems:
        raise InputError("; ".join(problems))
    return values


def _read(file: SettingsFile, profile: str, problems: list[str]) -> dict[str, Any]:
    name = _shown(file)
    try:
        whole = yaml.safe_load(file.path.read_text())
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror or error})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise InputError(f"{name}{line}: not YAML ({getattr(error, 'problem', None) or 'unreadable'})") from error
    if not isinstance(whole, dict) or not isinstance(whole.get("defaults"), dict):
        raise InputError(f"{name}: expected a mapping `defaults:` that holds every setting")
    for key in whole.keys() - {"defaults", "profiles"}:
        problems.append(f"{name}: {_unknown(str(key), ['defaults', 'profiles'])}")
    profiles = whole.get("profiles") or {}
    if not isinstance(profiles, dict):
        raise InputError(f"{name}: expected a mapping under `profiles:`, found {profiles!r}")
    keys = list(file.model.model_fields)
    parts = {"defaults": whole["defaults"]} | {f"profile {key}": part or {} for key, part in profiles.items()}
    for key in profiles:
        if key not in PROFILES:
            problems.append(f"{name}: profile {_unknown(str(key), PROFILES)}")
    for part, entries in parts.items():
        if not isinstance(entries, dict):
            raise InputError(f"{name}, {part}: expected a mapping, found {entries!r}")
        for key in entries:
            if key not in keys:
                problems.append(f"{name}, {part}: {_unknown(str(key), keys)}")
    for key in keys:
        if key not in whole["defaults"]:
            problems.append(f"{name}, defaults: key {key!r} is missing: the file must hold every key")
    merged = {**whole["defaults"], **(profiles.get(profile) or {})}
    return {key: value for key, value in merged.items() if key in keys}


def _check(
    files: Sequence[SettingsFile],
    values: Mapping[str, Any],
    problems: list[str],
    trial: str | None,
    overrides: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, BaseModel]:
    """Build the models; wrong types, limits and combinations go to `problems`, blamed on whoever gave the value."""
    known = _owners(files)
    models: dict[str, BaseModel] = {}
    if trial:
        problems += [f"trial {trial}: {_unknown(key, known)}" for key in values if key not in known]
    for file in files:
        where = f"trial {trial}" if trial else _shown(file)
        own = {key: value for key, value in values.items() if key in file.model.model_fields}
        try:
            models[file.name] = file.model(**own)
        except ValidationError as error:
            for item in error.errors():
                key = ".".join(str(part) for part in item["loc"])
                said = item["msg"].removeprefix("Value error, ")
                if item["type"] == "extra_forbidden":
                    said = f"unknown key; {_shown(file)} explains those there are"
                given = [name for name in overrides if name in own and (not key or name == item["loc"][0])]
                if given and len(item["loc"]) > 1:
                    problems.append(f"--set {key}={_typed(item['input'])}: {said}")
                elif given:
                    problems.append(f"{' '.join(f'--set {name}={_typed(overrides[name])}' for name in given)}: {said}")
                else:
                    problems.append(f"{where}: {key}={item['input']!r}: {said}" if key else f"{where}: {said}")
    return models


def _typed(value: Any) -> str:
    """A value as it is typed behind --set."""
    return value if isinstance(value, str) else json.dumps(value)


def _owners(files: Sequence[SettingsFile]) -> list[str]:
    keys = [key for file in files for key in file.model.model_fields]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"settings {twice} stand in two files of one sweep: --set could not tell them apart")
    return keys


def _shown(file: SettingsFile) -> str:
    path = file.path
    return f"sweeps/settings/{file.name}" if path.parent == Path(__file__).parent / "settings" else str(path)


def _unknown(key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(sorted(known))}"
    return f"unknown key {key!r}: {hint}"


def flat_params(params: Mapping[str, Any]) -> dict[str, float | int | str]:
    """Parameters as numbers where they are numbers, so that they sort, plot and compare.

    A weight schedule becomes its starting weight plus `<key>_schedule` (its kind), `<key>_end` and, for a
    step, `<key>_at` (share of training).
    """
    flat: dict[str, float | int | str] = {}
    for key, value in params.items():
        if isinstance(value, bool) or value is None:
            flat[key] = str(value).lower()
        elif isinstance(value, int | float | str):
            flat[key] = value
        elif isinstance(value, dict) and value.keys() <= {"step", "shares", "linear"}:
            schedule = Schedule.from_data(value)
            flat[key] = schedule.values[0]
            flat[f"{key}_schedule"] = schedule.kind
            flat[f"{key}_end"] = schedule.values[-1]
            if schedule.shares:
                flat[f"{key}_at"] = schedule.shares[0]
        else:
            flat[key] = json.dumps(value, sort_keys=True)
    return flat
