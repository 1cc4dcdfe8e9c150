"""Passages, parts that never meet, windows of equal length."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvsharer_exp.data import wikipedia as wikipedia_dump
from kvsharer_exp.data.load import load_passages
from kvsharer_exp.data.passages import PARTS, Passage, TextParts
from kvsharer_exp.data.split import check_disjoint, split_texts
from kvsharer_exp.data.wikipedia import wikipedia_paragraphs
from kvsharer_exp.data.windows import RememberingTokenizer, token_windows
from kvsharer_exp.values.errors import InputError


class WordTokenizer:
    """One id a word, the same in every process; BOS is 0."""

    bos_token_id: int | None = 0

    def __call__(self, strings: list[str], **options: bool) -> dict[str, list[list[int]]]:
        assert options["add_special_tokens"] is False
        return {
            "input_ids": [
                [int.from_bytes(word.encode()) % 10_007 + 1 for word in re.findall(r"\S+", string)]
                for string in strings
            ]
        }


def words(prefix: str, count: int) -> str:
    return " ".join(f"{prefix}{number}" for number in range(count))


@pytest.fixture(scope="module")
def wikipedia() -> tuple[Passage, ...]:
    return load_passages("wikipedia")


@pytest.fixture(scope="module")
def parts() -> TextParts:
    return split_texts()


def test_the_dump_gives_about_ninety_articles_of_prose(wikipedia: tuple[Passage, ...]) -> None:
    titles = {passage.document for passage in wikipedia}
    assert 85 <= len(titles) <= 105
    assert {"Anarchism", "Aristotle"} <= titles
    assert 2e6 < sum(len(passage.text) for passage in wikipedia) < 3e6
    for passage in wikipedia:
        assert not re.search(r"\{\{|\}\}|\[\[|\]\]|<ref|\||^[*#=]", passage.text), passage
        assert not re.search(r"(?i)^(thumb|file:|image:|category:)", passage.text), passage


def test_the_parsed_dump_is_kept_and_read_back(
    wikipedia: tuple[Passage, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump = wikipedia_dump.fetch("wikipedia")
    monkeypatch.setattr(wikipedia_dump, "fetch", lambda name: dump)
    monkeypatch.setattr(wikipedia_dump, "cache_dir", lambda: tmp_path / "new")
    assert load_passages("wikipedia") == wikipedia
    (cached,) = (tmp_path / "new").iterdir()
    assert f"-v{wikipedia_dump.WIKIPEDIA_PARSER_VERSION}." in cached.name
    cached.write_text(json.dumps({"document": "A", "text": "kept"}))
    assert load_passages("wikipedia") == (Passage("kept", "A"),)


def test_markup_goes_and_prose_stays() -> None:
    prose = "The '''quick''' [[fox|brown fox]] ran {{convert|5|km|mi}} north. " * 8
    markup = "\n".join(
        [
            "{{Infobox|name={{nested|x}}}}",
            "[[File:A.jpg|thumb|a [[linked]] caption " + "c" * 250 + "]]",
            prose + '<ref name="a">cited</ref><ref name="b" />',
            "{| class=x\n| " + "cell " * 80 + "\n|}",
            "* " + "list item " * 40,
            "With <math>x^2</math> inside. " * 20,
            "== References ==",
        ]
    )
    (paragraph,) = wikipedia_paragraphs(markup)
    assert paragraph.startswith("The quick brown fox ran 5 km north. The quick")
    assert "cited" not in paragraph


def test_news_is_one_text_a_line() -> None:
    news = load_passages("news")
    assert len(news) == len({passage.document for passage in news}) == 300


def test_parts_share_no_document_and_no_sentence(parts: TextParts) -> None:
    passages = {part: getattr(parts, part) for part in PARTS}
    total = sum(map(len, passages.values()))
    for part, share in zip(PARTS, (0.3, 0.3, 0.4), strict=True):
        assert abs(len(passages[part]) / total - share) < 0.05
    for key in (
        lambda passage: {passage.document},
        lambda passage: {s for s in re.split(r"(?<=[.!?])\s+", passage.text) if len(s) >= 40},
    ):
        seen = [set().union(*map(key, passages[part])) for part in PARTS]
        assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    assert check_disjoint(parts) == parts
    assert len(set(parts.fingerprints.values())) == 3
    assert all(re.fullmatch("[0-9a-f]{12}", value) for value in parts.fingerprints.values())


def test_the_report_part_does_not_depend_on_the_calibration_text(parts: TextParts) -> None:
    other = split_texts("news", "wikipedia")
    assert len(other.calibration) == 300
    assert other.report == parts.report
    assert set(parts.search) < set(other.search)


def test_the_split_is_the_same_in_every_process(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(words(f"line{n}", 12) for n in range(40)))
    code = (
        "from kvsharer_exp.data.split import split_texts;"
        f"print(split_texts({str(path)!r}, {str(path)!r}).fingerprints)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    output = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert output.strip() == str(split_texts(str(path), str(path)).fingerprints)


def test_files_by_line(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("\ufefffirst  one\n\n  second\u2028still second\n", encoding="utf-8")
    assert load_passages(str(text)) == (
        Passage("first one", "a.txt:1"),
        Passage("second still second", "a.txt:3"),
    )
    rows = tmp_path / "b.jsonl"
    rows.write_text('{"text": "first\\nline", "more": 1}\n\n{"text": "second"}')
    assert load_passages(str(rows)) == (
        Passage("first line", "b.jsonl:1"),
        Passage("second", "b.jsonl:3"),
    )


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.txt", None, "cannot be read"),
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b"\n \n", "is empty"),
        ("latin.txt", "café".encode("latin-1"), "not UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("key.jsonl", b'{"text": "a"}\n\n{"txt": "b"}\n', 'line 3 has no "text"'),
        ("list.jsonl", b"[1]\n", 'line 1 has no "text"'),
        ("number.jsonl", b'{"text": 3}\n', 'line 1 has no "text"'),
        ("empty.jsonl", b"", "is empty"),
        ("table.csv", b"text\na\n", "is unknown"),
        ("a" * 150 + ".txt", None, "cannot be read"),
    ],
)
def test_bad_files_are_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes | None, says: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=says) as error:
        load_passages(str(path))
    assert len(str(error.value)) <= 200
    assert "\n" not in str(error.value)


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        load_passages(str(tmp_path / "folder.txt"))


@pytest.mark.parametrize("source", ["hub:nobody/nothing", "hub:nobody/nothing/config:test[:1%]"])
def test_an_unreachable_hub_is_told_in_one_line(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="cannot be fetched") as error:
        load_passages(source)
    assert len(str(error.value)) <= 200
    assert "\n" not in str(error.value)


def test_an_empty_part_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "two.txt"
    path.write_text("one line\nanother line\n")
    with pytest.raises(InputError, match="search part"):
        split_texts(str(path), str(path))


def test_calibration_text_that_repeats_heldout_text_is_refused(
    parts: TextParts, tmp_path: Path
) -> None:
    sentence = next(
        sentence
        for passage in parts.report
        for sentence in passage.text.split(". ")
        if len(sentence) > 80
    )
    path = tmp_path / "mine.txt"
    path.write_text(f"{words('own', 30)}\nMy own words.   {sentence.upper()}. And more.\n")
    with pytest.raises(InputError, match="calibration text repeats report text") as error:
        split_texts(str(path))
    assert sentence[:20].casefold() in str(error.value)
    assert len(str(error.value)) <= 200


def test_a_copy_of_the_heldout_file_is_no_other_text(tmp_path: Path) -> None:
    lines = "\n".join(words(f"line{n}word", 12) for n in range(30))
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text(lines)
    with pytest.raises(InputError, match="repeats"):
        split_texts(str(tmp_path / "one.txt"), str(tmp_path / "two.txt"))


def test_a_repeated_passage_stays_in_the_earlier_part(caplog: pytest.LogCaptureFixture) -> None:
    first, second = (Passage(words(name, 10) + ".", name) for name in ("aaaa", "bbbb"))
    again = Passage("New words. " + first.text.upper(), "cccc")
    parts = TextParts((first,), (second,), (again,), dict.fromkeys(PARTS, "same"))
    with caplog.at_level("INFO"):
        assert check_disjoint(parts).report == ()
    assert "report part: 1 passages repeat" in caplog.text


def test_windows_have_equal_length_and_do_not_overlap() -> None:
    passages = [Passage(words(f"p{n}w", 10 + n), f"doc{n // 4}") for n in range(20)]
    windows = token_windows(passages, WordTokenizer(), num_windows=20, window_tokens=8, seed=3)
    assert windows.shape == (20, 8)
    assert windows.dtype == torch.long
    starts = {int(WordTokenizer()([p.text], add_special_tokens=False)["input_ids"][0][0])
              for p in passages}  # fmt: skip
    assert set(windows[:, 0].tolist()) == starts  # every passage once before any twice
    more = token_windows(passages, WordTokenizer(), num_windows=30, window_tokens=8, seed=3)
    assert torch.equal(more[:20], windows)
    assert len({tuple(row) for row in more.tolist()}) == 30


def test_at_most_so_many_windows_are_had_where_the_text_is_short() -> None:
    passages = [Passage(words(f"p{n}w", 20), f"doc{n}") for n in range(5)]
    asked = {"tokenizer": WordTokenizer(), "seed": 0, "at_most": True}
    all_of_it = token_windows(passages, num_windows=99, window_tokens=8, **asked)
    assert all_of_it.shape == (10, 8)
    some = token_windows(passages, num_windows=4, window_tokens=8, **asked)
    assert torch.equal(all_of_it[:4], some)
    assert token_windows(passages, num_windows=4, window_tokens=50, **asked).shape == (0, 50)


def test_a_tokenizer_that_remembers_reads_each_text_once_and_gives_the_same_windows() -> None:
    read: list[str] = []

    class Counting(WordTokenizer):
        def __call__(self, texts, **options):
            read.extend(texts)
            return super().__call__(texts, **options)

    passages = [Passage(words(f"p{n}w", 3 + n), f"doc{n // 4}") for n in range(20)]
    remembering = RememberingTokenizer(Counting())
    for tokens in (6, 8, 6, 12):
        asked = {"num_windows": 5, "window_tokens": tokens, "seed": 0}
        expected = token_windows(passages, WordTokenizer(), **asked)
        assert torch.equal(token_windows(passages, remembering, **asked), expected)
    assert len(read) == len(set(read)) >= 20


def test_windows_repeat_and_change_with_the_seed() -> None:
    passages = [Passage(words(f"p{n}w", 20), f"doc{n}") for n in range(20)]
    first, same, other = (
        token_windows(passages, WordTokenizer(), num_windows=10, window_tokens=8, seed=seed)
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_short_paragraphs_are_joined_within_a_document_only() -> None:
    passages = [Passage(words(f"a{n}w", 5), "a") for n in range(5)] + [Passage("lone b", "b")]
    windows = token_windows(passages, WordTokenizer(), num_windows=2, window_tokens=12, seed=0)
    ids = WordTokenizer()([" ".join(p.text for p in passages)], add_special_tokens=False)
    assert windows.flatten().tolist() == ids["input_ids"][0][:24]


def test_bos_is_the_first_token_of_a_window() -> None:
    passages = [Passage(words("w", 10), "a")]
    windows = token_windows(
        passages, WordTokenizer(), num_windows=2, window_tokens=6, seed=0, add_bos=True
    )
    assert windows[:, 0].tolist() == [0, 0]
    tokenizer = WordTokenizer()
    tokenizer.bos_token_id = None
    with pytest.raises(InputError, match="no BOS token"):
        token_windows(passages, tokenizer, num_windows=1, window_tokens=6, seed=0, add_bos=True)


@pytest.mark.parametrize(
    ("num_windows", "window_tokens", "says"),
    [
        (0, 8, "at least 1 window"),
        (1, 1, "at least 2 tokens"),
        (6, 8, "gives 5 windows of 8 tokens, 6 are asked"),
        (1, 50, "gives 0 windows of 50 tokens"),
    ],
)
def test_windows_that_cannot_be_had(num_windows: int, window_tokens: int, says: str) -> None:
    passages = [Passage(words("w", 40), "a"), Passage("short", "b")]
    with pytest.raises(InputError, match=says):
        token_windows(
            passages,
            WordTokenizer(),
            num_windows=num_windows,
            window_tokens=window_tokens,
            seed=0,
        )
