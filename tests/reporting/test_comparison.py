"""Which number of the paper stands beside which value, and what the tables say of it."""

from dataclasses import asdict, replace
from typing import Any

import pytest

from kvsharer_exp.reporting.beside_paper import compare_with_paper, curves, paper_curves
from kvsharer_exp.reporting.comparison import headline, number_text, paper_table, tables, to_values
from kvsharer_exp.reporting.markup import to_latex
from kvsharer_exp.reporting.measured import FinishedRun
from kvsharer_exp.reporting.paper_numbers import paper_numbers
from kvsharer_exp.reporting.result_readers import measured
from kvsharer_exp.shipping.reproduction import (
    compare_results,
    differing_surroundings,
    drew_other_maps,
    summary,
    why_other_maps,
)
from kvsharer_exp.values.intervals import wilson

LLAMA = {"id": "meta-llama/Llama-2-7b-chat-hf", "num_layers": 32}
CONFIG = {
    "model": {"name": "llama2_7b"},
    "calibration": {
        **{"path": "wikipedia", "num_windows": 30, "window_tokens": 64, "states": "kv"},
        "distance": "euclidean_flat",
    },
    "search": {"threshold": 0.5, "acceptance": True},
    "heldout": {"path": "wikipedia", "num_windows": 20, "window_tokens": 2048},
}
TASKS = (
    "boolq c3 chid cmmlu cmnli commonsense_qa hellaswag mmlu piqa race race_middle wsc xsum"
).split()


def inside(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.5, "high": mean + 0.5}


def ablation(
    *cells: tuple[str, int, float],
    variant: dict[str, Any] | None = None,
    model: dict[str, Any] = LLAMA,
    experiment: str = "paper_ppl",
    tasks: tuple[str, ...] = (),
) -> FinishedRun:
    """A finished ablation: (arm, layers shared, perplexity); every task scores 0.6, then 0.5."""
    variant = variant or {}
    answers = {f"lm_eval/{task}/acc": 0.6 for task in tasks}
    full = {"kl/report": 0.0, "perplexity/report": 7.0, **answers}
    rows, told = [], []
    for number, (arm, found, ppl) in enumerate(cells):
        where = {"variant": variant, "arm": arm, "compression": found / 32}
        rows.append({**where, "mlflow_run_id": f"child{number}"})
        scores = {"kl/report": 0.1, "perplexity/report": ppl, **dict.fromkeys(answers, 0.5)}
        told.append(
            {
                **where,
                "requested": found,
                "found": [found],
                "evaluated": 9,
                "seconds": 75.0,
                "scores": {name: inside(value) for name, value in scores.items()},
                "verdicts": {"perplexity/report": "worse"} if number else {},
            }
        )
    result = {
        "command": "ablate",
        "model": model,
        "mlflow_run_id": "parent",
        "experiment": experiment,
        "reference": {"arm": "dissimilar_tested", "variant": variant},
        "full": {"scores": full, "intervals": {name: inside(v) for name, v in full.items()}},
        "rows": rows,
        "cells": told,
        "timings": [],
    }
    return FinishedRun(result, CONFIG, url="http://ui/runs/parent?x=1")


def beside(run: FinishedRun, quantity: str) -> dict[tuple[str, int | None], float | None]:
    compared = compare_with_paper(measured(run), paper_numbers())
    return {
        (one.value.arm, one.value.num_shared): one.paper and one.paper.value
        for one in compared
        if one.value.quantity == quantity
    }


def test_the_method_random_sharing_and_the_full_cache_have_their_numbers() -> None:
    run = ablation(
        ("dissimilar_tested", 8, 9.0), ("random_untested", 8, 20.0), ("similar_tested", 8, 9.0)
    )
    assert beside(run, "perplexity/report") == {
        ("", 0): 6.62,
        ("dissimilar_tested", 8): 9.39,
        ("random_untested", 8): 21.29,
        ("similar_tested", 8): None,
    }
    assert beside(run, "search/seconds")["dissimilar_tested", 8] == 60


