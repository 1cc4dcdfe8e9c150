"""A disk that is full loses nothing, leaves nothing half written, and the same command goes on."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvsharer_exp.search.coordinator import run_search
from kvsharer_exp.search.execution.local import LocalExecutor
from kvsharer_exp.search.spool import Spool
from kvsharer_exp.search.study import open_study
from kvsharer_exp.values.trial import TrialResult
from tests.search import cheap
from tests.search.cheap_scores import make_score


@contextmanager
def full_at(size: int) -> Iterator[None]:
    """Inside, no file grows beyond ``size`` bytes: the system writes what fits, and then refuses.

    A full disk does the same, with another number of the error.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def searched(folder: Path, journal: Path) -> list[TrialResult]:
    score = make_score(json.dumps({"log": str(folder / "scored.txt")}))
    with open_study("s", storage=str(journal), folder=folder) as store:
        return run_search(store, cheap.search(), LocalExecutor(score), n_trials=5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[TrialResult], bytes]:
    """The results of a search that was not disturbed, and its journal."""
    folder = tmp_path_factory.mktemp("whole")
    return searched(folder, folder / "j"), (folder / "j").read_bytes()


@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_a_search_goes_on_when_there_is_space_again(tmp_path: Path, whole, part: float) -> None:
    """Another study of the same journal could read nothing any more."""
    results, content = whole
    journal, left = tmp_path / "j", int(part * len(content))
    assert content[left - 1 : left + 1].count(b"\n") == 0  # a record is written in part
    with full_at(left), pytest.raises(OSError, match="File too large"):
        searched(tmp_path, journal)
    written = journal.read_bytes()
    assert left - 1000 < len(written) < left
    assert all(json.loads(line) for line in written.splitlines())
    assert written.endswith(b"\n")
    with open_study("other", storage=str(journal), folder=tmp_path) as other:
        other.mlflow_run_id = "run"
    assert cheap.plain(searched(tmp_path, journal)) == cheap.plain(results)
    scored = cheap.scored(tmp_path)
    assert len(scored) <= 6  # what was under way is scored again, and nothing else
    assert len(set(scored)) == 5


@pytest.mark.parametrize("more", [1, 20])
def test_what_waits_for_a_server_stays_whole(tmp_path: Path, more: int) -> None:
    """What was delivered last ended in half a line, which nobody could read."""
    spool = Spool(tmp_path / "s.spool", "here 1")
    with full_at(more), pytest.raises(OSError, match="File too large"):
        spool.append({"attribute": "a", "value": 0})
    assert (len(spool), spool.writes()) == (0, [])
    spool.append({"attribute": "b", "value": 1})
    with full_at(spool.path.stat().st_size + more), pytest.raises(OSError, match="File too large"):
        spool.append({"attribute": "c", "value": 2})
    assert [write["attribute"] for write in spool.writes()] == ["b"]
    spool.append({"attribute": "d", "value": 3})
    for held in (spool, Spool(spool.path, "here 1")):
        assert [write["attribute"] for write in held.writes()] == ["b", "d"]
