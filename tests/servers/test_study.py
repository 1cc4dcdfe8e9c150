"""A study in a real PostgreSQL server: it continues, and loses nothing while the server is away."""

import json
import logging
import multiprocessing
import os
import signal
import socket
from collections import Counter
from pathlib import Path

import optuna
import pytest
from optuna.storages import InMemoryStorage

from kvsharer_exp.search.coordinator import Search, run_search
from kvsharer_exp.search.execution.local import LocalExecutor
from kvsharer_exp.search.outcome import Outcome
from kvsharer_exp.search.samplers import make_sampler
from kvsharer_exp.search.study import open_study
from kvsharer_exp.search.study_status import status_of
from kvsharer_exp.search.study_store import VERSION, StudyStore
from kvsharer_exp.values.errors import InputError, UnansweredError
from kvsharer_exp.values.ports import free_port
from tests.search.test_study import SEEDS, SPACE, Scorer, size
from tests.servers.postgres import PASSWORD, Cluster
from tests.servers.stored import stored_trials

ENDED = "select pg_terminate_backend(pid) from pg_stat_activity"


def search(store: StudyStore, scorer, n_trials: int):
    sampler = make_sampler("random", space=SPACE, seed=0, trials_so_far=store.count_trials())
    asked = Search(SPACE, sampler, size, SEEDS)
    return run_search(store, asked, LocalExecutor(scorer), n_trials=n_trials)


class Acting(Scorer):
    """Does something before it scores certain maps."""

    def __init__(self, **acts) -> None:
        super().__init__()
        self._acts = {int(name.removeprefix("at_")): act for name, act in acts.items()}

    def __call__(self, plan, bar) -> Outcome:
        act = self._acts.get(len(self.scored))
        if act is not None:
            act()
        return super().__call__(plan, bar)


def held_by(database: str) -> tuple[list[str], Counter]:
    """The results in the server in order of their numbers, and how often each plan is there."""
    results = [trial for trial in stored_trials(database, "s") if "result" in trial.user_attrs]
    kept = [json.loads(trial.user_attrs["result"]) for trial in results]
    assert [one["number"] for one in kept] == [trial.number for trial in results]
    texts = [str(one.get("plan") or one.get("kv_source_layers")) for one in kept]
    return texts, Counter(texts)


def test_status_names_who_runs_a_study_from_another_folder(tmp_path, database) -> None:
    def owner() -> str:
        return status_of("s", folder=tmp_path / "b", storage=database).owner

    with open_study("s", storage=database, folder=tmp_path / "a") as store:
        search(store, Scorer(), 3)
        assert owner() == f"process {os.getpid()} of {socket.gethostname()}"
    assert owner() == ""


def test_the_same_command_continues_from_any_folder(tmp_path, database) -> None:
    first, second = Scorer(), Scorer()
    with open_study("s", storage=database, folder=tmp_path / "a") as store:
        before, key = search(store, first, 10), store.key
        store.seeds = SEEDS
    with open_study("s", storage=database, folder=tmp_path / "b") as store:
        assert store.results() == before
        assert store.key == key
        assert [origin for origin, _ in store.seeds or []] == [origin for origin, _ in SEEDS]
        after = search(store, second, 15)
    assert after[:10] == before
    assert len(after) == 15
    assert not set(first.scored) & set(second.scored)
    with open_study("s", storage=database, folder=tmp_path / "b", fresh=True) as store:
        assert store.results() == []
        assert store.key == key


@pytest.mark.slow
def test_it_finds_what_a_journal_finds(tmp_path, database) -> None:
    one, two = Scorer(), Scorer()
    with open_study("s", storage=database, folder=tmp_path / "a") as store:
        search(store, one, 20)
    with open_study("s", storage=None, folder=tmp_path / "b") as store:
        search(store, two, 20)
    assert one.scored == two.scored


def test_the_server_is_away_in_the_middle(tmp_path, cluster, database, caplog) -> None:
    scorer = Acting(at_5=cluster.stop, at_9=cluster.start)
    with caplog.at_level(logging.WARNING, "kvsharer_exp"):
        with open_study("s", storage=database, folder=tmp_path) as store:
            found = search(store, scorer, 14)
            assert len(store.study.get_trials()) >= 14
    assert len(found) == len(scorer.scored) == len(set(scorer.scored)) == 14
    texts, counts = held_by(database)
    assert len(texts) == 14
    assert set(counts.values()) == {1}
    said = [record.getMessage() for record in caplog.records]
    assert len([line for line in said if "does not answer" in line]) == 1
    assert len([line for line in said if "answers again" in line]) == 1
    assert not list(tmp_path.glob("*.spool"))
    with open_study("s", storage=database, folder=tmp_path) as store:
        assert store.results() == found


