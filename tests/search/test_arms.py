"""The arms: what each walks, what it may spend, and that the same draw gives the same map."""

import pytest

from kvsharer_exp.measure.calibration import layer_means
from kvsharer_exp.measure.evaluator import Evaluator
from kvsharer_exp.measure.ranking import distance_matrix, rank
from kvsharer_exp.search.paper.acceptance import acceptance_by_rank, pairs_alone
from kvsharer_exp.search.paper.arms import (
    ARMS,
    GIVEN,
    WALKS,
    Walker,
    check_arm,
    evaluated,
    is_random,
    is_tested,
    largest,
)
from kvsharer_exp.search.paper.greedy import greedy, ordered_pairs
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.greedy import GreedyStep
from kvsharer_exp.values.ranking import DissimilarityRanking, LayerPair
from kvsharer_exp.values.sharing_map import SharingMap
from tests.tiny import NUM_LAYERS, tiny_model, tokens

WINDOWS = tokens(batch=4, length=10)
RATIOS = [0.2, 0.5]


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return Evaluator(tiny_model("llama"), WINDOWS)


@pytest.fixture(scope="module")
def ranking() -> DissimilarityRanking:
    model = tiny_model("llama")
    matrix = distance_matrix(model, layer_means(model, WINDOWS), distance="euclidean_flat")
    return rank(matrix, model_id="tiny", distance="euclidean_flat")


def test_six_walks_two_fixed_and_the_given() -> None:
    assert len(WALKS) == 6
    assert {*ARMS} - {*WALKS} == {"trailing_layers", "adjacent_pairs", GIVEN}
    assert [arm for arm in ARMS if is_random(arm)] == ["random_tested", "random_untested"]
    assert sum(map(is_tested, ARMS)) == 3


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_gives_a_valid_map_at_every_ratio(arm: str, evaluator, ranking) -> None:
    given = (SharingMap((0, 0, 2, 2, 4, 5)), SharingMap((0, 0, 2, 3, 4, 5)))
    walker = Walker(evaluator, ranking, threshold=-1, given=given)
    found = walker.run(arm, RATIOS)
    assert [result.requested for result in found] == [1, 3]
    expected = [1, 2] if arm == GIVEN else [1, 3]
    assert [result.found for result in found] == expected
    for result in found:
        assert len(SharingMap(result.kv_source_layers).targets) == result.found
        assert evaluated(result) == (result.candidates if is_tested(arm) else 0)


@pytest.mark.parametrize("arm", WALKS)
def test_a_walk_is_the_greedy_strategy_in_its_order(arm: str, evaluator, ranking) -> None:
    (result,) = Walker(evaluator, ranking, threshold=0.6).run(arm, [0.5], seed=7)
    evaluator.reset()
    (plain,) = greedy(
        ordered_pairs(ranking, WALKS[arm], 7),
        NUM_LAYERS,
        [0.5],
        advance=evaluator.advance if is_tested(arm) else None,
        threshold=0.6,
    )
    evaluator.reset()
    assert result.kv_source_layers == plain.kv_source_layers
    assert result.trace == plain.trace


def test_tested_arms_have_the_same_budget(evaluator, ranking) -> None:
    walker = Walker(evaluator, ranking, threshold=1, max_candidates=4)
    spent = {arm: evaluated(walker.run(arm, [0.5])[0]) for arm in WALKS}
    assert spent == {arm: 4 if is_tested(arm) else 0 for arm in WALKS}
    assert walker.run("random_untested", [0.5])[0].found == 3


def test_draws_differ_and_each_can_be_drawn_again(evaluator, ranking) -> None:
    walker = Walker(evaluator, ranking)

    def maps(seed: int) -> list[tuple[int, ...]]:
        return [
            walker.run("random_untested", [0.5], seed=seed, draw=draw)[0].kv_source_layers
            for draw in range(6)
        ]

    assert maps(0) == maps(0)
    assert len(set(maps(0))) > 3
    assert maps(0) != maps(1)


def test_an_arm_leaves_no_map_behind(evaluator, ranking) -> None:
    walker = Walker(evaluator, ranking, threshold=-1)
    first = walker.run("dissimilar_tested", [0.5])[0]
    walker.run("similar_tested", [0.5])
    again = walker.run("dissimilar_tested", [0.5])[0]
    assert [step.cosine for step in again.trace] == [step.cosine for step in first.trace]


def test_the_given_map_is_the_largest_that_fits() -> None:
    one, two = SharingMap((0, 0, 2, 3)), SharingMap((0, 0, 2, 2))
    assert largest([two, one], 1, 4) == one
    assert largest([one, two], 3, 4) == two
    assert largest([two], 1, 4) == SharingMap.identity(4)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("dissimilar_testd", "did you mean dissimilar_tested"), ("zzz", "choose of dissimilar_")],
)
def test_an_unknown_arm(name: str, hint: str) -> None:
    with pytest.raises(InputError, match=hint) as refused:
        check_arm(name)
    assert len(str(refused.value)) <= 200


PAIRS = tuple(LayerPair(t, s, float(t - s)) for t in range(4, 0, -1) for s in range(t))


def test_acceptance_is_counted_by_place_in_the_ranking() -> None:
    ranking = DissimilarityRanking("m", "d", 5, PAIRS)
    steps = [GreedyStep(p.target, p.source, p.distance, 0.7, i < 4) for i, p in enumerate(PAIRS)]
    untested = GreedyStep(PAIRS[0].target, PAIRS[0].source, 1.0, None, True)
    bins = acceptance_by_rank(ranking, [steps[:3], [*steps[3:9], untested]], num_bins=3)
    assert [(b.first, b.last) for b in bins] == [(1, 4), (5, 7), (8, 10)]
    assert [(b.tried, b.accepted) for b in bins] == [(4, 4), (3, 0), (2, 0)]
    assert bins[0].rate is not None
    assert bins[0].rate.mean == 1.0


def test_more_bins_than_pairs_is_one_bin_a_pair() -> None:
    ranking = DissimilarityRanking("m", "d", 5, PAIRS)
    bins = acceptance_by_rank(ranking, [], num_bins=99)
    assert [(b.first, b.last, b.rate) for b in bins] == [(i, i, None) for i in range(1, 11)]


def test_pairs_alone_are_scored_from_the_full_cache(evaluator, ranking) -> None:
    pairs = pairs_alone(evaluator, ranking)
    assert [pair.rank for pair in pairs] == list(range(1, 16))
    for pair in pairs[::5]:
        alone = SharingMap.identity(NUM_LAYERS).share(pair.target, pair.source)
        scores = Evaluator(tiny_model("llama"), WINDOWS).score(alone)
        assert (pair.cosine, pair.kl) == pytest.approx((scores.cosine, scores.kl), abs=1e-9)
    few = pairs_alone(evaluator, ranking, max_pairs=5)
    assert [pair.rank for pair in few] == [1, 4, 7, 10, 13]
