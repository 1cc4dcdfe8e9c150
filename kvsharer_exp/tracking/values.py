"""Our values as MLflow takes them: allowed names, finite numbers, texts that are not too long."""

from __future__ import annotations

import math
import posixpath
import re
import time
from collections.abc import Mapping
from typing import Any

NAME, PARAM, TAG = 250, 6000, 8000
"""Characters that a name, a param and a tag may have."""


def name_of(key: str) -> str:
    """MLflow takes letters, digits and ``_-. /:`` in names that are paths in normal form."""
    path = posixpath.normpath(re.sub(r"[^\w\-. /:]", "_", key)).lstrip("./")
    return path[:NAME].rstrip("/") or "_"


def metrics_of(
    values: Mapping[str, float], step: int = 0, model_id: str | None = None
) -> list[Any]:
    """The finite ones; of the logged model ``model_id`` when given."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    finite = {name_of(key): float(value) for key, value in values.items() if math.isfinite(value)}
    return [Metric(key, value, now, step, model_id=model_id) for key, value in finite.items()]


def not_finite(values: Mapping[str, float]) -> str:
    """The names of those that `metrics_of` leaves out."""
    return ", ".join(sorted(key for key, value in values.items() if not math.isfinite(value)))


def params_of(values: Mapping[str, Any]) -> list[Any]:
    from mlflow.entities import Param

    named = {name_of(key): str(value)[:PARAM] for key, value in values.items()}
    return [Param(key, value) for key, value in named.items()]


def tags_of(values: Mapping[str, str]) -> list[Any]:
    from mlflow.entities import RunTag

    return [RunTag(key, str(value)[:TAG]) for key, value in values.items()]