def test_a_timing_shares_the_layers_that_its_row_found() -> None:
    """Gemma 3 at 2,048 tokens: sliding windows cap the KV, so four shared layers of eighteen leave
    a fraction of 0.85, from which three were told."""
    gemma = {"id": "google/gemma-3-270m", "num_layers": 18}
    run = ablation(("dissimilar_tested", 4, 9.0), ("trailing_layers", 5, 9.0), model=gemma)
    for row, found in zip(run.result["rows"], (4, 5), strict=True):
        row["found"] = found
    spread = {"median": 1.0, "min": 1.0, "max": 1.0}
    side = {"cache_bytes": 1, "prefill_seconds": spread, "decode_tokens_per_second": spread}
    run.result["timings"].append(
        {
            **{"compression": 4 / 32, "batch": 1, "context": 2048, "new_tokens": 8},
            **{"full": side, "shared": side, "speedup": {"decode": 1.0}},
            "predicted": {"kv_fraction": 0.85},
        }
    )
    told = {one.num_shared for one in measured(run) if one.quantity.startswith("bench/")}
    assert told == {0, 4}


def test_a_column_says_what_is_kept_of_the_kv_where_a_file_tells_it() -> None:
    run = ablation(("read", 8, 9.0), ("quantised", 8, 8.0))
    run.result["rows"][1].update(kv_source_layers=None, plan="0q4_1q4_2_x", kv_fraction=0.36)
    compared = compare_with_paper(measured(run), paper_numbers())
    table = tables(compared)[0]
    assert [row[2:4] for row in table.rows] == [
        ["layers", "KV"],
        ["0/32", "100%"],
        ["8/32", "–"],  # as in the files of old runs
        ["1×own 2×q4 1×drop", "36.0%"],
    ]
    assert any("that is kept, at footprint.context" in note for note in table.notes)
    assert {value["kv_fraction"] for value in to_values(compared)} == {None, 0.36, 1.0}
    run.result["cells"][0]["kv_fraction"] = 0.75
    assert tables(compare_with_paper(measured(run), []))[0].rows[2][3] == "75.0%"
    scores = {"perplexity/report": 8.0}
    entry = {"num_shared": 2, "origin": "seed", "mlflow_run_id": "", "scores": scores}
    told = {"front": [{**entry, "kv_fraction": 0.5}], "full": {"scores": scores}}
    swept = FinishedRun({**told, "command": "sweep", "model": LLAMA, "mlflow_run_id": "r"})
    assert [value.kv_fraction for value in measured(swept)] == [1.0, 0.5]
    given = {"digest": "abc", "num_shared": 2, "scores": scores, "footprint": {"kv_fraction": 0.6}}
    evaluated = replace(swept, result={**swept.result, **given, "command": "evaluate"})
    assert [value.kv_fraction for value in measured(evaluated)] == [1.0, 0.6]


def test_another_number_of_layers_or_model_has_none() -> None:
    found = beside(ablation(("dissimilar_tested", 7, 9.0)), "perplexity/report")
    assert found == {("", 0): 6.62, ("dissimilar_tested", 7): None}
    other = {"id": "HuggingFaceTB/SmolLM2-135M-Instruct", "num_layers": 32}
    found = beside(ablation(("dissimilar_tested", 8, 9.0), model=other), "perplexity/report")
    assert set(found.values()) == {None}


@pytest.mark.parametrize(("windows", "value"), [(10, 9.48), (30, 9.39), (50, 9.33), (20, None)])
def test_a_calibration_size_has_the_number_of_that_size(windows: int, value: float | None) -> None:
    variant = {"calibration.num_windows": windows}
    run = ablation(("dissimilar_tested", 8, 9.0), variant=variant)
    assert beside(run, "perplexity/report")["dissimilar_tested", 8] == value


