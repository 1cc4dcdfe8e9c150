"""Make short tasks that collapse first where a plan goes wrong, while perplexity hardly moves.

``sums`` adds two-digit numbers, ``variables`` follows a value from name to name, and ``copying``
repeats words. Each prompt shows worked examples before the question, because small models do these
tasks only so. They need no text. `local_tasks` finds the tasks by name.

Every item is drawn by the seed. Its answer is written nowhere in the examples, so it has to be
worked out from the question.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

from kvsharer_exp.data.passages import Passage
from kvsharer_exp.data.task_items import Item, LocalTask, generation
from kvsharer_exp.data.task_words import NOUNS

NUM_ITEMS = 100

_SUM_EXAMPLES = 8
_ADDENDS = range(10, 50)
_VALUE_EXAMPLES, _ASSIGNED, _VALUES = 3, 3, range(100, 1000)
_COPY_EXAMPLES, _COPY_WORDS = 5, 4


def sums_items(rng: random.Random) -> list[Item]:
    """Make sums of two numbers from 10 to 49 in which no digit is carried.

    No example has the answer as a number or as its result.
    """
    pairs = [(a, b) for a, b in product(_ADDENDS, repeat=2) if a % 10 + b % 10 < 10]
    rng.shuffle(pairs)
    seen: Counter[int] = Counter()
    rounds = []
    for a, b in pairs:
        rounds.append((seen[a + b], a, b))
        seen[a + b] += 1
    items = []
    for _, a, b in sorted(rounds, key=lambda each: each[0])[:NUM_ITEMS]:  # answers repeat late
        others: dict[int, tuple[int, int]] = {}
        for c, d in rng.sample(pairs, len(pairs)):
            if len(others) == _SUM_EXAMPLES:
                break
            if a + b not in (c, d, c + d):
                others.setdefault(c + d, (c, d))
        examples = "".join(f"{c} + {d} = {c + d}. " for c, d in others.values())
        items.append({"context": f"{examples}{a} + {b} =", "answer": str(a + b)})
    return items


def variables_items(rng: random.Random) -> list[Item]:
    """Make questions for the value of a name that was given it through another name.

    Each example has names and values that neither the question nor another example uses.
    """
    items = []
    for answer in rng.sample(_VALUES, NUM_ITEMS):
        rest = [value for value in _VALUES if value != answer]
        values = iter([answer, *rng.sample(rest, (_VALUE_EXAMPLES + 1) * _ASSIGNED - 1)])
        names = iter(rng.sample(NOUNS, (_VALUE_EXAMPLES + 1) * (_ASSIGNED + 1)))
        blocks = []
        for _ in range(_VALUE_EXAMPLES + 1):
            pairs = [(next(names), next(values)) for _ in range(_ASSIGNED)]
            (source, value), name = pairs[0], next(names)
            rng.shuffle(pairs)
            given = ", ".join(f"{other} = {number}" for other, number in pairs)
            question = f"Question: {given}, {name} = {source}. What is {name}?"
            blocks.append((f"{question}\nAnswer: {name} = {source} =", value))
        examples = "".join(f"{block} {value}\n" for block, value in blocks[1:])
        items.append({"context": examples + blocks[0][0], "answer": str(answer)})
    return items


def copying_items(rng: random.Random) -> list[Item]:
    """Make sequences of words to repeat. No word of the answer is in an example."""
    items = []
    for _ in range(NUM_ITEMS):
        words = rng.sample(NOUNS, (_COPY_EXAMPLES + 1) * _COPY_WORDS)
        texts = [
            " ".join(words[place : place + _COPY_WORDS])
            for place in range(0, len(words), _COPY_WORDS)
        ]
        examples = "".join(
            f"Question: Repeat these words: {text}\nAnswer: {text}\n\n" for text in texts[1:]
        )
        context = f"{examples}Question: Repeat these words: {texts[0]}\nAnswer:"
        items.append({"context": context, "answer": texts[0]})
    return items


_Maker = Callable[[random.Random], list[Item]]
_KINDS: dict[str, tuple[_Maker, dict[str, Any]]] = {
    "sums": (sums_items, generation(6, r"\w+")),
    "variables": (variables_items, generation(6, r"\w+")),
    "copying": (copying_items, generation(20, r"\w[\w ]*")),
}
COLLAPSE_KINDS = tuple(_KINDS)


def collapse_task(name: str) -> LocalTask | None:
    """Make the task called ``name``; None if the name is not that of a collapse task.

    The twin with ``_search`` at the end of the name has other items.
    """
    kind = name.removesuffix("_search")
    if kind not in _KINDS:
        return None
    part = "search" if name.endswith("_search") else "report"
    make, config = _KINDS[kind]

    def items(passages: Sequence[Passage], seed: int) -> list[Item]:
        return make(random.Random(f"{kind} {part} {seed}"))

    return LocalTask(part, items, config)
