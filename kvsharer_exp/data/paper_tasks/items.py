"""The parts of the paper's tasks that YAML cannot express.

The task files of this folder name these functions, and lm-eval calls them. CHID gets one item for
each blank. XSum is cut to its first items and scored by ROUGE. This module does not know models or
prompts.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

XSUM_ITEMS = 1000
_BLANK = re.compile(r"#idiom\d+#")
_ASKED, _HIDDEN = "______", "……"


def chid_blanks(documents: Any) -> Any:
    """Make a `datasets.Dataset` with ``{"passage", "candidates", "answer"}`` for every blank.

    ``passage`` is the passage with the blank: this blank is written ``______`` and the others
    ``……``. ``answer`` is an index among the candidates.

    Raises:
        ValueError: a document has more or fewer answers than blanks.
    """
    return documents.map(
        _blanks_of, batched=True, remove_columns=documents.column_names, keep_in_memory=True
    )


def _blanks_of(batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    items: dict[str, list[Any]] = {"passage": [], "candidates": [], "answer": []}
    for content, candidates, answers in zip(
        batch["content"], batch["candidates"], batch["answers"], strict=True
    ):
        passages = [passage for text in content for passage in _passages(text)]
        items["passage"] += passages
        items["candidates"] += [candidates] * len(passages)
        items["answer"] += [
            answer for _, answer in zip(passages, answers["candidate_id"], strict=True)
        ]
    return items


def _passages(text: str) -> list[str]:
    """Give ``text`` once for each of its blanks, with this blank asked and the others hidden."""
    pieces = _BLANK.split(text)
    return [
        _HIDDEN.join(pieces[:place]) + _ASKED + _HIDDEN.join(pieces[place:])
        for place in range(1, len(pieces))
    ]


def xsum_first(documents: Any) -> Any:
    """Take the first `XSUM_ITEMS` rows."""
    return documents.select(range(min(XSUM_ITEMS, len(documents))))


def xsum_rouge(document: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """Score the answer's first line against the summary: ROUGE F1 (0 to 1, no stemming)."""
    summary, *_ = [*results[0].strip().splitlines(), ""]
    scores = _rouge().score(document["summary"], summary)
    return {name: score.fmeasure for name, score in scores.items()}


@cache
def _rouge() -> Any:
    handlers = logging.root.handlers[:]
    from absl import logging as absl_logging
    from rouge_score.rouge_scorer import RougeScorer

    # absl puts a handler on the root logger. It holds the sys.stderr of now and closes it later.
    logging.root.handlers[:] = handlers
    absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__
    return RougeScorer(["rouge1", "rouge2", "rougeL"])
