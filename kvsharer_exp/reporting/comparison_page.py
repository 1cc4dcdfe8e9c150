"""The HTML page of the command ``report``: many runs next to the paper.

It has the tables, the pictures, and for each row the runs that it was read from. The page needs no
network and no script. Its links to MLflow work while ``kvsharer ui`` runs.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from kvsharer_exp.reporting.comparison import Table
from kvsharer_exp.reporting.html import STYLE, embedded
from kvsharer_exp.reporting.measured import FinishedRun

_STYLE = """
td.number { text-align: right; white-space: nowrap }
summary { cursor: pointer }
.note { color: #555; margin: .2em 0 }
"""


def comparison_page(
    runs: Sequence[FinishedRun],
    tables: Sequence[Table],
    pictures: Mapping[str, bytes],
    paper: Sequence[Sequence[str]],
    *,
    headline: str,
    citation: str,
    environment: Mapping[str, str],
) -> str:
    """The page as HTML.

    ``pictures``: caption → PNG of the pictures across runs; the page adds those of each run.
    ``paper``: the table of the paper's numbers, the header first.
    """
    title = "Runs beside the paper"
    body = [_section(table) for table in tables]
    images = [embedded(data, caption) for caption, data in pictures.items()]
    own = [
        f"<details><summary>{html.escape(run.title)}, run {run.run_id[:8]}</summary>"
        + "".join(embedded(data, f"{run.title}: {name}") for name, data in run.pictures.items())
        + "</details>"
        for run in runs
        if run.pictures
    ]
    numbers = ""
    if len(paper) > 1:
        numbers = f"""<h2>What the paper reports</h2>
<details><summary>{len(paper) - 1} numbers of {html.escape(citation)}</summary>
<div class="wide">{_table(paper)}</div></details>"""
    facts = [["what", "value"], *[[name, value] for name, value in environment.items()]]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}{_STYLE}</style></head><body>
<h1>{title}</h1>
<p class="answer">{html.escape(headline)}</p>
<p>The paper: {html.escape(citation)}. Every row ends with the MLflow runs it was read from.</p>
{"".join(images)}
{"".join(body)}
<h2>Pictures of the runs</h2>
{"".join(own) or "<p>None was left.</p>"}
{numbers}
<h2>Runs</h2>
<div class="wide">{runs_table(runs)}</div>
<h2>Environment of this report</h2>
{_table(facts)}
</body></html>
"""


def runs_table(runs: Sequence[FinishedRun]) -> str:
    """A table of the runs: id, command, experiment, model, seed and the commit it was made with."""
    head = ["run", "command", "experiment", "model", "seed", "commit"]
    rows = []
    for run in runs:
        facts = [
            run.command,
            run.experiment,
            f"{run.model} ({run.result['model']['id']})",
            str(run.result["seed"]),
            str(run.result.get("versions", {}).get("git_commit", "")),
        ]
        link = _links([(run.run_id, run.url)], whole=True)
        rows.append([f"<td>{link}</td>", *map(_cell, facts)])
    return _markup(head, rows)


def _section(table: Table) -> str:
    header, *rows = table.rows
    cells = [
        [*map(_cell, row), f"<td>{_links(runs)}</td>"]
        for row, runs in zip(rows, table.runs, strict=True)
    ]
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in table.notes)
    return f"""<h2>{html.escape(table.title)}</h2>
<div class="wide">{_markup([*header, "MLflow run"], cells)}</div>{notes}"""


def _links(runs: Sequence[tuple[str, str]], *, whole: bool = False) -> str:
    """A link for each (run id, address), or the whole id where there is no address."""
    return " ".join(
        f'<a title="{run_id}" href="{html.escape(url)}">{run_id if whole else run_id[:8]}</a>'
        if url
        else f"<code>{run_id}</code>"
        for run_id, url in runs
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    return _markup(rows[0], [[*map(_cell, row)] for row in rows[1:]])


def _cell(text: str) -> str:
    kind = ' class="number"' if text and (text[0].isdigit() or text[0] in "+-≈") else ""
    return f"<td{kind}>{html.escape(text)}</td>"


def _markup(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as HTML; the cells in ``rows`` are markup already."""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in header)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