@pytest.mark.parametrize(
    "variant",
    [{"search.threshold": 0.9}, {"calibration.distance": "cka"}, {"calibration.states": "k"}],
)
def test_other_settings_have_none_and_a_note_says_which(variant: dict[str, Any]) -> None:
    run = ablation(("dissimilar_tested", 8, 9.0), variant=variant)
    assert beside(run, "perplexity/report")["dissimilar_tested", 8] is None
    table = tables(compare_with_paper(measured(run), paper_numbers()))[0]
    ((key, value),) = variant.items()
    assert any(f"with {key}={value}, not " in note for note in table.notes)


def test_a_calibration_text_from_elsewhere_is_known_by_its_name() -> None:
    for path, value in (("hub:bookcorpus/bookcorpus:train", 9.15), ("news", None)):
        run = ablation(("dissimilar_tested", 8, 9.0), variant={"calibration.path": path})
        assert beside(run, "perplexity/report")["dissimilar_tested", 8] == value


def test_the_mean_over_tasks_is_the_papers_only_with_all_its_tasks() -> None:
    cells = (("dissimilar_tested", 8, 9.0),)
    whole, part = ablation(*cells, tasks=tuple(TASKS)), ablation(*cells, tasks=("piqa", "wsc"))
    assert beside(whole, "tasks/mean") == {("", 0): 46.55, ("dissimilar_tested", 8): 45.58}
    assert beside(whole, "tasks/retained") == {("dissimilar_tested", 8): 97.9}
    assert set(beside(part, "tasks/mean").values()) == {None}
    values = {v.quantity: v.value for v in measured(whole) if v.num_shared == 8}
    assert values["tasks/mean"] == pytest.approx(50)
    assert values["tasks/retained"] == pytest.approx(100 * 5 / 6)


def test_the_mean_over_tasks_has_the_interval_of_independent_tasks() -> None:
    run = ablation(("dissimilar_tested", 8, 9.0), tasks=("piqa", "wsc"))
    of_tasks = [v for v in measured(run) if v.num_shared == 8 and v.quantity.startswith("lm_eval")]
    (mean,) = [v for v in measured(run) if v.num_shared == 8 and v.quantity == "tasks/mean"]
    halves = [(v.high - v.low) / 2 for v in of_tasks]
    half = 100 * sum(one**2 for one in halves) ** 0.5 / 2
    assert half > 0
    assert (mean.low, mean.high) == pytest.approx((mean.value - half, mean.value + half))


def test_the_interval_of_the_mean_over_tasks_at_chance_stays_within_0_and_100() -> None:
    run = ablation(("dissimilar_tested", 8, 9.0), tasks=("piqa", "wsc"))
    for rights in ((0, 1), (24, 23)):
        for task, right in zip(("piqa", "wsc"), rights, strict=True):
            run.result["cells"][0]["scores"][f"lm_eval/{task}/acc"] = asdict(wilson(right, 24))
        (mean,) = [v for v in measured(run) if v.num_shared == 8 and v.quantity == "tasks/mean"]
        assert mean.value == pytest.approx(100 * sum(rights) / 48)
        assert 0 <= mean.low < mean.value < mean.high <= 100


def test_a_table_says_that_the_full_cache_fails_its_task() -> None:
    name = "lm_eval/boolq/acc"
    run = ablation(("dissimilar_tested", 8, 9.0), tasks=("piqa", "boolq"))
    run.result["pass_marks"] = {name: 0.61}
    notes = {t.quantity: t.notes for t in tables(compare_with_paper(measured(run), []))}
    told = "The full cache fails boolq acc (0.6), so nothing is retained there: "
    assert [note for note in notes[name] if note.startswith(told)]
    assert not any("fails" in note for key in notes.keys() - {name} for note in notes[key])
    other = ablation(("dissimilar_tested", 8, 9.0), tasks=("boolq",), model={**LLAMA, "id": "b"})
    other = replace(other, result={**other.result, "mlflow_run_id": "other"}, config={})
    both = tables(compare_with_paper([*measured(run), *measured(other)], []))
    (table,) = [table for table in both if table.quantity == name]
    assert [note for note in table.notes if note.startswith(f"llama2_7b: {told}")]
    assert not any(note.startswith(f"b: {told}") for note in table.notes)


