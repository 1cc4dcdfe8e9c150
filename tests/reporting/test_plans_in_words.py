"""Plans that are no maps, in words: counted by kind, and never taken for the full cache."""

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from kvsharer_exp.cli.steps.front_lines import print_front
from kvsharer_exp.reporting.answers import answer, headline, most_shared
from kvsharer_exp.reporting.beside_paper import compare_with_paper, curves
from kvsharer_exp.reporting.comparison import tables, to_values
from kvsharer_exp.reporting.front_table import front_table
from kvsharer_exp.reporting.measured import FinishedRun
from kvsharer_exp.reporting.paper_numbers import paper_numbers
from kvsharer_exp.reporting.plan_kinds import (
    action_counts,
    kinds_of,
    mean_bits,
    plan_params,
    size_words,
    summary,
)
from kvsharer_exp.reporting.result_readers import measured
from kvsharer_exp.reporting.sharing_front import num_beaten, sharing_front
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.plan_files import json_of_file
from kvsharer_exp.values.trial import FrontEntry

from .plan_sweep import ENTRIES, FULL, RESULTS, SWEEP, entry, result

MIXED = KVPlan.parse("0_1q4s4_0k1v_a_x_1_c_a_8q3")
OLD = {
    "kv_source_layers": [0, 1, 0, 3],
    "digest": "d",
    "num_shared": 1,
    "kv_fraction": 0.75,
    "scores": {"kl": 0.1},
}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0_1_0_3", "1/4 shared"),
        ("0_1_2_3", "0/4 shared"),
        ("0_1q4_2q3_3q3", "4 own at 6.5 bits"),
        ("0_a_a_3_0", "2 own, 2 affine, 1 read"),
        (MIXED, "3 own at 7.67 bits, 2 read, 2 affine, 1 drop, 1 constant"),
    ],
)
def test_a_plan_is_named_by_its_kinds_and_a_map_by_its_shared_layers(text, said: str) -> None:
    assert size_words(KVPlan.parse(text)) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0_1_0_3", "1/4 shared"),
        ("0q3s4_1q4g128s4_2_3w4+60_4q4g128s4", "1×own 1×w4+60 2×q4g128s4 1×q3s4"),
        (MIXED, "1×own 1×q4s4 1×q3 2×read 2×affine 1×drop 1×constant"),
        (
            "0_1q4_2q4snap0.5+32_3q4snap0.25+32_4q4snap0.125+32_5q4snap0.0625+32",
            "6 own at 6 bits (4 of some tokens)",
        ),
    ],
)
def test_a_table_tells_plans_apart_by_the_counts_of_their_actions(text, said: str) -> None:
    assert action_counts(KVPlan.parse(text)) == said


def test_every_layer_is_counted_once() -> None:
    assert sum(kinds_of(MIXED).values()) == MIXED.num_layers
    assert next(iter(kinds_of(KVPlan.parse("0_a_a_a")))) == "own"
    assert mean_bits(KVPlan.parse("0_1q4_x")) == 10


def test_params_have_every_kind_also_where_it_does_not_occur() -> None:
    made = plan_params(KVPlan.parse("0_1_0_0k1v_x"))
    assert made["actions"] == (
        "0 own 16 bits, 1 own 16 bits, 2 read 0, 3 read 0 keys 1 values, 4 drop"
    )
    assert made | {"actions": ""} == {
        "actions": "",
        "own": "2",
        "quantised": "0",
        "mean_bits": "16",
        "bounded": "0",
        "read": "2",
        "drop": "1",
        "constant": "0",
        "affine": "0",
    }
    assert plan_params(KVPlan.parse("0_1q4"))["quantised"] == "1"


def test_the_table_of_plans_says_what_layers_do_and_a_tenth_of_a_percent() -> None:
    header, full, *rows = front_table(ENTRIES, FULL)
    assert header[:2] == ["layers", "KV"]
    assert full[:2] == ["full cache", "100%"]
    assert [row[:2] for row in rows] == [
        ["1/4 shared", "75.0%"],
        ["1×own 2×q8 1×q4", "51.6%"],
        ["1×own 1×q4s4 1×read 1×affine", "32.8%"],
        ["1×own 1×read 1×drop 1×constant", "25.0%"],
    ]


def test_only_the_full_cache_is_left_out() -> None:
    full = entry(result(9, "0_1_2_3", 1.0, 0.0), 22.0)
    assert front_table([full, *ENTRIES], FULL) == front_table(ENTRIES, FULL)
    assert len(front_table([full, entry(RESULTS[5], 23.0)], FULL)) == 3
    assert replace(SWEEP, entries=[full, *ENTRIES]).changed == ENTRIES


def test_the_terminal_has_every_plan_whole_on_a_line_of_its_own() -> None:
    console = Console(file=io.StringIO(), width=80)
    print_front(console, ENTRIES, FULL)
    lines = console.file.getvalue().splitlines()
    assert " 32.8% KV  0_1q4s4_0k1v_a  sampler" in lines
    assert " 51.6% KV  0_1q8_2q8_3q4  sampler" in lines
    assert max(map(len, lines)) <= 80


