"""What an ablation has measured so far, in a file, so that a killed one continues arm by arm.

The file lies under ``tracking.folder`` while the ablation runs, and is removed when it ends. Its
name says model, text and settings, so it is found by the same command only. Each line is a value
with its key, as JSON. The last one may be half written.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from kvsharer_exp import __version__
from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.loaded_model import LoadedModel
from kvsharer_exp.cli.session.run_log import RunLog
from kvsharer_exp.cli.session.windows import Windows
from kvsharer_exp.values.errors import MALFORMED, InputError
from kvsharer_exp.values.record import typed
from kvsharer_exp.values.text import shorten
from kvsharer_exp.values.text_files import append_whole, read_json, whole_lines

_RUN = "run"
# What changes nothing of what is measured.
_ASIDE = ("debug", "quiet", "tracking", "study", "executor", "ui", "serve", "export", "reproduce")


class AblationMemory:
    """Opens the file of one ablation, as a context manager; no other process has it open.

    Raises:
        InputError: another process runs the same ablation, or the file is damaged. It keeps every
            byte then.
    """

    def __init__(self, config: Config, loaded: LoadedModel, windows: Windows) -> None:
        settings = {key: value for key, value in asdict(config).items() if key not in _ASIDE}
        about = [__version__, settings, loaded.description, windows.texts.fingerprints]
        text = json.dumps(about, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._path = Path(config.tracking.folder) / "ablations" / f"{digest}.jsonl"
        self._known: dict[str, Any] = {}
        self._file: IO[bytes] | None = None

    def __enter__(self) -> AblationMemory:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise InputError(
                "this ablation is being run by another process: wait for it, or change a setting"
            ) from error
        whole, _ = whole_lines(self._path.read_bytes())
        try:
            pairs = [read_json(line) for line in whole.decode().splitlines()]
            self._known = {typed(str, key, "key"): value for key, value in pairs}
        except MALFORMED as error:
            self._file.close()
            raise InputError(
                f"{shorten(self._path)} is damaged: remove it, and the ablation begins anew"
            ) from error
        os.truncate(self._path, len(whole))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self._file is not None
        if kind is None:
            self._path.unlink()
        self._file.close()

    def continue_run(self, log: RunLog) -> None:
        """Link the MLflow run of ``log`` with that of the killed start before, which is closed."""
        before = self._known.get(_RUN)
        if before is not None and log.tracker.exists(before):
            log.say(f"continuing: {len(self._known) - 1} results are known")
            log.tracker.finish(before, "KILLED", successor=log.run_id)
        self._keep(_RUN, log.run_id)

    def once(self, key: list[Any], make: Callable[[], Any]) -> Any:
        """The JSON value of ``key``: what was kept of it, or else what ``make`` gives, kept now."""
        text = json.dumps(key)
        if text not in self._known:
            self._keep(text, make())
        return self._known[text]

    def _keep(self, key: str, value: Any) -> None:
        assert self._file is not None
        append_whole(self._file.fileno(), f"{json.dumps([key, value])}\n".encode())
        self._known[key] = value
