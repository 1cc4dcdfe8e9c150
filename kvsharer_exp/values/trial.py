"""What became of one trial of a sweep, and one map of its front.

The coordinator (`search.study`) makes a `TrialResult` of every new map. The command ``sweep`` makes
the `FrontEntry` of a map of the front.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kvsharer_exp.values.footprint import Footprint
from kvsharer_exp.values.record import Record
from kvsharer_exp.values.sharing_map import SharingMap

Status = Literal["complete", "screened_out", "failed"]
SAMPLED = "sampler"  # the origin of a map that is no seed


@dataclass(frozen=True, slots=True)
class TrialResult(Record):
    """What one trial measured. A failed or screened-out trial holds no score that was made up.

    ``score`` is the objective, where higher is better; it is None unless ``status`` is
    ``complete``. ``reason`` says why a trial failed or was screened out. ``window_losses`` holds
    the loss of a complete map on every scoring window, which is what the search minimises.
    """

    number: int
    params: Mapping[str, Any]
    sharing_map: SharingMap
    scores: Mapping[str, float]
    footprint: Footprint
    status: Status
    stage_reached: str
    seconds: float
    score: float | None = None
    origin: str = ""
    reason: str = ""
    window_losses: tuple[float, ...] = ()

    @property
    def num_shared(self) -> int:
        """How many layers the map shares, that is its number of targets."""
        return len(self.sharing_map.targets)


@dataclass(frozen=True, slots=True)
class FrontEntry(Record):
    """One map of the front with its scores, as ``result.json`` writes it.

    ``intervals`` holds [low, high] by score name: the 95 % interval over the windows or items
    whose mean the score is.
    """

    kv_source_layers: tuple[int, ...]
    digest: str
    num_shared: int
    kv_fraction: float
    scores: Mapping[str, float]
    retained: Mapping[str, float] = field(default_factory=dict)
    mlflow_run_id: str = ""
    origin: str = ""
    intervals: Mapping[str, list[float]] = field(default_factory=dict)
