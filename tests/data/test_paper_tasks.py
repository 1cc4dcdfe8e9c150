"""The paper's benchmarks that lm-eval lacks, each on invented records of the real schema.

The model is a real llama whose next byte depends on the last byte alone, by a table given here:
scores can be worked out by hand.
"""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lm_eval.tasks import TaskManager
from transformers import LlamaConfig, LlamaForCausalLM

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.config.scoring import ScoringConfig, TasksConfig
from kvsharer_exp.data.paper_tasks import items
from kvsharer_exp.data.paper_tasks.items import XSUM_ITEMS, xsum_first, xsum_rouge
from kvsharer_exp.data.passages import PARTS, TextParts
from kvsharer_exp.data.tasks import PAPER_TASKS, load_tasks, members
from kvsharer_exp.measure.scoring import TaskScorer
from kvsharer_exp.model.folders import data_dir
from kvsharer_exp.model.load import load_model
from kvsharer_exp.model.spec import ModelSpec
from kvsharer_exp.values.errors import InputError

NO_TEXT = TextParts((), (), (), dict.fromkeys(PARTS, "none"))
RECORDS: dict[str, list[dict[str, Any]]] = {
    "c3": [
        {
            "id": 0,
            "context": ["女：你每天几点起床？", "男：六点。"],
            "question": "男的几点起床？",
            "choice": ["早上五点", "六点", "7:00:00"],
            "answer": "六点",
        },
        {
            "id": 0,
            "context": ["女：你每天几点起床？", "男：六点。"],
            "question": "他们在说什么？",
            "choice": ["天气", "起床的时间"],
            "answer": "起床的时间",
        },
    ],
    "cmnli": [
        {"sentence1": "他在睡觉。", "sentence2": "他醒着。", "label": 2, "idx": 0},
        {"sentence1": "他在睡觉。", "sentence2": "他没有醒。", "label": 1, "idx": 1},
        {"sentence1": "他在睡觉。", "sentence2": "他很高。", "label": 0, "idx": 2},
    ],
    "race_middle": [
        {
            "example_id": "middle1.txt",
            "article": "Tom has a red kite.",
            "answer": "B",
            "question": "What colour is the kite?",
            "options": ["Blue.", "Red.", "Green.", "White."],
        },
        {
            "example_id": "middle1.txt",
            "article": "Tom has a red kite.",
            "answer": "D",
            "question": "Whose is it?  _  .",
            "options": ["Ann's", "Bob's", "Jim's", "Tom's"],
        },
    ],
    "chid": [
        {
            "idx": 0,
            "candidates": list("甲乙丙丁戊己庚辛壬癸"),
            "content": ["他#idiom000001#地走了，#idiom000002#。", "天气#idiom000003#。"],
            "answers": {"text": ["丙", "甲", "癸"], "candidate_id": [2, 0, 9]},
        }
    ],
    "xsum": [
        {"document": "It rained.\nIt blew.", "summary": "A storm hits.", "id": "1"},
        {"document": "It snowed.", "summary": "Snow falls.", "id": "2"},
    ],
}


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a local copy of each task's data."""
    folder = tmp_path / "data"
    folder.mkdir()
    for task, records in RECORDS.items():
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        (folder / f"{task}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setenv("KVSHARER_TASK_DATA", str(folder))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_model("tiny")[1]


def rigged(tokenizer: Any, likely: str = "", follows: Mapping[str, str] = {}) -> LlamaForCausalLM:
    """Bytes of ``likely`` are e times as likely as others; ``follows``: byte → what follows it."""
    size = len(tokenizer)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=264,  # a direction for every byte
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    logits = torch.zeros(size, size)  # (last, next)
    if likely:
        logits[:, tokenizer(likely)["input_ids"]] = 1
    for last, then in follows.items():
        logits[tokenizer(last)["input_ids"][-1], tokenizer(then)["input_ids"]] = 50
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    layer = model.model.layers[0]
    layer.self_attn.o_proj.weight.zero_()
    layer.mlp.down_proj.weight.zero_()
    model.model.embed_tokens.weight.copy_(torch.eye(size, 264))
    model.lm_head.weight.copy_(torch.eye(264, size).matmul(logits).T / math.sqrt(264))  # after norm
    return model


def score(task: str, model: Any, tokenizer: Any) -> tuple[dict[str, float], list[Any]]:
    """Scores by metric, and what was asked of the model."""
    tasks = load_tasks([task], NO_TEXT)
    scores = TaskScorer(model, tokenizer, tasks, add_bos_token=False).score()
    prefix = f"lm_eval/{task}/"
    assert all(name.startswith(prefix) for name in scores)
    requests = [instance.args for instance in tasks[task].instances]
    return {name.removeprefix(prefix): value for name, value in scores.items()}, requests


def test_every_task_file_is_tested_here() -> None:
    assert set(PAPER_TASKS) == set(RECORDS)


def test_c3(local: Path, tokenizer: Any) -> None:
    scores, requests = score("c3", rigged(tokenizer), tokenizer)
    dialogue = "文章：女：你每天几点起床？\n男：六点。\n问题："
    assert requests == [
        *((f"{dialogue}男的几点起床？\n答案：", c) for c in ("早上五点", "六点", "7:00:00")),
        *((f"{dialogue}他们在说什么？\n答案：", c) for c in ("天气", "起床的时间")),
    ]
    # All bytes are equally likely: acc takes the fewest bytes (六点 of 12, 6, 7; then 天气),
    # acc_norm the fewest a character (7:00:00; of 3 and 3 the first): the answer neither time.
    assert scores == {"acc": 0.5, "acc_norm": 0}


def test_cmnli(local: Path, tokenizer: Any) -> None:
    scores, requests = score("cmnli", rigged(tokenizer, likely="矛盾"), tokenizer)
    prompt = "语句一：“他在睡觉。”\n语句二：“他醒着。”\n问题：这两句话是什么关系？\n答案："
    assert requests[:3] == [(prompt, "无关"), (prompt, "蕴含"), (prompt, "矛盾")]
    assert scores == {"acc": pytest.approx(1 / 3)}
    for likely, label in (("无关", 0), ("蕴含", 1), ("矛盾", 2)):
        tasks = load_tasks(["cmnli"], NO_TEXT)
        scorer = TaskScorer(rigged(tokenizer, likely=likely), tokenizer, tasks)
        scorer.score()
        expected = [float(record["label"] == label) for record in RECORDS["cmnli"]]
        assert scorer.samples["cmnli"] == expected


def test_race_middle(local: Path, tokenizer: Any) -> None:
    scores, requests = score("race_middle", rigged(tokenizer, likely="B"), tokenizer)
    prompt = (
        "Read the article and answer the question with A, B, C or D.\n\n"
        "Article: Tom has a red kite.\n\nQuestion: What colour is the kite?\n"
        "A. Blue.\nB. Red.\nC. Green.\nD. White.\nAnswer:"
    )
    assert requests[:4] == [(prompt, f" {letter}") for letter in "ABCD"]
    assert scores == {"acc": 0.5}


def test_chid_asks_for_each_blank(local: Path, tokenizer: Any) -> None:
    model = rigged(tokenizer, follows={"：": "\n", "\n": "C", "C": "."})
    scores, requests = score("chid", model, tokenizer)
    choices = "".join(
        f"{a}. {b}\n" for a, b in zip("ABCDEFGHIJ", "甲乙丙丁戊己庚辛壬癸", strict=True)
    )
    ask = f"\n请选出最适合填入“______”处的成语。\n{choices}请只回答一个字母。\n答案："
    assert [prompt for prompt, _ in requests] == [
        f"他______地走了，……。{ask}",
        f"他……地走了，______。{ask}",
        f"天气______。{ask}",
    ]
    # "\nC…" every time; the answers are C, A and J.
    assert scores == {"exact_match.letter": pytest.approx(1 / 3)}


def test_xsum(local: Path, tokenizer: Any) -> None:
    model = rigged(tokenizer, follows={":": " ", " ": "a", "a": " "})
    scores, requests = score("xsum", model, tokenizer)
    assert requests[0][0] == (
        "Document: It rained.\nIt blew.\n\nSummarize the document in one sentence.\nSummary:"
    )
    # 64 bytes of " a a a …": 32 words, one of them among the 3 of "A storm hits".
    precision, recall = 1 / 32, 1 / 3
    f1 = 2 * precision * recall / (precision + recall)
    assert scores == {"rouge1": pytest.approx(f1 / 2), "rouge2": 0, "rougeL": pytest.approx(f1 / 2)}


def test_rouge_reads_the_first_line_only() -> None:
    document = {"summary": "The old bridge is closed."}
    for answer in (" The old bridge reopened\nis closed", "\nthe OLD bridge reopened!"):
        scores = xsum_rouge(document, [answer])
        # 3 of 4 words against 3 of 5; 2 of 3 pairs against 2 of 4.
        assert scores["rouge1"] == pytest.approx(2 * 3 / (4 + 5))
        assert scores["rouge2"] == pytest.approx(2 * 2 / (3 + 4))
        assert scores["rougeL"] == scores["rouge1"]
    assert set(xsum_rouge(document, ["\n"]).values()) == {0}


def test_xsum_takes_the_first_thousand() -> None:
    from datasets import Dataset

    many = Dataset.from_dict({"id": list(range(XSUM_ITEMS + 5))})
    assert xsum_first(many)["id"] == list(range(XSUM_ITEMS))
    assert len(xsum_first(many.select([0, 1]))) == 2


@pytest.mark.parametrize(
    ("task", "change", "says"),
    [
        ("c3", {"answer": "九点"}, "ValueError"),
        ("cmnli", {"label": "neutral"}, "neutral"),
        ("cmnli", {"label": -1}, "-1"),  # a test split
        ("race_middle", {"answer": "E"}, "ValueError"),
        ("chid", {"answers": {"text": [], "candidate_id": []}}, "ValueError"),
    ],
)
def test_a_file_of_another_form_is_refused_by_name(
    local: Path, task: str, change: dict[str, Any], says: str
) -> None:
    (local / f"{task}.jsonl").write_text(json.dumps(RECORDS[task][0] | change) + "\n")
    with pytest.raises(InputError, match=f"task {task} cannot be loaded") as error:
        load_tasks([task], NO_TEXT)
    assert says in str(error.value)
    assert len(str(error.value)) <= 190


def offline(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)


@pytest.mark.parametrize("task", PAPER_TASKS)
def test_without_a_local_copy_the_hub_is_asked(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline(monkeypatch, tmp_path)
    monkeypatch.setenv("KVSHARER_TASK_DATA", str(tmp_path))  # a folder without files
    where = {"race_middle": "ehovy/race", "xsum": "EdinburghNLP/xsum"}.get(task, "clue/clue")
    with pytest.raises(InputError, match=f"task {task} .*'{where}'.*KVSHARER_TASK_DATA"):
        load_tasks([task], NO_TEXT)


@pytest.mark.slow
def test_the_papers_benchmarks_are_all_named_when_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline(monkeypatch, tmp_path)
    monkeypatch.delenv("KVSHARER_TASK_DATA", raising=False)
    content = yaml.safe_load((data_dir("conf") / "scoring" / "paper.yaml").read_text())
    names = content["report"]["tasks"]
    assert len(set(names)) == 13
    with pytest.raises(InputError, match=", ".join(names)):  # reads lm-eval's index, once
        load_tasks(names, NO_TEXT)
    start = time.perf_counter()
    with pytest.raises(InputError) as error:
        load_tasks(names, NO_TEXT)
    assert time.perf_counter() - start < 5
    assert len(str(error.value)) <= 190


GROUP = """
group: both
task: [one, two]
aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]
"""


@pytest.fixture
def group(local: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a group ``both``, of two questions and of one; ``mmlu`` is one of 57 tasks."""
    folder = local.parent / "tasks"
    folder.mkdir()
    for name, lines in (("one", slice(None)), ("two", slice(1))):
        data = folder / f"{name}.jsonl"
        data.write_text("\n".join(map(json.dumps, RECORDS["race_middle"][lines])))
        content = {
            "task": name,
            "include": str(Path(items.__file__).with_name("race_middle.yaml")),
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"test": str(data)}},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    (folder / "both.yaml").write_text(GROUP)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    monkeypatch.setattr("kvsharer_exp.data.tasks._manager", lambda tokenizer: manager)
    return folder


def test_a_group_has_one_score_over_all_its_items(group: Path, tokenizer: Any) -> None:
    tasks = load_tasks(["both"], NO_TEXT)
    assert list(tasks) == ["both"]
    assert list(members(tasks)) == ["one", "two"]
    scorer = TaskScorer(rigged(tokenizer, likely="B"), tokenizer, tasks)
    assert scorer.score() == {"lm_eval/both/acc": pytest.approx(2 / 3)}  # of B, D and B
    assert scorer.samples == {"both": [1, 0, 1]}
    assert set(scorer.stderr()) == {"lm_eval/both/acc"}


def test_a_command_takes_groups_and_files_and_knows_their_members(group: Path) -> None:
    from kvsharer_exp.cli.session.scorers import Scorers

    def tasks_of(search: str, report: str, allowed: str = "none") -> Any:
        scoring = ScoringConfig(
            search=TasksConfig([search]), report=TasksConfig([report]), allow_overlap=[allowed]
        )
        log, windows = SimpleNamespace(say=print), SimpleNamespace(texts=NO_TEXT)
        loaded = SimpleNamespace(spec=ModelSpec("tiny", "random:tiny"))
        scorers = Scorers(Config(scoring=scoring), log, loaded, windows, None)  # type: ignore[arg-type]
        return tuple(list(side) for side in scorers.load_tasks())

    member = str(group / "one.yaml")
    assert tasks_of("cmnli", "both") == (["cmnli"], ["both"])
    with pytest.raises(InputError, match="one is both searched on and reported"):
        tasks_of(member, "both")
    assert tasks_of(member, "both", allowed="one") == (["one"], ["both"])
