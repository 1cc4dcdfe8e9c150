"""Rows become cells: intervals, verdicts against the first arm, tables that hide nothing."""

import math
from dataclasses import replace

import pytest

from kvsharer_exp.measure.score_interval import score_interval
from kvsharer_exp.reporting.ablation import Row, summarise
from kvsharer_exp.reporting.ablation_tables import acceptance_table, arms_table, limit_sentences
from kvsharer_exp.reporting.figures.ablation import (
    acceptance_rank_figure,
    arms_figure,
    pairs_figure,
    threshold_figure,
)
from kvsharer_exp.reporting.figures.style import save_png
from kvsharer_exp.search.paper.acceptance import PairScore, RankBin
from kvsharer_exp.values.greedy import GreedyResult
from kvsharer_exp.values.intervals import Interval, wilson
from kvsharer_exp.values.score_names import HELD_OUT_KL, HELD_OUT_PERPLEXITY

TASK = "lm_eval/wiki_cloze/acc"
WINDOWS = 40


def row(
    arm: str,
    loss: float = 3.0,
    *,
    right: int = 20,
    found: int = 2,
    draw: int = 0,
    ratio: float = 0.5,
    **variant: object,
) -> Row:
    """A row whose windows lose ``loss`` nats, each a bit differently, with ``right`` answers."""
    nlls = [loss + 0.01 * math.sin(5 * i) for i in range(WINDOWS)]
    items = {
        HELD_OUT_KL: [loss / 10] * WINDOWS,
        HELD_OUT_PERPLEXITY: [-nll for nll in nlls],
        TASK: [float(i < right) for i in range(WINDOWS)],
    }
    scores = {
        HELD_OUT_KL: loss / 10,
        HELD_OUT_PERPLEXITY: math.exp(sum(nlls) / WINDOWS),
        TASK: right / WINDOWS,
    }
    intervals = {
        name: score_interval(name, value, items[name], confidence=0.95)
        for name, value in scores.items()
    }
    return Row(
        variant,
        arm,
        draw,
        GreedyResult(ratio, 2, found, (0, 0, 0, 3)[: found + 1] + (3,) * (3 - found), 7, 1.5, ()),
        kv_fraction=0.5,
        scores=scores,
        intervals={name: interval for name, interval in intervals.items() if interval is not None},
        items=items,
    )


def test_intervals_by_kind_of_score() -> None:
    worse = row("a", 4.0)
    inside = worse.intervals[HELD_OUT_PERPLEXITY]
    assert inside.low < inside.mean == worse.scores[HELD_OUT_PERPLEXITY] < inside.high
    assert worse.intervals[TASK] == wilson(20, WINDOWS)
    by_error = score_interval("lm_eval/t/f1", 0.5, [0.1, 0.2], confidence=0.95, stderr=0.1)
    assert by_error is not None
    assert (by_error.low, by_error.high) == pytest.approx((0.304, 0.696), abs=1e-3)
    assert score_interval("lm_eval/t/f1", 0.5, [], confidence=0.95) is None
    assert score_interval("kl", 0.0, [0.0, 0.0], confidence=0.95) == Interval(0.0, 0.0, 0.0)
    of_few = score_interval("lm_eval/t/perplexity", 9e20, [], confidence=0.95, stderr=3e21)
    assert of_few is not None and of_few.low == 0  # no perplexity is below 0
    group = score_interval("lm_eval/group/acc", 0.97, [], confidence=0.95, stderr=0.04)
    assert group is not None and 0.8 < group.low < group.high == 1  # no accuracy is above 1
    percent = score_interval("lm_eval/odd/acc", 97.0, [], confidence=0.95, stderr=4.0)
    assert percent is not None and percent.high > 100  # it is on another scale


def test_the_interval_over_draws_of_an_accuracy_stays_within_0_and_1() -> None:
    draws = [row("random", draw=draw, right=right) for draw, right in enumerate((0, 1, 4))]
    (cell,) = summarise(draws, confidence=0.95)
    inside = cell.scores[TASK]
    assert inside.low == 0 < inside.mean < inside.high < 1


def test_verdicts_are_against_the_first_arm_on_the_same_items() -> None:
    first, worse, better = row("a"), row("b", 3.2, right=20), row("c", 2.9, right=40)
    cells = summarise([first, worse, better], confidence=0.95)
    assert cells[0].verdicts == {}
    assert cells[1].verdicts == {
        HELD_OUT_KL: "worse",
        HELD_OUT_PERPLEXITY: "worse",
        TASK: "not told apart",
    }
    assert cells[2].verdicts == {
        HELD_OUT_KL: "better",
        HELD_OUT_PERPLEXITY: "better",
        TASK: "better",
    }
    assert cells[2].against[TASK].test == "mcnemar"
    assert cells[1].against[HELD_OUT_PERPLEXITY].difference == pytest.approx(-0.2)


def test_maps_of_other_sizes_and_ratios_are_not_compared() -> None:
    cells = summarise([row("a"), row("b", 9.0, found=1), row("b", 9.0, ratio=0.7)], confidence=0.95)
    assert [cell.against for cell in cells] == [{}, {}, {}]


def test_many_comparisons_are_adjusted() -> None:
    """6 of 40 answers that only one map gets right: p = .03 alone, nothing among twenty."""
    alone = summarise([row("a"), row("b", right=26)], confidence=0.95)
    assert alone[1].verdicts[TASK] == "better"
    rivals = [row(f"b{i}", right=26 if i == 0 else 20) for i in range(20)]
    among = summarise([row("a"), *rivals], confidence=0.95)
    assert among[1].verdicts[TASK] == "not told apart"


