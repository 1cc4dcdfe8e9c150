"""Read data sets of the Hugging Face hub as passages, and do without the hub if it is out of reach.

`load_passages` calls `hub_passages` for a text source that begins with ``hub:``. `load_tasks` loads
the data sets of lm-eval inside `offline_when_unreachable`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from kvsharer_exp.data.passages import Passage
from kvsharer_exp.model.folders import cache_dir
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.text import clip

_log = logging.getLogger(__name__)


@contextmanager
def offline_when_unreachable() -> Iterator[None]:
    """Put the hub's clients in offline mode if the hub does not answer.

    In offline mode, data sets that were fetched before still load. Others fail at once instead of
    after 23 s of retries. The clients get their own mode back at the end.
    """
    import datasets
    import huggingface_hub.constants as hub
    from huggingface_hub.utils import get_session

    before = (hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)
    try:
        if not any(before):
            try:
                get_session().head(hub.ENDPOINT, timeout=5)
            except Exception as error:  # the HTTP library, and so its errors, differ by version
                _log.info("hub unreachable (%s): using data sets fetched before", error)
                hub.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        yield
    finally:
        hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def hub_passages(source: str) -> tuple[Passage, ...]:
    """Load the passages of ``hub:<dataset>[/<config>][:<split>]``, one for each row with text.

    The text is read from the column "text". The split is ``train`` if none is named.

    Raises:
        InputError: the data set has no name, cannot be fetched, or has no "text".
    """
    import datasets

    name, _, split = source.removeprefix("hub:").partition(":")
    if not name:
        raise InputError(f"text source {source!r} names no data set: give hub:<dataset>[:<split>]")
    head, _, tail = name.rpartition("/")
    # "a/b" is an organisation's data set or, by an older name, data set a with configuration b.
    tries: list[tuple[str, str | None]] = [(name, None)] if name.count("/") < 2 else []
    tries += [(head, tail)] if head else []
    problem = ""
    for dataset, config in tries:
        try:
            with offline_when_unreachable():
                rows = datasets.load_dataset(
                    dataset,
                    config,
                    split=split or "train",
                    cache_dir=str(cache_dir() / "datasets"),
                )
            break
        except (OSError, ValueError, RuntimeError) as error:
            problem = problem or clip(" ".join(str(error).split()), 70)
    else:
        raise InputError(
            f"text source {clip(source)!r} cannot be fetched ({problem}): "
            "give a .txt or .jsonl file, or wikipedia"
        )
    if "text" not in rows.column_names:
        columns = clip(", ".join(rows.column_names), 60)
        raise InputError(
            f'text source {clip(source)!r} has no column "text" but {columns}: '
            'save it as a .jsonl with "text"'
        )
    passages = tuple(
        Passage(" ".join(text.split()), f"{dataset}:{number}")
        for number, text in enumerate(rows["text"], start=1)
        if isinstance(text, str) and text.strip()
    )
    if not passages:
        raise InputError(f"text source {clip(source)!r} has no text: name another split")
    return passages
