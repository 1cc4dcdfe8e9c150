"""Cut text to a length, for error messages that have to stay on one line, and read integers."""

from __future__ import annotations


def shorten(value: object, limit: int = 60) -> str:
    """Put ``value`` on one line of at most ``limit`` characters; keep its end, as of a path."""
    text = " ".join(str(value).split())
    return text if len(text) <= limit else "…" + text[1 - limit :]


def clip(text: str, limit: int = 60) -> str:
    """Cut ``text`` to at most ``limit`` characters; keep its beginning, as of a sentence."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def read_integer(text: str) -> int:
    """Read an integer more strictly than ``int``: no blanks, no ``+``, no ``1_000``, no ``٥``.

    Raises:
        ValueError: it is none.
    """
    if not (text.isascii() and text.removeprefix("-").isdecimal()):
        raise ValueError(text)
    return int(text)
