"""Facts planted in the prompts of windows: each once, and asked for after the prompt."""

import re
from typing import Any

import pytest
import torch

from kvsharer_exp.cli.config.scoring import ScoringConfig
from kvsharer_exp.data.recall_windows import plant_facts
from kvsharer_exp.values.errors import InputError
from tests.refusals import WAY_OUT

FACT = re.compile(r"The special magic number for (\w+ \w+) is (\d{5})\.")
SENTENCES, NO_SENTENCES = "It was so. He said no! ", "one two three four "


class ByLetters:
    """A tokenizer whose tokens are letters."""

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def windows(text: str = SENTENCES, count: int = 3, tokens: int = 2000) -> torch.Tensor:
    letters = (text * tokens)[: count * tokens]
    return torch.tensor([ord(letter) for letter in letters]).view(count, tokens)


def planted(some: torch.Tensor, prompt: int = 1600, seed: int = 0) -> list[str]:
    made = plant_facts(some, ByLetters(), prompt_tokens=prompt, seed=seed)
    assert made.shape == some.shape and made.dtype == torch.int64
    return [ByLetters().decode(ids) for ids in made.tolist()]


def test_each_question_is_answered_by_one_fact_of_the_prompt() -> None:
    for text in planted(windows()):
        facts, asked = FACT.findall(text[:1600]), FACT.findall(text[1600:])
        assert len({key for key, _ in facts}) == len(facts) > len(asked) > 4
        assert set(asked) < set(facts)
        assert asked != facts[: len(asked)]
        left = re.sub(r"\n\n" + FACT.pattern, "", text[1600:])
        assert "\n\nThe special magic number for".startswith(left[:30])  # the last one is cut


def test_what_is_left_of_the_prompt_is_its_text_with_facts_behind_sentences() -> None:
    some = windows()
    for text, window in zip(planted(some), some.tolist(), strict=True):
        prompt = text[:1600]
        assert all(prompt[m.start() - 2] in ".!" for m in FACT.finditer(prompt))
        left = re.sub(" " + FACT.pattern, "", prompt)
        assert left == ByLetters().decode(window)[: len(left)]
        assert 800 <= len(left) < 1600


def test_text_without_sentences_takes_facts_anywhere() -> None:
    (text,) = planted(windows(NO_SENTENCES, count=1))
    assert len(FACT.findall(text[:1600])) > 4


def test_a_window_depends_on_its_place_and_the_seed_only() -> None:
    assert planted(windows())[:2] == planted(windows(count=2))
    first, second, _ = (FACT.findall(text) for text in planted(windows()))
    assert not set(first) & set(second)
    assert FACT.findall(planted(windows(), seed=1)[0]) != first


def test_a_prompt_without_room_is_refused_and_the_length_that_is_told_is_enough() -> None:
    some = windows(tokens=700)
    with pytest.raises(InputError, match="prompt_tokens=300 has no room for") as refused:
        plant_facts(some, ByLetters(), prompt_tokens=300, seed=0)
    assert WAY_OUT.search(str(refused.value))
    enough = int(re.search(r"at least (\d+)", str(refused.value))[1])
    planted(windows(tokens=enough + 400), prompt=enough)


def test_recall_needs_a_prompt() -> None:
    with pytest.raises(InputError, match="give scoring=recall"):
        ScoringConfig(recall=True)
    assert ScoringConfig(recall=True, prompt_tokens=64).recall
