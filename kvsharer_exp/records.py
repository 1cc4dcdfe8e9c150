"""The values that flow between rooms: frozen, standard library only, with a JSON round trip."""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from statistics import fmean
from typing import Any, Literal, Self

from kvsharer_exp.sharing_map import SharingMap

SCHEMA = 1  # of result.json


class _Json:
    """``to_dict``/``from_dict`` and ``to_json``/``from_json`` for the records below."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        hints = typing.get_type_hints(cls)
        return cls(**{name: _typed(hints[name], value) for name, value in data.items()})

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls.from_dict(json.loads(text))


def _plain(value: Any) -> Any:
    if isinstance(value, SharingMap):
        return list(value.kv_source_layers)
    if isinstance(value, _Json):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _typed(hint: Any, value: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _typed(next(arg for arg in args if arg is not type(None)), value)
    if hint is SharingMap:
        return SharingMap(tuple(value))
    if isinstance(hint, type) and issubclass(hint, _Json):
        return hint.from_dict(value)
    if origin is tuple:
        return tuple(_typed(args[0], item) for item in value)
    if origin is Mapping:
        return dict(value)
    return value


@dataclass(frozen=True, slots=True)
class LayerPair(_Json):
    """``target`` (nearer the output) could read ``source`` (nearer the input)."""

    target: int
    source: int
    distance: float


@dataclass(frozen=True, slots=True)
class DissimilarityRanking(_Json):
    """Every pair of layers that may share, most dissimilar first.

    Pairs of unlike layers (KV shape, sliding against full attention) are not in it.
    """

    model_id: str
    distance: str
    num_layers: int
    pairs: tuple[LayerPair, ...]


@dataclass(frozen=True, slots=True)
class MeasuredFootprint(_Json):
    """What was counted on tensors that exist, beside what the shapes predict."""

    cache_bytes: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Footprint(_Json):
    """Memory of one map. ``kv_fraction``: its KV bytes per token / the full cache's."""

    kv_bytes_per_token: int
    kv_fraction: float
    parameter_bytes_saved: int
    measured: MeasuredFootprint | None = None


@dataclass(frozen=True, slots=True)
class CandidateScores(_Json):
    """One map against the full cache, one number per window (all windows have equal length).

    ``cosines``: of the flattened last hidden states, as in the authors' acceptance test.
    ``kls``: mean over tokens of KL(full ‖ shared) of the next-token distributions, nats.
    ``nlls``: mean over predicted tokens, nats. The last two are empty when no logits were asked
    for. ``a + b`` joins the windows of two evaluations, ``a[2:8]`` takes some.
    """

    cosines: tuple[float, ...]
    kls: tuple[float, ...] = ()
    nlls: tuple[float, ...] = ()

    def __add__(self, other: CandidateScores) -> CandidateScores:
        return CandidateScores(
            self.cosines + other.cosines, self.kls + other.kls, self.nlls + other.nlls
        )

    def __getitem__(self, windows: slice) -> CandidateScores:
        """Those of some ``windows``."""
        return CandidateScores(self.cosines[windows], self.kls[windows], self.nlls[windows])

    @property
    def cosine(self) -> float:
        return fmean(self.cosines)

    @property
    def kl(self) -> float:
        return fmean(self.kls)

    @property
    def perplexity(self) -> float:
        return math.exp(fmean(self.nlls))


@dataclass(frozen=True, slots=True)
class GreedyStep(_Json):
    """One pair the greedy strategy tried; ``cosine`` is None when no test was asked for, else the
    mean over the ``windows`` it took to decide."""

    target: int
    source: int
    distance: float
    cosine: float | None
    accepted: bool
    windows: int = 0


@dataclass(frozen=True, slots=True)
class GreedyResult(_Json):
    """The greedy strategy at one compression ratio; ``found`` may be below ``requested``."""

    compression: float
    requested: int
    found: int
    kv_source_layers: tuple[int, ...]
    candidates: int
    seconds: float
    trace: tuple[GreedyStep, ...]


Status = Literal["complete", "screened_out", "failed"]
SAMPLED = "sampler"  # the origin of a map that is no seed


@dataclass(frozen=True, slots=True)
class TrialResult(_Json):
    """What one trial gave. A failed or screened-out trial carries no score it did not measure.

    ``score`` is the objective (higher is better), None unless ``status`` is ``complete``.
    ``reason`` says why a trial failed or was screened out. ``window_losses``: of a complete map,
    what the search minimises, on every scoring window.
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


@dataclass(frozen=True, slots=True)
class FrontEntry(_Json):
    """One map of the front with its scores, as ``result.json`` writes it.

    ``intervals``: [low, high] of a score, 95 %, over the windows or items it is a mean of.
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
