"""Every command end to end on the tiny model: what it writes, prints and keeps."""

import errno
import json
import re
from itertools import cycle, islice
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from kvsharer_exp.cli import main as cli
from kvsharer_exp.cli.main import main
from kvsharer_exp.measure.evaluator import Evaluator
from kvsharer_exp.model.fitted_plan import FittedPlan
from kvsharer_exp.model.folders import data_dir
from kvsharer_exp.model.sharing.architectures import attention_layers
from kvsharer_exp.search import finals
from kvsharer_exp.search.coordinator import MAX_REPEATS
from kvsharer_exp.search.seeds import SeedFile
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.sharing_map import SharingMap
from tests.tiny import tiny_model

LAYERS = 6
WITH_TASKS = (
    *("model=tiny", "calibration.num_windows=4", "calibration.window_tokens=24"),
    *("heldout.num_windows=2", "heldout.window_tokens=32"),
    *("scoring.report.limit=2", "scoring.search.limit=2", "study.screen_windows=[2]"),
    *("fit.num_windows=4", "fit.window_tokens=24", "search_space=layer_sources"),
)
QUICK = (*WITH_TASKS, "scoring.search.tasks=[]", "scoring.report.tasks=[]")


@pytest.fixture
def run(tmp_path: Path, monkeypatch, store):
    """Run a command in an empty folder; gives what it wrote to ``result.json``."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, quick: tuple[str, ...] = QUICK) -> dict:
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        assert main([*quick, *store, f"hydra.run.dir={folder}", *arguments]) == 0
        result = json.loads((folder / "result.json").read_text())
        assert result["schema"] == 1
        assert result["model"] == {
            "id": "random:tiny",
            "num_layers": LAYERS,
            "num_key_value_heads": 2,
            "head_dim": 16,
        }
        assert {"command", "seed", "seconds", "mlflow_run_id", "versions"} <= result.keys()
        assert client(store).get_run(result["mlflow_run_id"]).info.status == "FINISHED"
        return {**result, "folder": folder}

    return call


def client(store: list[str]) -> MlflowClient:
    return MlflowClient(tracking_uri=store[0].partition("=")[2])


def children(store: list[str], run_id: str) -> list:
    mlflow = client(store)
    experiment = mlflow.get_run(run_id).info.experiment_id
    chosen = f"tags.`mlflow.parentRunId` = '{run_id}'"
    return list(mlflow.search_runs([experiment], filter_string=chosen, max_results=500))


def test_calibrate_ranks_every_pair(run) -> None:
    result = run("calibrate")
    assert len(result["ranking"]) == LAYERS * (LAYERS - 1) // 2
    distances = [pair["distance"] for pair in result["ranking"]]
    assert distances == sorted(distances, reverse=True)
    assert result["distances"][0] == [None] * LAYERS
    assert (result["folder"] / "distances.png").read_bytes().startswith(b"\x89PNG")


def test_search_gives_a_map_and_a_trace_for_every_ratio(run, capsys) -> None:
    result = run("search", "compression.ratios=[0.34,0.5]", "search.threshold=-1")
    assert [row["requested"] for row in result["results"]] == [2, 3]
    for row in result["results"]:
        assert row["found"] == row["requested"] == len(SharingMap(row["kv_source_layers"]).targets)
        assert row["candidates"] == len(row["trace"])
        assert all(step["accepted"] for step in row["trace"])
        assert row["seconds"] >= 0
    assert "evaluate" in capsys.readouterr().out


def test_search_says_when_too_few_pairs_pass(run, capsys) -> None:
    result = run("search", "compression.ratios=[0.5]", "search.threshold=1")
    assert result["results"][0]["found"] == 0
    assert result["results"][0]["candidates"] == 15
    assert "only 0 of the 3 layers asked for were found" in capsys.readouterr().out


def test_search_without_the_acceptance_test(run) -> None:
    result = run("search", "search.acceptance=false", "compression.ratios=[0.5]")
    assert result["results"][0]["found"] == result["results"][0]["candidates"] == 3
    assert result["results"][0]["trace"][0]["cosine"] is None


@pytest.mark.parametrize("written", ["0_1_2_1_4_4", "[0,1,2,1,4,4]", "map.json"])
def test_evaluate_scores_a_map_beside_the_full_cache(
    run, tmp_path: Path, written: str, store, capsys
) -> None:
    (tmp_path / "map.json").write_text('{"kv_source_layers": [0, 1, 2, 1, 4, 4]}')
    result = run("evaluate", f"map={written}", quick=WITH_TASKS)
    assert result["kv_source_layers"] == [0, 1, 2, 1, 4, 4]
    assert result["scores"].keys() == result["full"]["scores"].keys()
    assert result["scores"]["kl"] > 0
    assert result["full"]["scores"]["kl"] == pytest.approx(0, abs=1e-6)
    full, shared = (s["perplexity/report"] for s in (result["full"]["scores"], result["scores"]))
    assert result["retained"]["perplexity/report"] == pytest.approx(full / shared)
    size = result["footprint"]
    assert size["kv_fraction"] == pytest.approx(4 / 6)
    measured = size["measured"]
    assert measured["cache_bytes"] == size["kv_bytes_per_token"] * measured["tokens"]
    said = " ".join(capsys.readouterr().out.split())
    assert f"next kvsharer sweep model=tiny {' '.join(WITH_TASKS[1:5])}" in said
    assert re.search(r"\bkl (\W )?0 (\W )?0\.", said)  # of the full cache, and no rounding noise
    # As a model of random weights does: neither copies nor guesses better than chance.
    assert re.search(r"The full cache fails .*wiki_next acc_norm \([0-9.]+\), copying", said)
    assert "lm_eval/wiki_next/acc" not in result["retained"]
    assert result["pass_marks"].keys() == {f"lm_eval/wiki_next/{m}" for m in ("acc", "acc_norm")}
    low, high = result["intervals"]["kl"]
    assert 0 < low < result["scores"]["kl"] < high
    assert f"{result['scores']['kl']:.4g} ({low:.3g}–{high:.3g})" in said
    low, high = result["intervals"]["retained/perplexity/report"]
    assert low < result["retained"]["perplexity/report"] < high
    assert f"({low:.1%}–{high:.1%})" in said
    metrics = client(store).get_run(result["mlflow_run_id"]).data.metrics
    assert metrics["low/retained/perplexity/report"] == pytest.approx(low)
    assert metrics["high/retained/perplexity/report"] == pytest.approx(high)


def test_evaluate_explains_no_brackets_where_one_window_gives_none(run, capsys) -> None:
    one = ("heldout.num_windows=1", "scoring.num_windows=1", "study.screen_windows=[]")
    run("evaluate", "map=0_1_2_1_4_4", *one)
    said = capsys.readouterr().out
    assert "perplexity/report" in said and "In brackets" not in said


def test_sweep_gives_a_front_and_continues(run, store, capsys) -> None:
    sweep = ("sweep", "study.name=continues", "study.storage=continues.journal")
    first, again, same = (run(*sweep, f"study.n_trials={n}", quick=WITH_TASKS) for n in (8, 12, 12))
    assert first["study"] == again["study"] == "continues"
    assert first["mlflow_run_id"] == again["mlflow_run_id"] == same["mlflow_run_id"]
    for entry in (entry for result in (first, same) for entry in result["front"]):
        if entry["num_shared"]:  # also of plans that were scored when the full cache was not
            low, high = entry["intervals"]["retained/perplexity/report"]
            assert low < entry["retained"]["perplexity/report"] < high
            assert "lm_eval/wiki_next/acc" not in entry["retained"]
    counted = [
        sum(r["trials"][s] for s in ("complete", "screened_out", "failed"))
        for r in (first, again, same)
    ]
    assert counted == [8, 12, 12]
    assert [r["trials_at_start"] for r in (first, again, same)] == [0, 8, 12]
    assert again["hypervolume"] >= first["hypervolume"] > 0
    assert same["front"] == again["front"]
    runs = {r.info.run_id: r for r in children(store, first["mlflow_run_id"])}
    assert len(runs) == 12
    assert len({r.data.tags["digest"] for r in runs.values()}) == 12
    fractions = [entry["kv_fraction"] for entry in again["front"]]
    assert fractions == sorted(fractions, reverse=True)
    for entry in again["front"]:
        assert entry["num_shared"] == len(SharingMap(entry["kv_source_layers"]).targets)
        assert runs[entry["mlflow_run_id"]].data.tags["front"] == "true"
        assert entry["scores"].keys() == again["full"]["scores"].keys()
        assert "perplexity/report" in entry["retained"]
    marked = {r for r, found in runs.items() if found.data.tags["front"] == "true"}
    assert marked == {entry["mlflow_run_id"] for entry in again["front"]}
    for name in ("front.html", "front.png", "front.md", "front.json", "ranking.json"):
        assert (again["folder"] / name).stat().st_size > 0
    names = {a.path for a in client(store).list_artifacts(first["mlflow_run_id"])}
    assert {"front.html", "front.png", "distances.png", "result.json", "config.yaml"} <= names
    assert "continuing study continues" in capsys.readouterr().out


FINALS = ("study.margin=9", "study.name=finals", "scoring.window_tokens=32")


@pytest.mark.slow
def test_more_text_decides_between_the_best_of_each_size(run, store, monkeypatch) -> None:
    monkeypatch.setattr(finals, "MARGIN", 5.0)  # random maps are seldom close
    sweep = ("sweep", *FINALS, "study.n_trials=20", "scoring.num_windows=2")
    found = run(*sweep, "study.final_windows=16")
    held = found["finals"]
    assert held["windows"] in (8, 16)
    best = [entry for entry in held["maps"] if entry["on_front"]]
    front = [(e["digest"], e["num_shared"]) for e in found["front"]]
    assert [(e["digest"], e["num_shared"]) for e in best] == front
    losses = [entry["loss"] for entry in best]
    assert losses == sorted(losses)
    assert all(entry["loss"] is not None for entry in best)
    tags = [client(store).get_run(e["mlflow_run_id"]).data.tags for e in found["front"]]
    assert all(tag["front"] == "true" for tag in tags)

    score = Evaluator.score

    def only_the_full_cache(self, plan, **more):
        fitted = FittedPlan.of(plan)
        assert fitted.plan == KVPlan.full(fitted.plan.num_layers), "scored again"
        return score(self, plan, **more)

    monkeypatch.setattr(Evaluator, "score", only_the_full_cache)
    again = run(*sweep, "study.final_windows=16")
    assert again["finals"] == held


@pytest.mark.slow
def test_what_is_not_about_the_text_has_no_finals(run) -> None:
    words = ("study.fresh=true", "study.n_trials=6", "study.final_windows=16")
    found = run("sweep", *FINALS, *words, "scoring.fitness=cosine")
    assert found["finals"] == {"windows": 0}


@pytest.mark.slow
def test_a_map_of_a_sweep_is_evaluated_by_its_run(run, store) -> None:
    swept = run("sweep", "study.n_trials=4")
    entry = swept["front"][-1]
    result = run("evaluate", f"map={entry['mlflow_run_id']}")
    assert result["kv_source_layers"] == entry["kv_source_layers"]
    for name in ("kl", "perplexity/report"):
        assert result["scores"][name] == pytest.approx(entry["scores"][name], rel=1e-5)


SAMPLERS = sorted(path.stem for path in data_dir("conf").glob("sampler/*.yaml"))
SPACES = sorted(path.stem for path in data_dir("search_spaces").glob("*.yaml"))
# Every one of both; tests/search/test_study.py has more pairs.
COUNT = max(len(SAMPLERS), len(SPACES))
TOGETHER = list(islice(zip(cycle(SAMPLERS), cycle(SPACES), strict=False), COUNT))


@pytest.mark.parametrize(("sampler", "space"), TOGETHER)
@pytest.mark.slow
def test_every_space_and_every_sampler(run, sampler: str, space: str) -> None:
    result = run(
        "sweep",
        f"search_space={space}",
        f"sampler={sampler}",
        "study.n_trials=8",
        "study.margin=9",
    )
    used_up = result["trials"]["cached"] >= MAX_REPEATS  # on six layers some hold fewer maps
    assert (2 if used_up else 8) <= result["trials"]["complete"] <= 8
    assert result["overhead_seconds_per_trial"] < 10
    assert result["stages"]["agreement"][0]["maps"] == result["trials"]["complete"]
    assert result["stages"]["screening_margins"] == {"screen/2/loss": 9}
    for entry in result["front"]:
        low, high = entry["intervals"]["kl"]
        assert low <= entry["scores"]["kl"] <= high
        low, high = entry["intervals"]["perplexity/report"]
        assert low <= entry["scores"]["perplexity/report"] <= high


def test_passages_too_short_for_the_scoring_windows(run, tmp_path, capsys) -> None:
    """A line is its own document: maps are then scored on the calibration windows."""
    lines = [" ".join(f"w{number}{word}" for word in "abcdefghij") for number in range(40)]
    (tmp_path / "short.txt").write_text("\n".join(lines))
    shared = ("evaluate", "map=0_1_2_3_0_5", "calibration.path=short.txt")
    fallen = run(*shared)
    assert "maps are scored on the calibration windows" in " ".join(capsys.readouterr().out.split())
    asked = run(*shared, "scoring.num_windows=4", "scoring.window_tokens=24")
    assert fallen["scores"]["kl"] == pytest.approx(asked["scores"]["kl"], rel=1e-5)
    assert "windows of" not in capsys.readouterr().out


def test_a_ranking_by_block_error(run) -> None:
    result = run("search", "calibration.distance=block_output", "search.order=similar")
    trace = result["results"][-1]["trace"]
    assert [step["distance"] for step in trace] == sorted(step["distance"] for step in trace)
    assert all(0 < step["distance"] for step in trace)


@pytest.mark.slow
def test_maps_of_a_file_are_scored_and_a_flat_front_ends_the_search(
    run, tmp_path, store, capsys
) -> None:
    given = [[0, 1, 2, 3, 1, 1], [0, 1, 1, 3, 4, 3]]
    (tmp_path / "maps.json").write_text(json.dumps([*given, [0, 0, 0, 0, 4, 5]]))
    result = run("sweep", "study.seeds=maps.json", "study.n_trials=30", "study.margin=9")
    tags = [child.data.tags for child in children(store, result["mlflow_run_id"])]
    origins = {tag["kv_source_layers"]: tag["origin"] for tag in tags}
    assert {origins["_".join(map(str, one))] for one in given} == {"seed file maps.json"}
    assert "1 of 3 maps of study.seeds are left out" in capsys.readouterr().out
    # A front of another sweep is a seed file as well; two maps without progress end this one.
    again = run(
        "sweep", f"study.seeds={result['folder']}/front.json", "study.patience=2",
        "study.n_trials=60", "study.name=patient",
    )  # fmt: skip
    assert sum(again["trials"][s] for s in ("complete", "screened_out")) < 60


def test_the_plans_of_a_front_are_seeds(tmp_path) -> None:
    """A sweep of plans writes null for the sources of a plan that is no map."""
    entries = [
        {"kv_source_layers": [0, 1, 1], "plan": "0_1_1"},
        {"kv_source_layers": None, "plan": "0_1q4_x"},
        {"kv_source_layers": [0, 1, 2], "plan": "0_1_2"},
    ]
    (tmp_path / "front.json").write_text(json.dumps(entries))
    held = SeedFile.read(tmp_path / "front.json")
    assert [str(one) for one in held.maps] == ["0_1_1", "0_1q4_x", "0_1_2"]
    layers = tuple(attention_layers(tiny_model("llama", num_hidden_layers=3)))
    assert [str(one) for _, one in held.seeds("any", layers)] == ["0_1_1", "0_1q4_x"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not JSON"),
        ('[{"kv_source_layers": null}]', "holds what is no map"),
        ("[]", "holds no maps"),
        ("[[0, 5]]", "holds what is no map"),
        ('[{"sources": [0]}]', "holds what is no map"),
        ("[[0, 0, 1, 2]]", "map"),
        ("[[0, 0, 2, 3]]", "study.seeds=maps.json holds a map that does not fit (map has 4 layers"),
        ('{"model": {"id": "other/model"}, "front": [[0, 0, 2, 3, 4, 5]]}', "holds maps of other"),
    ],
)
def test_a_seed_file_that_does_not_fit_is_refused(
    tmp_path, monkeypatch, store, capfd, content: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "maps.json").write_text(content)
    assert main([*QUICK, *store, "sweep", "study.seeds=maps.json"]) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert says in error and len(error) <= 200


def test_a_budget_too_small_for_one_map_is_refused(tmp_path, monkeypatch, store, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ("sweep", "study.minutes=1e-9", "study.fresh=true")
    assert main([*QUICK, *store, *arguments]) == 2
    assert "study.minutes=1e-09 ended before one map was scored" in capfd.readouterr().err


@pytest.mark.slow
def test_weights_of_several_fitnesses(run) -> None:
    result = run("sweep", "scoring.fitness={kl: 1, cosine: 0.5}", "study.n_trials=6")
    assert result["fitness"] == "1·kl + 0.5·cosine"
    assert result["hypervolume_reference"]["score"] == -2.5


@pytest.mark.slow
def test_lm_eval_as_the_fitness(run) -> None:
    result = run(
        "sweep",
        "scoring.fitness=lm_eval",
        "scoring.search.tasks=[wiki_ppl_search]",
        "study.n_trials=3",
    )
    assert result["trials"]["complete"] + result["trials"]["screened_out"] == 3
    assert all("lm_eval/wiki_ppl_search/word_perplexity" in e["scores"] for e in result["front"])


@pytest.mark.slow
def test_a_study_of_another_configuration_is_refused(run, store, capfd) -> None:
    name = ("study.name=other", "study.n_trials=2", "sweep")
    run(*name)
    assert main([*QUICK, *store, *name, "calibration.num_windows=5"]) == 2
    error = capfd.readouterr().err.strip()
    assert "study other holds scores of another" in error
    assert "calibration" in error
    assert "\n" not in error
    run(*name, "calibration.num_windows=5", "study.fresh=true")


def test_a_users_text_file_calibrates(run, tmp_path: Path) -> None:
    lines = [f"This is line {i} of a text of its own, long enough for a window." for i in range(9)]
    (tmp_path / "mine.txt").write_text("\n".join(lines))
    (tmp_path / "mine.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in lines))
    texts = [run("calibrate", f"calibration.path=mine.{kind}") for kind in ("txt", "jsonl")]
    assert texts[0]["ranking"] == texts[1]["ranking"]


def test_a_failure_at_run_time_is_exit_code_1(tmp_path, monkeypatch, store, capfd) -> None:
    from kvsharer_exp.cli.session import calibration

    monkeypatch.chdir(tmp_path)

    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(calibration, "layer_means", broken)
    assert main([*QUICK, *store, "calibrate"]) == 1
    error = capfd.readouterr().err.strip()
    assert error.startswith("kvsharer: failed with RuntimeError: the device is gone")
    assert "\n" not in error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("(sqlite3.OperationalError) database or disk is full [SQL: INSERT …"),
    ],
)
def test_a_full_disk_is_named_whatever_came_of_it(error, monkeypatch, capfd) -> None:
    def broken(*arguments: object) -> None:
        try:
            raise error
        except Exception as found:
            raise KeyError("run") from found

    monkeypatch.setattr(cli, "translate", broken)
    assert main(["sweep"]) == 1
    said = capfd.readouterr().err.strip()
    assert said == "kvsharer: the disk is full: free some space and run the same command again"


def test_an_interrupt_is_exit_code_130_and_the_run_says_killed(
    tmp_path, monkeypatch, store, capfd
) -> None:
    from kvsharer_exp.cli.session import calibration

    monkeypatch.chdir(tmp_path)

    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibration, "layer_means", interrupt)
    assert main([*QUICK, *store, "calibrate", "seed=77"]) == 130
    mlflow = client(store)
    experiment = mlflow.get_experiment_by_name("kvsharer_exp").experiment_id
    (found,) = mlflow.search_runs([experiment], filter_string="params.seed = '77'")
    assert found.info.status == "KILLED"
