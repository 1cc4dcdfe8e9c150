"""Load the tasks that lm-eval scores a map on, and keep those of the search out of the report.

The `Scorers` of a command load the tasks of the search and of the report by name, and `TaskScorer`
scores them. A name is that of a task made here (`local_tasks`), of one of the paper's benchmarks,
or of one of lm-eval's own tasks. It may also be the path of a YAML file.

The paper's benchmarks that lm-eval lacks are the files of ``paper_tasks/``. Each of them reads
``$KVSHARER_TASK_DATA/<task>.jsonl`` (or ``.json``, ``.parquet``) if that file exists, and the hub
if not.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kvsharer_exp.data.hub import offline_when_unreachable
from kvsharer_exp.data.json_lines import broken_line
from kvsharer_exp.data.local_tasks import LOCAL_TASKS, items_of, local_task, near_names
from kvsharer_exp.data.passages import TextParts
from kvsharer_exp.data.task_errors import not_loaded
from kvsharer_exp.values.errors import InputError

WEIGHS = ("loglikelihood", "loglikelihood_rolling", "multiple_choice")
"""The kinds of tasks that weigh given texts, and generate none."""

TASK_DATA = "KVSHARER_TASK_DATA"  # the environment variable that names a folder of local copies
_PAPER_FOLDER = Path(__file__).parent / "paper_tasks"
PAPER_TASKS = tuple(sorted(path.stem for path in _PAPER_FOLDER.glob("*.yaml")))
_ANYWHERE = ", ".join(name for name in LOCAL_TASKS if not name.endswith("_search"))


def load_tasks(
    names: Iterable[str],
    parts: TextParts,
    *,
    seed: int = 0,
    tokenizer: Any | None = None,
    max_positions: int | None = None,
    tokenizer_source: Callable[[], str | None] = lambda: None,
    metadata: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Load lm-eval ``Task`` objects: made here, the paper's, lm-eval's own, or of a YAML file.

    The result holds them by name. A group with a score of its own (``mmlu``) stays one lm-eval
    ``Group``. Any other group is replaced by its tasks. lm-eval's own index takes 8 s to read, so
    it is read only when a name asks for it. ``parts`` and ``seed`` give the items of tasks made
    here.

    Args:
        tokenizer: what the length of a retrieval task (``needle_4096``) is measured with. Without
            one every word counts as 1.4 tokens.
        max_positions: the most tokens that the model can read, if known.
        tokenizer_source: gives the folder or hub id of a tokenizer, for those of lm-eval's tasks
            that make texts of a length (RULER).
        metadata: what else these are given, like ``max_seq_lengths``.

    Raises:
        InputError: a name is unknown, a file is no task, data sets cannot be fetched, or a
            retrieval task cannot have the length in its name.
    """
    names = list(names)
    tasks: dict[str, Any] = {}
    failed: dict[str, Exception] = {}
    local = {name: task for name in names if (task := local_task(name)) is not None}
    hub = nullcontext() if set(names) <= local.keys() else offline_when_unreachable()
    with quiet_lm_eval(), hub:
        for name in names:
            if name in local:
                items = items_of(
                    name, parts, seed=seed, tokenizer=tokenizer, max_positions=max_positions
                )
                tasks[name] = _in_memory(name, items, local[name].config)
                continue
            manager, task = _find(name, lambda: _metadata(tokenizer_source(), metadata))
            try:
                found = manager.load([task])
            except Exception as error:  # from lm-eval, datasets, the hub's clients, YAML or Jinja
                broken = broken_line(task)
                failed[name] = InputError(broken) if broken else error
                continue
            group = next(iter(found["groups"].values()), None)
            tasks |= {group.name: group} if group and group.has_aggregation else found["tasks"]
    if failed:
        way = "make the data reachable, or use wiki_cloze"
        if failed.keys() <= set(PAPER_TASKS):
            way = f"reach the hub, or put files into ${TASK_DATA} (fields: paper_tasks/*.yaml)"
        raise not_loaded(failed, way) from next(iter(failed.values()))
    return tasks


def members(tasks: Mapping[str, Any]) -> dict[str, Any]:
    """Give single tasks by name: each group is replaced by the tasks on all its levels."""
    from lm_eval.api.group import Group

    single: dict[str, Any] = {}
    for name, task in tasks.items():
        held = task.get_all_tasks() if isinstance(task, Group) else []
        single |= {each.task_name: each for each in held} or {name: task}
    return single


def _in_memory(name: str, items: list[dict[str, Any]], config: Mapping[str, Any]) -> Any:
    import datasets
    from lm_eval.api.task import ConfigurableTask

    config = {
        "task": name,
        "custom_dataset": lambda: {"test": datasets.Dataset.from_list(items)},
        "test_split": "test",
        "num_fewshot": 0,
        **config,
    }
    return ConfigurableTask(config=config)


@functools.cache
def _manager(metadata: str) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(metadata=json.loads(metadata))


