"""A sweep as logged, or several sweeps of one campaign together: settings, trials and learning curves as frames."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import polars as pl

from analysis.frames import curve_frame, trial_frame, with_epochs
from analysis.readers import Run, Store, logged_in, open_store, without_password
from trainables.record import InputError

CAMPAIGN_TAG, BEGAN_TAG = "campaign", "campaign_began"


@dataclass(frozen=True)
class SweepData:
    """Sweeps as logged, together.

    ``sweeps``: their parent runs. ``trials``: a row per trial, by sweep and in the plan's order: run_id, trial_id, role
    ("trial" | "teacher"), status, the sweep's name and run id, then the 25 record fields, the extras, and whatever the
    trials' own extras add; null where a trial has no value.
    ``curves``: long form (run_id, key, step = epoch, value), sorted, one value per (run_id, key, step).
    ``notes``: lines a reader of the result should see.
    """

    name: str
    sweeps: tuple[Run, ...]
    trials: pl.DataFrame
    curves: pl.DataFrame
    notes: tuple[str, ...] = field(default=())

    @property
    def run_id(self) -> str:
        """The parent run, of several the newest."""
        return max(self.sweeps, key=lambda sweep: sweep.start_ms).run_id

    @cached_property
    def settings(self) -> Mapping[str, str]:
        """The parent runs' parameters, as strings: those that all of them share."""
        return _shared([sweep.params for sweep in self.sweeps])

    @cached_property
    def tags(self) -> Mapping[str, str]:
        """The parent runs' tags that all of them share."""
        return _shared([sweep.tags for sweep in self.sweeps])

    @cached_property
    def chosen(self) -> frozenset[str]:
        """Run ids of the trials that validation chose, one per sweep at most."""
        wanted = {(sweep.run_id, sweep.tags.get("chosen")) for sweep in self.sweeps}
        columns = zip(*(self.trials[name] for name in ("sweep_run", "exp_id", "run_id")), strict=True)
        return frozenset(run for sweep, exp_id, run in columns if (sweep, exp_id) in wanted)

    @property
    def interrupted(self) -> bool:
        """Whether a sweep ended before it was complete."""
        return any(sweep.status == "KILLED" for sweep in self.sweeps)

    def each(self) -> list["SweepData"]:
        """The sweeps one by one."""
        if len(self.sweeps) == 1:
            return [self]
        return [self.only(self.trials["sweep_run"] == sweep.run_id, [sweep], sweep.name) for sweep in self.sweeps]

    def only(self, rows: pl.Series, sweeps: Sequence[Run], name: str) -> "SweepData":
        """The trials that a mask keeps, with their curves, as the sweeps given."""
        trials = self.trials.filter(rows)
        trials = trials.select(
            column for column in trials if column.name in _ALWAYS or column.null_count() < trials.height
        )
        curves = self.curves.filter(self.curves["run_id"].is_in(trials["run_id"].to_list()))
        return replace(self, name=name, sweeps=tuple(sweeps), trials=trials, curves=curves)


_ALWAYS = frozenset(trial_frame([]).columns)


def load(tracking_uri: str, sweep: str, curve_keys: Sequence[str] = ("val_drop",)) -> SweepData:
    """Read the sweep called ``sweep`` (its run name; also its run id or sweep id); errors as of ``load_all``."""
    return load_all(tracking_uri, [sweep], curve_keys=curve_keys)


def load_all(
    tracking_uri: str,
    sweeps: Sequence[str] = (),
    campaign: str | None = None,
    began: str = "",
    curve_keys: Sequence[str] = ("val_drop",),
) -> SweepData:
    """Read sweeps by name (also by run id or sweep id), or all that a campaign started; of equal names the newest, of
    campaigns the one that began then (its sweeps' tag `campaign_began`), where that is given.

    Raises InputError, in one line, for an unknown sweep or campaign (listing the known), an empty or missing store, and
    a store that is locked, unreachable or not MLflow's.
    """
    with open_store(tracking_uri) as store:
        logged = logged_in(store, tracking_uri)
        notes: list[str] = []
        if campaign is not None:
            found, notes = _of_campaign(logged, campaign, began, tracking_uri)
        else:
            found, notes = _named(logged, sweeps, tracking_uri)
        return _read(store, found, [*notes, *_unfinished(found)], campaign, curve_keys)


def _read(
    store: Store, found: Sequence[Run], notes: Sequence[str], campaign: str | None, curve_keys: Sequence[str]
) -> SweepData:
    ids = [sweep.run_id for sweep in found]
    name = campaign or " + ".join(sweep.name for sweep in found)
    curves = curve_frame(store.metrics(ids, curve_keys))
    return SweepData(
        name, tuple(found), with_epochs(trial_frame(store.children(ids), found), curves), curves, tuple(notes)
    )


def _named(logged: Sequence[Run], sweeps: Sequence[str], uri: str) -> tuple[list[Run], list[str]]:
    chosen: dict[str, Run] = {}
    notes = []
    for wanted in sweeps:
        found = [run for run in logged if wanted in (run.name, run.run_id, run.tags.get("sweep_id"))]
        if not found:
            known = _listed(run.name for run in logged)
            raise InputError(f"--sweep {wanted!r} is not in {without_password(uri)}; known: {known}")
        chosen[found[0].run_id] = found[0]
        if len(found) > 1:
            others = ", ".join(run.run_id for run in found[1:4])
            notes.append(
                f"{len(found)} sweeps are named {wanted!r}: this is the newest (run {found[0].run_id}); "
                f"--sweep also takes a run id, e.g. {others}"
            )
    return list(chosen.values()), notes


def _of_campaign(logged: Sequence[Run], campaign: str, began: str, uri: str) -> tuple[list[Run], list[str]]:
    """A campaign's sweeps in the order of their start, of each name the newest; and a note where the name is another's
    too.
    """
    named = [run for run in logged if run.tags.get(CAMPAIGN_TAG) == campaign]
    began = began or next((at for run in named if (at := run.tags.get(BEGAN_TAG))), "")
    mine = [run for run in named if run.tags.get(BEGAN_TAG, began) == began]
    newest: dict[str, Run] = {}
    for run in mine:
        newest.setdefault(run.name, run)
    if not newest:
        known = _listed(name for run in logged if (name := run.tags.get(CAMPAIGN_TAG)))
        there = f"known: {known}" if known else "no campaign is logged there; name sweeps with --sweep"
        raise InputError(f"--campaign {campaign!r} is not in {without_password(uri)}; {there}")
    others = len(named) - len(mine)
    notes = [f"{others} sweeps of another campaign named {campaign!r} are left out"] if others else []
    return sorted(newest.values(), key=lambda run: run.start_ms), notes


def _listed(names: Iterable[str]) -> str:
    known = list(dict.fromkeys(names))
    return ", ".join(known[:20]) + (f" and {len(known) - 20} more" if len(known) > 20 else "")


def _unfinished(runs: Iterable[Run]) -> Iterator[str]:
    for run in runs:
        if run.status == "RUNNING":
            yield f"{run.name} is running, or its driver was killed: what follows is what it has logged so far"
        elif run.status == "KILLED":
            yield _interrupted(run)


def _interrupted(parent: Run) -> str:
    command = parent.tags.get("mlflow.source.name", "")
    again = command if "--resume" in command.split() else f"{command} --resume"
    return f"{parent.name} was interrupted before it was complete" + (f"; go on with: {again}" if command else "")


def _shared(facts: Sequence[Mapping[str, str]]) -> dict[str, str]:
    return {key: value for key, value in facts[0].items() if all(other.get(key) == value for other in facts)}
