"""The front in words: one table for the terminal, Markdown and a self-contained HTML page."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from kvsharer_exp.figures import front_html
from kvsharer_exp.records import FrontEntry, TrialResult

_HELD = "perplexity/report"
_ACROSS = 4  # maps side by side in a turned table
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
    full = [_number(full_scores[name]) for name in shown]
    rows.append(["0 (full)", "100%", *full, ""])
    for entry in entries:
        if not entry.num_shared:
            continue
        cells = []
        for name in shown:
            kept = entry.retained.get(name)
            share = f" ({kept:.0%})" if kept is not None else ""
            value = entry.scores.get(name)
            cells.append("–" if value is None else _number(value) + share)
        size = f"{entry.num_shared}/{len(entry.kv_source_layers)}"
        rows.append([size, f"{entry.kv_fraction:.0%}", *cells, entry.origin])
    return rows


def _number(value: float) -> str:
    """Three digits; rounding noise of a zero is a zero."""
    return "0" if abs(value) < 1e-6 else f"{value:.3g}"


def to_markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows, the first one the header, as a Markdown table."""
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in escaped]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    return "\n".join(lines) + "\n"


def print_front(
    console: Any, entries: Sequence[FrontEntry], full_scores: Mapping[str, float]
) -> None:
    """The table, then every map on a line of its own, to copy (never wrapped).

    Cells break between words; where even that is too wide the table is turned: maps across.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    def show(rows: Sequence[Sequence[str]]) -> None:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for label, width in zip(rows[0], _word_widths(rows), strict=True):
            table.add_column(Text(label), min_width=width)  # Text: a "[" in a value is no markup
        for row in rows[1:]:
            table.add_row(*map(Text, row))
        console.print(table)

    rows = [row[:-1] for row in front_table(entries, full_scores)]  # the origin is said below
    if sum(_word_widths(rows)) + 2 * len(rows[0]) <= console.width:
        show(rows)
    else:
        for start in range(1, len(rows), _ACROSS):
            show(list(zip(rows[0], *rows[start : start + _ACROSS], strict=True)))
    for entry in entries:
        if entry.num_shared:
            text = "_".join(map(str, entry.kv_source_layers))
            line = Text(f"{entry.num_shared:3d} shared  {text}  {entry.origin}")
            console.print(line, soft_wrap=True)


def _word_widths(rows: Sequence[Sequence[str]]) -> list[int]:
    """The longest word of every column."""
    columns = zip(*rows, strict=True)
    return [max(len(word) for cell in column for word in [*cell.split(), ""]) for column in columns]


def answer(
    entries: Sequence[FrontEntry],
    full_scores: Mapping[str, float],
    reference_maps: Mapping[str, Sequence[TrialResult]],
    results: Sequence[TrialResult],
    score_label: str = "score",
) -> list[str]:
    """What was found, in sentences that say no more than what was measured."""
    return [*_bought(entries), *_against(reference_maps, results, score_label)]


def _bought(entries: Sequence[FrontEntry]) -> list[str]:
    """What sharing buys at three levels of held-out perplexity; only the front was measured."""
    if entries and not any(_HELD in entry.retained for entry in entries):
        return ["Held-out perplexity was not measured: the table shows what was."]
    sentences = []
    for limit in (0.98, 0.95, 0.9):
        good = [entry for entry in entries if entry.retained.get(_HELD, 0) >= limit]
        most = max(good, key=lambda entry: entry.num_shared, default=None)
        if most is not None and most.num_shared:
            layers = len(most.kv_source_layers)
            sentences.append(
                f"Keeping at least {limit:.0%} of the held-out perplexity, {most.num_shared} of "
                f"{layers} layers can be shared: {1 - most.kv_fraction:.0%} less KV cache."
            )
        else:
            sentences.append(f"No shared map keeps {limit:.0%} of the held-out perplexity.")
    return sentences


def _against(
    reference_maps: Mapping[str, Sequence[TrialResult]],
    results: Sequence[TrialResult],
    score_label: str,
) -> list[str]:
    """Whether each reference map is beaten: by a better score with as little KV, ties are not."""
    sentences, compared = [], False
    scored = [(r, r.score) for r in results if r.score is not None]
    for name, chosen in reference_maps.items():
        if not chosen:
            sentences.append(f"{name}: no map to compare with.")
        for result in chosen:
            head = f"{name} at {len(result.sharing_map.targets)} shared layers"
            if result.score is None:
                why = result.reason or result.status.replace("_", " ")
                sentences.append(f"{head} has no {score_label} to compare ({why}).")
                continue
            size = result.footprint.kv_fraction
            rivals = [score for r, score in scored if r.footprint.kv_fraction <= size]
            best = max(rivals, default=result.score)
            if best > result.score:
                verdict = (
                    f"is beaten: {score_label} {result.score:.3g}; "
                    f"the best map with as little KV {best:.3g}"
                )
            else:
                verdict = (
                    f"is not beaten: {score_label} {result.score:.3g} "
                    "is the best found with as little KV"
                )
            compared = True
            sentences.append(f"{head} {verdict}.")
    if compared:
        sentences.insert(
            0,
            f"Maps are compared by the {score_label} that the search optimised, which the greedy "
            "strategy did not see; held-out scores are in the table.",
        )
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
    full_score: float | None = None,
) -> str:
    """One HTML page that needs no network: answer, table, figure, maps, environment."""
    header, *rows = front_table(entries, full_scores)
    figure = front_html(
        results,
        front,
        reference_maps=reference_maps,
        score_label=score_label,
        title="",
        full_score=full_score,
    )
    maps = [
        [str(entry.num_shared), "_".join(map(str, entry.kv_source_layers)), entry.digest]
        for entry in entries
        if entry.num_shared
    ]
    sentences = answer(entries, full_scores, reference_maps, results, score_label)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse; margin: 1em 0 }}
th, td {{ padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: left }}
.wide {{ overflow-x: auto }}
code {{ user-select: all; font-size: 12px; word-break: break-all }}
</style></head><body>
<h1>{html.escape(title)}</h1>
<ul>{"".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)}</ul>
<div class="wide">{_html_table(header, rows)}</div>
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
