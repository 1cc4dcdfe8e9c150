"""Where a benchmark keeps what it measured: a table for RESULTS.md, and the values behind it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def keep_results(folder: Path | None, name: str, table: str, found: Any, values: str = "") -> None:
    """Write ``table`` as NAME.md and ``found`` as NAME.json into ``folder``; None keeps nothing.

    ``values``: the name of the JSON file without its ending, if it is another one.
    """
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.md").write_text(table, encoding="utf-8")
        kept = json.dumps(found, indent=2) + "\n"
        (folder / f"{values or name}.json").write_text(kept, encoding="utf-8")