def test_a_write_whose_answer_was_lost_is_not_made_twice(
    tmp_path, cluster, database, monkeypatch
) -> None:
    from kvsharer_exp.search.served_study import ServedStudy
    from kvsharer_exp.search.server_storage import StorageAwayError

    inner, lost = ServedStudy._apply, []

    def apply(self, write) -> None:
        inner(self, write)
        if "trial" in write and not lost:
            lost.append(write)
            raise StorageAwayError("the answer was lost")

    monkeypatch.setattr(ServedStudy, "_apply", apply)
    with open_study("s", storage=database, folder=tmp_path) as store:
        search(store, Scorer(), 6)
    assert len(lost) == 1
    texts, counts = held_by(database)
    assert len(texts) == 6
    assert set(counts.values()) == {1}


def test_a_server_that_goes_away_again_while_it_takes_what_waited(
    tmp_path, cluster, database, monkeypatch
) -> None:
    """What it had taken the first time looked like the work of another process."""
    from kvsharer_exp.search.served_study import ServedStudy
    from kvsharer_exp.search.server_storage import StorageAwayError

    inner, taken = optuna.Study.add_trial, []

    def add_trial(self, trial) -> None:
        if not isinstance(self._storage, InMemoryStorage):  # the server's
            taken.append(trial)
            if len(taken) == 3:
                raise StorageAwayError("it went away again")
        inner(self, trial)

    def away(self, *_) -> None:
        raise StorageAwayError("away")

    with open_study("s", storage=database, folder=tmp_path) as store:
        search(store, Scorer(), 2)
        with monkeypatch.context() as patch:
            patch.setattr(ServedStudy, "_apply", away)
            patch.setattr(ServedStudy, "_try_again", lambda self: None)
            search(store, Scorer(), 7)
        monkeypatch.setattr(optuna.Study, "add_trial", add_trial)
        found = search(store, Scorer(), 9)
    assert len(taken) > 7
    texts, counts = held_by(database)
    assert len(texts) == len(found) == 9
    assert set(counts.values()) == {1}


def _killed_while_away(folder: Path, database: str, cluster: Cluster) -> None:
    scorer = Acting(at_4=cluster.stop, at_7=lambda: os.kill(os.getpid(), signal.SIGKILL))
    with open_study("s", storage=database, folder=folder) as store:
        search(store, scorer, 20)


def test_killed_while_the_server_is_away_and_started_again(tmp_path, cluster, database) -> None:
    process = multiprocessing.get_context("fork").Process(  # it begins at once
        target=_killed_while_away, args=(tmp_path, database, cluster)
    )
    process.start()
    process.join()
    cluster.start()
    assert process.exitcode == -signal.SIGKILL
    assert len(held_by(database)[0]) == 4
    scorer = Scorer()
    with open_study("s", storage=database, folder=tmp_path) as store:
        assert len(store.results()) == 7
        found = search(store, scorer, 12)
    assert len(scorer.scored) == 5
    texts, counts = held_by(database)
    assert len(texts) == len(found) == 12
    assert set(counts.values()) == {1}
    assert not list(tmp_path.glob("*.spool"))


def test_what_waits_is_delivered_behind_what_another_process_found(
    tmp_path, cluster, database, monkeypatch
) -> None:
    monkeypatch.setattr("kvsharer_exp.search.served_study.PATIENCE", 0.0)
    with pytest.raises(UnansweredError, match="the same command delivers them"):
        with open_study("s", storage=database, folder=tmp_path / "a") as store:
            first = search(store, Acting(at_4=cluster.stop), 7)
    cluster.start()
    assert len(held_by(database)[0]) == 4
    with open_study("s", storage=database, folder=tmp_path / "b") as store:
        search(store, Scorer(), 6)
    with open_study("s", storage=database, folder=tmp_path / "a") as store:
        digests = [result.plan.digest for result in store.results()]
    assert len(digests) == len(set(digests))
    assert {result.plan.digest for result in first} <= set(digests)
    texts, counts = held_by(database)
    assert len(texts) == len(digests)
    assert set(counts.values()) == {1}


@pytest.mark.slow
def test_a_study_that_another_process_took_over_meanwhile_is_left_to_it(
    tmp_path, cluster, database
) -> None:
    def take_over() -> None:
        cluster.start()
        with open_study("s", storage=database, folder=tmp_path / "b") as other:
            search(other, Scorer(), 8)

    with pytest.raises(UnansweredError, match="was run by another process"):
        with open_study("s", storage=database, folder=tmp_path / "a") as store:
            search(store, Acting(at_4=cluster.stop, at_6=take_over), 30)
    assert list((tmp_path / "a").glob("*.spool"))
    with open_study("s", storage=database, folder=tmp_path / "a") as store:
        assert len(store.results()) >= 8
    _, counts = held_by(database)
    assert set(counts.values()) == {1}


def test_a_second_coordinator_is_refused_from_another_folder(tmp_path, cluster, database) -> None:
    owner = f"study s is being run by process {os.getpid()} of {socket.gethostname()}: wait for it"
    with open_study("s", storage=database, folder=tmp_path / "a"):
        with pytest.raises(InputError, match=owner):
            with open_study("s", storage=database, folder=tmp_path / "b"):
                pass
        with open_study("t", storage=database, folder=tmp_path / "b") as other:
            assert other.name == "t"
    with open_study("s", storage=database, folder=tmp_path / "b") as store:
        assert store.count_trials() == 0


