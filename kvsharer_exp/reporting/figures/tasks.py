"""Draw what maps retain, task by task, because averages hide what a single task loses.

The page of a sweep shows this for maps of its front.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvsharer_exp.reporting.figures.style import BLACK, GREY, empty, shades
from kvsharer_exp.reporting.front_table import NONE, Ends
from kvsharer_exp.reporting.plan_kinds import kv_percent
from kvsharer_exp.reporting.sharing_front import holds_plans
from kvsharer_exp.values.score_names import ScoreName, label, share_name
from kvsharer_exp.values.trial import FrontEntry


def tasks_figure(
    entries: Sequence[FrontEntry],
    full_scores: Mapping[str, float],
    scores: Sequence[str],
    full_intervals: Ends = NONE,
) -> Any:
    """Draw the retained share of each of ``scores``, a bar per map, fewest shared layers first.

    If an entry is a plan that is no map, the bars come in the order of the KV kept, most first.
    The line is the full cache, whose score is under each name. A score that a map lacks has no bar.
    A whisker is the interval of what a plan retains, and the grey behind the bars that of the full
    cache's score: a task cannot tell a plan from the full cache whose bar ends there.
    """
    plans = holds_plans(entries)
    shown = [entry for entry in entries if not entry.is_full]
    shown.sort(key=lambda entry: -entry.kv_fraction if plans else entry.num_shared)
    figure, axes = empty(max(5.0, 1.2 + 1.0 * len(scores) + 0.16 * len(scores) * len(shown)), 4.0)
    width = 0.8 / max(1, len(shown))
    for number, (entry, colour) in enumerate(zip(shown, shades(len(shown)), strict=True)):
        offset = (number - (len(shown) - 1) / 2) * width
        known = [
            (i, entry.retained[name]) for i, name in enumerate(scores) if name in entry.retained
        ]
        label = f"{kv_percent(entry.kv_fraction, fine=plans)} KV"
        label = label if plans else f"{entry.num_shared} ({label})"
        places, heights = [i + offset for i, _ in known], [value for _, value in known]
        axes.bar(places, heights, width * 0.92, color=colour, label=label)
        _whiskers(axes, entry, [(i + offset, scores[i]) for i, _ in known])
    for place, name in enumerate(scores):
        if ScoreName.parse(name).is_task and name in full_intervals and full_scores[name]:
            low, high = (end / full_scores[name] for end in full_intervals[name])
            axes.fill_between(
                [place - 0.45, place + 0.45], low, high, color=GREY, alpha=0.3, lw=0, zorder=0
            )
    axes.axhline(1.0, color=BLACK, lw=1)
    axes.set_xticks(range(len(scores)), [_label(name, full_scores[name]) for name in scores])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set(ylabel="retained of the full cache's score", ylim=(0, None))
    axes.set_title("Task by task (100 %: the full cache)")
    if shown:
        legend = {
            "loc": "center left",
            "bbox_to_anchor": (1, 0.5),
            "title": "plans" if plans else "layers shared",
        }
        axes.legend(frameon=False, fontsize=8, title_fontsize=8, **legend)
    return figure


def _whiskers(axes: Any, entry: FrontEntry, places: Sequence[tuple[float, str]]) -> None:
    """Draw the intervals of what is retained; those of the tasks' scores, where a run has no other.

    Runs of earlier versions have no others.
    """
    for place, name in places:
        middle, score = entry.retained[name], entry.scores.get(name)
        inside = entry.intervals.get(share_name(name))
        if not inside and score and ScoreName.parse(name).is_task:
            inside = [end * middle / score for end in entry.intervals.get(name, [])]
        if inside:
            arms = [[max(0.0, middle - inside[0])], [max(0.0, inside[1] - middle)]]
            axes.errorbar(place, middle, arms, color=BLACK, lw=0.8, capsize=2)


def _label(name: str, full: float) -> str:
    words = label(name, "\n")
    return f"{words}\nfull: {full:.3g}"
