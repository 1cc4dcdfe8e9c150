"""Our map samplers: valid, new, reproducible, better than chance where the answer is known."""

import random
from collections.abc import Iterator
from itertools import combinations

import numpy as np
import optuna
import pytest

from kvsharer_exp.search.coordinator import Search, run_search
from kvsharer_exp.search.execution.local import LocalExecutor
from kvsharer_exp.search.outcome import Outcome, screen
from kvsharer_exp.search.samplers import make_sampler
from kvsharer_exp.search.spaces.registry import make_space
from kvsharer_exp.search.strategies.map_sampler import MapSampler
from kvsharer_exp.search.study import open_study
from kvsharer_exp.values.footprint import Footprint
from kvsharer_exp.values.ranking import DissimilarityRanking, LayerPair
from kvsharer_exp.values.sharing_map import SharingMap

LAYERS, MAX_SHARED = 16, 6
PAIRS = tuple(LayerPair(t, s, float((t * 7 + s * 3) % 11)) for t in range(LAYERS) for s in range(t))
RANKING = DissimilarityRanking("m", "d", LAYERS, tuple(sorted(PAIRS, key=lambda p: -p.distance)))
SPACE = make_space("layer_sources", RANKING, max_shared=MAX_SHARED)
DICE = np.random.default_rng(0)
TARGET_COST, SOURCE_COST = DICE.exponential(0.1, LAYERS), DICE.exponential(0.02, LAYERS)


def loss(sharing_map) -> float:
    """Costs of the layers that read and are read, and a little for every two readers together."""
    sharing_map = getattr(sharing_map, "sharing_map", sharing_map)  # the study has it as a plan
    costs = [
        TARGET_COST[t] + SOURCE_COST[sharing_map.kv_source_layers[t]] for t in sharing_map.targets
    ]
    return sum(costs) * (1 + 0.05 * len(costs))


def score(sharing_map, bar) -> Outcome:
    value = loss(sharing_map)
    return Outcome({screen(2): value, "kl": value}, "complete", "fit", -value)


BOTH = pytest.mark.parametrize("kind", ["evolution", "beam"])


def search(folder, kind: str, seed: int, n_trials: int = 120, **known):
    with open_study(f"{kind}-{seed}", storage=None, folder=folder) as store:
        return run_search(
            store,
            Search(
                SPACE,
                make_sampler(kind, space=SPACE, seed=seed, **known),
                lambda m: Footprint(1, len(m.owners) / LAYERS, 0),
            ),
            LocalExecutor(score),
            n_trials=n_trials,
        )


def best(found) -> np.ndarray:
    lowest = np.full(MAX_SHARED, 10.0)
    for result in found:
        size = len(result.sharing_map.targets)
        if size:
            lowest[size - 1] = min(lowest[size - 1], -result.score)
    return lowest


@pytest.mark.slow
def test_beats_random_at_every_size_and_finds_the_cheap_layers(tmp_path) -> None:
    wins = np.zeros(MAX_SHARED)
    for seed in range(3):
        wins += best(search(tmp_path, "evolution", seed)) <= best(search(tmp_path, "random", seed))
    assert wins.tolist() == [3] * MAX_SHARED
    optimum = [min(loss(SPACE_MAP.share(t, s)) for t in range(LAYERS) for s in range(t))]
    assert best(search(tmp_path, "evolution", 9))[0] == pytest.approx(optimum[0], rel=0.35)


@pytest.mark.slow
def test_block_errors_save_most_of_the_trials(tmp_path) -> None:
    """Errors that follow the losses of pairs, but for a factor of the target: a third does."""
    factors = np.random.default_rng(1).lognormal(0, 0.4, LAYERS)
    errors = [
        [factors[t] * loss(SPACE_MAP.share(t, s)) if s < t else np.nan for s in range(LAYERS)]
        for t in range(LAYERS)
    ]
    for seed in range(3):
        told = search(tmp_path / "told", "evolution", seed, 40, errors=errors)
        untold = search(tmp_path / "untold", "evolution", seed, 120)
        assert best_sum(told) < 1.05 * best_sum(untold)


