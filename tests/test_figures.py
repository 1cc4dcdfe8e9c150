"""What the pictures draw in the awkward cases: zeros on a log axis, other scores, empty sides."""

import json
import math
import re
from dataclasses import replace

import pytest

from kvsharer_exp.figures import (
    acceptance_figure,
    distance_heatmap,
    front_figure,
    front_html,
    hypervolume_figure,
    save_png,
)
from kvsharer_exp.front import pareto_front
from kvsharer_exp.records import Footprint, GreedyResult, GreedyStep, TrialResult
from kvsharer_exp.sharing_map import SharingMap


def result(number: int, num_shared: int, score: float | None, origin: str = "tpe") -> TrialResult:
    sharing_map = SharingMap((0,) * (num_shared + 1) + tuple(range(num_shared + 1, 8)))
    status = "failed" if score is None else "complete"
    return TrialResult(
        number,
        {},
        sharing_map,
        {"kl": 0.5},
        Footprint(1, 1 - num_shared / 8, 0),
        status,
        "fit",
        1.0,
        score,
        origin,
    )


LOSSES = [
    result(0, 1, -0.001),
    result(1, 2, -0.1),
    result(2, 2, -8.0),
    result(3, 3, -1.0),
    result(4, 4, None),
]
LABELS = {"reference_maps": {"paper greedy": LOSSES[2:3]}, "score_label": "score", "title": "t"}


def draw(results: list[TrialResult], **more: object):
    return front_figure(results, pareto_front(results), **{**LABELS, **more}).axes[0]


def drawn(axes) -> dict[str, list[list[float]]]:
    return {made.get_label(): made.get_offsets().tolist() for made in axes.collections}


def test_the_front_is_a_step_to_the_best_map_of_every_budget() -> None:
    line = draw(LOSSES).lines[0]
    assert line.get_drawstyle() == "steps-pre"
    assert list(line.get_xdata()) == [0.875, 0.75, 0.625]
    assert list(line.get_ydata()) == [0.001, 0.1, 1.0]


def test_every_complete_map_is_drawn_and_no_other() -> None:
    shown = drawn(draw(LOSSES))
    assert len(shown["maps scored"]) == 4
    assert shown["paper greedy"] == [[0.75, 8.0]]


def test_the_full_cache_and_losses_of_zero_have_a_place() -> None:
    axes = draw(LOSSES, full_score=0.0)
    assert axes.get_yscale() == "symlog"
    assert drawn(axes)["full cache"] == [[1.0, 0.0]]
    better_than_full = [*LOSSES, result(9, 5, 0.0)]
    assert [0.375, 0.0] in drawn(draw(better_than_full))["maps scored"]


def test_scores_where_more_is_better_are_drawn_as_they_are() -> None:
    retained = [result(0, 1, 0.99), result(1, 2, 0.9)]
    axes = draw(retained, full_score=1.0, reference_maps={})
    assert axes.get_yscale() == "linear"
    assert list(axes.lines[0].get_ydata()) == [0.99, 0.9]
    assert drawn(axes)["full cache"] == [[1.0, 1.0]]
    assert "higher is better" in axes.get_ylabel()


@pytest.mark.parametrize("full_score", [None, 0.0])
@pytest.mark.parametrize("results", [[], [result(0, 1, None)], [result(0, 0, 0.0)], LOSSES])
def test_any_results_give_a_picture_and_a_page(results, full_score) -> None:
    labels = {**LABELS, "reference_maps": {"paper greedy": []}, "full_score": full_score}
    front = pareto_front(results)
    assert save_png(front_figure(results, front, **labels)).startswith(b"\x89PNG")
    assert "<div" in front_html(results, front, **labels)


def traces(page: str) -> dict[str, dict]:
    """The data that plotly is given: the first argument list of its call."""
    start = re.search(r'Plotly\.newPlot\(\s*"front",\s*', page)
    assert start is not None
    data, _ = json.JSONDecoder().raw_decode(page[start.end() :])
    return {trace["name"]: trace for trace in data}


def test_the_interactive_front_holds_the_same_values_and_needs_no_network() -> None:
    page = front_html(LOSSES, pareto_front(LOSSES), **LABELS, full_score=0.0)
    made = traces(page)
    assert made["front"]["x"] == [0.875, 0.75, 0.625]
    assert made["front"]["y"] == [0.001, 0.1, 1.0]
    assert made["front"]["line"]["shape"] == "vh"
    assert made["full cache"]["y"] == [0.0005]  # below the smallest: a log axis has no 0
    assert str(LOSSES[0].sharing_map) in made["front"]["text"][0]
    assert "1/8 shared" in made["front"]["text"][0]
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)


def test_what_hovers_is_text_not_markup() -> None:
    odd = [replace(LOSSES[0], origin="<img src=x>", scores={"<b>": 1.0}), LOSSES[1]]
    page = front_html(odd, odd, **{**LABELS, "title": "<i>"})
    text = traces(page)["front"]["text"][0]
    assert "&lt;img" in text and "&lt;b&gt;" in text
    assert "<img" not in text


def test_greedy_without_an_acceptance_test_says_so() -> None:
    trace = (GreedyStep(3, 1, 9.0, None, True),)
    found = GreedyResult(0.25, 2, 1, (0, 1, 2, 1), 1, 0.1, trace)
    axes = acceptance_figure(found, threshold=0.5).axes[0]
    assert [text.get_text() for text in axes.texts] == ["no acceptance test was run"]


def test_the_heat_map_names_its_axes_and_its_scale() -> None:
    figure = distance_heatmap([[math.nan] * 40 for _ in range(40)], "title")
    axes, bar = figure.axes
    assert "source" in axes.get_xlabel() and "target" in axes.get_ylabel()
    assert bar.get_ylabel() == "distance"
    assert len(axes.get_xticks()) <= 12


@pytest.mark.parametrize("volumes", [[], [0.5], [0.1, 0.4]])
def test_hypervolume_of_any_length(volumes) -> None:
    axes = hypervolume_figure(volumes).axes[0]
    assert list(axes.lines[0].get_ydata()) == volumes


def test_drawing_touches_no_global_state() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    save_png(front_figure(LOSSES, pareto_front(LOSSES), **LABELS))
    assert dict(matplotlib.rcParams) == before
    assert save_png(draw(LOSSES).figure) == save_png(draw(LOSSES).figure)
