"""Find the tasks that the project makes by name: they need no download, only held-out text.

`load_tasks` hands their items to lm-eval in memory. `wiki_tasks` makes tasks of plain text,
`retrieval_tasks` those that ask for a fact of a long text, and `collapse_tasks` those that break
first where a plan goes wrong. Each draws on the report part of the text, and its twin with
``_search`` at the end of the name on the search part.

The retrieval tasks exist at any length, so their names are a pattern (``needle_4096``).
`local_task` knows all names; `LOCAL_TASKS` lists them without a number.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kvsharer_exp.data.collapse_tasks import COLLAPSE_KINDS, collapse_task
from kvsharer_exp.data.passages import TextParts
from kvsharer_exp.data.retrieval_tasks import RETRIEVAL_KINDS, retrieval_task
from kvsharer_exp.data.task_items import Item, LocalTask
from kvsharer_exp.data.wiki_tasks import WIKI_TASKS
from kvsharer_exp.values.errors import InputError

LOCAL_TASKS: tuple[str, ...] = tuple(
    f"{name}{search}"
    for search in ("", "_search")
    for name in (*WIKI_TASKS, *RETRIEVAL_KINDS, *COLLAPSE_KINDS)
)
"""The names, those of retrieval tasks without a number."""


def local_task(
    name: str, tokenizer: Any | None = None, max_positions: int | None = None
) -> LocalTask | None:
    """The task called ``name``; None if no task made here is called so.

    ``tokenizer`` and ``max_positions`` matter to retrieval tasks only (see `retrieval_task`).

    Raises:
        InputError: the name asks for more tokens than ``max_positions``.
    """
    wiki = WIKI_TASKS.get(name.removesuffix("_search"))
    if wiki is not None:
        return replace(wiki, part="search") if name.endswith("_search") else wiki
    return collapse_task(name) or retrieval_task(name, tokenizer, max_positions)


def items_of(
    name: str,
    parts: TextParts,
    *,
    seed: int = 0,
    tokenizer: Any | None = None,
    max_positions: int | None = None,
) -> list[Item]:
    """Make the items of a local task, in the order in which a limit takes them.

    ``tokenizer``: what the length of a retrieval task is measured with. Without one every word
    counts as 1.4 tokens.

    Raises:
        InputError: the text gives no item, or the length in the name cannot be had.
        KeyError: no task made here is called so.
    """
    task = local_task(name, tokenizer, max_positions)
    if task is None:
        raise KeyError(name)
    passages = getattr(parts, task.part)
    items = task.make_items(passages, seed)
    if not items:
        raise InputError(
            f"task {name} finds no item in the {task.part} text ({len(passages)} passages): "
            "give longer documents (heldout.path=wikipedia), or leave the task out"
        )
    return items


def near_names(name: str, others: Sequence[str] = ()) -> list[str]:
    """Up to three names of tasks made here, or of ``others``, that are most like ``name``.

    A number in ``name`` is tried in the names of the retrieval tasks.
    """
    number = re.search(r"_[0-9]+", name)
    numbered = [
        f"{kind}{number[0]}{search}"
        for search in ("", "_search")
        for kind in RETRIEVAL_KINDS
        if number is not None
    ]
    return difflib.get_close_matches(name, [*LOCAL_TASKS, *numbered, *others], n=3)
