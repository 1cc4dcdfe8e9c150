"""Notebooks teach what works: each is executed, on the tiny model, cell by cell in one namespace.

Without a Jupyter kernel, which would bring thirty packages: the cells are plain Python.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from kvsharer_exp.cli.main import main
from tests.cli.commands.test_commands import QUICK

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


@pytest.fixture(scope="module")
def studies(store: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the study of one finished sweep."""
    folder = tmp_path_factory.mktemp("sweep")
    sweep = ["sweep", "study.name=read", f"study.storage={folder}/studies/read.journal"]
    few = ["study.n_trials=12", "scoring.report.tasks=[]"]
    assert main([*QUICK, *store, *sweep, *few, f"hydra.run.dir={folder}/run"]) == 0
    return folder / "studies"


@every_notebook
def test_every_cell_runs(path: Path, studies: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("KVSHARER_NOTEBOOK_MODEL", "tiny")
    monkeypatch.setenv("KVSHARER_NOTEBOOK_STUDIES", str(studies))
    monkeypatch.chdir(FOLDER)
    before = sorted(FOLDER.rglob("*"))
    namespace: dict[str, Any] = {"__name__": path.stem}
    for cell in cells(path):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name} {cell['id']}", "exec"), namespace)
    assert capsys.readouterr().out
    assert sorted(FOLDER.rglob("*")) == before


@every_notebook
def test_a_notebook_holds_no_outputs(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@every_notebook
def test_a_notebook_teaches_and_does_not_define(path: Path) -> None:
    """Long code belongs into the package."""
    code = ["".join(cell["source"]) for cell in cells(path) if cell["cell_type"] == "code"]
    assert sum(text.count("\n") + 1 for text in code) <= 110
    assert cells(path)[0]["source"][0].startswith(f"# {path.stem[:2]} · ")
