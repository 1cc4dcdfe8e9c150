"""What README and docs show is what the program knows: every command, key, file and link."""

import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from hydra import compose, initialize_config_dir

from kvsharer_exp.cli.argv import COMMANDS, translate
from kvsharer_exp.cli.config.compose import register, to_config
from kvsharer_exp.cli.config.model import ModelConfig
from kvsharer_exp.cli.config.schema import config_keys
from kvsharer_exp.cli.main import main
from kvsharer_exp.model.folders import data_dir
from tests.cli.commands.test_commands import QUICK
from tests.tiny import ARCHITECTURES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
WALKTHROUGH = ROOT / "docs" / "walkthrough.md"
NO_CONFIG = ("completion", "--help", "--version")  # what `kvsharer` may be followed by besides
# Lines that are not ours to run: setting up a shell, installing, another project's program.
OTHERS = ("python -m venv ", "pip install ", "git clone ", "cd ", "export ", "optuna-dashboard ")


class Block(NamedTuple):
    """A fenced block: the page and line it starts at, what the fence says, its text."""

    place: str
    kind: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^( *)```(\w*)\n(.*?)^ *```$", text, flags=re.MULTILINE | re.DOTALL):
        lines = [line.removeprefix(found[1]) for line in found[3].splitlines()]
        place = f"{page.name}:{text[: found.start()].count(chr(10)) + 1}"
        yield Block(place, found[2], "\n".join(lines))


BLOCKS = [block for page in PAGES for block in blocks(page)]


# (place, line) of every line of the blocks that show commands; comments taken off.
LINES = [
    (block.place, re.sub(r"\s+#.*", "", line))
    for block in BLOCKS
    if not block.kind
    for line in block.text.splitlines()
]


def words_of(line: str) -> list[str] | None:
    """What follows ``kvsharer``; None where the line is another program's."""
    for program in ("kvsharer ", "python -m kvsharer_exp "):
        if line.startswith(program):
            return shlex.split(line.removeprefix(program))
    return None


def composed(words: list[str]) -> Any:
    """The checked config of a command line; of several values under ``-m`` the first."""
    arguments = translate(words)
    overrides = [word for word in arguments if not word.startswith("-") and word != "job"]
    if "-m" in arguments:
        overrides = [re.sub(r"=(\[[^]]*\]|[^,]*),.*", r"=\1", word) for word in overrides]
    overrides = [word for word in overrides if not word.startswith("hydra.")]
    register(data_dir("search_spaces"))
    with initialize_config_dir(str(data_dir("conf")), version_base="1.3"):
        return to_config(compose("config", overrides))


def test_there_is_something_to_check() -> None:
    assert len(PAGES) >= 5
    assert sum(words_of(line) is not None for _, line in LINES) >= 30


@pytest.mark.parametrize(("place", "line"), LINES, ids=lambda value: str(value)[:60])
def test_every_line_is_a_command_that_exists(place: str, line: str) -> None:
    words = words_of(line)
    if words is not None:
        assert words[0] in (*COMMANDS, *NO_CONFIG)
        if words[0] in COMMANDS:
            assert composed(words).command == words[0]
    elif line.startswith("make "):
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert line.split()[1] in targets
    else:
        assert line.startswith(OTHERS), f"{place}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_keys_named_in_the_text_exist(page: Path) -> None:
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    keys = config_keys()
    for span in re.findall(r"`([^`\n]+)`", text):
        if span.startswith("kvsharer "):
            assert span.split()[1] in (*COMMANDS, *NO_CONFIG), span
        for key in re.findall(r"(?<!\S)([a-z_]+(?:\.[a-z_]+)+)=", span):
            assert key in keys or key.startswith("hydra."), span


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", there.read_text(), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_in_the_text_exist(page: Path) -> None:
    folders = "kvsharer_exp|conf|tests|docs|search_spaces"
    for name in re.findall(rf"`((?:{folders})/[^`]*)`", page.read_text()):
        if "NAME" not in name:
            assert (ROOT / name).exists(), name


def test_yaml_blocks_are_what_they_are_shown_as() -> None:
    shown = [yaml.safe_load(block.text) for block in BLOCKS if block.kind == "yaml"]
    assert len(shown) >= 2
    for content in shown:
        if "source" in content:
            assert content.keys() <= {*ModelConfig.__dataclass_fields__}
        else:
            assert {"task", "dataset_path", "output_type", "doc_to_text"} <= content.keys()


def test_every_block_is_of_a_kind_that_is_checked() -> None:
    # The one in bash is a script, which `tests/search/test_slurm_script.py` runs.
    assert {block.kind for block in BLOCKS} <= {"", "python", "yaml", "text", "bash"}


def test_the_table_of_commands_is_true() -> None:
    """Every row is a command; whether a new one needs a row is for its author to say."""
    rows = re.findall(r"^\| `kvsharer (\w+)", README, flags=re.MULTILINE)
    assert len(rows) >= 12
    assert set(rows) <= set(COMMANDS)


