"""RESULTS.md is what the kept runs say."""

import json
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
build = runpy.run_path(str(ROOT / "docs/make_results.py"))["build"]
KEPT = sorted(path.parent for path in (ROOT / "docs/results").glob("*/result.json"))


def test_the_page_is_built_from_the_kept_runs() -> None:
    page = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    assert page == build(), "old: run docs/make_results.py"
    for picture in re.findall(r"\]\((docs/results/[^)]+\.png)\)", page):
        assert (ROOT / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("folder", KEPT, ids=lambda folder: folder.name)
def test_the_tables_are_those_of_the_run(folder: Path) -> None:
    """Every cell's perplexity stands in the table as the run measured it."""
    result = json.loads((folder / "result.json").read_text())
    table = (folder / "ablation.md").read_text(encoding="utf-8")
    for cell in result["cells"]:
        score = cell["scores"].get("perplexity/report")
        if score is not None:
            assert f"| {score['mean']:.3g}" in table


def test_a_run_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "docs/results").mkdir(parents=True)
    (tmp_path / "docs/results/text.md").write_text("{{no_such_run}}")
    with pytest.raises(FileNotFoundError, match="no_such_run is not there"):
        build(tmp_path)


def test_a_run_that_need_not_be_there_is_a_section_once_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "docs/results"
    folder.mkdir(parents=True)
    (folder / "text.md").write_text("before\n\n{{gpu?}}\n\n## after\n")
    assert build(tmp_path) == "before\n\n## after\n"
    (folder / "gpu").mkdir()
    assert build(tmp_path) == "before\n\n## after\n"  # begun, but without a page
    (folder / "gpu/gpu.md").write_text("## On a GPU: a card\n\n### Tests\n")
    assert build(tmp_path) == "before\n\n## On a GPU: a card\n\n### Tests\n\n## after\n"
