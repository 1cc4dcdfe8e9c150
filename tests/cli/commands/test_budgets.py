"""`plan` for a budget of memory out of a finished sweep of plans; sweeps of other budgets."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from kvsharer_exp import FittedPlan, load_plan
from kvsharer_exp.cli.main import main
from kvsharer_exp.cli.session import loaded_model, plans
from kvsharer_exp.cli.steps import budget_plan
from kvsharer_exp.search.stages import StagedScorer
from kvsharer_exp.search.study import open_study
from kvsharer_exp.values.plan import KVPlan
from tests.refusals import check_refusal

QUICK = (
    *("model=tiny", "calibration.num_windows=3", "calibration.window_tokens=16"),
    *("scoring.num_windows=3", "scoring.window_tokens=32", "scoring.search.tasks=[]"),
    *("scoring.report.tasks=[]", "heldout.num_windows=2", "heldout.window_tokens=24"),
    *("fit.num_windows=6", "fit.window_tokens=40", "tracking.experiment=budgets"),
)
SWEEP = ("sweep", "study.screen_windows=[]", "search_space.options.actions=[own,q4,a,read]")
MAPS = ("sweep", "search_space=layer_sources")


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """A store with a sweep of plans and then one of maps: their results, and the words for it."""
    folder = tmp_path_factory.mktemp("budgets")
    store = [f"tracking.uri=sqlite:///{folder}/mlflow.db", f"tracking.folder={folder}"]
    words = ("study.n_trials=14", "compression.kv=[0.3]", "study.name=plans")
    for name, more in (("plans", (*SWEEP, *words)), ("maps", (*MAPS, "study.n_trials=4"))):
        arguments = [*QUICK, *store, f"hydra.run.dir={folder / name}", "--quiet", *more]
        assert main(arguments) == 0
    return {
        **{name: read(folder / name) for name in ("plans", "maps")},
        "folder": folder,
        "store": store,
    }


@pytest.fixture
def plan(swept, tmp_path: Path, monkeypatch):
    """Run ``plan`` where every way to a model fails; gives its ``result.json``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loaded_model, "load", lambda spec: pytest.fail("a model is loaded"))

    def call(*arguments: str) -> dict[str, Any]:
        run_dir = f"hydra.run.dir={tmp_path / 'run'}"
        assert main(["plan", *QUICK[:1], QUICK[-1], *swept["store"], run_dir, *arguments]) == 0
        return read(tmp_path / "run")

    return call


@pytest.fixture
def refuse(swept, tmp_path: Path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)

    def call(names: str, *arguments: str) -> None:
        capfd.readouterr()
        words = ["plan", *QUICK[:1], QUICK[-1], *swept["store"], "--quiet", *arguments]
        assert main(words) == 2
        check_refusal(capfd.readouterr().err, names)

    return call


def trials(swept) -> dict[str, Any]:
    """By its text, the result of every plan that the study knows."""
    with open_study("plans", storage=None, folder=swept["folder"] / "studies") as store:
        return {str(result.plan): result for result in store.results()}


def test_budgets_are_answered_without_a_model(swept, plan, capsys) -> None:
    run_id, before = swept["plans"]["mlflow_run_id"], trials(swept)
    result = plan("compression.kv=[0.9,0.3,0.5]", f"run={run_id}")
    assert [answer["kv"] for answer in result["budgets"]] == [0.3, 0.5, 0.9]
    assert (result["run"], result["model"]["id"]) == (run_id, "random:tiny")
    shown = capsys.readouterr().out
    for answer in result["budgets"]:
        assert answer["kv_fraction"] <= answer["kv"]
        assert KVPlan.parse(answer["plan"]).num_layers == 6
        fitting = [
            r for r in before.values()
            if r.score is not None and r.footprint.kv_fraction <= answer["kv"]
        ]  # fmt: skip
        best = min((-r.score for r in fitting), default=float("inf"))
        if answer["status"] == "known":
            known = before[answer["plan"]]
            assert (answer["loss"], answer["trial"]) == (best, known.number)
            words = f"known, KL {best:.4g} (trial {known.number})"
        else:
            assert answer["plan"] not in before
            assert 0 < answer["loss"] < best
            words = f"predicted, KL {answer['loss']:.4g} until it is scored"
        (line,) = [line for line in shown.splitlines() if line.endswith(f": {answer['plan']}")]
        assert line.startswith(f"{answer['kv']:.4g}  {words}")
        solved = answer["solved"]
        assert 0 <= solved["bound"] <= solved["cost"]
        assert solved["gap"] == (solved["cost"] - solved["bound"]) / solved["cost"] <= 0.01
        assert f"{solved['gap']:.2%} above the bound of {solved['bound']:.4g}" in shown
        assert answer["plan"] == solved["plan"] or answer["status"] == "known"
    assert "next     kvsharer evaluate model=tiny " in shown
    assert trials(swept).keys() == before.keys()  # the study is as it was


