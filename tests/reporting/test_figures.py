"""What the pictures draw in the awkward cases: zeros on a log axis, other scores, empty sides."""

import json
import math
import re
from dataclasses import replace

import pytest

from kvsharer_exp.reporting.figures.bench import bench_figure
from kvsharer_exp.reporting.figures.front import front_figure, front_html
from kvsharer_exp.reporting.figures.maps import map_figure
from kvsharer_exp.reporting.figures.progress import progress_figure
from kvsharer_exp.reporting.figures.ranking import acceptance_figure, distance_heatmap
from kvsharer_exp.reporting.figures.style import save_pdf, save_png, spread
from kvsharer_exp.reporting.figures.tasks import tasks_figure
from kvsharer_exp.search.front import pareto_front
from kvsharer_exp.values.footprint import Footprint
from kvsharer_exp.values.greedy import GreedyResult, GreedyStep
from kvsharer_exp.values.sharing_map import SharingMap
from kvsharer_exp.values.trial import FrontEntry, TrialResult


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


def test_more_kv_is_further_right_and_the_legend_lies_outside_of_the_axes() -> None:
    axes = draw(LOSSES, full_score=0.0)
    left, right = axes.get_xlim()
    assert left < right
    save_png(axes.figure)
    (legend,) = axes.figure.legends
    assert legend.get_window_extent().y1 < axes.get_tightbbox().y0


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


INTERVALS = {LOSSES[1].sharing_map.digest: (-0.2, -0.05)}


def test_intervals_are_marked_where_they_were_measured() -> None:
    axes = draw(LOSSES, reference_maps={}, intervals=INTERVALS)
    (bar,) = [made for made in axes.collections if hasattr(made, "get_segments")]
    assert bar.get_segments()[0].tolist() == [[0.75, 0.05], [0.75, 0.2]]
    made = traces(front_html(LOSSES, pareto_front(LOSSES), **LABELS, intervals=INTERVALS))
    assert made["front"]["error_y"]["array"] == pytest.approx([0, 0.1, 0])
    assert made["front"]["error_y"]["arrayminus"] == pytest.approx([0, 0.05, 0])


@pytest.mark.parametrize("results", [[], [result(0, 1, None)], LOSSES])
def test_progress_is_the_best_so_far_of_every_size(results) -> None:
    volumes = [0.1 * i for i in range(len(results))]
    left, right = progress_figure(results, volumes, score_label="kl").axes
    assert list(left.lines[0].get_ydata()) == volumes
    lines = {line.get_label(): list(line.get_ydata()) for line in right.lines}
    if results is LOSSES:
        assert lines == {"1": [0.001, 0.001], "2": [0.1, 0.1], "3": [1.0, 1.0]}
        better = [*results, result(9, 2, -0.05)]
        right = progress_figure(better, [0.0] * 6, score_label="kl").axes[1]
        line = next(line for line in right.lines if line.get_label() == "2")
        assert list(line.get_xdata()) == [2, 6, 6]
        assert list(line.get_ydata()) == [0.1, 0.05, 0.05]
    else:
        assert lines == {}


def test_an_arc_leads_from_every_target_to_its_source_and_owners_are_shaded() -> None:
    from matplotlib.patches import FancyArrowPatch, Rectangle

    maps = {"one": SharingMap((0, 1, 0, 1)), "deeper": SharingMap((0, 0, 2, 3, 4, 5))}
    figure = map_figure(maps, "two maps")
    assert [axes.get_title() for axes in figure.axes] == ["one", "deeper"]
    for axes, sharing_map in zip(figure.axes, maps.values(), strict=True):
        arrows = [made for made in axes.patches if isinstance(made, FancyArrowPatch)]
        ends = {(int(a._path_original.vertices[0][1]), int(a._path_original.vertices[-1][1]))
                for a in arrows}  # fmt: skip
        assert ends == {(t, sharing_map.kv_source_layers[t]) for t in sharing_map.targets}
        boxes = [made for made in axes.patches if isinstance(made, Rectangle)]
        white = [i for i, box in enumerate(boxes) if box.get_facecolor()[:3] == (1, 1, 1)]
        assert white == list(sharing_map.targets)
        assert [text.get_text() for text in axes.texts] == list(map(str, range(len(boxes))))
    assert map_figure({"none": SharingMap.identity(3)}).axes[0].patches


