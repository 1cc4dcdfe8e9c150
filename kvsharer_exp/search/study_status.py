"""How a study stands, for whoever looks at it while it runs, or after it was killed.

The coordinator of a running study writes a `Progress` beside its lock now and then, and `status_of`
reads it with what the study holds. Reading disturbs nobody: it keeps no lock, and mends nothing.
"""

from __future__ import annotations

import fcntl
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from kvsharer_exp.model.files import write_atomically
from kvsharer_exp.search.execution.base import Worker
from kvsharer_exp.search.front import best_per_rung, bytes_rung, num_shared
from kvsharer_exp.search.study import owner_in
from kvsharer_exp.search.study_store import StudyStore
from kvsharer_exp.values.errors import InputError, did_you_mean
from kvsharer_exp.values.record import Record
from kvsharer_exp.values.text import clip, shorten
from kvsharer_exp.values.text_files import read_text
from kvsharer_exp.values.trial import TrialResult

_log = logging.getLogger(__name__)

_SUFFIX = ".progress.json"
_EVERY = 2.0


@dataclass(frozen=True, slots=True)
class Progress(Record):
    """What the coordinator says of the run that is under way.

    ``known`` is the number of plans that the study knew when the run began. ``n_trials`` and
    ``until`` are what ends it, if anything does.
    """

    storage: str | None
    began: float
    written: float
    known: int
    n_trials: int | None
    until: float | None
    workers: tuple[Worker, ...] = ()

    def write(self, folder: Path, study: str) -> None:
        """Write it beside the lock of the study."""
        write_atomically(folder / f"{study}{_SUFFIX}", self.to_json())

    @classmethod
    def read(cls, folder: Path, study: str) -> Progress | None:
        """What was written last; None if there is nothing.

        Raises:
            InputError: the file holds something else.
        """
        path = folder / f"{study}{_SUFFIX}"
        if not path.is_file():
            return None
        try:
            return cls.from_json(read_text(path))
        except ValueError as error:
            raise InputError(
                f"{shorten(path)} is damaged ({clip(str(error), 60)}): remove it, the next run "
                "writes it again"
            ) from error


@contextmanager
def watched(folder: Path, study: str, progress: Callable[[], Progress]) -> Iterator[None]:
    """Write what ``progress`` says while the block runs, every `_EVERY` seconds and in the end.

    Where it cannot be written, as on a full disk, this is said once, and the block goes on.
    """
    over, told = threading.Event(), threading.Event()

    def write() -> None:
        try:
            progress().write(folder, study)
        except OSError as error:
            if not told.is_set():
                _log.warning("the progress of study %s cannot be written: %s", study, error)
            told.set()

    def watch() -> None:
        while not over.wait(_EVERY):
            write()

    write()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        write()


