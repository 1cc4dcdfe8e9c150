"""Read a text file as text editors do; every part that reads a file of the user's reads it here.

Editors take the byte-order mark at the start for what it is, and know UTF-16 by it. They end a line
at LF, CR LF or CR, and at nothing else: U+2028 and a form feed stand inside a line.
"""

from __future__ import annotations

import codecs
import errno
import json
import os
from pathlib import Path
from typing import Any


def read_text(path: Path) -> str:
    """Read a file of UTF-8, or of UTF-16 with a byte-order mark; its lines end with ``\\n``.

    Raises:
        OSError: the file cannot be read.
        UnicodeDecodeError: it is no such text; `why_unreadable` names the line.
    """
    try:
        data = path.read_bytes()
    except ValueError as error:  # a NUL, or half of a surrogate pair
        raise FileNotFoundError(errno.ENOENT, "no file can have this name") from error
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = data.decode("utf-16" if wide else "utf-8-sig").replace("\r\n", "\n")
    return text if "\n" in text else text.replace("\r", "\n")


def read_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        json.JSONDecodeError: it is not JSON, or Python does not take it: it is nested a thousand
            levels deep, or holds a whole number of thousands of digits.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise json.JSONDecodeError("nested too deeply", text, 0) from error
    except ValueError as error:
        raise json.JSONDecodeError("a number is too long", text, 0) from error


def whole_lines(content: bytes) -> tuple[bytes, bytes]:
    """The lines of ``content`` that end, and the beginning of one whose writer was killed.

    After a loss of power that beginning may be zeros from some byte on; they are left out.
    """
    end = content.rfind(b"\n") + 1
    return content[:end], content[end:].rstrip(b"\0")


def append_whole(file: int, data: bytes) -> None:
    """Append ``data`` to the open file of this descriptor and to the disk, whole or not at all.

    Nobody else may write to the file meanwhile.

    Raises:
        OSError: the disk is full, or fails.
    """
    size = os.fstat(file).st_size
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(file, left) :]
        os.fsync(file)
    except BaseException:
        os.ftruncate(file, size)
        raise


def why_unreadable(error: OSError | UnicodeDecodeError) -> str:
    """Say in some words why `read_text` failed."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    line = error.object[: error.start].count(b"\n") + 1
    return f"line {line} is not {error.encoding.upper()}"