def entry(num_shared: int, **retained: float) -> FrontEntry:
    sources = (0,) * (num_shared + 1) + tuple(range(num_shared + 1, 8))
    return FrontEntry(sources, "", num_shared, 1 - num_shared / 8, {}, retained)


def test_bars_are_what_each_map_retains_and_a_missing_score_has_none() -> None:
    full = {"a": 0.5, "lm_eval/b/acc": 0.25}
    entries = [entry(2, **{"a": 0.7, "lm_eval/b/acc": 0.6}), entry(1, a=0.9), entry(0)]
    axes = tasks_figure(entries, full, list(full)).axes[0]
    bars = {made.get_label(): [bar.get_height() for bar in made] for made in axes.containers}
    assert bars == {"1 (88% KV)": [0.9], "2 (75% KV)": [0.7, 0.6]}
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["a\nfull: 0.5", "b\nacc\nfull: 0.25"]
    assert tasks_figure([], full, list(full)).axes


def test_whiskers_are_the_intervals_of_tasks_and_grey_that_of_the_full_cache() -> None:
    task = "lm_eval/b/acc"
    full, ends = {"perplexity/report": 20.0, task: 0.5}, {"perplexity/report": (18.0, 22.0)}
    shared = replace(
        entry(2, **{task: 0.8, "perplexity/report": 0.9}),
        scores={task: 0.4, "perplexity/report": 22.0},
        intervals={task: [0.2, 0.6], "perplexity/report": [20.0, 24.0]},
    )
    axes = tasks_figure([shared], full, list(full), {**ends, task: (0.3, 0.7)}).axes[0]
    bars, whisker = axes.containers
    (line,) = whisker.lines[2]  # one task: perplexity has no whisker
    assert line.get_segments()[0][:, 1].tolist() == pytest.approx([0.4, 1.2])
    assert [bar.get_height() for bar in bars] == [0.9, 0.8]
    (grey,) = [made for made in axes.collections if made is not line]
    heights = grey.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((0.6, 1.4))


def test_the_benchmark_shows_the_prediction_beside_what_was_measured() -> None:
    spread_of = {"median": 2.0, "min": 1.0, "max": 4.0}
    half = {"median": 1.0, "min": 0.5, "max": 2.0}
    cell = {
        "batch": 1,
        "context": 64,
        "full": {
            "cache_bytes": 400,
            "prefill_seconds": spread_of,
            "decode_tokens_per_second": half,
        },
        "shared": {
            "cache_bytes": 300,
            "prefill_seconds": half,
            "decode_tokens_per_second": spread_of,
        },
        "predicted": {"kv_fraction": 0.75, "prefill_speedup": 1.1, "decode_speedup": 1.2},
        "speedup": {"prefill": 2.0, "decode": 2.0},
    }
    figure = bench_figure([cell, cell])
    heights = [[round(bar.get_height(), 3) for bar in axes.patches] for axes in figure.axes]
    assert heights == [[0.75, 0.75] * 2, [1.1, 2.0] * 2, [1.2, 2.0] * 2]
    (whisker,) = figure.axes[2].collections[0].get_segments()
    assert whisker[:, 1].tolist() == [0.5, 8.0]


def test_what_is_drawn_of_many_is_spread_evenly() -> None:
    assert spread([1, 2, 3], 8) == [1, 2, 3]
    assert spread(list(range(21)), 3) == [0, 10, 20]


def test_drawing_touches_no_global_state() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    save_png(front_figure(LOSSES, pareto_front(LOSSES), **LABELS))
    assert dict(matplotlib.rcParams) == before
    for save, magic in ((save_png, b"\x89PNG"), (save_pdf, b"%PDF")):
        one, two = (save(draw(LOSSES).figure) for _ in range(2))
        assert one == two
        assert one.startswith(magic)
