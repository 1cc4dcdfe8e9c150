"""``ablate`` with the arms that choose KV plans: bytes, counts, fits, and how rows name plans."""

import itertools
import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from kvsharer_exp.cli.main import main
from kvsharer_exp.cli.session import plans
from kvsharer_exp.model.actions.sizes import BUDGET_SIZE, kv_bytes
from kvsharer_exp.model.load import load
from kvsharer_exp.model.sharing.architectures import AttentionLayer, attention_layers
from kvsharer_exp.model.spec import ModelSpec
from kvsharer_exp.search.paper.arms import PLAN_ARMS
from kvsharer_exp.search.without_kv import without_kv
from kvsharer_exp.values.actions.drop import Drop
from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.choice import Choice
from kvsharer_exp.values.plan import KVPlan

CONTEXT = 500
QUICK = (
    *("model=tiny", "calibration.num_windows=3", "calibration.window_tokens=16"),
    *("scoring.num_windows=3", "scoring.window_tokens=32", "compression.ratios=[0.34,0.5]"),
    *("fit.num_windows=6", "fit.window_tokens=40", f"footprint.context={CONTEXT}"),
)
HELD_OUT = ("heldout.num_windows=6", "heldout.window_tokens=24")
WITHOUT_PROMPT = PLAN_ARMS[:5]
LETTERS = {"drop": "x", "constant": "c", "affine": "a"}


@pytest.fixture
def run(tmp_path: Path, monkeypatch, store) -> Callable[..., dict[str, Any]]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plans, "cache_dir", lambda: tmp_path / "cache")

    def call(*arguments: str) -> dict[str, Any]:
        folder = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        words = [*QUICK, *HELD_OUT, *store, f"hydra.run.dir={folder}", *arguments]
        assert main(["ablate", *words]) == 0
        return {**json.loads((folder / "result.json").read_text()), "folder": folder}

    return call


@pytest.fixture
def fitted(monkeypatch) -> list[set[str]]:
    """Grows by the names of the actions that are asked of `Plans.fits`, at every call."""
    calls: list[set[str]] = []
    inner = plans.Plans.fits

    def fits(self, wanted):
        calls.append({action.name for actions in wanted.values() for action in actions})
        return inner(self, wanted)

    monkeypatch.setattr(plans.Plans, "fits", fits)
    return calls


def plan_of(row: dict[str, Any]) -> KVPlan:
    return KVPlan.parse(row.get("plan") or row["kv_source_layers"])


def bytes_of(plan: KVPlan) -> int:
    return kv_bytes(plan, tiny_layers(), CONTEXT, BUDGET_SIZE)


@cache
def tiny_layers() -> tuple[AttentionLayer, ...]:
    return attention_layers(load(ModelSpec(name="tiny", source="random:tiny"))[0])


def without_own(plan: KVPlan) -> int:
    return plan.num_layers - len(plan.owners)


def by_arm(result: dict[str, Any]) -> dict[tuple[str, float], dict[str, Any]]:
    return {(row["arm"], row["compression"]): row for row in result["rows"]}


def check_rows(result: dict[str, Any]) -> None:
    """Every arm's plan keeps at most the bytes of the map, and leaves as many layers without KV."""
    rows = by_arm(result)
    for (arm, ratio), row in rows.items():
        read, plan = plan_of(rows["read", ratio]), plan_of(row)
        assert bytes_of(plan) <= bytes_of(read)
        assert row["found"] == row["requested"] == without_own(read)
        share = bytes_of(plan) / bytes_of(KVPlan.full(plan.num_layers))
        assert row["kv_fraction"] == pytest.approx(share)
        assert row["scores"]["kl/report"] > 0
        if arm == "read":
            assert "plan" not in row
            continue
        assert row["kv_source_layers"] is None
        if arm == "quantised":
            assert all(isinstance(a, Own) and a.sinks in (0, 4) for a in plan.actions)
            assert without_own(plan) == 0
        else:
            assert without_own(plan) == without_own(read) == plan.texts.count(LETTERS[arm])


