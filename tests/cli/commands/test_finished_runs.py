"""What reads finished runs, of which one of each command is made.

``report``: its files, where a cell is from, every way to name runs wrongly. ``reproduce``: a run
again matches, and one that was tampered with does not.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from kvsharer_exp import FittedPlan, KVPlan, load_plan
from kvsharer_exp.cli.argv import translate
from kvsharer_exp.cli.main import main
from kvsharer_exp.cli.session import plans
from tests.browser import CHROMIUM, browser
from tests.cli.commands.conftest import EXPERIMENT, QUICK, id_of, read
from tests.refusals import check_refusal


@pytest.fixture
def report(tmp_path: Path, own):
    def call(*words: str) -> dict:
        assert main(["report", *own, f"hydra.run.dir={tmp_path / 'made'}", *words]) == 0
        return read(tmp_path / "made")

    return call


def test_runs_by_id_and_by_folder_give_tables_that_name_their_runs(
    report, runs, tmp_path, store, capsys
) -> None:
    ids = {name: id_of(folder) for name, folder in runs.items()}
    named = f"run={runs['search']},{ids['evaluate']},{ids['bench']},{ids['ablate']},{ids['sweep']}"
    result = report(named)
    assert [run["mlflow_run_id"] for run in result["runs"]] == list(
        ids[name] for name in ("search", "evaluate", "bench", "ablate", "sweep")
    )
    scored = read(runs["evaluate"])
    value = next(
        v
        for v in result["values"]
        if v["mlflow_run_ids"] == [ids["evaluate"]]
        and (v["quantity"], v["num_shared"]) == ("perplexity/report", 2)
    )
    assert value["value"] == scored["scores"]["perplexity/report"]
    assert value["retained"] == scored["retained"]["perplexity/report"]
    rows = read(runs["ablate"])["rows"]
    told = {i for v in result["values"] for i in v["mlflow_run_ids"]}
    assert {row["mlflow_run_id"] for row in rows} <= told
    client = MlflowClient(tracking_uri=store[0].partition("=")[2])
    assert all(client.get_run(run_id).info.status == "FINISHED" for run_id in told)
    markdown = (tmp_path / "made" / "report.md").read_text()
    latex = (tmp_path / "made" / "report.tex").read_text()
    assert all(run_id in markdown and run_id in latex for run_id in told)
    assert latex.count(r"\begin{tabular}") == markdown.count("\n## ") - 2 + (
        "## What the paper reports" not in markdown
    )
    own_run = client.get_run(result["mlflow_run_id"])
    assert own_run.info.status == "FINISHED"
    logged = {file.path for file in client.list_artifacts(result["mlflow_run_id"])}
    assert {"report.md", "report.tex", "report.html", "result.json"} <= logged
    assert "retained_perplexity.png" in logged
    assert "Perplexity of held-out text" in capsys.readouterr().out


def test_a_value_that_the_paper_has_stands_beside_it(report, runs, tmp_path, capsys) -> None:
    """The tiny model's run under the name of one of the paper's, in a folder of its own."""
    result = read(runs["search"])
    result["model"] |= {"id": "meta-llama/Llama-2-7b-chat-hf", "num_layers": 32}
    result["results"][0] |= {"found": 8, "requested": 8, "seconds": 75.0}
    result |= {"threshold": 0.5, "mlflow_run_id": "0" * 32}
    copied = tmp_path / "copied"
    (copied / ".hydra").mkdir(parents=True)
    (copied / "result.json").write_text(json.dumps(result))
    config = (runs["search"] / ".hydra" / "config.yaml").read_text()
    for a, b in (("num_windows: 3", "num_windows: 30"), ("window_tokens: 16", "window_tokens: 64")):
        assert a in config
        config = config.replace(a, b)
    (copied / ".hydra" / "config.yaml").write_text(config)
    made = report(f"run={copied}")
    value = next(v for v in made["values"] if v["num_shared"] == 8)
    assert (value["quantity"], value["paper"]) == ("search/seconds", 60)
    assert value["difference"] == 15
    shown = " ".join(capsys.readouterr().out.split())
    assert "≈ 60" in shown
    assert "+15" in shown


def test_without_run_the_newest_are_taken_and_named(report, runs, capsys) -> None:
    result = report()
    assert {run["mlflow_run_id"] for run in result["runs"]} == {id_of(f) for f in runs.values()}
    said = capsys.readouterr().out
    assert all(f"newest   {id_of(folder)}" in said for folder in runs.values())


@pytest.mark.parametrize(
    ("words", "override"),
    [
        ("run=a,b", "run=[a,b]"),
        ("run=[a,b]", "run=[a,b]"),
        ("run='a,b'", "run='a,b'"),
        ("run=a", "run=a"),
    ],
)
def test_several_runs_need_no_brackets(words: str, override: str) -> None:
    assert override in translate(["report", words])
    assert "run=a,b" in translate(["reproduce", "-m", "run=a,b"])


def tampered(runs: dict[str, Path], tmp_path: Path, **changes: object) -> str:
    """A copy of a run's folder whose result.json says something else."""
    result = read(runs["search"]) | changes
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "result.json").write_text(json.dumps(result))
    return f"run={tmp_path / 'copy'}"


