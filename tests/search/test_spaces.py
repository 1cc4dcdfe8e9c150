"""Every space: any parameters decode to a valid map, and what `encode` gives decodes to the map."""

import random
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from kvsharer_exp.measure.calibration import layer_means
from kvsharer_exp.measure.evaluator import Evaluator
from kvsharer_exp.measure.ranking import distance_matrix, rank
from kvsharer_exp.model.actions.check import check_plan
from kvsharer_exp.model.folders import data_dir
from kvsharer_exp.model.sharing.architectures import attention_layers
from kvsharer_exp.search.coordinator import Search, run_search
from kvsharer_exp.search.execution.local import LocalExecutor
from kvsharer_exp.search.outcome import Outcome
from kvsharer_exp.search.paper.greedy import adjacent_pairs, trailing_layers
from kvsharer_exp.search.samplers import make_sampler
from kvsharer_exp.search.spaces.base import SearchSpace
from kvsharer_exp.search.spaces.registry import SPACES, check_space, make_space
from kvsharer_exp.search.study import open_study
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.footprint import Footprint
from kvsharer_exp.values.ranking import DissimilarityRanking, LayerPair
from kvsharer_exp.values.scores import CandidateScores
from kvsharer_exp.values.sharing_map import SharingMap
from tests.tiny import tiny_model, tokens

EVERY = {path.stem: path for path in sorted(data_dir("search_spaces").rglob("*.yaml"))}
KINDS = {name: yaml.safe_load(path.read_text())["kind"] for name, path in EVERY.items()}
# Spaces of maps; tests/search/test_layer_actions.py has the one of plans.
FILES = {name: EVERY[name] for name, kind in KINDS.items() if not SPACES[kind].holds_plans}
MAPS = [kind for kind, space in SPACES.items() if not space.holds_plans]
ARCHITECTURES = ("llama", "gemma3_text", "gpt2")  # gemma3_text mixes sliding and full layers
MADE_UP = {  # layer → its attention type; only layers of one type may share
    "twelve layers": "AAAAAAAAAAAA",
    "two types in turn": "ABABABABABAB",
    "five to one": "AAAAABAAAAAB",
    "one of its kind last": "AABAABAABAAC",
}
MAX_SHARED = 3


def ranking_of(types: str) -> DissimilarityRanking:
    """All pairs of layers of one type in a shuffled order."""
    pairs = [
        LayerPair(t, s, 0.0) for t in range(len(types)) for s in range(t) if types[t] == types[s]
    ]
    random.Random(0).shuffle(pairs)
    return DissimilarityRanking("made up", "euclidean_flat", len(types), tuple(pairs))


@cache
def measured(architecture: str) -> dict[str, Any]:
    """What a sweep gives `make_space` for this model."""
    model = tiny_model(architecture)
    windows = tokens(batch=3, length=8)
    means, evaluator = layer_means(model, windows), Evaluator(model, windows)

    def ranked(distance: str, key_weight: float) -> DissimilarityRanking:
        matrix = distance_matrix(model, means, distance=distance, key_weight=key_weight)
        return rank(matrix, model_id=architecture, distance=distance)

    return {
        "ranking": ranked("euclidean_flat", 0.5),
        "rank": ranked,
        "advance": evaluator.advance,
        "reset": evaluator.reset,
    }


def seeds(order: DissimilarityRanking) -> list[SharingMap]:
    return [
        make(order.pairs, order.num_layers, count)
        for count in (1, 2, MAX_SHARED)
        for make in (trailing_layers, adjacent_pairs)
    ]


@cache
def build(name: str, where: str) -> SearchSpace:
    """The space of file ``name`` for an architecture or a made-up model."""
    given = {"ranking": ranking_of(MADE_UP[where])} if where in MADE_UP else measured(where)
    held = [seed for seed in seeds(given["ranking"]) if seed.targets]
    content = yaml.safe_load(FILES[name].read_text())
    return make_space(
        content["kind"], max_shared=MAX_SHARED, seeds=held, **given, **content["options"]
    )


def drawn_from(distribution: BaseDistribution) -> st.SearchStrategy:
    if isinstance(distribution, CategoricalDistribution):
        return st.sampled_from(distribution.choices)
    if isinstance(distribution, IntDistribution):
        return st.integers(distribution.low, distribution.high)
    if distribution.step is None:
        return st.floats(distribution.low, distribution.high)
    steps = round((distribution.high - distribution.low) / distribution.step)
    return st.integers(0, steps).map(lambda i: distribution.low + i * distribution.step)