@pytest.mark.parametrize("name", ["question_drop", "question_equal_bytes"])
@pytest.mark.slow
def test_the_questions_run_at_equal_bytes(name: str, run, fitted, store, capsys) -> None:
    result = run(f"experiment={name}", *HELD_OUT)
    check_rows(result)
    assert result["reference"]["arm"] == "read"
    others = [cell for cell in result["cells"] if cell["arm"] != "read"]
    assert all(cell["verdicts"].keys() >= {"kl/report", "perplexity/report"} for cell in others)
    arms = {row["arm"] for row in result["rows"]}
    assert set().union(*fitted) == arms & {"constant", "affine"}
    client = MlflowClient(tracking_uri=store[0].partition("=")[2])
    for row in result["rows"]:
        child = client.get_run(row["mlflow_run_id"])
        assert child.data.tags["plan"] == str(plan_of(row))
        assert child.data.metrics["kv_fraction"] == pytest.approx(row["kv_fraction"])
    table = (result["folder"] / "ablation.md").read_text()
    assert "| KV |" in table and "no more bytes than read" in table
    assert (result["folder"] / "arms.png").stat().st_size > 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "shared counts layers without KV of their own" in shown


@pytest.mark.slow  # several commands
def test_the_same_twice_and_beside_the_other_arms(run) -> None:
    arms = f"ablate.arms=[trailing_layers,{','.join(WITHOUT_PROMPT)}]"
    both = run(arms, "ablate.distances=[euclidean_flat,cka]")
    first, other = ([r for r in both["rows"] if r["variant"]["calibration.distance"] == d]
                    for d in ("euclidean_flat", "cka"))  # fmt: skip
    assert len(first) == len(other) == 2 * (1 + len(WITHOUT_PROMPT))
    assert [plan_of(r) for r in first] == [plan_of(r) for r in other]
    assert [r["scores"] for r in first] == [r["scores"] for r in other]
    check_rows({"rows": [row for row in first if row["arm"] != "trailing_layers"]})


@pytest.mark.slow  # several commands
def test_scores_are_those_of_evaluate(run, tmp_path, store) -> None:
    """The plan of a row, given to ``evaluate``, is fitted alike and has the same perplexity."""
    row = by_arm(run("ablate.arms=[affine]"))["affine", 0.5]
    folder = tmp_path / "evaluated"
    words = [*QUICK, *HELD_OUT, *store, f"plan={row['plan']}", f"hydra.run.dir={folder}"]
    assert main(["evaluate", *words, "scoring.report.tasks=[]"]) == 0
    scores = json.loads((folder / "result.json").read_text())["scores"]
    assert row["scores"]["perplexity/report"] == pytest.approx(scores["perplexity/report"], 1e-6)


@pytest.mark.slow
def test_the_first_arm_may_be_a_plan_that_is_timed(run, fitted) -> None:
    result = run("ablate.arms=[drop]", "ablate.lengths=[[8,2]]", "bench.repeats=1")
    assert [cell["compression"] for cell in result["timings"]] == [0.34, 0.5]
    assert fitted == []


@pytest.mark.slow
def test_a_budget_below_two_bits_has_no_quantised_plan(run, capsys) -> None:
    result = run("ablate.arms=[read,quantised]", "compression.ratios=[0.84]")
    row = by_arm(result)["quantised", 0.84]
    assert (row["found"], row["scores"], row["kv_source_layers"]) == (0, {}, [0, 1, 2, 3, 4, 5])
    shown = " ".join(capsys.readouterr().out.split())
    assert "quantised: too few layers at 84.0%; no plan of that size" in shown


@pytest.mark.slow
def test_too_little_text_for_fits_is_one_line(tmp_path, monkeypatch, store, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("ablate.arms=[read,affine]", "fit.window_tokens=999999", "--quiet")
    assert main(["ablate", *QUICK, *HELD_OUT, *store, *words]) == 2
    error = capfd.readouterr().err.strip()
    assert "fit.window_tokens=999999" in error
    assert "\n" not in error


@pytest.mark.parametrize("seed", range(20))
def test_the_layers_without_kv_are_the_best_of_all(seed: int) -> None:
    """Layers of two sizes, as with sliding windows: all subsets are tried."""
    draw = random.Random(seed)
    sizes, losses = [draw.choice((2, 7)) for _ in range(7)], [draw.random() for _ in range(7)]
    choices = [Choice(i, Own(), 0.0, size) for i, size in enumerate(sizes)]
    choices += [Choice(i, Drop(), loss, 0) for i, loss in enumerate(losses)]
    count, budget = draw.randint(1, 6), draw.randint(2, sum(sizes))
    fitting = [
        layers
        for layers in itertools.combinations(range(7), count)
        if sum(sizes) - sum(sizes[i] for i in layers) <= budget
    ]
    found = without_kv(choices, count, budget)
    if not fitting:
        assert found is None
        return
    best = min(fitting, key=lambda layers: sum(losses[i] for i in layers))
    assert found is not None
    assert tuple(i for i, action in enumerate(found.actions) if action == Drop()) == best
