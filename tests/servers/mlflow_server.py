"""A real MLflow server of the tests' own, whose runs are in a PostgreSQL database."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from kvsharer_exp.values.ports import free_port
from tests.servers.postgres import PASSWORD

_SECONDS = 120.0  # a server imports for a while on a busy machine


@dataclass
class MlflowServer:
    """A server that can be killed and started again; its runs stay in the database."""

    database: str
    folder: Path
    port: int = field(default_factory=free_port)
    _process: subprocess.Popen | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, *, wait: bool = True) -> None:
        """Start it; with ``wait`` it answers when this returns."""
        store = self.database.replace("postgresql:", "postgresql+psycopg:")
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", store]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        settings = {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "PGPASSWORD": PASSWORD,
        }
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.folder,
                env={**os.environ, **settings},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + _SECONDS
        while not self.answers():
            assert time.monotonic() < deadline, (self.folder / "server.log").read_text()[-2000:]
            time.sleep(0.2)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def kill(self) -> None:
        """End it and its workers at once, as a crash does."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@contextmanager
def running_server(database: str, folder: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(database, folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()
