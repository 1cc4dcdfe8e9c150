"""An ablation in values: every map measured, arms with intervals, which differences are real.

Scores are compared item by item with those of the reference, the first arm of the first variant, at
the same ratio and only where both share as many layers. p-values of one score are adjusted over the
whole table (Holm), so that 30 cells do not mark one or two by chance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any

from kvsharer_exp.search.paper.arms import evaluated
from kvsharer_exp.values.comparisons import Comparison, compare, compare_draws, holm
from kvsharer_exp.values.greedy import GreedyResult
from kvsharer_exp.values.intervals import (
    Interval,
    t_interval,
)
from kvsharer_exp.values.score_names import higher_is_better

KL, PERPLEXITY = "kl/report", "perplexity/report"


# Behind these stand log-likelihoods, which are better when higher.
_LIKELIHOODS = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")


@dataclass(frozen=True, slots=True)
class Row:
    """One map that one arm chose under one variant, and what was measured of it.

    ``variant``: the settings that vary, by configuration key. ``items``: the values behind each
    score, in the order of the items; behind a perplexity the log-likelihood in nats per token.
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

    def to_dict(self) -> dict[str, Any]:
        """As ``result.json`` writes it: without items and trace, which have files of their own."""
        result = self.result.to_dict()
        del result["trace"]
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
    """One arm under one variant at one ratio, its draws together.

    ``scores``: over several draws the mean with Student's interval (of KL and perplexities the
    geometric mean), else the score with its interval over items. ``verdicts``: ``better``,
    ``worse`` or ``not told apart`` from the reference. ``found``: layers shared, per draw.
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

    @property
    def label(self) -> str:
        """Arm and variant in words."""
        return describe(self.arm, self.variant)


def describe(arm: str, variant: Mapping[str, Any]) -> str:
    """An arm under a variant in words, which a narrow table may break between."""
    texts = {"search.threshold": "T={}", "calibration.num_windows": "{} windows"}
    settings = [texts.get(key, "{}").format(value) for key, value in variant.items()]
    return " · ".join([arm.replace("_", " "), *settings])


def summarise(rows: Sequence[Row], *, confidence: float, seed: int = 0) -> list[Cell]:
    """Cells in the order of their first row, compared with the first arm of the first variant."""
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
    return _judge(cells, 1 - confidence)


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
    )


def _over_draws(group: Sequence[Row], name: str, confidence: float) -> Interval | None:
    values = [row.scores[name] for row in group if name in row.scores]
    if len(values) == 1:
        return group[0].intervals.get(name, Interval(values[0], values[0], values[0]))
    if not (name == KL or _is_likelihood(name)) or min(values) <= 0:
        return t_interval(values, confidence=confidence)
    logs = t_interval([math.log(value) for value in values], confidence=confidence)
    return Interval(*(math.exp(x) for x in (logs.mean, logs.low, logs.high)))


def _against(
    group: Sequence[Row], reference: Sequence[Row], confidence: float, seed: int
) -> dict[str, Comparison]:
    """Every score with items; draws that share another number of layers do not count."""
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


def _judge(cells: Sequence[Cell], level: float) -> list[Cell]:
    """Verdicts at ``level`` after Holm's adjustment, score by score over all cells."""
    verdicts: list[dict[str, str]] = [{} for _ in cells]
    for name in dict.fromkeys(name for cell in cells for name in cell.against):
        places = [i for i, cell in enumerate(cells) if name in cell.against]
        adjusted = holm([cells[i].against[name].p_value for i in places])
        for place, p_value in zip(places, adjusted, strict=True):
            up = _is_likelihood(name) or higher_is_better(name)
            ahead = (cells[place].against[name].difference > 0) == up
            said = "better" if ahead else "worse"
            verdicts[place][name] = said if p_value < level else "not told apart"
    return [replace(cell, verdicts=found) for cell, found in zip(cells, verdicts, strict=True)]


def _is_likelihood(name: str) -> bool:
    kind, _, rest = name.partition("/")
    metric = rest.rpartition("/")[2].partition(".")[0] if kind == "lm_eval" else kind
    return metric in _LIKELIHOODS