def check_encoded(space: SearchSpace, sharing_map: SharingMap) -> bool:
    """Whether the space holds the map; if so its parameters can be drawn and decode to it."""
    params = space.encode(sharing_map)
    if params is None:
        return False
    distributions = space.distributions()
    assert params.keys() == distributions.keys()
    for key, value in params.items():
        assert distributions[key]._contains(distributions[key].to_internal_repr(value))
    assert space.decode(params) == sharing_map
    return True


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [*MADE_UP, *ARCHITECTURES])
def test_any_parameters_decode_to_a_valid_map_and_back(name: str, where: str) -> None:
    space = build(name, where)
    drawn = st.fixed_dictionaries({k: drawn_from(d) for k, d in space.distributions().items()})
    allowed = {(pair.target, pair.source) for pair in space.ranking.pairs}

    @settings(max_examples=25, deadline=None, derandomize=True, database=None)
    @given(drawn)
    def check(params: dict[str, Any]) -> None:
        decoded = space.decode(params)
        assert decoded == space.decode(params)
        assert decoded.num_layers == space.ranking.num_layers
        assert 0 < len(decoded.targets) <= params["num_shared"] <= MAX_SHARED
        assert {(t, decoded.kv_source_layers[t]) for t in decoded.targets} <= allowed
        if where in ARCHITECTURES:
            check_plan(decoded, attention_layers(tiny_model(where)))
        assert check_encoded(space, decoded)

    check()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [*MADE_UP, *ARCHITECTURES])
def test_seeds_are_held_or_refused_in_so_many_words(name: str, where: str) -> None:
    space = build(name, where)
    full = SharingMap.identity(space.ranking.num_layers)
    too_large = trailing_layers(space.ranking.pairs, full.num_layers, full.num_layers - 1)
    assert space.encode(full) is None
    assert space.encode(too_large) is None
    held = [check_encoded(space, seed) for seed in seeds(space.ranking) if seed.targets]
    if name in ("layer_sources", "ranked_pairs"):
        assert all(held)


def test_the_spaces_hold_the_maps_they_are_named_for() -> None:
    pairs = ranking_of(MADE_UP["twelve layers"]).pairs
    for name in ("suffix", "blocks", "random_keys"):
        assert check_encoded(build(name, "twelve layers"), trailing_layers(pairs, 12, 3))
    assert check_encoded(build("blocks", "twelve layers"), adjacent_pairs(pairs, 12, 3))
    assert build("suffix", "twelve layers").encode(adjacent_pairs(pairs, 12, 3)) is None
    scattered = SharingMap.identity(12).share(5, 0).share(9, 2)
    assert not any(build(name, "twelve layers").encode(scattered) for name in ("suffix", "blocks"))


@pytest.mark.parametrize("name", ["blocks", "suffix", "random_keys"])
@pytest.mark.parametrize("types", ["AAAAAA", "ABABAB", "AABBAA", "ABBAAC"])
def test_encode_knows_exactly_the_maps_that_can_be_drawn(name: str, types: str) -> None:
    """Every map of six layers, against every combination of parameters (priorities: 0 and 1)."""
    order = ranking_of(types)
    space = make_space(name, order, max_shared=MAX_SHARED)
    values = []
    for distribution in space.distributions().values():
        if isinstance(distribution, CategoricalDistribution):
            values.append(distribution.choices)
        elif isinstance(distribution, IntDistribution):
            values.append(tuple(range(distribution.low, distribution.high + 1)))
        else:
            values.append((0.0, 1.0) if distribution.low == 0 else (0.0,))
    keys = space.distributions().keys()
    reached = {space.decode(dict(zip(keys, drawn, strict=True))) for drawn in product(*values)}
    every = [
        SharingMap(sources)
        for sources in product(
            *[[t, *[s for s in range(t) if types[s] == types[t]]] for t in range(6)]
        )
        if all(sources[s] == s for s in sources)
    ]
    assert reached <= set(every)
    assert reached == {sharing_map for sharing_map in every if check_encoded(space, sharing_map)}


def test_a_suffix_reads_one_owner_per_attention_type() -> None:
    for wish in range(11):
        shared = build("suffix", "two types in turn").decode({"num_shared": 3, "source": wish})
        assert shared.targets == (9, 10, 11)
        nine, ten, eleven = (shared.kv_source_layers[target] for target in shared.targets)
        assert nine == eleven == min(range(1, 9, 2), key=lambda s: (abs(s - wish), s))
        assert ten == min(range(0, 9, 2), key=lambda s: (abs(s - wish), s))


