"""A score's name is taken apart and put together in one place; the parts say what it means."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsharer_exp.values.score_names import (
    KL,
    ScoreName,
    failed,
    fails,
    higher_is_better,
    label,
    retained,
    retained_metrics,
    share_name,
    table_columns,
)

WORDS = st.text("abcdefgh_0123", min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("kl", ScoreName("kl", "", "kl")),
        ("kl/report", ScoreName("kl", "report", "kl")),
        ("perplexity/calibration", ScoreName("perplexity", "calibration", "perplexity")),
        ("lm_eval/wiki_cloze/acc", ScoreName("lm_eval", "wiki_cloze", "acc")),
        (
            "lm_eval/gsm8k/exact_match.strict",
            ScoreName("lm_eval", "gsm8k", "exact_match", "strict"),
        ),
    ],
)
def test_a_name_is_its_parts(name: str, parts: ScoreName) -> None:
    assert ScoreName.parse(name) == parts
    assert str(parts) == name


@given(WORDS, WORDS, st.just("") | WORDS)
def test_any_task_metric_survives(task: str, metric: str, filtered: str) -> None:
    made = ScoreName.of_task(task, metric, filtered)
    assert ScoreName.parse(str(made)) == made
    assert made.is_task
    assert made.is_of_search_text == task.endswith("_search")


def test_direction_and_likelihoods_are_the_metrics() -> None:
    assert higher_is_better("lm_eval/t/acc.strict")
    assert not higher_is_better("lm_eval/t/word_perplexity")
    assert not higher_is_better("kl/report")
    assert ScoreName.parse("lm_eval/t/bits_per_byte").of_likelihoods
    assert ScoreName.parse("perplexity/report").of_likelihoods
    assert not ScoreName.parse("kl/report").of_likelihoods
    assert label("lm_eval/t/acc", "\n") == "t\nacc"


def test_what_is_retained_has_a_direction_and_both_sides() -> None:
    full = {KL: 0.0, "perplexity/report": 20.0, "lm_eval/t/acc": 0.5, "lm_eval/t/f1": 0.0}
    scores = {KL: 0.3, "perplexity/report": 25.0, "lm_eval/t/acc": 0.4, "lm_eval/t/f1": 0.1}
    shares = retained({**scores, "lm_eval/other/acc": 1.0}, full)
    assert shares == {"perplexity/report": 0.8, "lm_eval/t/acc": 0.8}


def test_a_full_cache_below_the_pass_mark_fails_whatever_the_filter() -> None:
    name, strict, marks = "lm_eval/t/acc", "lm_eval/t/acc.strict", {"lm_eval/t/acc": 0.4}
    assert retained({name: 0.3}, {name: 0.39}, None, marks) == {}
    assert retained({strict: 0.3}, {strict: 0.39}, None, marks) == {}
    assert retained({name: 0.3}, {name: 0.6}, None, marks) == {name: 0.5}
    assert fails("lm_eval/t/exact_match", 0.4) and not fails("lm_eval/t/exact_match", 0.5)
    assert fails(name, 0.0) and not fails(name, 0.01)  # nobody knows what guessing scores


def test_of_a_task_whose_accuracy_fails_no_score_is_retained() -> None:
    acc, norm, other = (f"lm_eval/next/{metric}" for metric in ("acc", "acc_norm", "f1"))
    marks = {acc: 0.423, norm: 0.423}
    assert failed({acc: 0.4, norm: 0.5, other: 0.5}, marks) == {acc, norm, other}
    assert failed({norm: 0.4, other: 0.5, acc: 0.5}, marks) == {norm}
    assert failed({norm: 0.4, other: 0.5}, marks) == {norm, other}
    cloze = {"lm_eval/cloze/perplexity": 9e20, "lm_eval/cloze/acc": 0.0}
    assert retained(cloze, cloze) == {}
    assert set(retained({**cloze, KL: 0.1}, {**cloze, "lm_eval/cloze/acc": 0.1})) == {*cloze}
    strict, loose = "lm_eval/sums/exact_match.strict", "lm_eval/sums/exact_match.loose"
    assert failed({strict: 0.3, loose: 0.6, "kl": 0.0, "perplexity/report": 9.0}) == {strict}


def test_mlflow_keeps_the_ends_of_what_is_retained() -> None:
    found = retained_metrics({"a/b": 0.9, "c": 0.8}, {share_name("a/b"): [0.7, 1.1], "c": [0, 1]})
    assert found == {
        **{"retained/a/b": 0.9, "low/retained/a/b": 0.7, "high/retained/a/b": 1.1},
        "retained/c": 0.8,
    }


def test_a_table_shows_one_metric_of_every_task() -> None:
    names = ["cosine", "lm_eval/a/f1", "lm_eval/a/acc", KL, "lm_eval/b/odd", "lm_eval/c_search/acc"]
    assert table_columns(names) == [KL, "lm_eval/a/acc", "lm_eval/b/odd"]
