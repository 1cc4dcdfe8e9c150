"""The front in words: one table for the terminal and Markdown, and what it answers.

Also any table as Markdown or LaTeX.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from kvsharer_exp.records import FrontEntry, TrialResult
from kvsharer_exp.terminal import TurningTable

_HELD = "perplexity/report"
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


_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"–": "--", "—": "---", "·": r"$\cdot$", "×": r"$\times$", "±": r"$\pm$", "…": r"\dots{}"},
    **{"▲": r"$\blacktriangle$", "▼": r"$\blacktriangledown$", "≈": r"$\approx$"},
    **{"→": r"$\rightarrow$", "ρ": r"$\rho$", "<": r"$<$", ">": r"$>$"},
}
LATEX_PACKAGES = ("booktabs", "amssymb")
"""What a document needs for the tables of `to_latex`."""


def to_latex(
    rows: Sequence[Sequence[str]], *, caption: str = "", comments: Sequence[str] = ()
) -> str:
    """Rows, the first one the header, as a LaTeX table (see `LATEX_PACKAGES`).

    ``comments``: one for the source line of each row below the header.
    """
    header, *body = [" & ".join(map(latex, row)) + r" \\" for row in rows]
    if comments:
        body = [f"{row} % {text}" for row, text in zip(body, comments, strict=True)]
    columns_ = "".join("r" if _is_numbers(cells) else "l" for cells in zip(*rows[1:], strict=True))
    lines = [r"\begin{table}", r"\centering"]
    lines += [rf"\caption{{{latex(caption)}}}"] if caption else []
    lines += [rf"\begin{{tabular}}{{{columns_ or 'l' * len(rows[0])}}}", r"\toprule", header]
    lines += [r"\midrule", *body, r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def latex(text: str) -> str:
    """``text`` so that LaTeX prints it as it is."""
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def _is_numbers(cells: Sequence[str]) -> bool:
    return all(not cell or cell[0] in "+-–≈" or cell[0].isdigit() for cell in cells)


def print_front(
    console: Any, entries: Sequence[FrontEntry], full_scores: Mapping[str, float]
) -> None:
    """The table, then every map on a line of its own, to copy (never wrapped)."""
    header, *rows = front_table(entries, full_scores)
    table = TurningTable(*header[:-1])  # where a map is from is said below
    for row in rows:
        table.add_row(*row[:-1])
    console.print(table)
    for entry in entries:
        if entry.num_shared:
            text = "_".join(map(str, entry.kv_source_layers))
            line = Text(f"{entry.num_shared:3d} shared  {text}  {entry.origin}")
            console.print(line, soft_wrap=True)


def headline(
    model: str,
    entries: Sequence[FrontEntry],
    reference_maps: Mapping[str, Sequence[TrialResult]],
    results: Sequence[TrialResult],
) -> str:
    """The answer in one sentence: what 95 % of the held-out perplexity buys, who is beaten."""
    most = most_shared(entries, 0.95)
    if most is not None:
        layers, saved = len(most.kv_source_layers), 1 - most.kv_fraction
        first = (
            f"{model} keeps 95% of its held-out perplexity with {most.num_shared} of {layers} "
            f"layers reading another layer's KV cache ({saved:.0%} less of it)"
        )
    elif any(_HELD in entry.retained for entry in entries):
        first = f"No shared map found for {model} keeps 95% of the held-out perplexity"
    else:
        first = f"{len(entries)} maps for {model} make the front; held-out text was not scored"
    clauses = [first]
    for name, chosen in reference_maps.items():
        compared = [result for result in chosen if result.score is not None]
        if compared:
            beaten = sum(best_rival(result, results) != result.score for result in compared)
            sizes = f"{beaten} of {len(compared)} sizes compared"
            clauses.append(f"{name} is beaten at {sizes}, by the score that was searched for")
    return "; ".join(clauses) + "."


def most_shared(entries: Sequence[FrontEntry], limit: float) -> FrontEntry | None:
    """The map that shares most layers and retains ``limit`` of the held-out perplexity."""
    good = [e for e in entries if e.num_shared and e.retained.get(_HELD, 0) >= limit]
    return max(good, key=lambda entry: entry.num_shared, default=None)


def best_rival(result: TrialResult, results: Sequence[TrialResult]) -> float:
    """The best score of a map with no more KV; its own where none is better."""
    assert result.score is not None
    size = result.footprint.kv_fraction
    scored = [r.score for r in results if r.score is not None and r.footprint.kv_fraction <= size]
    return max([*scored, result.score])


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
        most = most_shared(entries, limit)
        if most is not None:
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
    for name, chosen in reference_maps.items():
        if not chosen:
            sentences.append(f"{name}: no map to compare with.")
        for result in chosen:
            head = f"{name} at {len(result.sharing_map.targets)} shared layers"
            if result.score is None:
                why = result.reason or result.status.replace("_", " ")
                sentences.append(f"{head} has no {score_label} to compare ({why}).")
                continue
            best = best_rival(result, results)
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
