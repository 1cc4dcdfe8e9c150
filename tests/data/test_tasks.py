"""Tasks made from held-out text, and the door to lm-eval's own."""

import re
import time
from collections import Counter
from pathlib import Path

import pytest

from kvsharer_exp.data.local_tasks import LOCAL_TASKS, items_of, local_task
from kvsharer_exp.data.passages import PARTS, Passage, TextParts
from kvsharer_exp.data.split import split_texts
from kvsharer_exp.data.task_errors import not_loaded
from kvsharer_exp.data.tasks import (
    check_no_generation,
    check_no_overlap,
    items_digest,
    load_tasks,
    without_generation,
)
from kvsharer_exp.data.wiki_tasks import NUM_CHOICES, WIKI_TASKS
from kvsharer_exp.model.load import load_model, tokenizer_source
from kvsharer_exp.model.spec import ModelSpec
from kvsharer_exp.values.errors import InputError
from tests.refusals import WAY_OUT


@pytest.fixture(scope="module")
def parts() -> TextParts:
    return split_texts()


def text_of(parts: TextParts, part: str) -> str:
    return "\n".join(" ".join(passage.text.split()) for passage in getattr(parts, part))


@pytest.mark.parametrize("name", LOCAL_TASKS)
def test_items_repeat(name: str, parts: TextParts) -> None:
    items = items_of(name, parts)
    assert len(items) >= 100
    assert len({str(item) for item in items}) == len(items)
    assert items == items_of(name, parts, seed=0)
    assert items != items_of(name, parts, seed=1)
    task = local_task(name)
    assert task is not None
    assert task.part == ("search" if name.endswith("_search") else "report")


@pytest.mark.parametrize("name", [name + end for name in WIKI_TASKS for end in ("", "_search")])
def test_wiki_items_come_from_their_own_part(name: str, parts: TextParts) -> None:
    items = items_of(name, parts)
    assert len(items) > 500
    own = "search" if name.endswith("_search") else "report"
    haystack = {part: text_of(parts, part) for part in PARTS}
    for item in items[:100]:
        text = item.get("context") or item["text"]
        assert [part for part in PARTS if text in haystack[part]] == [own]


def test_cloze_asks_for_a_word_it_has_seen_and_does_not_end_with(parts: TextParts) -> None:
    report = text_of(parts, "report")
    for item in items_of("wiki_cloze", parts):
        context, answer = item["context"].split(), item["answer"]
        assert 40 <= len(context) <= 60
        assert re.fullmatch(r"[A-Za-z]{4,}", answer)
        assert any(answer in word for word in context[:-3])
        assert all(answer != re.sub(r"\W", "", word) for word in context[-3:])
    item = items_of("wiki_cloze", parts)[0]
    assert f"{item['context']} {item['answer']}" in report


def test_next_has_four_choices_of_one_length_and_gold_everywhere(parts: TextParts) -> None:
    report = text_of(parts, "report")
    items = items_of("wiki_next", parts)
    for item in items:
        assert len(set(item["choices"])) == NUM_CHOICES
        assert {len(choice.split()) for choice in item["choices"]} == {8}
    for item in items[:100]:
        follows = [f"{item['context']} {choice}" in report for choice in item["choices"]]
        assert follows.index(True) == item["gold"]
        assert sum(follows) == 1
    golds = Counter(item["gold"] for item in items)
    assert all(abs(golds[gold] / len(items) - 0.25) < 0.05 for gold in range(NUM_CHOICES))


def test_next_takes_its_distractors_from_the_same_document() -> None:
    passages = tuple(
        Passage(" ".join(f"{document}{n}-{word}" for word in range(40)), document)
        for document in "ab"
        for n in range(5)
    )
    parts = TextParts((), (), passages, dict.fromkeys(PARTS, "made"))
    items = items_of("wiki_next", parts)
    assert len(items) == 10
    for item in items:
        assert {choice[0] for choice in item["choices"]} == {item["context"][0]}