def test_every_plan_of_a_front_loads_with_its_fits(swept) -> None:
    folder, run_id = swept["folder"] / "plans", swept["plans"]["mlflow_run_id"]
    uri = swept["store"][0].partition("=")[2]
    plans = [KVPlan.parse(entry["plan"]) for entry in swept["plans"]["front"]]
    stand_ins = {(i, a) for plan in plans for i, a in enumerate(plan.actions) if a.fitted}
    assert len(list(folder.glob("fits/*.safetensors"))) == len(stand_ins) > 0
    for entry, plan in zip(swept["plans"]["front"], plans, strict=True):
        choice = f"{entry['kv_fraction'] + 1e-9:.12f}"
        loaded = load_plan(f"{folder / 'front.json'}:{choice}")
        assert KVPlan.parse(getattr(loaded, "plan", loaded)) == plan
        assert set(getattr(loaded, "fits", {})) == {
            i for i, action in enumerate(plan.actions) if action.fitted
        }
        again = load_plan(f"{run_id}:{choice}", tracking_uri=uri)
        assert getattr(again, "keys", again) == getattr(loaded, "keys", loaded)


def test_a_plan_of_a_front_is_evaluated_with_the_fits_that_were_found(
    swept, tmp_path: Path, monkeypatch, refuse
) -> None:
    """The command fitted anew what lies beside the front, or in the run, or in an export."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plans, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(plans, "fit_actions", lambda *_, **__: pytest.fail("a fit is made"))
    entry = next(e for e in swept["plans"]["front"] if "a" in e["plan"].split("_"))
    choice = f"{entry['kv_fraction'] + 1e-9:.12f}"
    front = f"{swept['folder'] / 'plans' / 'front.json'}:{choice}"
    want = load_plan(front)
    assert isinstance(want, FittedPlan)
    words = (*QUICK, *swept["store"], "--quiet")
    for number, value in enumerate((front, f"{swept['plans']['mlflow_run_id']}:{choice}")):
        run_dir = f"hydra.run.dir={tmp_path / str(number)}"
        assert main(["evaluate", *words, f"plan={value}", run_dir]) == 0
        result = read(tmp_path / str(number))
        assert result["scores"]["perplexity/report"] == entry["scores"]["perplexity/report"]
        kept = load_plan(tmp_path / str(number))
        assert isinstance(kept, FittedPlan)
        assert (kept.keys, kept.origin) == (want.keys, want.origin)
    refuse("of sequential false, not true", f"plan={front}", *QUICK[1:-1], "fit.sequential=true")
    refuse("are of model", f"plan={front}", *QUICK[1:-1], "model.seed=3")


def test_a_sweep_with_a_fixed_layer_goes_on(tmp_path: Path) -> None:
    """Its layers are whole numbers, which JSON gives back as text; they are logged as text too."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    store = (f"tracking.uri={uri}", f"tracking.folder={tmp_path}", f"hydra.run.dir={tmp_path}")
    fixed = ("+search_space.options.fixed={0: own, 2: a}", "study.name=fixed")
    for trials in (3, 5):
        words = [*QUICK, *store, "--quiet", *SWEEP, *fixed]
        assert main([*words, f"study.n_trials={trials}"]) == 0
        found = read(tmp_path)
        assert sum(found["trials"].values()) == trials
        plans = [KVPlan.parse(entry["plan"]) for entry in found["front"]]
        assert {(p.actions[0].text(0), p.actions[2].text(2)) for p in plans} == {("0", "a")}
    logged = MlflowClient(uri).get_run(found["mlflow_run_id"]).data.params
    assert logged["search_space.options.fixed.2"] == "a"


