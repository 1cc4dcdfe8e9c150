"""The model of pair losses: recovers what adds up, knows what it does not know."""

import numpy as np
import pytest

from kvsharer_exp.search.strategies.loss_model import LossModel, pair_terms
from kvsharer_exp.values.ranking import DissimilarityRanking, LayerPair
from kvsharer_exp.values.sharing_map import SharingMap

LAYERS = 10
PAIRS = tuple(LayerPair(t, s, float(t + s)) for t in range(LAYERS) for s in range(t))
RANKING = DissimilarityRanking("m", "d", LAYERS, PAIRS)
IDENTITY = SharingMap.identity(LAYERS)
DICE = np.random.default_rng(0)
TRUE = {(p.target, p.source): float(np.exp(DICE.normal(-2, 0.7))) for p in PAIRS}


def loss(sharing_map: SharingMap) -> float:
    return sum(TRUE[t, sharing_map.kv_source_layers[t]] for t in sharing_map.targets)


SINGLES = [IDENTITY.share(p.target, p.source) for p in PAIRS]


def estimate(model: LossModel) -> np.ndarray:
    return model.draw(np.random.default_rng(0), scale=0.0)


def test_pairs_seen_alone_are_known_and_their_sum_is_predicted() -> None:
    model = LossModel(pair_terms(RANKING))
    model.fit(SINGLES, [loss(single) for single in SINGLES])
    wanted = [TRUE[pair] for pair in model.terms.keys]
    assert np.abs(np.log(estimate(model) / wanted)).max() < 0.35
    assert np.corrcoef(np.log(estimate(model)), np.log(wanted))[0, 1] > 0.97
    both = IDENTITY.share(5, 0).share(8, 2)
    assert estimate(model)[model.terms.of(both)].sum() == pytest.approx(loss(both), rel=0.2)


def test_sums_alone_teach_which_pairs_are_dear() -> None:
    model, maps = LossModel(pair_terms(RANKING)), []
    for _ in range(150):
        shared = IDENTITY
        for index in DICE.permutation(len(PAIRS)):
            pair = PAIRS[index]
            if len(shared.targets) < 3 and pair.target not in shared.targets:
                shared = shared.share(pair.target, pair.source)
        maps.append(shared)
    model.fit(maps, [loss(shared) for shared in maps])
    wanted = [TRUE[pair] for pair in model.terms.keys]
    assert np.corrcoef(np.log(estimate(model)), np.log(wanted))[0, 1] > 0.75


def test_draws_spread_where_nothing_was_seen_and_not_where_it_was() -> None:
    model = LossModel(pair_terms(RANKING))
    seen = IDENTITY.share(9, 4)
    model.fit([seen] * 5, [0.1] * 5)
    rng = np.random.default_rng(1)
    logs = np.log([model.draw(rng) for _ in range(200)]).std(0)
    place = model.terms.of(seen)[0]
    assert logs[place] < 0.1
    assert logs[model.terms.of(IDENTITY.share(1, 0))[0]] > 0.5
    assert logs[place] < logs[model.terms.of(IDENTITY.share(9, 3))[0]] < 0.6  # a neighbour


def test_sums_of_draws_are_finite_however_wide_the_draw() -> None:
    model = LossModel(pair_terms(RANKING))
    model.fit(SINGLES[:5], [loss(single) for single in SINGLES[:5]])
    drawn = model.draw(np.random.default_rng(1), scale=1e4)
    assert 0 < drawn.sum() < np.inf
    assert (drawn > 0).all()


