"""Tasks for lm-eval: three made from held-out text, any other by lm-eval's name or a YAML file.

Made here, because no package carries the usual benchmarks and a hub is not always at hand:
``wiki_cloze`` (last word of an opening, after LAMBADA, https://arxiv.org/abs/1606.06031),
``wiki_next`` (which of four continuations is the paragraph's own) and ``wiki_ppl`` (rolling
perplexity). They draw on the report part; with ``_search`` at the end of the name, on the search
part. Items are drawn by a seed and handed to lm-eval in memory.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import logging
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from kvsharer_exp.errors import InputError
from kvsharer_exp.texts import Passage, TextParts, offline_when_unreachable

Item = dict[str, Any]

CLOZE_WORDS = range(40, 61)  # length of the context
NEXT_CONTEXT_WORDS = 24
NEXT_CHOICE_WORDS = 8
NUM_CHOICES = 4
PERPLEXITY_WORDS = 200
_COMMON = frozenset(
    """about after also among been before being between both came could does during each even from
    have having here however into itself made many more most much only other over same several she
    should since some such than that their them themselves then there these they this those though
    through time under until upon used very well were what when where which while whom whose will
    with within without would year years your""".split()
)


def cloze_items(passages: Sequence[Passage], seed: int) -> list[Item]:
    """``{"context", "answer"}``: 40 to 60 words of a passage's opening and the word after them.

    The answer is a word of 4 or more letters, not a function word, that the context has already
    used, but not among its last three words; the end of a sentence is preferred.
    """
    rng = random.Random(seed)
    items = []
    for passage in passages:
        words = passage.text.split()
        bare = [re.sub(r"^\W+|\W+$", "", word) for word in words]
        places = [
            place
            for place in CLOZE_WORDS
            if place < len(words)
            and re.fullmatch(r"[A-Za-z]{4,}", bare[place])
            and words[place].startswith(bare[place])
            and bare[place].casefold() not in _COMMON
            and bare[place] in bare[: place - 3]
            and bare[place] not in bare[place - 3 : place]
        ]
        if places:
            last = [place for place in places if words[place].endswith((".", "!", "?"))]
            place = rng.choice(last or places)
            items.append({"context": " ".join(words[:place]), "answer": bare[place]})
    rng.shuffle(items)
    return items


def next_items(passages: Sequence[Passage], seed: int) -> list[Item]:
    """``{"context", "choices", "gold"}``: a paragraph's opening and four ways it might go on.

    One choice is how it does go on, the others how other paragraphs of the document go on after
    an opening of the same length. (Four openings for the end of a paragraph were tried first:
    accuracy .35, too near chance to tell maps apart.)
    """
    rng = random.Random(seed)
    items = []
    for _, group in groupby(passages, key=lambda passage: passage.document):
        texts = [passage.text.split() for passage in group]
        texts = [words for words in texts if len(words) >= NEXT_CONTEXT_WORDS + NEXT_CHOICE_WORDS]
        answers = [" ".join(words[NEXT_CONTEXT_WORDS:][:NEXT_CHOICE_WORDS]) for words in texts]
        for place, words in enumerate(texts):
            others = sorted(set(answers) - {answers[place]})
            if len(others) < NUM_CHOICES - 1:
                continue
            choices = rng.sample(others, NUM_CHOICES - 1)
            gold = rng.randrange(NUM_CHOICES)
            choices.insert(gold, answers[place])
            context = " ".join(words[:NEXT_CONTEXT_WORDS])
            items.append({"context": context, "choices": choices, "gold": gold})
    rng.shuffle(items)
    return items


def perplexity_items(passages: Sequence[Passage], seed: int) -> list[Item]:
    """``{"text"}``: every passage, cut to 200 words."""
    items = [{"text": " ".join(p.text.split()[:PERPLEXITY_WORDS])} for p in passages]
    random.Random(seed).shuffle(items)
    return items


@dataclass(frozen=True, slots=True)
class LocalTask:
    """A task made here: the part it draws on, how items are made, how lm-eval reads them."""

    part: str
    make_items: Callable[[Sequence[Passage], int], list[Item]]
    config: Mapping[str, Any]


def _metrics(aggregation: Mapping[str, str], higher_is_better: bool) -> list[dict[str, Any]]:
    return [
        {"metric": metric, "aggregation": name, "higher_is_better": higher_is_better}
        for metric, name in aggregation.items()
    ]


_ON_REPORT = {
    "wiki_cloze": LocalTask(
        "report",
        cloze_items,
        {
            "output_type": "loglikelihood",
            "doc_to_text": "{{context}}",
            "doc_to_target": "{{' ' + answer}}",  # log-likelihood tasks get no delimiter
            "metric_list": _metrics({"acc": "mean"}, True)
            + _metrics({"perplexity": "perplexity"}, False),
        },
    ),
    "wiki_next": LocalTask(
        "report",
        next_items,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": _metrics({"acc": "mean", "acc_norm": "mean"}, True),
        },
    ),
    "wiki_ppl": LocalTask(
        "report",
        perplexity_items,
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": _metrics(
                {
                    "word_perplexity": "weighted_perplexity",
                    "byte_perplexity": "weighted_perplexity",
                    "bits_per_byte": "bits_per_byte",
                },
                False,
            ),
        },
    ),
}
LOCAL_TASKS: dict[str, LocalTask] = _ON_REPORT | {
    f"{name}_search": replace(task, part="search") for name, task in _ON_REPORT.items()
}


def items_of(name: str, parts: TextParts, *, seed: int = 0) -> list[Item]:
    """Items of a local task, in the order in which a limit takes them.

    Raises:
        InputError: the text gives no item.
    """
    task = LOCAL_TASKS[name]
    passages = getattr(parts, task.part)
    items = task.make_items(passages, seed)
    if not items:
        raise InputError(
            f"task {name} finds no item in the {task.part} text ({len(passages)} passages): "
            "give longer documents (heldout.path=wikipedia), or leave the task out"
        )
    return items


def load_tasks(names: Iterable[str], parts: TextParts, *, seed: int = 0) -> dict[str, Any]:
    """lm-eval ``Task`` objects by name: local ones, lm-eval's (a group gives its tasks), YAMLs.

    lm-eval's own index (8 s) is read only when a name asks for it.

    Raises:
        InputError: unknown name, a file that is no task, or a data set that cannot be fetched.
    """
    tasks: dict[str, Any] = {}
    for name in names:
        with quiet_lm_eval():
            found = _local(name, parts, seed) if name in LOCAL_TASKS else _foreign(name)
        tasks |= found
    return tasks


def _local(name: str, parts: TextParts, seed: int) -> dict[str, Any]:
    import datasets
    from lm_eval.api.task import ConfigurableTask

    items = items_of(name, parts, seed=seed)
    config = {
        "task": name,
        "custom_dataset": lambda: {"test": datasets.Dataset.from_list(items)},
        "test_split": "test",
        "num_fewshot": 0,
        **LOCAL_TASKS[name].config,
    }
    return {name: ConfigurableTask(config=config)}


@functools.cache
def _manager() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _foreign(name: str) -> dict[str, Any]:
    import datasets
    import yaml
    from lm_eval.tasks import TaskManager

    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise InputError(f"task file {name} does not exist: give the path of a task YAML")
        manager = TaskManager(include_path=str(path.parent), include_defaults=False)
    else:
        manager = _manager()
        if name not in manager.task_index:
            known = [*LOCAL_TASKS, *manager.all_tasks]
            close = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {', '.join(close)}?" if close else f"try {', '.join(_ON_REPORT)}"
            raise InputError(f"task {name!r} is not known: {hint}")
    try:
        with offline_when_unreachable():
            return manager.load([name])["tasks"]
    except (
        OSError,
        LookupError,
        TypeError,
        ValueError,
        ImportError,
        yaml.YAMLError,
        datasets.exceptions.DatasetsError,
    ) as error:
        reason = " ".join(str(error).split())[:60]
        raise InputError(
            f"task {name[-60:]} cannot be loaded ({type(error).__name__}: {reason}): "
            f"make its data set reachable, or use {', '.join(_ON_REPORT)}"
        ) from error


def check_no_overlap(
    search: Iterable[str], report: Iterable[str], allowed: Iterable[str] = ()
) -> None:
    """What the search optimises may not be what the report tells: neither tasks nor texts.

    Raises:
        InputError: a task is on both sides, or local tasks of both sides draw on one part, and
            is not named in ``allowed``.
    """
    allowed = set(allowed)
    searched = [name for name in search if name not in allowed]
    reported = [name for name in report if name not in allowed]
    for name in searched:
        if name in reported:
            raise InputError(
                f"task {name} is both searched on and reported: take another for one side, "
                f"or allow it with scoring.allow_overlap=[{name}]"
            )
        for other in reported:
            if {name, other} <= LOCAL_TASKS.keys():
                part = LOCAL_TASKS[name].part
                if part == LOCAL_TASKS[other].part:
                    raise InputError(
                        f"search task {name} and report task {other} draw on the same ({part}) "
                        f"text: search on ..._search tasks, or allow {name} by name"
                    )


def items_digest(task: Any, limit: int | None = None) -> str:
    """12 hex characters that identify the first ``limit`` items of an lm-eval task."""
    digest = hashlib.sha256()
    for item in islice(task.eval_docs, limit):
        digest.update(json.dumps(item, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:12]


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """lm-eval without progress bars and without log lines below ERROR; undone at the end."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    bars = {
        name: module.tqdm
        for name, module in list(sys.modules.items())
        if name.startswith("lm_eval.") and hasattr(module, "tqdm")
    }
    logger.setLevel(logging.ERROR)
    for name, bar in bars.items():
        sys.modules[name].tqdm = _without_bar(bar)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, bar in bars.items():
            sys.modules[name].tqdm = bar  # type: ignore[attr-defined]


def _without_bar(bar: Any) -> Callable[..., Any]:
    def quiet(*arguments: Any, **options: Any) -> Any:
        return bar(*arguments, **(options | {"disable": True}))

    return quiet
