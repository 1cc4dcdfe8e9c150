"""The names of scores, and what a name says of its score.

Every score has a name of one of these forms, in ``result.json``, in MLflow and in tables: ``kl``,
``cosine``, ``kl/<text>``, ``perplexity/<text>``, ``lm_eval/<task>/<metric>`` and
``lm_eval/<task>/<metric>.<filter>``. Code that makes or reads such a name uses `ScoreName`. Code
that compares two scores asks here which one is better.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

KL = "kl"
"""KL to the full cache on the scoring windows, in nats."""

COSINE = "cosine"
"""Cosine of the last hidden states to those of the full cache, on the scoring windows."""

CALIBRATION_PERPLEXITY = "perplexity/calibration"
"""Perplexity of the scoring windows, which are cut from the calibration text."""

HELD_OUT_KL, HELD_OUT_PERPLEXITY = "kl/report", "perplexity/report"
"""KL and perplexity on the report part of the held-out text, which no search saw."""

# Metrics that are better when lower, here and in the registry and task files of lm-eval.
_LOWER_IS_BETTER = frozenset(
    """bits_per_byte brier_score byte_perplexity cer kl likelihood_diff loss nll perplexity ter wer
    word_perplexity""".split()
)
_NO_RATIO = frozenset([KL, COSINE])  # distances to the full cache, not qualities
# Behind these stand log-likelihoods, which are better when higher.
_OF_LIKELIHOODS = frozenset(["perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"])
ACCURACIES = frozenset(["acc", "acc_norm", "acc_bytes", "acc_mutual_info"])
"""The shares of right choices, which guessing raises where a task gives choices."""

_ANSWERS = frozenset(["exact_match"])  # every answer is right or wrong
FAILED = 0.5
"""A full cache that gives fewer right answers fails a task: nothing can be retained of it."""
# The metric that stands for a task where the task has several.
_MAIN = ("acc", "exact_match", "f1", "word_perplexity", "perplexity")


@dataclass(frozen=True, slots=True)
class ScoreName:
    """A score's name in its parts.

    ``kind``: ``kl``, ``cosine``, ``perplexity`` or ``lm_eval``. ``subject``: the text, or the task
    of lm-eval. ``metric``: the metric of lm-eval; for other kinds it is the kind. ``filtered``: the
    filter of lm-eval, or empty.
    """

    kind: str
    subject: str
    metric: str
    filtered: str = ""

    @classmethod
    def parse(cls, name: str) -> ScoreName:
        """Take ``name`` apart."""
        kind, _, rest = name.partition("/")
        if kind != "lm_eval":
            return cls(kind, rest, kind)
        task, _, metric = rest.rpartition("/")
        metric, _, filtered = metric.partition(".")
        return cls(kind, task, metric, filtered)

    @classmethod
    def of_task(cls, task: str, metric: str, filtered: str = "") -> ScoreName:
        """The name of one metric of an lm-eval task."""
        return cls("lm_eval", task, metric, filtered)

    def __str__(self) -> str:
        if not self.is_task:
            return f"{self.kind}/{self.subject}" if self.subject else self.kind
        return f"lm_eval/{self.subject}/{self.full_metric}"

    @property
    def is_task(self) -> bool:
        return self.kind == "lm_eval"

    @property
    def full_metric(self) -> str:
        """The metric with its filter, as lm-eval's results tell them apart."""
        return f"{self.metric}.{self.filtered}" if self.filtered else self.metric

    @property
    def is_of_search_text(self) -> bool:
        """Whether the task is made from the text that the search optimises on."""
        return self.is_task and self.subject.endswith("_search")

    @property
    def of_likelihoods(self) -> bool:
        """Whether log-likelihoods stand behind the score.

        Then the items are better when higher, although the score is better when lower.
        """
        return self.metric in _OF_LIKELIHOODS


def label(name: str, between: str = " ") -> str:
    """The name for people: without ``lm_eval/``, and with ``between`` between its parts."""
    return name.removeprefix("lm_eval/").replace("/", between)


def bounds(name: str) -> tuple[float, float]:
    """The least and the most that a score of this name can be, as far as its metric tells."""
    parts = ScoreName.parse(name)
    if parts.metric in ACCURACIES | _ANSWERS:
        return 0.0, 1.0
    return (0.0, math.inf) if parts.of_likelihoods or parts.kind == KL else (-math.inf, math.inf)


Directions = Mapping[str, bool]
"""What tasks say of their scores: by score name without filter, whether higher is better."""


def higher_is_better(name: str, directions: Directions | None = None) -> bool:
    """Whether a score of this name is better when higher.

    The word of its task counts first. Where ``directions`` has none, as for our own scores and in
    results of earlier versions, the name of the metric decides: a metric counts as better when
    higher unless it is known to be better when lower.
    """
    parts = ScoreName.parse(name)
    said = (directions or {}).get(str(replace(parts, filtered="")))
    return not is_known_lower(parts.metric) if said is None else said


