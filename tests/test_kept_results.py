"""What benchmarks keep for RESULTS.md: a table and the values behind it, of the plans it names."""

import json
from pathlib import Path

from kvsharer_exp.values.plan import KVPlan
from tests.benchmarks import keeps, tasks_by_plan
from tests.benchmarks.kept import keep_results

DOCS = Path(__file__).parents[1] / "docs" / "results"


def test_the_table_and_its_values_are_kept_together(tmp_path: Path) -> None:
    keep_results(None, "x", "", {})
    folder = tmp_path / "a" / "b"
    keep_results(folder, "x", "| 1 |\n", {"x": 1})
    keep_results(folder, "y", "| 2 |\n", [2], values="rows")
    assert {path.name for path in folder.iterdir()} == {"x.md", "x.json", "y.md", "rows.json"}
    assert (folder / "x.md").read_text() == "| 1 |\n"
    assert json.loads((folder / "rows.json").read_text()) == [2]


def test_the_plans_are_those_of_the_results() -> None:
    text = (DOCS / "text.md").read_text(encoding="utf-8")
    retrieval, collapse = (tasks_by_plan.SETS[name].plans for name in ("retrieval", "collapse"))
    assert f"plan={retrieval['chosen by recall']}\n" in text
    for name, (_, plans) in tasks_by_plan.SETS.items():
        kept = json.loads((DOCS / name / f"{name}.json").read_text(encoding="utf-8"))
        assert {row: result["plan"] for row, result in kept.items()} == plans
    assert f"map={collapse['five shared layers']}\n" in text
    found = json.loads((DOCS / "plans_quantised" / "plans.json").read_text(encoding="utf-8"))
    by_budget = {row["budget"]: row["plan"] for row in found}
    assert retrieval["the plan of 22 % above"] == by_budget[0.22]
    quarter = by_budget[0.25].replace("_2q4g128s4_", "_2q3g128s4_")
    assert retrieval["the plan of 25 % above, layer 2 at 3 bits too"] == quarter
    for plan in (*retrieval.values(), *collapse.values()):
        assert str(KVPlan.parse(plan)) == plan


def test_a_plan_stands_beside_the_full_cache() -> None:
    name, ppl = "lm_eval/copying/exact_match", "perplexity/report"
    full = {"scores": {ppl: 20.0, name: 0.875}, "intervals": {name: [0.69, 0.957]}}
    plan = {"scores": {ppl: 25.0, name: 0.0}, "intervals": {name: [0.0, 0.138]}}
    found = {"a map": {**plan, "full": full, "footprint": {"kv_fraction": 0.8}}}
    assert tasks_by_plan.table(found).splitlines() == [
        "| plan | KV | ppl ratio | copying exact_match |",
        "| --- | --- | --- | --- |",
        "| full cache | 100% | 1.000 | 0.875 (0.69–0.96) |",
        "| a map | 80.0% | 1.250 | 0 (0.00–0.14) |",
    ]


def test_an_evaluation_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"scores": {}}')
    assert tasks_by_plan.evaluate(tmp_path, "0_1", ["no=such_word"]) == {"scores": {}}


def test_a_keep_has_its_ratios_and_spreads() -> None:
    seconds = {"full": [1.9, 2.0, 2.1], "shared": [2.9, 3.0, 3.2]}
    line = {"keep": "h0.25", "prefill": 1.5, "decode": 1.1, "seconds": seconds, "bytes": 0.26}
    assert keeps.table([line]).splitlines()[2:] == [
        "| h0.25 | 26.0% | 1.5 | 3.0 (2.9–3.2) | 2.0 (1.9–2.1) | 1.1 |"
    ]
