"""Imports point down only, and every third-party library stays on its floor.

The floors are one table, ``[tool.kvsharer_exp.floors]`` of pyproject.toml; README, CONTRIBUTING and
ruff's lists are held to it.
"""

import ast
import re
import statistics
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvsharer_exp

PACKAGE = Path(kvsharer_exp.__file__).parent
ROOT = Path(__file__).parents[1]
TOOL = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
FLOORS = TOOL["kvsharer_exp"]["floors"]
FILES = sorted(PACKAGE.rglob("*.py"))
DOORS = {"__init__.py", "__main__.py", "extend.py"}  # above all floors, imported by none
LONGEST, MEDIAN = 300, 110  # lines


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def test_the_top_has_the_floors_and_three_files_and_nothing_else() -> None:
    found = {path.name for path in PACKAGE.iterdir() if path.name not in ("__pycache__", "_data")}
    assert found == {*FLOORS, *DOORS}
    assert len(FLOORS) <= 9


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down_and_libraries_stay_on_their_floors(path: Path) -> None:
    room = room_of(path)
    if room in DOORS:
        return
    own = FLOORS[room]
    elsewhere = {name for floor in FLOORS.values() for name in floor["libraries"]}
    for name in imports_of(path):
        top, _, rest = name.partition(".")
        if top == "kvsharer_exp" and rest:
            other = rest.partition(".")[0]
            below = other in FLOORS and FLOORS[other]["floor"] < own["floor"]
            assert below or other in (room, *own.get("also", ())), f"{room} imports {other}"
        elif top in elsewhere:
            assert top in own["libraries"], f"{top} is not for {room}"


def test_values_need_the_standard_library_and_numpy_only() -> None:
    allowed = {*sys.stdlib_module_names, "numpy", "kvsharer_exp"}
    for path in FILES:
        if room_of(path) == "values":
            assert {name.partition(".")[0] for name in imports_of(path)} <= allowed, path.name


def test_ruff_says_the_same() -> None:
    lint = TOOL["ruff"]["lint"]
    named = {name for floor in FLOORS.values() for name in floor["libraries"]}
    assert set(lint["flake8-tidy-imports"]["banned-api"]) == named
    free = {key.split("/")[1] for key in lint["per-file-ignores"] if key.startswith("kvsharer_exp")}
    assert free == {name for name, floor in FLOORS.items() if floor["libraries"]}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_the_pages_name_the_floors_in_this_order(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| (.*?) \|", text, flags=re.MULTILINE)
    said = [(int(floor), name) for floor, cell in rows for name in re.findall(r"`(\w+)/`", cell)]
    assert sorted(said) == sorted((floor["floor"], name) for name, floor in FLOORS.items())


def test_folders_are_rooms_and_their_init_files_are_empty() -> None:
    """An `__init__` that imports costs every start; a folder of two files is a drawer too many."""
    for folder in {path.parent for path in FILES} - {PACKAGE}:
        if folder.name == "paper_tasks":  # lm-eval reads it: YAML files and what they call
            continue
        assert (folder / "__init__.py").read_text(encoding="utf-8") == "", folder
        inside = [
            path for path in folder.iterdir() if path.name not in ("__init__.py", "__pycache__")
        ]
        assert len(inside) >= 3, f"{folder} holds {len(inside)} files"


def test_files_hold_one_idea() -> None:
    lengths = {
        str(path.relative_to(PACKAGE)): len(path.read_text(encoding="utf-8").splitlines())
        for path in FILES
        if path.name != "__init__.py"
    }
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST} == {}
    assert statistics.median(lengths.values()) < MEDIAN


def test_nothing_is_pickled() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert "torch.save" not in text
        assert "import pickle" not in text
