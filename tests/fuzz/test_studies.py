"""A study that is damaged is read or refused, and never made worse."""

import json
from pathlib import Path

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsharer_exp.search.candidates import Candidate
from kvsharer_exp.search.coordinator import run_search
from kvsharer_exp.search.execution.base import Worker
from kvsharer_exp.search.execution.local import LocalExecutor
from kvsharer_exp.search.spool import Spool, trial_from_json, trial_to_json
from kvsharer_exp.search.study import open_study
from kvsharer_exp.search.study_status import Progress, status_of
from kvsharer_exp.search.study_store import StudyStore
from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.plan import KVPlan
from tests.fuzz.mutations import damaged_file, damaged_lines, read_or_refused, sizes
from tests.search import cheap
from tests.search.cheap_scores import make_score

PROGRESS = Progress(None, 0.0, 60.0, 2, 9, None, (Worker("busy", "0_1q4", 50.0), Worker("free")))
PLAN = KVPlan.full(cheap.LAYERS)


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The journal of a short search, with everything that a sweep keeps in it."""
    folder = tmp_path_factory.mktemp("journal")
    score = make_score(json.dumps({"log": str(folder / "log.txt"), "fails": [2]}))
    with open_study("s", storage=None, folder=folder) as store:
        store.claim({"seed": 0})
        store.mlflow_run_id, store.front_runs = "run", ["a", "b"]
        store.seeds = [("paper", PLAN)]
        store.keep_final(PLAN, [0.5, 0.25])
        store.candidates = [Candidate(1, Own(4), 0.5, 10, 40)]
        store.keep_map_run(PLAN, "child")
        store.keep_held_out("key", {"digest": ({"kl": 0.5}, {"kl": [0.4, 0.6]})})
        run_search(store, cheap.search(), LocalExecutor(score), n_trials=4)
    return (folder / "s.journal").read_bytes()


@pytest.fixture(scope="module")
def spool(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A spool with an attribute and two trials."""
    path = tmp_path_factory.mktemp("spool") / "s.spool"
    study = optuna.create_study(directions=["minimize", "maximize"])
    study.optimize(lambda t: (t.suggest_float("x", 0, 1), t.suggest_int("y", 1, 3)), n_trials=2)
    kept = Spool(path, "here 1")
    kept.append({"attribute": "a", "value": [1]})
    for trial in study.trials:
        kept.append({"trial": trial_to_json(trial)})
    return path.read_bytes()


def read_all(store: StudyStore) -> None:
    """Read everything that a study keeps."""
    store.claim({"seed": 0})
    assert len(store.results()) <= store.count_trials()
    assert store.count_cached() <= store.count_trials()
    assert all(isinstance(params, dict) for _, params in store.under_way())
    assert all(isinstance(run, str) for run in [store.mlflow_run_id, *store.front_runs])
    assert all(isinstance(plan, KVPlan) for _, plan in store.seeds or ())
    assert all(isinstance(one, Candidate) for one in store.candidates or ())
    assert all(sum(losses) < 1e300 for losses in store.finals.values())
    assert isinstance(store.map_run(PLAN), str)
    assert all(isinstance(run, str) for run in store.map_runs().values())
    assert all(isinstance(scores, dict) for scores, _ in store.held_out("key").values())


@sizes(150)
def test_journals(size: settings, journal: bytes, tmp_path: Path) -> None:
    folder = tmp_path

    @size
    @given(damaged_lines(journal))
    def check(content: bytes) -> None:
        path = folder / "s.journal"
        path.write_bytes(content)
        with read_or_refused(folder):
            status_of("s", folder=folder).to_dict()
        assert path.read_bytes() == content
        whole = content[: content.rfind(b"\n") + 1]
        with read_or_refused(folder, "s.lock", "s.journal"):
            with open_study("s", storage=None, folder=folder) as store:
                whole = path.read_bytes()
                read_all(store)
        # A half last record may be cut off, and a study that is not in the file may be added.
        assert path.read_bytes().startswith(whole) or path.read_bytes() == content

    check()


@sizes(150)
def test_spools(size: settings, spool: bytes, tmp_path: Path) -> None:
    path = tmp_path / "s.spool"

    @size
    @given(damaged_lines(spool))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        with read_or_refused(tmp_path):
            for write in Spool(path, "here 1").writes():
                assert "attribute" in write or trial_from_json(write["trial"]).state.is_finished()

    check()


@sizes(150)
def test_progress(size: settings, journal: bytes, tmp_path: Path) -> None:
    (tmp_path / "s.journal").write_bytes(journal)

    @size
    @given(damaged_file(PROGRESS.to_dict()))
    def check(content: bytes) -> None:
        (tmp_path / "s.progress.json").write_bytes(content)
        with read_or_refused(tmp_path):
            assert json.dumps(status_of("s", folder=tmp_path).to_dict(), allow_nan=False)

    check()


@sizes(50, 1000)
def test_locks(size: settings, journal: bytes, tmp_path: Path) -> None:
    (tmp_path / "s.journal").write_bytes(journal)

    @size
    @given(st.binary(max_size=60))
    def check(content: bytes) -> None:
        (tmp_path / "s.lock").write_bytes(content)
        with read_or_refused(tmp_path):
            assert status_of("s", folder=tmp_path).owner == ""
        with open_study("s", storage=None, folder=tmp_path) as store:
            assert len(store.key) == 32

    check()
