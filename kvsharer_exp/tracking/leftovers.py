"""End the runs that nobody writes to any more, so that none of them stays RUNNING for ever.

`Tracker` calls these functions with its client. A process that is killed ends neither its run nor
the child run that it may have been writing. A process that is interrupted ends its run, and the
child run with it.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise
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

    Each is linked with the one that began after it, and the last one with ``but``. Whoever calls
    this must be the only process that runs the study.
    """
    left = _find(client, experiment_id, f"tags.{STUDY_KEY} = '{key}'", _OPEN)
    for run_id in left:
        close_children(client, experiment_id, run_id)
    for run_id, successor in pairwise([*(i for i in reversed(left) if i != but), but]):
        link(client, run_id, successor)
        client.set_terminated(run_id, "KILLED")


def link(client: Any, run_id: str, successor: str) -> None:
    """Tag a run that was killed and the run that goes on in its place with each other's id."""
    client.set_tag(run_id, "continued_by", successor)
    client.set_tag(successor, "continues", run_id)


def delete_trials(client: Any, experiment_id: str, parent_id: str, but: Collection[str]) -> None:
    """Delete the child runs of trials that are not among ``but``; MLflow can restore them."""
    for child_id in _find(client, experiment_id, _child_of(parent_id), "tags.trial != ''"):
        if child_id not in but:
            client.delete_run(child_id)


def _child_of(parent_id: str) -> str:
    return f"tags.`mlflow.parentRunId` = '{parent_id}'"


def _find(client: Any, experiment_id: str, *conditions: str) -> list[str]:
    """The ids of all runs that are not deleted and meet all ``conditions``, the newest first."""
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
