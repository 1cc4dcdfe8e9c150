"""Every file of the user's that this project reads is read as text editors do (public fault 15)."""

import codecs
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvsharer_exp.cli.commands.generate import read_prompts
from kvsharer_exp.cli.config.commands import GenerateConfig
from kvsharer_exp.cli.main import main
from kvsharer_exp.data.load import load_passages
from kvsharer_exp.data.passages import PARTS, Passage, TextParts
from kvsharer_exp.data.tasks import load_tasks
from kvsharer_exp.search.seeds import SeedFile
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.sharing_map import SharingMap
from kvsharer_exp.values.text_files import read_text
from tests.cli.commands.test_commands import QUICK

NO_TEXT = TextParts((), (), (), dict.fromkeys(PARTS, "none"))
# As editors write a text: the same text comes back from each.
WRITTEN: dict[str, Callable[[str], bytes]] = {
    "plain": str.encode,
    "mark": lambda text: codecs.BOM_UTF8 + text.encode(),
    "wide": lambda text: codecs.BOM_UTF16_LE + text.encode("utf-16-le"),
    "wide, big end first": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    "CR LF": lambda text: text.replace("\n", "\r\n").encode(),
    "CR": lambda text: text.replace("\n", "\r").encode(),
}


@pytest.fixture(params=WRITTEN)
def write(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str, str], Path]:
    def call(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_bytes(WRITTEN[request.param](text))
        return path

    return call


def test_the_text_is_the_same_however_it_was_written(write) -> None:
    text = "first é 你好\nsecond\u2028still second\x0c\x85\n\nlast"
    assert read_text(write("a.txt", text)) == text


def test_a_carriage_return_inside_a_line_is_no_end(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\rb\nc")
    assert read_text(path) == "a\rb\nc"


def test_prompts(write) -> None:
    path = write("prompts.txt", "One\n\nTwo\u2028words\x0b\x1c\n")
    assert read_prompts(GenerateConfig(file=str(path))) == ["One", "Two\u2028words\x0b\x1c"]


def test_passages(write) -> None:
    path = write("a.txt", "one passage\u2028of two lines\nanother")
    assert load_passages(str(path)) == (
        Passage("one passage of two lines", "a.txt:1"),
        Passage("another", "a.txt:2"),
    )
    rows = write("a.jsonl", '{"text": "one\u2028passage"}\n{"text": "half \\ud83d\\ude00 whole"}')
    assert [passage.text for passage in load_passages(str(rows))] == [
        "one passage",
        "half \U0001f600 whole",
    ]


def test_maps_and_seeds(write) -> None:
    sharing_map = SharingMap((0, 0, 2))
    assert SharingMap.parse(write("map.json", '{"kv_source_layers":\n[0, 0, 2]}')) == sharing_map
    assert SeedFile.read(write("seeds.json", "[[0, 0, 2],\n[0, 1, 1]]")).maps[0] == sharing_map


TASK = """
task: my_task
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {path}}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: choices
doc_to_target: gold
"""


def task(tmp_path: Path, content: bytes) -> dict[str, Any]:
    (tmp_path / "data.jsonl").write_bytes(content)
    (tmp_path / "my_task.yaml").write_text(TASK.format(path=tmp_path / "data.jsonl"))
    return load_tasks([str(tmp_path / "my_task.yaml")], NO_TEXT)


def test_the_data_of_a_task(tmp_path: Path) -> None:
    rows = [{"query": query, "choices": ["a", "b"], "gold": 0} for query in ("x", "y\u2028z")]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (loaded,) = task(tmp_path, codecs.BOM_UTF8 + text.encode()).values()
    assert [item["query"] for item in loaded.eval_docs] == ["x", "y\u2028z"]


GOOD = b'{"query": "x", "choices": ["a", "b"], "gold": 0, "text": "t"}\n'
BROKEN = {
    "line 3 is not JSON (Expecting value)": b'{"text": , "query": 0}',
    "line 3 has half a character (\\ud83d)": b'{"text": "\\ud83d", "query": "\\ud83d"}',
    "line 3 is not UTF-8": b'{"text": "\xff", "query": "\xff"}',
}


@pytest.mark.parametrize("says", BROKEN)
def test_a_broken_line_is_named_by_its_number(says: str, tmp_path: Path, capfd) -> None:
    content = GOOD + b"\n" + BROKEN[says] + b"\n" + GOOD
    (tmp_path / "a.jsonl").write_bytes(content)
    for read in (lambda: load_passages(str(tmp_path / "a.jsonl")), lambda: task(tmp_path, content)):
        with pytest.raises(InputError) as error:
            read()
        assert says in str(error.value)
        assert len(str(error.value)) <= 200
    assert capfd.readouterr().err == ""  # one line, and nothing of a library's beside it


@pytest.mark.parametrize(
    "line", [b"[" * 100_000, b'{"text": ' + b"9" * 5000 + b"}", b'{"text": "a"', b"\x00"]
)
def test_any_broken_line_is_one_line(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + line)
    with pytest.raises(InputError, match="line 2 ") as error:
        load_passages(str(path))
    assert len(str(error.value)) <= 200
    path.with_suffix(".json").write_bytes(line)
    with pytest.raises(InputError, match=r"is not JSON|holds no maps"):
        SeedFile.read(path.with_suffix(".json"))


@pytest.mark.parametrize(
    "read",
    [
        lambda path: load_passages(str(path.with_suffix(".txt"))),
        lambda path: read_prompts(GenerateConfig(file=str(path))),
        lambda path: SharingMap.parse(path),
        SeedFile.read,
    ],
)
def test_what_is_no_text_is_refused_with_its_line(read: Callable[[Path], Any], tmp_path) -> None:
    for suffix in (".json", ".txt"):
        (tmp_path / f"a{suffix}").write_bytes(b"one\ntw\xe9\n")
    with pytest.raises(InputError, match="line 2 is not UTF-8"):
        read(tmp_path / "a.json")


def test_a_map_of_several_lines_names_the_broken_one(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"kv_source_layers":\n[0, 0,, 2]}')
    for read in (SharingMap.parse, SeedFile.read):
        with pytest.raises(InputError, match=r"is not JSON \(line 2\)"):
            read(tmp_path / "a.json")


@pytest.mark.slow
def test_a_result_that_an_editor_saved_with_a_mark(tmp_path: Path, monkeypatch, store) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["search", *QUICK, *store, "hydra.run.dir=first"]) == 0
    result = Path("first/result.json")
    result.write_bytes(codecs.BOM_UTF8 + result.read_bytes())
    assert main(["report", "run=first", *store, "hydra.run.dir=second"]) == 0


def test_task_data_below_the_home_folder(tmp_path: Path, monkeypatch) -> None:
    """Public fault 12: the variable that names the folder takes ``~`` as the keys do."""
    row = {"sentence1": "他在睡觉。", "sentence2": "他醒着。", "label": 2}
    (tmp_path / "cmnli.jsonl").write_text(json.dumps(row))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KVSHARER_TASK_DATA", "~")
    (loaded,) = load_tasks(["cmnli"], NO_TEXT).values()
    assert len(loaded.eval_docs) == 1
