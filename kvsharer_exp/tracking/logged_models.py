"""Keep a map or a plan in MLflow as a logged model with a file, which the UI lists as a model.

`Tracker.log_map` asks for the model of a run of a front, and logs the scores of the run for it.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvsharer_exp.tracking.store import quiet
from kvsharer_exp.values.plan import KVPlan


def model_of(
    client: Any,
    experiment_id: str,
    run_id: str,
    plan: KVPlan,
    name: str,
    about: Mapping[str, str],
) -> str:
    """The id of the logged model of a run, which is made if the run has none yet.

    It holds ``map.json``, or ``plan.json`` for a plan that is no map. ``about``: further params.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    outputs = client.get_run(run_id).outputs
    if outputs and outputs.model_outputs:
        return str(outputs.model_outputs[0].model_id)
    is_map = plan.sharing_map is not None
    named = {"kv_source_layers" if is_map else "plan": str(plan), "digest": plan.digest}
    model_id = client.create_logged_model(
        experiment_id,
        name=re.sub(r"[^\w -]", "-", name),
        source_run_id=run_id,
        tags=None if is_map else named,
        params={**named, **about},
        model_type="sharing map" if is_map else "KV plan",
    ).model_id
    with tempfile.TemporaryDirectory() as folder, quiet():
        file = Path(folder) / ("map.json" if is_map else "plan.json")
        file.write_text(plan.to_json() + "\n", encoding="utf-8")
        client.log_model_artifact(model_id, str(file))
    client.finalize_logged_model(model_id, LoggedModelStatus.READY)
    client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
    return str(model_id)
