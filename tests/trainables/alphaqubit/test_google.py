"""Folders in the layouts of Google's data sets, written by stim from a simulated device, and read back."""

import json
import shutil

import numpy as np
import pytest
import stim
import yaml

from engines.errors import InputError
from trainables.alphaqubit import google
from trainables.alphaqubit.circuits import memory_circuit
from trainables.alphaqubit.matching import decode

SHOTS = 96


def device(circuit, basis):
    """The circuit with a device's coordinates, and a sweep bit per data qubit that flips its initial state."""
    result, table, seen, swept = stim.Circuit(), circuit.get_detector_coordinates(), 0, False
    gate = "CX" if basis == "Z" else "CZ"
    for part in circuit.flattened():
        if part.name == "DETECTOR":
            x, y, t = table[seen]
            seen += 1
            result.append("DETECTOR", part.targets_copy(), [(x + y) / 2 + 3, (x - y) / 2 + 5, t])
            continue
        result.append(part)
        if part.name == ("R" if basis == "Z" else "RX") and not swept:
            swept = True
            for k, qubit in enumerate(part.targets_copy()[: 9 if basis == "Z" else None]):
                result.append(gate, [stim.target_sweep_bit(k), qubit])
    return result


def fixed(circuit, bits):
    """The circuit with sweep bits that have a value."""
    lines = []
    for line in str(circuit).split("\n"):
        if "sweep" not in line:
            lines.append(line)
            continue
        words = line.split()
        for sweep, qubit in zip(words[1::2], words[2::2], strict=True):
            if bits[int(sweep[6:-1])]:
                lines.append(f"{'X' if words[0] == 'CX' else 'Z'} {qubit}")
    return stim.Circuit("\n".join(lines))


