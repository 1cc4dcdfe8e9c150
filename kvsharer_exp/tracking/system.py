"""Sample CPU, memory, disk, network and GPU during a long run, with MLflow's own monitor.

`Tracker` starts this for every run of a command, but not for child runs.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

from kvsharer_exp.tracking.store import quiet

AFTER_SECONDS = 600.0
_EVERY_SECONDS = 30


class SystemMetrics:
    """Starts to sample a run once it has lasted ``after_seconds``, so a short run has no samples.

    GPUs are sampled only if ``nvidia-ml-py`` is installed.
    https://mlflow.org/docs/latest/system-metrics/
    """

    def __init__(self, uri: str, run_id: str, after_seconds: float = AFTER_SECONDS) -> None:
        self._uri, self._run_id = uri, run_id
        self._monitor: Any = None
        self._timer = threading.Timer(after_seconds, self._start)
        self._timer.daemon = True
        self._timer.start()

    def _start(self) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        # The monitor ends when a server does not answer it; `patience` says that it is away.
        logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
        with quiet():
            monitor = SystemMetricsMonitor(
                self._run_id,
                sampling_interval=_EVERY_SECONDS,
                resume_logging=True,
                tracking_uri=self._uri,
            )
            monitor.start()
        self._monitor = monitor

    def stop(self) -> None:
        """Stop sampling; no sample is taken after this."""
        self._timer.cancel()
        self._timer.join()
        if self._monitor is not None:
            with quiet():
                self._monitor.finish()
