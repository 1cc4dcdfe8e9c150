"""A study in a database server that may be away for a while, of which nothing is lost.

`study.open_study` gives `StudyStore` this in place of an Optuna study. What is read comes from
memory, because only this process writes to the study. A write that the server does not take goes to
a file (`spool`), and so do all after it. The server is asked again 1, 2, 4 … 60 seconds later, when
something is to be written then, and in the end. The file is delivered first, in order. If this
process is killed before, the next start of the study delivers it.
"""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from kvsharer_exp.search.server_storage import StorageAwayError
from kvsharer_exp.search.spool import Spool, trial_from_json, trial_to_json
from kvsharer_exp.search.stored_trial import result_of, set_result
from kvsharer_exp.values.back_off import BackOff
from kvsharer_exp.values.errors import InputError, UnansweredError
from kvsharer_exp.values.text import shorten

_log = logging.getLogger(__name__)

PATIENCE = 60.0
"""The seconds for which the end of a search waits for a server that is away."""


class Lock(Protocol):
    """The right to write to the study."""

    def hold(self) -> bool: ...


class ServedStudy:
    """What this project uses of an Optuna study, for one in a server.

    Args:
        load: reads the study from its server, which answers now.
        lock: is held before each write, because a server that stops lets it go. `hold` says whether
            it was taken just now.
        spool: holds what an earlier process could not deliver. It is delivered at once.
        place: the address of the server for people to read.
    """

    def __init__(
        self,
        load: Callable[[], optuna.Study],
        lock: Lock,
        spool: Spool,
        place: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._load, self._lock, self._spool, self._place = load, lock, spool, place
        self._study = study = load()
        self._clock, self._sleep = clock, sleep
        self._back_off = BackOff(clock)
        self.study_name: str = study.study_name
        self.directions: Sequence[StudyDirection] = study.directions
        if spool:
            count = len(spool)
            self._deliver(study.get_trials(deepcopy=False))
            _log.warning("study %s: %d writes that waited are delivered", self.study_name, count)
        self._trials = list(study.get_trials(deepcopy=False))
        self._delivered = len(self._trials)  # the number of trials that the server surely has
        self.user_attrs: dict[str, Any] = dict(study.user_attrs)

    def get_trials(self, deepcopy: bool = True) -> list[FrozenTrial]:
        """All trials, those that wait for the server included."""
        return copy.deepcopy(self._trials) if deepcopy else list(self._trials)

    def add_trial(self, trial: FrozenTrial) -> None:
        """Keep a finished trial."""
        kept = copy.copy(trial)
        kept.number = len(self._trials)
        self._trials.append(kept)
        self._write({"trial": trial_to_json(trial)})

    def set_user_attr(self, key: str, value: Any) -> None:
        """Keep a value of the study, which JSON can hold."""
        self.user_attrs[key] = json.loads(json.dumps(value))
        self._write({"attribute": key, "value": self.user_attrs[key]})

    def settle(self, seconds: float) -> None:
        """Deliver what waits; a server that is away is waited for so long.

        Raises:
            UnansweredError: it did not come back.
        """
        deadline = self._clock() + seconds
        while self._spool:
            if self._back_off.left == 0:
                self._try_again()
            elif self._clock() + self._back_off.left <= deadline:
                self._sleep(self._back_off.left)
            else:
                raise UnansweredError(
                    f"{self._place} does not answer: {len(self._spool)} writes of the study are in "
                    f"{shorten(self._spool.path, 60)}, and the same command delivers them"
                )

    @contextmanager
    def delivered_in_the_end(self) -> Iterator[None]:
        """Deliver what waits when the block ends; after an error nobody waits for the server.

        Raises:
            UnansweredError: the block ended well, and the server stayed away.
        """
        try:
            yield
        except BaseException as error:
            try:
                self.settle(0.0)
            except (UnansweredError, InputError) as unanswered:
                if str(unanswered) != str(error):
                    _log.warning("%s", unanswered)
            raise
        self.settle(PATIENCE)

    def _write(self, write: dict[str, Any]) -> None:
        if self._spool:
            self._spool.append(write)
            if self._back_off.left == 0:
                self._try_again()
            return
        try:
            if self._lock.hold():
                self._read_again()
            self._apply(write)
        except (UnansweredError, InputError):  # another process has the study
            self._spool.append(write)
            raise
        except StorageAwayError as error:
            self._spool.append(write)
            self._back_off.failed()
            _log.warning(
                "study %s: %s does not answer (%s): its trials are kept in %s, "
                "and delivered when it does",
                *(self.study_name, self._place, error, self._spool.path),
            )
        else:
            self._delivered += "trial" in write

    def _try_again(self) -> None:
        """Deliver what waits, if the server is back; the errors are those of `_read_again`."""
        try:
            self._lock.hold()
            held = self._read_again()
            count = len(self._spool)
            self._deliver([*held, *self._give_again(held)])
        except StorageAwayError:
            self._back_off.failed()
            return
        self._back_off.answered()
        self._delivered = len(self._trials)
        _log.warning(
            "study %s: %s answers again, and the %d writes that waited are delivered",
            *(self.study_name, self._place, count),
        )

    def _read_again(self) -> list[FrozenTrial]:
        """The trials that the server has, after the lock was lost for a while.

        Raises:
            UnansweredError: another process has run the study meanwhile.
        """
        self._study = self._load()  # Optuna remembers trials that the server may have lost
        held: list[FrozenTrial] = self._study.get_trials(deepcopy=False)
        waiting = (write["trial"] for write in self._spool.writes() if "trial" in write)
        ours = list(map(trial_from_json, waiting))  # the server may have gone while it took them
        if any(not _is_in(trial, ours) for trial in held[self._delivered :]):
            raise UnansweredError(
                f"study {shorten(self.study_name)} was run by another process while its server was "
                "away: run the same command again, which delivers what waits here"
            )
        return held

    def _give_again(self, held: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Write again what the server had taken and has lost; returns these trials.

        A server with ``synchronous_commit=off``, or one that was set up from a copy, loses its last
        commits in a crash.
        """
        lost = self._trials[len(held) : self._delivered]
        for trial in lost:
            self._study.add_trial(trial)
        if lost:
            for name, value in self.user_attrs.items():
                self._study.set_user_attr(name, value)
        return lost

    def _deliver(self, held: Sequence[FrozenTrial]) -> None:
        """Write what waits, but for what the server has among its trials ``held``.

        A write whose answer was lost may have come through. Another process may have scored the
        same plan since, or other plans, and then a trial that waited is given a later number.
        """
        held = list(held)
        digests = {result.plan.digest for result in map(result_of, held) if result is not None}
        for write in self._spool.writes():
            if "trial" not in write:
                self._apply(write)
                continue
            trial = trial_from_json(write["trial"])
            result = result_of(trial)
            if _is_in(trial, held) or (result is not None and result.plan.digest in digests):
                continue
            if result is not None:
                digests.add(result.plan.digest)
                set_result(trial, replace(result, number=len(held)))
            self._study.add_trial(trial)
            held.append(trial)
        self._spool.clear()

    def _apply(self, write: dict[str, Any]) -> None:
        if "trial" in write:
            self._study.add_trial(trial_from_json(write["trial"]))
        else:
            self._study.set_user_attr(write["attribute"], write["value"])


def _is_in(trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> bool:
    """Whether ``trial`` is one of ``trials``: no two begin in the same microsecond."""
    begun, params = trial.datetime_start, trial.params
    return any(one.datetime_start == begun and one.params == params for one in trials)
