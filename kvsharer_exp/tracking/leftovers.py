"""End the runs that nobody writes to any more, so that none of them stays RUNNING for ever.

`Tracker` calls these functions with its client. A process that is killed ends neither its run nor
the child run that it may have been writing. A process that is interrupted ends its run, and the
child run with it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

STUDY_KEY = "study_key"
"""The tag of a sweep's run that says which study it belongs to (`StudyStore.key`)."""

_PAGE = 1000
_OPEN = "attributes.status = 'RUNNING'"


def close_children(client: Any, experiment_id: str, parent_id: str) -> None:
    """End every open child run of a run as KILLED."""
    for child_id in _find(client, experiment_id, _child_of(parent_id), _OPEN):
        client.set_terminated(child_id, "KILLED")


def close_study(client: Any, experiment_id: str, key: str, *, but: str) -> None:
    """End every open run of the study ``key`` as KILLED, with its children; of ``but`` only these.

    Whoever calls this must be the only process that runs the study.
    """
    for run_id in _find(client, experiment_id, f"tags.{STUDY_KEY} = '{key}'", _OPEN):
        close_children(client, experiment_id, run_id)
        if run_id != but:
            client.set_terminated(run_id, "KILLED")


def delete_trials(client: Any, experiment_id: str, parent_id: str, but: Collection[str]) -> None:
    """Delete the child runs of trials that are not among ``but``; MLflow can restore them."""
    for child_id in _find(client, experiment_id, _child_of(parent_id), "tags.trial != ''"):
        if child_id not in but:
            client.delete_run(child_id)


def _child_of(parent_id: str) -> str:
    return f"tags.`mlflow.parentRunId` = '{parent_id}'"


def _find(client: Any, experiment_id: str, *conditions: str) -> list[str]:
    """The ids of all runs that are not deleted and meet all ``conditions``."""
    found: list[str] = []
    token = None
    while True:
        page = client.search_runs(
            [experiment_id], " and ".join(conditions), max_results=_PAGE, page_token=token
        )
        found += [run.info.run_id for run in page]
        token = page.token
        if not token:
            return found
