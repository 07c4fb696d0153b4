from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from engines.errors import InputError
from sweeps.settings import (
    DECODER,
    DECODER_FUSION,
    DECODER_PRETRAIN,
    DECODER_SIZES,
    DECODER_WORKLOAD,
    DISTILL,
    PROFILES,
    PRUNE,
    WORKLOAD,
    Resolved,
    flat_params,
    parse_set,
    resolve,
)
from sweeps.spec import SettingsFile
from trainables import evaluate

SHIPPED = (WORKLOAD, DISTILL)
DECODERS = (DECODER_WORKLOAD, DECODER_SIZES, DECODER, DECODER_FUSION, DECODER_PRETRAIN)


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    epochs: int = Field(ge=1)
    rate: float = Field(gt=0)
    word: str = "a"

    @model_validator(mode="after")
    def _together(self) -> "Model":
        if self.word == "long" and self.epochs < 5:
            raise ValueError(f"word=long needs epochs >= 5, found epochs={self.epochs}")
        return self


GOOD = "defaults: {epochs: 3, rate: 1.0e-3, word: a}\nprofiles: {demo: {epochs: 1}}\n"


def file(tmp_path: Path, text: str = GOOD) -> SettingsFile:
    path = tmp_path / "toy.yaml"
    path.write_text(text)
    return SettingsFile(str(path), Model)


@pytest.mark.parametrize("profile", PROFILES)
def test_shipped_settings_are_valid_in_every_profile(profile: str) -> None:
    resolved = resolve(SHIPPED, profile, {})
    assert resolved.values["sampled_pairs"] == 20 and resolved.values["neighbours"] == 4
    assert (resolved.values["heads"], resolved.values["ffn"]) == (0.7, 0.7)
    depths = (resolved.values["depth"], resolved.values["dec_depth"])
    assert depths == ((0.7, 0.7) if profile == "full" else (0.5, 1.0)), "7 of 10 layers either way"
    assert resolved.values["workload_seed"] == 42


@pytest.mark.parametrize("profile", PROFILES)
def test_pruning_settings_are_valid_in_every_profile(profile: str) -> None:
    values = resolve((WORKLOAD, PRUNE), profile, {}).values
    assert 0 < values["rho"] < 1 and values["steps"] == 1


@pytest.mark.parametrize("shipped", (*SHIPPED, PRUNE, *DECODERS), ids=lambda shipped: shipped.name)
def test_shipped_files_explain_every_key_and_profiles_list_only_differences(shipped: SettingsFile) -> None:
    text = shipped.path.read_text()
    whole = yaml.safe_load(text)
    for key in (*whole["defaults"], *whole["defaults"].get("sizes", {}).get("teacher", {})):
        line = next(line for line in text.splitlines() if line.strip().startswith(f"{key}:"))
        assert "#" in line and len(line.split("#", 1)[1].strip()) > 10, f"{key} is not explained"
    for profile, entries in whole["profiles"].items():
        same = [key for key, value in entries.items() if whole["defaults"][key] == value]
        assert not same, f"{profile} repeats {same}"


def test_the_plans_scale() -> None:
    assert resolve(SHIPPED, "small", {}).values["epochs"] == 30
    assert resolve(SHIPPED, "full", {}).values["image_size"] == "512x512"