def test_text_without_items_is_refused() -> None:
    lines = tuple(Passage("too short to ask about", f"a.txt:{n}") for n in range(9))
    parts = TextParts((), (), lines, dict.fromkeys(PARTS, "a.txt"))
    with pytest.raises(InputError, match="wiki_next finds no item in the report text"):
        load_tasks(["wiki_next"], parts)


def test_lm_eval_reads_the_items(parts: TextParts) -> None:
    tasks = load_tasks(LOCAL_TASKS, parts)
    assert list(tasks) == list(LOCAL_TASKS)
    for name, task in tasks.items():
        assert list(task.eval_docs) == items_of(name, parts)
    cloze, item = tasks["wiki_cloze"], items_of("wiki_cloze", parts)[0]
    assert cloze.doc_to_text(item) == item["context"]
    assert cloze.doc_to_target(item) == " " + item["answer"]  # the space is part of the answer
    assert items_digest(cloze) == items_digest(load_tasks(["wiki_cloze"], parts)["wiki_cloze"])
    assert items_digest(cloze, limit=5) != items_digest(cloze)
    assert len({items_digest(task) for task in tasks.values()}) == len(tasks)


TASK_FILE = """
task: my_task
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: gold
"""


def test_a_task_file_of_ones_own(
    parts: TextParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data.json").write_text('{"question": "Q", "choices": ["a", "b"], "gold": 1}\n')
    path = tmp_path / "my_task.yaml"
    path.write_text(TASK_FILE.replace("DATA", str(tmp_path / "data.json")))
    tasks = load_tasks([str(path)], parts)
    assert [len(task.eval_docs) for task in tasks.values()] == [1]
    assert list(tasks) == ["my_task"]


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "does not exist"), ("a: [", "cannot be loaded"), ("task: x\n", "cannot be loaded")],
)
def test_a_task_file_that_is_none(
    parts: TextParts, tmp_path: Path, content: str | None, says: str
) -> None:
    path = tmp_path / "task.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=says) as error:
        load_tasks([str(path)], parts)
    assert "\n" not in str(error.value)


MAKING = """
task: made
output_type: generate_until
custom_dataset: !function made.texts
test_split: test
doc_to_text: "{{text}}"
doc_to_target: "{{text}}"
"""
OF_A_LENGTH = """
import datasets
from lm_eval.tasks.ruler.common_utils import get_tokenizer, resolve_tokenizer_name

def texts(**given):
    tokens = get_tokenizer(resolve_tokenizer_name(given))("five").input_ids
    return {"test": datasets.Dataset.from_list([{"text": str(len(tokens))}])}
"""
WITH_A_PACKAGE = """
try:
    import package_nobody_has.part
except ImportError:
    raise ImportError("Please install the required dependencies")
"""


def task_that_makes_its_texts(folder: Path, code: str) -> str:
    (folder / "made.yaml").write_text(MAKING)
    (folder / "made.py").write_text(code)
    return str(folder / "made.yaml")


def test_a_task_that_makes_texts_of_a_length_is_given_the_models_tokenizer(
    parts: TextParts, tmp_path: Path
) -> None:
    name = task_that_makes_its_texts(tmp_path, OF_A_LENGTH)
    load_model("tiny")[1].save_pretrained(tmp_path / "model")  # a token a byte
    spec = ModelSpec("mine", str(tmp_path / "model"))
    task = load_tasks([name], parts, tokenizer_source=lambda: tokenizer_source(spec))["made"]
    assert [item["text"] for item in task.eval_docs] == ["4"]


LENGTHS = """
import datasets

def texts(tokenizer=None, **given):
    texts = [{"text": f"{tokenizer} {tokens}"} for tokens in given["max_seq_lengths"]]
    return {"test": datasets.Dataset.from_list(texts)}
"""


