"""What all HTML pages share: the style sheet, embedded pictures and tables.

`sweep_page` and `comparison_page` use it.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

from kvsharer_exp.reporting.figures.style import DPI

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em }
.answer { font-size: 1.25em; border-left: 4px solid #0072B2; padding-left: .7em }
table { border-collapse: collapse; margin: 1em 0 }
th, td { padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top }
.wide { overflow-x: auto }
img { max-width: 100% }
td code { user-select: all; font-size: 12px; word-break: break-all }
pre { background: #f4f4f4; padding: .7em; overflow-x: auto; font-size: 13px }
figcaption { color: #555 }
"""


def embedded(png: bytes, caption: str) -> str:
    """The picture as part of the page itself, shown as large as its figure was asked to be."""
    data, text = base64.b64encode(png).decode(), html.escape(caption)
    pixels = int.from_bytes(png[16:20], "big")  # the width in a PNG's first chunk, IHDR
    image = f'<img width="{72 * pixels // DPI}" alt="{text}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], code: int | None = None) -> str:
    """A table of plain text as HTML; the cells of column ``code`` are set as code."""

    def cell(index: int, text: str) -> str:
        escaped = html.escape(text)
        return f"<td><code>{escaped}</code></td>" if index == code else f"<td>{escaped}</td>"

    head = "".join(f"<th>{html.escape(text)}</th>" for text in header)
    body = "".join(
        f"<tr>{''.join(cell(index, text) for index, text in enumerate(row))}</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
