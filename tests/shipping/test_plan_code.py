"""The code that ships with a plan is whole: this package's own modules, and nothing that is not."""

import ast
import inspect
import re
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_import_files

from kvsharer_exp.shipping import planned_model
from kvsharer_exp.shipping.plan_code import plan_files, shipped_modules
from kvsharer_exp.values.actions.registry import OURS

FILES = plan_files("LlamaForCausalLM", "LlamaConfig")


def test_one_file_for_each_module() -> None:
    assert len(FILES) == len(shipped_modules())
    assert all(re.fullmatch(r"modeling_kv_plan\.py|kvplan_\w+\.py", name) for name in FILES)


@pytest.mark.parametrize("name", FILES)
def test_imports_stay_among_the_files_torch_and_transformers(name: str) -> None:
    allowed = {*sys.stdlib_module_names, "torch", "transformers"}
    for node in ast.walk(ast.parse(FILES[name])):
        if isinstance(node, ast.Import):
            assert {alias.name.partition(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and f"{node.module}.py" in FILES
        elif isinstance(node, ast.ImportFrom):
            assert str(node.module).partition(".")[0] in allowed


@pytest.mark.parametrize("name", FILES)
def test_no_string_names_a_module_of_the_package(name: str) -> None:
    for node in ast.walk(ast.parse(FILES[name])):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not re.match(r"kvsharer_exp\.[\w.]+:", node.value)


def test_transformers_finds_every_file_from_the_first(tmp_path: Path) -> None:
    """It copies only files that it reaches by imports, so runners must be imported too."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    main = tmp_path / "modeling_kv_plan.py"
    found = {Path(path).name for path in get_relative_import_files(main)}
    assert found | {main.name} == set(FILES)


@pytest.mark.parametrize("action", OURS, ids=lambda action: action.name)
def test_every_action_and_its_runner_ship(action: type) -> None:
    runner = action.runner.partition(":")[0]  # type: ignore[attr-defined]
    assert {action.__module__, runner} <= set(shipped_modules())


@pytest.mark.parametrize("action", OURS, ids=lambda action: action.name)
def test_an_action_needs_no_line_of_the_shipped_code(action: type) -> None:
    """The runners stood in two more lists, so that a new action was more than its two files."""
    runner = action.runner.partition(":")[2]  # type: ignore[attr-defined]
    assert re.search(rf"^from \.\w+ import {runner} as ", FILES["modeling_kv_plan.py"], re.M)
    assert runner not in inspect.getsource(planned_model)


def test_the_class_of_the_model_is_filled_in() -> None:
    files = plan_files("GPT2LMHeadModel", "GPT2Config")
    main, config = files["modeling_kv_plan.py"], files["kvplan_shipping_exported_config.py"]
    assert "from transformers import GPT2LMHeadModel as StockForCausalLM" in main
    assert "import LlamaForCausalLM" not in main
    assert "from transformers import GPT2Config as StockConfig" in config
    assert "LlamaConfig" not in config
