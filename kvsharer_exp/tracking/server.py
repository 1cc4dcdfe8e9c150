"""The MLflow UI of a store: how it is started, and what its pages are called."""

from __future__ import annotations

import os
import sys
from urllib.parse import urlencode

UI = "http://127.0.0.1:5000"
# The UI opens its pages for agents unless told which half of it is wanted.
_HALF = {"workflowType": "machine_learning"}


def ui_command(uri: str, port: int) -> tuple[list[str], dict[str, str]]:
    """(argv, environment) of an MLflow server on this machine only: one worker, no job runner."""
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
    command += ["--backend-store-uri", uri, "--host", "127.0.0.1", "--port", str(port)]
    settings = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return command, {**os.environ, **settings}


def runs_page(host: str, experiment_id: str, run_id: str = "", **options: str) -> str:
    """Address of an experiment's runs, or of one of them."""
    path = "/".join(filter(None, ["experiments", experiment_id, "runs", run_id]))
    return f"{host}/#/{path}?{urlencode(_HALF | options)}"
