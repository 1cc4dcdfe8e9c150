"""What is searched, and how: the groups of compression, greedy strategy, space, sampler and study.

`Config` holds the groups. The command ``search`` uses the first two, and ``sweep`` uses all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from omegaconf import MISSING

from kvsharer_exp.cli.config.names import check_file_name
from kvsharer_exp.cli.config.passwords import refuse_password
from kvsharer_exp.cli.config.text_keys import PATH
from kvsharer_exp.cli.config.texts import one_of
from kvsharer_exp.values.errors import InputError, at_least

_RATIOS = [0.125, 0.25, 0.375]


@dataclass
class CompressionConfig:
    """How many layers are shared, or how much KV is kept.

    Args:
        ratios: targets / layers, each between 0 and 1. Default: 0.125, 0.25 and 0.375, the paper's.
            A ratio asks for round(ratio × num_layers) targets, with halves rounded up.
        kv: the shares of the full cache's bytes that plans may keep, each above 0 and at most 1, at
            ``footprint.context``. Default: 0.15, 0.1875, 0.22, 0.25 and 0.3125. For a search space
            of plans, as the default one is. There ``ratios`` only say how large the maps among the
            seeds are, and set no budget.
        kv_gib: a budget in GiB for ``footprint.batch`` sequences instead. Default: none.
    """

    ratios: list[float] = field(default_factory=lambda: list(_RATIOS))
    kv: list[float] | None = None
    kv_gib: float | None = None

    def __post_init__(self) -> None:
        if self.kv is not None and self.kv_gib is not None:
            raise InputError("compression.kv and compression.kv_gib are both given: give one")
        if (self.kv is not None or self.kv_gib is not None) and list(self.ratios) != _RATIOS:
            raise InputError(
                "compression.ratios and compression.kv are both given: give ratios for maps, "
                "or kv for plans"
            )
        if self.kv == []:
            raise InputError(
                "compression.kv=[] is empty: give at least one share, like [0.25], or leave it out"
            )
        for share in self.kv or []:
            if not 0 < share <= 1:
                raise InputError(f"compression.kv={share:g}: give shares above 0, at most 1")
        if self.kv_gib is not None and self.kv_gib <= 0:
            raise InputError(f"compression.kv_gib={self.kv_gib:g}: give GiB above 0")
        if not self.ratios:
            raise InputError("compression.ratios is empty: give at least one ratio, like [0.25]")
        for ratio in self.ratios:
            if not 0 < ratio < 1:
                raise InputError(f"compression.ratios={ratio:g}: give ratios between 0 and 1")


@dataclass
class SearchConfig:
    """The paper's greedy strategy.

    Args:
        order: which pair of the ranking is tried first: the most ``dissimilar`` (the default), the
            most ``similar``, or a ``random`` one.
        acceptance: whether a pair must pass the acceptance test to be shared. Default: true.
        threshold: T of that test, in [-1, 1]: a pair passes if the cosine is above T. Default: 0.5.
        all_windows: whether every pair is tested on all calibration windows. Default: false, which
            ends the test after the first windows if they leave no doubt.
    """

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
    """A search space or a sampler.

    Args:
        kind: its name, one of ours or another package's. It has no default: the chosen file of
            ``search_spaces/`` or ``conf/sampler/`` gives it.
        options: its own options, by name. Default: none.
    """

    kind: str = MISSING
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class StudyConfig:
    """The Optuna study of a sweep: how long it searches, where it is kept, and how it screens maps.

    In the finals, the best maps of each size are compared on windows that the search never used.

    Args:
        name: the name of the study, without a slash. Default: one made from the configuration.
        n_trials: the number of distinct plans in the whole study, at least 1. Default: 55. Seeds
            and the plans of earlier runs count.
        minutes: the minutes that this run may take for search and finals, above 0; ``n_trials``
            is not used then. Default: no limit. If there are finals, they have two fifths of it.
        final_windows: the most windows of the finals; 0 leaves the finals out. Default: with
            ``minutes``, as many as there is time for; without ``minutes``, none.
        storage: an RDB URL without a password, like ``postgresql://user@host/database``, or a
            journal file. Default: a journal under ``tracking.folder``.
        fresh: whether to forget what the study holds. Default: false, which continues it.
        patience: end the search after so many maps in a row, at least 1, that together add less
            than 0.1 % to the hypervolume. Default: it is not ended so.
        seeds: a file with more maps to start from: a list of maps, or the front.json or result.json
            of a sweep. Default: none.
        screen_windows: rising numbers of scoring windows, from 1 to below ``scoring.num_windows``.
            Default: 2 and 8, where there are more windows. A map that looks beaten after so many
            windows is not scored on the others.
        margin: how much larger its loss must be for that than the loss of the best map with no more
            KV, at least 0 (0.25: by a quarter). Default: learned for each number of windows.
    """

    name: str | None = None
    n_trials: int = 55
    minutes: float | None = None
    final_windows: int | None = None
    storage: str | None = field(default=None, metadata=PATH)
    fresh: bool = False
    patience: int | None = None
    seeds: str | None = field(default=None, metadata=PATH)
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
        if self.name is not None:
            check_file_name("study.name", self.name)
        if self.storage is not None:
            refuse_password("study.storage", self.storage)
