"""Tell a text whose lines were wrapped from one with a passage a line, and join its paragraphs.

`load_passages` asks `wrapped_width` of every ``.txt``. Books are often stored with lines of about
70 characters and a blank line after each paragraph, as those of Project Gutenberg are. Such a line
is too short to be a passage.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

Block = list[tuple[int, str]]
"""The lines of a paragraph, each with its number in the file, from 1."""

_WIDTHS = range(40, 121)  # how many characters wide wrapped text is
_FEWEST = 8  # line breaks inside paragraphs, from which on they tell something
_ROOM = 0.85  # of the width: a line that could be shorter than that had room for the next word
_FULL = 0.7  # the least part of the lines inside paragraphs that had none
_ENDS = 0.5  # the most of them that end a sentence
_SHORT = 0.5  # the least part of the last lines of paragraphs that had room
_SENTENCE_END = re.compile(r"[.!?:;…。！？][\"'”’»)\]]*$")
_DOCUMENT_CHARACTERS = 8000  # a document of joined paragraphs: more than 1024 tokens
_FEWEST_DOCUMENTS = 20  # so that each part of the text gets some of a short file


def blocks(text: str) -> list[Block]:
    """The paragraphs of ``text``, which blank lines separate."""
    found: list[Block] = [[]]
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            found[-1].append((number, line.strip()))
        elif found[-1]:
            found.append([])
    return [block for block in found if block]


def wrapped_width(paragraphs: Sequence[Block]) -> int:
    """The width in characters that the lines were wrapped at; 0 if each line is a passage.

    Lines are taken for wrapped if blank lines separate paragraphs of several lines; if most lines
    inside a paragraph end where the next word had no more room, and not where a sentence ends; and
    if the last line of most paragraphs is shorter.
    """
    pairs = [(a, b) for block in paragraphs for (_, a), (_, b) in pairwise(block)]
    if len(paragraphs) < 2 or len(pairs) < _FEWEST:
        return 0
    lengths = sorted(len(line) for line, _ in pairs)
    width = lengths[int(0.95 * (len(lengths) - 1))]
    room = _ROOM * width
    full = [len(line) + 1 + len(following.split()[0]) > room for line, following in pairs]
    ends = [_SENTENCE_END.search(line) is not None for line, _ in pairs]
    short = [len(block[-1][1]) < room for block in paragraphs if len(block) > 1]
    wrapped = _share(full) >= _FULL and _share(ends) <= _ENDS and _share(short) >= _SHORT
    return width if wrapped and width in _WIDTHS else 0


def _share(told: Sequence[bool]) -> float:
    return sum(told) / len(told)


def documents(paragraphs: Sequence[Block]) -> list[list[Block]]:
    """Group consecutive paragraphs into documents of about 8,000 characters.

    Windows are cut from within a document. A text of less than 160,000 characters is grouped into
    about 20 smaller ones.
    """
    total = sum(len(line) for block in paragraphs for _, line in block)
    most = min(_DOCUMENT_CHARACTERS, total / _FEWEST_DOCUMENTS)
    grouped: list[list[Block]] = [[]]
    length = 0
    for block in paragraphs:
        if length >= most:
            grouped.append([])
            length = 0
        grouped[-1].append(block)
        length += sum(len(line) for _, line in block)
    return grouped
