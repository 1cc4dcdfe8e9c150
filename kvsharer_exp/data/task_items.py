"""What a task made by the project is: where its text comes from, its items, how they are read.

`wiki_tasks`, `retrieval_tasks` and `collapse_tasks` make `LocalTask` values, and `local_tasks`
finds them by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvsharer_exp.data.passages import Passage

Item = dict[str, Any]


@dataclass(frozen=True, slots=True)
class LocalTask:
    """A task that is made here.

    ``part`` is the part of the text that the task draws on. ``make_items`` makes the items from
    passages and a seed. ``config`` says how lm-eval reads them.
    """

    part: str
    make_items: Callable[[Sequence[Passage], int], list[Item]]
    config: Mapping[str, Any]


def metrics(aggregation: Mapping[str, str], higher_is_better: bool) -> list[dict[str, Any]]:
    """Make lm-eval's ``metric_list`` from the aggregation of each metric."""
    return [
        {"metric": metric, "aggregation": name, "higher_is_better": higher_is_better}
        for metric, name in aggregation.items()
    ]


def generation(answer_tokens: int, pattern: str) -> dict[str, Any]:
    """Make the configuration of a task whose answer is generated and must match exactly.

    The model reads ``context`` of an item and writes greedily, until a line break or until it has
    written ``answer_tokens`` tokens. The first match of ``pattern`` is compared with ``answer`` of
    the item.
    """
    # A filter named "none" adds nothing to the name of the score.
    take = [{"function": "regex", "regex_pattern": pattern}, {"function": "take_first"}]
    return {
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": answer_tokens},
        "filter_list": [{"name": "none", "filter": take}],
        "metric_list": metrics({"exact_match": "mean"}, True),
    }
