"""The space of plans: every draw is a valid plan, solving is exact, and the search learns costs."""

from itertools import product

import numpy as np
import optuna
import pytest
import yaml
from optuna.samplers import RandomSampler

from kvsharer_exp.model.folders import data_dir
from kvsharer_exp.search.candidates import (
    Candidate,
    fixed_layers,
    full_bytes,
    priced,
    smallest,
    wanted_actions,
)
from kvsharer_exp.search.coordinator import Search, run_search
from kvsharer_exp.search.execution.base import Done, Task, attempt
from kvsharer_exp.search.execution.local import LocalExecutor
from kvsharer_exp.search.front import RUNGS, Rungs, best_per_rung, bytes_rung
from kvsharer_exp.search.outcome import FIT, Outcome, screen
from kvsharer_exp.search.samplers import make_sampler
from kvsharer_exp.search.solver import solve_all
from kvsharer_exp.search.spaces.base import encoded
from kvsharer_exp.search.spaces.layer_actions import LayerActions, Priced, repaired
from kvsharer_exp.search.spaces.registry import make_space
from kvsharer_exp.search.study import open_study
from kvsharer_exp.values.actions.affine import Affine
from kvsharer_exp.values.actions.base import Action
from kvsharer_exp.values.actions.drop import Drop
from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.actions.read import Read
from kvsharer_exp.values.actions.read_kv import ReadKV
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.footprint import Footprint
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.ranking import DissimilarityRanking, LayerPair
from kvsharer_exp.values.sharing_map import SharingMap
from kvsharer_exp.values.trial import TrialResult

LAYERS = 8
PAIRS = tuple(LayerPair(t, s, float(t - s)) for t in range(LAYERS) for s in range(t))
RANKING = DissimilarityRanking("m", "d", LAYERS, PAIRS)
BYTES = {16: 640, 4: 200, 2: 120}


def candidates(seed: int = 0, layers: int = LAYERS) -> list[Candidate]:
    dice = np.random.default_rng(seed)
    found = []
    for layer in range(layers):
        scale = dice.lognormal(0, 1)
        actions = [
            (Own(), 0.0, BYTES[16]),
            (Own(4), 0.01 * scale, BYTES[4]),
            (Own(2), 0.1 * scale * dice.lognormal(0, 0.3), BYTES[2]),
            (Affine(), 0.2 * scale * dice.lognormal(0, 0.5), 0),
            (Drop(), 0.5 * scale * dice.lognormal(0, 0.5), 0),
        ]
        if layer:
            source = int(dice.integers(layer))
            actions.append((Read(source), 0.3 * scale * dice.lognormal(0, 1), 0))
        found += [Candidate(layer, *action, BYTES[16]) for action in actions]
    return found


def space_of(found: list[Candidate], budgets: tuple[float, ...] = (0.1, 0.3)) -> LayerActions:
    space = make_space("layer_actions", RANKING, max_shared=3, candidates=found, budgets=budgets)
    assert isinstance(space, LayerActions)
    return space


SPACE = space_of(candidates())


@pytest.mark.parametrize("layer", ["٣", "1_0", "+1", " 1", 1.0, True, "x"])
def test_the_layers_of_fixed_are_numbers_as_those_of_a_plan(layer: object) -> None:
    """``int`` takes digits of any script, underscores, and 1.0."""
    assert fixed_layers({0: "own", "3": "x"}) == {0: "own", 3: "x"}
    with pytest.raises(InputError, match="give layers and what they do"):
        fixed_layers({layer: "own"})


def test_every_draw_is_a_valid_plan_that_comes_back() -> None:
    study = optuna.create_study(sampler=RandomSampler(seed=0))
    kinds = set()
    for _ in range(300):
        plan = SPACE.decode(study.ask(SPACE.distributions()).params)
        params = SPACE.encode(plan)
        assert params is not None
        assert SPACE.decode(params) == plan
        kinds |= {action.name for action in plan.actions}
    assert kinds == {"own", "affine", "drop", "read"}


