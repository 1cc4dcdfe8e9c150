"""Summarise an ablation: arms with intervals, and which of their differences are real.

The command ``ablate`` makes a `Row` of every map or KV plan, and `summarise` turns rows into cells.
Tables, figures and files are made from these.

The reference is the first arm of the first variant. Every other arm is compared with it item by
item, at the same ratio, and only where both share the same number of layers. The p-values of one
score are adjusted over the whole table with Holm's method, so that chance does not mark one or two
of 30 cells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any

from kvsharer_exp.search.paper.arms import PLAN_ARMS, evaluated
from kvsharer_exp.values.comparisons import Comparison, compare, compare_draws, holm
from kvsharer_exp.values.greedy import GreedyResult
from kvsharer_exp.values.intervals import Interval, t_interval
from kvsharer_exp.values.score_names import (
    HELD_OUT_KL,
    Directions,
    ScoreName,
    bounds,
    higher_is_better,
)

MARKS = {"better": "▲", "worse": "▼", "not told apart": "≈"}
"""How tables mark each verdict of a comparison with the reference."""


@dataclass(frozen=True, slots=True)
class Row:
    """One map or plan that one arm chose under one variant, and what was measured of it.

    ``variant`` holds the settings that vary, by configuration key. ``items`` holds the values
    behind each score in the order of the items; behind a perplexity these are log-likelihoods in
    nats per token. ``intervals`` holds those of the scores, and by `share_name` those of what is
    retained. ``plan`` is the text of a KV plan that is no map; ``result.kv_source_layers`` is empty
    then, and its counts are of the layers without KV of their own.
    """

    variant: Mapping[str, Any]
    arm: str
    draw: int
    result: GreedyResult
    kv_fraction: float
    scores: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    items: Mapping[str, Sequence[float]] = field(default_factory=dict)
    retained: Mapping[str, float] = field(default_factory=dict)
    mlflow_run_id: str = ""
    plan: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The row for ``result.json``, without items and trace, which are kept elsewhere.

        A plan that is no map has its text, and null as its ``kv_source_layers``.
        """
        result = self.result.to_dict()
        del result["trace"]
        if self.plan:
            result |= {"kv_source_layers": None, "plan": self.plan}
        return {
            "variant": dict(self.variant),
            "arm": self.arm,
            "draw": self.draw,
            **result,
            "evaluated": evaluated(self.result),
            "kv_fraction": self.kv_fraction,
            "scores": dict(self.scores),
            "intervals": {name: asdict(interval) for name, interval in self.intervals.items()},
            "retained": dict(self.retained),
            "mlflow_run_id": self.mlflow_run_id,
        }


@dataclass(frozen=True, slots=True)
class Cell:
    """One arm under one variant at one ratio, with all its draws.

    ``scores`` holds the mean over several draws with Student's interval; the mean of KL and of
    perplexities is geometric. For a single draw it holds the score with its interval over items.
    ``against`` holds by score name the comparison with the reference, and ``verdicts`` whether the
    arm is ``better`` than the reference, ``worse``, or ``not told apart`` from it. ``found``: the
    number of layers shared in each draw, of a plan those that it saves. ``evaluated``, ``seconds``
    and ``kv_fraction`` are means over the draws.
    """

    variant: Mapping[str, Any]
    arm: str
    compression: float
    requested: int
    found: tuple[int, ...]
    evaluated: float
    seconds: float
    scores: Mapping[str, Interval]
    against: Mapping[str, Comparison]
    verdicts: Mapping[str, str] = field(default_factory=dict)
    kv_fraction: float = 1.0

    @property
    def label(self) -> str:
        """Arm and variant in words."""
        return describe(self.arm, self.variant)

    @property
    def has_no_plan(self) -> bool:
        """Whether no plan of the arm is as small as the ratio asks: the full cache stands here."""
        return self.arm in PLAN_ARMS and not any(self.found)


def describe(arm: str, variant: Mapping[str, Any]) -> str:
    """An arm under a variant in words. A narrow table may break the line between them."""
    return " · ".join(filter(None, [arm.replace("_", " "), settings_words(variant)]))