def test_a_study_is_not_continued_with_other_fits(swept, monkeypatch, capfd) -> None:
    """As where the cache was emptied and another machine has filled it."""
    made = plans.Plans.fits

    def others(self, wanted):
        return {key: replace(fit, norm="other") for key, fit in made(self, wanted).items()}

    monkeypatch.setattr(plans.Plans, "fits", others)
    words = ("study.n_trials=15", "compression.kv=[0.3]", "study.name=plans")
    run_dir = f"hydra.run.dir={swept['folder'] / 'others'}"
    assert main([*SWEEP, *QUICK, *swept["store"], *words, run_dir, "--quiet"]) == 2
    check_refusal(capfd.readouterr().err, "was scored with another fit of a of layer 0 (of 6")
    client = MlflowClient(swept["store"][0].removeprefix("tracking.uri="))
    assert client.get_run(swept["plans"]["mlflow_run_id"]).info.status == "FINISHED"
    with open_study("plans", storage=None, folder=swept["folder"] / "studies") as store:
        assert store.count_trials() == 14


def test_shares_are_counted_as_with_a_model(swept) -> None:
    # The bytes of a study without a model, and those of a model, are counted in two ways.
    with open_study("plans", storage=None, folder=swept["folder"] / "studies") as store:
        study = budget_plan.PlanStudy(store)
    assert study._space.full_bytes == 6 * 4096 * 2 * 32 * 2
    for result in study.results:
        share = study._space.kv_bytes(result.plan) / study._space.full_bytes
        assert share == pytest.approx(result.footprint.kv_fraction, abs=1e-12)
    assert study.least <= min(r.footprint.kv_fraction for r in study.results)


@pytest.mark.slow
def test_where_nothing_better_is_known_the_solved_plan_answers(
    swept, plan, monkeypatch, tmp_path: Path
) -> None:
    known, grid = trials(swept), [round(0.2 + 0.05 * i, 2) for i in range(12)]
    with open_study("plans", storage=None, folder=swept["folder"] / "studies") as store:
        study = budget_plan.PlanStudy(store)
        new = [kv for kv in grid if study._predicted(kv) is not None]
    assert new
    monkeypatch.setattr(budget_plan, "best_within", lambda results, kv: None)
    answers = plan(f"compression.kv={new}".replace(" ", ""))["budgets"]
    assert [answer["kv"] for answer in answers] == new
    for answer in answers:
        assert (answer["status"], answer["trial"]) == ("predicted", None)
        assert answer["plan"] not in known
        assert answer["kv_fraction"] <= answer["kv"]
        assert answer["loss"] > 0
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    words = (f"plan={answers[0]['plan']}", f"hydra.run.dir={tmp_path / 'scored'}", "--quiet")
    assert main(["evaluate", *QUICK, *swept["store"], *words]) == 0
    size = read(tmp_path / "scored")["footprint"]
    assert size["kv_fraction"] == pytest.approx(answers[0]["kv_fraction"], abs=1e-12)


def test_a_solved_plan_answers_where_it_is_clearly_better_than_the_known(
    swept, plan, monkeypatch, capsys
) -> None:
    kept = trials(swept).values()
    fitting = [r for r in kept if r.score is not None and r.footprint.kv_fraction <= 0.4]
    best = max(fitting, key=lambda result: result.score)
    other = KVPlan.parse("0_0_0_0_0_0")
    for share, status in ((0.9, "predicted"), (0.98, "known"), (1.1, "known")):
        loss = -share * best.score
        made = budget_plan.Answer(0.4, other, "predicted", 1 / 6, loss)
        monkeypatch.setattr(budget_plan.PlanStudy, "_predicted", lambda self, kv, made=made: made)
        (answer,) = plan("compression.kv=[0.4]")["budgets"]
        assert answer["status"] == status
        if status == "known":
            assert (answer["plan"], answer["trial"]) == (str(best.plan), best.number)
            assert (answer["loss"], answer["kv_fraction"]) == (
                -best.score, best.footprint.kv_fraction,
            )  # fmt: skip
    words = f"known, KL {-best.score:.4g} (trial {best.number}), keeps "
    assert words in capsys.readouterr().out


def test_the_full_cache_is_known_without_a_trial(plan, capsys) -> None:
    (answer,) = plan("compression.kv=[1]")["budgets"]
    assert answer == {
        **{"kv": 1.0, "plan": "0_1_2_3_4_5", "status": "known"},
        **{"kv_fraction": 1.0, "loss": 0.0, "trial": None, "solved": None},
    }
    assert "1  known, KL 0 (the full cache), keeps 100.00%: " in capsys.readouterr().out


