"""What sweeps found of their arms and parameters: effects of ablations, importance in searches; as lines and files.

An ablation's effects, measured sample by sample, are in the files that its sweep logged. Of any other sweep with
several seeds the records give one error per arm and seed, and the effects come from those.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import polars as pl

from analysis.effects import Effect, caution, over_seeds, sentence
from analysis.factors import contrasts
from analysis.importance import Importance, importances
from analysis.importance import sentence as said_of
from analysis.readers import Run, first_line, open_store
from analysis.store import SweepData
from trainables.gates import BROKEN
from trainables.record import InputError

_CUT = ("stop_loss", "asha")  # what ends a trial before it shows what it can reach; a plateau does not
_OF_ARMS = 60  # contrasts at most that are computed from records: beyond, nobody reads them


@dataclass(frozen=True)
class Finding:
    """One comparison of a sweep: effects of its arms, or the importance of a search's parameters.

    file: the name that its pictures share. why: lines on what could not be compared. rows: of a search, its trials'
    parameters and objectives, for the picture.
    """

    sweep: str
    title: str
    metric: str
    file: str
    effects: tuple[Effect, ...] = ()
    importances: tuple[Importance, ...] = ()
    trials: int = 0
    rows: tuple[Mapping[str, Any], ...] = ()
    why: tuple[str, ...] = ()

    @property
    def lines(self) -> list[str]:
        """Sentences that claim what is shown."""
        said = [sentence(effect) for effect in self.effects]
        objectives = dict.fromkeys(one.objective for one in self.importances)
        said += [said_of([i for i in self.importances if i.objective == name], self.trials) for name in objectives]
        said += [f"Not compared: {why}." for why in self.why]
        return [*said, caution(len(self.effects))] if self.effects else said


def collect(tracking_uri: str, data: SweepData) -> list[Finding]:
    """What every sweep found. Raises InputError for a logged file that cannot be read as what it should be."""
    with open_store(tracking_uri) as store:
        params: dict[str, dict[str, str]] = {}
        for run, key, value in store.params([sweep.run_id for sweep in data.sweeps]):
            params.setdefault(run, {})[key] = value
    found: list[Finding] = []
    for one in data.each():
        logged = _logged(tracking_uri, one)
        if logged:
            found += logged
        elif one.settings.get("search") == "optuna":
            found += _search(one, params)
        else:
            found += _by_seeds(one, params)
    return found


def lines(found: Sequence[Finding]) -> list[str]:
    """All sentences, each finding's under its title."""
    if not found:
        return ["Nothing to compare: no ablation, no search, and no sweep with several seeds (--seeds 3)."]
    return [line for one in found for line in (f"{one.sweep}: {one.title}", *(f"  {said}" for said in one.lines))]


