"""The page of a sweep: it answers first, shows what it was given, escapes it, needs no network."""

import re
from dataclasses import replace

import pytest

from kvsharer_exp.reporting.figures.style import save_png
from kvsharer_exp.reporting.sweep_page import engines, front_page, pictures
from kvsharer_exp.reporting.sweep_result import SweepResult
from kvsharer_exp.search.front import GrowingFront, pareto_front
from kvsharer_exp.values.footprint import Footprint
from kvsharer_exp.values.sharing_map import SharingMap
from kvsharer_exp.values.trial import FrontEntry, TrialResult

LAYERS = 8
FULL = {"kl": 0.0, "perplexity/calibration": 20.0, "perplexity/report": 22.0}
FULL |= {"lm_eval/wiki_cloze/acc": 0.4}


def result(number: int, targets: list[int], kl: float, origin: str = "sampler") -> TrialResult:
    sharing_map = SharingMap.identity(LAYERS)
    for target in targets:
        sharing_map = sharing_map.share(target, 0)
    size = Footprint(1, 1 - len(targets) / LAYERS, 0)
    scores = {"kl": kl}
    return TrialResult(number, {}, sharing_map, scores, size, "complete", "fit", 1.0, -kl, origin)


RESULTS = [result(0, [1, 2], 1.5, "paper greedy"), result(1, [5], 0.02), result(2, [5, 6], 0.1)]


def entry(member: TrialResult, report: float) -> FrontEntry:
    return FrontEntry(
        member.sharing_map.kv_source_layers,
        member.sharing_map.digest,
        len(member.sharing_map.targets),
        member.footprint.kv_fraction,
        {"kl": member.scores["kl"], "perplexity/report": report},
        {"perplexity/report": 22 / report},
        "",
        member.origin,
    )


SWEEP = SweepResult(
    model="tiny",
    study="a-study",
    fitness="kl",
    asked={"maps": "3"},
    entries=[entry(RESULTS[1], 22.3), entry(RESULTS[2], 24.0)],
    full_scores=FULL,
    results=RESULTS,
    front=pareto_front(RESULTS),
    reference_maps={"paper greedy": RESULTS[:1]},
    volumes=GrowingFront(RESULTS, (1.0, -2.0)).volumes,
    distances=[[float(i + j) for j in range(LAYERS)] for i in range(LAYERS)],
    distance="cosine",
    environment={"seed": "7"},
    compare_url="http://127.0.0.1:5000/#/x?a=1&b=2",
)


def drawn(sweep: SweepResult) -> dict[str, bytes]:
    return {name: save_png(figure) for name, figure in pictures(sweep).items()}


@pytest.fixture(scope="module")
def page() -> str:
    return front_page(SWEEP, drawn(SWEEP))


def test_the_answer_comes_first_then_question_maps_and_environment(page: str) -> None:
    body = page[page.index("<body>") :]
    order = ["keeps 95% of its held-out perplexity with 1 of 8", "<h2>Asked", "<h2>Found"]
    order += ["<h2>Maps", "<h2>Serve one", "<h2>How the search went", "<h2>Environment and seeds"]
    places = [body.index(text) for text in order]
    assert places == sorted(places)
    for entry in SWEEP.entries:
        assert f"<code>{SharingMap(entry.kv_source_layers)}</code>" in body
    assert "<td>seed</td><td>7</td>" in body
    assert '"full cache"' in body
    assert body.count("<img width=") == 4
    assert '<img width="691" alt="Best of each size' in body  # 9.6 inches


def test_the_page_needs_no_network_and_stays_small(page: str) -> None:
    assert not re.search(r'<(script|link|img)[^>]+(src|href)="?(http|//)', page)
    assert len(page.encode()) < 6e6
    assert page.count("plotly.js v") == 1


def test_what_to_copy_runs_the_map_that_the_answer_names(page: str) -> None:
    chosen = str(SharingMap(SWEEP.entries[0].kv_source_layers))
    assert f"SharingMap.parse(&quot;{chosen}&quot;)" in page
    assert f"kvsharer export model=tiny map={chosen}" in page


def test_everything_is_escaped() -> None:
    odd = "<script>alert('&')</script>"
    sweep = replace(
        SWEEP,
        model=odd,
        asked={odd: odd},
        entries=[replace(SWEEP.entries[0], origin=odd)],
        full_scores={**FULL, f"perplexity/{odd}": 1.0},
        reference_maps={odd: RESULTS[:1]},
        environment={odd: odd},
        compare_url=f'"{odd}',
    )
    page = front_page(sweep, drawn(SWEEP))
    assert "<script>alert" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize("fitness", ["kl", "perplexity", "cosine", "lm_eval"])
def test_every_fitness_and_an_empty_front_give_a_page(fitness: str) -> None:
    bare = replace(SWEEP, fitness=fitness, entries=[], front=[], results=[], volumes=[])
    pngs = drawn(bare)
    assert "maps" not in pngs
    assert all(png.startswith(b"\x89PNG") for png in pngs.values())
    assert "No map of the front shares a layer" in front_page(bare, pngs)


def test_vllm_is_named_for_the_models_that_were_tried_there() -> None:
    assert engines(SharingMap((0, 1, 2, 1)), "LlamaForCausalLM") == ["transformers", "vLLM"]
    assert engines(SharingMap((0, 1, 2, 1)), "Olmo2ForCausalLM") == ["transformers"]
    assert engines(SharingMap((0, 1, 2, 1))) == ["transformers"]