def test_what_cannot_be_is_repaired() -> None:
    assert str(repaired([Own(), Drop(), Read(1), Read(0)])) == "0_x_2_0"
    assert str(repaired([Own(4), Read(0), Read(1)])) == "0q4_0_2"
    assert str(repaired([Drop(), Affine()])) == "0_a"


def test_a_plan_of_other_actions_is_not_in_the_space_and_a_map_may_be() -> None:
    assert SPACE.encode(KVPlan.full(LAYERS).replace(3, Own(8))) is None
    assert encoded(SPACE, KVPlan.full(LAYERS)) is not None
    maps = make_space("layer_sources", RANKING, max_shared=3)
    shared = SharingMap.identity(LAYERS).share(4, 1)
    assert encoded(maps, KVPlan.of(shared)) == maps.encode(shared)
    assert encoded(maps, KVPlan.full(LAYERS).replace(3, Drop())) is None


def costs_of(found: list[Candidate]) -> dict:
    return {(c.layer, c.action): c.error for c in found}


def test_solving_is_exact_without_reads_and_no_worse_with_them() -> None:
    found = candidates(1, 5)
    ranking = DissimilarityRanking("m", "d", 5, tuple(p for p in PAIRS if p.target < 5))
    space = make_space("layer_actions", ranking, max_shared=1, candidates=found)
    assert isinstance(space, LayerActions)
    costs = costs_of(found)

    def cost(plan: KVPlan) -> float:
        total = 0.0
        for layer, action in enumerate(plan.actions):
            source = action.keys_from(layer)
            total += costs[layer, action]
            if source not in (None, layer):
                total += costs[layer, plan.actions[source]]
        return total

    best: dict[int, float] = {}
    alone = [[c.action for c in of if c.action.name != "read"] for of in space.at]
    for actions in product(*alone):
        if any(action.name == "own" for action in actions):
            plan = KVPlan(actions)
            rung = space.rung(plan)
            best[rung] = min(best.get(rung, np.inf), cost(plan))
    solved = Priced(space, costs).solve()
    low, high = sorted(solved)[1], sorted(solved)[-2]
    assert Priced(space, costs).solve((low, high)) == {
        r: p for r, p in solved.items() if low <= r <= high
    }
    lowest = np.inf
    for rung in sorted(best):
        if best[rung] < lowest - 1e-12:
            lowest = best[rung]
            assert rung in solved
            assert cost(solved[rung]) <= lowest + 1e-12
    assert set(solved) <= set(best)


def test_what_is_kept_stays_and_the_rest_is_solved_within_the_rung() -> None:
    found = [c for c in candidates(1, 5) if c.action.name != "read"]
    ranking = DissimilarityRanking("m", "d", 5, tuple(p for p in PAIRS if p.target < 5))
    space = make_space("layer_actions", ranking, max_shared=0, candidates=found)
    assert isinstance(space, LayerActions)
    costs = costs_of(found)
    kept: dict[int, Action] = {1: Drop(), 3: Own(4)}
    layers = [
        [c.action for c in of if kept.get(i, c.action) == c.action] for i, of in enumerate(space.at)
    ]
    plans = [KVPlan(actions) for actions in product(*layers)]

    def cost(plan: KVPlan) -> float:
        return sum(costs[layer, action] for layer, action in enumerate(plan.actions))

    least = min(map(space.rung, plans))
    assert Priced(space, costs).solve_within(least - 1, kept) is None
    for rung in range(least, 65):
        best = min(cost(plan) for plan in plans if space.rung(plan) <= rung)
        solved = Priced(space, costs).solve_within(rung, kept)
        assert solved is not None and space.rung(solved) <= rung
        assert cost(solved) == pytest.approx(best)
    with pytest.raises(InputError, match="layer 3 has no choice"):
        Priced(space, costs).solve_within(64, {3: Own(8)})