def test_what_is_retained_of_the_tasks_has_an_interval_and_leaves_out_those_that_fail() -> None:
    run = ablation(("dissimilar_tested", 8, 9.0), tasks=("piqa", "wsc", "boolq"))
    run.result["pass_marks"] = {"lm_eval/boolq/acc": 0.61}
    ends = {"retained/lm_eval/piqa/acc": inside(5 / 6), "retained/lm_eval/wsc/acc": inside(5 / 6)}
    run.result["rows"][0]["intervals"] = ends
    shared = {v.quantity: v for v in measured(run) if v.num_shared == 8}
    assert shared["lm_eval/boolq/acc"].retained is None
    piqa, whole = shared["lm_eval/piqa/acc"], shared["tasks/retained"]
    assert (piqa.retained_low, piqa.retained_high) == (5 / 6 - 0.5, 5 / 6 + 0.5)
    assert whole.settings["tasks"] == ["piqa", "wsc"]
    assert whole.value == pytest.approx(100 * 5 / 6)
    half = 100 * (0.5**2 + 0.5**2) ** 0.5 / 2
    assert (whole.low, whole.high) == pytest.approx((whole.value - half, whole.value + half))
    assert shared["tasks/mean"].value == pytest.approx(50)  # as the paper averages: over all
    told = {table.quantity: table.rows for table in tables(compare_with_paper([piqa], []))}
    assert "83.3% (33.3%–133.3%)" in told["lm_eval/piqa/acc"][1]
    (value,) = to_values(compare_with_paper([piqa], []))
    assert (value["retained_low"], value["retained_high"]) == (5 / 6 - 0.5, 5 / 6 + 0.5)
    run.result["pass_marks"] |= {"lm_eval/wsc/acc": 0.61}  # one task has no mean
    assert "tasks/retained" not in {v.quantity for v in measured(run)}


def test_a_table_has_this_run_the_paper_the_difference_and_where_it_is_from() -> None:
    run = ablation(("dissimilar_tested", 8, 9.0), ("random_untested", 8, 20.0))
    compared = compare_with_paper(measured(run), paper_numbers())
    table = tables(compared)[0]
    assert table.title == "Perplexity of held-out text"
    assert table.rows == [
        ["model", "map", "shared", "this run", "retained", "paper", "difference"],
        ["llama2_7b", "full cache", "0/32", "7 (6.5–7.5)", "", "6.62", "+0.38 (+5.7%)"],
        ["llama2_7b", "dissimilar tested", "8/32", "9 (8.5–9.5)", "77.8%", "9.39", "-0.39 (-4.2%)"],
        [
            *("llama2_7b", "random untested", "8/32", "20 (19.5–20.5) ▼", "35.0%"),
            *("21.29", "-1.29 (-6.1%)"),
        ],
    ]
    assert table.runs == [
        (("parent", "http://ui/runs/parent?x=1"),),
        (("child0", "http://ui/runs/child0?x=1"),),
        (("child1", "http://ui/runs/child1?x=1"),),
    ]
    assert any("200 Wikipedia texts of 2048 tokens" in note for note in table.notes)
    assert any("20 windows of 2048 tokens of wikipedia" in note for note in table.notes)
    assert [t.quantity for t in tables(compared)] == [
        *("perplexity/report", "kl/report", "search/seconds", "search/candidates")
    ]
    assert headline(compared, 1).startswith("1 run of 1 model, ")
    told = {(v["quantity"], v["map"]): v for v in to_values(compared)}
    method = told["perplexity/report", "dissimilar tested"]
    assert method["difference"] == pytest.approx(-0.39)
    assert (method["place"], method["mlflow_run_ids"]) == ("perplexity, chat models", ["child0"])