def test_without_run_the_newest_sweep_of_plans_answers(swept, plan) -> None:
    assert plan("compression.kv=[0.5]")["run"] == swept["plans"]["mlflow_run_id"]
    given = plan(f"run={swept['folder'] / 'plans'}")  # a run folder, and the default budgets
    assert given["run"] == swept["plans"]["mlflow_run_id"]
    assert len(given["budgets"]) >= 1


@pytest.mark.slow
def test_gib_are_shares_of_the_full_cache_of_all_sequences(swept, plan, refuse) -> None:
    full = 3 * 6 * 4096 * 2 * 32 * 2 / 2**30
    words = ("footprint.batch=3", f"run={swept['plans']['mlflow_run_id']}")
    (answer,) = plan(f"compression.kv_gib={full / 2}", *words)["budgets"]
    assert answer["kv"] == pytest.approx(0.5, abs=1e-9)
    (same,) = plan("compression.kv=[0.5]", *words)["budgets"]
    assert {**answer, "kv": 0.5} == same
    refuse(f"to {full:.3g}", f"compression.kv_gib={2 * full}", *words)
    refuse("cannot be met", f"compression.kv_gib={full / 1e6}", *words)
    refuse("give footprint.context=4096", "compression.kv_gib=1", "footprint.context=99", *words)
    refuse("not 99: give", "compression.kv=[0.5]", "footprint.context=99", *words)


@pytest.mark.slow
def test_what_cannot_be_answered_is_refused_in_a_line(swept, refuse, tmp_path: Path) -> None:
    run = f"run={swept['plans']['mlflow_run_id']}"
    refuse("give at least 0.", "compression.kv=[0.001]", run)
    refuse("at most 1", "compression.kv=[1.5]", run)
    refuse("is a sweep of maps", "compression.kv=[0.5]", f"run={swept['maps']['mlflow_run_id']}")
    refuse("is not in this store", "compression.kv=[0.5]", f"run={'a' * 32}")
    refuse("plan takes one run, 2 given", f"run=[a,{'b' * 32}]")
    refuse("plan= and run= are both given", "plan=0_1_2_3_4_5", run)
    refuse("plan= and compression.kv= are both given", "plan=0_1_2_3_4_5", "compression.kv=[0.5]")
    refuse("compare= and run= are both given", "compare=0_1_2_3_4_5", run)
    refuse("no finished sweep of plans", "compression.kv=[0.5]", "tracking.experiment=empty")
    refuse("give tracking.folder or study.storage", run, "study.storage=absent.journal")


@pytest.mark.slow
def test_halves_are_measured_and_searched_where_asked(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    actions = "search_space.options.actions=[own,q4,x,read,halves]"
    words = (actions, "study.n_trials=24", "study.name=halves", "compression.kv=[0.3,0.5]")
    assert main(["sweep", *QUICK, *words, "hydra.run.dir=run", "--quiet"]) == 0
    with open_study("halves", storage=None, folder=tmp_path / "mlruns" / "studies") as store:
        halves = [c for c in store.candidates or () if c.action.name == "read_kv"]
        tried = {action.name for result in store.results() for action in result.plan.actions}
    # Layer 2 has two sources, and so two orders of them. Each later one has three.
    assert [c.layer for c in halves] == [2] * 2 + [3] * 6 + [4] * 6 + [5] * 6
    assert all(c.kv_bytes == 0 < c.error < float("inf") for c in halves)
    assert "read_kv" in tried


@pytest.mark.slow
def test_another_budget_continues_the_study_and_scores_no_plan_twice(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scored: list[str] = []
    inner = StagedScorer.__call__

    def counted(self, plan, bar):
        scored.append(str(plan))
        return inner(self, plan, bar)

    monkeypatch.setattr(StagedScorer, "__call__", counted)
    results = []
    for trials_asked, kv in ((6, "[0.5]"), (6, "[0.3]"), (9, "[0.25,0.4]")):
        words = (f"study.n_trials={trials_asked}", f"compression.kv={kv}", "hydra.run.dir=run")
        store = ("tracking.uri=sqlite:///mlruns/m.db", "--quiet")
        assert main([*SWEEP, *QUICK, *store, *words]) == 0
        results.append((read(Path("run")), len(scored)))
    assert len({result["study"] for result, _ in results}) == 1
    assert len({result["mlflow_run_id"] for result, _ in results}) == 1
    assert [count for _, count in results] == [6, 6, 9]
    assert len(set(scored)) == 9
