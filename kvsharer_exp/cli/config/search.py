"""What is searched, and how: compression, greedy strategy, space, sampler, study."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from omegaconf import MISSING

from kvsharer_exp.cli.config.texts import one_of
from kvsharer_exp.values.errors import InputError, at_least


@dataclass
class CompressionConfig:
    """Targets / layers; a ratio asks for round(ratio × num_layers) targets, halves up."""

    ratios: list[float] = field(default_factory=lambda: [0.125, 0.25, 0.375])

    def __post_init__(self) -> None:
        if not self.ratios:
            raise InputError("compression.ratios is empty: give at least one ratio, like [0.25]")
        for ratio in self.ratios:
            if not 0 < ratio < 1:
                raise InputError(f"compression.ratios={ratio:g}: give ratios between 0 and 1")


@dataclass
class SearchConfig:
    """The paper's greedy strategy: order of the pairs, acceptance test, its threshold T. A pair is
    decided on the first calibration windows where they leave no doubt, otherwise, or with
    ``all_windows``, on all of them."""

    order: str = "dissimilar"
    acceptance: bool = True
    threshold: float = 0.5
    all_windows: bool = False

    def __post_init__(self) -> None:
        one_of("search.order", self.order, ("dissimilar", "similar", "random"))
        if not -1 <= self.threshold <= 1:
            raise InputError(f"search.threshold={self.threshold:g}: give a cosine in [-1, 1]")


@dataclass
class ComponentConfig:
    """A class by its registry name, with its options."""

    kind: str = MISSING
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class StudyConfig:
    """The Optuna study. ``n_trials`` counts distinct maps in the whole study, seeds and resumed
    ones included; ``minutes`` ends the search phase of this run instead. Two fifths of them go to
    the finals: the best maps of each size on up to ``final_windows`` further windows (null: as many
    as there is time for; without ``minutes`` none). ``patience``: so many maps
    in a row that add less than 0.1 % to the hypervolume end it earlier. ``storage``: an RDB URL or
    a journal file (default: a journal under ``tracking.folder``). ``seeds``: a file with maps to
    start from (a list of maps, or a front.json or result.json of a sweep). A map is scored on the
    first of the scoring windows before it is on all: where it looks beaten after so many as
    ``screen_windows`` lists, by more than ``margin`` (default: learned at each), it stops."""

    name: str | None = None
    n_trials: int = 55
    minutes: float | None = None
    final_windows: int | None = None
    storage: str | None = None
    fresh: bool = False
    patience: int | None = None
    seeds: str | None = None
    screen_windows: list[int] = field(default_factory=lambda: [2, 8])
    margin: float | None = None

    def __post_init__(self) -> None:
        at_least("study.n_trials", self.n_trials, 1)
        if any(a >= b for a, b in pairwise([0, *self.screen_windows])):
            raise InputError(
                f"study.screen_windows={list(self.screen_windows)}: give rising numbers of "
                "windows from 1 up, or [] to score every map on all"
            )
        if self.minutes is not None and self.minutes <= 0:
            raise InputError(f"study.minutes={self.minutes:g}: give minutes above 0, or leave out")
        if self.final_windows is not None:
            at_least("study.final_windows", self.final_windows, 0)
        if self.patience is not None:
            at_least("study.patience", self.patience, 1)
        if self.margin is not None and self.margin < 0:
            raise InputError(f"study.margin={self.margin:g}: give at least 0")
        if self.name is not None and (not self.name or "/" in self.name):
            raise InputError(f"study.name={self.name!r}: give a name without a slash")
