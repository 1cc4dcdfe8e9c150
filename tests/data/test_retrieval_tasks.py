"""Facts to find in a long text: where they are hidden, how long prompts are, what is refused."""

import re
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.config.scoring import ScoringConfig, TasksConfig
from kvsharer_exp.data.local_tasks import items_of, local_task, near_names
from kvsharer_exp.data.passages import PARTS, Passage, TextParts
from kvsharer_exp.data.retrieval_tasks import ANSWER_TOKENS, NUM_KEYS, token_counter
from kvsharer_exp.data.split import split_texts
from kvsharer_exp.data.tasks import check_no_overlap, load_tasks
from kvsharer_exp.measure.scoring import TaskScorer
from kvsharer_exp.model.load import load_model
from kvsharer_exp.values.errors import InputError
from tests.refusals import WAY_OUT

FACT = re.compile(r"The special magic number for (\w+ \w+) is (\d{5})\.")
LINE = re.compile(r"(\w+ \w+): (\d{5})\n")
NAMES = [f"{kind}_{n}" for kind in ("needle", "key_value", "multi_key") for n in (512, 2048)]


class ByLetters:
    """A tokenizer that cuts words into pieces of three letters and begins texts with BOS."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        class Encoding:
            input_ids = [1] * add_special_tokens + re.findall(r"\s?\w{1,3}|\W", text)

        return Encoding


@pytest.fixture(scope="module")
def parts() -> TextParts:
    return split_texts()


def facts_of(name: str, context: str) -> list[tuple[str, str]]:
    return (LINE if name.startswith("key_value") else FACT).findall(context)


@pytest.mark.parametrize("name", NAMES)
def test_the_answer_is_found_once_and_only_under_its_key(name: str, parts: TextParts) -> None:
    for item in items_of(name, parts):
        context, key, answer = item["context"], item["key"], item["answer"]
        facts = facts_of(name, context)
        assert [value for found, value in facts if found == key] == [answer]
        assert context.count(answer) == 1
        assert context.count(key) == 2  # in the fact and in the question
        assert context.rsplit("\n", 1)[1].count(key) == 1
        assert len({found for found, _ in facts}) == len(facts)
        assert len({value for _, value in facts}) == len(facts)
        if name.startswith("key_value"):
            assert len(facts) > 50
        else:
            assert len(facts) == (NUM_KEYS if name.startswith("multi") else 1)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_can_be_guessed(name: str, parts: TextParts) -> None:
    """Neither from the question nor from other items nor from where the fact was before."""
    items = items_of(name, parts)
    assert len({item["key"] for item in items}) == len(items)
    assert len({item["answer"] for item in items}) == len(items)
    firsts = Counter(item["answer"][0] for item in items)
    assert set(firsts) == set("123456789") and max(firsts.values()) < len(items) / 4
    depths = [item["context"].index(item["answer"]) / len(item["context"]) for item in items]
    quarters = Counter(int(4 * depth) for depth in depths)
    assert min(quarters[n] for n in range(4)) > len(items) / 10
    places = Counter(
        [value for _, value in facts_of(name, item["context"])].index(item["answer"])
        for item in items
    )
    if name.startswith("multi"):
        assert set(places) == set(range(NUM_KEYS))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokenizer", [None, ByLetters()], ids=["words", "tokens"])
def test_prompt_and_answer_fill_the_length(name: str, tokenizer: Any, parts: TextParts) -> None:
    length = int(name.rpartition("_")[2])
    count = token_counter(tokenizer)
    for item in items_of(name, parts, tokenizer=tokenizer):
        whole = count(item["context"]) + ANSWER_TOKENS
        assert 0.95 * length <= whole <= length
        assert count(" " + item["answer"]) <= ANSWER_TOKENS


def test_without_a_number_the_length_is_1024(parts: TextParts) -> None:
    for kind in ("needle", "key_value", "multi_key"):
        assert items_of(kind, parts) == items_of(f"{kind}_1024", parts)
        assert items_of(f"{kind}_search", parts) == items_of(f"{kind}_1024_search", parts)


@pytest.mark.parametrize("kind", ["needle", "multi_key"])
def test_the_filler_is_text_of_the_own_part(kind: str, parts: TextParts) -> None:
    texts = {
        part: " ".join(" ".join(passage.text.split()) for passage in getattr(parts, part))
        for part in PARTS
    }
    asked: dict[str, set[str]] = {}
    for name, own in ((f"{kind}_512", "report"), (f"{kind}_512_search", "search")):
        items = items_of(name, parts)
        asked[own] = {item["answer"] for item in items}
        for item in items:
            pieces = FACT.sub("|", item["context"].rpartition("\n\n")[0]).split("|")
            longest = " ".join(max(pieces, key=len).split()[:20])
            assert [part for part in PARTS if longest in texts[part]] == [own]
    assert len(asked["report"] & asked["search"]) < 5


def test_facts_are_hidden_between_sentences(parts: TextParts) -> None:
    for item in items_of("multi_key_1024", parts):
        for before in re.split(FACT, item["context"])[0:-1:3]:
            assert before.strip() == "" or before.rstrip()[-1] in ".!?"


def test_text_without_spaces_fills_the_length_too() -> None:
    lines = tuple(Passage("春天来了花开了。" * 40, f"a.txt:{n}") for n in range(9))
    parts = TextParts((), (), lines, dict.fromkeys(PARTS, "a.txt"))
    for item in items_of("multi_key_700", parts, tokenizer=ByLetters()):
        assert 0.95 * 700 <= len(ByLetters()(item["context"]).input_ids) + ANSWER_TOKENS <= 700
        assert item["context"].count(item["answer"]) == 1
        assert len(facts_of("multi_key", item["context"])) == NUM_KEYS


@pytest.mark.parametrize("name", ["needle_20", "key_value_0", "multi_key_100", "needle_64_search"])
def test_a_length_too_short_is_told_one_that_is_enough(name: str, parts: TextParts) -> None:
    for tokenizer in (None, ByLetters()):
        if name == "needle_64_search" and tokenizer is None:
            continue  # a word is 1.4 tokens there, and the question fits
        with pytest.raises(InputError, match="has no room for its question") as error:
            items_of(name, parts, tokenizer=tokenizer)
        assert WAY_OUT.search(str(error.value))
        offered = str(error.value).rpartition(" ")[2]
        assert items_of(offered, parts, tokenizer=tokenizer)


def test_a_text_too_short_and_a_model_too_short_are_refused(parts: TextParts) -> None:
    lines = tuple(Passage("A short line of six words.", f"a.txt:{n}") for n in range(99))
    small = TextParts((), (), lines, dict.fromkeys(PARTS, "a.txt"))
    for names, texts, options, says in (
        ("needle_4096", small, {}, "is 4096 tokens long, but the report text has 832"),
        ("needle", TextParts((), (), (), small.sources), {}, "but the report text has 0: give"),
        ("needle_999999999", parts, {}, "is 999999999 tokens long, but the report text has"),
        ("key_value_99999999_search", parts, {}, r"keys, but there are 5471: give at most key_val"),
        (
            "needle_4096_search",
            parts,
            {"max_positions": 2048},
            "of the model: give needle_2048_search,",
        ),
        (
            "multi_key",
            parts,
            {"max_positions": 512},
            "of the model: give multi_key_512,",
        ),
    ):
        with pytest.raises(InputError, match=says) as error:
            load_tasks([names], texts, **options)
        line = str(error.value)
        assert "\n" not in line and len(line) <= 190 and WAY_OUT.search(line)
    assert items_of("needle_512", parts, max_positions=512)


def test_names_of_any_length_are_known(parts: TextParts) -> None:
    for name in ("needle", "needle_700", "key_value_64_search", "multi_key_search"):
        assert local_task(name) is not None
    for name in ("needle_", "needle_012", "needle_1e3", "needle_-5", "search_needle", "needles"):
        assert local_task(name) is None
    assert near_names("nedle_2048")[0] == "needle_2048"
    assert "key_value_512_search" in near_names("keyvalue_512_search")
    check_no_overlap(["needle_4096_search"], ["needle_4096", "sums", "wiki_ppl"])
    for search, report in (
        ("needle_512", "wiki_ppl"),
        ("sums", "key_value_99"),
        ("needle", "sums"),
    ):
        with pytest.raises(InputError, match=r"same \(report\) text"):
            check_no_overlap([search], [report])


def test_a_model_writes_an_answer_and_it_is_scored(parts: TextParts) -> None:
    model, tokenizer = load_model("tiny")
    names = ["needle_512", "key_value_512_search", "multi_key_700"]
    positions = model.config.max_position_embeddings
    tasks = load_tasks(names, parts, tokenizer=tokenizer, max_positions=positions)
    for name, task in tasks.items():
        lengths = [len(tokenizer(item["context"]).input_ids) for item in task.eval_docs]
        assert 0.95 * int(re.findall(r"\d+", name)[0]) <= max(lengths) + ANSWER_TOKENS
        assert max(lengths) + ANSWER_TOKENS <= int(re.findall(r"\d+", name)[0])
    scorer = TaskScorer(model, tokenizer, tasks, limit=2, batch_size=2, add_bos_token=False)
    assert scorer.score() == {f"lm_eval/{name}/exact_match": 0.0 for name in names}
    assert scorer.directions == {f"lm_eval/{name}/exact_match": True for name in names}
    for task in tasks.values():
        assert [instance.args[1]["max_gen_toks"] for instance in task.instances] == [8, 8]


def test_a_command_measures_with_its_models_tokenizer_and_positions(parts: TextParts) -> None:
    from kvsharer_exp.cli.session.scorers import Scorers

    model, tokenizer = load_model("tiny")  # 2,048 positions, a token a byte
    loaded: Any = SimpleNamespace(model=model, tokenizer=tokenizer)
    log, windows = SimpleNamespace(say=print), SimpleNamespace(texts=parts)

    def report_task(name: str) -> Any:
        scoring = ScoringConfig(search=TasksConfig([]), report=TasksConfig([name]))
        scorers = Scorers(Config(scoring=scoring), log, loaded, windows, None)  # type: ignore[arg-type]
        return scorers.load_tasks()[1][name]

    expected = items_of("needle_512", parts, tokenizer=tokenizer)
    assert list(report_task("needle_512").eval_docs) == expected
    with pytest.raises(InputError, match="2048 positions of the model"):
        report_task("needle_4096")
    loaded = None  # no model is loaded for other tasks
    assert len(report_task("sums").eval_docs) == 100