def test_lengths_of_the_configuration_reach_the_tasks(parts: TextParts, tmp_path: Path) -> None:
    name = task_that_makes_its_texts(tmp_path, LENGTHS)
    given = {"max_seq_lengths": [8192, 16384]}
    task = load_tasks([name], parts, tokenizer_source=lambda: "theirs", metadata=given)["made"]
    assert [item["text"] for item in task.eval_docs] == ["theirs 8192", "theirs 16384"]
    (tmp_path / "other").mkdir()
    name = task_that_makes_its_texts(tmp_path / "other", LENGTHS)
    task = load_tasks([name], parts, metadata={"max_seq_lengths": [4096]})["made"]
    assert [item["text"] for item in task.eval_docs] == ["None 4096"]


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (OF_A_LENGTH, "(AssertionError: No tokenizer or pretrained provided. …): use a model of"),
        (WITH_A_PACKAGE, "(it needs package_nobody_has): pip install package_nobody_has, or"),
    ],
)
def test_what_a_task_lacks_is_named(parts: TextParts, tmp_path: Path, code: str, says: str) -> None:
    with pytest.raises(InputError, match=re.escape(says)) as error:
        load_tasks([task_that_makes_its_texts(tmp_path, code)], parts)
    assert len(str(error.value)) <= 190
    assert WAY_OUT.search(str(error.value))


def test_however_many_tasks_fail_the_line_is_short() -> None:
    failed: dict[str, Exception] = {f"task_{'x' * 50}_{number}": OSError() for number in range(9)}
    for error in (ModuleNotFoundError(name="y" * 90), AssertionError("tokenizer " * 90)):
        message = str(not_loaded({"first": error, **failed}, "never mind"))
        assert "tasks first, task_xxx" in message
        assert len(message) <= 190


def test_an_unknown_task_is_answered_with_near_names(
    parts: TextParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm_eval.tasks.TaskManager", None)  # its index takes long to read
    with pytest.raises(InputError, match=r"'wiki_clozze' is not known: did you mean wiki_cloze"):
        load_tasks(["wiki_clozze"], parts)
    with pytest.raises(InputError, match=r"'needle_٥١٢' is not known"):
        load_tasks(["needle_٥١٢"], parts)
    with pytest.raises(InputError, match=r"did you mean .*hellaswag"):
        load_tasks(["hellaswagg"], parts)


def test_a_task_whose_data_is_out_of_reach_fails_fast(
    parts: TextParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(InputError, match="piqa"):  # reads the index, once
        load_tasks(["piqa"], parts)
    start = time.perf_counter()
    with pytest.raises(InputError, match="task piqa cannot be loaded") as error:
        load_tasks(["piqa"], parts)
    assert time.perf_counter() - start < 5
    assert "\n" not in str(error.value)


def test_what_is_searched_on_is_not_reported() -> None:
    check_no_overlap(["wiki_cloze_search", "piqa"], ["wiki_cloze", "wiki_ppl"])
    check_no_overlap(["piqa"], ["piqa"], allowed=["piqa"])
    check_no_overlap(["wiki_cloze"], ["wiki_ppl"], allowed=["wiki_cloze"])
    with pytest.raises(InputError, match="piqa is both searched on and reported"):
        check_no_overlap(["wiki_cloze_search", "piqa"], ["piqa"])
    with pytest.raises(InputError, match=r"same \(report\) text"):
        check_no_overlap(["wiki_cloze"], ["wiki_ppl"])


def test_tasks_that_generate_are_told_from_those_that_weigh(parts: TextParts) -> None:
    tasks = load_tasks(["wiki_next", "copying", "wiki_ppl", "sums"], parts)
    assert list(without_generation(tasks)) == ["wiki_next", "wiki_ppl"]
    check_no_generation(without_generation(tasks))
    with pytest.raises(InputError, match=r"task copying generates answers.*leave it out"):
        check_no_generation(tasks)
