"""MLflow: one run per command, one child run per trial. Nothing else touches the store."""

from kvsharer_exp.tracking.environment import environment
from kvsharer_exp.tracking.runs import Runs, StoredRun
from kvsharer_exp.tracking.server import runs_page, ui_command
from kvsharer_exp.tracking.store import check_writable, is_outdated
from kvsharer_exp.tracking.tracker import Tracker

__all__ = [
    "Runs",
    "StoredRun",
    "Tracker",
    "check_writable",
    "environment",
    "is_outdated",
    "runs_page",
    "ui_command",
]