def settings_words(variant: Mapping[str, Any]) -> str:
    """The settings of a variant in words; empty where nothing varies."""
    texts = {
        "search.threshold": "T={}",
        "calibration.num_windows": "{} windows",
        "footprint.context": "{} tokens",
    }
    return " · ".join(texts.get(key, "{}").format(value) for key, value in variant.items())


def summarise(
    rows: Sequence[Row],
    *,
    confidence: float,
    seed: int = 0,
    directions: Directions | None = None,
) -> list[Cell]:
    """Make the cells in the order of their first rows, and compare each with the reference.

    The reference is the first arm of the first variant. ``seed`` is that of the bootstrap, and
    ``directions`` are what the tasks say of their scores.
    """
    groups: dict[tuple[str, str, float], list[Row]] = {}
    for row in rows:
        key = (repr(dict(row.variant)), row.arm, row.result.compression)
        groups.setdefault(key, []).append(row)
    first = next(iter(groups))[:2]
    cells = []
    for key, group in groups.items():
        reference = groups.get((*first, key[2]), [])
        against = {} if key[:2] == first else _against(group, reference[:1], confidence, seed)
        cells.append(_cell(group, against, confidence))
    return _judge(cells, 1 - confidence, directions)


def _cell(group: Sequence[Row], against: dict[str, Comparison], confidence: float) -> Cell:
    head = group[0]
    return Cell(
        variant=head.variant,
        arm=head.arm,
        compression=head.result.compression,
        requested=head.result.requested,
        found=tuple(row.result.found for row in group),
        evaluated=fmean(evaluated(row.result) for row in group),
        seconds=fmean(row.result.seconds for row in group),
        scores={
            name: interval
            for name in head.scores
            if (interval := _over_draws(group, name, confidence)) is not None
        },
        against=against,
        kv_fraction=fmean(row.kv_fraction for row in group),
    )


def _over_draws(group: Sequence[Row], name: str, confidence: float) -> Interval | None:
    values = [row.scores[name] for row in group if name in row.scores]
    if len(values) == 1:
        return group[0].intervals.get(name, Interval(values[0], values[0], values[0]))
    if not (name == HELD_OUT_KL or ScoreName.parse(name).of_likelihoods) or min(values) <= 0:
        return t_interval(values, confidence=confidence).within(*bounds(name))
    logs = t_interval([math.log(value) for value in values], confidence=confidence)
    return Interval(*(math.exp(x) for x in (logs.mean, logs.low, logs.high)))


def _against(
    group: Sequence[Row], reference: Sequence[Row], confidence: float, seed: int
) -> dict[str, Comparison]:
    """Compare every score that has items with the reference, the first draw of its cell.

    Draws that share another number of layers than the reference do not count.
    """
    if not reference or not reference[0].scores:
        return {}
    base = reference[0]
    alike = [row for row in group if row.result.found == base.result.found and row.scores]
    compared = {}
    for name, items in base.items.items():
        others = [row.items[name] for row in alike if row.items.get(name)]
        if not items or not others or any(len(other) != len(items) for other in others):
            continue
        if len(group) == 1:
            compared[name] = compare(others[0], items, confidence=confidence, seed=seed)
        elif len(others) > 1:
            means = [fmean(other) for other in others]
            compared[name] = compare_draws(means, fmean(items), confidence=confidence)
    return compared


def _judge(cells: Sequence[Cell], level: float, directions: Directions | None) -> list[Cell]:
    """Add the verdicts at ``level``. Holm's adjustment is over all cells, score by score."""
    verdicts: list[dict[str, str]] = [{} for _ in cells]
    for name in dict.fromkeys(name for cell in cells for name in cell.against):
        places = [i for i, cell in enumerate(cells) if name in cell.against]
        adjusted = holm([cells[i].against[name].p_value for i in places])
        for place, p_value in zip(places, adjusted, strict=True):
            up = ScoreName.parse(name).of_likelihoods or higher_is_better(name, directions)
            ahead = (cells[place].against[name].difference > 0) == up
            said = "better" if ahead else "worse"
            verdicts[place][name] = said if p_value < level else "not told apart"
    return [replace(cell, verdicts=found) for cell, found in zip(cells, verdicts, strict=True)]
