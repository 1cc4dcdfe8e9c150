"""The coordinator: budget, known maps, seeds, resuming after a kill, one owner at a time."""

import fcntl
import multiprocessing
import os
import socket
import threading
from typing import Any

import optuna
import pytest
import yaml
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from kvsharer_exp.model.folders import data_dir
from kvsharer_exp.search.coordinator import Search, run_search
from kvsharer_exp.search.execution.local import LocalExecutor
from kvsharer_exp.search.outcome import Outcome
from kvsharer_exp.search.paper.greedy import trailing_layers
from kvsharer_exp.search.samplers import SAMPLERS, STRATEGIES, check_sampler, make_sampler
from kvsharer_exp.search.spaces.registry import SPACES, make_space
from kvsharer_exp.search.study import open_study
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.footprint import Footprint
from kvsharer_exp.values.ranking import DissimilarityRanking, LayerPair
from kvsharer_exp.values.sharing_map import SharingMap

LAYERS = 8
PAIRS = tuple(LayerPair(t, s, float(t - s)) for t in range(LAYERS) for s in range(t))
RANKING = DissimilarityRanking("m", "d", LAYERS, PAIRS)
SEEDS = [(f"trailing {n}", trailing_layers(PAIRS, LAYERS, n)) for n in (1, 2, 3)]
SPACE = make_space("layer_sources", RANKING, max_shared=3, seeds=[m for _, m in SEEDS])


def size(sharing_map: SharingMap) -> Footprint:
    return Footprint(len(sharing_map.owners), len(sharing_map.owners) / LAYERS, 0)


class Scorer:
    """Counts how often each map is scored; screens out maps whose layer 1 is a target."""

    def __init__(self) -> None:
        self.scored: list[str] = []

    def __call__(self, plan, bar) -> Outcome:
        sharing_map = plan.sharing_map
        self.scored.append(str(sharing_map))
        if 1 in sharing_map.targets:
            return Outcome({}, "screened_out", "screen", reason="layer 1")
        loss = sum(0.01 * (t - s) for t, s in enumerate(sharing_map.kv_source_layers))
        return Outcome({"kl": loss}, "complete", "fit", -loss)


def search(folder, scorer, n_trials: int, *, sampler: str = "random", space=SPACE, **more):
    with open_study("s", storage=more.pop("storage", None), folder=folder) as store:
        drawn = make_sampler(sampler, space=space, seed=0, trials_so_far=store.count_trials())
        ahead = {name: more.pop(name) for name in ("together", "look_ahead") if name in more}
        executor = LocalExecutor(scorer, **ahead)
        asked = Search(space, drawn, size, SEEDS)
        found = run_search(store, asked, executor, n_trials=n_trials, **more)
        return found, store.study.get_trials(), store.count_cached()


# Spaces of at least 25 maps; a Gaussian process takes a second a draw, so it is tried in one.
def holds_many(kind: str) -> bool:
    """Whether the space holds at least 25 maps, as far as random draws can tell."""
    space = make_space(kind, RANKING, max_shared=3, seeds=[m for _, m in SEEDS])
    study = optuna.create_study(sampler=RandomSampler(seed=0))
    drawn = {space.decode(study.ask(space.distributions()).params) for _ in range(400)}
    return len(drawn) >= 25


MAPS = [kind for kind, space in SPACES.items() if not space.holds_plans]
KINDS = sorted(filter(holds_many, MAPS))
BOTH = [(s, k) for s in (*SAMPLERS, *STRATEGIES) for k in KINDS if s != "gp" or k == "ranked_pairs"]


@pytest.mark.parametrize(("sampler", "kind"), BOTH)
def test_scores_the_seeds_first_and_no_map_twice(tmp_path, sampler: str, kind: str) -> None:
    scorer = Scorer()
    space = make_space(kind, RANKING, max_shared=3, seeds=[m for _, m in SEEDS])
    wanted = 15 if sampler == "gp" else 25  # its first ten are drawn by chance
    found, trials, cached = search(tmp_path, scorer, wanted, sampler=sampler, space=space)
    assert len(found) == len(scorer.scored) == len(set(scorer.scored)) == wanted
    assert [r.origin for r in found[:4]] == ["trailing 1", "trailing 2", "trailing 3", "sampler"]
    assert len(trials) == wanted + cached
    assert all(r.score is None for r in found if r.status != "complete")
    for result, trial in ((r, trials[r.number]) for r in found):
        expected = TrialState.COMPLETE if result.status == "complete" else TrialState.PRUNED
        assert trial.state == expected
        if result.score is not None:
            assert trial.values == [result.footprint.kv_fraction, result.score]


