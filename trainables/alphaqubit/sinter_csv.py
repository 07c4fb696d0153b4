"""Results as sinter's CSV, for `sinter plot` and `sinter combine`.

python -m trainables.alphaqubit.sinter_csv RUN_FOLDER stats.csv     # a finished sweep's decoders and matching
sinter plot --in stats.csv --group_func "f'{decoder} p={m.p}'" --x_func m.r --failure_units_per_shot_func m.r --failure_unit_name round --out ler.png

Sinter adds up the lines of one id. So the id, by the metadata, tells which weights decoded which shots: lines of several
sweeps in one file stay apart, and what was measured on the same fixed shots is written once.
"""  # noqa: E501

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import sinter

from engines.errors import InputError, command_line
from engines.untrusted import yaml_data
from trainables.alphaqubit.sampler import Experiment
from trainables.record import Record, Value, read_csv

REFERENCES = {"ler_matching": "pymatching", "ler_correlated": "pymatching_correlated", "ler_limit": "exact"}


def stats(
    experiment: Experiment, decoder: str, shots: int, errors: int, seconds: float, origin: Mapping[str, Value]
) -> sinter.TaskStats:
    """One line of sinter's CSV. Its metadata: distance d, rounds r, p, basis b, noise, outputs, shots and `origin`.

    origin: what is None is left out; `weights`, the hash of a neural decoder's; `workload`, the hash, or `seed`,
    which shots were decoded. They are part of the id, as is `shots`: more shots of one seed repeat the fewer.
    """
    e = experiment
    metadata = {"d": e.distance, "r": e.rounds, "p": e.p, "b": e.basis, "noise": e.noise, "outputs": e.label}
    metadata |= {"shots": shots} | {key: value for key, value in origin.items() if value is not None}
    circuit = e.circuit()
    dem = circuit.detector_error_model(decompose_errors=True)
    task = sinter.Task(circuit=circuit, decoder=decoder, detector_error_model=dem, json_metadata=metadata)
    return sinter.TaskStats(
        strong_id=task.strong_id(), decoder=decoder, json_metadata=metadata, shots=shots, errors=errors, seconds=seconds
    )


def append(path: Path, lines: Sequence[sinter.TaskStats]) -> int:
    """Add the lines whose ids a file has not yet, with the header where it is new; how many were added.

    InputError for a file that cannot be written or is not sinter's.
    """
    try:
        new = not path.exists() or path.stat().st_size == 0
        known = set() if new else {line.strong_id for line in sinter.read_stats_from_csv_files(path)}
        added = {line.strong_id: line for line in lines if line.strong_id not in known}
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in ([sinter.CSV_HEADER] if new else []) + list(added.values())))
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); give another file") from None
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: not a file of sinter's counts ({reason}); give another file") from None
    return len(added)


def of_run(folder: Path) -> list[sinter.TaskStats]:
    """Every decoder that a finished sweep measured, and once those that it was compared with."""
    try:
        workload = yaml_data((folder / "workload.yaml").read_text(), f"{folder}/workload.yaml")
        records = read_csv(folder / "files" / "result_table.csv")
    except OSError as error:
        raise InputError(f"{folder}: not the folder of a finished sweep ({error.strerror}: {error.filename})") from None
    keys = ("distance", "rounds", "p", "noise", "basis", "outputs")
    if not isinstance(workload, dict) or any(key not in workload for key in keys):
        raise InputError(f"{folder}/workload.yaml: expected the workload of a decoder sweep (sweeps/aq_*.py)")
    experiment = Experiment(*(workload[key] for key in keys))
    found: dict[str, sinter.TaskStats] = {}
    for record in records:
        for decoder, rate, origin in [(record.exp_id, record.extra.get("ler"), _origin(record)), *_references(record)]:
            shots = record.extra.get("test_samples")
            if isinstance(rate, int | float) and isinstance(shots, int) and decoder not in found:
                where = {**origin, "workload": record.workload_hash}
                found[decoder] = stats(experiment, decoder, shots, round(rate * shots), 0.0, where)
    if not found:
        raise InputError(f"{folder}: no record with an error rate; measure with sweeps/aq_baseline.py or another stage")
    return list(found.values())


def _origin(record: Record) -> dict[str, Value]:
    """What tells a decoder from others of its name. Of the teacher its weights do: it is the same in every sweep."""
    weights = {"weights": record.extra.get("weights")}
    # An INT8 form has the weights' hash of its FP32 form: how it was made, the settings tell.
    return {**weights, "seed": record.seed, "config": record.config_hash} if record.parent else weights


def _references(record: Record) -> list[tuple[str, Value, dict[str, Value]]]:
    return [(name, record.extra.get(key), {}) for key, name in REFERENCES.items()]


@command_line
def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m trainables.alphaqubit.sinter_csv", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("run", type=Path, help="folder of a finished sweep, such as runs/aq_baseline_small_seed42")
    parser.add_argument("csv", type=Path, help="file to add to")
    given = parser.parse_args(arguments)
    lines = of_run(given.run)
    added = append(given.csv, lines)
    print(f"{given.csv}: {added} lines added, {len(lines) - added} were there already")


if __name__ == "__main__":
    sys.exit(main())