def write(root, willow, basis="Z", rounds=3, padded=True):
    """One experiment of SHOTS shots; returns its folder, events and flips."""
    noisy = device(memory_circuit(basis, 3, rounds, 0.01, "si1000"), basis)
    ideal = noisy.without_noise()
    draw = np.random.default_rng(5)
    sweep, measured = [], []
    for group in range(4):
        bits = draw.random(ideal.num_sweep_bits) < 0.5
        sweep.append(np.tile(bits, (SHOTS // 4, 1)))
        measured.append(fixed(noisy, bits).compile_sampler(seed=group).sample(SHOTS // 4))
    sweep, measured = np.concatenate(sweep), np.concatenate(measured)
    converter = ideal.compile_m2d_converter()
    events, flips = converter.convert(measurements=measured, sweep_bits=sweep, separate_observables=True)
    dem = noisy.detector_error_model(decompose_errors=True)
    predicted = decode("pymatching", dem, events).astype(bool)
    number = f"{rounds:02d}" if padded else f"{rounds}"
    if willow:
        folder = root / "d3_at_q4_7" / basis / f"r{number}"
        results = folder / "decoding_results" / "pymatching"
        results.mkdir(parents=True)
        (folder / "metadata.json").write_text(json.dumps({"basis": basis, "rounds": rounds, "shots": SHOTS}))
        dem.to_file(results / "error_model.dem")
        file(results / "obs_flips_predicted.b8", predicted, "b8")
    else:
        folder = root / f"surface_code_b{basis}_d3_r{number}_center_3_5"
        folder.mkdir(parents=True)
        values = {"type": "surface_code", "basis": basis, "rounds": rounds, "distance": 3, "shots": SHOTS}
        (folder / "properties.yml").write_text(yaml.safe_dump(values))
        dem.to_file(folder / "circuit_detector_error_model.dem")
        file(folder / "obs_flips_predicted_by_pymatching.01", predicted, "01")
    ideal.to_file(folder / "circuit_ideal.stim")
    noisy.to_file(folder / ("circuit_noisy_si1000.stim" if willow else "circuit_noisy.stim"))
    stim.write_shot_data_file(
        data=measured, path=folder / "measurements.b8", format="b8", num_measurements=ideal.num_measurements
    )
    stim.write_shot_data_file(
        data=sweep,
        path=folder / ("sweep_bits.b8" if willow else "sweep.b8"),
        format="b8",
        num_measurements=ideal.num_sweep_bits,
    )
    stim.write_shot_data_file(
        data=events, path=folder / "detection_events.b8", format="b8", num_detectors=ideal.num_detectors
    )
    file(folder / f"obs_flips_actual.{'b8' if willow else '01'}", flips, "b8" if willow else "01")
    return folder, events, flips, predicted


def file(path, flips, form):
    stim.write_shot_data_file(data=flips, path=path, format=form, num_observables=1)


@pytest.fixture(scope="module", params=[False, True], ids=["sycamore", "willow"])
def made(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("google")
    return request.param, *write(root, request.param)


@pytest.fixture
def copy(made, tmp_path):
    """A copy of the folder, in a place whose name says the same, to spoil."""
    depth = 3 if made[0] else 1
    target = tmp_path.joinpath(*made[1].parts[-depth:])
    shutil.copytree(made[1], target)
    return target


def test_what_was_written_is_read(made):
    willow, folder, events, flips, predicted = made
    data = google.read(folder)
    assert data.source == ("willow" if willow else "sycamore") and data.basis == "Z" and data.folder == folder
    layout = data.placement.layout
    assert layout.distance == 3 and layout.basis == "Z" and data.placement.rounds == 3
    assert np.array_equal(data.flat, events) and data.flat.dtype == np.uint8
    assert data.events.shape == data.measurements.shape == (SHOTS, 4, 8)
    assert np.array_equal(data.placement.to_flat(data.events), events)
    assert np.array_equal(data.measurements[:, 1] ^ data.measurements[:, 0], data.events[:, 1])
    assert np.array_equal(data.label, flips) and data.label.shape == (SHOTS, 1) and data.label.any()
    assert list(data.predictions) == ["pymatching"] and np.array_equal(data.predictions["pymatching"], predicted)
    assert list(data.dems) == ["pymatching" if willow else "circuit_detector_error_model"]
    assert np.array_equal(decode("pymatching", *data.dems.values(), data.flat), predicted)
    assert data.noisy is not None and data.noisy.without_noise() == data.circuit


@pytest.mark.parametrize("willow", [False, True])
def test_basis_x_and_both_spellings_of_the_rounds(tmp_path, willow):
    paths = [write(tmp_path / str(padded), willow, "X", 2, padded)[0] for padded in (True, False)]
    paths.append(write(tmp_path, willow, "Z", 1)[0])
    for path in paths:
        assert google.read(path).placement.rounds == (1 if path is paths[2] else 2)
    assert google.read(paths[0]).placement.layout.basis == "X"
    assert set(google.find(tmp_path, rounds=2)) == set(paths[:2])
    assert set(google.find(tmp_path)) == set(google.find(tmp_path, distance=3)) == set(paths)
    assert google.find(tmp_path, basis="Z") == (paths[2],)
    with pytest.raises(InputError, match="holds no experiment of distance=5, basis=None, rounds=None"):
        google.find(tmp_path, distance=5)
    with pytest.raises(InputError, match="is no folder"):
        google.find(tmp_path / "absent")


def named(willow):
    """Required files, those that are checked where they are, and a wrong content's effect."""
    flips = "obs_flips_actual.b8" if willow else "obs_flips_actual.01"
    predicted = "decoding_results/pymatching/obs_flips_predicted.b8"
    return flips, predicted if willow else "obs_flips_predicted_by_pymatching.01"


def refused(folder, message):
    with pytest.raises(InputError, match=message) as caught:
        google.read(folder)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(made, copy):
    flips, predicted = named(made[0])
    needed = ["circuit_ideal.stim", "detection_events.b8", flips, "sweep_bits.b8" if made[0] else "sweep.b8"]
    for name in needed + ([predicted] if made[0] else []):
        content = (copy / name).read_bytes()
        (copy / name).unlink()
        refused(copy, f"{name} is missing")
        (copy / name).write_bytes(content)
    google.read(copy)
    (copy / ("metadata.json" if made[0] else "properties.yml")).unlink()
    refused(copy, "is missing, and so is properties.yml")
    refused(copy / "absent", "is no folder")


def test_a_short_file_is_named(made, copy):
    for name in ("detection_events.b8", "measurements.b8", *named(made[0])):
        content = (copy / name).read_bytes()
        for wrong in (content[:-2], content + content[:2], b""):
            (copy / name).write_bytes(wrong)
            refused(copy, f"{name} has {len(wrong)} (bytes|characters): expected")
        (copy / name).write_bytes(content)
    google.read(copy)


def test_measurements_may_be_absent_but_not_disagree(made, copy):
    content = bytearray((copy / "measurements.b8").read_bytes())
    content[40] ^= 1
    (copy / "measurements.b8").write_bytes(bytes(content))
    refused(copy, "measurements.b8 disagrees with (detection_events|obs_flips_actual) in 1 of 96 shots")
    (copy / "measurements.b8").unlink()
    data = google.read(copy)
    assert np.array_equal(data.flat, made[2])
    said = "absent: measurements.b8, so events and flips are not checked against it"
    assert google.table(data).splitlines()[1] == f"  {said}"


def test_an_error_model_may_be_absent_and_that_is_said(made, copy):
    assert google.read(copy).absent == ()
    next(copy.rglob("*.dem")).unlink()
    data = google.read(copy)
    lines = google.table(data).splitlines()
    assert data.absent == (("error_model.dem of pymatching, so matching does not decode on it",) if made[0] else ())
    assert lines[1:-3] == [f"  absent: {what}" for what in data.absent]
    assert [line[2:].split("  ")[0] for line in lines[-3:]] == [
        "pymatching on noisy circuit", "pymatching_correlated on noisy circuit", "pymatching, as shipped"
    ]  # fmt: skip


def moved(dem, change):
    """The DEM with other coordinates of its detectors."""
    result = stim.DetectorErrorModel()
    for part in dem.flattened():
        if part.type == "detector":
            part = stim.DemInstruction("detector", change(part.args_copy()), part.targets_copy())
        result.append(part)
    return result


def test_an_error_model_with_other_coordinates_is_refused(made, copy):
    """Where it has some: without any the order of the detectors is all that there is."""
    path = next(copy.rglob("*.dem"))
    dem = stim.DetectorErrorModel.from_file(path)
    moved(dem, lambda place: [value + 1.5 for value in place]).to_file(path)
    refused(copy, rf"{path.name} has detector 0 at \(.*\) but circuit_ideal.stim at \(.*\): one is of another")
    for same in (lambda place: [], lambda place: place[:2]):
        moved(dem, same).to_file(path)
        assert list(google.read(copy).dems) == ["pymatching" if made[0] else "circuit_detector_error_model"]
    (stim.DetectorErrorModel("error(0.1) D0 L1") + dem).to_file(path)
    refused(copy, f"{path.name} has 2 observables but circuit_ideal.stim has 1")
    dem.to_file(path)
    noisy = next(copy.glob("circuit_noisy*.stim"))
    noisy.write_text("SHIFT_COORDS(1, 0, 0)\n" + noisy.read_text())
    refused(copy, f"{noisy.name} has detector 0 at")


def test_files_that_disagree_about_the_number_of_shots_are_both_named(made, copy):
    """Where the description has no number, a file that is short by whole shots looks complete by itself."""
    description = copy / ("metadata.json" if made[0] else "properties.yml")
    values = json.loads(description.read_text()) if made[0] else yaml.safe_load(description.read_text())
    description.write_text(json.dumps({key: value for key, value in values.items() if key != "shots"}))
    path, flips = copy / "detection_events.b8", named(made[0])[0]
    path.write_bytes(path.read_bytes()[: -3 * 5])
    refused(copy, f"{flips} has .* for each of {SHOTS - 5} shots.*, as many as detection_events.b8 has")
    description.write_text(json.dumps(values))
    refused(copy, f"detection_events.b8 has .* for each of {SHOTS} shots.*, as many as {description.name} has")


def test_files_that_belong_to_another_experiment(made, copy):
    willow = made[0]
    description = copy / ("metadata.json" if willow else "properties.yml")
    values = json.loads(description.read_text()) if willow else yaml.safe_load(description.read_text())
    for key, value, message in [
        ("rounds", 5, "says rounds=5 but circuit_ideal.stim has 3"),
        ("distance", 5, "says distance=5 but circuit_ideal.stim has 3"),
        ("shots", 97, "expected 3 for each of 97 shots"),
        ("shots", "many", "shots='many' is no number"),
        ("basis", "Y", "basis='Y' is unknown"),
    ]:
        description.write_text(json.dumps(values | {key: value}))
        refused(copy, message)
    description.write_text("[1, 2")
    refused(copy, f"{description.name} cannot be read")
    description.write_text("3")
    refused(copy, "holds no table")
    description.write_text(json.dumps({key: value for key, value in values.items() if key != "shots"}))
    assert len(google.read(copy).flat) == SHOTS, "the folder's files tell the number of shots"
    dem = next(copy.rglob("*.dem"))
    dem.write_text("error(0.1) D0")
    refused(copy, rf"{dem.name} has 1 detectors but circuit_ideal.stim has 24")
    dem.write_text("nonsense\nlines")
    refused(copy, f"{dem.name} is no error model")
    (copy / "circuit_ideal.stim").write_text("M 0\nDETECTOR(0, 0, 0) rec[-1]\nOBSERVABLE_INCLUDE(0) rec[-1]")
    refused(copy, "circuit_ideal.stim: coordinates of 1 detectors")
    (copy / "circuit_ideal.stim").write_text("NOT A GATE")
    refused(copy, "circuit_ideal.stim is no stim circuit")


def test_a_text_file_of_something_else(tmp_path):
    folder = write(tmp_path, False)[0]
    (folder / "obs_flips_actual.01").write_text("2\n" * SHOTS)
    refused(folder, "obs_flips_actual.01 is not of format 01")


def test_the_command_says_of_every_experiment_how_well_it_was_decoded(tmp_path, capsys, aq):
    """Both layouts below one folder; the decoder given has no training, is of basis Z, and decodes X as well."""
    written = {(willow, basis): write(tmp_path, willow, basis) for willow in (False, True) for basis in "XZ"}
    assert google.main([str(tmp_path), str(aq.teacher_file)]) == 0
    assert capsys.readouterr().out.count(" shots\n") == len(written)
    for (willow, basis), (folder, _, flips, predicted) in written.items():
        assert google.main([str(folder), str(aq.teacher_file)]) == 0
        head, *lines = capsys.readouterr().out.splitlines()
        source = "willow" if willow else "sycamore"
        assert head.endswith(f"{source}, distance 3, rounds 3, basis {basis}, {SHOTS} shots")
        model = "pymatching" if willow else "circuit_detector_error_model"
        names = [f"pymatching on {model}", f"pymatching_correlated on {model}", "pymatching, as shipped"]
        if basis == "X":
            assert lines.pop(0) == (
                "  warning: the decoder given is of basis Z, and decodes basis X by the code's symmetry, less well "
                "than weights of its own: python sweeps/aq_pretrain.py --set basis=X trains them"
            )
        assert [line[2:].split("  ")[0] for line in lines] == [*names, "the decoder given"]
        rate = f"LER {np.mean(predicted != flips):.5f} ["
        assert rate in lines[0] and rate in lines[2] and "LER 0." in lines[3]


def test_a_decoder_that_does_not_fit_and_a_folder_without_a_model_say_so(tmp_path, capsys, aq):
    folder = write(tmp_path, False)[0]
    for path in (folder / "circuit_detector_error_model.dem", folder / "circuit_noisy.stim"):
        path.unlink()
    wide = aq.save(tmp_path / "wide.pth", aq.new_decoder(distance=5))
    assert google.main([str(folder), str(wide), "--basis", "Z", "--rounds", "3", "--distance", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "  no error model and no noisy circuit: matching cannot decode it"
    assert (
        "the decoder given       cannot decode it: the circuit is of distance=3, the decoder of distance=5" in lines[3]
    )
    assert google.main([str(tmp_path), "--rounds", "9"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "rounds=9" in err and err.count("\n") == 1
