"""What became of one trial of a sweep, and one plan of its front.

The coordinator (`search.study`) makes a `TrialResult` of every new plan. The command ``sweep``
makes the `FrontEntry` of a plan of the front.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kvsharer_exp.values.footprint import Footprint
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.record import Record
from kvsharer_exp.values.sharing_map import SharingMap

Status = Literal["complete", "screened_out", "failed"]
SAMPLED = "sampler"  # the origin of a map that is no seed


@dataclass(frozen=True, slots=True)
class TrialResult(Record):
    """What one trial measured of a plan. A failed or screened-out trial holds no made-up score.

    ``score`` is the objective, where higher is better; it is None unless ``status`` is
    ``complete``. ``reason`` says why a trial failed or was screened out. ``window_losses`` holds
    the loss of a complete plan on every scoring window, which is what the search minimises.
    """

    number: int
    params: Mapping[str, Any]
    plan: KVPlan
    scores: Mapping[str, float]
    footprint: Footprint
    status: Status
    stage_reached: str
    seconds: float
    score: float | None = None
    origin: str = ""
    reason: str = ""
    window_losses: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "plan", KVPlan.of(self.plan))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrialResult:
        """Read what `to_dict` gave, also in a version that knew maps only."""
        known = dict(data)
        if "sharing_map" in known:
            known["plan"] = known.pop("sharing_map")
        return super(TrialResult, cls).from_dict(known)

    @property
    def sharing_map(self) -> SharingMap | None:
        """The plan as a sharing map; None if it does more than owning and reading."""
        return self.plan.sharing_map

    @property
    def num_shared(self) -> int:
        """How many layers read another one."""
        return len(self.plan.targets)


@dataclass(frozen=True, slots=True)
class FrontEntry(Record):
    """One plan of the front with its scores, as ``result.json`` writes it.

    ``kv_source_layers`` is None for a plan that is no map, and ``num_shared`` counts targets.
    ``intervals`` holds [low, high] by score name: the 95 % interval over the windows or items
    whose mean the score is, and by `share_name` that of what is retained of the full cache's.
    """

    kv_source_layers: tuple[int, ...] | None
    digest: str
    num_shared: int
    kv_fraction: float
    scores: Mapping[str, float]
    retained: Mapping[str, float] = field(default_factory=dict)
    mlflow_run_id: str = ""
    origin: str = ""
    intervals: Mapping[str, list[float]] = field(default_factory=dict)
    plan: str = ""
    kv_bytes_per_token: float = 0
    footprint_context: int = 0
    parameter_bytes_saved: int = 0

    @property
    def kv_plan(self) -> KVPlan:
        """The plan itself. Entries of versions that knew maps only have no text of it."""
        return KVPlan.parse(self.plan or list(self.kv_source_layers or ()))

    @property
    def is_full(self) -> bool:
        """Whether this is the full cache."""
        return self.kv_plan == KVPlan.full(self.kv_plan.num_layers)