def test_halves_are_proposed_where_both_of_their_sources_own() -> None:
    half = ReadKV(0, 1)
    found = [Candidate(i, Own(), 0.0, 640, 640) for i in range(3)]
    found += [Candidate(1, Drop(), 0.6, 0, 640), Candidate(2, Drop(), 0.5, 0, 640)]
    found += [Candidate(2, Read(0), 0.4, 0, 640), Candidate(2, half, 0.1, 0, 640)]
    ranking = DissimilarityRanking("m", "d", 3, tuple(p for p in PAIRS if p.target < 3))
    space = make_space("layer_actions", ranking, max_shared=1, candidates=found)
    assert isinstance(space, LayerActions)
    solved = {str(plan) for plan in Priced(space, costs_of(found)).solve().values()}
    assert solved == {"0_1_2", "0_1_0k1v", "0_x_0"}
    plan = KVPlan.parse("0_1_0k1v")
    assert space.decode(space.encode(plan) or {}) == plan
    assert str(space.decode({"action_0": "0", "action_1": "x", "action_2": "0k1v"})) == "0_x_2"
    choices, reads = priced(found, costs_of(found))  # the integer program leaves them out
    assert [(read.layer, read.source) for read in reads] == [(2, 0)]
    assert half not in [choice.action for choice in choices]
    with pytest.raises(InputError, match="has halves without read: give both"):
        make_space("layer_actions", ranking, max_shared=1, actions=["own", "halves"])


def test_solved_seeds_meet_their_budgets_within_a_percent_of_the_bound() -> None:
    seeds = SPACE.seeds()
    assert seeds.gap <= 0.01
    assert {plan for plan in seeds.plans if SPACE.kv_bytes(plan) <= 0.1 * SPACE.full_bytes}
    assert all(SPACE.encode(plan) is not None for plan in seeds.plans)


TRUE = {
    key: error * np.random.default_rng(7).lognormal(0, 0.8, 1000)[i]
    for i, (key, error) in enumerate(costs_of(candidates()).items())
}


def loss(plan: KVPlan) -> float:
    """Costs unlike the block errors, which together do more than add up."""
    total = 0.0
    for layer, action in enumerate(plan.actions):
        source = action.keys_from(layer)
        total += TRUE[layer, action]
        if source not in (None, layer):
            total += TRUE[layer, plan.actions[source]]
    return 1e-4 + total * (
        1 + 0.1 * sum(a.keys_from(i) is None for i, a in enumerate(plan.actions))
    )


def score(plan, bar) -> Outcome:
    value = loss(plan)
    return Outcome({screen(2): value, FIT: value, "kl": value}, "complete", "fit", -value)


def size(plan: KVPlan) -> Footprint:
    kept = SPACE.kv_bytes(plan)
    return Footprint(kept, kept / SPACE.full_bytes, 0)


def searched(folder, kind: str, n_trials: int, seed: int = 0, seeds=()):
    with open_study(f"{kind}{seed}{n_trials}", storage=None, folder=folder) as store:
        sampler = make_sampler(kind, space=SPACE, seed=seed, trials_so_far=store.count_trials())
        asked = Search(SPACE, sampler, size, seeds)
        return run_search(store, asked, LocalExecutor(score), n_trials=n_trials)


