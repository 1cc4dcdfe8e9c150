"""The values of this folder: a passage of text, and three parts of text that share no sentence.

`load_passages` makes the passages, and `split_texts` makes the parts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PARTS = ("calibration", "search", "report")


@dataclass(frozen=True, slots=True)
class Passage:
    """One paragraph or line of text.

    ``document`` is the title of the article, or ``file.txt:12`` for line 12 of a file.
    """

    text: str
    document: str


@dataclass(frozen=True, slots=True)
class TextParts:
    """The passages of each part.

    ``sources`` maps the name of a part to the text source that the part was cut from.
    """

    calibration: tuple[Passage, ...]
    search: tuple[Passage, ...]
    report: tuple[Passage, ...]
    sources: Mapping[str, str]

    @property
    def fingerprints(self) -> dict[str, str]:
        """For each part, 12 hex characters that identify its content."""
        return {part: fingerprint(getattr(self, part)) for part in PARTS}


def fingerprint(passages: Sequence[Passage]) -> str:
    """Return 12 hex characters that identify the texts and documents of ``passages``."""
    rows = [[passage.document, passage.text] for passage in passages]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]
