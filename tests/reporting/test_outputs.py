"""Figures are drawn from the values given, and tables say them."""

import math
from dataclasses import replace

from kvsharer_exp.reporting.answers import answer
from kvsharer_exp.reporting.figures.front import front_figure
from kvsharer_exp.reporting.figures.ranking import acceptance_figure, distance_heatmap
from kvsharer_exp.reporting.figures.style import save_png
from kvsharer_exp.reporting.front_table import front_table, table_notes, task_notes
from kvsharer_exp.reporting.markup import to_markdown
from kvsharer_exp.values.footprint import Footprint
from kvsharer_exp.values.greedy import GreedyResult, GreedyStep
from kvsharer_exp.values.score_names import retained, table_columns
from kvsharer_exp.values.sharing_map import SharingMap
from kvsharer_exp.values.trial import FrontEntry, TrialResult

IDENTITY = SharingMap.identity(8)
FULL = {
    "kl": 0.0,
    "cosine": 1.0,
    "perplexity/calibration": 20.0,
    "perplexity/report": 22.0,
    "lm_eval/wiki_cloze_search/acc": 0.5,
    "lm_eval/wiki_cloze/acc": 0.4,
    "lm_eval/wiki_cloze/perplexity": 9.0,
}


def result(number: int, targets: list[int], kl: float, origin: str = "sampler") -> TrialResult:
    sharing_map = IDENTITY
    for target in targets:
        sharing_map = sharing_map.share(target, 0)
    size = Footprint(1, 1 - len(targets) / 8, 0)
    scores = {"kl": kl}
    return TrialResult(number, {}, sharing_map, scores, size, "complete", "fit", 1.0, -kl, origin)


RESULTS = [
    result(0, [1, 2], 1.5, "paper greedy"),
    result(1, [5], 0.02),
    result(2, [5, 6], 0.1),
    result(3, [3, 4], 0.4),
]
FRONT = [RESULTS[1], RESULTS[2]]
PAPER = {"paper greedy": RESULTS[:1]}


def entry(member: TrialResult, report: float) -> FrontEntry:
    return FrontEntry(
        member.sharing_map.kv_source_layers,
        member.sharing_map.digest,
        len(member.sharing_map.targets),
        member.footprint.kv_fraction,
        {"kl": member.scores["kl"], "perplexity/report": report, "lm_eval/wiki_cloze/acc": 0.3},
        {"perplexity/report": 22 / report, "lm_eval/wiki_cloze/acc": 0.75},
        "",
        "<script>alert(1)</script>",
    )


ENTRIES = [entry(FRONT[0], 22.3), entry(FRONT[1], 24.0)]
LABELS = {"reference_maps": PAPER, "score_label": "score (kl)", "title": "tiny"}


def test_the_front_is_drawn_where_it_was_measured() -> None:
    axes = front_figure(RESULTS, FRONT, **LABELS).axes[0]
    line = next(line for line in axes.lines if line.get_label() == "front")
    assert list(line.get_xdata()) == [0.875, 0.75]
    assert list(line.get_ydata()) == [0.02, 0.1]
    assert [text.get_text() for text in axes.texts] == ["1", "2"]
    assert axes.get_yscale() == "log"


def test_the_heat_map_leaves_out_pairs_that_may_not_share() -> None:
    matrix = [[math.nan, math.nan], [3.0, math.nan]]
    image = distance_heatmap(matrix, "title").axes[0].images[0]
    assert image.get_array().count() == 1
    assert image.get_array()[1, 0] == 3.0


def test_acceptance_is_drawn_in_the_order_tried() -> None:
    trace = (GreedyStep(3, 1, 9.0, 0.8, True), GreedyStep(4, 1, 8.0, 0.3, False))
    found = GreedyResult(0.25, 2, 1, (0, 1, 2, 1, 4), 2, 0.1, trace)
    axes = acceptance_figure(found, threshold=0.5).axes[0]
    drawn = {c.get_label(): c.get_offsets().tolist() for c in axes.collections}
    assert drawn == {"accepted (1)": [[1.0, 0.8]], "refused (1)": [[2.0, 0.3]]}


