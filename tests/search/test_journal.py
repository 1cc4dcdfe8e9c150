"""A journal goes on after a kill at any byte, and no lock outlives the process that held it."""

import fcntl
import logging
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from kvsharer_exp.search.journal import JournalLock, open_journal
from kvsharer_exp.search.study import open_study
from kvsharer_exp.values.errors import InputError
from tests.search.test_study import Scorer, search


def _killed_while_it_writes(folder: Path, storage: str) -> None:
    os.chdir(folder)
    written = os.fsync

    def fsync(number: int) -> None:
        written(number)
        if Path(storage).read_bytes().count(b"\n") == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = fsync
    search(folder, Scorer(), 20, storage=storage)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("place", ["relative", pytest.param("absolute", marks=pytest.mark.slow)])
def test_a_kill_while_the_journal_is_written_holds_nobody_up(tmp_path, monkeypatch, place) -> None:
    """Public fault 5: the lock that Optuna leaves is a link, which dangles for a relative path."""
    storage = {"relative": "deep/x.journal", "absolute": str(tmp_path / "deep" / "x.journal")}[
        place
    ]
    process = multiprocessing.get_context("spawn").Process(
        target=_killed_while_it_writes, args=(tmp_path, storage)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    monkeypatch.chdir(tmp_path)
    found, _, _ = search(tmp_path, Scorer(), 8, storage=storage)
    assert len(found) == 8
    left = sorted(path.name for path in (tmp_path / "deep").iterdir())
    assert left == ["x.journal", "x.journal.s.lock"]  # ours, which ends with its process


@pytest.mark.timeout(60)
def test_a_lock_that_an_earlier_version_left_holds_nobody_up(tmp_path, monkeypatch) -> None:
    """Public fault 5, for the journals that have such a lock already."""
    monkeypatch.chdir(tmp_path)
    os.symlink("x.journal", "x.journal.lock")
    found, _, _ = search(tmp_path, Scorer(), 4, storage="x.journal")
    assert len(found) == 4


def test_a_lock_keeps_others_out_until_it_is_released(tmp_path: Path) -> None:
    path = tmp_path / "x.journal"
    lock = JournalLock(path)
    assert lock.acquire()
    with path.open("ab") as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock.release()
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_record_that_is_half_written_is_cut_off_at_every_byte(tmp_path, caplog) -> None:
    """Public fault 6: Optuna appends to the half, and then nobody can read the study any more."""
    before, _, _ = search(tmp_path, Scorer(), 3)
    path = tmp_path / "s.journal"
    whole = path.read_bytes()
    last = whole.rfind(b"\n", 0, -1) + 1
    assert b'"result"' in whole[last:]  # the third trial
    for end in (*range(last + 1, last + 40), *range(last + 40, len(whole), 97), len(whole) - 1):
        path.write_bytes(whole[:end])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            scorer = Scorer()
            after, _, _ = search(tmp_path, scorer, 3)
        assert after[:2] == before[:2]
        assert scorer.scored == [str(before[2].sharing_map)]
        (said,) = [record.getMessage() for record in caplog.records]
        assert said.startswith(f"the last record of {path} was half written")
        assert "\n" not in said
        again, _, _ = search(tmp_path, Scorer(), 3)
        assert again == after


def test_zeros_after_a_loss_of_power_are_cut_off(tmp_path: Path) -> None:
    before, _, _ = search(tmp_path, Scorer(), 3)
    path = tmp_path / "s.journal"
    whole = path.read_bytes()
    for half in (b"\0" * 50, b'{"op_code":4' + b"\0" * 50):
        path.write_bytes(whole + half)
        after, _, _ = search(tmp_path, Scorer(), 3)
        assert after == before
        assert path.read_bytes().startswith(whole)
        assert half not in path.read_bytes()


def test_a_whole_journal_is_left_as_it_is(tmp_path, caplog) -> None:
    search(tmp_path, Scorer(), 3)
    path = tmp_path / "s.journal"
    whole = path.read_bytes()
    open_journal(path)
    assert path.read_bytes() == whole
    assert not caplog.records


def test_a_file_that_is_no_journal_keeps_every_byte(tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    for text in ("my notes", "line\nand another", '{"a": 1}'):
        notes.write_text(text)
        with pytest.raises(InputError, match=r"cannot be opened in .*its last line is no record"):
            with open_study("s", storage=str(notes), folder=tmp_path):
                pass
        assert notes.read_text() == text


def test_a_journal_whose_last_whole_line_is_no_record_keeps_every_byte(tmp_path: Path) -> None:
    """Optuna takes such a line for one that is being written, and appends to it."""
    notes = tmp_path / "notes.txt"
    for text in ("my notes\n", '{"a": 1}\n', '{"op_code": 0}\nmy notes\n{"op_c', "\n"):
        notes.write_text(text)
        with pytest.raises(InputError, match="its last line is no record"):
            with open_study("s", storage=str(notes), folder=tmp_path):
                pass
        assert notes.read_text() == text
