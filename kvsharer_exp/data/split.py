"""Split texts into a calibration, a search and a report part that share no sentence.

The commands call `split_texts` through their `Windows`. *Calibration* text gives the layer means
and the fitness. *Search* text gives the tasks that a candidate is scored on. *Report* text gives
the scores that are told in the end.

Parts are split by document and checked by content, so that no sentence is both searched on and
reported.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from kvsharer_exp.data.load import load_passages
from kvsharer_exp.data.passages import PARTS, Passage, TextParts
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.text import clip

MIN_SENTENCE_CHARACTERS = 40  # shorter ones ("He died in 1912.") repeat by chance


_SHARES = (0.3, 0.6)  # calibration below the first, search below the second, report above
_log = logging.getLogger(__name__)


def split_texts(
    calibration_source: str = "wikipedia", heldout_source: str = "wikipedia"
) -> TextParts:
    """Load texts and split them into calibration, search and report passages.

    If both sources are the same, its documents are ordered by the SHA-256 of their names and cut
    at 30 % and 60 % of the passages. If there are two sources, the first is all calibration, and
    the second is cut at 60 %. The report part of a source is therefore cut at the same place
    whatever the calibration text is. The result has passed `check_disjoint`.

    Raises:
        InputError: a part is empty, or a calibration file repeats text of ``heldout_source``.
    """
    heldout = load_passages(heldout_source)
    same = resolved(calibration_source) == resolved(heldout_source)
    first, second, report = _cut(heldout)
    if same:
        calibration, search = first, second
    else:
        calibration, search = load_passages(calibration_source), first + second
    sources = dict(zip(PARTS, (calibration_source, heldout_source, heldout_source), strict=True))
    parts = check_disjoint(TextParts(calibration, search, report, sources))
    for part in PARTS:
        if not getattr(parts, part):
            raise InputError(
                f"{part} part of {clip(sources[part])!r} is empty ({len(heldout)} passages): "
                "give a text of more documents"
            )
    return parts


def _cut(passages: Sequence[Passage]) -> tuple[tuple[Passage, ...], ...]:
    """Cut into three parts of whole documents: about 30, 30 and 40 % of the passages."""
    documents: dict[str, list[Passage]] = {}
    for passage in passages:
        documents.setdefault(passage.document, []).append(passage)
    parts: tuple[list[Passage], ...] = ([], [], [])
    before = 0
    for name in sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest()):
        middle = (before + len(documents[name]) / 2) / len(passages)
        parts[sum(middle >= share for share in _SHARES)].extend(documents[name])
        before += len(documents[name])
    return tuple(tuple(part) for part in parts)


def check_disjoint(parts: TextParts) -> TextParts:
    """Leave out every passage that repeats a sentence of an earlier part.

    Sentences of 40 characters or more are compared, case and white space aside. If both parts are
    of one source, the later part loses the passage, and the number of passages lost is logged.

    Raises:
        InputError: two parts of different sources share a sentence.
    """
    seen: dict[str, str] = {}
    kept: dict[str, tuple[Passage, ...]] = {}
    for part in PARTS:
        source, keep, own = parts.sources[part], [], set()
        for passage in getattr(parts, part):
            sentences = _sentences(passage.text)
            repeated = next((sentence for sentence in sentences if sentence in seen), None)
            if repeated is None:
                keep.append(passage)
                own.update(sentences)
            elif resolved(source) != resolved(parts.sources[seen[repeated]]):
                raise InputError(
                    f"{seen[repeated]} text repeats {part} text ({clip(repeated, 50)!r}): "
                    "parts may not overlap; remove it, or give another text"
                )
        dropped = len(getattr(parts, part)) - len(keep)
        if dropped:
            _log.info("%s part: %d passages repeat an earlier part: left out", part, dropped)
        kept[part] = tuple(keep)
        seen.update(dict.fromkeys(own, part))
    return TextParts(kept["calibration"], kept["search"], kept["report"], parts.sources)


def _sentences(text: str) -> list[str]:
    sentences = re.split(r"(?<=[.!?])\s+", " ".join(text.casefold().split()))
    return [sentence for sentence in sentences if len(sentence) >= MIN_SENTENCE_CHARACTERS]


def resolved(source: str) -> str:
    """Give a text file by its absolute path, and any other text source as it is."""
    return str(Path(source).resolve()) if source.endswith((".txt", ".jsonl")) else source
