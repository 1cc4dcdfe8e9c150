"""The values: a passage of text, and the three parts that never meet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PARTS = ("calibration", "search", "report")


@dataclass(frozen=True, slots=True)
class Passage:
    """One paragraph or line; ``document``: the article's title, or ``file.txt:12``."""

    text: str
    document: str


@dataclass(frozen=True, slots=True)
class TextParts:
    """Passages of each part; ``sources``: part → the source it was cut from."""

    calibration: tuple[Passage, ...]
    search: tuple[Passage, ...]
    report: tuple[Passage, ...]
    sources: Mapping[str, str]

    @property
    def fingerprints(self) -> dict[str, str]:
        """Part → 12 hex characters that identify its content."""
        return {part: fingerprint(getattr(self, part)) for part in PARTS}


def fingerprint(passages: Sequence[Passage]) -> str:
    rows = [[passage.document, passage.text] for passage in passages]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]
