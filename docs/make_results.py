"""Build RESULTS.md from the runs kept in docs/results/ (``make results`` makes them anew).

A run is a folder with ``result.json`` and ``ablation.md``, or ``search_efficiency.md``; the text
around them, conclusions included, is ``docs/results/text.md``: ``{{name}}`` stands for the run, and
``{{name?}}`` for a run that need not be there, like that of ``make gpu``.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = Path("docs/results")


def section(folder: Path) -> str:
    """The tables of a run and its pictures."""
    texts = [path.read_text(encoding="utf-8").strip() for path in sorted(folder.glob("*.md"))]
    tables = [re.sub(r"^# ", "### ", text) for text in texts]
    pictures = sorted(path.relative_to(ROOT).as_posix() for path in folder.glob("*.png"))
    return "\n\n".join([*tables, *[f"![{Path(path).stem}]({path})" for path in pictures]])


def build(root: Path = ROOT) -> str:
    """RESULTS.md as text.

    Raises:
        FileNotFoundError: the text names a run that is not there.
    """
    folder = root / RESULTS
    text = (folder / "text.md").read_text(encoding="utf-8")

    def run(match: re.Match[str]) -> str:
        found = folder / match["name"]
        if any(found.glob("*.md")):
            return section(found) + match["gap"]
        if match["optional"]:
            return ""
        raise FileNotFoundError(f"{found} is not there: run `make results`")

    return re.sub(r"\{\{(?P<name>[\w.-]+)(?P<optional>\??)\}\}(?P<gap>\n*)", run, text)


if __name__ == "__main__":
    (ROOT / "RESULTS.md").write_text(build(), encoding="utf-8")
    sys.stdout.write("wrote RESULTS.md\n")
