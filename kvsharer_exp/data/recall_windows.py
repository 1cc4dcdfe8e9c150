"""Plant facts in the prompts of windows, and ask for each of them in what follows.

The KL of plain text after a prompt says little about what a plan forgets of the prompt: most tokens
can be predicted from those just before. After such a window's prompt there are questions only, and
the digits of an answer can be predicted from a fact far back alone. So a search on these windows
keeps what the tasks of `retrieval_tasks` need. Facts and questions have the form that they have
there; keys and values are drawn anew for every window.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import chain, pairwise
from typing import Any

import torch

from kvsharer_exp.data.retrieval_tasks import FACT, KEYS, VALUES
from kvsharer_exp.values.errors import InputError

_ENDS = (".", "!", "?", "。", "！", "？")


def plant_facts(
    windows: torch.Tensor, tokenizer: Any, *, prompt_tokens: int, seed: int
) -> torch.Tensor:
    """Windows of the same shape, (num_windows, window_tokens) int64, with facts to be recalled.

    The first ``prompt_tokens`` of each are its own text, as much of it as there is room for, with
    a fact after some of its sentences. The tokens after it ask for these facts in another order and
    answer. A window's facts depend on its place and on ``seed``, not on the number of windows.

    Raises:
        InputError: facts, one for each question, take more than half of the prompt.
    """

    def encode(text: str) -> list[int]:
        return tokenizer([text], add_special_tokens=False, verbose=False)["input_ids"][0]

    ends = {i for i in windows.unique().tolist() if tokenizer.decode([i]).rstrip().endswith(_ENDS)}
    planted = []
    for place, window in enumerate(windows.tolist()):
        rng = random.Random(f"recall {seed} {place}")
        facts, asked = _facts(len(window) - prompt_tokens, encode, rng)
        room = prompt_tokens - sum(map(len, facts))
        if room < prompt_tokens / 2:
            needed = 2 * (prompt_tokens - room)
            raise InputError(
                f"scoring.prompt_tokens={prompt_tokens} has no room for {needed // 2} tokens of "
                f"facts between its text: give at least {needed + needed // 8}, or shorter windows"
            )
        planted.append([*_between(window[:room], facts, ends, rng), *asked])
    return torch.tensor(planted, dtype=torch.long).view_as(windows)


def _facts(
    tokens: int, encode: Callable[[str], list[int]], rng: random.Random
) -> tuple[list[list[int]], list[int]]:
    """Facts as token ids, as many as ``tokens`` have room to ask for, and the questions."""
    facts: list[list[int]] = []
    questions: list[list[int]] = []
    for key in rng.sample(KEYS, min(tokens, len(KEYS))):
        fact = FACT.format(key=key, value=rng.choice(VALUES))
        facts.append(encode(f" {fact}"))
        questions.append(encode(f"\n\n{fact}"))
        if sum(map(len, questions)) >= tokens:
            break
    rng.shuffle(questions)
    return facts, list(chain.from_iterable(questions))[:tokens]


def _between(
    text: list[int], facts: list[list[int]], ends: set[int], rng: random.Random
) -> list[int]:
    """The ``text`` with a fact behind some of its sentences, or anywhere if it has too few."""
    places = [place for place in range(1, len(text)) if text[place - 1] in ends]
    if len(places) < len(facts):
        places = list(range(1, len(text)))
    cuts = [0, *sorted(rng.sample(places, len(facts))), len(text)]
    pieces = [text[first:last] for first, last in pairwise(cuts)]
    return list(chain(*chain.from_iterable(zip(pieces, facts, strict=False)), pieces[-1]))