def test_the_ranking_orders_what_is_kept() -> None:
    """Blocks lose the pair that stands last; keys lean on the ranking as much as they are told."""
    order = ranking_of("AAAAAAAA")
    place = {(p.target, p.source): i for i, p in enumerate(order.pairs)}
    cuts = {f"cut_{layer}": layer % 2 == 0 for layer in range(1, 8)}
    kept = make_space("blocks", order, max_shared=2).decode({"num_shared": 2, **cuts})
    by_place = sorted(((t, t - 1) for t in (1, 3, 5, 7)), key=lambda pair: place[pair])
    assert set(kept.targets) == {target for target, _ in by_place[:2]}
    keys = make_space("random_keys", order, max_shared=2)
    level = {f"priority_{layer}": 0.5 for layer in range(1, 8)}
    params = {"num_shared": 1, "source_rule": "dissimilar", "ranking_weight": 1.0, **level}
    first = order.pairs[0]
    assert keys.decode(params) == SharingMap.identity(8).share(first.target, first.source)


class Walker:
    """An acceptance test whose cosine falls by ``cost`` times the index of every target."""

    def __init__(self, cost: float) -> None:
        self.cost, self.tried, self.resets = cost, 0, 0

    def advance(self, sharing_map, accept):
        self.tried += 1
        scores = CandidateScores((1 - self.cost * sum(sharing_map.targets),))
        return scores, accept(scores, 0)

    def reset(self) -> None:
        self.resets += 1

    def space(self, order: DissimilarityRanking, **options: Any) -> SearchSpace:
        arguments = {"max_shared": 3, "rank": lambda distance, key_weight: order, **options}
        return make_space(
            "greedy_knobs", order, advance=self.advance, reset=self.reset, **arguments
        )


def knobs(num_shared: int, **changes: Any) -> dict[str, Any]:
    paper = {"order": "dissimilar", "distance": "cosine", "key_weight": 0.5, "threshold": 0.5}
    return {"num_shared": num_shared, **paper, **changes}


def test_one_greedy_walk_serves_every_size_and_scores_no_map_twice() -> None:
    walker = Walker(0.01)
    space = walker.space(ranking_of("AAAAAAAA"))
    maps = [space.decode(knobs(count)) for count in (3, 1, 2)]
    assert [len(sharing_map.targets) for sharing_map in maps] == [3, 1, 2]
    assert walker.resets == 2  # before and after the one walk
    tried = walker.tried
    assert space.decode(knobs(2, threshold=0.3 + 4 * 0.05)) == maps[2]  # 0.5 but for rounding
    assert space.decode(knobs(2, threshold=0.45, key_weight=0.25)) == maps[2]  # the same walk
    assert walker.tried == tried
    assert space.decode(knobs(2, order="similar")) != maps[2]
    assert walker.tried > tried


def test_a_walk_that_finds_too_little_gives_what_it_found_or_what_came_nearest() -> None:
    order = ranking_of("AAAAAAAA")
    found = Walker(0.02).space(order).decode(knobs(3, threshold=0.95))
    assert found.targets in {(1,), (2,)}  # a second one would fall below 0.95
    walker = Walker(0.2)
    nearest = walker.space(order).decode(knobs(3, threshold=0.95))
    tried = order.pairs[: walker.tried]
    assert walker.tried == 3 * 3
    assert nearest.targets == (min(pair.target for pair in tried),)


def test_without_a_model_the_greedy_walks_the_one_ranking_without_a_test() -> None:
    space = make_space("greedy_knobs", ranking_of("AAAAAAAA"), max_shared=3)
    assert set(space.distributions()) == {"num_shared", "order"}
    assert len(space.decode({"num_shared": 3, "order": "similar"}).targets) == 3


@pytest.mark.parametrize("name", FILES)
def test_a_search_of_more_trials_than_maps_ends(name: str, tmp_path) -> None:
    space = make_space(
        yaml.safe_load(FILES[name].read_text())["kind"], ranking_of("AAAA"), max_shared=2
    )
    with open_study("s", storage=None, folder=tmp_path) as store:
        found = run_search(
            store,
            Search(
                space,
                make_sampler("random", space=space, seed=0),
                lambda sharing_map: Footprint(1, len(sharing_map.owners) / 4, 0),
            ),
            LocalExecutor(
                lambda sharing_map, bar: Outcome({}, "complete", "fit", -sum(sharing_map.targets))
            ),
            n_trials=100,
        )
    assert 2 <= len(found) <= 17  # all maps of four layers with one or two targets
    assert all(result.sharing_map.targets for result in found)


def test_every_space_has_a_file() -> None:
    assert set(KINDS.values()) == set(SPACES)