def test_draws_are_one_cell_with_students_interval() -> None:
    draws = [row("random", loss, draw=i) for i, loss in enumerate((3.9, 4.0, 4.1))]
    _, cell = summarise([row("a"), *draws], confidence=0.95)
    assert cell.found == (2, 2, 2)
    interval = cell.scores[HELD_OUT_PERPLEXITY]
    assert interval.mean == pytest.approx(draws[1].scores[HELD_OUT_PERPLEXITY], rel=1e-6)
    assert math.log(interval.high / interval.mean) == pytest.approx(
        4.303 * 0.1 / math.sqrt(3), 1e-3
    )
    assert cell.against[HELD_OUT_PERPLEXITY].test == "t"
    assert cell.verdicts[HELD_OUT_PERPLEXITY] == "worse"


def test_the_reference_is_of_the_first_variant() -> None:
    rows = [row("a", loss, **{"search.threshold": t}) for t, loss in ((0.5, 3.0), (0.9, 2.5))]
    cells = summarise(rows, confidence=0.95)
    assert [cell.label for cell in cells] == ["a · T=0.5", "a · T=0.9"]
    assert cells[1].verdicts[HELD_OUT_PERPLEXITY] == "better"


def test_the_table_shows_each_task_with_its_interval_and_mark() -> None:
    full = row("full", 2.8)
    none = Row({}, "c", 0, GreedyResult(0.5, 2, 0, (0, 1, 2, 3), 15, 1.0, ()), 1.0)
    cells = summarise([row("a"), row("b", 3.2), none], confidence=0.95)
    header, whole, *rows = arms_table(cells, full.scores, full.intervals)
    assert header[-3:] == ["kl report", "perplexity report", "wiki_cloze acc"]
    assert whole[0] == "full cache"
    assert rows[0][:4] == ["a", "50.0%", "2/2", "0"]
    assert not any(mark in cell for cell in rows[0] for mark in "▲▼≈")
    assert rows[1][-2].endswith("▼")
    assert rows[1][-1] == "0.5 (0.352–0.648) ≈"
    assert rows[2][2:3] + rows[2][-3:] == ["0/2", "–", "–", "–"]
    cells = summarise([row("read"), replace(none, arm="drop"), none], confidence=0.95)
    header, _, *rows = arms_table(cells, full.scores, full.intervals)
    assert header[:4] == ["arm", "ratio", "shared", "KV"]
    kept = [row[2:4] for row in rows]  # a walk that shares nothing has a map, which keeps all
    assert kept == [["2/2", "50.0%"], ["no plan", "–"], ["0/2", "100.0%"]]


def test_acceptance_table() -> None:
    bins = {"x": [RankBin(1, 4, 2, 1, wilson(1, 2)), RankBin(5, 5, 0, 0, None)]}
    assert acceptance_table(bins) == [["rank", "x"], ["1–4", "1/2 (9%–91%)"], ["5", "–"]]


def test_what_a_limit_gives() -> None:
    (sentence,) = limit_sentences(row("a").items, confidence=0.95)
    assert (
        sentence
        == "The limit: wiki_cloze acc ± 0.15 with 40, ± 0.077 with 160, ± 0.039 with 640 items"
    )


def test_figures_draw_what_the_cells_hold() -> None:
    cells = summarise([row("a"), row("b", 3.2, found=1), row("a", ratio=0.7)], confidence=0.95)
    figure = arms_figure(cells, HELD_OUT_PERPLEXITY, title="t", full_score=16.0)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert sorted(labels) == ["a", "b", "full cache"]
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["50.0%", "70.0%"]
    bins = {"x_tested": [RankBin(1, 4, 4, 1, wilson(1, 4)), RankBin(5, 8, 0, 0, None)]}
    figure = acceptance_rank_figure(bins, title="t")
    assert figure.axes[0].get_legend().get_texts()[0].get_text() == "x tested (4 tried)"
    (line,) = figure.axes[0].lines[:1]
    assert list(line.get_ydata()) == [0.25]
    pairs = [PairScore(i, i, 0, 1.0, 0.5, 0.1 * i) for i in range(1, 4)]
    assert save_png(pairs_figure(pairs, threshold=0.5, title="t")).startswith(b"\x89PNG")
    points = {0.5: [cells[0]], 0.9: [cells[1]]}
    figure = threshold_figure(points, HELD_OUT_PERPLEXITY, title="t", full_score=16.0)
    assert list(figure.axes[0].lines[0].get_ydata()) == [2, 1]


def test_a_cell_of_one_score_without_an_interval_stands_for_itself() -> None:
    (cell,) = summarise([row("a")], confidence=0.95)
    assert isinstance(cell.scores[HELD_OUT_KL], Interval)


def test_a_plan_that_is_no_map_has_its_text_and_a_column_for_its_bytes() -> None:
    result = GreedyResult(0.5, 2, 2, (), 0, 1.0, ())
    dropped = Row({}, "drop", 0, result, 0.5, plan="0_x_2_x")
    assert dropped.to_dict()["kv_source_layers"] is None
    assert dropped.to_dict()["plan"] == "0_x_2_x"
    assert "plan" not in row("a").to_dict()
    full = row("full", 2.8)
    cells = summarise([row("read"), dropped], confidence=0.95)
    header, whole, *rows = arms_table(cells, full.scores, full.intervals)
    assert header[:4] == ["arm", "ratio", "shared", "KV"]
    assert whole[:4] == ["full cache", "", "0", "100.0%"]
    assert [cells[3] for cells in rows] == ["50.0%", "50.0%"]
