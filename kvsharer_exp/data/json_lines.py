"""Read JSON lines, and name the line that is broken.

`load_passages` reads the lines of a ``.jsonl`` here. lm-eval reads the data of a task with another
library; `load_tasks` asks `broken_line` where that library failed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.text import clip, shorten
from kvsharer_exp.values.text_files import read_text, why_unreadable

_FORM = 'give one object a line, like {"text": "…"}'


def read_row(line: str, where: str) -> Any:
    """Read one line; ``where`` names the file and the line.

    Raises:
        InputError: the line is not JSON, or a text in it has half of a surrogate pair, like
            ``"\\ud83d"``, which no tokenizer takes.
    """
    try:
        row = json.loads(line)
        if "\\u" in line:
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start].encode("unicode_escape").decode()
        raise InputError(f"{where} has half a character ({half}): remove it, or {_FORM}") from error
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "") or clip(str(error), 40)
        raise InputError(f"{where} is not JSON ({reason}): {_FORM}") from error
    return row


def broken_line(task: Any) -> str:
    """Say which line of a task's data is broken; empty if none is.

    ``task``: lm-eval's keys of the task, or the path of its YAML. The ``.jsonl`` files that are
    named anywhere in it are read.
    """
    if isinstance(task, str) and Path(task).is_file():
        try:
            task = yaml.load(read_text(Path(task)), _Loose)
        except (yaml.YAMLError, OSError, UnicodeDecodeError):
            return ""  # the YAML itself is broken, and lm-eval says so
    found = map(_first_broken, dict.fromkeys(_files(task)))
    return next(filter(None, found), "")


class _Loose(yaml.SafeLoader):
    """Reads the YAML of a task without the functions that it names."""


_Loose.add_multi_constructor("!", lambda loader, suffix, node: None)


def _files(node: Any) -> Iterator[Path]:
    if isinstance(node, str) and node.endswith(".jsonl") and Path(node).is_file():
        yield Path(node)
    elif isinstance(node, (dict, list)):
        for inner in node.values() if isinstance(node, dict) else node:
            yield from _files(inner)


def _first_broken(path: Path) -> str:
    name = shorten(path.name, 40)
    try:
        lines = read_text(path).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        return f"{name}: {why_unreadable(error)}"
    for number, line in enumerate(lines, start=1):
        try:
            read_row(line or "{}", f"{name} line {number}")
        except InputError as error:
            return str(error).partition("): ")[0] + ")"
    return ""
