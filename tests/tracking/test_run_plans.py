"""A run of MLflow is a plan: by its files, with the fits of its stand-ins, or by its tags."""

import json
from pathlib import Path

import pytest
import torch

from kvsharer_exp import FittedPlan, KVPlan, load_plan
from kvsharer_exp.model.fit_files import save_each, save_plan
from kvsharer_exp.model.fitted_plan import Fit
from kvsharer_exp.tracking.tracker import Tracker
from kvsharer_exp.values.errors import InputError
from tests.refusals import check_refusal
from tests.reporting.plan_sweep import FRONT

AFFINE = FRONT[2].plan
ORIGIN = {"model": "abc", "text": "def"}
FITTED = FittedPlan(AFFINE, {3: Fit({"bias": torch.ones(2)}, "norm", 0.5)}, ORIGIN)


@pytest.fixture(scope="module")
def sweep(tracker: Tracker, tmp_path_factory) -> str:
    """The run of a sweep: its front, the fits of the front, and two trials."""
    run_id = tracker.start_run("sweep", tags={}, params={})
    entries = [{"plan": str(AFFINE), "kv_fraction": 0.5}, {"plan": "0_1_2_3", "kv_fraction": 1.0}]
    tracker.log_text(run_id, json.dumps(entries), "front.json")
    folder = tmp_path_factory.mktemp("run") / "fits"
    save_each(folder, [FITTED], origin=ORIGIN)
    tracker.log_folder(run_id, folder)
    return run_id


def same(loaded: KVPlan | FittedPlan) -> bool:
    assert isinstance(loaded, FittedPlan)
    return (loaded.plan, loaded.keys, loaded.origin) == (FITTED.plan, FITTED.keys, ORIGIN)


def test_a_sweep_is_its_front_and_has_the_fits(sweep: str, uri: str) -> None:
    assert same(load_plan(f"{sweep}:0.5", tracking_uri=uri))
    assert load_plan(f"{sweep}:1.0", tracking_uri=uri) == KVPlan.full(4)


def test_a_trial_has_the_fits_of_its_sweep(sweep: str, tracker: Tracker, uri: str) -> None:
    trial = tracker.log_trial(sweep, FRONT[2], {})
    assert same(load_plan(trial, tracking_uri=uri))
    # A plan that did not come onto the front has none there, so Python is told to fit.
    beside = tracker.start_run("other sweep", tags={}, params={})
    with pytest.raises(InputError, match="make it with fit_plan"):
        load_plan(tracker.log_trial(beside, FRONT[2], {}), tracking_uri=uri)


def test_the_run_of_one_plan_has_its_fits(tracker: Tracker, uri: str, tmp_path: Path) -> None:
    run_id = tracker.start_run("evaluate", tags={}, params={})
    save_plan(tmp_path, FITTED)
    tracker.log_dict(run_id, {"plan": str(AFFINE)}, "result.json")
    for name in ("plan.json", "fits.safetensors"):
        tracker.log_bytes(run_id, (tmp_path / name).read_bytes(), name)
    assert same(load_plan(run_id, tracking_uri=uri))


def test_what_is_no_plan_is_one_line(
    sweep: str, tracker: Tracker, uri: str, tmp_path: Path
) -> None:
    trial, bare = tracker.log_trial(sweep, FRONT[2], {}), tracker.start_run("", tags={}, params={})
    for value, named in (
        ("f" * 32, "is not in this store: check tracking.uri"),
        (bare, "has no plan or map: give a sweep"),
        (f"{trial}:0.5", "has one plan at most: leave out :0.5"),
        (f"{sweep}:0.1", f"no plan of {sweep} keeps at most 0.1 of the KV: give 0.5 or more"),
        (sweep, f"name one like {sweep}:0.25"),
        (f"{sweep}:4", f"name one like {sweep}:0.25"),
        (f"{sweep}:", f"like {sweep}:0.25"),
        (f"{sweep}:nan", "'nan' names no plan of MLflow run"),
        (f"{sweep}:1.2.3", "'1.2.3' names no plan of MLflow run"),
    ):
        with pytest.raises(InputError) as error:
            load_plan(value, tracking_uri=uri)
        check_refusal(f"kvsharer: {error.value}", named)
    absent = f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(InputError, match="does not exist, so it has no runs"):
        load_plan(sweep, tracking_uri=absent)
    assert not list(tmp_path.iterdir())


def test_an_evaluated_run_has_one_plan(tracker: Tracker, uri: str) -> None:
    run_id = tracker.start_run("evaluate", tags={}, params={})
    tracker.log_dict(run_id, {"plan": "0_1q4_0_3"}, "result.json")
    for choice in ("0.5", "4"):
        with pytest.raises(InputError, match=f"{run_id} has one plan: leave out :{choice}"):
            load_plan(f"{run_id}:{choice}", tracking_uri=uri)


def test_damaged_fits_are_named_by_their_run(tracker: Tracker, uri: str, tmp_path: Path) -> None:
    run_id = tracker.start_run("sweep", tags={}, params={})
    tracker.log_text(run_id, json.dumps([{"plan": str(AFFINE), "kv_fraction": 0.5}]), "front.json")
    save_each(tmp_path / "fits", [FITTED], origin=ORIGIN)
    (fit,) = (tmp_path / "fits").iterdir()
    fit.write_bytes(fit.read_bytes()[:-8])
    tracker.log_folder(run_id, tmp_path / "fits")
    with pytest.raises(InputError) as error:
        load_plan(f"{run_id}:0.5", tracking_uri=uri)
    check_refusal(f"kvsharer: {error.value}", f"MLflow run {run_id} are damaged or missing")
