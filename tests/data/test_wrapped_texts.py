"""A text whose lines were wrapped, told from one with a passage a line (public fault 17)."""

import json
import logging
import random
import textwrap
from pathlib import Path

import pytest

from kvsharer_exp.cli.main import main
from kvsharer_exp.data.load import load_passages
from kvsharer_exp.data.paragraphs import blocks, documents, wrapped_width
from kvsharer_exp.data.passages import fingerprint
from kvsharer_exp.data.split import split_texts
from kvsharer_exp.data.windows import token_windows
from tests.data.test_texts import WordTokenizer

WORDS = (
    "the quick brown fox jumps over a lazy dog while many small birds sing in tall trees".split()
)


def sentence(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(count)).capitalize() + "."


def passages(seed: int, most: int = 6, count: int = 40) -> list[str]:
    """Passages of 1 to ``most`` sentences."""
    rng = random.Random(seed)
    return [
        " ".join(sentence(rng, rng.randrange(4, 15)) for _ in range(rng.randrange(1, most + 1)))
        for _ in range(count)
    ]


def grouped(lines: list[str]) -> str:
    """A blank line after every eight lines."""
    return "\n\n".join("\n".join(lines[i : i + 8]) for i in range(0, len(lines), 8))


LINES = passages(0)
ONE_A_LINE = {
    "lines": "\n".join(LINES),
    "crlf": "\ufeff" + "\r\n".join(LINES),
    "groups": grouped(LINES),
    "spaced": "\n\n".join(LINES),
    "equal": grouped([" ".join(f"line{n:02}w{k:02}" for k in range(8)) for n in range(40)]),
    "titles": grouped([" ".join(line.split()[:9]) for line in LINES]),
    "sentences": grouped([sentence(random.Random(n), 12) for n in range(40)]),
    "separators": "\n".join(line.replace(" the ", "\u2028the\x0c", 1) for line in LINES),
}
# What the reader that knew no wrapped text made of the same files.
FINGERPRINTS = {
    "lines": "3b4ff3c1e8fa",
    "crlf": "8534751abb4f",
    "groups": "907a47bb6293",
    "spaced": "ef9962f10059",
    "equal": "4e831aff5b8e",
    "titles": "6406973637b6",
    "sentences": "10bcf653500a",
    "separators": "9dfdf2baa18a",
}


@pytest.mark.parametrize("name", ONE_A_LINE)
def test_one_passage_a_line_stays_so(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / f"{name}.txt"
    path.write_bytes(ONE_A_LINE[name].encode())
    with caplog.at_level(logging.INFO, "kvsharer_exp.data.load"):
        found = load_passages(str(path))
    assert len(found) == 40
    assert fingerprint(found) == FINGERPRINTS[name]
    assert f"{name}.txt: read as one passage a line, 40 passages" in caplog.text


def test_the_built_in_news_stays_as_it_was() -> None:
    assert fingerprint(load_passages("news")) == "3d07c89f558f"


@pytest.mark.parametrize("width", [60, 70, 80, 100])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_paragraphs_are_joined(
    width: int, end: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "book.txt"
    wrapped = [textwrap.fill(passage, width).replace("\n", end) for passage in LINES]
    path.write_bytes((end * 2).join(["A TITLE", *wrapped]).encode())
    with caplog.at_level(logging.INFO, "kvsharer_exp.data.load"):
        found = load_passages(str(path))
    assert [passage.text for passage in found] == ["A TITLE", *LINES]
    assert f"lines are wrapped at {width} characters, read as 41 paragraphs in" in caplog.text


def test_lines_that_were_wrapped_by_hand_count_too() -> None:
    rng = random.Random(1)
    ragged = []
    for passage in passages(1, most=9):
        lines = [""]
        for word in passage.split():
            room = 72 - rng.choice((0, 0, 0, 2, 4, 6))
            if len(lines[-1]) + 1 + len(word) > room:
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
        ragged.append("\n".join(lines))
    assert 66 <= wrapped_width(blocks("\n\n".join(ragged))) <= 72


def test_wrapped_text_without_blank_lines_is_left_alone() -> None:
    assert wrapped_width(blocks(textwrap.fill(" ".join(LINES), 70))) == 0


def test_documents_are_of_a_size_and_none_is_torn(tmp_path: Path) -> None:
    long, short = (
        blocks("\n\n".join(textwrap.fill(p, 70) for p in passages(2, count=count)))
        for count in (2000, 40)
    )
    sizes = [sum(len(line) for block in group for _, line in block) for group in documents(long)]
    assert all(8000 <= size < 8600 for size in sizes[:-1])
    assert 12 <= len(documents(short)) <= 20
    for text in (long, short):
        assert [block for group in documents(text) for block in group] == text
        assert all(documents(text))


def test_windows_reach_over_short_paragraphs(tmp_path: Path) -> None:
    """Within a document, so that most of the words are in some window."""
    path = tmp_path / "book.txt"
    text = passages(3, count=120)
    path.write_text("\n\n".join(textwrap.fill(passage, 70) for passage in text))
    parts = split_texts(str(path), str(path))
    every = [*parts.calibration, *parts.search, *parts.report]
    assert sorted(passage.text for passage in every) == sorted(text)
    size = {"num_windows": 9**9, "window_tokens": 64, "at_most": True}
    windows = token_windows(every, WordTokenizer(), seed=0, **size)
    assert len(windows) * 64 > 0.6 * sum(len(passage.split()) for passage in text)


def test_a_book_calibrates_and_the_reader_says_how_it_read(
    tmp_path: Path, monkeypatch, store, capsys
) -> None:
    """Through the command line, where it gave 0 windows."""
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("\n\n".join(textwrap.fill(p, 70) for p in passages(4, count=200)))
    words = ["calibrate", "model=tiny", "calibration.path=book.txt", "heldout.path=book.txt"]
    assert main([*words, *store, "hydra.run.dir=run"]) == 0
    assert json.loads(Path("run/result.json").read_text())["command"] == "calibrate"
    said = capsys.readouterr().out
    assert "book.txt: lines are wrapped at 70 characters, read as 200 paragraphs" in said
    assert main([*words, *store, "hydra.run.dir=again", "--quiet"]) == 0
    assert "wrapped" not in capsys.readouterr().out
