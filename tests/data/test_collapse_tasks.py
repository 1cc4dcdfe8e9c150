"""Sums, variables and copying: answers are right, are nowhere in the examples, and are many."""

import re
from collections import Counter
from typing import Any

import pytest

from kvsharer_exp import KVPlan, apply_plan, load_model
from kvsharer_exp.data.collapse_tasks import COLLAPSE_KINDS
from kvsharer_exp.data.local_tasks import items_of
from kvsharer_exp.data.passages import PARTS, TextParts
from kvsharer_exp.data.tasks import load_tasks
from kvsharer_exp.measure.scoring import TaskScorer

NO_TEXT = TextParts((), (), (), dict.fromkeys(PARTS, "none"))
QUESTION = {"sums": ". ", "variables": "\nQuestion", "copying": "\n\n"}  # what stands before it


def examples_and_question(kind: str, context: str) -> tuple[str, str]:
    examples, _, question = context.rpartition(QUESTION[kind])
    return examples, question


@pytest.mark.parametrize("kind", COLLAPSE_KINDS)
@pytest.mark.parametrize("seed", [0, 7])
def test_the_answer_is_in_no_example(kind: str, seed: int) -> None:
    for item in items_of(kind, NO_TEXT, seed=seed):
        examples, question = examples_and_question(kind, item["context"])
        assert len(examples) > len(question)
        for word in item["answer"].split():
            assert not re.search(rf"\b{word}\b", examples)


@pytest.mark.parametrize("kind", COLLAPSE_KINDS)
def test_answers_and_questions_are_many(kind: str) -> None:
    items = items_of(kind, NO_TEXT)
    questions = {examples_and_question(kind, item["context"])[1] for item in items}
    assert len(questions) == len(items) == 100
    answers = Counter(item["answer"] for item in items)
    assert max(answers.values()) <= 2
    assert len({item["answer"] for item in items[:24]}) == 24
    if kind != "sums":
        assert max(answers.values()) == 1
    theirs = {item["context"] for item in items_of(f"{kind}_search", NO_TEXT)}
    assert not theirs & {item["context"] for item in items}


def test_sums_and_their_examples_are_right() -> None:
    for item in items_of("sums", NO_TEXT):
        whole = f"{item['context']} {item['answer']}"
        sums = re.findall(r"(\d+) \+ (\d+) = (\d+)", whole)
        assert len(sums) == 9
        assert all(int(a) + int(b) == int(total) for a, b, total in sums)
        assert len({total for *_, total in sums}) == 9
        assert all(len(number) == 2 for each in sums for number in each)


def test_variables_have_the_value_that_their_names_lead_to() -> None:
    block = re.compile(r"Question: (.*)\. What is (\w+)\?\nAnswer: (\w+) = (\w+) = (\d+)")
    places: Counter[int] = Counter()
    for item in items_of("variables", NO_TEXT):
        found = block.findall(f"{item['context']} {item['answer']}")
        assert len(found) == 4
        names: list[str] = []
        for given, asked, name, source, value in found:
            values = dict(pair.split(" = ") for pair in given.split(", "))
            assert name == asked and values[asked] == source and values[source] == value
            assert len({each for each in values.values() if each.isdigit()}) == 3
            names += values
        assert len(set(names)) == len(names) == 16
        places[list(values).index(source)] += 1
    assert set(places) == {0, 1, 2} and max(places.values()) < 64


def test_copies_are_the_words_of_the_question() -> None:
    for item in items_of("copying", NO_TEXT):
        pairs = re.findall(r"words: (.*)\nAnswer: (.*)", f"{item['context']} {item['answer']}")
        assert len(pairs) == 6
        assert all(text == copy for text, copy in pairs)
        words = [word for text, _ in pairs for word in text.split()]
        assert len(set(words)) == len(words) == 24


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [("sums", " ", ". 12 + 1"), ("variables", "", ""), ("copying", " ", ".")],
)
def test_an_exact_answer_counts_and_a_longer_or_shorter_one_does_not(
    kind: str, before: str, after: str
) -> None:
    task = load_tasks([kind], NO_TEXT)[kind]
    task.build_all_requests(limit=4, rank=0, world_size=1)
    answers = [item["answer"] for item in list(task.eval_docs)[:4]]
    said = [before + answers[0] + after, answers[1] + "1", answers[2][:-1], "\n"]
    for instance, text in zip(task.instances, said, strict=True):
        instance.resps = [text]
    task.apply_filters()
    scores: list[Any] = [
        task.process_results(instance.doc, [instance.filtered_resps["none"]])["exact_match"]
        for instance in task.instances
    ]
    assert scores == [1, 0, 0, 0]


@pytest.mark.slow
def test_a_plan_that_keeps_one_layers_kv_fails_every_collapse_task() -> None:
    model, tokenizer = load_model("smollm2")
    scorer = TaskScorer(
        model, tokenizer, load_tasks(COLLAPSE_KINDS, NO_TEXT), limit=24, add_bos_token=False
    )
    full = scorer.score()
    with apply_plan(model, KVPlan.parse("_".join(["0"] * 30))):
        broken = scorer.score()
    for kind in COLLAPSE_KINDS:
        name = f"lm_eval/{kind}/exact_match"
        assert full[name] >= 0.4  # measured: .54, .67, .88; other machines round differently
        assert broken[name] <= 0.05
