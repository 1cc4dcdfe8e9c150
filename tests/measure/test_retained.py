"""What is retained of the full cache's scores: of which tasks, and between which ends."""

import math
import random
from typing import Any

import pytest

from kvsharer_exp.data.chance import chances, pass_mark, pass_marks
from kvsharer_exp.data.passages import PARTS, Passage, TextParts
from kvsharer_exp.data.tasks import load_tasks
from kvsharer_exp.measure.score_interval import share_intervals
from kvsharer_exp.values.intervals import t_interval, wilson
from kvsharer_exp.values.score_names import fails, retained, share_name

ACC, CLOZE = "lm_eval/wiki_next/acc", "lm_eval/wiki_cloze/acc"


@pytest.fixture(scope="module")
def tasks() -> dict[str, Any]:
    draw = random.Random(0)
    words = [f"word{number}" for number in range(200)]
    text = [Passage(" ".join(draw.choices(words, k=60)), f"d{n // 5}") for n in range(60)]
    parts = TextParts((), (), tuple(text), dict.fromkeys(PARTS, "none"))
    return load_tasks(["wiki_next", "sums"], parts)


@pytest.mark.parametrize("limit", [12, 24, None])
def test_guessing_one_of_four_fails_the_task(tasks: dict[str, Any], limit: int | None) -> None:
    found = chances(tasks["wiki_next"], limit)
    assert set(found) == {0.25}
    items = len(found)
    assert items == (limit or len(tasks["wiki_next"].eval_docs))
    marks = pass_marks({name: [task] for name, task in tasks.items()}, limit)
    assert set(marks) == {ACC, ACC + "_norm"}  # nobody guesses a sum
    for right in range(items + 1):
        touched = wilson(right, items).low <= 0.25
        assert fails(ACC, right / items, marks) == touched
        shares = retained({ACC: 0.2}, {ACC: right / items}, None, marks)
        assert (ACC in shares) != touched


def test_a_document_has_its_own_chance() -> None:
    class Task:
        OUTPUT_TYPE, multiple_input = "multiple_choice", False
        eval_docs = ({"choices": "abcd", "gold": 1}, {"choices": "ab", "gold": [0, 1]})
        config = type("Config", (), {"process_results": None})

        doc_to_choice = staticmethod(lambda document: list(document["choices"]))
        doc_to_target = staticmethod(lambda document: document["gold"])
        aggregation = staticmethod(lambda: {"acc": None, "f1": None})

    assert chances(Task()) == [0.25, 1.0]
    assert set(pass_marks({"one": [Task()]})) == {"lm_eval/one/acc"}
    assert pass_mark([0.25, 0.75]) > 0.5
    Task.config.process_results = len  # it scores documents as it likes
    assert pass_marks({"one": [Task()]}) == {}


def test_a_group_has_a_mark_if_all_its_members_have_one(tasks: dict[str, Any]) -> None:
    both = [tasks["wiki_next"], tasks["wiki_next"]]
    marks = pass_marks({"pair": both, "mixed": [*both, tasks["sums"]]}, 8)
    assert marks == {
        f"lm_eval/pair/{metric}": pass_mark([0.25] * 16) for metric in ("acc", "acc_norm")
    }


def test_the_interval_of_what_is_retained_is_paired() -> None:
    draw = random.Random(1)
    full = [float(draw.random() < 0.7) for _ in range(100)]
    plan = [0.0 if number % 20 == 0 else right for number, right in enumerate(full)]
    shares = retained({CLOZE: sum(plan) / 100}, {CLOZE: sum(full) / 100})
    found = share_intervals(shares, {CLOZE: plan}, {CLOZE: full}, confidence=0.95)
    inside = found[share_name(CLOZE)]
    assert inside.mean == shares[CLOZE]
    assert inside.low < inside.mean < inside.high
    # Two intervals that know nothing of each other leave more than twice as much open.
    low, high = wilson(sum(plan), 100).low, wilson(sum(plan), 100).high
    assert inside.high - inside.low < (high - low) / (sum(full) / 100) / 2


def test_a_perplexity_retains_by_its_likelihoods() -> None:
    name, full, plan = "perplexity/report", [-3.0, -2.5, -2.8], [-3.1, -2.7, -2.8]
    gains = t_interval([a - b for a, b in zip(plan, full, strict=True)])
    share = math.exp(sum(plan) / 3) / math.exp(sum(full) / 3)
    found = share_intervals({name: share}, {name: plan}, {name: full}, confidence=0.95)
    inside = found[share_name(name)]
    assert (inside.low, inside.high) == pytest.approx((math.exp(gains.low), math.exp(gains.high)))


def test_where_less_is_better_the_full_cache_is_on_top_and_f1_has_none() -> None:
    lost, f1 = "lm_eval/odd/lost", "lm_eval/odd/f1"
    told = {lost: False, f1: True}
    shares = retained({lost: 2.0, f1: 0.4}, {lost: 1.0, f1: 0.5}, told)
    items, full = {lost: [1.0, 3.0], f1: [0.0, 1.0]}, {lost: [0.5, 1.5], f1: [1.0, 1.0]}
    found = share_intervals(shares, items, full, told, confidence=0.95)
    assert set(found) == {share_name(lost)}
    assert found[share_name(lost)].mean == 0.5


def test_no_share_is_above_that_of_a_perfect_score() -> None:
    items, name = [1.0] * 8, "lm_eval/copying/exact_match"
    found = share_intervals({name: 1.0}, {name: items}, {name: items}, confidence=0.95)
    assert found[share_name(name)].high == 1.0
    most = [1.0] * 7 + [0.0]
    found = share_intervals({name: 1.0}, {name: most}, {name: most}, confidence=0.95)
    assert found[share_name(name)].high <= 8 / 7
