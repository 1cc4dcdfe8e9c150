"""``ablate`` end to end on the tiny model, and every experiment file."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from mlflow.tracking import MlflowClient

from kvsharer_exp.cli.argv import translate
from kvsharer_exp.cli.main import main
from kvsharer_exp.cli.session import plans
from kvsharer_exp.cli.steps.ablation_outputs import notes_on_tasks
from kvsharer_exp.cli.steps.ablation_rows import Scores
from kvsharer_exp.model.folders import data_dir
from kvsharer_exp.search.paper.arms import ARMS, PLAN_ARMS
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.intervals import wilson
from kvsharer_exp.values.sharing_map import SharingMap
from tests.reporting.test_ablation import row as row_of

EXPERIMENTS = sorted(path.stem for path in data_dir("conf").glob("experiment/*.yaml"))
QUICK = (
    *("model=tiny", "calibration.num_windows=3", "calibration.window_tokens=16"),
    *("heldout.num_windows=12", "heldout.window_tokens=24", "compression.ratios=[0.34,0.5]"),
)
# What is large in a file, made small; nothing that says what is compared.
FITS = ("fit.num_windows=6", "fit.window_tokens=40", "scoring.num_windows=3")
LONG = (
    *("scoring.prompt_tokens=48", "scoring.window_tokens=64", "heldout.window_tokens=64"),
    *("heldout.num_windows=2", "footprint.context=48", "scoring.num_windows=2"),
)
SMALL = {
    **dict.fromkeys(("question_equal_memory", "paper_intra"), LONG),
    "question_collapse": (
        *LONG,
        *("scoring.report.tasks=[copying]", "scoring.report.limit=2", "ablate.arms=[read,h2o]"),
    ),
    "paper_main": ("scoring=wiki", "scoring.report.limit=2"),
    "paper_memory_speed": ("ablate.lengths=[[8,3],[16,2]]", "compression.ratios=[0.34]"),
    "paper_calibration_size": ("ablate.calibration_sizes=[3,2,4]",),
    "question_drop": (*FITS, "scoring.window_tokens=32"),
    "question_equal_bytes": (*FITS, "scoring.window_tokens=32"),
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch, store):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plans, "cache_dir", lambda: tmp_path / "cache")

    def call(*arguments: str) -> dict:
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        assert main(["ablate", *QUICK, *store, f"hydra.run.dir={folder}", *arguments]) == 0
        return {**json.loads((folder / "result.json").read_text()), "folder": folder}

    return call


def client(store: list[str]) -> MlflowClient:
    return MlflowClient(tracking_uri=store[0].partition("=")[2])


def maps(result: dict) -> list[list[int]]:
    return [row["kv_source_layers"] for row in result["rows"]]


@pytest.mark.slow
def test_every_arm_at_every_ratio(run, store, capsys) -> None:
    given = "map=0_0_2_3_4_5"
    arms = f"ablate.arms=[{','.join(ARMS)}]"
    tasks = ("ablate.tasks=true", "scoring.report.limit=3")
    result = run(arms, given, "ablate.draws=3", "search.threshold=-1", *tasks)
    assert len(result["rows"]) == 2 * (len(ARMS) + 2 * 2)
    assert len(result["cells"]) == 2 * len(ARMS)
    assert result["reference"] == {"variant": {}, "arm": "dissimilar_tested"}
    for row in result["rows"]:
        shared = SharingMap(row["kv_source_layers"])
        assert (
            row["found"]
            == len(shared.targets)
            == (1 if row["arm"] == "given" else row["requested"])
        )
        assert row["kv_fraction"] == pytest.approx(1 - row["found"] / 6)
        assert {"kl/report", "perplexity/report", "lm_eval/wiki_next/acc"} <= row["scores"].keys()
        assert row["scores"]["kl/report"] > 0
        tested = row["arm"].endswith("_tested")
        assert row["evaluated"] == (row["candidates"] if tested else 0)
        child = client(store).get_run(row["mlflow_run_id"])
        assert child.data.tags["mlflow.parentRunId"] == result["mlflow_run_id"]
        assert child.data.tags["kv_source_layers"] == str(shared)
        ppl = row["scores"]["perplexity/report"]
        assert child.data.metrics["perplexity/report"] == pytest.approx(ppl)
    draws = {tuple(r["kv_source_layers"]) for r in result["rows"] if r["arm"] == "random_untested"}
    assert len(draws) > 2
    compared = {cell["arm"]: cell["verdicts"] for cell in result["cells"]}
    assert compared["dissimilar_tested"] == {}
    assert set(compared["similar_untested"].values()) <= {"better", "worse", "not told apart"}
    assert {w["arm"] for w in result["walks"]} == {a for a in ARMS if a.endswith("_tested")}
    assert len(result["acceptance"]["random_tested"]) == 10
    for name in ("ablation.md", "items.jsonl", "arms.png", "acceptance.png"):
        assert (result["folder"] / name).stat().st_size > 0
    lines = (result["folder"] / "items.jsonl").read_text().splitlines()
    assert len(lines) == len(result["rows"])
    assert len(json.loads(lines[0])["items"]["perplexity/report"]) == 12
    shown = capsys.readouterr().out
    assert "given: too few layers at 34.0%, 50.0%; no map of that size" in " ".join(shown.split())
    assert "The limit: wiki_next acc" in shown
    (failed,) = [note for note in result["notes"] if note.startswith("The full cache fails ")]
    assert "copying exact_match" in failed and failed.split()[-1] in shown


def test_tasks_that_cannot_tell_and_those_that_the_full_cache_fails_are_noted() -> None:
    good, bad, other = (f"lm_eval/{name}/acc" for name in ("good", "bad", "other"))
    scores, kept = {good: 0.8, bad: 0.25, other: 0.1}, {good: 1.0, other: 0.2}
    rows = [replace(row_of("read"), scores=scores, retained=kept)]
    rows.append(replace(row_of("joint"), scores={}, retained={}))  # an arm that found nothing
    full = {good: wilson(16, 20), bad: wilson(5, 20), other: wilson(12, 20)}
    told = Scores({name: inside.mean for name, inside in full.items()}, full, {})
    silent, failed = notes_on_tasks(rows, told)
    assert silent.startswith("Cannot tell these from the full cache: good acc, bad acc;")
    assert failed.startswith("The full cache fails bad acc (0.25), so nothing is retained there")


@pytest.mark.slow
def test_scores_are_those_of_evaluate(run, tmp_path, store) -> None:
    """One pass over the held-out windows is the plain evaluation of the same map."""
    row = run("ablate.arms=[trailing_layers]")["rows"][0]
    folder = tmp_path / "evaluated"
    written = f"map={row['mlflow_run_id']}"
    scoring = "scoring.report.tasks=[]"
    main(["evaluate", *QUICK, *store, written, scoring, f"hydra.run.dir={folder}"])
    scores = json.loads((folder / "result.json").read_text())["scores"]
    assert row["scores"]["perplexity/report"] == pytest.approx(scores["perplexity/report"], 1e-6)


@pytest.mark.slow
def test_the_same_seed_twice_is_the_same_to_the_last_digit(run) -> None:
    arms = ("ablate.arms=[dissimilar_tested,random_tested,random_untested]", "ablate.draws=2")
    first, again, other = run(*arms), run(*arms), run(*arms, "seed=1")
    assert maps(first) == maps(again) != maps(other)
    for key in ("scores", "intervals"):
        assert [row[key] for row in first["rows"]] == [row[key] for row in again["rows"]]
    for a, b in zip(first["cells"], again["cells"], strict=True):
        assert (a["against"], a["verdicts"]) == (b["against"], b["verdicts"])
    assert [w["trace"] for w in first["walks"]] == [w["trace"] for w in again["walks"]]


def test_the_budget_is_the_same_for_each_tested_arm(run, capsys) -> None:
    arms = "ablate.arms=[dissimilar_tested,similar_tested,random_tested]"
    result = run(arms, "search.threshold=1", "ablate.max_candidates=4", "ablate.draws=2")
    assert {row["evaluated"] for row in result["rows"]} == {4}
    assert all(row["scores"] == {} and row["found"] == 0 for row in result["rows"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "random tested: too few layers at 34.0%, 50.0%; the budget of 4 candidates" in shown


@pytest.mark.slow
def test_the_best_maps_of_a_sweep_are_an_arm(run, tmp_path, store) -> None:
    folder = tmp_path / "swept"
    quick = ("scoring.report.tasks=[]", "scoring.search.tasks=[]", "study.n_trials=8")
    quick = (*quick, "search_space=layer_sources")
    assert main(["sweep", *QUICK, *store, *quick, f"hydra.run.dir={folder}"]) == 0
    swept = json.loads((folder / "result.json").read_text())
    front = {entry["num_shared"]: entry["kv_source_layers"] for entry in swept["front"]}
    result = run("ablate.arms=[trailing_layers,given]", f"map={swept['mlflow_run_id']}")
    for row in (row for row in result["rows"] if row["arm"] == "given"):
        size = max(size for size in front if size <= row["requested"])
        assert row["kv_source_layers"] == front[size]


@pytest.mark.slow
def test_variants_change_what_they_name(run) -> None:
    result = run(
        "ablate.arms=[dissimilar_untested]",
        "ablate.distances=[euclidean_flat,cka]",
        "ablate.states=[kv,k,v]",
        "compression.ratios=[0.5]",
    )
    variants = [tuple(row["variant"].values()) for row in result["rows"]]
    assert variants == [(d, s) for d in ("euclidean_flat", "cka") for s in ("kv", "k", "v")]
    for (distance, states), row in zip(variants, result["rows"], strict=True):
        alone = run(
            "ablate.arms=[dissimilar_untested]",
            "compression.ratios=[0.5]",
            f"calibration.distance={distance}",
            f"calibration.states={states}",
        )
        assert maps(alone) == [row["kv_source_layers"]]
        assert alone["rows"][0]["scores"] == row["scores"]
        if (distance, states) == ("cka", "kv"):
            break
    assert len({tuple(sources) for sources in maps(result)}) > 1


@pytest.mark.slow
def test_another_calibration_text_keeps_the_held_out_items(run) -> None:
    arms = ("ablate.arms=[dissimilar_tested]", "compression.ratios=[0.34]")
    both = run(*arms, "ablate.calibration_paths=[wikipedia,news]", "ablate.calibration_sizes=[3,5]")
    assert len(both["rows"]) == 4
    news = run(*arms, "calibration.path=news", "calibration.num_windows=5")
    assert both["rows"][3]["variant"] == {"calibration.path": "news", "calibration.num_windows": 5}
    assert both["rows"][3]["kv_source_layers"] == news["rows"][0]["kv_source_layers"]
    assert both["rows"][3]["scores"] == news["rows"][0]["scores"]
    cosines = [[step["cosine"] for step in walk["trace"]] for walk in both["walks"]]
    assert len({tuple(values) for values in cosines}) == 4


QUICKLY = ("paper_random", "question_equal_bytes")


@pytest.mark.parametrize(
    "name", [n if n in QUICKLY else pytest.param(n, marks=pytest.mark.slow) for n in EXPERIMENTS]
)
def test_every_experiment_runs(name: str, run, capsys) -> None:
    result = run(f"experiment={name}", *SMALL.get(name, ()))
    written = yaml.safe_load((data_dir("conf") / "experiment" / f"{name}.yaml").read_text())
    assert result["experiment"] == name
    arms = written["ablate"]["arms"]
    first = "read" if set(arms) <= set(PLAN_ARMS) else "dissimilar_tested"
    assert arms[0] == result["reference"]["arm"] == first
    if name != "question_collapse":  # which tries fewer here
        assert {row["arm"] for row in result["rows"]} == set(written["ablate"]["arms"])
    assert (result["folder"] / "ablation.md").read_text().startswith(f"# tiny: {name}")
    if name == "paper_memory_speed":
        cells = [(c["batch"], c["context"], c["new_tokens"]) for c in result["timings"]]
        assert cells == [(1, 8, 3), (1, 16, 2)]
        assert "decode step" in capsys.readouterr().out
    if name == "question_acceptance":
        assert len(result["pairs"]) == 15
        assert result["correlations"].keys() == {"cosine", "kl"}
        assert (result["folder"] / "pairs.png").stat().st_size > 0
    if name == "question_threshold":
        assert len({cell["variant"]["search.threshold"] for cell in result["cells"]}) == 6
        assert (result["folder"] / "threshold.png").stat().st_size > 0


def test_experiments_cover_the_paper_and_its_reviewers() -> None:
    assert set(EXPERIMENTS) == {
        *("paper_main", "paper_ppl", "paper_random", "paper_order", "paper_calibration_set"),
        *("paper_calibration_size", "paper_search_time", "paper_memory_speed"),
        *("question_acceptance", "question_block_error", "question_distance"),
        *("question_threshold", "question_too_few", "question_drop", "question_equal_bytes"),
        *("question_equal_memory", "question_collapse", "paper_intra"),
    }


def test_experiment_composes_with_and_without_plus() -> None:
    for word in ("experiment=paper_ppl", "+experiment=paper_ppl"):
        assert "+experiment=paper_ppl" in translate(["ablate", word])
    with pytest.raises(InputError, match="did you mean paper_ppl"):
        translate(["ablate", "experiment=paper_pp"])


REFUSALS = {
    "ablate.arms=[dissimilar_teste]": "did you mean dissimilar_tested?",
    "ablate.arms=[quantized]": "did you mean quantised?",
    "ablate.arms=[zzz]": "random_(un)tested, trailing_layers, adjacent_pairs, given, read, drop,",
    "ablate.arms=[]": "ablate.arms is empty",
    "ablate.arms=[given]": "no map given",
    "ablate.distances=[cosin]": "calibration.distance=cosin is unknown: did you mean cosine?",
    "ablate.thresholds=[3]": "search.threshold=3",
    "ablate.calibration_sizes=[0]": "calibration.num_windows=0",
    "ablate.calibration_sizes=[99999999]": "text gives",
    "ablate.calibration_paths=[wikipedia,missing.txt]": "missing.txt",
    "ablate.draws=0": "ablate.draws=0",
    "ablate.lengths=[[512]]": "give [prompt tokens, new tokens]",
    "ablate.lengths=[[512,999999]]": "max_position_embeddings",
    "ablate.confidence=95": "ablate.confidence=95",
    "compression.ratios=[0.01]": "asks for 0 of 6 layers",
    "compression.ratios=[0.99]": "asks for 6 of 6 layers",
    "ablate.typo=1": "ablate.typo",
}


@pytest.mark.parametrize("override", REFUSALS)
def test_bad_input_is_one_line(override: str, tmp_path, monkeypatch, capfd, store) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["ablate", *QUICK, *store, override]) == 2
    error = capfd.readouterr().err.strip()
    assert REFUSALS[override] in error
    assert "\n" not in error
    assert len(error) <= 220


def test_a_given_map_larger_than_every_ratio_is_refused(
    tmp_path, monkeypatch, capfd, store
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ("ablate.arms=[given]", "map=0_0_0_0_0_5")
    assert main(["ablate", *QUICK, *store, *given]) == 2
    assert "shares 4 layers, compression.ratios asks for at most 3" in capfd.readouterr().err
