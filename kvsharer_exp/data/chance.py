"""Say what a multiple-choice task gives a model that only guesses, from the task's documents.

`TaskScorer` asks for the pass marks of its tasks. `retained` needs them: of a task that the full
cache does no better than by guessing, nothing can be retained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import islice
from statistics import fmean
from typing import Any

from kvsharer_exp.values.intervals import CONFIDENCE, z_quantile
from kvsharer_exp.values.score_names import ACCURACIES, ScoreName


def chances(task: Any, limit: int | None = None) -> list[float]:
    """The share of right choices in each of the first ``limit`` documents of an lm-eval task.

    It is empty for a task that lets the model choose nothing, and for one that scores its
    documents itself (``process_results``), because nobody knows what guessing scores there.
    """
    if task.OUTPUT_TYPE != "multiple_choice" or task.config.process_results is not None:
        return []
    found = []
    for document in islice(task.eval_docs, limit):
        right = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
        num_right = len(set(right)) if isinstance(right, list) else 1
        found.append(num_right / len(task.doc_to_choice(document)))
    return found


def pass_mark(guessed: Sequence[float], *, confidence: float = CONFIDENCE) -> float:
    """The accuracy above which the interval of a model lies above chance.

    ``guessed`` holds the chance of each item. Where all are alike, the interval is Wilson's, and
    the mark is above 1 if there are too few items to tell any model from one that guesses.
    """
    spread = math.sqrt(sum(chance * (1 - chance) for chance in guessed)) / len(guessed)
    return fmean(guessed) + z_quantile(confidence) * spread


def pass_marks(tasks: Mapping[str, Sequence[Any]], limit: int | None = None) -> dict[str, float]:
    """The pass mark of each accuracy that guessing raises, by score name (see `PassMarks`).

    ``tasks`` holds by name the lm-eval tasks behind a score, of which each gives its first
    ``limit`` documents. The score of a group has a mark only if all its members have one.
    """
    marks: dict[str, float] = {}
    for name, members in tasks.items():
        guessed = [chances(task, limit) for task in members]
        if guessed and all(guessed):
            mark = pass_mark([chance for some in guessed for chance in some])
            told = set(members[0].aggregation()) & ACCURACIES
            marks |= {str(ScoreName.of_task(name, metric)): mark for metric in sorted(told)}
    return marks
