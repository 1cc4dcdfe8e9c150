"""What a study remembers beside its parameters, in a version that can be told."""

from pathlib import Path

import pytest
from optuna.trial import create_trial

from kvsharer_exp.search.study import open_study
from kvsharer_exp.search.study_store import VERSION, StudyStore
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.sharing_map import SharingMap
from tests.refusals import check_refusal

MAP = SharingMap((0, 0, 2, 0))


def test_everything_is_read_back_by_the_next_process(tmp_path: Path) -> None:
    with open_study("s", storage=None, folder=tmp_path) as store:
        assert (store.mlflow_run_id, store.front_runs, store.seeds, store.finals) == (
            "",
            [],
            None,
            {},
        )
        assert store.map_run(MAP) == ""
        assert store.held_out("key") == {}
        store.mlflow_run_id = "run"
        store.front_runs = ["a", "b"]
        store.seeds = [("paper greedy", MAP)]
        store.keep_final(KVPlan.of(MAP), [0.5])
        store.keep_final(KVPlan.of(MAP), [0.5, 0.25])
        store.keep_map_run(MAP, "child")
        store.keep_held_out("key", {MAP.digest: ({"kl": 0.5}, {"kl": [0.4, 0.6]})})
    with open_study("s", storage=None, folder=tmp_path) as store:
        assert store.mlflow_run_id == "run"
        assert store.front_runs == ["a", "b"]
        assert store.seeds == [("paper greedy", KVPlan.of(MAP))]
        assert store.finals == {MAP.digest: [0.5, 0.25]}
        assert store.map_run(MAP) == "child"
        assert store.held_out("key") == {MAP.digest: ({"kl": 0.5}, {"kl": [0.4, 0.6]})}
        assert store.held_out("other") == {}


def test_another_identity_is_refused_by_what_differs(tmp_path: Path) -> None:
    with open_study("s", storage=None, folder=tmp_path) as store:
        store.claim({"model": "a", "seed": 0})
        store.claim({"model": "a", "seed": 0})
        with pytest.raises(InputError, match="study s holds scores of another seed: "):
            store.claim({"model": "a", "seed": 1})


def test_a_section_that_differs_in_a_setting_is_refused_by_the_setting(tmp_path: Path) -> None:
    """It said "fit", and not what to set back."""
    fit = {"num_windows": 6, "window_tokens": 40, "sequential": False}
    with open_study("s", storage=None, folder=tmp_path) as store:
        store.claim({"fit": fit, "seed": 0})
        with pytest.raises(InputError, match=r"scores of another fit\.num_windows, seed: "):
            store.claim({"fit": {**fit, "num_windows": 5}, "seed": 1})
        with pytest.raises(InputError, match="scores of another fit: "):
            store.claim({"fit": {}, "seed": 0})


@pytest.mark.parametrize("first", [{"model": "a"}, {"model": "a", "prompt": 64}])
def test_what_only_one_of_two_identities_names_differs_too(tmp_path: Path, first: dict) -> None:
    """A study of prompts went on without them."""
    second = {"model": "a"} if "prompt" in first else {"model": "a", "prompt": 64}
    with open_study("s", storage=None, folder=tmp_path) as store:
        store.claim(first)
        with pytest.raises(InputError, match="study s holds scores of another prompt: "):
            store.claim(second)


def test_a_study_goes_on_with_its_own_fits_only(tmp_path: Path) -> None:
    """Fits were made again on another machine, and their plans were scored beside the old ones."""
    with open_study("s", storage=None, folder=tmp_path) as store:
        store.claim_fits({"a of layer 3": "0123", "c of layer 4": "4567"})
    with open_study("s", storage=None, folder=tmp_path) as store:
        store.claim_fits({"a of layer 3": "0123", "a of layer 5": "89ab"})  # more are welcome
        told = "another fit of a of layer 3 \\(of 2 in all\\): bring back the cache folder"
        with pytest.raises(InputError, match=told):
            store.claim_fits({"a of layer 3": "ffff", "a of layer 5": "ffff", "x": "0"})
        store.claim_fits({"c of layer 4": "4567"})  # what was refused has left no mark


def test_a_study_of_a_newer_version_is_refused_and_one_without_is_the_first(tmp_path: Path) -> None:
    with open_study("s", storage=None, folder=tmp_path) as store:
        study = store.study
        assert "version" not in study.user_attrs  # nothing is written by looking
        StudyStore(study).claim({"model": "a"})
        assert study.user_attrs["version"] == VERSION
        study.set_user_attr("version", VERSION + 1)
    with pytest.raises(InputError, match="use the newer kvsharer_exp that made it"):
        with open_study("s", storage=None, folder=tmp_path):
            pass


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("version", "1", lambda store: StudyStore(store.study)),
        ("identity", [1], lambda store: store.claim({"model": "a"})),
        ("mlflow_run_id", 7, lambda store: store.mlflow_run_id),
        ("front", {"a": 1}, lambda store: store.front_runs),
        ("seeds", [["paper", "0_2"]], lambda store: store.seeds),
        ("candidates", [[1, "1q4", "dear", 1, 2]], lambda store: store.candidates),
        ("finals digest", ["0.5"], lambda store: store.finals),
        ("finals", {"digest": ["0.5"]}, lambda store: store.finals),
        ("finals", [0.5], lambda store: store.finals),
        ("report key", {"digest": [{"kl": None}, {}]}, lambda store: store.held_out("key")),
        ("under way 000000", ["sampler"], lambda store: store.under_way()),
    ],
)
def test_a_damaged_attribute_is_refused_with_its_name(tmp_path, name, value, read) -> None:
    with open_study("s", storage=None, folder=tmp_path) as store:
        store.study.set_user_attr(name, value)
        with pytest.raises(InputError, match=r"study s holds damaged .*: give another") as error:
            read(store)
    check_refusal(f"kvsharer: {error.value}", "study.fresh=true")


def test_a_damaged_result_is_refused(tmp_path: Path) -> None:
    with open_study("s", storage=None, folder=tmp_path) as store:
        trial = create_trial(values=[0.5, 1.0], user_attrs={"result": '{"number": 0}'})
        store.study.add_trial(trial)
        with pytest.raises(InputError, match="study s holds damaged results"):
            store.results()