PAIR, LINE = ranking_of("AA"), ranking_of("AAAAAAAA")
REFUSALS = {
    "search_space.kind=nope is unknown: choose one of": ("nope", LINE, 2, {}),
    "search_space.kind=ranked_pair is unknown: did you mean ranked_pairs?": (
        "ranked_pair", LINE, 2, {},
    ),
    "search_space suffix does not take these options": ("suffix", LINE, 2, {"nonsense": 1}),
    "2 shared layers asked, but only 1 layers": ("blocks", PAIR, 2, {}),
    "num_pairs=0: give at least 1": ("ranked_pairs", LINE, 2, {"num_pairs": 0}),
    "tries=0: give at least 1": ("greedy_knobs", LINE, 2, {"tries": 0}),
    "tries=1.5: give a whole number": ("greedy_knobs", LINE, 2, {"tries": 1.5}),
    "distances=[] is no list": ("greedy_knobs", LINE, 2, {"distances": []}),
    "distances=cka is no list": ("greedy_knobs", LINE, 2, {"distances": "cka"}),
    "distances=cosin is unknown: did you mean cosine?": (
        "greedy_knobs", LINE, 2, {"distances": ["cka", "cosin"]},
    ),
    "ranked_pairs holds one map only (layer 3 reads 0)": (
        "ranked_pairs", LINE, 1, {"num_pairs": 1},
    ),
    "suffix holds one map only (layer 5 reads 2)": ("suffix", ranking_of("ABCABC"), 1, {}),
    "blocks holds one map only (layer 2 reads 1)": ("blocks", ranking_of("ABBA"), 1, {}),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSALS)
def test_refusals_are_one_line(reason: str) -> None:
    kind, order, max_shared, options = REFUSALS[reason]
    with pytest.raises(InputError) as refused:
        make_space(kind, order, max_shared=max_shared, **options)
    assert reason in str(refused.value)
    assert len(str(refused.value)) <= 200
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("reason", [r for r in REFUSALS if "one map" not in r])
def test_kinds_and_options_are_refused_before_there_is_a_ranking(reason: str) -> None:
    kind, _, _, options = REFUSALS[reason]
    if not options and kind in SPACES:
        check_space(kind)  # it is the model that is refused
        return
    with pytest.raises(InputError) as refused:
        check_space(kind, **options)
    assert reason in str(refused.value)


@pytest.mark.parametrize("kind", MAPS)
def test_a_model_of_one_pair_has_nothing_to_search(kind: str) -> None:
    with pytest.raises(InputError, match=r"holds one map only \(layer 1 reads 0\)"):
        make_space(kind, PAIR, max_shared=1)


SOMEONES = """
from dataclasses import dataclass
from optuna.distributions import IntDistribution
from kvsharer_exp.extend import SharingMap, Space

@dataclass(frozen=True)
class OneTarget(Space):
    source: int = 0

    def distributions(self):
        return {"target": IntDistribution(self.source + 1, self.ranking.num_layers - 1)}

    def decode(self, params):
        return SharingMap.identity(self.ranking.num_layers).share(params["target"], self.source)

    def encode(self, sharing_map):
        return None

def not_a_space(setting):
    return setting
"""


def install(folder: Path, monkeypatch, package: str, *entries: str) -> None:
    """A package as pip leaves it, with these entry points."""
    module = package.replace("-", "_")
    (folder / f"{module}.py").write_text(SOMEONES)
    metadata = folder / f"{module}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = "\n".join(entries)
    (metadata / "entry_points.txt").write_text(f"[kvsharer_exp.search_spaces]\n{lines}\n")
    monkeypatch.syspath_prepend(str(folder))


def test_a_space_of_another_package(tmp_path, monkeypatch) -> None:
    install(tmp_path, monkeypatch, "their-spaces", "one_target = their_spaces:OneTarget")
    space = make_space("one_target", LINE, max_shared=2, source=3)
    assert space.decode({"target": 7}) == SharingMap.identity(8).share(7, 3)
    with pytest.raises(InputError, match="one_target does not take these options"):
        make_space("one_target", LINE, max_shared=2, sources=3)
    with pytest.raises(InputError, match="did you mean one_target"):
        check_space("one_targe")


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("broken = their_missing_module:Space", "ModuleNotFoundError"),
        ("broken = broken_spaces:Nothing", "AttributeError"),
        ("broken = broken_spaces:not_a_space", "makes a SpaceSetting, which is no search space"),
        ("broken = broken_spaces:SOME THING", "broken_spaces:SOME THING of package broken-spaces"),
    ],
)
def test_a_broken_entry_point_is_named(entry: str, reason: str, tmp_path, monkeypatch) -> None:
    install(tmp_path, monkeypatch, "broken-spaces", entry)
    with pytest.raises(InputError) as refused:
        make_space("broken", LINE, max_shared=2)
    message = str(refused.value)
    assert message.startswith("search_space.kind=broken")
    assert reason in message
    assert len(message) <= 200
    assert "\n" not in message


def test_two_packages_with_a_space_of_one_name(tmp_path, monkeypatch) -> None:
    for package in ("theirs", "ours"):
        (tmp_path / package).mkdir()
        install(tmp_path / package, monkeypatch, package, f"both = {package}:OneTarget")
    with pytest.raises(InputError, match="both is brought by ours, theirs: uninstall all but one"):
        check_space("both")
