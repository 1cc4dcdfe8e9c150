"""``reproduce``: a recorded run again matches; one that was tampered with does not, exit code 1."""

import json
import shutil
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from kvsharer_exp.cli.main import main
from tests.cli.commands.conftest import read


@pytest.fixture
def reproduce(tmp_path: Path, own):
    def call(*words: str) -> tuple[int, dict]:
        folder = tmp_path / f"again{len(list(tmp_path.iterdir()))}"
        code = main(["reproduce", *own, f"hydra.run.dir={folder}", "--quiet", *words])
        return code, {**read(folder), "folder": folder}

    return call


@pytest.mark.parametrize(
    "name",
    [
        *("search", "ablate", "sweep"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("evaluate", "bench")),
    ],
)
@pytest.mark.slow
def test_a_run_twice_matches_to_the_last_digit(name: str, runs, reproduce, store, capsys) -> None:
    before = read(runs[name])
    code, result = reproduce(f"run={before['mlflow_run_id']}", "reproduce.tolerance=0")
    assert code == 0
    assert result["matches"]
    assert {value["verdict"] for value in result["values"]} == {"exact"}
    assert len(result["values"]) > 20
    assert not any("seconds" in value["path"] for value in result["values"])
    assert result["surroundings"] == []
    assert result["reproduces"] == before["mlflow_run_id"] != result["mlflow_run_id"]
    again = read(result["folder"] / "again")
    assert again["command"] == name
    assert again["seed"] == 3
    client = MlflowClient(tracking_uri=store[0].partition("=")[2])
    run = client.get_run(result["mlflow_run_id"])
    assert run.data.tags["reproduces"] == before["mlflow_run_id"]
    assert "reproduction.md" in {f.path for f in client.list_artifacts(run.info.run_id)}
    if name == "sweep":
        assert again["study"] != before["study"]
        assert again["trials"] == before["trials"]
    shown = capsys.readouterr().out
    assert f"Reproduced: {len(result['values'])} of {len(result['values'])} values" in shown


def test_a_tampered_result_does_not_match(runs, reproduce, tmp_path, capsys) -> None:
    folder = Path(shutil.copytree(runs["search"], tmp_path / "copy"))
    told = read(folder)
    told["results"][0]["kv_source_layers"] = [0, 1, 2, 3, 4, 4]
    told["results"][0]["trace"][0]["cosine"] += 1e-4
    told["results"][1]["trace"][0]["cosine"] *= 1 + 1e-9
    told["versions"]["torch"] = "0.1"
    (folder / "result.json").write_text(json.dumps(told))
    code, result = reproduce(f"run={folder}")
    assert code == 1
    assert not result["matches"]
    verdicts = {v["path"]: v["verdict"] for v in result["values"] if v["verdict"] != "exact"}
    assert verdicts == {
        "results[0].kv_source_layers": "differs",
        "results[0].trace[0].cosine": "differs",
        "results[1].trace[0].cosine": "within tolerance",
    }
    assert [one["what"] for one in result["surroundings"]] == ["versions.torch"]
    shown = capsys.readouterr().out
    assert "NOT reproduced: 2 differ" in shown
    assert shown.index("versions.torch") < shown.index("NOT reproduced")
    page = (result["folder"] / "reproduction.md").read_text()
    assert "| results[0].kv_source_layers | 0_1_2_3_4_4 |" in page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run=[a,b]",), "reproduce takes one run, 2 given"),
        ((), "reproduce takes one run, 0 given: give run="),
        (("run=a", "seed=1"), "reproduce runs what was recorded: leave out seed=1"),
        (("run=a", "model=tiny"), "leave out model=tiny"),
        (("run=a", "reproduce.tolerance=1"), "reproduce.tolerance=1"),
    ],
)
def test_what_would_be_ignored_is_refused(words, said, store, tmp_path, capfd) -> None:
    assert main(["reproduce", *store, f"hydra.run.dir={tmp_path}", *words]) == 2
    error = capfd.readouterr().err.strip()
    assert said in error
    assert "\n" not in error
