"""A run's plan tells its model, before the default model is loaded for it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from kvsharer_exp.cli.main import main
from kvsharer_exp.cli.session import loaded_model
from kvsharer_exp.tracking.tracker import Tracker
from tests.refusals import check_refusal

PLAN = "0_1_0_3_4_5"
QUICK = ("scoring.report.tasks=[]", "scoring.search.tasks=[]", "--quiet")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Callable[..., Path]:
    """Make the folder of a run with a front."""
    monkeypatch.chdir(tmp_path)

    def make(model_id: str = "wheel:gemma3_270m") -> Path:
        made = tmp_path / "run of a sweep"
        made.mkdir()
        entry = {"plan": PLAN, "kv_source_layers": [0, 1, 0, 3, 4, 5], "kv_fraction": 0.8}
        about = {"schema": 1, "command": "sweep", "model": {"id": model_id}, "front": [entry]}
        (made / "result.json").write_text(json.dumps({**about, **entry}))
        (made / "front.json").write_text(json.dumps([entry]))
        return made

    return make


@pytest.fixture
def refuse(store, monkeypatch, capfd) -> Callable[..., None]:
    """Run a command where every way to a model fails."""
    monkeypatch.setattr(loaded_model, "load", lambda spec: pytest.fail("a model is loaded"))

    def call(names: str, *words: str) -> None:
        capfd.readouterr()
        assert main([*words, *store, "--quiet"]) == 2
        check_refusal(capfd.readouterr().err, names)

    return call


@pytest.fixture
def trial(store: list[str]) -> str:
    """A trial of a sweep on Gemma, in MLflow."""
    uri, place = (word.partition("=")[2] for word in store)
    tracker = Tracker.open(uri, artifacts=f"{place}/artifacts")
    tags = {"command": "sweep", "model": "gemma3_270m", "model_id": "wheel:gemma3_270m"}
    sweep = tracker.start_run("a sweep", tags=tags, params={})
    tracker.finish(sweep)
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_run(sweep).info.experiment_id
    tags = {"mlflow.parentRunId": sweep, "plan": PLAN, "kv_source_layers": PLAN}
    made: str = client.create_run(experiment, tags=tags).info.run_id
    client.set_terminated(made)
    return made


def test_a_run_folder_tells_the_model_and_what_to_add(folder, refuse) -> None:
    run = folder()
    says = "is of model gemma3_270m, not smollm2: give model=gemma3_270m too, or the "
    refuse(says, "evaluate", f"plan={run}")
    refuse(says, "bench", f"plan={run}/front.json:0.9")
    refuse(says, "export", f"map={run}/front.json:1")
    refuse(says, "generate", f"map={run}/result.json", "generate.prompt=Hello")
    refuse(says, "plan", f"plan={PLAN}", f"compare={run}")
    refuse(says, "ablate", f"map={run}/front.json:1", "ablate.arms=[given]")


def test_a_run_of_mlflow_tells_it_too(trial, refuse, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    says = f"={trial} is of model gemma3_270m, not smollm2: give model=gemma3_270m too"
    for word in ("plan", "map"):
        refuse(says, "evaluate", f"{word}={trial}")


@pytest.mark.parametrize(
    ("model_id", "says"),
    [
        (
            "Qwen/Qwen3-0.6B",
            "is of model Qwen/Qwen3-0.6B, not smollm2: give model.source=Qwen/Qwen",
        ),
        (
            "my_weights",
            "is of model my_weights, not smollm2: give model.source= with its place too",
        ),
        (f"{'x' * 80}/{'y' * 80}", "give model.source= with its place too"),
    ],
)
def test_a_model_without_a_choice_is_named_by_its_source(
    model_id: str, says: str, folder, refuse
) -> None:
    refuse(says, "evaluate", f"plan={folder(model_id)}")


@pytest.fixture
def evaluate(store, monkeypatch) -> Callable[..., bool]:
    """Run ``evaluate`` up to where it loads a model; says whether it came there."""

    def stop(spec: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loaded_model, "load", stop)
    return lambda *words: main(["evaluate", *words, *store, *QUICK]) == 130


@pytest.mark.parametrize("word", ["model=tiny", "model.source=random:tiny"])
def test_a_model_that_is_given_is_taken(word: str, folder, evaluate) -> None:
    """A plan may be tried on another model on purpose."""
    assert evaluate(f"plan={folder()}", word)


def test_a_plan_of_the_default_model_and_one_as_text_are_taken(folder, evaluate) -> None:
    assert evaluate(f"plan={folder('wheel:smollm2')}")
    assert evaluate(f"plan={PLAN}")


@pytest.mark.parametrize("content", ["{", "[]", '{"model": null}', '{"model": {"id": 3}}', "\0"])
def test_a_damaged_result_tells_no_model(content: str, folder, evaluate) -> None:
    run = folder()
    (run / "result.json").write_text(content)
    assert evaluate(f"plan={run}/front.json:0.9")