@pytest.mark.parametrize("sampler", ["random", "tpe", *STRATEGIES])
def test_maps_asked_together_are_new_ones_and_scored_once(tmp_path, sampler: str) -> None:
    scorer, seen = Scorer(), []
    found, trials, cached = search(
        tmp_path, scorer, 22, sampler=sampler, together=4, look_ahead=seen.append
    )
    assert len(found) == len(scorer.scored) == len(set(scorer.scored)) == 22
    assert len(trials) == 22 + cached
    assert all(1 < len(maps) == len(set(maps)) <= 4 for maps in seen)
    ahead = [str(sharing_map) for maps in seen for sharing_map in maps]
    assert len(ahead) == len(set(ahead))
    assert set(ahead) <= set(scorer.scored)
    if sampler in STRATEGIES:  # they do not propose what is under way
        assert [len(maps) for maps in seen] == [4, 4, 4, 4, 4, 2]
        assert not cached


@pytest.mark.parametrize("storage", ["journal", "sqlite"])
def test_the_same_command_continues(tmp_path, storage: str) -> None:
    url = f"sqlite:///{tmp_path}/study.db" if storage == "sqlite" else None
    first, second = Scorer(), Scorer()
    before, _, _ = search(tmp_path, first, 10, storage=url)
    after, _, _ = search(tmp_path, second, 15, storage=url)
    assert after[:10] == before
    assert len(after) == 15
    assert not set(first.scored) & set(second.scored)
    again, _, _ = search(tmp_path, second, 15, storage=url)
    assert again == after


def test_same_seed_same_maps(tmp_path) -> None:
    one, two = Scorer(), Scorer()
    search(tmp_path / "a", one, 20, sampler="tpe")
    search(tmp_path / "b", two, 20, sampler="tpe")
    assert one.scored == two.scored


def test_a_small_space_ends_instead_of_asking_for_ever(tmp_path) -> None:
    few = DissimilarityRanking("m", "d", LAYERS, PAIRS[:2])
    space = make_space("layer_sources", few, max_shared=1)
    with open_study("s", storage=None, folder=tmp_path) as store:
        sampler = make_sampler("random", space=space, seed=0)
        asked = Search(space, sampler, size)
        found = run_search(store, asked, LocalExecutor(Scorer()), n_trials=50)
        assert len(found) == 2
        assert 200 <= store.count_cached() < 300


class Stubborn(RandomSampler):
    """Draws the same parameters every time."""

    def sample_independent(self, study, trial, name, distribution):
        return distribution.choices[0] if hasattr(distribution, "choices") else distribution.low


def test_a_sampler_that_insists_on_a_known_map_is_helped_out(tmp_path) -> None:
    with open_study("s", storage=None, folder=tmp_path) as store:
        asked = Search(SPACE, Stubborn(), size)
        found = run_search(store, asked, LocalExecutor(Scorer()), n_trials=5)
        assert len(found) == 5
        assert store.count_cached() >= 4 * 10


def test_failures_are_kept_with_their_reason(tmp_path) -> None:
    def broken(sharing_map, bar) -> Outcome:
        raise RuntimeError("out of\nmemory")

    found, trials, _ = search(tmp_path, broken, 4)
    assert {r.status for r in found} == {"failed"}
    assert found[0].reason == "RuntimeError: out of memory"
    assert found[0].score is None
    assert found[0].scores == {}
    assert {t.state for t in trials} == {TrialState.FAIL}


def test_our_own_mistakes_end_the_run(tmp_path) -> None:
    def wrong(sharing_map, bar) -> Outcome:
        raise KeyError("typo")

    with pytest.raises(KeyError):
        search(tmp_path, wrong, 4)


def test_minutes_end_the_search(tmp_path) -> None:
    found, _, _ = search(tmp_path, Scorer(), 10_000, minutes=1e-9)
    assert found == []


def test_results_arrive_as_they_are_stored(tmp_path) -> None:
    seen = []
    found, _, _ = search(tmp_path, Scorer(), 6, on_result=lambda one: bool(seen.append(one)))
    assert seen == found


def test_whoever_gets_the_results_may_end_the_search(tmp_path) -> None:
    found, _, _ = search(tmp_path, Scorer(), 20, on_result=lambda one: one.number == 7)
    assert found[-1].number == 7


def test_a_second_owner_is_refused(tmp_path) -> None:
    with open_study("s", storage=None, folder=tmp_path):
        with pytest.raises(
            InputError,
            match=f"study s is being run by process {os.getpid()} of {socket.gethostname()}:",
        ):
            with open_study("s", storage=None, folder=tmp_path):
                pass
    with open_study("s", storage=None, folder=tmp_path) as store:
        assert store.count_trials() == 0