def test_pictures_are_the_same_bytes_every_time() -> None:
    pictures = [save_png(front_figure(RESULTS, FRONT, **LABELS)) for _ in range(2)]
    assert pictures[0] == pictures[1]
    assert pictures[0].startswith(b"\x89PNG")


def test_the_table_leaves_out_what_was_optimised_on() -> None:
    shown = ["kl", "perplexity/calibration", "perplexity/report", "lm_eval/wiki_cloze/acc"]
    assert table_columns(FULL) == shown
    header, full, first, second = front_table(ENTRIES, FULL)
    assert header[:2] == ["shared", "KV"]
    assert full[2:6] == ["0", "20", "22", "0.4"]
    assert first[:5] == ["1/8", "88%", "0.02", "–", "22.3 (99%)"]
    assert second[5] == "0.3 (75%)"
    markdown = to_markdown([header, full])
    assert markdown.splitlines()[1].count("---") == len(header)


def test_the_answer_says_whether_the_paper_is_beaten() -> None:
    sentences = answer(ENTRIES, FULL, PAPER, RESULTS)
    assert (
        "Keeping at least 98% of the held-out perplexity, 1 of 8 layers can be shared"
        in (sentences[0])
    )
    assert "the best map with as little KV -0.1" in sentences[-1]
    alone = answer(ENTRIES, FULL, PAPER, RESULTS[:1])
    assert "is the best found with as little KV" in alone[-1]
    assert "No shared map keeps 98%" in answer([], FULL, {}, [])[0]


def test_a_task_shows_its_interval_and_whether_it_can_tell() -> None:
    """Sharing eleven layers left the accuracy of a task with 24 items where it was."""
    name = "lm_eval/wiki_cloze/acc"
    inside = replace(ENTRIES[0], scores={**ENTRIES[0].scores, name: 0.35})
    inside = replace(inside, intervals={name: [0.2, 0.5], "perplexity/report": [20.0, 25.0]})
    full = {name: [0.25, 0.55]}
    rows = front_table([inside], FULL, full)
    assert rows[1][5] == "0.4 (0.25–0.55)"
    assert rows[2][5] == "0.35 (0.2–0.5)"
    assert rows[2][4] == "22.3 (99%)"
    (note,) = table_notes([inside], FULL, full)
    assert note.startswith("Cannot tell these from the full cache: wiki_cloze acc;")
    outside = replace(inside, scores={**inside.scores, name: 0.2})
    assert table_notes([inside, outside], FULL, full) == []
    assert table_notes([inside], FULL) == []  # nobody knows without an interval


def test_a_task_that_the_full_cache_fails_has_nothing_to_retain() -> None:
    name = "lm_eval/needle_2048/exact_match"
    scores, full = {name: 0.3, "perplexity/report": 22.0}, {name: 0.4, "perplexity/report": 22.0}
    assert retained(scores, full) == {"perplexity/report": 1.0}
    assert retained(scores, {name: 0.5}) == {name: 0.6}
    failed = replace(ENTRIES[0], scores=scores, retained=retained(scores, full))
    (note,) = table_notes([failed], full)
    assert note.startswith(
        "The full cache fails needle_2048 exact_match (0.4), so nothing is retained there: "
    )


def test_the_note_names_every_score_of_which_nothing_is_retained() -> None:
    next_, cloze = "lm_eval/wiki_next/", "lm_eval/wiki_cloze/"
    full = {next_ + "acc": 0.375, next_ + "acc_norm": 0.4167}
    full |= {cloze + "perplexity": 9e20, cloze + "acc": 0.0}
    marks = {next_ + "acc": 0.423, next_ + "acc_norm": 0.423}
    scores = {**full, cloze + "perplexity": 8e20}
    (note,) = task_notes([(scores, retained(scores, full, None, marks))], full)
    assert note.startswith(
        "The full cache fails wiki_next acc (0.375), wiki_next acc_norm (0.417), "
        "wiki_cloze perplexity (9e+20), wiki_cloze acc (0), so nothing is retained there: "
    )