def test_evolution_solves_learns_and_beats_random_on_the_rungs_asked(tmp_path) -> None:
    seeds = [("solved", plan) for plan in SPACE.seeds().plans]
    found = searched(tmp_path, "evolution", 90, seeds=seeds)
    assert len({result.plan for result in found}) == 90
    low, high = SPACE.rungs
    asked = [SPACE.steps(r) <= high for r in found if r.origin == "sampler"]
    assert np.mean(asked) > 0.8  # the others were drawn at random where nothing new was proposed
    first, best = (best_per_rung(part, SPACE.steps) for part in (found[: len(seeds)], found))
    random = best_per_rung(searched(tmp_path, "random", 300), SPACE.steps)

    def at(best: dict, rung: int) -> float:
        return max(r.score for step, r in best.items() if step <= rung)

    for rung in (low, (low + high) // 2, high):
        assert at(best, rung) >= at(random, rung)
    gains = [at(first, rung) / at(best, rung) for rung in range(low, high)]
    assert np.mean(gains) > 1.1  # verified losses corrected the costs


def test_evolution_proposes_in_the_rungs_asked_also_where_most_near_plans_are_known(
    tmp_path,
) -> None:
    """What is drawn at random, where nothing new is proposed, is anywhere."""
    seeds = [("solved", plan) for plan in SPACE.seeds().plans]
    found = searched(tmp_path, "evolution", 200, seed=1, seeds=seeds)
    assert all(SPACE.steps(r) <= SPACE.rungs[1] for r in found if r.origin == "sampler")


def test_the_same_seed_gives_the_same_plans_and_a_study_goes_on(tmp_path) -> None:
    one, two = (searched(tmp_path / name, "evolution", 25) for name in "ab")
    assert [r.plan for r in one] == [r.plan for r in two]
    assert [r.plan for r in searched(tmp_path / "c", "evolution", 25, seed=1)] != [
        r.plan for r in one
    ]


class Unordered:
    """An executor of four workers, of which the one that began last is done first."""

    def __init__(self) -> None:
        self._running: list[Task] = []
        self.plans: list[KVPlan] = []

    @property
    def room(self) -> int:
        return 4 - len(self._running)

    def submit(self, tasks) -> None:
        self._running += tasks
        self.plans += [task.plan for task in tasks]

    def wait(self) -> list[Done]:
        return [attempt(score, self._running.pop())]

    def withdraw(self) -> list[Task]:
        return []


@pytest.mark.parametrize("kind", ["evolution", "beam", "tpe", "nsgaii"])
def test_samplers_know_what_is_under_way_whatever_ends_first(tmp_path, kind: str) -> None:
    executor = Unordered()
    with open_study("s", storage=None, folder=tmp_path) as store:
        sampler = make_sampler(kind, space=SPACE, seed=0)
        asked = Search(SPACE, sampler, size, [("solved", plan) for plan in SPACE.seeds().plans])
        found = run_search(store, asked, executor, n_trials=40)
        stored, cached = store.results(), store.count_cached()
    assert found == stored
    assert [result.number for result in found] == sorted(result.number for result in found)
    assert len(set(executor.plans)) == len(executor.plans) == 40
    if kind in ("evolution", "beam"):
        assert not cached  # they propose nothing that is under way


@pytest.mark.parametrize("kind", ["evolution", "beam", "tpe", "nsgaii", "random"])
def test_a_study_that_is_continued_is_the_one_that_was_never_stopped(tmp_path, kind: str) -> None:
    seeds = [("solved", plan) for plan in SPACE.seeds().plans[:5]]

    def search(folder, n_trials: int) -> list:
        with open_study("s", storage=None, folder=folder) as store:
            asked = Search(SPACE, make_sampler(kind, space=SPACE, seed=3), size, seeds)
            found = run_search(store, asked, LocalExecutor(score), n_trials=n_trials)
            return [(r.number, r.plan, r.origin, r.score) for r in found], store.count_cached()

    whole = search(tmp_path / "whole", 30)
    for n_trials in (3, 11, 12, 30):
        parts = search(tmp_path / "parts", n_trials)
    assert parts == whole


@pytest.mark.slow
def test_a_beam_goes_down_the_rungs_by_one_layer_at_a_time(tmp_path) -> None:
    sampler = make_sampler("beam", space=SPACE, seed=0, tries=3)
    with open_study("beam", storage=None, folder=tmp_path) as store:
        asked = Search(SPACE, sampler, size)
        found = run_search(store, asked, LocalExecutor(score), n_trials=60)
    plans = [KVPlan.full(LAYERS)]
    for result in found:
        changes = [
            sum(a != b for a, b in zip(result.plan.texts, plan.texts, strict=True))
            for plan in plans
        ]
        assert 1 in changes
        plans.append(result.plan)
    assert len(set(plans)) == 61
    assert min(map(SPACE.rung, plans)) < 32


def kept(share: float) -> TrialResult:
    held = Footprint(0, share, 0)
    return TrialResult(0, {}, KVPlan.full(LAYERS), {}, held, "complete", "all", 0.0, score=-1.0)


def test_a_rung_is_a_64th_of_the_full_caches_bytes() -> None:
    for held in (0, 1, 79, 80, 81, 5120):
        assert bytes_rung(kept(held / 5120)) == -(-held * RUNGS // 5120)
    space = space_of(candidates(), budgets=(0.25,))
    assert space.rung(KVPlan.full(LAYERS)) == RUNGS
    assert [space.budget(rung) for rung in (0, 1, RUNGS)] == [0, 80, 5120]


def test_a_budget_cuts_its_rung_and_what_keeps_more_does_not_compete_with_it() -> None:
    cut = Rungs((0.29, 0.25))
    assert len(cut.ends) == RUNGS + 2
    assert cut(kept(0.28125)) < cut(kept(0.285)) == cut(kept(0.29)) < cut(kept(0.291))
    assert bytes_rung(kept(0.285)) == bytes_rung(kept(0.291))


def test_a_budget_that_is_no_64th_is_used_up() -> None:
    """It was rounded down to one: 15 % of the bytes were searched as 14.1 %."""
    found = [c for c in candidates() if not isinstance(c.action, Read)]
    costs = costs_of(found)
    front = solve_all(priced(found, costs)[0])
    between = [best for best in front if best.kv_bytes * RUNGS % full_bytes(found)]
    assert len(between) > 5
    for best in between:
        space = space_of(found, budgets=(best.kv_bytes / full_bytes(found),))
        rung = space.rungs[0]
        assert space.budget(rung) == best.kv_bytes
        assert Priced(space, costs).solve()[rung] == best.plan
        assert Priced(space, costs).solve_within(rung, {}) == best.plan
        assert best.plan in space.seeds().plans


def test_the_full_cache_may_be_all_that_is_asked_for() -> None:
    """No seed loses anything then, and none is above the bound."""
    seeds = space_of(candidates(), budgets=(1.0,)).seeds()
    assert seeds.plans == (KVPlan.full(LAYERS),)
    assert seeds.gap == 0


def test_the_smallest_plan_may_be_the_budget() -> None:
    found = [c for c in candidates(layers=7) if c.action in (Own(), Own(2))]
    found.append(Candidate(7, Own(3), 0.1, 130, BYTES[16]))
    least = smallest(found) / full_bytes(found)
    assert least * RUNGS % 1  # no 64th
    plan = KVPlan((*[Own(2)] * 7, Own(3)))
    assert plan in space_of(found, budgets=(least,)).seeds().plans


def test_bytes_are_shares_of_the_full_cache_also_where_16_bits_are_no_candidate() -> None:
    found = [c for c in candidates() if c.action != Own() and c.action != Affine()]
    space = space_of(found, budgets=(0.2,))
    assert space.full_bytes == LAYERS * BYTES[16]
    plan = KVPlan.parse("_".join(f"{layer}q2" for layer in range(LAYERS)))
    assert space.rung(plan) == 12  # 120 of 640 bytes are 12 of 64 rungs
    assert space.kv_bytes(KVPlan.full(LAYERS)) == space.full_bytes
    assert min(map(space.kv_bytes, space.seeds().plans)) <= 0.2 * space.full_bytes
    assert smallest(found) == BYTES[2]


def test_options_name_actions_and_fix_layers() -> None:
    texts = ["own", "q4", "q3g64s4", "x", "read"]
    assert wanted_actions(3, texts, {}) == [Own(), Own(4), Own(3, 64, 4), Drop()]
    assert wanted_actions(3, texts, {3: "a"}) == [Affine()]
    for text in ("nope", "q5x", "0", "1k2v", "3k1v", "1k3v"):
        with pytest.raises(InputError, match="is no action of layer 3"):
            wanted_actions(3, [text], {})
    with pytest.raises(InputError, match="give a list like"):
        make_space("layer_actions", RANKING, max_shared=1, actions="own")


@pytest.mark.parametrize("name", ["layer_actions", "joint_actions"])
def test_the_spaces_of_plans_name_actions_that_every_layer_can_read(name: str) -> None:
    options = yaml.safe_load((data_dir("search_spaces") / f"{name}.yaml").read_text())["options"]
    texts = [text for text in options["actions"] if text != "read"]
    for layer in (0, 7):
        assert len(wanted_actions(layer, texts, {})) == len(texts)
