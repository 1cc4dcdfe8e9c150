"""Make what scores a map: the fitness on the scoring windows, the tasks, and the held-out text.

The commands ``sweep``, ``evaluate``, ``export`` and ``ablate`` score their maps with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import torch

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.calibration import Calibration
from kvsharer_exp.cli.session.loaded_model import LoadedModel
from kvsharer_exp.cli.session.run_log import RunLog
from kvsharer_exp.cli.session.windows import Windows
from kvsharer_exp.data.retrieval_tasks import is_retrieval
from kvsharer_exp.data.tasks import check_no_overlap, load_tasks, members, without_generation
from kvsharer_exp.measure.batch_size import BatchSize
from kvsharer_exp.measure.benchmark import check_length
from kvsharer_exp.measure.evaluator import Evaluator
from kvsharer_exp.measure.held_out import HeldOutScorer
from kvsharer_exp.measure.scoring import TaskScorer
from kvsharer_exp.model.footprint import max_positions, text_config
from kvsharer_exp.model.load import tokenizer_source
from kvsharer_exp.search.fitness import find_fitness
from kvsharer_exp.values.actions.base import Action
from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.agreement import Likelihoods
from kvsharer_exp.values.errors import InputError, at_least

_SHORTEST = 32  # tokens: the texts that tasks weigh would not fit into less

Tasks = Mapping[str, Any]
"""lm-eval tasks by name."""


class Scorers:
    """The scorers of one model.

    Raises:
        InputError: ``scoring.fitness`` names a loss that is unknown.
    """

    def __init__(
        self,
        config: Config,
        log: RunLog,
        loaded: LoadedModel,
        windows: Windows,
        calibration: Calibration,
    ) -> None:
        for name in config.scoring.weights:
            find_fitness(name)
        self._config, self._say, self._loaded = config, log.say, loaded
        self._windows, self._calibration = windows, calibration
        self._tasks: tuple[Tasks, Tasks] | None = None
        self._batch_size = BatchSize(config.scoring.batch_size)  # of windows, here and there

    def load_tasks(self) -> tuple[Tasks, Tasks]:
        """The tasks of the search and those of the report, loaded at the first call.

        Call this before model time is spent, because it refuses tasks that cannot be used.

        Raises:
            InputError: a task is unknown or out of reach, or is both searched on and reported.
        """
        if self._tasks is None:
            self._tasks = self._load_tasks()
        return self._tasks

    def _load_tasks(self) -> tuple[Tasks, Tasks]:
        scoring = self._config.scoring
        allowed = scoring.allow_overlap
        check_no_overlap(scoring.search.tasks, scoring.report.tasks, allowed)
        search, report = (
            load_tasks(
                names,
                self._windows.texts,
                seed=self._config.seed,
                tokenizer_source=lambda: tokenizer_source(self._loaded.spec),
                metadata=scoring.task_metadata or {},
                **self._measure(names),
            )
            if names
            else {}
            for names in (scoring.search.tasks, scoring.report.tasks)
        )
        # The check is made again, now that the members of groups are known.
        optimised = {name: task for name, task in search.items() if name not in allowed}
        check_no_overlap(members(optimised), members(report), allowed)
        return search, report

    def _measure(self, names: Iterable[str]) -> dict[str, Any]:
        """What the lengths of retrieval tasks are measured with; the model is loaded for them only.

        Other tasks need no model, and a name that is unknown is refused before one is loaded.
        """
        if not any(is_retrieval(name) for name in names):
            return {}
        model = self._loaded.model
        return {"tokenizer": self._loaded.tokenizer, "max_positions": max_positions(model)}

    @cached_property
    def search_tasks(self) -> TaskScorer | None:
        """Scores the tasks that the search sees; None if there are none."""
        return self._task_scorer(self.load_tasks()[0], self._config.scoring.search.limit)

    @cached_property
    def report_tasks(self) -> TaskScorer | None:
        """Scores the tasks that only the report sees; None if there are none."""
        return self._task_scorer(self.load_tasks()[1], self._config.scoring.report.limit)

    def require(self, actions: Iterable[Action] = ()) -> None:
        """Make the scorers of all tasks now, so that what cannot be scored is refused before model
        time is spent: a task that does not fit the model, or one of the ``actions``.

        Raises:
            InputError: a task generates more tokens than the model has positions for, or see
                `check`.
        """
        self.check(actions)
        for scorer in (self.search_tasks, self.report_tasks):
            for name, task in ({} if scorer is None else scorer.tasks).items():
                if task.OUTPUT_TYPE != "generate_until":
                    refuse_prompted(
                        actions, f"task {name}", "tasks that are answered, like copying"
                    )

    def check(self, actions: Iterable[Action]) -> None:
        """Refuse windows longer than the model can read, and ``actions`` that they tell nothing of.

        Raises:
            InputError: a window has more tokens than the model has positions; or what an action
                keeps is chosen when a prompt has ended, and there is no prompt.
        """
        for group in ("scoring", "heldout"):
            tokens = getattr(self._config, group).window_tokens
            check_length(self._loaded.model, tokens, f"{group}.window_tokens")
        if self._config.scoring.prompt_tokens is None:
            refuse_prompted(actions, "scoring of all tokens")

    @property
    def directions(self) -> dict[str, bool]:
        """What the tasks say of their scores, once they were scored (see `Directions`)."""
        return {name: up for scorer in self._both() for name, up in scorer.directions.items()}

    @property
    def pass_marks(self) -> dict[str, float]:
        """What the full cache has to score at least to do each task (see `PassMarks`)."""
        return {name: mark for scorer in self._both() for name, mark in scorer.pass_marks.items()}

    def _both(self) -> list[TaskScorer]:
        return [scorer for scorer in (self.search_tasks, self.report_tasks) if scorer is not None]

    def through(self, likelihoods: Likelihoods) -> TaskScorer | None:
        """Make a scorer of the report tasks that asks ``likelihoods``; None if there are none.

        Tasks that generate their answers are left out.
        """
        tasks, limit = without_generation(self.load_tasks()[1]), self._config.scoring.report.limit
        return self._task_scorer(tasks, limit, likelihoods)

    def held_out(self, *, tasks: bool = True) -> HeldOutScorer:
        """Make a scorer of the held-out windows and, unless left out, of the report tasks."""
        return HeldOutScorer(
            self._loaded.model,
            self._windows.held_out,
            self.report_tasks if tasks else None,
            batch_size=self._batch_size,
            prompt=self._config.scoring.prompt_tokens,
            seed=self._config.seed,
        )

    @cached_property
    def fitness(self) -> Evaluator:
        """Scores maps on `Windows.fitness`, which the search optimises on.

        If the text has fewer windows than are asked for, those it has are used. The evaluator has
        the memory that the acceptance test leaves.
        """
        scoring, windows = self._config.scoring, self._windows.scoring
        if len(windows) < scoring.num_windows:
            self._say(
                f"the calibration text has {len(windows)} windows of {scoring.window_tokens} "
                f"tokens, scoring.num_windows={scoring.num_windows} are asked"
                + ("" if len(windows) else ": maps are scored on the calibration windows")
            )
        return Evaluator(
            self._loaded.model,
            self._windows.fitness,
            batch_size=self._batch_size,
            cuts=self._config.study.screen_windows,
            memory_budget=max(0, scoring.memory_budget - self._calibration.text.kept_bytes),
            prompt=scoring.prompt_tokens,
        )

    def final(self, windows: torch.Tensor) -> Evaluator:
        """Make an evaluator of some windows of the finals; it has the memory `fitness` leaves."""
        scoring = self._config.scoring
        left = max(0, scoring.memory_budget - self.fitness.kept_bytes)
        return Evaluator(
            self._loaded.model,
            windows,
            batch_size=self._batch_size,
            memory_budget=left,
            prompt=scoring.prompt_tokens,
        )

    def of_held_out_windows(self) -> Evaluator:
        """Make an evaluator of the held-out windows, which gives KL and perplexity in one pass."""
        scoring = self._config.scoring
        return Evaluator(
            self._loaded.model,
            self._windows.held_out,
            batch_size=self._batch_size,
            memory_budget=scoring.memory_budget,
            prompt=scoring.prompt_tokens,
        )

    def _task_scorer(
        self, tasks: Tasks, limit: int | None, likelihoods: Likelihoods | None = None
    ) -> TaskScorer | None:
        if not tasks:
            return None
        config, longest = self._config, None
        if config.engine.name == "vllm":
            # The engine reads the last token of a text too, and adds one. Both runtimes cut alike.
            longest = longest_request(self._loaded.model, config.serve.max_len) - 2
        return TaskScorer(
            self._loaded.model,
            self._loaded.tokenizer,
            tasks,
            limit=limit,
            batch_size=config.scoring.batch_size,
            add_bos_token=config.model.add_bos_token,
            max_length=longest,
            likelihoods=likelihoods,
        )


def refuse_prompted(
    actions: Iterable[Action],
    what: str,
    instead: str = "scoring=long, which scores what follows one",
) -> None:
    """Refuse those of ``actions`` that choose at the end of a prompt, for ``what`` has none.

    ``instead`` has one.

    Raises:
        InputError: names the keep of the first such action.
    """
    for action in actions:
        keep = action.keep if isinstance(action, Own) else None
        if keep is not None and keep.prompted:
            raise InputError(
                f"{keep} is chosen when a prompt has ended, and {what} has no prompt: "
                f"give {instead}"
            )


def longest_request(model: Any, asked: int | None) -> int:
    """The most tokens of a request in an engine: those of ``serve.max_len``, or what ``model`` can.

    Raises:
        InputError: it can hold fewer, or tasks need more.
    """
    if asked is None:
        return int(text_config(model).max_position_embeddings)
    at_least("serve.max_len", asked, _SHORTEST)
    check_length(model, asked, "serve.max_len")
    return asked