def _metadata(tokenizer: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """What lm-eval hands to those of its tasks that make their texts themselves."""
    return {**({} if tokenizer is None else {"tokenizer": tokenizer}), **given}


@functools.cache
def _task_files() -> tuple[Path, ...]:
    """The files of lm-eval that define its tasks; some of those that others include end in none."""
    import lm_eval

    folder = Path(lm_eval.__file__).with_name("tasks")
    return tuple(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")


@functools.cache
def _all_files() -> bytes:
    """What stands in lm-eval's files: a name that does not is no task.

    It takes a second to read, and lm-eval's own index a quarter of a minute.
    """
    return b"\n".join(path.read_bytes() for path in _task_files())


def _find(name: str, metadata: Callable[[], dict[str, Any]]) -> tuple[Any, Any]:
    """Find the task manager that knows ``name``, and what to ask that manager for.

    ``metadata`` gives what the manager hands to its tasks.
    """
    from lm_eval.tasks import TaskManager

    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise InputError(f"task file {name} does not exist: give the path of a task YAML")
        options = {"include_path": str(path.parent), "include_defaults": False}
        return TaskManager(**options, metadata=metadata()), name
    if name in PAPER_TASKS:
        manager = TaskManager(include_path=str(_PAPER_FOLDER), include_defaults=False)
        # A group is lm-eval's way to load a task with some keys changed.
        return manager, {"group": "paper", "task": [{"task": name, **_local_copy(name)}]}
    if name.encode() in _all_files():
        manager = _manager(json.dumps(metadata()))
        if name in manager.task_index:
            return manager, name
    theirs = (path.stem for path in _task_files() if path.suffix == ".yaml")
    close = near_names(name, [*PAPER_TASKS, *theirs])
    hint = f"did you mean {', '.join(close)}?" if close else f"try {_ANYWHERE}"
    raise InputError(f"task {name!r} is not known: {hint}")


def _local_copy(name: str) -> dict[str, Any]:
    """The keys that make a task read its file in ``$KVSHARER_TASK_DATA``; none without a file."""
    folder = os.path.expanduser(os.environ.get(TASK_DATA, ""))
    for kind, suffix in (("json", "jsonl"), ("json", "json"), ("parquet", "parquet")):
        path = Path(folder, f"{name}.{suffix}")
        if folder and path.is_file():
            return {
                "dataset_path": kind,
                "dataset_name": None,
                "dataset_kwargs": {"data_files": {"test": str(path)}},
                "validation_split": None,
                "test_split": "test",
            }
    return {}


def without_generation(tasks: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``tasks`` that generate no answers."""
    return {
        name: task
        for name, task in tasks.items()
        if all(each.OUTPUT_TYPE in WEIGHS for each in members({name: task}).values())
    }


def check_no_generation(tasks: Mapping[str, Any]) -> None:
    """Refuse a task that generates answers, which nothing but the model in this process does.

    Raises:
        InputError: names the first such task.
    """
    for name, task in members(tasks).items():
        if task.OUTPUT_TYPE not in WEIGHS:
            raise InputError(
                f"task {name} generates answers, which engine=vllm does not score: leave it out of "
                "scoring.report.tasks"
            )


def check_no_overlap(
    search: Iterable[str], report: Iterable[str], allowed: Iterable[str] = ()
) -> None:
    """Refuse a search that optimises a task or a text that the report tells.

    Tasks named in ``allowed`` are not checked.

    Raises:
        InputError: a task is on both sides, or local tasks of both sides draw on the same part.
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
            ours, theirs = local_task(name), local_task(other)
            if ours is not None and theirs is not None and ours.part == theirs.part:
                raise InputError(
                    f"search task {name} and report task {other} draw on the same ({ours.part}) "
                    f"text: search on ..._search tasks, or allow {name} by name"
                )


def items_digest(task: Any, limit: int | None = None) -> str:
    """Return 12 hex characters that identify the first ``limit`` items of an lm-eval task."""
    digest = hashlib.sha256()
    for item in islice(task.eval_docs, limit):
        digest.update(json.dumps(item, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:12]


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Silence progress bars, and log lines that do not end a task; undone at the end.

    These are lm-eval's below ERROR. Those of the data sets' library come with an exception anyway.
    """
    import datasets

    hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    levels = {"lm_eval": logging.ERROR, "datasets": logging.CRITICAL}
    before = {name: logging.getLogger(name).level for name in levels}
    bars = {
        name: module.tqdm
        for name, module in list(sys.modules.items())
        if name.startswith("lm_eval.") and hasattr(module, "tqdm")
    }
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    for name, bar in bars.items():
        sys.modules[name].tqdm = _without_bar(bar)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
        for name, bar in bars.items():
            sys.modules[name].tqdm = bar  # type: ignore[attr-defined]
        if not hidden:
            datasets.enable_progress_bars()


def _without_bar(bar: Any) -> Callable[..., Any]:
    def quiet(*arguments: Any, **options: Any) -> Any:
        return bar(*arguments, **(options | {"disable": True}))

    return quiet
