"""Write the tables of a report as one Markdown file and one LaTeX file.

The command ``report`` calls both functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvsharer_exp.reporting.comparison import Table
from kvsharer_exp.reporting.markup import LATEX_PACKAGES, to_latex, to_markdown
from kvsharer_exp.reporting.measured import FinishedRun
from kvsharer_exp.reporting.paper_numbers import citation


def to_markdown_report(
    runs: Sequence[FinishedRun],
    made: Sequence[Table],
    numbers: Sequence[Sequence[str]],
    sentence: str,
    pictures: Mapping[str, bytes],
) -> str:
    """The report as Markdown, with its pictures as files beside it.

    Every row links its MLflow runs. ``made``: the tables. ``numbers``: header and rows of what the
    paper reports. ``sentence``: the report in one sentence. ``pictures``: PNG by file name.
    """
    parts = ["# Runs beside the paper", sentence, f"The paper: {citation()}."]
    parts += [f"![{name}]({name})" for name in pictures]
    for table in made:
        links = [" ".join(f"[{i[:8]}]({url or i})" for i, url in ids) for ids in table.runs]
        head, *rows = table.rows
        whole = [[*head, "MLflow run"], *([*r, k] for r, k in zip(rows, links, strict=True))]
        parts += [f"## {table.title}", to_markdown(whole).rstrip(), *table.notes]
    if len(numbers) > 1:
        parts += ["## What the paper reports", to_markdown(numbers).rstrip()]
    listed = [[r.run_id, r.title, r.result["model"]["id"], r.source] for r in runs]
    parts += ["## Runs", to_markdown([["MLflow run", "what", "model", "named as"], *listed])]
    return "\n\n".join(parts)


def to_latex_report(made: Sequence[Table], sentence: str) -> str:
    """The tables as LaTeX, to be included. A comment names the packages that they need."""
    packages = "".join(rf"\usepackage{{{name}}}" for name in LATEX_PACKAGES)
    parts = [f"% {sentence} Needs {packages}; every row ends with its MLflow runs."]
    for table in made:
        runs = [" ".join(run_id for run_id, _ in ids) for ids in table.runs]
        head, *rows = table.rows
        short = [[*r, k[:8]] for r, k in zip(rows, runs, strict=True)]
        caption = " ".join([f"{table.title}.", *table.notes])
        parts.append(to_latex([[*head, "run"], *short], caption=caption, comments=runs))
    return "\n".join(parts)
