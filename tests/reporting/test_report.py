"""The front in words: it fits a terminal and a pipe, and never says more than measured."""

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from kvsharer_exp.cli.steps.front_lines import print_front
from kvsharer_exp.reporting.answers import answer, headline
from kvsharer_exp.reporting.front_table import front_table
from kvsharer_exp.reporting.markup import to_markdown
from kvsharer_exp.values.footprint import Footprint
from kvsharer_exp.values.sharing_map import SharingMap
from kvsharer_exp.values.trial import FrontEntry, TrialResult

FULL = {"kl": 0.0, "perplexity/calibration": 20.0, "perplexity/report": 22.0}
FULL |= {"lm_eval/wiki_cloze/acc": 0.4, "lm_eval/wiki_order/acc": 0.6}


def shared(num_shared: int, num_layers: int = 30) -> SharingMap:
    return SharingMap((0,) * (num_shared + 1) + tuple(range(num_shared + 1, num_layers)))


def entry(num_shared: int, report: float = 0.97, origin: str = "tpe [red]") -> FrontEntry:
    sharing_map = shared(num_shared)
    return FrontEntry(
        sharing_map.kv_source_layers,
        sharing_map.digest,
        num_shared,
        1 - num_shared / 30,
        {name: value * 1.01 for name, value in FULL.items()},
        {name: report for name in FULL if name != "kl"},
        "",
        origin,
    )


def result(number: int, num_shared: int, score: float | None) -> TrialResult:
    return TrialResult(
        number,
        {},
        shared(num_shared),
        {},
        Footprint(1, 1 - num_shared / 30, 0),
        "failed" if score is None else "complete",
        "fit",
        1.0,
        score,
        "",
        "" if score is not None else "out of memory",
    )


def printed(entries: list[FrontEntry], full: dict[str, float], width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    print_front(console, entries, full)
    return console.file.getvalue().splitlines()


ENTRIES = [entry(size) for size in range(1, 13)]


@pytest.mark.parametrize("num_tasks", [0, 1, 5, 12])
def test_the_table_fits_80_columns_with_whole_words(num_tasks: int) -> None:
    full = FULL | {f"lm_eval/another_task_{i}/acc": 0.5 for i in range(num_tasks)}
    lines = printed(ENTRIES, full)
    table = [line for line in lines if not re.match(r" *\d+ shared  ", line)]
    assert max(map(len, table)) <= 80
    words = " ".join(table).split()
    for name in full:
        task = name.split("/")[1] if name.startswith("lm_eval/") else name.split("/")[0]
        assert task in words
    assert "…" not in "".join(lines)


def test_every_map_is_whole_on_a_line_of_its_own_without_colours() -> None:
    lines = printed(ENTRIES, FULL)
    for made in ENTRIES:
        text = "_".join(map(str, made.kv_source_layers))
        assert f"{made.num_shared:3d} shared  {text}  tpe [red]" in lines
    assert "\x1b" not in "".join(lines)


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    print_front(console, ENTRIES, FULL)
    assert "\x1b[3" not in console.file.getvalue()


def test_markdown_cells_stay_cells() -> None:
    rows = front_table([entry(1, origin="a|b\nc")], FULL)
    lines = to_markdown(rows).splitlines()
    assert len(lines) == 4
    assert lines[-1].endswith(r"a\|b c |")


def against(results: list[TrialResult], reference: list[TrialResult]) -> str:
    return " ".join(answer(ENTRIES, FULL, {"paper greedy": reference}, results, "score (kl)"))


def test_a_reference_is_beaten_only_by_a_better_score_with_as_little_kv() -> None:
    paper = result(0, 4, -1.0)
    assert "is beaten: score (kl) -1;" in against([paper, result(1, 5, -0.5)], [paper])
    assert "is not beaten" in against([paper, result(1, 3, -0.5)], [paper])  # keeps more KV
    assert "is not beaten" in against([result(1, 4, -1.0), paper], [paper])  # a tie
    assert "is not beaten" in against([paper, result(1, 9, None)], [paper])
    copy = replace(paper)  # as read back from a study: equal, not the same object
    assert "is not beaten" in against([paper], [copy])


def test_the_answer_says_what_could_not_be_compared() -> None:
    assert "out of memory" in against([result(1, 4, -1.0)], [result(0, 4, None)])
    assert "no map to compare with" in against([result(1, 4, -1.0)], [])
    unmeasured = [replace(made, retained={}) for made in ENTRIES]
    assert answer(unmeasured, FULL, {}, [])[0].startswith("Held-out perplexity was not measured")


def test_the_answer_says_which_score_compares() -> None:
    paper = result(0, 4, -1.0)
    assert "the search optimised" in against([paper], [paper])


def test_the_headline_is_one_sentence_about_quality_and_the_reference() -> None:
    paper = result(0, 4, -1.0)
    entries = [entry(1, 0.99), entry(3, 0.96), entry(5, 0.8)]
    results = [paper, result(1, 5, -0.5)]
    said = headline("m", entries, {"paper greedy": [paper, result(2, 6, None)]}, results)
    assert said == (
        "m keeps 95% of its held-out perplexity with 3 of 30 layers reading another layer's KV "
        "cache (10% less of it); paper greedy is beaten at 1 of 1 sizes compared, by the score "
        "that was searched for."
    )
    assert "No shared map found" in headline("m", [entry(5, 0.8)], {}, [])
    assert "0 of 1" in headline("m", entries, {"paper greedy": [paper]}, [paper])
    unmeasured = [replace(made, retained={}) for made in entries]
    assert "was not scored" in headline("m", unmeasured, {}, [])