def test_a_measured_cell_has_the_number_of_its_lengths() -> None:
    def side(rate: float) -> dict[str, Any]:
        spread = {"median": rate, "min": rate, "max": rate}
        names = ("prefill_seconds", "decode_tokens_per_second", "peak_memory_bytes")
        return {**dict.fromkeys(names, spread), "cache_bytes": 2**20}

    cells = [
        {"batch": 1, "context": context, "new_tokens": new, "speedup": {"decode": 1.5}}
        | {"full": side(10.0), "shared": side(15.0)}
        for context, new in ((512, 32), (512, 33))
    ]
    model = {"id": "Llama-2-13b-chat-hf", "num_layers": 40}
    result = {"command": "bench", "model": model, "mlflow_run_id": "parent", "cells": cells}
    run = FinishedRun({**result, "digest": "abc", "num_shared": 10}, CONFIG)
    compared = compare_with_paper(measured(run), paper_numbers())
    found = {
        (one.value.quantity, one.value.length, one.value.num_shared): one.paper and one.paper.value
        for one in compared
    }
    assert found["bench/tokens_per_second", "512+32", 0] == 11.0
    assert found["bench/tokens_per_second", "512+32", 10] == 13.9
    assert found["bench/decode_speedup", "512+32", 10] == 1.26
    assert found["bench/memory_mb", "512+32", 10] == 28257
    assert not any(value for key, value in found.items() if key[1] == "512+33")


def test_curves_start_at_the_full_cache_and_the_papers_beside_them() -> None:
    run = ablation(("dissimilar_tested", 8, 14.0), ("dissimilar_tested", 4, 7.0))
    compared = compare_with_paper(measured(run), paper_numbers())
    ours = curves(compared, "perplexity/report")
    assert ours == {"llama2_7b: dissimilar tested": [(0.0, 1.0), (0.125, 1.0), (0.25, 0.5)]}
    assert curves(compared, "kl/report") == {}
    on_front = [
        replace(one, value=replace(one.value, map="front, paper greedy"))
        for one in compared
        if one.value.num_shared
    ]
    labels = curves(on_front, "perplexity/report")
    assert set(labels) == {"llama2_7b: front", "llama2_7b: paper greedy"}
    paper = paper_curves(paper_numbers(), "perplexity/report")
    assert paper["Llama2-7B-Chat"] == [(0.0, 1.0), (0.25, pytest.approx(6.62 / 9.39))]
    assert len(paper_curves(paper_numbers(), "tasks/retained")["Llama2-13B-Chat"]) == 4


def test_the_papers_own_table_names_places_and_what_varies() -> None:
    rows = paper_table(paper_numbers(), ["perplexity/report"])
    assert len(rows) == 1 + 19 + 4 + 4 + 3
    assert any("50 sentences" in row[2] and row[4] == "9.33" for row in rows)
    assert any("bookcorpus" in row[2] and row[4] == "9.15" for row in rows)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1e-9, "0"), (9.3912, "9.391"), (28461.4, "28,461"), (3e9, "3.000e+09")],
)
def test_numbers_are_written_with_four_digits(value: float, text: str) -> None:
    assert number_text(value) == text


def test_latex_prints_what_the_table_says() -> None:
    rows = [["a_b", "50 % & more", "n"], ["x#1", "▼ ≈ –", "9.4"], ["y", r"{\}", "10"]]
    text = to_latex(rows, caption="C & D", comments=["id1", "id2"])
    lines = text.splitlines()
    assert r"\caption{C \& D}" in lines
    assert r"\begin{tabular}{llr}" in lines
    assert r"a\_b & 50 \% \& more & n \\" in lines
    assert r"x\#1 & $\blacktriangledown$ $\approx$ -- & 9.4 \\ % id1" in lines
    assert r"y & \{\textbackslash{}\} & 10 \\ % id2" in lines
    assert text.count(r"\begin") == text.count(r"\end") == 2


