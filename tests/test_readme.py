"""What the README shows is what the program knows."""

import re
from pathlib import Path

from kvsharer_exp.assets import data_dir
from kvsharer_exp.cli import COMMANDS, translate
from tests.tiny import ARCHITECTURES

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_every_command_line_is_understood() -> None:
    lines = re.findall(r"^kvsharer (.+)$", README, flags=re.MULTILINE)
    assert len(lines) >= 3
    for line in lines:
        assert "+model=" in " ".join(translate(line.split()))


def test_every_command_is_in_the_table() -> None:
    for command in COMMANDS:
        assert f"| `kvsharer {command}" in README


def test_every_choice_named_exists() -> None:
    for group in ("sampler", "search_space"):
        folder = data_dir("search_spaces") if group == "search_space" else data_dir("conf") / group
        files = {path.stem for path in folder.glob("*.yaml")}
        named = re.search(rf"`{group}=([\w|]+)`", README)
        assert named is not None
        assert set(named.group(1).split("|")) == files


def test_every_architecture_under_contract_is_named() -> None:
    table = README[README.index("## Which models") : README.index("## Limits")]
    missing = [name for name in ARCHITECTURES if not re.search(rf"\b{name}\b", table)]
    assert not missing