@pytest.mark.parametrize("address", ["{}", "sqlite:///{}"])
def test_a_second_owner_of_one_file_is_refused_from_any_folder(tmp_path, address: str) -> None:
    """Each had a lock in its own folder, and both searched."""
    (tmp_path / "shared").mkdir()
    storage = address.format(tmp_path / "shared" / "of_all.db")
    with open_study("s", storage=storage, folder=tmp_path / "a") as store:
        with pytest.raises(InputError, match=f"study s is being run by process {os.getpid()} of"):
            with open_study("s", storage=storage, folder=tmp_path / "b"):
                pass
        with open_study("other", storage=storage, folder=tmp_path / "b") as other:
            assert other.count_trials() == 0
        key = store.key
    with open_study("s", storage=storage, folder=tmp_path / "b") as store:
        assert store.key == key


def test_who_looks_at_the_lock_for_an_instant_keeps_nobody_out(tmp_path) -> None:
    with open_study("s", storage=None, folder=tmp_path):
        pass
    with (tmp_path / "s.lock").open() as looks:
        fcntl.flock(looks, fcntl.LOCK_SH)  # as `study_status` does
        away = threading.Timer(0.05, looks.close)
        away.start()
        with open_study("s", storage=None, folder=tmp_path) as store:
            assert store.results() == []
        away.join()


def _open_in_a_new_database(url: str, folder, name: str, ready) -> None:
    ready.wait()
    with open_study(name, storage=url, folder=folder) as store:
        assert store.name == name


@pytest.mark.slow
def test_studies_that_begin_at_once_may_make_one_database(tmp_path) -> None:
    """Public fault 7, for `study.storage`: Optuna's tables were made by each process at once."""
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Barrier(3)
    three = [
        spawn.Process(
            target=_open_in_a_new_database,
            args=(f"sqlite:///{tmp_path}/study.db", tmp_path, name, ready),
        )
        for name in "abc"
    ]
    for process in three:
        process.start()
    for process in three:
        process.join()
    assert [process.exitcode for process in three] == [0, 0, 0]


def test_a_study_keeps_its_key_whatever_becomes_of_its_journal(tmp_path) -> None:
    keys = []
    for fresh in (False, False, True):
        with open_study("s", storage=None, folder=tmp_path, fresh=fresh) as store:
            keys.append(store.key)
    (tmp_path / "s.journal").unlink()
    with open_study("s", storage=None, folder=tmp_path) as store:
        keys.append(store.key)
    assert len(keys[0]) == 32
    assert set(keys) == {keys[0]}
    with open_study("t", storage=None, folder=tmp_path) as store:
        assert store.key not in keys
    for half in ("", keys[0][:9], "\0" * 32):  # its maker was killed
        (tmp_path / "s.lock").write_text(half)
        with open_study("s", storage=None, folder=tmp_path) as store:
            assert len(store.key) == 32
            assert store.key != keys[0]
            assert (tmp_path / "s.lock").read_text().splitlines()[0] == store.key


def test_fresh_forgets(tmp_path) -> None:
    search(tmp_path, Scorer(), 5)
    with open_study("s", storage=None, folder=tmp_path, fresh=True) as store:
        assert store.results() == []


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("sqlite:////no/such/folder/x.db", "study s cannot be opened"),
        ("nonsense://x", "study.storage=nonsense://… is no database"),
    ],
)
def test_a_storage_that_cannot_be_opened_is_one_line(tmp_path, url: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as refused:
        with open_study("s", storage=url, folder=tmp_path):
            pass
    assert "\n" not in str(refused.value)


def test_a_file_that_is_no_journal_is_one_line(tmp_path) -> None:
    (tmp_path / "s.journal").write_text("not a journal\n")
    with pytest.raises(InputError, match="study s cannot be opened"):
        with open_study("s", storage=None, folder=tmp_path):
            pass


def test_sampler_refusals() -> None:
    with pytest.raises(InputError, match=r"sampler\.kind=tpee is unknown"):
        make_sampler("tpee", space=SPACE, seed=0)
    with pytest.raises(InputError, match="sampler tpe does not take these options"):
        make_sampler("tpe", space=SPACE, seed=0, populations=3)


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("evolution", {"elites": 0}, r"sampler\.options\.elites=0: give at least 1"),
        ("evolution", {"offspring": 1.5}, r"offspring=1\.5: give a whole number"),
        ("evolution", {"explore": "a"}, "explore=a: give a number, at least 0"),
        ("beam", {"width": "two"}, "width=two: give a whole number"),
        ("beam", {"wide": 2}, "beam does not take these options .*keyword argument 'wide'"),
        ("nsgaii", {"population_size": 1}, "nsgaii does not take .* greater than or equal to 2"),
    ],
)
def test_options_of_a_sampler_are_refused_before_there_is_a_space(
    kind: str, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        check_sampler(kind, **options)


@pytest.mark.parametrize("kind", [*SAMPLERS, *STRATEGIES])
def test_every_sampler_takes_the_options_of_its_file(kind: str) -> None:
    held = yaml.safe_load(
        (data_dir("conf") / "sampler" / f"{kind}.yaml").read_text(encoding="utf-8")
    )
    assert held["kind"] == kind
    check_sampler(kind, **held["options"])
