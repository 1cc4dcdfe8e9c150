"""Which scores a table shows."""

from __future__ import annotations

from collections.abc import Mapping

# The metric that stands for a task where it has several.
_MAIN = ("acc", "exact_match", "f1", "word_perplexity", "perplexity")


def columns(full_scores: Mapping[str, float]) -> list[str]:
    """The scores a table shows: KL, every perplexity of a text, one metric of every task.

    Tasks made from search text are left out: they were optimised on.
    """
    shown = [name for name in full_scores if name == "kl" or name.startswith("perplexity/")]
    tasks: dict[str, list[str]] = {}
    for name in full_scores:
        if name.startswith("lm_eval/") and not name.split("/")[1].endswith("_search"):
            tasks.setdefault(name.split("/")[1], []).append(name)
    for names in tasks.values():
        by_metric = {name.split("/")[2]: name for name in names}
        main = next((m for m in _MAIN if m in by_metric), None)
        shown.append(by_metric[main] if main else names[0])
    return shown
