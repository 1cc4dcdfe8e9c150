"""Make tasks that ask for one fact of a long text: what a plan forgets shows here first.

In ``needle`` one fact is hidden at a random depth of held-out text. In ``multi_key`` there are
several facts of the same form, and one of them is asked for. ``key_value`` is a list of many lines,
each with a key and a value; the value of one key is asked for. `local_tasks` finds the tasks by
name. The number in a name is the length in tokens: ``needle_4096``, ``needle_4096_search``.
Without a number it is 1024.

Keys and answers are drawn by the seed, and differ from item to item. Prompt and answer together
have at most the length, and nearly reach it. SmolLM2-135M does ``needle`` and ``multi_key`` at 512
to 2,048 tokens. It does ``key_value`` at 512 (.67), but not at 1,024 (.25), so shorten that one.
Needle in a haystack, with several keys: RULER, https://arxiv.org/abs/2404.06654. Lists of keys and
values: Lost in the Middle, https://arxiv.org/abs/2307.03172.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise, product
from typing import Any

from kvsharer_exp.data.passages import Passage
from kvsharer_exp.data.task_items import Item, LocalTask, generation
from kvsharer_exp.data.task_words import ADJECTIVES, NOUNS
from kvsharer_exp.values.errors import InputError

DEFAULT_TOKENS = 1024
NUM_ITEMS = 100
NUM_KEYS = 4  # of multi_key
ANSWER_TOKENS = 8  # five digits, a space before them, and room for what ends them
TOKENS_PER_WORD = 1.4  # of English text, where there is no tokenizer to count with
RETRIEVAL_KINDS = ("needle", "key_value", "multi_key")

FACT = "The special magic number for {key} is {value}."
_QUESTION = "\n\nThe special magic number for {key} is"
_LINE = "{key}: {value}\n"
_ASKED = "\n{key}:"
_SENTENCE_END = re.compile(r"[.!?](?=\s)|[。！？]")
_FEWEST_LINES = 4
KEYS = tuple(f"{adjective} {noun}" for adjective, noun in product(ADJECTIVES, NOUNS))
VALUES = range(10_000, 100_000)
_NAME = re.compile(rf"({'|'.join(RETRIEVAL_KINDS)})(?:_(0|[1-9][0-9]{{0,8}}))?(_search)?")


def token_counter(tokenizer: Any | None = None) -> Callable[[str], int]:
    """What counts the tokens of a text as ``tokenizer`` cuts it, its special tokens included.

    Without a tokenizer every word counts as 1.4 tokens.
    """
    if tokenizer is None:
        return lambda text: math.ceil(TOKENS_PER_WORD * len(text.split()))
    return lambda text: len(tokenizer(text).input_ids)


def is_retrieval(name: str) -> bool:
    """Whether ``name`` is that of a retrieval task, of whatever length."""
    return _NAME.fullmatch(name) is not None


def retrieval_task(
    name: str, tokenizer: Any | None = None, max_positions: int | None = None
) -> LocalTask | None:
    """Make the task called ``name``; None if the name is not that of a retrieval task.

    ``tokenizer``: what the length is measured with; without one a word counts as 1.4 tokens.
    ``max_positions``: the most tokens that the model can read, if known.

    Raises:
        InputError: the length is more than ``max_positions``.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    kind, number, search = match.groups()
    tokens = DEFAULT_TOKENS if number is None else int(number)
    if max_positions is not None and tokens > max_positions:
        longest = f"{kind}_{max_positions}{search or ''}"
        raise InputError(
            f"task {name} is longer than the {max_positions} positions of the model: "
            f"give {longest}, or a shorter one"
        )
    maker = _Maker(kind, tokens, "search" if search else "report", token_counter(tokenizer))
    return LocalTask(maker.part, maker.items, generation(ANSWER_TOKENS, r"\w+"))


