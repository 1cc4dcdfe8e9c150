"""Wait for an MLflow server that is away for a while, and say so once.

`store.open_store` gives `Tracker` a `PatientClient` for every server. A call that the server does
not answer is made again 1, 2, 4 … 60 seconds later, for a minute in all. After that, calls wait no
more until the server answers again. A sweep does not wait at all while it scores maps: its study
has everything that MLflow is to be told (`cli.steps.sweep_progress`).
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from kvsharer_exp.values.addresses import without_password
from kvsharer_exp.values.back_off import BackOff
from kvsharer_exp.values.errors import UnansweredError
from kvsharer_exp.values.text import clip

PATIENCE = 60.0
"""The seconds for which a call waits for a server that is away."""

# MLflow's own client tries for minutes. If it made a run twice, nobody would notice.
_SETTINGS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
_TOO_MANY_REQUESTS = 429
_REFUSED = "Connection refused"

_log = logging.getLogger(__name__)


class MlflowAwayError(UnansweredError):
    """MLflow's server did not answer for as long as a call waits."""


class PatientClient:
    """An MLflow client that makes a call again which the server did not answer.

    A call that makes something is made again only if the server cannot have got it.

    Args:
        clock, sleep: give the time, and let it pass, in seconds.
    """

    def __init__(
        self,
        client: Any,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._inner, self._clock, self._sleep = client, clock, sleep
        self._place = clip(without_password(client.tracking_uri), 60)
        self._back_off, self._reason = BackOff(clock), ""
        self._patience: float | None = None
        self._gave_up = False
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not callable(value):
            return value

        def call(*arguments: Any, **options: Any) -> Any:
            return self._call(name, lambda: value(*arguments, **options))

        return call

    @contextmanager
    def waiting(self, seconds: float) -> Iterator[None]:
        """Inside, a call waits for so long; the block itself changes nothing else."""
        before, self._patience = self._patience, seconds
        try:
            yield
        finally:
            self._patience = before

    def _call(self, name: str, call: Callable[[], Any]) -> Any:
        usual = 0.0 if self._gave_up else PATIENCE
        deadline = self._clock() + (usual if self._patience is None else self._patience)
        while True:
            self._pause(deadline)
            try:
                with _unsaid():
                    value = call()
            except Exception as error:  # MLflow and its stores of artifacts raise their own kinds
                if not is_away(error):
                    raise
                self._failed(error)
                if name.startswith("create_") and self._reason != _REFUSED:
                    raise self._unanswered() from error
            else:
                self._answered()
                return value

    def _pause(self, deadline: float) -> None:
        """Wait until the next try is due."""
        left = self._back_off.left
        if left and self._clock() + left > deadline:
            self._gave_up = self._gave_up or self._patience is None
            raise self._unanswered()
        if left:
            self._sleep(left)

    def _unanswered(self) -> MlflowAwayError:
        return MlflowAwayError(
            f"MLflow at {self._place} does not answer ({self._reason}): start it, and run the same "
            "command again"
        )

    def _failed(self, error: Exception) -> None:
        self._back_off.failed()
        if not self._reason:
            self._reason = _reason_of(error)
            _log.warning(
                "MLflow at %s does not answer (%s): results are kept here, "
                "and delivered when it does",
                *(self._place, self._reason),
            )

    def _answered(self) -> None:
        if self._reason:
            _log.warning("MLflow at %s answers again", self._place)
        self._back_off.answered()
        self._reason, self._gave_up = "", False


def waiting_of(client: Any) -> Callable[[float], AbstractContextManager[None]]:
    """`PatientClient.waiting` of a client; that of a local store has nobody to wait for."""
    return client.waiting if isinstance(client, PatientClient) else lambda seconds: nullcontext()


def is_away(error: BaseException) -> bool:
    """Whether a server did not answer, or answered that it cannot work at the moment."""
    from mlflow.exceptions import MlflowException, RestException
    from requests.exceptions import RequestException

    if isinstance(error, RequestException):
        return error.response is None or _is_busy(error.response.status_code)
    if not isinstance(error, MlflowException):
        return False
    # MLflow calls errors of its own code internal errors too. Those come from no request.
    asked = isinstance(error, RestException) or str(error).startswith("API request to")
    return asked and _is_busy(error.get_http_status_code())


def _is_busy(status: int) -> bool:
    return status >= 500 or status == _TOO_MANY_REQUESTS


def _reason_of(error: BaseException) -> str:
    """The telling part of an error; that of a connection is buried in the errors around it."""
    text = " ".join(str(error).split())
    if _REFUSED in text:
        return _REFUSED
    found = re.search(r"\[Errno -?\d+\] ([^'\")]+)|(Read timed out|timed out)", text)
    return clip((found[1] or found[2]) if found else text, 60)


@contextmanager
def _unsaid() -> Iterator[None]:
    """Inside, urllib3 warns of no connection that it tries again: that is said here, once."""
    logger = logging.getLogger("urllib3.connectionpool")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
