"""Load the passages of a text: one of the built-in texts, a file, or a data set of the hub.

`split_texts` calls `load_passages` and splits the passages into parts that share no sentence. Then
`token_windows` cuts the passages of a part into token windows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from kvsharer_exp.data.hub import hub_passages
from kvsharer_exp.data.passages import Passage
from kvsharer_exp.data.wikipedia import wikipedia_passages
from kvsharer_exp.model.assets import fetch
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.text import clip, shorten


def load_passages(source: str) -> tuple[Passage, ...]:
    """Load the passages of a text source.

    Blank lines are skipped. Every line of a file is its own document.

    Args:
        source: ``wikipedia``, ``news``, the path of a ``.txt`` (one passage a line) or of a
            ``.jsonl`` (key "text"), or ``hub:<dataset>[/<config>][:<split>]`` (column "text",
            default split ``train``).

    Raises:
        InputError: the source is unknown, a file is missing, empty or malformed, or a data set
            cannot be fetched.
    """
    if source == "wikipedia":
        return wikipedia_passages()
    if source == "news":
        return _lines(fetch("news"), _line_text)
    if source.startswith("hub:"):
        return hub_passages(source)
    path = Path(source)
    readers = {".txt": _line_text, ".jsonl": _json_text}
    if path.suffix not in readers:
        raise InputError(
            f"text source {clip(source)!r} is unknown: give wikipedia, news, a .txt, "
            "a .jsonl, or hub:<dataset>[/<config>][:<split>]"
        )
    return _lines(path, readers[path.suffix])


def _lines(path: Path, read: Callable[[str, str], str]) -> tuple[Passage, ...]:
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"text file {shorten(path)} is not UTF-8 (byte {error.start}): save it as UTF-8"
        ) from error
    except OSError as error:
        raise InputError(
            f"text file {shorten(path)} cannot be read ({error.strerror}): "
            "give a .txt with one passage a line, or wikipedia"
        ) from error
    passages = tuple(
        Passage(" ".join(read(line, f"{shorten(path)} line {number}").split()), document)
        for number, line in enumerate(content.split("\n"), start=1)
        if line.strip()
        for document in (f"{path.name}:{number}",)
    )
    if not passages:
        raise InputError(f"text file {shorten(path)} is empty: give at least one passage a line")
    return passages


def _line_text(line: str, where: str) -> str:
    return line


def _json_text(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(
            f'{where} is not JSON ({error.msg}): give one object a line, like {{"text": "…"}}'
        ) from error
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise InputError(f'{where} has no "text": give one object a line, like {{"text": "…"}}')
    return text
