"""The MLflow UI of a store: the command that starts it, and the addresses of its pages.

The command ``ui`` starts it. Commands that keep a run print the address of its page.
"""

from __future__ import annotations

import os
import sys
from urllib.parse import urlencode

UI = "http://127.0.0.1:5000"
# The UI has one half for agents and one for machine learning. Without this it opens the former.
_HALF = {"workflowType": "machine_learning"}


def ui_command(uri: str, port: int) -> tuple[list[str], dict[str, str]]:
    """(argv, environment) that start an MLflow server which only this machine can reach.

    The server has one worker and no job runner.
    """
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
    command += ["--backend-store-uri", uri, "--host", "127.0.0.1", "--port", str(port)]
    settings = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return command, {**os.environ, **settings}


def runs_page(host: str, experiment_id: str, run_id: str = "", **options: str) -> str:
    """Address of the page with an experiment's runs, or with the run ``run_id`` alone."""
    path = "/".join(filter(None, ["experiments", experiment_id, "runs", run_id]))
    return f"{host}/#/{path}?{urlencode(_HALF | options)}"
