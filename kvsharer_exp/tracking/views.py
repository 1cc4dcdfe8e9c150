"""Saved views: what the MLflow UI shows of a sweep without any set-up by the user.

`Tracker.save_view` saves one at the end of a sweep. MLflow keeps a view in the experiment's tag
``mlflow.sharedViewState.<key>``. The experiment's page opens it with ``?viewStateShareKey=<key>``,
and lists all views under *Views*.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

VIEW_TAG = "mlflow.sharedViewState."
_SECTION = "front"
_SHOWN = 12  # scores at most, because a tag of an experiment holds 20,000 characters


def front_view(parent_id: str, scores: Sequence[str]) -> dict[str, Any]:
    """A view of the runs on the front of one sweep, from the most KV kept to the least.

    The share of the KV tells maps and plans apart. The number of shared layers orders maps of one
    share as well, and plans hardly, so it is a column only.

    It draws the first two ``scores`` against the KV kept, all of them in parallel coordinates, and
    each as bars. Its table has columns for them too. Only the first twelve scores are shown.
    """
    scores = scores[:_SHOWN]
    metrics = ["num_shared", "kv_fraction", *scores]
    charts = [
        _chart("SCATTER", f"scatter {score}", xaxis=_axis("kv_fraction"), yaxis=_axis(score))
        for score in scores[:2]
    ]
    parallel = {"selectedParams": [], "selectedMetrics": metrics, "showAllRuns": False}
    charts.append(_chart("PARALLEL", "parallel", **parallel))
    charts += [_chart("BAR", f"bar {name}", metricKey=name, displayName=name) for name in scores]
    return {
        "searchFilter": f"tags.front = 'true' and tags.mlflow.parentRunId = '{parent_id}'",
        "orderByKey": "metrics.`kv_fraction`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": [*(f"metrics.`{name}`" for name in metrics), "params.`origin`"],
        "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": charts,
        "compareRunSections": [
            {"uuid": _SECTION, "name": "The front", "display": True, "isReordered": False}
        ],
        "isAccordionReordered": True,
        "hideEmptyCharts": True,
    }


def _axis(metric: str) -> dict[str, str]:
    return {"key": metric, "type": "METRIC"}


def _chart(kind: str, uuid: str, **more: Any) -> dict[str, Any]:
    fixed = {"metricSectionId": _SECTION, "deleted": False, "isGenerated": False}
    return {"uuid": uuid, "type": kind, "runsCountToCompare": 100, **fixed, **more}


def envelope(name: str, state: dict[str, Any]) -> str:
    """The value of the tag that holds the view ``state`` under the name ``name``."""
    now = int(time.time() * 1000)
    held = {"name": name, "createdAt": now, "updatedAt": now, "state": json.dumps(state)}
    return json.dumps(held)