def test_a_loss_in_doubt_counts_for_less() -> None:
    """Off by half: believed where it is certain; in doubt, almost as if it were not there."""
    losses = [loss(single) for single in SINGLES]
    odd = 20
    wrong = [1.5 * value if n == odd else value for n, value in enumerate(losses)]
    misses = []
    for doubt in (0.0, 1.0):
        model = LossModel(pair_terms(RANKING))
        model.fit(SINGLES, wrong, [doubt if n == odd else 0.0 for n in range(len(SINGLES))])
        misses.append(float(np.log(estimate(model)[odd] / losses[odd])))
    without = LossModel(pair_terms(RANKING))
    without.fit(SINGLES[:odd] + SINGLES[odd + 1 :], losses[:odd] + losses[odd + 1 :])
    unseen = float(np.log(estimate(without)[odd] / losses[odd]))
    assert misses[0] > 0.2
    assert abs(misses[1] - unseen) < abs(misses[0] - unseen) / 3


def test_the_first_fit_does_not_depend_on_the_scale_of_losses() -> None:
    small, large = LossModel(pair_terms(RANKING)), LossModel(pair_terms(RANKING))
    small.fit(SINGLES[:9], [1e-3 * loss(single) for single in SINGLES[:9]])
    large.fit(SINGLES[:9], [loss(single) for single in SINGLES[:9]])
    assert np.argsort(estimate(small))[:3].tolist() == np.argsort(estimate(large))[:3].tolist()


def test_block_errors_order_the_pairs_until_losses_say_otherwise() -> None:
    errors = [[TRUE.get((t, s), float("nan")) ** 0.8 for s in range(LAYERS)] for t in range(LAYERS)]
    wanted = np.log([TRUE[p.target, p.source] for p in PAIRS])
    model = LossModel(pair_terms(RANKING, errors))
    assert np.corrcoef(np.log(estimate(model)), wanted)[0, 1] > 0.999
    # Layer 9 is much dearer than its errors say: a few of its pairs teach that of all of them.
    seen = [IDENTITY.share(9, s) for s in (0, 3, 6)] + [IDENTITY.share(t, 0) for t in (2, 5)]
    factor = {9: 4.0}
    before = estimate(model)
    model.fit(seen, [loss(m) * factor.get(m.targets[0], 1.0) for m in seen])
    ratio = {
        pair: after / b
        for pair, after, b in zip(model.terms.keys, estimate(model), before, strict=True)
    }
    level = np.mean([ratio[t, s] for t in (2, 5) for s in range(t)])
    assert all(ratio[9, s] > 2 * level for s in range(9))


def test_equal_keys_and_values_have_no_block_error_and_that_is_no_trouble() -> None:
    model = LossModel(pair_terms(RANKING, [[0.0] * LAYERS for _ in range(LAYERS)]))
    model.fit(SINGLES, [loss(single) for single in SINGLES])
    wanted = np.log([TRUE[pair] for pair in model.terms.keys])
    assert np.corrcoef(np.log(estimate(model)), wanted)[0, 1] > 0.9


def test_what_does_not_add_up_is_expected_of_maps_alike() -> None:
    odd = IDENTITY.share(3, 0).share(5, 0).share(8, 0).share(9, 0)
    alike = IDENTITY.share(3, 0).share(5, 0).share(8, 0).share(7, 0)
    unlike = IDENTITY.share(2, 1).share(4, 1).share(6, 1).share(7, 0)
    model = LossModel(pair_terms(RANKING))
    others = [IDENTITY.share(t, 1).share(t + 1, 1).share(7, 1).share(8, 1) for t in (2, 3, 4, 5)]
    add_up = [*SINGLES, *others]
    ratio = 0.7  # the four are less harm together
    model.fit([*add_up, odd], [loss(m) for m in add_up] + [ratio * loss(odd)])
    costs = estimate(model)
    added = [4**model.growth * costs[model.terms.of(m)].sum() for m in (odd, alike, unlike)]
    rest = model.expected([odd, alike, unlike], costs) / added
    assert ratio < rest[0] < rest[1] < rest[2]


def test_before_any_loss_the_pairs_alone_are_expected_to_count() -> None:
    model = LossModel(pair_terms(RANKING))
    maps, costs = SINGLES[:3], estimate(model)
    singly = [costs[model.terms.of(single)[0]] for single in maps]
    assert model.expected(maps, costs) == pytest.approx(singly)