def test_results_are_compared_value_by_value() -> None:
    recorded = {
        "seconds": 1.0,
        "versions": {"torch": "1"},
        "scores": {"kl": 1.0, "seconds": 5, "loss": 0.0},
        "results": [{"kv_source_layers": [0, 0], "found": 1, "trace": [{"cosine": None}]}],
    }
    again = {
        "seconds": 9.0,
        "versions": {"torch": "2"},
        "scores": {"kl": 1.0 + 1e-9, "seconds": 6, "loss": 1e-12},
        "results": [
            {"kv_source_layers": [0, 1], "found": 2, "trace": [{"cosine": None}, {"x": 1}]}
        ],
    }
    values = {v.path: v.verdict for v in compare_results(recorded, again, 1e-6)}
    assert values == {
        "scores.kl": "within tolerance",
        "scores.loss": "differs",
        "results[0].kv_source_layers": "differs",
        "results[0].found": "differs",
        "results[0].trace[0].cosine": "exact",
        "results[0].trace[1].x": "new",
    }
    exact = compare_results(recorded, again, 0)
    assert exact[0].verdict == "differs"
    assert exact[0].off == pytest.approx(1e-9)
    assert summary(exact)[1][:4] == ["scores", "0", "0", "2"]
    assert differing_surroundings(recorded, again) == [("versions.torch", "1", "2")]


def test_an_interval_that_an_earlier_version_did_not_give_is_no_result() -> None:
    recorded = {"scores": {"kl": 0.1}, "intervals": {"perplexity/report": [1.0, 2.0]}}
    ends = {"perplexity/report": [1.0, 2.0], "kl": [0.0, 0.2]}
    again = {"scores": {"kl": 0.1}, "intervals": ends}
    assert all(value.matches for value in compare_results(recorded, again, 0))
    missing = [value for value in compare_results(again, recorded, 0) if not value.matches]
    assert [value.path for value in missing] == ["intervals.kl[0]", "intervals.kl[1]"]


def test_a_share_that_an_earlier_version_told_of_a_failed_task_is_no_result() -> None:
    name, passed = "lm_eval/wiki_next/acc", "perplexity/report"
    entry = {"plan": "0_1", "scores": {name: 0.25}, "retained": {name: 1.0, passed: 0.9}}
    recorded = {"full": {"scores": {name: 0.25}}, "trials": {"complete": 4}, "front": [entry]}
    again = {
        **recorded,
        "pass_marks": {name: 0.4},
        "front": [{**entry, "retained": {passed: 0.9}}],
    }
    values = compare_results(recorded, again, 0)
    assert all(value.matches for value in values)
    assert not drew_other_maps(values)
    compared = compare_results(recorded, {**again, "pass_marks": {}}, 0)  # it does not fail: a loss
    (missing,) = [value for value in compared if not value.matches]
    assert (missing.path, missing.verdict) == (f"front[0].retained.{name}", "missing")
    assert not drew_other_maps(compared)
    other = {**again, "front": [{**again["front"][0], "plan": "0_0"}]}
    assert drew_other_maps(compare_results(recorded, other, 0))
    assert drew_other_maps(compare_results(recorded, {**again, "trials": {"complete": 5}}, 0))


@pytest.mark.parametrize(
    ("recorded", "says"),
    [
        ({}, "a sweep that was stopped and continued may have drawn other maps"),
        ({"trials_at_start": "x"}, "a sweep that was stopped and continued may have drawn"),
        ({"trials_at_start": 0}, "was not continued"),
        ({"trials_at_start": 5}, "continued a study that held 5 maps"),
    ],
)
def test_a_sweep_says_whether_it_was_continued(recorded: dict, says: str) -> None:
    """Sweeps of earlier versions do not; what a study held before is no result to compare."""
    assert says in why_other_maps(recorded)
    assert compare_results(recorded, {"trials_at_start": 3}, 0) == []