def test_a_lock_whose_connection_was_ended_is_taken_again(tmp_path, cluster, database) -> None:
    name = database.rpartition("/")[2]
    with open_study("s", storage=database, folder=tmp_path / "a") as store:
        cluster.query(
            "postgres",
            f"{ENDED} where datname = '{name}' and application_name like 'kvsharer: process%'",
        )
        store.front_runs = ["one"]
        with pytest.raises(InputError, match="is being run by process"):
            with open_study("s", storage=database, folder=tmp_path / "b"):
                pass


def _open_in_a_new_database(database: str, folder: Path, name: str, ready) -> None:
    ready.wait()
    with open_study(name, storage=database, folder=folder / name) as store:
        assert store.name == name


def test_studies_that_begin_at_once_may_make_one_database(tmp_path, database) -> None:
    fork = multiprocessing.get_context("fork")
    ready = fork.Barrier(2)
    both = [
        fork.Process(target=_open_in_a_new_database, args=(database, tmp_path, name, ready))
        for name in "ab"
    ]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]


def test_a_newer_study_is_refused(tmp_path, database) -> None:
    with open_study("s", storage=database, folder=tmp_path) as store:
        store.study.set_user_attr("version", VERSION + 1)
    with pytest.raises(InputError, match="use the newer kvsharer_exp that made it"):
        with open_study("s", storage=database, folder=tmp_path):
            pass


@pytest.mark.slow
def test_a_spool_of_another_study_is_not_mixed_in(tmp_path, cluster, database, monkeypatch) -> None:
    monkeypatch.setattr("kvsharer_exp.search.served_study.PATIENCE", 0.0)
    with pytest.raises(UnansweredError):
        with open_study("s", storage=database, folder=tmp_path) as store:
            search(store, Acting(at_2=cluster.stop), 4)
    cluster.start()
    with open_study("s", storage=database, folder=tmp_path / "b", fresh=True) as store:
        assert store.results() == []
    with pytest.raises(InputError, match="keeps trials for the study"):
        with open_study("s", storage=database, folder=tmp_path):
            pass
    with open_study("s", storage=database, folder=tmp_path, fresh=True) as store:
        assert store.results() == []
    assert not list(tmp_path.glob("*.spool"))


def test_no_server_is_one_line(tmp_path) -> None:
    port = free_port()
    with pytest.raises(InputError, match=r"\(.*[Cc]onnection refused.*\): start the server") as one:
        with open_study("s", storage=f"postgresql://u@127.0.0.1:{port}/d", folder=tmp_path):
            pass
    assert f"postgresql://u@127.0.0.1:{port}/d" in str(one.value)
    assert "\n" not in str(one.value)


def test_a_wrong_password_is_one_line_that_does_not_hold_it(
    tmp_path, database, monkeypatch
) -> None:
    monkeypatch.setenv("PGPASSWORD", "wrong-sesame")
    with pytest.raises(InputError, match=r"password authentication failed.*~/\.pgpass") as refused:
        with open_study("s", storage=database, folder=tmp_path):
            pass
    assert "sesame" not in str(refused.value)


def test_a_password_in_an_address_from_python_is_never_shown(tmp_path, database) -> None:
    inside = database.replace("@", f":{PASSWORD}x@")
    for storage in (inside, f"{database}?password={PASSWORD}x"):
        with pytest.raises(InputError, match="password authentication failed") as refused:
            with open_study("s", storage=storage, folder=tmp_path):
                pass
        assert PASSWORD not in str(refused.value)


@pytest.mark.slow
def test_what_the_server_loses_in_a_crash_is_given_to_it_again(tmp_path, cluster, database) -> None:
    name = database.rpartition("/")[2]
    cluster.query("postgres", f'alter database "{name}" set synchronous_commit = off')
    with open_study("s", storage=database, folder=tmp_path) as store:
        search(store, Acting(at_5=cluster.stop, at_7=cluster.start), 12)
    texts, counts = held_by(database)
    assert len(texts) == 12
    assert set(counts.values()) == {1}


@pytest.mark.slow
def test_a_lock_that_was_lost_for_a_while_lets_nothing_be_written_blindly(
    tmp_path, cluster, database
) -> None:
    name = database.rpartition("/")[2]
    with pytest.raises(UnansweredError, match="was run by another process"):
        with open_study("s", storage=database, folder=tmp_path / "a") as store:
            search(store, Scorer(), 4)
            cluster.query("postgres", f"{ENDED} where datname = '{name}'")
            with open_study("s", storage=database, folder=tmp_path / "b") as other:
                search(other, Scorer(), 6)
            search(store, Scorer(), 8)
    assert list((tmp_path / "a").glob("*.spool"))
    with open_study("s", storage=database, folder=tmp_path / "a") as store:
        assert len(store.results()) == 6
    assert set(held_by(database)[1].values()) == {1}
