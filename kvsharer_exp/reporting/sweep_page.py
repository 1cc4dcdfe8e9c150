"""Make the HTML page of a sweep: question, answer, front, pictures, and how to serve a plan.

The command ``sweep`` draws the `pictures` and puts them on the `front_page`. The page needs no
network. It holds Plotly's library once (4.8 MB); all other pictures are PNG.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from kvsharer_exp.reporting.answers import answer, most_shared
from kvsharer_exp.reporting.figures.front import front_figure, front_html
from kvsharer_exp.reporting.figures.maps import map_figure
from kvsharer_exp.reporting.figures.plans import Strip, plans_figure
from kvsharer_exp.reporting.figures.progress import progress_figure
from kvsharer_exp.reporting.figures.ranking import distance_heatmap
from kvsharer_exp.reporting.figures.style import save_png, spread
from kvsharer_exp.reporting.figures.tasks import tasks_figure
from kvsharer_exp.reporting.html import STYLE, embedded, table
from kvsharer_exp.reporting.plan_kinds import action_counts, kv_percent, size_words
from kvsharer_exp.reporting.serving import engines, serving
from kvsharer_exp.reporting.sweep_result import SweepResult
from kvsharer_exp.values.score_names import CALIBRATION_PERPLEXITY, KL, table_columns
from kvsharer_exp.values.trial import FrontEntry

_DRAWN = 8  # the most maps side by side in a picture
_STRIPS = 24  # the most plans below each other


def pictures(sweep: SweepResult) -> dict[str, Any]:
    """Draw the figures of a sweep, by file name without its ending."""
    drawn = spread(sweep.changed, _DRAWN)
    label = sweep.score_label
    found = {
        "front": front_figure(sweep.results, sweep.front, title=sweep.title, **sweep.drawing),
        "progress": progress_figure(sweep.results, sweep.volumes, score_label=label),
        "tasks": tasks_figure(
            drawn, sweep.full_scores, _compared(sweep.full_scores), sweep.full_intervals
        ),
    }
    if sweep.has_plans:
        strips = [_strip(entry) for entry in spread(sweep.changed, _STRIPS)]
        found["plans"] = plans_figure(strips, f"{sweep.model}: plans of the front")
    elif drawn:
        maps = {_above(entry): entry.kv_plan.sharing_map for entry in drawn}
        known = {name: made for name, made in maps.items() if made is not None}
        found["maps"] = map_figure(known, f"{sweep.model}: maps of the front")
    return found


def _compared(full_scores: Mapping[str, float]) -> list[str]:
    left_out = (KL, CALIBRATION_PERPLEXITY)
    return [name for name in table_columns(full_scores) if name not in left_out]


def _above(entry: FrontEntry) -> str:
    kl = f"\n{_kl(entry)}" if _kl(entry) else ""
    return f"{size_words(entry.kv_plan)}{kl}"


def _strip(entry: FrontEntry) -> Strip:
    return Strip(entry.kv_plan, entry.kv_fraction, _kl(entry))


def _kl(entry: FrontEntry) -> str:
    return f"KL {entry.scores[KL]:.3g}" if KL in entry.scores else ""


def front_page(sweep: SweepResult, pngs: Mapping[str, bytes]) -> str:
    """The page as HTML; ``pngs`` are the figures of `pictures` as PNG, by the same names."""
    header, *rows = sweep.table
    sentences = answer(
        sweep.entries,
        sweep.full_scores,
        sweep.reference_maps,
        sweep.results,
        f"score ({sweep.fitness})",
    )
    heat = save_png(distance_heatmap(sweep.distances, f"{sweep.distance} between layers' mean KV"))
    compare = (
        f'<p><a href="{html.escape(sweep.compare_url)}">Compare the front in MLflow</a> '
        "(while <code>kvsharer ui</code> runs)</p>"
        if sweep.compare_url
        else ""
    )
    maps = ""
    if "maps" in pngs:
        maps = embedded(
            pngs["maps"],
            "Shaded layers keep their KV; a white one reads that of the layer its arc points to.",
        )
    if "plans" in pngs:
        maps = embedded(pngs["plans"], "What each layer does, plan by plan; most KV on top.")
    kind = "plan" if sweep.has_plans else "map"
    title = html.escape(sweep.title)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style></head><body>
<h1>{title}</h1>
<p class="answer">{html.escape(sweep.headline)}</p>
{compare}
<h2>Asked</h2>
{table(["what", "value"], list(sweep.asked.items()))}
<h2>Found</h2>
<ul>{"".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)}</ul>
<div class="wide">{table(header, rows)}</div>
<p>In brackets: the 95 % interval of a task's score, and of the others what is retained of the full
cache's score on the same items.</p>
{"".join(f"<p>{html.escape(note)}</p>" for note in sweep.notes)}
{front_html(sweep.results, sweep.front, title="", **sweep.drawing)}
{embedded(pngs["tasks"], "Averages hide what a single task loses.")}
<h2>{kind.title()}s</h2>
<p>One click selects a {kind}.{_at_context(sweep)}</p>
<div class="wide">{_plans_table(sweep) if sweep.has_plans else _maps_table(sweep)}</div>
{maps}
<h2>Serve one</h2>
{_serving(sweep)}
<h2>How the search went</h2>
{embedded(pngs["progress"], f"Best of each size, and the area under the front, by {kind}s scored.")}
{embedded(heat, "What the search started from: how unlike the layers' mean keys and values are.")}
<h2>Environment and seeds</h2>
{table(["what", "value"], list(sweep.environment.items()))}
</body></html>
"""


def _maps_table(sweep: SweepResult) -> str:
    rows = [
        [
            str(entry.num_shared),
            str(entry.kv_plan),
            ", ".join(engines(entry.kv_plan, sweep.architecture)),
            entry.digest,
        ]
        for entry in sweep.changed
    ]
    return table(["shared", "kv_source_layers", "can be served by", "digest"], rows, code=1)


def _plans_table(sweep: SweepResult) -> str:
    """The plans with their bytes; the text of each is what ``plan=`` takes."""
    rows = [
        [
            kv_percent(entry.kv_fraction, fine=True),
            f"plan={entry.kv_plan}",
            action_counts(entry.kv_plan),
            f"{entry.kv_bytes_per_token:,.0f}",
            f"{entry.parameter_bytes_saved / 2**20:,.1f}",
            ", ".join(engines(entry.kv_plan, sweep.architecture)),
            entry.digest,
        ]
        for entry in sweep.changed
    ]
    head = ["KV", f"kvsharer evaluate model={sweep.model} …", "layers", "KV bytes per token"]
    head += ["MiB of parameters saved", "can be served by", "digest"]
    return table(head, rows, code=1)


def _at_context(sweep: SweepResult) -> str:
    """At which length the KV bytes are counted, which matters where layers are quantised."""
    contexts = {entry.footprint_context for entry in sweep.changed} - {0}
    if not sweep.has_plans or len(contexts) != 1:
        return ""
    return f" KV bytes are those of one sequence of {contexts.pop():,} tokens."


def _serving(sweep: SweepResult) -> str:
    """Lines to copy for the entry that `headline` names, or else for the one that saves least."""
    entry = most_shared(sweep.entries, 0.95) or next(iter(sweep.changed), None)
    if entry is None:
        return "<p>No map of the front shares a layer.</p>"
    return serving(sweep.model, entry.kv_plan, size_words(entry.kv_plan), sweep.architecture)
