"""Plans that are no maps in MLflow: a file, tags, and params by which runs are compared."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest
from mlflow.tracking import MlflowClient

from kvsharer_exp.cli.steps.sweep_outputs import mark_front
from kvsharer_exp.tracking.tracker import Tracker
from kvsharer_exp.tracking.views import front_view
from kvsharer_exp.values.plan import KVPlan
from tests.reporting.plan_sweep import FRONT, SWEEP, entry


@pytest.fixture(scope="module")
def client(uri: str) -> MlflowClient:
    return MlflowClient(tracking_uri=uri)


@pytest.fixture(scope="module")
def marked(tracker: Tracker) -> tuple[str, list[str]]:
    """The front of the small sweep as ``mark_front`` leaves it: parent, and the members' runs."""
    parent = tracker.start_run("parent", tags={}, params={})
    runs = [tracker.log_trial(parent, member, {}) for member in FRONT]
    entries = [entry(member, 24.0, run) for member, run in zip(FRONT, runs, strict=True)]
    log = SimpleNamespace(tracker=tracker, run_id=parent, delivering=lambda what: nullcontext())
    kept = SimpleNamespace(front_runs=[])
    for _ in range(2):  # a sweep that is continued marks its front again
        mark_front(log, kept, replace(SWEEP, entries=entries))
    assert kept.front_runs == runs
    return parent, runs


def test_a_front_plan_is_a_logged_model_with_plan_json(client, marked) -> None:
    run = client.get_run(marked[1][2])
    (output,) = run.outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert model.model_type == "KV plan"
    assert model.name == "tiny - 2 own at 10 bits- 1 read- 1 affine"
    assert model.tags["plan"] == "0_1q4s4_0k1v_a"
    assert model.tags["digest"] == FRONT[2].plan.digest
    assert model.params["actions"].startswith("0 own 16 bits, 1 own 4 bits, 2 read 0 keys")
    file = Path(unquote(urlsplit(model.artifact_location).path)) / "plan.json"
    assert KVPlan.parse(file) == FRONT[2].plan
    assert json.loads(file.read_text(encoding="utf-8"))["plan"] == "0_1q4s4_0k1v_a"


def test_runs_of_plans_are_compared_by_the_counts_of_their_kinds(client, marked) -> None:
    experiment = client.get_run(marked[0]).info.experiment_id
    found = client.search_runs([experiment], "params.affine = '1' and params.quantised = '1'")
    assert [run.info.run_id for run in found] == [marked[1][2]]
    data = found[0].data
    assert data.tags["plan"] == data.params["plan"] == "0_1q4s4_0k1v_a"
    assert data.tags["digest"] == FRONT[2].plan.digest
    assert data.params["mean_bits"] == "10"
    counts = {name: data.params[name] for name in ("own", "read", "drop", "constant")}
    assert counts == {"own": "2", "read": "1", "drop": "0", "constant": "0"}


def test_a_map_of_the_same_front_is_logged_as_ever(client, marked) -> None:
    run = client.get_run(marked[1][0])
    (output,) = run.outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert (model.name, model.model_type) == ("tiny - 1-4 shared", "sharing map")
    assert model.params == {"kv_source_layers": "0_1_0_3", "digest": FRONT[0].plan.digest}
    assert "own" not in run.data.params


def test_the_view_on_a_front_orders_plans_by_the_kv_that_they_keep(client, marked) -> None:
    parent, runs = marked
    state = front_view(parent, ["kl"])
    order = f"{state['orderByKey']} {'ASC' if state['orderByAsc'] else 'DESC'}"
    experiment = client.get_run(parent).info.experiment_id
    found = client.search_runs([experiment], state["searchFilter"], order_by=[order])
    kept = [member.footprint.kv_fraction for member in FRONT]
    assert [run.data.metrics["kv_fraction"] for run in found] == sorted(kept, reverse=True)
    assert {run.info.run_id for run in found} == set(runs)


def test_the_maps_of_the_front_are_found_and_plans_are_passed_over(tracker, marked) -> None:
    assert list(map(str, tracker.front_maps(marked[0]))) == ["0_1_0_3"]
