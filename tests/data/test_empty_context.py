"""Without what is asked for, an answer is a guess: it stands nowhere else and is like any other.

So a model that reads an empty context scores at chance, which is next to nothing for answers that
are written and not chosen.
"""

import re
from collections import Counter, defaultdict

import pytest

from kvsharer_exp import load_model
from kvsharer_exp.data.collapse_tasks import COLLAPSE_KINDS
from kvsharer_exp.data.local_tasks import items_of, local_task
from kvsharer_exp.data.passages import PARTS, Passage, TextParts
from kvsharer_exp.data.retrieval_tasks import RETRIEVAL_KINDS
from kvsharer_exp.data.task_words import NOUNS
from kvsharer_exp.data.tasks import _in_memory
from kvsharer_exp.measure.scoring import TaskScorer

WORDS = "Some words of a text that holds no number and goes on like this for a while. "
PARTS_OF_WORDS = TextParts(
    (), (), tuple(Passage(WORDS * 40, f"text {n}") for n in range(3)), dict.fromkeys(PARTS, "none")
)
SEEDS = range(20)
# What stands behind the last piece of a context that says anything of the answer.
QUESTION = {
    **dict.fromkeys(RETRIEVAL_KINDS, re.compile(r"\n[^\n]+$")),
    "sums": re.compile(r" =$"),
    "variables": re.compile(r"\nAnswer: \w+ =(?= \w+ =$)"),
    "copying": re.compile(r"\nAnswer:$"),
}


def name_of(kind: str) -> str:
    return f"{kind}_256" if kind in RETRIEVAL_KINDS else kind


def near(count: int, expected: float) -> bool:
    """Whether a count is within four and a half standard deviations of what chance expects."""
    return abs(count - expected) < 4.5 * expected**0.5


@pytest.mark.parametrize("kind", RETRIEVAL_KINDS)
def test_a_value_is_any_number_whatever_the_key_and_the_text(kind: str) -> None:
    items = [item for seed in SEEDS for item in items_of(name_of(kind), PARTS_OF_WORDS, seed=seed)]
    by_key = defaultdict(set)
    for item in items:
        question = QUESTION[kind].search(item["context"])
        assert question and item["key"] in question[0] and not re.search(r"\d", question[0])
        assert item["context"].count(item["answer"]) == 1  # in the one fact that is asked for
        by_key[item["key"]].add(item["answer"])
    assert sum(map(len, by_key.values())) == len(items)  # a key tells no value
    for place, digits in enumerate(["123456789", *["0123456789"] * 4]):
        counts = Counter(item["answer"][place] for item in items)
        assert all(near(counts[digit], len(items) / len(digits)) for digit in digits)
        assert counts.keys() == set(digits)


@pytest.mark.parametrize("kind", COLLAPSE_KINDS)
def test_no_answer_is_told_by_the_examples_or_more_likely_than_others(kind: str) -> None:
    items = [item for seed in SEEDS for item in items_of(kind, PARTS_OF_WORDS, seed=seed)]
    answers = Counter(item["answer"] for item in items)
    # Who gives the same answer every time is right in at most three of a hundred.
    assert max(answers.values()) <= 0.03 * len(items)
    if kind == "copying":
        words = Counter(word for item in items for word in item["answer"].split())
        assert words.keys() == set(NOUNS)
        assert all(near(count, 4 * len(items) / len(NOUNS)) for count in words.values())
    if kind == "variables":
        for place in range(3):
            counts = Counter(item["answer"][place] for item in items)
            assert all(near(count, len(items) / len(counts)) for count in counts.values())
    if kind == "sums":  # which stand not even in the question
        assert not any(i["answer"] in re.findall(r"\d+", i["context"]) for i in items)


@pytest.mark.slow
def test_a_real_model_does_nothing_with_an_empty_context() -> None:
    model, tokenizer = load_model("smollm2")
    tasks = {}
    for kind in (*RETRIEVAL_KINDS, *COLLAPSE_KINDS):
        items = items_of(name_of(kind), PARTS_OF_WORDS)[:12]
        for item in items:
            question = QUESTION[kind].search(item["context"])
            assert question is not None
            item["context"] = question[0].strip()
        local = local_task(name_of(kind))
        assert local is not None
        tasks[kind] = _in_memory(kind, items, local.config)
    scores = TaskScorer(model, tokenizer, tasks, add_bos_token=False).score()
    assert scores.keys() == {f"lm_eval/{kind}/exact_match" for kind in tasks}
    assert max(scores.values()) <= 0.05
