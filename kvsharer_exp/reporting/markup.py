"""Writes any table of text as Markdown or LaTeX.

The commands that leave tables in files use the Markdown; ``report`` writes LaTeX too.
"""

from __future__ import annotations

from collections.abc import Sequence


def to_markdown(rows: Sequence[Sequence[str]]) -> str:
    """Write ``rows``, of which the first is the header, as a Markdown table."""
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
"""The LaTeX packages that a document needs for the tables of `to_latex`."""


def to_latex(
    rows: Sequence[Sequence[str]], *, caption: str = "", comments: Sequence[str] = ()
) -> str:
    """Write ``rows``, of which the first is the header, as a LaTeX table (see `LATEX_PACKAGES`).

    ``comments``: a comment for each row below the header, put at the end of its source line.
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
    """Escape ``text`` so that LaTeX prints it as it is, on one line."""
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def _is_numbers(cells: Sequence[str]) -> bool:
    return all(not cell or cell[0] in "+-–≈" or cell[0].isdigit() for cell in cells)
