"""What a finished run measured, one value at a time, whatever command it was.

A value is one score of one map (or of the full cache) in one run, with what has to be known to lay
it beside a number of the paper: the model, the arm, the layers shared and the settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class FinishedRun:
    """One run to report on. ``config``: as recorded, nested. ``url``: where the UI shows it, empty
    when the store does not hold it. ``pictures``: file name → PNG. ``source``: as it was named."""

    result: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)
    url: str = ""
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    source: str = ""

    @property
    def run_id(self) -> str:
        return str(self.result["mlflow_run_id"])

    @property
    def command(self) -> str:
        return str(self.result["command"])

    @property
    def model(self) -> str:
        """The short name where the configuration has one, else the id."""
        return str(self.config.get("model", {}).get("name") or self.result["model"]["id"])

    @property
    def experiment(self) -> str:
        """Of an ablation, which one."""
        return str(self.result.get("experiment", ""))

    @property
    def title(self) -> str:
        return " · ".join(filter(None, [self.model, self.command, self.experiment]))

    def page(self, run_id: str) -> str:
        """Where the UI shows this run or a child of it."""
        return self.url.replace(self.run_id, run_id) if run_id else self.url


@dataclass(frozen=True, slots=True)
class Measured:
    """One value of one map.

    ``map``: which, in words. ``arm``: how it was chosen (``front``: by a sweep). ``num_shared``:
    its targets, 0 for the full cache, None where draws differ; ``requested``: how many were asked
    for, if it was. ``run_ids``: the MLflow runs it was read from. ``settings``: by configuration
    key. ``length``: prompt + new tokens. ``low``, ``high``: its interval.
    """

    quantity: str
    value: float
    model: str
    model_id: str
    num_layers: int
    map: str
    arm: str
    num_shared: int | None
    requested: int | None
    run_ids: tuple[str, ...]
    run: FinishedRun
    settings: Mapping[str, Any]
    experiment: str = ""
    length: str = ""
    low: float | None = None
    high: float | None = None
    retained: float | None = None
    mark: str = ""