@dataclass(frozen=True, slots=True)
class StudyStatus:
    """How a study stands.

    ``owner`` is the process that runs it, empty if none does. ``best`` are the best complete
    results by rung, and ``reasons`` count the failures. ``per_minute`` are plans scored in this
    run; ``seconds_left`` is None where nothing says when the search ends.
    """

    study: str
    owner: str
    results: Sequence[TrialResult]
    progress: Progress | None
    now: float
    reasons: Mapping[str, int] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """The number of results by status."""
        return dict(Counter(result.status for result in self.results))

    @property
    def n_trials(self) -> int | None:
        """How many plans the run was told to score; None if it was not told, or is not known."""
        return self.progress.n_trials if self.progress else None

    @property
    def best(self) -> dict[int, TrialResult]:
        of_plans = any(result.sharing_map is None for result in self.results)
        return best_per_rung(self.results, bytes_rung if of_plans else num_shared)

    @property
    def per_minute(self) -> float | None:
        progress = self.progress
        if progress is None or progress.written <= progress.began:
            return None
        return 60 * (len(self.results) - progress.known) / (progress.written - progress.began)

    @property
    def seconds_left(self) -> float | None:
        progress, rate = self.progress, self.per_minute
        if progress is None or not self.owner:
            return None
        if progress.until is not None:
            return max(0.0, progress.until - self.now)
        if self.n_trials is None or not rate:
            return None
        return max(0.0, 60 * (self.n_trials - len(self.results)) / rate)

    def to_dict(self) -> dict[str, Any]:
        """The status as JSON values, the fronts and plans as text."""
        workers = self.progress.workers if self.progress and self.owner else ()
        return {
            "study": self.study,
            "running": self.owner,
            "trials": self.counts,
            "n_trials": self.n_trials,
            "trials_per_minute": self.per_minute,
            "seconds_left": self.seconds_left,
            "workers": [
                {
                    "state": worker.state,
                    "plan": worker.plan,
                    "seconds": self.now - worker.since if worker.plan else None,
                }
                for worker in workers
            ],
            "failures": dict(self.reasons),
            "best": [
                {
                    "kv_fraction": result.footprint.kv_fraction,
                    "score": result.score,
                    "plan": str(result.plan),
                }
                for result in self.best.values()
            ],
        }


def studies_in(folder: Path) -> list[str]:
    """The names of the studies whose lock is in ``folder``, the one that ran last first."""
    locks = [path for path in folder.glob("*.lock") if not path.name.startswith(".")]
    return [path.stem for path in sorted(locks, key=lambda p: p.stat().st_mtime, reverse=True)]


def status_of(
    name: str,
    *,
    folder: Path,
    storage: str | None = None,
) -> StudyStatus:
    """Read how the study ``name`` stands.

    Args:
        folder: holds the lock of the study.
        storage: where the study is, as `study.open_study` takes it.

    Raises:
        InputError: there is no such study, or it cannot be read.
    """
    progress = Progress.read(folder, name)
    where = storage or (progress.storage if progress else None) or str(folder / f"{name}.journal")
    owner = _owner(folder / f"{name}.lock")
    try:
        study = _load(name, where)
        if not owner and (owner := _owner_in_server(name, where)):
            progress = None  # what lies here tells of an earlier run
    except InputError:
        raise
    except Exception as error:  # every backend raises its own kinds
        first = " ".join(str(error).split())[:60]
        raise InputError(
            f"study {name} cannot be read in {shorten(where)} ({first}): check study.storage"
        ) from error
    results = StudyStore(study).results()
    reasons = Counter(r.reason for r in results if r.status == "failed")
    return StudyStatus(name, owner, results, progress, time.time(), dict(reasons.most_common()))


def _load(name: str, where: str) -> optuna.Study:
    if "://" in where:
        # SQLAlchemy takes a while to import, and a file does not need it.
        from kvsharer_exp.search.server_storage import open_storage, read_address

        return optuna.load_study(study_name=name, storage=open_storage(read_address(where)))
    if not Path(where).is_file():
        near = studies_in(Path(where).parent)
        way = did_you_mean(name, near[:5]) if near else "check study.name"
        raise InputError(f"there is no study {shorten(name, 30)} in {shorten(where, 60)}: {way}")
    return optuna.load_study(study_name=name, storage=JournalStorage(JournalFileBackend(where)))


def _owner_in_server(name: str, where: str) -> str:
    """Which process of any machine runs the study, if it is in a PostgreSQL server."""
    if "://" not in where:
        return ""
    from kvsharer_exp.search.advisory_lock import AdvisoryLock
    from kvsharer_exp.search.server_storage import is_postgres, read_address

    url = read_address(where)
    return AdvisoryLock(url, name).owner() if is_postgres(url) else ""


def _owner(lock: Path) -> str:
    """Which process of this machine holds the lock of a study; empty if none does."""
    if not lock.is_file():
        return ""
    with lock.open(encoding="utf-8", errors="replace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return owner_in(file)
    return ""
