"""The front in words: one table for the terminal, Markdown and a self-contained HTML page."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from kvsharer_exp.figures import front_html
from kvsharer_exp.records import FrontEntry, TrialResult

# The metric that stands for a task where it has several.
_MAIN = ("acc", "exact_match", "f1", "word_perplexity", "perplexity")


def columns(full_scores: Mapping[str, float]) -> list[str]:
    """The scores a table shows: KL, every perplexity of a text, one metric of every task.

    Tasks made from search text are left out: they were optimised on.
    """
    shown = [name for name in full_scores if name == "kl" or name.startswith("perplexity/")]
    tasks: dict[str, list[str]] = {}
    for name in full_scores:
        if name.startswith("lm_eval/") and not name.split("/")[1].endswith("_search"):
            tasks.setdefault(name.split("/")[1], []).append(name)
    for names in tasks.values():
        by_metric = {name.split("/")[2]: name for name in names}
        main = next((m for m in _MAIN if m in by_metric), None)
        shown.append(by_metric[main] if main else names[0])
    return shown


def front_table(entries: Sequence[FrontEntry], full_scores: Mapping[str, float]) -> list[list[str]]:
    """Header and rows: the full cache first, then every map; scores with retained %."""
    shown = columns(full_scores)
    labels = [name.removeprefix("lm_eval/").replace("/", " ") for name in shown]
    rows = [["shared", "KV", *labels, "from"]]
    full = [f"{full_scores[name]:.3g}" for name in shown]
    rows.append(["0 (full)", "100%", *full, ""])
    for entry in entries:
        if not entry.num_shared:
            continue
        cells = []
        for name in shown:
            kept = entry.retained.get(name)
            share = f" ({kept:.0%})" if kept is not None else ""
            cells.append(f"{entry.scores[name]:.3g}{share}" if name in entry.scores else "–")
        size = f"{entry.num_shared}/{len(entry.kv_source_layers)}"
        rows.append([size, f"{entry.kv_fraction:.0%}", *cells, entry.origin])
    return rows


def to_markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows, the first one the header, as a Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    return "\n".join(lines) + "\n"


def print_front(
    console: Any, entries: Sequence[FrontEntry], full_scores: Mapping[str, float]
) -> None:
    """The table, then every map on a line of its own, to copy."""
    from rich import box
    from rich.table import Table

    header, *rows = front_table(entries, full_scores)
    table = Table(box=box.SIMPLE, pad_edge=False)
    for label in header:
        table.add_column(label, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for entry in entries:
        if entry.num_shared:
            text = "_".join(map(str, entry.kv_source_layers))
            console.print(f"{entry.num_shared:3d} shared  {text}")


def answer(
    entries: Sequence[FrontEntry],
    full_scores: Mapping[str, float],
    reference_maps: Mapping[str, Sequence[TrialResult]],
    results: Sequence[TrialResult],
) -> list[str]:
    """What was found, in sentences that say no more than what was measured."""
    sentences = []
    held = "perplexity/report"
    for limit in (0.98, 0.95, 0.9):
        good = [entry for entry in entries if entry.retained.get(held, 0) >= limit]
        most = max(good, key=lambda entry: entry.num_shared, default=None)
        if most is not None and most.num_shared:
            layers = len(most.kv_source_layers)
            sentences.append(
                f"Keeping at least {limit:.0%} of the held-out perplexity, {most.num_shared} of "
                f"{layers} layers can be shared: {1 - most.kv_fraction:.0%} less KV cache."
            )
        else:
            sentences.append(f"No shared map keeps {limit:.0%} of the held-out perplexity.")
    for name, chosen in reference_maps.items():
        for result in chosen:
            if result.score is None:
                continue
            size = result.footprint.kv_fraction
            rivals = [r for r in results if r.score is not None and r.footprint.kv_fraction <= size]
            best = max(rivals, key=lambda r: r.score or 0.0)
            shared = len(result.sharing_map.targets)
            verdict = (
                f"is the best found with as little KV (score {result.score:.3g})"
                if best is result
                else f"scores {result.score:.3g}; the best map with as little KV {best.score:.3g}"
            )
            sentences.append(f"{name} at {shared} shared layers {verdict}.")
    return sentences


def front_page(
    *,
    title: str,
    entries: Sequence[FrontEntry],
    full_scores: Mapping[str, float],
    results: Sequence[TrialResult],
    front: Sequence[TrialResult],
    reference_maps: Mapping[str, Sequence[TrialResult]],
    score_label: str,
    environment: Mapping[str, str],
) -> str:
    """One HTML page that needs no network: answer, table, figure, maps, environment."""
    header, *rows = front_table(entries, full_scores)
    figure = front_html(
        results, front, reference_maps=reference_maps, score_label=score_label, title=""
    )
    maps = [
        [str(entry.num_shared), "_".join(map(str, entry.kv_source_layers)), entry.digest]
        for entry in entries
        if entry.num_shared
    ]
    sentences = answer(entries, full_scores, reference_maps, results)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse; margin: 1em 0 }}
th, td {{ padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: left }}
code {{ font-size: 12px; word-break: break-all }}
</style></head><body>
<h1>{html.escape(title)}</h1>
<ul>{"".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)}</ul>
{_html_table(header, rows)}
<p>In brackets: what is retained of the full cache's score on the same items.</p>
{figure}
<h2>Maps</h2>
{_html_table(["shared", "kv_source_layers", "digest"], maps, code=1)}
<h2>Environment</h2>
{_html_table(["what", "value"], [[key, value] for key, value in environment.items()])}
</body></html>
"""


def _html_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], code: int | None = None
) -> str:
    def cell(index: int, text: str) -> str:
        escaped = html.escape(text)
        return f"<td><code>{escaped}</code></td>" if index == code else f"<td>{escaped}</td>"

    head = "".join(f"<th>{html.escape(text)}</th>" for text in header)
    body = "".join(
        f"<tr>{''.join(cell(index, text) for index, text in enumerate(row))}</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
