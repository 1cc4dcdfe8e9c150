"""``ui``: the MLflow UI on this store, with the flags that keep it light."""

from __future__ import annotations

import socket
import subprocess

from kvsharer_exp.config import Config
from kvsharer_exp.errors import InputError
from kvsharer_exp.tracking import ui_command


def run(config: Config) -> None:
    """Serve until interrupted."""
    port = config.ui.port
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise InputError(f"port {port} is in use: give another with ui.port=") from error
    arguments, environment = ui_command(config.tracking.uri, port)
    print(f"http://127.0.0.1:{port}  (Ctrl-C stops it)", flush=True)
    with subprocess.Popen(arguments, env=environment) as server:
        try:
            code = server.wait()
        except KeyboardInterrupt:
            server.terminate()
            return
    if code:
        raise RuntimeError(f"the MLflow server ended with exit code {code}")