@dataclass(frozen=True, slots=True)
class _Maker:
    """Makes the items of one retrieval task."""

    kind: str
    tokens: int
    part: str
    count: Callable[[str], int]

    def items(self, passages: Sequence[Passage], seed: int) -> list[Item]:
        """Make items ``{"context", "answer", "key"}``; no key or answer is asked for twice."""
        rng = random.Random(f"{self.kind} {self.tokens} {self.part} {seed}")
        keys, values = rng.sample(KEYS, NUM_ITEMS), rng.sample(VALUES, NUM_ITEMS)
        make = self._list if self.kind == "key_value" else partial(self._haystack, passages)
        return [
            {"context": make(key, value, rng), "answer": str(value), "key": key}
            for key, value in zip(keys, values, strict=True)
        ]

    @property
    def room(self) -> int:
        """How many tokens a prompt may have."""
        return self.tokens - ANSWER_TOKENS

    def _list(self, key: str, value: int, rng: random.Random) -> str:
        """Make a list of lines, as many as there is room for, with ``key`` at a random place."""
        own, asked = _LINE.format(key=key, value=value), _ASKED.format(key=key)
        lines = [
            _LINE.format(key=other, value=number)
            for other, number in self._others(key, value, self.tokens // 4, rng)
        ]
        left = self.room - self.count(own + asked)
        few = lines[:64]  # enough to know what a line takes
        each = self.count("".join(few)) / len(few) if few else math.inf
        num = int(left / each) + 1
        if num <= _FEWEST_LINES:
            raise self._too_short(self.tokens - left + _FEWEST_LINES * self.count(own))
        if num > len(lines):
            most = int(len(lines) * each)
            raise InputError(
                f"task {self.name} asks for {num} keys, but there are {len(lines)}: give at most "
                f"key_value_{most - most % 1000}"
            )
        depth = rng.random()
        while True:
            place = int(depth * (num + 1))
            context = "".join([*lines[:place], own, *lines[place:num]]) + asked
            excess = self.count(context) - self.room
            if excess <= 0:
                return context
            num -= max(1, int(excess / each))

    def _haystack(
        self, passages: Sequence[Passage], key: str, value: int, rng: random.Random
    ) -> str:
        """Hide the facts between sentences of running text, each at a random depth."""
        others = NUM_KEYS - 1 if self.kind == "multi_key" else 0
        pairs = [(key, value), *self._others(key, value, others, rng)]
        facts = [FACT.format(key=k, value=v) for k, v in rng.sample(pairs, len(pairs))]
        question = _QUESTION.format(key=key)
        fixed = self.count(" ".join(facts) + question)
        if self.room < 2 * fixed:
            raise self._too_short(2 * fixed + ANSWER_TOKENS)
        unwanted = ["magic number", *(str(each) for pair in pairs for each in pair)]
        text = self._filler(passages, self.room - fixed, unwanted, rng)
        ends = [match.end() for match in _SENTENCE_END.finditer(text)]
        if len(ends) < len(facts):
            ends = [place for place, letter in enumerate(text) if letter == " "]
        places = sorted(rng.sample(ends, len(facts)))
        while True:
            cuts = [0, *(min(place, len(text)) for place in places), len(text)]
            pieces = [text[first:last].strip() for first, last in pairwise(cuts)]
            both = [*chain.from_iterable(zip(pieces, facts, strict=False)), pieces[-1]]
            context = " ".join(filter(None, both)) + question
            excess = self.count(context) - self.room
            if excess <= 0:
                return context
            # A token of English has more letters than that, so hardly any room is lost.
            text = text[: -excess * (3 if text[-50:].isascii() else 1)]

    def _filler(
        self, passages: Sequence[Passage], tokens: int, unwanted: Sequence[str], rng: random.Random
    ) -> str:
        """The text of passages from a random one on, cut so that it has about ``tokens``.

        Passages with an ``unwanted`` text in them are left out.
        """
        start, text, letters = rng.randrange(len(passages) or 1), "", 5 * tokens
        for passage in (*passages[start:], *passages[:start]):
            if not any(each in passage.text for each in unwanted):
                text += " ".join(passage.text.split()) + " "
            if len(text) >= letters:
                if self.count(text) >= tokens:
                    break
                letters += letters // 2
        length = self.count(text)
        if length < tokens:
            raise InputError(
                f"task {self.name} is {self.tokens} tokens long, but the {self.part} text has "
                f"{length}: give a longer text (heldout.path=wikipedia), or a shorter task"
            )
        num = len(text)
        for _ in range(2):  # parts of a text differ in how many letters a token has
            num = math.ceil(num * tokens / length)
            length = self.count(text[:num])
        return text[: math.ceil(num * tokens / length)]

    def _others(self, key: str, value: int, num: int, rng: random.Random) -> list[tuple[str, int]]:
        """Draw up to ``num`` pairs of keys and values that are not ``key`` and ``value``."""
        num = min(num, len(KEYS) - 1)
        keys = [other for other in rng.sample(KEYS, num + 1) if other != key]
        values = [other for other in rng.sample(VALUES, num + 1) if other != value]
        return list(zip(keys[:num], values[:num], strict=True))

    @property
    def name(self) -> str:
        """The name of the task, with its length."""
        return f"{self.kind}_{self.tokens}" + ("_search" if self.part == "search" else "")

    def _too_short(self, least: float) -> InputError:
        """``least``: a length that has room for this question; one with room for any is told."""
        enough = 1 << math.ceil(math.log2(least * 1.1))
        return InputError(
            f"task {self.name} has no room for its question and text to search in: give at least "
            f"{self.kind}_{enough}"
        )
