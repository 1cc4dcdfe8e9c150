"""Imports point down only, and every third-party library stays in its room (design: the floors)."""

import ast
from pathlib import Path

import pytest

import kvsharer_exp

PACKAGE = Path(kvsharer_exp.__file__).parent
FLOORS = {
    "errors": 0, "plugins": 0, "machine": 0, "sharing_map": 0, "records": 0,
    "statistics": 1,
    "assets": 1, "availability": 1, "models": 1, "sharing": 1, "internlm2": 1, "exported_model": 1,
    "texts": 2, "wiki_tasks": 2, "paper_tasks": 2, "tasks": 2, "calibration": 2, "ranking": 2,
    "evaluator": 2, "prefix_states": 2, "scoring": 2,
    "footprint": 2, "prediction": 2, "benchmark": 2,
    "paper_numbers": 2,
    "search": 3,
    "tracking": 4, "front": 4, "figures": 4, "report": 4, "html_report": 4, "export": 4,
    "terminal": 4, "ablation": 4,
    "measured": 4, "result_readers": 4, "beside_paper": 4, "comparison": 4,
    "html_comparison": 4, "reproduction": 4,
    "completion": 5, "config": 5, "cli": 5, "commands": 5,
    "__main__": 5, "__init__": 5,
}  # fmt: skip
# Only what costs or couples: libraries that must not spread.
ROOMS_OF = {
    "hydra": {"cli", "config", "commands"},
    "omegaconf": {"cli", "config", "commands"},
    "mlflow": {"tracking"},
    "matplotlib": {"figures"},
    "plotly": {"figures"},
    "optuna": {"search", "commands"},
    "lm_eval": {"tasks", "scoring"},
    "datasets": {"texts", "tasks", "scoring"},
    "transformers": {"models", "assets", "sharing", "export", "exported_model"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down_and_libraries_stay_in_their_rooms(path: Path) -> None:
    room = room_of(path)
    assert room in FLOORS, f"{room} has no floor: add it to the design"
    for name in imports_of(path):
        top, _, rest = name.partition(".")
        if top == "kvsharer_exp" and rest and room != "__init__":
            imported = rest.split(".")[0]
            assert FLOORS[imported] <= FLOORS[room], f"{room} imports {imported}, which is above it"
        elif top in ROOMS_OF:
            assert room in ROOMS_OF[top], f"{top} is not for {room}"


def test_values_need_the_standard_library_only() -> None:
    for path in (PACKAGE / f"{name}.py" for name, floor in FLOORS.items() if floor == 0):
        outside = {n for n in imports_of(path) if n.split(".")[0] in {"torch", "numpy", "yaml"}}
        assert not outside


def test_nothing_is_pickled() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert "torch.save" not in text
        assert "import pickle" not in text
