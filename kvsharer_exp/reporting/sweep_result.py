"""What a sweep found, as one value: made by the command, told by its page, table and files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvsharer_exp.reporting.answers import headline
from kvsharer_exp.search.fitness import axis_label
from kvsharer_exp.values.trial import FrontEntry, TrialResult


@dataclass(frozen=True)
class SweepResult:
    """What a finished sweep found.

    Args:
        study: the name of its study.
        asked: what the sweep was told, in words.
        entries: the front with its held-out scores, most KV first.
        full_scores: the full cache's scores on the same items.
        results: every map that was scored, in that order.
        front: the results behind ``entries``.
        reference_maps: the maps that others would have chosen, by the name of their method.
        volumes: the hypervolume of the front after each of ``results``.
        distances: ``[target][source]``, what the ranking was made from; ``distance``: its name.
        environment: versions, machine, commit and seeds.
        compare_url: where the MLflow UI compares the front; empty before the view is saved.
        intervals: what a map's score may be, see `front_figure`.
        beaten: the paper's maps at the ratios asked for that are not on the front, with theirs.
        finals: what ``result.json`` says of the finals.
    """

    model: str
    study: str
    fitness: str
    asked: Mapping[str, str]
    entries: Sequence[FrontEntry]
    full_scores: Mapping[str, float]
    results: Sequence[TrialResult]
    front: Sequence[TrialResult]
    reference_maps: Mapping[str, Sequence[TrialResult]]
    volumes: Sequence[float]
    distances: Sequence[Sequence[float]]
    distance: str
    environment: Mapping[str, str]
    compare_url: str = ""
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    beaten: Sequence[FrontEntry] = ()
    finals: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.model}: memory against accuracy"

    @property
    def headline(self) -> str:
        return headline(self.model, self.entries, self.reference_maps, self.results)

    @property
    def score_label(self) -> str:
        return axis_label(self.fitness)

    @property
    def shared(self) -> list[FrontEntry]:
        """The maps of the front that share layers, fewest first."""
        return sorted((e for e in self.entries if e.num_shared), key=lambda e: e.num_shared)

    @property
    def drawing(self) -> dict[str, Any]:
        """What both pictures of the front are given."""
        return {
            "reference_maps": self.reference_maps,
            "score_label": self.score_label,
            "full_score": 0.0,
            "intervals": self.intervals,
        }
