"""Say what a sweep found, in sentences that say only what was measured.

The page of a sweep shows the `answer`, and its `headline` stands in MLflow too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvsharer_exp.reporting.plan_kinds import kv_percent, size_words
from kvsharer_exp.reporting.sharing_front import holds_plans, num_beaten
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
    each reference method is beaten. If the front has plans that are no maps, it says how much of
    the KV is enough, and which layers do what.
    """
    most = most_shared(entries, 0.95)
    plans = holds_plans(entries)
    if most is not None and plans:
        first = (
            f"{model} keeps 95% of its held-out perplexity with "
            f"{kv_percent(most.kv_fraction, fine=True)} of its KV cache "
            f"({size_words(most.kv_plan)})"
        )
    elif most is not None:
        layers, saved = most.kv_plan.num_layers, 1 - most.kv_fraction
        first = (
            f"{model} keeps 95% of its held-out perplexity with {most.num_shared} of {layers} "
            f"layers reading another layer's KV cache ({saved:.0%} less of it)"
        )
    elif any(HELD_OUT_PERPLEXITY in entry.retained for entry in entries):
        what = "plan" if plans else "shared map"
        first = f"No {what} found for {model} keeps 95% of the held-out perplexity"
    else:
        first = (
            f"{len(entries)} {'plans' if plans else 'maps'} for {model} make the front; "
            "held-out text was not scored"
        )
    clauses = [first]
    for name, chosen in reference_maps.items():
        compared = [result for result in chosen if result.score is not None]
        if compared:
            beaten = sum(is_beaten(result, results) for result in compared)
            sizes = f"{beaten} of {len(compared)} sizes compared"
            clauses.append(f"{name} is beaten at {sizes}, by the score that was searched for")
    return "; ".join(clauses) + "."


def most_shared(entries: Sequence[FrontEntry], limit: float) -> FrontEntry | None:
    """The entry that saves most of those that retain ``limit`` of the held-out perplexity.

    That is the map that shares most layers. If the front has plans that are no maps, it is the
    entry that keeps the least KV.
    """
    changed = [entry for entry in entries if not entry.is_full]
    good = [e for e in changed if e.retained.get(HELD_OUT_PERPLEXITY, 0) >= limit]
    if holds_plans(entries):
        return min(good, key=lambda entry: entry.kv_fraction, default=None)
    return max(good, key=lambda entry: entry.num_shared, default=None)


def answer(
    entries: Sequence[FrontEntry],
    full_scores: Mapping[str, float],
    reference_maps: Mapping[str, Sequence[TrialResult]],
    results: Sequence[TrialResult],
    score_label: str = "score",
) -> list[str]:
    """Say what sharing saves, and whether each reference map is beaten.

    If there are plans that are no maps, say what they save, and how many maps they beat.
    """
    return [
        *_bought(entries),
        *_beyond_sharing(results, score_label),
        *_against(reference_maps, results, score_label),
    ]


def _bought(entries: Sequence[FrontEntry]) -> list[str]:
    """Say what sharing saves at three levels of held-out perplexity, which only the front has."""
    if entries and not any(HELD_OUT_PERPLEXITY in entry.retained for entry in entries):
        return ["Held-out perplexity was not measured: the table shows what was."]
    sentences = []
    plans = holds_plans(entries)
    for limit in (0.98, 0.95, 0.9):
        most = most_shared(entries, limit)
        if most is not None and plans:
            sentences.append(
                f"Keeping at least {limit:.0%} of the held-out perplexity, "
                f"{kv_percent(most.kv_fraction, fine=True)} of the KV cache is enough: "
                f"{size_words(most.kv_plan)}."
            )
        elif most is not None:
            layers = most.kv_plan.num_layers
            sentences.append(
                f"Keeping at least {limit:.0%} of the held-out perplexity, {most.num_shared} of "
                f"{layers} layers can be shared: {1 - most.kv_fraction:.0%} less KV cache."
            )
        else:
            what = "plan" if plans else "shared map"
            sentences.append(f"No {what} keeps {limit:.0%} of the held-out perplexity.")
    return sentences


def _beyond_sharing(results: Sequence[TrialResult], score_label: str) -> list[str]:
    """Say how many of the best sharing maps other plans beat."""
    beaten, maps = num_beaten(results)
    if not maps:
        return []
    return [
        f"Plans that keep no more KV beat {beaten} of the {maps} sharing maps that no other map "
        f"beats, by the {score_label} that was searched for."
    ]


def _against(
    reference_maps: Mapping[str, Sequence[TrialResult]],
    results: Sequence[TrialResult],
    score_label: str,
) -> list[str]:
    """Say whether a map with as little KV scores higher than each reference map; a tie does not."""
    sentences, compared = [], False
    what = "plan" if holds_plans(results) else "map"
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
                    f"the best {what} with as little KV {best.score:.3g}"
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
