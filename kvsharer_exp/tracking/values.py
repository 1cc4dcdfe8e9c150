"""Turn our values into those that MLflow takes: allowed names, finite numbers, short texts.

`Tracker` passes what it logs through here.
"""

from __future__ import annotations

import math
import posixpath
import re
import time
from collections.abc import Mapping
from typing import Any

NAME, PARAM, TAG = 250, 6000, 8000
"""The most characters that a name, a param and a tag may have."""


def name_of(key: str) -> str:
    """Turn ``key`` into a name that MLflow takes; every character that it refuses becomes ``_``.

    MLflow takes letters, digits and ``_-. /:``, and the name must be a path in normal form.
    """
    path = posixpath.normpath(re.sub(r"[^\w\-. /:]", "_", key)).lstrip("./")
    return path[:NAME].rstrip("/") or "_"


def metrics_of(
    values: Mapping[str, float], step: int = 0, model_id: str | None = None
) -> list[Any]:
    """The finite ``values`` as metrics; ``model_id`` is the logged model they belong to, if any."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    finite = {name_of(key): float(value) for key, value in values.items() if math.isfinite(value)}
    return [Metric(key, value, now, step, model_id=model_id) for key, value in finite.items()]


def not_finite(values: Mapping[str, float]) -> str:
    """The names of the values that `metrics_of` leaves out."""
    return ", ".join(sorted(key for key, value in values.items() if not math.isfinite(value)))


def params_of(values: Mapping[str, Any]) -> list[Any]:
    from mlflow.entities import Param

    named = {name_of(key): str(value)[:PARAM] for key, value in values.items()}
    return [Param(key, value) for key, value in named.items()]


def tags_of(values: Mapping[str, str]) -> list[Any]:
    from mlflow.entities import RunTag

    return [RunTag(key, str(value)[:TAG]) for key, value in values.items()]
