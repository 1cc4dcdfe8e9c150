"""Write ``result.json``, and make the keys that are the same for every command."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.score_names import Directions, PassMarks, unusual
from kvsharer_exp.values.sharing_map import SharingMap

SCHEMA = 1
"""The version of ``result.json``, which the file holds as ``schema``."""


def head(
    config: Config,
    *,
    model: Mapping[str, Any] | None,
    seconds: float,
    mlflow_run_id: str | None,
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """The keys that every ``result.json`` begins with."""
    return {
        "schema": SCHEMA,
        "command": config.command,
        "model": model,
        "seed": config.seed,
        "seconds": round(seconds, 3),
        "mlflow_run_id": mlflow_run_id,
        "versions": versions,
    }


def write_result(folder: Path, result: Mapping[str, Any]) -> str:
    """Write ``result.json`` into ``folder``, whole or not at all; returns the text of the file."""
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    path = folder / "result.json"
    partial = path.with_suffix(".json.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    return text


def identify(plan: KVPlan | SharingMap) -> dict[str, Any]:
    """The keys by which every ``result.json`` names a plan, or a map.

    ``kv_source_layers`` is null for a plan that is no map, and ``num_shared`` counts the layers
    that read keys or values of another.
    """
    plan = KVPlan.of(plan)
    sources = plan.sharing_map
    return {
        "kv_source_layers": None if sources is None else list(sources.kv_source_layers),
        "plan": str(plan),
        "digest": plan.digest,
        "num_shared": len(plan.targets),
    }


def tags_of(plan: KVPlan) -> dict[str, str]:
    """The tags by which an MLflow run names a plan: ``kv_source_layers`` only of a map."""
    sources = {} if plan.sharing_map is None else {"kv_source_layers": str(plan)}
    return {**sources, "plan": str(plan), "digest": plan.digest}


def told_by_tasks(directions: Directions, pass_marks: PassMarks) -> dict[str, Any]:
    """What must be known of the tasks to say what is retained; keys that hold nothing are left out.

    ``directions`` says whether higher is better, of scores whose name does not tell it, and
    ``pass_marks`` below which score the full cache fails a task.
    """
    told = {"directions": unusual(directions), "pass_marks": dict(pass_marks)}
    return {key: found for key, found in told.items() if found}
