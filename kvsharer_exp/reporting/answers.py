"""Say what a sweep found, in sentences that say only what was measured.

The page of a sweep shows the `answer`, and its `headline` stands in MLflow too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvsharer_exp.search.front import best_within, is_beaten, kv_of
from kvsharer_exp.values.score_names import HELD_OUT_PERPLEXITY
from kvsharer_exp.values.trial import FrontEntry, TrialResult


def headline(
    model: str,
    entries: Sequence[FrontEntry],
    reference_maps: Mapping[str, Sequence[TrialResult]],
    results: Sequence[TrialResult],
) -> str:
    """The answer in one sentence.

    It says how many layers can be shared at 95 % of the held-out perplexity, and at how many sizes
    each reference method is beaten.
    """
    most = most_shared(entries, 0.95)
    if most is not None:
        layers, saved = len(most.kv_source_layers), 1 - most.kv_fraction
        first = (
            f"{model} keeps 95% of its held-out perplexity with {most.num_shared} of {layers} "
            f"layers reading another layer's KV cache ({saved:.0%} less of it)"
        )
    elif any(HELD_OUT_PERPLEXITY in entry.retained for entry in entries):
        first = f"No shared map found for {model} keeps 95% of the held-out perplexity"
    else:
        first = f"{len(entries)} maps for {model} make the front; held-out text was not scored"
    clauses = [first]
    for name, chosen in reference_maps.items():
        compared = [result for result in chosen if result.score is not None]
        if compared:
            beaten = sum(is_beaten(result, results) for result in compared)
            sizes = f"{beaten} of {len(compared)} sizes compared"
            clauses.append(f"{name} is beaten at {sizes}, by the score that was searched for")
    return "; ".join(clauses) + "."


def most_shared(entries: Sequence[FrontEntry], limit: float) -> FrontEntry | None:
    """The map that shares most layers of those that retain ``limit`` of held-out perplexity."""
    good = [e for e in entries if e.num_shared and e.retained.get(HELD_OUT_PERPLEXITY, 0) >= limit]
    return max(good, key=lambda entry: entry.num_shared, default=None)


def answer(
    entries: Sequence[FrontEntry],
    full_scores: Mapping[str, float],
    reference_maps: Mapping[str, Sequence[TrialResult]],
    results: Sequence[TrialResult],
    score_label: str = "score",
) -> list[str]:
    """Say what sharing saves, and whether each reference map is beaten."""
    return [*_bought(entries), *_against(reference_maps, results, score_label)]


def _bought(entries: Sequence[FrontEntry]) -> list[str]:
    """Say what sharing saves at three levels of held-out perplexity, which only the front has."""
    if entries and not any(HELD_OUT_PERPLEXITY in entry.retained for entry in entries):
        return ["Held-out perplexity was not measured: the table shows what was."]
    sentences = []
    for limit in (0.98, 0.95, 0.9):
        most = most_shared(entries, limit)
        if most is not None:
            layers = len(most.kv_source_layers)
            sentences.append(
                f"Keeping at least {limit:.0%} of the held-out perplexity, {most.num_shared} of "
                f"{layers} layers can be shared: {1 - most.kv_fraction:.0%} less KV cache."
            )
        else:
            sentences.append(f"No shared map keeps {limit:.0%} of the held-out perplexity.")
    return sentences


def _against(
    reference_maps: Mapping[str, Sequence[TrialResult]],
    results: Sequence[TrialResult],
    score_label: str,
) -> list[str]:
    """Say whether a map with as little KV scores higher than each reference map; a tie does not."""
    sentences, compared = [], False
    for name, chosen in reference_maps.items():
        if not chosen:
            sentences.append(f"{name}: no map to compare with.")
        for result in chosen:
            head = f"{name} at {result.num_shared} shared layers"
            if result.score is None:
                why = result.reason or result.status.replace("_", " ")
                sentences.append(f"{head} has no {score_label} to compare ({why}).")
                continue
            best = best_within(results, kv_of(result))
            if best is not None and is_beaten(result, results):
                verdict = (
                    f"is beaten: {score_label} {result.score:.3g}; "
                    f"the best map with as little KV {best.score:.3g}"
                )
            else:
                verdict = (
                    f"is not beaten: {score_label} {result.score:.3g} "
                    "is the best found with as little KV"
                )
            compared = True
            sentences.append(f"{head} {verdict}.")
    if compared:
        sentences.insert(
            0,
            f"Maps are compared by the {score_label} that the search optimised, which the greedy "
            "strategy did not see; held-out scores are in the table.",
        )
    return sentences
