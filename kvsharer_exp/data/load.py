"""Load the passages of a text: one of the built-in texts, a file, or a data set of the hub.

`split_texts` calls `load_passages` and splits the passages into parts that share no sentence. Then
`token_windows` cuts the passages of a part into token windows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from kvsharer_exp.data.hub import hub_passages
from kvsharer_exp.data.json_lines import read_row
from kvsharer_exp.data.paragraphs import blocks, documents, wrapped_width
from kvsharer_exp.data.passages import Passage
from kvsharer_exp.data.wikipedia import wikipedia_passages
from kvsharer_exp.model.assets import fetch
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.text import clip, shorten
from kvsharer_exp.values.text_files import read_text, why_unreadable

_log = logging.getLogger(__name__)


def load_passages(source: str) -> tuple[Passage, ...]:
    """Load the passages of a text source.

    Blank lines are skipped. Every line of a file is its own document. A ``.txt`` whose lines were
    wrapped has a passage in each paragraph instead, and about 8,000 characters in a document; the
    log says how a ``.txt`` was read.

    Args:
        source: ``wikipedia``, ``news``, the path of a ``.txt`` (one passage a line, or paragraphs
            with blank lines between them) or of a ``.jsonl`` (key "text"), or
            ``hub:<dataset>[/<config>][:<split>]`` (column "text", default split ``train``).

    Raises:
        InputError: the source is unknown, a file is missing, empty or malformed, or a data set
            cannot be fetched.
    """
    if source == "wikipedia":
        return wikipedia_passages()
    if source == "news":
        path = fetch("news")
        return _lines(path, _read(path), _line_text)
    if source.startswith("hub:"):
        return hub_passages(source)
    path = Path(source)
    if path.suffix == ".jsonl":
        return _lines(path, _read(path), _json_text)
    if path.suffix != ".txt":
        raise InputError(
            f"text source {clip(source)!r} is unknown: give wikipedia, news, a .txt, "
            "a .jsonl, or hub:<dataset>[/<config>][:<split>]"
        )
    text = _read(path)
    if width := wrapped_width(blocks(text)):
        return _paragraphs(path, text, width)
    passages = _lines(path, text, _line_text)
    _log.info("%s: read as one passage a line, %d passages", shorten(path), len(passages))
    return passages


def _read(path: Path) -> str:
    try:
        return read_text(path)
    except UnicodeDecodeError as error:
        raise InputError(
            f"text file {shorten(path)} is not text ({why_unreadable(error)}): save it as UTF-8"
        ) from error
    except OSError as error:
        raise InputError(
            f"text file {shorten(path)} cannot be read ({why_unreadable(error)}): "
            "give a .txt with one passage a line, or wikipedia"
        ) from error


def _lines(path: Path, text: str, read: Callable[[str, str], str]) -> tuple[Passage, ...]:
    passages = tuple(
        Passage(" ".join(read(line, f"{shorten(path)} line {number}").split()), document)
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
        for document in (f"{path.name}:{number}",)
    )
    if not passages:
        raise InputError(f"text file {shorten(path)} is empty: give at least one passage a line")
    return passages


def _paragraphs(path: Path, text: str, width: int) -> tuple[Passage, ...]:
    grouped = documents(blocks(text))
    passages = tuple(
        Passage(" ".join(word for _, line in block for word in line.split()), document)
        for group in grouped
        for document in (f"{path.name}:{group[0][0][0]}",)
        for block in group
    )
    _log.info(
        "%s: lines are wrapped at %d characters, read as %d paragraphs in %d documents",
        *(shorten(path), width, len(passages), len(grouped)),
    )
    return passages


def _line_text(line: str, where: str) -> str:
    return line


def _json_text(line: str, where: str) -> str:
    row = read_row(line, where)
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise InputError(f'{where} has no "text": give one object a line, like {{"text": "…"}}')
    return text