def write(found: Sequence[Finding], data: SweepData, out_dir: str | Path) -> list[Path]:
    """effects.md and a picture of each finding. Raises InputError for a folder that cannot be written."""
    from analysis.blocks import Block, Heading, Items, Picture, to_markdown

    folder = Path(out_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        blocks: list[Block] = []
        paths = []
        for one in found:
            blocks.append(Heading(f"{one.sweep}: {one.title}"))
            if picture := draw(one, folder):
                blocks.append(Picture(picture, one.title))
                paths.append(picture)
            blocks.append(Items(one.lines))
        text = folder / "effects.md"
        text.write_text(to_markdown(f"Effects: {data.name}", blocks or [Items(lines(found))]), encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"--out {folder}: cannot be written ({reason}); name another folder") from error
    return [text, *paths]


def draw(one: Finding, folder: Path, bare: bool = False) -> Path | None:
    """The finding's picture, if there is something to draw."""
    from analysis import effects_picture, parallel, picture

    path = folder / f"{one.file}.png"
    canvas = picture.Canvas(10, 0.9 + 0.34 * (len(one.effects) + 3), bare=True) if bare else picture.WIDE
    if one.effects:
        effects_picture.draw(one.effects, one.title, one.sweep, one.metric, path, canvas)
    elif len(one.rows) > 1:
        parallel.draw(one.rows, one.importances, one.title, one.sweep, path, picture.REPORT if bare else picture.WIDE)
    else:
        return None
    return path


def _logged(uri: str, data: SweepData) -> list[Finding]:
    """The comparisons whose effects the sweep itself computed and logged."""
    found = []
    keys = {one.name for one in fields(Effect)}
    for name, text in _json_files(uri, data.sweeps[0]):
        try:
            content = json.loads(text)
            if "effects" not in content:
                continue
            effects = [
                Effect(**{key: row[key] for key in row if key in keys} | {"by_seed": tuple(row["by_seed"])})
                for row in content["effects"]
            ]
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise InputError(f"{data.name}: its file {name} is not an ablation's ({first_line(error)}); "
                             "run the sweep again, or leave it out") from None  # fmt: skip
        title = content.get("title") or f"Effects against {effects[0].reference if effects else 'the reference'}"
        metric = data.settings.get("primary", "the error")
        why = (content["why"],) if content.get("why") else ()
        found.append(Finding(data.name, title, metric, f"{data.name}_{Path(name).stem}", tuple(effects), why=why))
    return found


def _json_files(uri: str, run: Run) -> Iterator[tuple[str, str]]:
    """The JSON files of a run: from the disk where they lie there, else through the client."""
    where = urlsplit(run.artifacts)
    if where.scheme in ("", "file"):
        folder = Path(url2pathname(where.path))
        for path in sorted(folder.glob("*.json")) if run.artifacts else ():
            yield path.name, path.read_text(encoding="utf-8")
        return
    from mlflow.tracking import MlflowClient

    try:
        client = MlflowClient(tracking_uri=uri)
        with TemporaryDirectory() as folder_:
            for item in client.list_artifacts(run.run_id):
                if item.path.endswith(".json"):
                    local = client.download_artifacts(run.run_id, item.path, folder_)
                    yield item.path, Path(local).read_text(encoding="utf-8")
    except Exception as error:  # artifact stores raise what they like
        raise InputError(f"{run.name}: its files cannot be read ({first_line(error)}); is their store up?") from error


def _by_seeds(data: SweepData, params: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """Effects of arms that ran with two or more seeds, from the records' errors. Trials that broke or were cut short
    are no measure of their arm: they are left out by name.
    """
    trials = data.trials.filter((pl.col("role") == "trial") & pl.col("drop").is_finite() & pl.col("seed").is_not_null())
    seeds = trials.group_by("combo").agg(pl.col("seed").n_unique())["seed"]
    if len(seeds) and seeds.max() == 1:
        return []
    trials, left_out = _whole(trials)
    tables: dict[str, dict[int, float]] = {}
    arms: dict[str, dict[str, str]] = {}
    twice: dict[str, int] = {}  # arms with two trials of one seed: which counts is not for us to say
    rows = trials.select("run_id", "exp_id", "combo", "seed", "drop").rows()
    # A combo does not name an arm alone: a schedule has that of the weight it starts from.
    stems = {run: re.sub(r"_run\d+$", "", name) for run, name, *_ in rows}
    named: dict[str, set[str]] = {}
    for run, _, combo, *_ in rows:
        named.setdefault(combo, set()).add(stems[run])
    for run, _, combo, seed, drop in rows:
        arm = stems[run] if len(named[combo]) > 1 else str(combo)
        if seed in tables.get(arm, {}):
            twice[arm] = seed
            continue
        # The error in units of the reference's, for a metric of which less is better.
        tables.setdefault(arm, {})[int(seed)] = 1 + drop
        own = params.get(run, {})
        arms[arm] = {key: own[key] for key in own if key not in ("combo", "seed")}
    for arm in twice:
        del tables[arm], arms[arm]
    if not left_out and (len(tables) < 2 or max(map(len, tables.values())) < 2):
        return []
    effects, why = [], [f"{arm} has two trials of seed {seed}: they are not compared" for arm, seed in twice.items()]
    why += left_out
    for wanted in contrasts(arms)[:_OF_ARMS]:
        try:
            effects.append(over_seeds(wanted, tables))
        except InputError as error:
            why.append(str(error))
    metric = data.settings.get("primary", "the error")
    title = f"Arms against {next(iter(arms), 'one another')}, paired by seed"
    return [Finding(data.name, title, metric, f"{data.name}_effects", tuple(effects), why=tuple(dict.fromkeys(why)))]


def _whole(trials: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
    """The trials that show what they can reach, and a line on each other one; an audited stop was run to its end."""
    audited = pl.col("audit_epoch").is_not_null() if "audit_epoch" in trials.columns else pl.lit(False)
    reason = pl.col("stop_reason")
    broke = reason.is_in(list(BROKEN)) | (reason.is_in(_CUT) & ~audited)
    gone = trials.filter(broke.fill_null(False)).select("exp_id", "stop_reason", "epochs").rows()
    why = [f"{name} ended by {ended} after {epochs} epochs, and is left out" for name, ended, epochs in gone]
    return trials.filter(~broke.fill_null(False)), why


def _search(data: SweepData, params: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """What the searched parameters did to the drop and to latency."""
    trials = data.trials.filter((pl.col("role") == "trial") & pl.col("drop").is_finite())
    trials = trials.filter(~pl.col("stop_reason").is_in(list(BROKEN)).fill_null(False))
    cut = trials.filter(pl.col("stop_reason").is_in(_CUT).fill_null(False)).height
    runs = trials["run_id"].to_list()
    keys = [key for key in params.get(runs[0], {}) if key not in ("combo", "seed")] if runs else []
    inputs = {key: _typed([params.get(run, {}).get(key) for run in runs]) for key in keys}
    varied = {key: values for key, values in inputs.items() if values and len(set(values)) > 1}
    rows = [{key: values[i] for key, values in varied.items()} for i in range(len(runs))]
    objectives = {"drop (%)": [100 * drop for drop in trials["drop"]], "p50 (ms)": trials["t_pair_p50_ms"].to_list()}
    found: list[Importance] = []
    for name, values in objectives.items():
        have = [i for i, value in enumerate(values) if value is not None]
        found += importances([rows[i] for i in have], name, [values[i] for i in have]) if varied else []
    why = [] if found else [f"{len(rows)} measured trials of {len(varied)} parameters are too few to tell"]
    why += [f"what the {cut} trials stopped early would have reached; their drops are of the stop"] if cut else []
    drawn = tuple({**row, **{name: values[i] for name, values in objectives.items()}} for i, row in enumerate(rows))
    title = "Searched parameters"
    return [Finding(data.name, title, "drop", f"{data.name}_search", (), tuple(found), len(rows), drawn, tuple(why))]


def _typed(values: Sequence[str | None]) -> list[Any]:
    """Numbers where all are, else text; empty where a trial lacks the parameter."""
    if any(value is None for value in values):
        return []
    try:
        return [float(value) for value in values if value is not None]
    except ValueError:
        return list(values)