def test_every_choice_named_exists() -> None:
    for group in ("sampler", "search_space"):
        folder = data_dir("search_spaces") if group == "search_space" else data_dir("conf") / group
        files = {path.stem for path in folder.glob("*.yaml")}
        named = re.search(rf"`{group}=([\w|]+)`", README)
        assert named is not None
        assert set(named.group(1).split("|")) <= files


def test_tiny_is_said_to_be_of_random_weights() -> None:
    """Where the README first names it, and in its file."""
    before, _, after = README.partition("model=tiny")
    assert "random weights" in after.partition("```")[0]
    assert "```" not in before.rpartition("\n\n")[2]  # it is in the text, not in a block
    assert "random weights" in (data_dir("conf") / "model" / "tiny.yaml").read_text()


def test_every_architecture_under_contract_is_named() -> None:
    table = README[README.index("## Which models") : README.index("## Limits")]
    missing = [name for name in ARCHITECTURES if not re.search(rf"\b{name}\b", table)]
    assert not missing


def test_the_api_page_is_what_the_docstrings_say() -> None:
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "api.md").read_text() == module.page(), "old: run make docs"


def on_tiny(code: str) -> str:
    """Python that is shown for the embedded model, for one of six layers."""
    code = code.replace('load_model("smollm2")', 'load_model("tiny")')
    return code.replace("identity(30).share(target=7", "identity(6).share(target=4")


def run(block: Block) -> None:
    exec(compile(on_tiny(block.text), block.place, "exec"), {})


def test_the_python_of_the_readme_runs(capsys) -> None:
    for block in blocks(PAGES[0]):
        if block.kind == "python":
            run(block)
    assert "The capital of France is" in capsys.readouterr().out


def test_a_map_is_read_in_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("outputs/first").mkdir(parents=True)
    entries = [{"kv_source_layers": [0, 1, 2, 1]}, {"kv_source_layers": [0, 1, 1, 1]}]
    Path("outputs/first/front.json").write_text(json.dumps(entries))
    (block,) = (b for b in blocks(ROOT / "docs" / "how_to.md") if b.kind == "python")
    run(block)
    assert capsys.readouterr().out.split() == ["0_1_2_1", "(3,)", "0.5"]


SMALL = (
    *("study.n_trials=12", "bench.contexts=[16]", "bench.repeats=1", "compression.ratios=[0.34]"),
    *("generate.max_new_tokens=4", "ablate.draws=1", "ablate.max_candidates=5"),
)


def main_on_tiny(words: list[str], store: list[str]) -> int:
    """A command line as it is shown, with the tiny model and little text."""
    words = [re.sub(r"^\+?model=.*", "model=tiny", w) for w in words if w[:7] != "model.d"]
    given = {word.partition("=")[0] for word in words}
    given.add("search_space")  # the default is what a reader gets
    more = [w for w in (*QUICK, *store, *SMALL) if w.partition("=")[0] not in given]
    return main([*words, *more])


# What a line needs that is not there: files, a hub's tasks or models, servers, another package.
ABSENT = re.compile(
    r"/path/|/shared/|RUN_|piqa|Qwen/|scoring=paper|paper_main|://|window|kvsharer ui"
)
HERE = [
    line
    for place, line in LINES
    if (words_of(line) or ["--help"])[0] in COMMANDS
    and not ABSENT.search(line)
    and not place.startswith(WALKTHROUGH.name)
]


@pytest.mark.slow
@pytest.mark.parametrize("line", dict.fromkeys(HERE))
def test_a_line_that_needs_nothing_else_runs(line: str, tmp_path, monkeypatch, store) -> None:
    monkeypatch.chdir(tmp_path)
    assert main_on_tiny(words_of(line) or [], store) == 0


@pytest.mark.slow
def test_the_walkthrough_works_from_the_first_line_to_the_last(
    tmp_path: Path, monkeypatch, store, capsys
) -> None:
    """All of it in order on the tiny model; `ui` and `doctor` have tests of their own."""
    monkeypatch.chdir(tmp_path)
    for block in blocks(WALKTHROUGH):
        if block.kind == "python":
            run(block)
        for line in block.text.splitlines() if not block.kind else ():
            words = words_of(line)
            if words is not None and words[0] not in ("ui", "doctor"):
                assert main_on_tiny(words, store) == 0, line
    capsys.readouterr()
    front = json.loads(Path("outputs/first/front.json").read_text())
    checked = json.loads(Path("outputs/checked/result.json").read_text())
    assert checked["plan"] in [entry["plan"] for entry in front]
    for made in ("first/front.html", "calibrated/distances.png", "plan_model/kv_plan.json"):
        assert (Path("outputs") / made).is_file()
