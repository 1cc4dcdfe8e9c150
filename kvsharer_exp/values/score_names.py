"""The names of scores, and what they say: direction, and what has a ratio to the full cache."""

from __future__ import annotations

from collections.abc import Mapping

# Metrics where less is better, here and in lm-eval's registry and task files.
_LOWER_IS_BETTER = frozenset(
    """bits_per_byte brier_score byte_perplexity cer kl likelihood_diff loss nll perplexity ter wer
    word_perplexity""".split()
)


_NO_RATIO = frozenset(["kl", "cosine"])  # distances to the full cache, not qualities


def higher_is_better(name: str) -> bool:
    """Whether a score improves upwards: ``perplexity/<text>``, ``kl``, ``lm_eval/<task>/<metric>``.

    Metrics that are not known to improve downwards count as improving upwards.
    """
    return metric_of(name) not in _LOWER_IS_BETTER


def metric_of(name: str) -> str:
    kind, _, rest = name.partition("/")
    return rest.rpartition("/")[2].partition(".")[0] if kind == "lm_eval" else kind


def retained(scores: Mapping[str, float], full: Mapping[str, float]) -> dict[str, float]:
    """Share of the full cache's quality that is left: 1 is all of it, above 1 is better than it.

    shared / full where more is better, full / shared for perplexities and the like. Scores of one
    side only, distances to the full cache (``kl``, ``cosine``) and zeros have no ratio.
    """
    ratios = {}
    for name, score in scores.items():
        if name not in full or metric_of(name) in _NO_RATIO:
            continue
        top, bottom = (score, full[name]) if higher_is_better(name) else (full[name], score)
        if bottom > 0:
            ratios[name] = top / bottom
    return ratios
