"""Text cut to a length, for messages that have to stay on one line."""

from __future__ import annotations


def shorten(value: object, limit: int = 60) -> str:
    """``value`` on one line of at most ``limit`` characters; its end is kept, as of a path."""
    text = " ".join(str(value).split())
    return text if len(text) <= limit else "…" + text[1 - limit :]


def clip(text: str, limit: int = 60) -> str:
    """At most ``limit`` characters of ``text``; its beginning is kept, as of a sentence."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
