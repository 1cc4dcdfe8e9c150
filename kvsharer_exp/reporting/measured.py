"""What a finished run measured, one value at a time, whatever command made the run.

`result_readers` reads these values from a run for the command ``report``, and `beside_paper` finds
the paper's number for each. A value is one score of one map (or of the full cache) in one run. It
comes with what must be known to compare it with a number of the paper: the model, the arm, the
number of shared layers and the settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from kvsharer_exp.values.errors import MALFORMED, InputError
from kvsharer_exp.values.text import clip, shorten


@dataclass(frozen=True)
class FinishedRun:
    """One run to report on.

    ``result``: its ``result.json``. ``config``: its configuration as recorded, nested. ``url``:
    where the UI shows the run; empty when the store does not hold it. ``pictures``: file name →
    PNG. ``source``: the run id or folder by which the run was named.
    """

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
        """The model's short name where the configuration has one, else its id."""
        return str(self.config.get("model", {}).get("name") or self.result["model"]["id"])

    @property
    def experiment(self) -> str:
        """The name of an ablation; empty for other commands."""
        return str(self.result.get("experiment", ""))

    @property
    def title(self) -> str:
        return " · ".join(filter(None, [self.model, self.command, self.experiment]))

    def page(self, run_id: str) -> str:
        """The address where the UI shows this run or its child ``run_id``."""
        return self.url.replace(self.run_id, run_id) if run_id else self.url


@contextmanager
def undamaged(run: FinishedRun) -> Iterator[None]:
    """Read the ``result.json`` of ``run`` in the block.

    Raises:
        InputError: the file holds something else than the command writes.
    """
    try:
        yield
    except (StopIteration, *MALFORMED) as error:
        reason = clip(" ".join(f"{type(error).__name__}: {error}".split()), 60)
        name = shorten(run.source or run.result.get("mlflow_run_id"))
        raise InputError(
            f"result.json of {name} is damaged ({reason}): run it again, or give another run"
        ) from error


@dataclass(frozen=True, slots=True)
class Measured:
    """One value of one map.

    ``map``: which map, in words. ``arm``: how the map was chosen (``front``: by a sweep).
    ``num_shared``: the number of its targets; 0 for the full cache, None where the draws of an arm
    differ. ``requested``: how many targets were asked for, if a number was. ``run_ids``: the MLflow
    runs that the value was read from. ``settings``: by configuration key. ``length``: prompt + new
    tokens. ``low``, ``high``: the interval of the value. ``retained``: the share of the full
    cache's quality that is left, between ``retained_low`` and ``retained_high``. ``mark``: ▲, ▼ or
    ≈, how the value compares with the first arm of its run. ``plan``: the text of a plan that is no
    sharing map; its ``num_shared`` is None. ``kv_fraction``: the share of the KV that is kept at
    ``footprint.context``; None where the file of the run does not tell it.
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
    retained_low: float | None = None
    retained_high: float | None = None
    mark: str = ""
    plan: str = ""
    kv_fraction: float | None = None