def is_known_lower(metric: str) -> bool:
    """Whether a metric of this name is known to be better when lower."""
    return metric in _LOWER_IS_BETTER


def unusual(directions: Directions) -> dict[str, bool]:
    """Those of ``directions`` that the name of the score does not tell."""
    return {name: up for name, up in directions.items() if higher_is_better(name) != up}


PassMarks = Mapping[str, float]
"""By score name without filter, the least that the full cache has to score to do the task at all.

Multiple-choice tasks have one, because guessing scores there too.
"""


def fails(name: str, score: float, pass_marks: PassMarks | None = None) -> bool:
    """Whether a full cache with this ``score`` fails the task itself.

    It does if its score is below the pass mark of the task, which is above what guessing scores, if
    fewer than half of its answers are right (``exact_match``), or if an accuracy is 0.
    """
    parts = ScoreName.parse(name)
    mark = (pass_marks or {}).get(str(replace(parts, filtered="")))
    if mark is not None:
        return score < mark
    if parts.metric in _ANSWERS:
        return score < FAILED
    return parts.metric in ACCURACIES and score <= 0


def failed(full: Mapping[str, float], pass_marks: PassMarks | None = None) -> set[str]:
    """The names of those ``full`` scores of the full cache of which nothing is retained.

    These are the scores that fail (see `fails`). If the accuracy of a task fails, all scores of the
    task do: a perplexity says nothing where no answer is right. The accuracy of a task is its
    ``acc``, or the first by name of those it has. What two filters take from the answers of a task
    counts as two tasks.
    """
    deciding: dict[ScoreName, str] = {}
    for name in sorted(full):
        if ScoreName.parse(name).metric in ACCURACIES | _ANSWERS:
            deciding.setdefault(_any_metric(name), name)
    lost = {task for task, name in deciding.items() if fails(name, full[name], pass_marks)}
    return {
        name
        for name, score in full.items()
        if fails(name, score, pass_marks) or _any_metric(name) in lost
    }


def _any_metric(name: str) -> ScoreName:
    """The task and filter of a score."""
    return replace(ScoreName.parse(name), metric="")


def retained(
    scores: Mapping[str, float],
    full: Mapping[str, float],
    directions: Directions | None = None,
    pass_marks: PassMarks | None = None,
) -> dict[str, float]:
    """The share of the full cache's quality that a map retains, by score name.

    1 is all of it, and above 1 is better than the full cache. If more is better, the share is the
    score of the map over that of the full cache. If less is better, as for perplexities, it is the
    other way round. A score has no share if one side lacks it, if it is a distance to the full
    cache (``kl``, ``cosine``), if the divisor is not above zero, or if the full cache fails the
    task itself (see `failed`).
    """
    shares, left_out = {}, failed(full, pass_marks)
    for name, score in scores.items():
        metric = ScoreName.parse(name).metric
        if name not in full or metric in _NO_RATIO or name in left_out:
            continue
        up = higher_is_better(name, directions)
        top, bottom = (score, full[name]) if up else (full[name], score)
        if bottom > 0:
            shares[name] = top / bottom
    return shares


def share_name(name: str) -> str:
    """The name of what is retained of the score ``name``: in MLflow, and of its interval."""
    return f"retained/{name}"


def is_share(name: str) -> bool:
    """Whether ``name`` is the `share_name` of a score."""
    return name.startswith("retained/")


def retained_metrics(
    shares: Mapping[str, float], intervals: Mapping[str, Sequence[float]]
) -> dict[str, float]:
    """What MLflow keeps of the retained ``shares``: each with the two ends of its interval.

    ``intervals`` holds [low, high] by `share_name`, of those shares that have one.
    """
    metrics = {}
    for name, share in ((share_name(score), share) for score, share in shares.items()):
        metrics[name] = share
        if name in intervals:
            metrics[f"low/{name}"], metrics[f"high/{name}"] = intervals[name]
    return metrics


def table_columns(names: Iterable[str]) -> list[str]:
    """The scores that a table shows: KL, every perplexity of a text, and one metric of every task.

    Tasks made from the search text are left out, because the search optimised on them.
    """
    listed = list(names)
    parsed = {name: ScoreName.parse(name) for name in listed}
    shown = [name for name in listed if name == KL or parsed[name].kind == "perplexity"]
    tasks: dict[str, dict[str, str]] = {}
    for name, parts in parsed.items():
        if parts.is_task and not parts.is_of_search_text:
            tasks.setdefault(parts.subject, {})[parts.full_metric] = name
    for by_metric in tasks.values():
        first = next(iter(by_metric))
        shown.append(by_metric[next((metric for metric in _MAIN if metric in by_metric), first)])
    return shown
