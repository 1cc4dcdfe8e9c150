"""Print on any terminal, also one that is piped, 40 columns wide, without colour or without UTF-8.

`main` calls `settle_streams` first. Commands print on the console of `make_console`, and show their
tables as a `TurningTable`. rich sees to ``NO_COLOR``, ``COLUMNS`` and ``TERM=dumb``
(https://rich.readthedocs.io).
"""

from __future__ import annotations

import codecs
import sys
from collections.abc import Container, Iterator, Sequence

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

LINE_CHARACTERS = 200  # the most characters of an error message
_PLAIN = {"–": "-", "—": "-", "→": "->", "←": "<-", "×": "x", "…": "...", "·": "|", "±": "+-"}


def settle_streams() -> None:
    """Make the standard streams print what their encoding lacks as ASCII (``→`` as ``->``)."""
    codecs.register_error("plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # a notebook's stream has none
        if reconfigure is not None:
            reconfigure(errors="plain")


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_PLAIN.get(character, "?") for character in lacking), error.end


def make_console() -> Console:
    """Make the console of a command.

    Long lines are left to the terminal to break, so that paths stay whole. If the output is no
    terminal, nothing moves, even when ``FORCE_COLOR`` asks for colour.
    """
    moves = None if sys.stdout.isatty() else False
    return Console(highlight=False, emoji=False, soft_wrap=True, force_interactive=moves)


def one_line(text: str, limit: int = LINE_CHARACTERS) -> str:
    """Put ``text`` on one line of at most ``limit`` characters.

    What is too long loses its middle, because a message names the value first and the way out last.
    """
    text = " ".join(text.split())
    if len(text) <= limit:
        return text
    end = limit // 2
    return f"{text[: limit - end - 3]} … {text[-end:]}"


class TurningTable:
    """A table in which no number is cut: its cells break between words only.

    If the table is too wide for that, it loses its frame, and long names break after slashes. If it
    is still too wide, it is turned: its header becomes the first column, and as many rows as there
    is room for stand side by side.
    """

    def __init__(self, *header: str) -> None:
        self._rows: list[Sequence[str]] = [header]
        self._ends: set[int] = set()

    @classmethod
    def of(cls, rows: Sequence[Sequence[str]], *, section: int = 0) -> TurningTable:
        """Make a table of ``rows``, of which the first is the header.

        A line is drawn below every ``section`` of the other rows; 0 draws none.
        """
        table = cls(*rows[0])
        for number, row in enumerate(rows[1:], start=1):
            table.add_row(*row, end_section=section > 0 and number % section == 0)
        return table

    def add_row(self, *cells: str, end_section: bool = False) -> None:
        """Add a row of as many cells as the header has; ``end_section`` draws a line below it."""
        if end_section:
            self._ends.add(len(self._rows))
        self._rows.append(cells)

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        room = options.max_width
        broken = [[_break_name(cell) for cell in row] for row in self._rows]
        if _width(self._rows, _FRAMED) <= room:
            yield _table(self._rows, room, _FRAMED, self._ends)
        elif _width(broken, _BARE) <= room:
            yield _table(broken, room, _BARE, self._ends)
        else:
            for block in _turned(broken, room):
                yield _table(block, room, _BARE)
                yield Text()


_FRAMED, _BARE = 3, 2  # characters between two columns


def _turned(rows: Sequence[Sequence[str]], room: int) -> list[list[Sequence[str]]]:
    """Turn the table into blocks: the header is the first column of each, with rows beside it."""
    blocks: list[list[Sequence[str]]] = []
    held: list[Sequence[str]] = []
    for row in rows[1:]:
        if held and _width(list(zip(rows[0], *held, row, strict=True)), _BARE) > room:
            blocks.append(list(zip(rows[0], *held, strict=True)))
            held = []
        held.append(row)
    return [*blocks, list(zip(rows[0], *held, strict=True))]


def _table(
    rows: Sequence[Sequence[str]], room: int, between: int, ends: Container[int] = ()
) -> Table:
    framed = between == _FRAMED
    table = Table(
        box=box.HEAVY_HEAD if framed else box.SIMPLE_HEAD,
        show_edge=framed,
        pad_edge=framed,
        padding=(0, 1) if framed else (0, 1, 0, 0),
    )
    widths = _word_widths(rows)
    left = room - _width(rows, between)
    # Room that is left widens columns until lines fit whole: those of the values, then the labels.
    for part in (rows[1:], rows):
        for index, cells in enumerate(zip(*part, strict=True)):
            wanted = max(len(line) for cell in cells for line in [*cell.splitlines(), ""])
            more = max(0, min(wanted - widths[index], left))
            widths[index] += more
            left -= more
    for label, width in zip(rows[0], widths, strict=True):
        table.add_column(Text(label), width=width, overflow="fold")
    for number, row in enumerate(rows[1:], start=1):
        table.add_row(*map(Text, row), end_section=number in ends)  # Text: "[" is no markup
    return table


def _break_name(cell: str) -> str:
    return cell.replace("/", "/\n") if len(cell) > 12 else cell


def _width(rows: Sequence[Sequence[str]], between: int) -> int:
    """The characters that the table takes when every column is as narrow as its longest word."""
    widths = _word_widths(rows)
    edges = 4 if between == _FRAMED else 0
    return sum(widths) + between * (len(widths) - 1) + edges


def _word_widths(rows: Sequence[Sequence[str]]) -> list[int]:
    columns = zip(*rows, strict=True)
    return [max(len(word) for cell in column for word in [*cell.split(), ""]) for column in columns]