def test_old_entries_without_a_plan_read_as_before(tmp_path) -> None:
    old = FrontEntry.from_dict(OLD)
    assert front_table([old], {"kl": 0.0})[2][:2] == ["1/4", "75%"]
    file = tmp_path / "front.json"
    file.write_text(json.dumps([made.to_dict() for made in ENTRIES]), encoding="utf-8")
    again = [FrontEntry.from_dict(data) for data in json.loads(file.read_text(encoding="utf-8"))]
    assert [made.kv_plan for made in again] == [member.plan for member in SWEEP.front]
    assert KVPlan.from_json(json_of_file(file, "0.4")) == RESULTS[3].plan


def test_the_answer_is_how_much_kv_is_enough() -> None:
    assert most_shared(ENTRIES, 0.95) == ENTRIES[2]
    assert headline("m", ENTRIES, {}, RESULTS) == (
        "m keeps 95% of its held-out perplexity with 32.8% of its KV cache "
        "(2 own at 10 bits, 1 read, 1 affine)."
    )
    said = answer(ENTRIES, FULL, SWEEP.reference_maps, RESULTS)
    assert said[0].endswith("51.6% of the KV cache is enough: 4 own at 9 bits.")
    assert said[1].endswith("32.8% of the KV cache is enough: 2 own at 10 bits, 1 read, 1 affine.")
    assert "the best plan with as little KV -0.03" in said[-1]
    assert "No plan found" in headline("m", ENTRIES[-1:], {}, [])
    unmeasured = [replace(made, retained={}) for made in ENTRIES]
    assert "4 plans for m make the front" in headline("m", unmeasured, {}, [])


def test_the_front_of_the_maps_only_is_what_sharing_alone_reaches() -> None:
    assert [r.number for r in sharing_front(RESULTS)] == [1, 2]
    assert num_beaten(RESULTS) == (1, 2)
    said = "beat 1 of the 2 sharing maps that no other map beats"
    assert said in " ".join(answer(ENTRIES, FULL, {}, RESULTS))
    maps = [r for r in RESULTS if r.sharing_map is not None]
    assert sharing_front(maps) == []
    assert "sharing maps" not in " ".join(answer(ENTRIES[:1], FULL, {}, maps))


BASE = {
    "mlflow_run_id": "f" * 32,
    "model": {"id": "tiny", "num_layers": 4},
    "full": {"scores": FULL},
    "scores": {"kl": 0.1, "perplexity/report": 24.0},
    "digest": "abc",
    "num_shared": 0,
}


def test_a_report_does_not_take_a_plan_for_the_full_cache_or_a_map_of_the_paper() -> None:
    given = {"kv_source_layers": None, "plan": "0_1q4_2q4_3q4"}
    sweep = {"front": [made.to_dict() for made in ENTRIES]}
    runs = [
        FinishedRun(BASE | given | {"command": "evaluate"}),
        FinishedRun(BASE | sweep | {"command": "sweep"}),
    ]
    compared = compare_with_paper([v for run in runs for v in measured(run)], paper_numbers())
    assert all(one.paper is None for one in compared if one.value.plan)
    report = next(t for t in tables(compared) if t.quantity == "perplexity/report")
    sizes = {(row[1], row[2]): row[5] for row in report.rows[1:]}
    assert sizes["plan abc", "1×own 3×q4"] == "91.7%"
    assert "front, sampler" in {name for name, _ in sizes}
    assert ("front, sampler", "1×own 2×q8 1×q4") in sizes
    assert ("front, sampler", "1/4") in sizes
    kept = [v for v in to_values(compared) if v["map"] == "plan abc"]
    assert {(v["num_shared"], v["plan"]) for v in kept} == {(None, "0_1q4_2q4_3q4")}
    assert all("plan" not in v for v in to_values(compared) if v["map"] == "full cache")
    points = curves(compared, "perplexity/report")
    assert [place for place, _ in points["tiny: front"]] == [0.0, 0.25]  # no place for plans


def test_intervals_of_evaluate_and_sweep_reach_the_report() -> None:
    """Also those of the full cache; results of earlier versions have none."""
    name = "lm_eval/sums/exact_match"
    held = {"scores": {name: 0.5}, "intervals": {name: [0.3, 0.7]}}
    whole = {"scores": {name: 0.9}, "intervals": {name: [0.8, 1.0]}}
    one = {**ENTRIES[1].to_dict(), **held}
    given = {"kv_source_layers": None, "plan": "0_1q4_2q4_3q4"}
    for kept in (
        BASE | given | held | {"command": "evaluate", "full": whole},
        BASE | {"command": "sweep", "full": whole, "front": [one]},
    ):
        found = [v for v in measured(FinishedRun(kept)) if v.quantity == name]
        assert [(v.value, v.low, v.high) for v in found] == [(0.9, 0.8, 1.0), (0.5, 0.3, 0.7)]
        del whole["intervals"]  # a version that kept none
        found = [v for v in measured(FinishedRun(kept)) if v.quantity == name]
        assert (found[0].low, found[0].high) == (None, None)
        whole["intervals"] = {name: [0.8, 1.0]}


def test_a_map_of_an_old_result_is_read_as_a_map() -> None:
    (run,) = [FinishedRun(BASE | {"command": "evaluate", "num_shared": 2})]
    last = measured(run)[-1]
    assert (last.map, last.num_shared, last.plan) == ("map abc", 2, "")


def test_a_summary_has_no_bits_where_nothing_is_quantised() -> None:
    assert summary(KVPlan.parse("0_1_x")) == "2 own, 1 drop"
