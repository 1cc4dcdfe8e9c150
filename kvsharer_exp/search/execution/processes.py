"""Workers that are processes of this machine: one for each GPU, or several on a CPU."""

from __future__ import annotations

import json
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvsharer_exp.search.execution.base import Done, Task
from kvsharer_exp.search.execution.pool import Lost, News, Ready
from kvsharer_exp.values.errors import MALFORMED, InputError
from kvsharer_exp.values.text import clip

_log = logging.getLogger(__name__)
_PATIENCE = 10.0  # seconds that a process has to end


@dataclass(eq=False, slots=True)
class _Worker:
    number: int
    process: subprocess.Popen[str]
    log: Path


class ProcessCrew:
    """Starts processes that score plans (`pool.Crew`).

    Args:
        make: the function that makes the scorer, as ``package.module:function``.
        settings: the text that it is called with.
        folder: holds the log of each worker, what it prints; it is made if it is not there.
        environments: what each place adds to the environment of its worker.
    """

    def __init__(
        self,
        make: str,
        settings: str,
        *,
        folder: Path,
        environments: Sequence[Mapping[str, str]] = ({},),
    ) -> None:
        self._first = json.dumps({"make": make, "settings": settings})
        self._folder, self._environments = folder, environments
        self._news: queue.SimpleQueue[tuple[_Worker, News]] = queue.SimpleQueue()
        self._stopped: set[_Worker] = set()

    def start(self, number: int) -> _Worker:
        self._folder.mkdir(parents=True, exist_ok=True)
        log = self._folder / f"worker-{number}.log"
        extra = self._environments[number % len(self._environments)]
        with log.open("ab") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "kvsharer_exp.search.execution.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
                errors="replace",
                env={**os.environ, **extra},
            )
        worker = _Worker(number, process, log)
        threading.Thread(target=self._listen, args=(worker,), daemon=True).start()
        self._write(worker, self._first)
        return worker

    def send(self, worker: _Worker, task: Task) -> None:
        self._write(worker, task.to_json())

    def stop(self, worker: _Worker) -> None:
        self._stopped.add(worker)
        worker.process.kill()
        try:
            worker.process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:  # it is in a call that the system does not interrupt
            _log.warning("worker %d was killed and does not end: it is left alone", worker.number)
        assert worker.process.stdin is not None
        try:
            worker.process.stdin.close()
        except BrokenPipeError:  # what was written last is for nobody
            return

    def news(self, seconds: float | None) -> list[tuple[Any, News]]:
        try:
            found = [self._news.get(timeout=seconds)]
            while not self._news.empty():
                found.append(self._news.get_nowait())
        except queue.Empty:
            return []
        return [(worker, news) for worker, news in found if worker not in self._stopped]

    def _write(self, worker: _Worker, line: str) -> None:
        """Give the worker a line; if it is gone already, its reader tells so."""
        assert worker.process.stdin is not None
        try:
            worker.process.stdin.write(line + "\n")
            worker.process.stdin.flush()
        except BrokenPipeError:
            return

    def _listen(self, worker: _Worker) -> None:
        """Pass on what a worker says, and in the end that it is gone, whatever goes wrong here."""
        loss = Lost("nobody could read what it says")
        try:
            loss = self._hear(worker)
        finally:
            self._news.put((worker, loss))

    def _hear(self, worker: _Worker) -> Lost:
        """Pass on what a worker says; returns why it says no more."""
        assert worker.process.stdout is not None
        error: Exception | None = None
        with worker.process.stdout as lines:
            for line in lines:
                try:
                    said = json.loads(line)
                    done = Done.from_dict(said["done"]) if "done" in said else None
                except MALFORMED as wrong:
                    return Lost(f"it says what is no outcome: {clip(str(wrong), 80)}")
                if done is not None:
                    self._news.put((worker, done))
                elif "refused" in said:
                    error = InputError(said["refused"])
                else:
                    self._news.put((worker, Ready()))
        try:
            code = worker.process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            return Lost("it says no more, and does not end", error)
        return Lost(_how_it_ended(code, worker.log), error)


def _how_it_ended(code: int, log: Path) -> str:
    """In words, from the exit code and the last line of the log."""
    ended = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    if not log.is_file():
        return f"{ended}, and {log} is gone"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"{ended}, see {log}" + (f": {lines[-1][:120]}" if lines and code > 0 else "")