def test_told_of_block_errors_evolution_tries_what_it_shares_alone_too(tmp_path) -> None:
    errors = [
        [loss(SPACE_MAP.share(t, s)) if s < t else np.nan for s in range(LAYERS)]
        for t in range(LAYERS)
    ]
    found = search(tmp_path, "evolution", 0, 40, errors=errors)
    alone = [r.sharing_map.targets[0] for r in found if len(r.sharing_map.targets) == 1]
    largest = max(found, key=lambda r: (len(r.sharing_map.targets), r.score))
    missing = set(largest.sharing_map.targets) - set(alone)
    assert len(missing) <= 1  # one that its last offspring brought; without singles four of six are
    assert len(alone) < 20


SPACE_MAP = SharingMap.identity(LAYERS)


def test_same_seed_same_maps_other_seed_other_maps(tmp_path) -> None:
    one, two, other = (
        [str(r.sharing_map) for r in search(tmp_path / name, "evolution", seed, 40)]
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert one == two != other


@BOTH
def test_suggests_maps_that_are_new_while_there_are_any(tmp_path, kind: str) -> None:
    with open_study("s", storage=None, folder=tmp_path) as store:
        sampler = make_sampler(kind, space=SPACE, seed=0)
        run_search(
            store,
            Search(SPACE, sampler, lambda m: Footprint(1, 1.0, 0)),
            LocalExecutor(score),
            n_trials=60,
        )
        assert store.count_trials() == 60  # no draw met a known map


@BOTH
def test_a_space_that_holds_few_maps_is_used_up(tmp_path, kind: str) -> None:
    few = DissimilarityRanking("m", "d", LAYERS, RANKING.pairs[:2])
    space = make_space("layer_sources", few, max_shared=1)
    with open_study("s", storage=None, folder=tmp_path) as store:
        found = run_search(
            store,
            Search(
                space,
                make_sampler(kind, space=space, seed=0),
                lambda m: Footprint(1, 1.0, 0),
            ),
            LocalExecutor(score),
            n_trials=50,
        )
    assert {str(r.sharing_map) for r in found} >= {
        str(SPACE_MAP.share(p.target, p.source)) for p in few.pairs
    }


@BOTH
def test_works_in_a_study_of_its_own_and_beside_other_parameters(kind: str) -> None:
    """What any Optuna sampler must do: relative and independent draws, reseeding, no results."""
    sampler = make_sampler(kind, space=SPACE, seed=0)
    study = optuna.create_study(directions=["minimize", "maximize"], sampler=sampler)
    dice = random.Random(0)
    for _ in range(8):
        trial = study.ask(SPACE.distributions())
        extra = trial.suggest_float("extra", 0, 1)
        assert 0 <= extra <= 1
        assert 0 < len(SPACE.decode(trial.params).targets) <= MAX_SHARED
        study.tell(trial, (dice.random(), extra))
    sampler.reseed_rng()
    assert study.ask(SPACE.distributions()).params.keys() == SPACE.distributions().keys()


def test_among_hundreds_under_way_a_proposal_serves_several_trials() -> None:
    proposed: list[int] = []

    class Pairs:
        """Proposes every map of two targets that read layer 0."""

        def propose(self, memory, rng) -> Iterator[SharingMap]:
            proposed.append(memory.under_way)
            for targets in combinations(range(1, LAYERS), 2):
                one, two = (int(target) for target in targets)
                yield memory.identity.share(one, 0).share(two, 0)

    study = optuna.create_study(sampler=MapSampler(SPACE, Pairs(), seed=0))
    asked = [study.ask(SPACE.distributions()) for _ in range(104)]
    assert len({SPACE.decode(trial.params) for trial in asked}) == 104
    assert proposed == [*range(1, 101), 102, 104]


def test_a_beam_extends_the_best_maps_measured(tmp_path) -> None:
    """Every size is tried ``tries`` times a round, by one pair more than a best smaller map."""
    found = search(tmp_path, "beam", 0, n_trials=2 * 10 * MAX_SHARED)
    sizes = [len(r.sharing_map.targets) for r in found]
    assert sizes[:60] == [size for size in range(1, 7) for _ in range(10)]
    for number, result in enumerate(found[10:60], 10):
        size = len(result.sharing_map.targets)
        before = [r for r in found[:number] if len(r.sharing_map.targets) == size - 1]
        best = sorted(before, key=lambda r: -r.score)[:2]
        parents = {
            one.sharing_map.share(t, s)
            for one in best
            for t in range(LAYERS)
            for s in range(t)
            if t not in one.sharing_map.targets
        }
        assert result.sharing_map in parents
    assert best_sum(found) < best_sum(search(tmp_path, "random", 0, n_trials=120))


def best_sum(found) -> float:
    return float(best(found).sum())
