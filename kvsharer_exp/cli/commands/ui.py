"""The command ``ui``: serve the MLflow UI on this store, with the flags that keep it light."""

from __future__ import annotations

import json
import signal
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import quote

from hydra.core.hydra_config import HydraConfig

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.tracking.server import runs_page, ui_command
from kvsharer_exp.tracking.store import is_outdated, prepare_store
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.ports import check_port


def run(config: Config) -> None:
    """Serve until interrupted, and print the address once the server answers.

    What the server says goes to ``server.log`` in the run folder.
    """
    uri, port = config.tracking.uri, config.ui.port
    if uri.startswith("http"):
        raise InputError(
            f"tracking.uri={uri[:80]} is a server, which has its own UI: open it in a browser"
        )
    check_port("ui.port", port)
    prepare_store(uri, config.tracking.experiment, config.tracking.artifacts)
    log = Path(HydraConfig.get().runtime.output_dir) / "server.log"
    host = f"http://127.0.0.1:{port}"
    arguments, environment = ui_command(uri, port)
    # Ctrl-C ends this command and the server, also if this is a background job. `main` sees to it
    # that SIGTERM does the same.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with (
        log.open("wb") as out,
        subprocess.Popen(arguments, env=environment, stdout=out, stderr=out) as server,
    ):
        print(f"starting the MLflow UI (log: {log})", flush=True)
        try:
            while server.poll() is None and _get(f"{host}/health") != b"OK":
                time.sleep(0.2)
            if server.poll() is None:
                address = _address(host, config.tracking.experiment)
                print(f"{address}   (Ctrl-C stops it)", flush=True)
            code = server.wait()
        except KeyboardInterrupt:
            server.terminate()
            return
    if code:
        text = log.read_text(encoding="utf-8", errors="replace")
        raise is_outdated(uri, text) or RuntimeError(
            f"the MLflow server ended with exit code {code}: see {log}"
        )


def _get(url: str) -> bytes | None:
    """The answer of the server; None if it does not answer, or answers with an error."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            content: bytes = answer.read()
            return content
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return None


def _address(host: str, experiment: str) -> str:
    """The page of the experiment's runs, or the first page if there is no such experiment yet."""
    found = _get(
        f"{host}/api/2.0/mlflow/experiments/get-by-name?experiment_name={quote(experiment)}"
    )
    if found is None:
        return host
    return runs_page(host, json.loads(found)["experiment"]["experiment_id"])