def test_profile_then_set_win_over_defaults(tmp_path: Path) -> None:
    files = [file(tmp_path)]
    assert resolve(files, "small", {}).values == {"epochs": 3, "rate": 1e-3, "word": "a"}
    assert resolve(files, "demo", {}).values["epochs"] == 1
    assert resolve(files, "demo", parse_set(["epochs=9", "rate=2e-4"])).values == {
        "epochs": 9,
        "rate": 2e-4,
        "word": "a",
    }


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    text = "defaults: {epochs: 0, rates: 1, rate: fast, word: a}\n"
    text += "profiles: {demo: {wort: b}, hugo: {}}\nextra: 1\n"
    with pytest.raises(InputError) as caught:
        resolve([file(tmp_path, text)], "demo", {"epoch": 3})
    said = str(caught.value)
    assert "\n" not in said
    for part in ("epochs=0", "'rates': did you mean 'rate'", "rate='fast'", "'wort': did you mean 'word'"):
        assert part in said
    assert "hugo" in said and "'extra'" in said and "--set epoch: unknown key 'epoch': did you mean 'epochs'?" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("defaults: {epochs: 3\n  rate: [", "line "),
        ("epochs: 3\n", "expected a mapping `defaults:`"),
        ("defaults: {epochs: 3, word: a}\n", "key 'rate' is missing"),
        (
            "defaults: {epochs: 3, rate: 1, word: a}\nprofiles: [demo]\n",
            "expected a mapping under `profiles:`",
        ),
        ("defaults: {epochs: 3, rate: 1, word: long}\n", "word=long needs epochs >= 5, found epochs=3"),
        ("defaults: !!python/object/apply:os.system ['true']\n", "not YAML"),
        ("", "expected a mapping `defaults:`"),
    ],
)
def test_bad_files_end_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve([file(tmp_path, text)], "small", {})
    assert said in str(caught.value) and "toy.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none.yaml: cannot be read"):
        resolve([SettingsFile(str(tmp_path / "none.yaml"), Model)], "small", {})


def test_trial_parameters_are_checked_like_settings() -> None:
    resolved = resolve(SHIPPED, "small", {})
    resolved.with_params({"T": 3, "lr": 1e-4}, "K-1")
    with pytest.raises(InputError) as caught:
        resolved.with_params({"T": 0, "gama": 0.1}, "K-9")
    assert "trial K-9: T=0" in str(caught.value) and "did you mean 'gamma'" in str(caught.value)


def test_the_workload_hash_follows_the_workload_alone() -> None:
    def hashed(**changes: object) -> str:
        resolved: Resolved = resolve(SHIPPED, "small", changes)
        return resolved.workload_hash

    assert hashed() == hashed(epochs=7) != hashed(sampled_pairs=21)


def test_the_workload_hash_follows_its_listed_pairs() -> None:
    """The real ones: a change of the rooms, which shows in the pairs, is another workload; of the teacher, none."""

    def hashed(**changes: object) -> str:
        resolved: Resolved = resolve(SHIPPED, "demo", changes)
        job = {"domain": "dust3r", "settings": dict(resolved.values), "seed": 1, "trials": []}
        return resolved.identified(*evaluate.identify(job)).workload_hash

    assert hashed() == hashed(lr=1e-3) != hashed(workload_seed=43)
    plain = resolve(SHIPPED, "demo", {})
    one, other = ({"pairs": [[0, 1, scene]]} for scene in (2, 3))
    assert plain.identified({}, one).workload_hash != plain.identified({}, other).workload_hash
    assert plain.identified({"teacher": "a"}, one).workload_hash == plain.identified({}, one).workload_hash


def test_a_teachers_path_is_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve(SHIPPED, "demo", {"teacher": "a/b.pth"}).values["teacher"] == str(tmp_path / "a" / "b.pth")
    assert resolve(SHIPPED, "demo", {}).values["teacher"] == "shipped"


def test_what_was_set_is_blamed_on_the_flag_and_not_on_the_file(tmp_path: Path) -> None:
    given = parse_set(["epochs=five", "beta={step: [0.5], shares: [0.5, 0.5]}", "gamma=-1"])
    with pytest.raises(InputError) as caught:
        resolve(SHIPPED, "demo", given)
    said = str(caught.value).split("; ")
    for part in ("--set epochs=five: ", '--set beta={"step": [0.5], "shares": [0.5, 0.5]}: ', "--set gamma=-1: "):
        assert any(one.startswith(part) for one in said), said
    assert ".yaml" not in str(caught.value)
    with pytest.raises(InputError, match=r"^--set batch_size=5000: batch_size=5000 is larger than"):
        resolve(SHIPPED, "demo", {"batch_size": 5000})


def test_flat_params_are_numbers() -> None:
    flat = flat_params({"T": 3, "beta": {"step": [0.5, 0.7], "shares": [0.7, 0.3]}, "init": "scratch", "on": True})
    assert flat == {
        "T": 3,
        "beta": 0.5,
        "beta_schedule": "step",
        "beta_end": 0.7,
        "beta_at": 0.7,
        "init": "scratch",
        "on": "true",
    }
    assert flat_params({"beta": 0.5}) == {"beta": 0.5}