REFUSALS = {
    "prefix": lambda runs, path, store: (f"run={id_of(runs['sweep'])[:8]}", id_of(runs["sweep"])),
    "typing error": lambda runs, path, store: (
        f"run={id_of(runs['sweep'])[:-1]}x",
        f"did you mean {id_of(runs['sweep'])}?",
    ),
    "no such run": lambda runs, path, store: ("run=nonsense", "run nonsense is not in this store"),
    "child": lambda runs, path, store: (child_of(runs), f"one map of run {id_of(runs['ablate'])}"),
    "running": lambda runs, path, store: (started(store, "RUNNING"), "has not finished (RUNNING)"),
    "failed": lambda runs, path, store: (started(store, "FAILED"), "ended as FAILED"),
    "no result": lambda runs, path, store: (started(store, "FINISHED"), "has no result.json"),
    "empty folder": lambda runs, path, store: (f"run={path}", "has no result.json"),
    "older": lambda runs, path, store: (
        tampered(runs, path, schema=0),
        "was made with schema 0, this version reads 1: run it again (kvsharer search",
    ),
    "newer": lambda runs, path, store: (tampered(runs, path, schema=99), "use the newer"),
    "kind": lambda runs, path, store: (
        tampered(runs, path, command="calibrate"),
        "is of kind 'calibrate': give a run of search, sweep, evaluate, bench, ablate",
    ),
    "empty": lambda runs, path, store: ("run=[]", "run=[]: give MLflow run ids or run folders"),
    "nested": lambda runs, path, store: ("run=[[a]]", "give MLflow run ids or run folders"),
    "no store": lambda runs, path, store: (
        f"tracking.uri=sqlite:///{path}/none/mlflow.db",
        "does not exist, so it has no runs",
    ),
    "no runs": lambda runs, path, store: (
        "tracking.experiment=tests of no report",
        "no finished run in this store",
    ),
}


def child_of(runs: dict[str, Path]) -> str:
    rows = read(runs["ablate"])["rows"]
    return f"run={rows[0]['mlflow_run_id']}"


def started(store: list[str], status: str) -> str:
    client = MlflowClient(tracking_uri=store[0].partition("=")[2])
    experiment = client.get_experiment_by_name(EXPERIMENT)
    run = client.create_run(experiment.experiment_id)
    if status != "RUNNING":
        client.set_terminated(run.info.run_id, status)
    return f"run={run.info.run_id}"


@pytest.mark.parametrize(
    ("case", "command"),
    [*((case, "report") for case in REFUSALS), ("older", "reproduce"), ("prefix", "reproduce")],
)
def test_bad_input_is_one_line(case: str, command: str, runs, tmp_path, own, capfd) -> None:
    override, named = REFUSALS[case](runs, tmp_path, own)
    capfd.readouterr()
    assert main([command, *own, override, f"hydra.run.dir={tmp_path / 'made'}"]) == 2
    check_refusal(capfd.readouterr().err, named)
    assert not (tmp_path / "made" / "result.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_the_page_opens_without_a_network(report, runs, tmp_path) -> None:
    report(f"run={','.join(map(str, runs.values()))}")
    with browser(tmp_path / "p", "--host-resolver-rules=MAP * 0.0.0.0", size=(1200, 3000)) as page:
        page.open((tmp_path / "made" / "report.html").as_uri())
        page.wait("document.body && document.body.innerText.includes('Environment of this report')")
        assert "Perplexity of held-out text" in page.text
        assert page.errors == []
        assert {url.partition(":")[0] for url in page.requests} == {"file", "data"}
        loaded = page.run("[...document.images].map(i => i.complete && i.naturalWidth > 99)")
        assert len(loaded) > 5
        assert all(loaded)
        links = page.run("[...document.querySelectorAll('td a')].map(a => a.href)")
        assert all(re.search("/runs/[0-9a-f]{32}", link) for link in links)
        too_wide = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
        assert not page.run(too_wide)


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


@pytest.mark.parametrize(
    "words",
    [("evaluate",), ("bench", "bench.contexts=[12]", "bench.new_tokens=2", "bench.repeats=1")],
    ids=lambda words: words[0],
)
def test_a_run_of_a_plan_is_reproduced_with_the_same_fits(
    words: tuple[str, ...], store, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(plans, "cache_dir", lambda: tmp_path / "cache")
    plan = KVPlan.parse("0_1q4g8s2_0_c_4_a")
    few = ("fit.num_windows=4", "fit.window_tokens=16", f"plan={plan}")
    own = (*store, "tracking.experiment=tests of plans made again", "--quiet")
    first_dir, made_dir = tmp_path / "first", tmp_path / "made"
    assert main([*words, *QUICK, *few, *own, f"hydra.run.dir={first_dir}"]) == 0
    shutil.rmtree(tmp_path / "cache")  # so that the fits are made again
    words = (f"run={id_of(first_dir)}", "reproduce.tolerance=0", f"hydra.run.dir={made_dir}")
    assert main(["reproduce", *own, *words]) == 0
    result = read(made_dir)
    assert result["matches"]
    assert {value["verdict"] for value in result["values"]} == {"exact"}
    first, again = (load_plan(folder) for folder in (first_dir, made_dir / "again"))
    assert isinstance(first, FittedPlan) and isinstance(again, FittedPlan)
    assert (again.plan, again.keys) == (plan, first.keys)


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
