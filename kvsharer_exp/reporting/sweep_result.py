"""What a sweep found, as one value.

The command ``sweep`` makes it, and its page, table and files are made from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvsharer_exp.reporting.answers import headline
from kvsharer_exp.reporting.front_table import front_table, table_notes
from kvsharer_exp.reporting.sharing_front import holds_plans
from kvsharer_exp.search.fitness import axis_label
from kvsharer_exp.values.trial import FrontEntry, TrialResult


@dataclass(frozen=True)
class SweepResult:
    """What a finished sweep found.

    Args:
        model: the name of the model.
        study: the name of the study.
        fitness: what was searched for, in words.
        asked: what the sweep was asked, in words.
        entries: the front with its held-out scores, most KV first.
        full_scores: the scores of the full cache on the same items.
        full_intervals: [low, high] of those that have an interval.
        results: the result of every plan that was scored, in that order.
        front: the results behind ``entries``.
        reference_maps: the maps that others would have chosen, by the name of their method.
        volumes: the hypervolume of the front after each of ``results``.
        distances: ``[target][source]``, from which the ranking was made.
        distance: the name of that distance.
        environment: versions, machine, commit and seeds.
        compare_url: where the MLflow UI compares the front; empty before the view is saved.
        intervals: between which two values a plan's score lies, see `front_figure`.
        beaten: the paper's maps, at the ratios asked for, that are not on the front.
        finals: what ``result.json`` says of the finals.
        architecture: the model's class in transformers, by which engines know what to run.
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
    architecture: str = ""
    full_intervals: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def table(self) -> list[list[str]]:
        """See `front_table`."""
        return front_table(self.entries, self.full_scores, self.full_intervals)

    @property
    def notes(self) -> list[str]:
        """See `table_notes`."""
        return table_notes(self.entries, self.full_scores, self.full_intervals)

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
    def has_plans(self) -> bool:
        """Whether the front has a plan that is no sharing map."""
        return holds_plans(self.entries)

    @property
    def changed(self) -> list[FrontEntry]:
        """All of the front but the full cache.

        Maps come in the order of shared layers, fewest first. Plans come in the order of the KV
        that they keep, most first.
        """
        found = [entry for entry in self.entries if not entry.is_full]
        if self.has_plans:
            return sorted(found, key=lambda entry: -entry.kv_fraction)
        return sorted(found, key=lambda entry: entry.num_shared)

    @property
    def drawing(self) -> dict[str, Any]:
        """The arguments that both pictures of the front have in common."""
        return {
            "reference_maps": self.reference_maps,
            "score_label": self.score_label,
            "full_score": 0.0,
            "intervals": self.intervals,
        }
