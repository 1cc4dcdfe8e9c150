"""Score a live model on lm-eval tasks.

The `Scorers` of a command make a `TaskScorer` for the tasks of the search and one for those of the
report. Whoever calls it decides under which map the model runs (``with share_kv(model,
sharing_map): …``). The model object itself is scored, every time on the same items in the same
batches, so that two maps can be compared item by item.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import torch

from kvsharer_exp.data.chance import pass_marks
from kvsharer_exp.data.tasks import WEIGHS, check_no_generation, members, quiet_lm_eval
from kvsharer_exp.measure.batch_size import BatchSize
from kvsharer_exp.measure.item_scores import is_weighted, per_item, standard_error
from kvsharer_exp.model.devices import input_device
from kvsharer_exp.values.agreement import Answer, Likelihoods
from kvsharer_exp.values.errors import InputError, at_least
from kvsharer_exp.values.finite import finite
from kvsharer_exp.values.score_names import ScoreName, is_known_lower

_FEWSHOT_SEED = 1234  # lm-eval's own default


class TaskScorer:
    """Scores a model on lm-eval tasks, on the same items each time.

    After ``score()``, two attributes hold values for paired tests. ``item_scores`` holds the values
    behind each score, in the order of the items. Behind a perplexity these are log-likelihoods in
    nats, per word or per byte if the score weights items so. ``samples`` holds the same values for
    the main metric of each task, which is the first that the task lists. ``answers`` holds the
    log-likelihoods behind them: for each item one for each of its texts. ``directions`` says of
    each score whether higher is better, from the start.

    Args:
        tasks: lm-eval ``Task`` objects by name, from `load_tasks`. For a ``Group`` its own score is
            told, and not those of its members.
        limit: how many of the first items of each task are scored; None: all.
        add_bos_token: whether texts begin with BOS; None leaves it to the tokenizer.
        max_length: the most tokens that are read before one is predicted; None: what the model can.
        likelihoods: who is asked for log-likelihoods; None: the model, in this process.

    Raises:
        InputError: there is no task, the limit or batch size is below 1, or a task generates and
            ``likelihoods`` is given.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        tasks: Mapping[str, Any],
        *,
        limit: int | None = None,
        batch_size: int = 8,
        add_bos_token: bool | None = None,
        max_length: int | None = None,
        likelihoods: Likelihoods | None = None,
    ) -> None:
        from lm_eval.models.huggingface import HFLM

        from kvsharer_exp.measure.engine_lm import EngineLM

        if not tasks:
            raise InputError("no lm-eval task is named: give at least one, like wiki_cloze")
        for name, value in (("limit", limit), ("batch_size", batch_size)):
            if value is not None:
                at_least(name, value, 1)
        self.tasks = members(tasks)
        self._members = {name: list(members({name: task})) for name, task in tasks.items()}
        self._groups = {name: task for name, task in tasks.items() if name not in self.tasks}
        self.limit = limit
        self._batch_size = BatchSize(batch_size, "scoring.batch_size of tasks")
        self.item_scores: dict[str, list[float]] = {}
        self.samples: dict[str, list[float]] = {}
        self.answers: dict[str, list[list[Answer]]] = {}
        self.directions: dict[str, bool] = {}
        self._stderr: dict[str, float] = {}
        for name, held in self._members.items():
            for task in (self.tasks[member] for member in held):
                for metric, up in task.higher_is_better().items():
                    self._tell(name, metric, up)
        with quiet_lm_eval():
            make = HFLM if likelihoods is None else partial(EngineLM, likelihoods)
            self._lm = make(
                pretrained=model,
                tokenizer=_for_tasks(model, tokenizer),
                backend="causal",
                batch_size=batch_size,
                softmax_dtype=torch.float32,
                add_bos_token=add_bos_token,
                max_length=max_length,
                prefix_token_id=_first_token(tokenizer),
            )
        self._lm._device = input_device(model)  # HFLM takes the first weight's, which may be meta
        if likelihoods is not None:
            check_no_generation(self.tasks)
        for name, task in self.tasks.items():
            self._check_length(name, task)

    def score(self, drop: Callable[[], bool] = lambda: False) -> dict[str, float]:
        """Score the model as it is now; returns the value of each ``lm_eval/<task>/<metric>``.

        A metric behind a named filter is written ``<metric>.<filter>``. If memory runs out, what
        ``drop`` drops goes first, and then batches get smaller (`BatchSize.run`).

        Raises:
            NotFiniteError: a metric is not a finite number.
            InputError: nobody says of a metric whether higher is better.
        """
        results = self._batch_size.run(self._evaluate, drop)
        scores: dict[str, float] = {}
        self.item_scores, self.samples, self.answers, self._stderr = {}, {}, {}, {}
        for task, names in self._members.items():
            samples = [
                sample
                for name in names
                for sample in sorted(results["samples"][name], key=lambda s: s["doc_id"])
            ]
            if samples and all(self.tasks[name].OUTPUT_TYPE in WEIGHS for name in names):
                first = samples[0]["filter"]  # a sample is repeated for every filter
                self.answers[task] = [
                    _answers(sample) for sample in samples if sample["filter"] == first
                ]
            for key, value in results["results"][task].items():
                metric, comma, filtered = key.rpartition(",")
                if not comma or metric.endswith("_stderr"):
                    continue
                items = [
                    sample[metric]
                    for sample in samples
                    if sample["filter"] == filtered and metric in sample
                ]
                if metric.isdigit():  # a length of RULER: documents of other lengths have -1
                    items = [item for item in items if item != -1]
                    if not items:
                        continue
                name = str(ScoreName.of_task(task, metric, "" if filtered == "none" else filtered))
                scores[name] = finite(name, value)
                told = results["higher_is_better"].get(task, {}).get(metric)
                self._tell(task, metric, told)
                weighted = is_weighted(self.tasks[names[0]], metric)
                error = standard_error(metric, scores[name], items, weighted)
                if error is not None:
                    self._stderr[name] = error
                self.item_scores[name] = per_item(items, weighted)
                if metric == next(iter(self.tasks[names[0]].aggregation())):
                    self.samples.setdefault(task, self.item_scores[name])
        return scores

    @cached_property
    def pass_marks(self) -> dict[str, float]:
        """What the full cache has to score at least to do each task (see `PassMarks`)."""
        held = {task: [self.tasks[name] for name in names] for task, names in self._members.items()}
        return pass_marks(held, self.limit)

    def _evaluate(self, batch_size: int) -> dict[str, Any]:
        """What lm-eval says of all tasks, whose items go through in batches of ``batch_size``."""
        import lm_eval

        self._lm.batch_size_per_gpu = batch_size
        for task in self.tasks.values():
            task.set_fewshot_seed(_FEWSHOT_SEED)  # otherwise every call draws other examples
        with quiet_lm_eval():
            results: dict[str, Any] = lm_eval.evaluate(
                lm=self._lm,
                task_dict={"tasks": self.tasks, "groups": self._groups, "group_map": {}},
                limit=self.limit,
                bootstrap_iters=0,
                log_samples=True,
            )
        return results

    def _check_length(self, name: str, task: Any) -> None:
        """Refuse a task that generates more than the model has positions for, before it is run.

        Raises:
            InputError: names the task and both numbers, or there is no EOS to end an answer.
        """
        if task.OUTPUT_TYPE == "generate_until":
            if self._lm.eot_token_id is None:
                raise InputError(
                    f"task {name} generates until EOS, but the tokenizer has no EOS token: leave "
                    "the task out"
                )
            wanted = task.config.generation_kwargs.get("max_gen_toks", self._lm.max_gen_toks)
            if wanted >= self._lm.max_length:
                raise InputError(
                    f"task {name} generates up to {wanted} tokens, but the model has "
                    f"{self._lm.max_length} positions: lower its max_gen_toks, or leave it out"
                )

    def _tell(self, task: str, metric: str, told: bool | None) -> None:
        """Keep whether higher is better, as the task says or else the metric's name.

        Raises:
            InputError: neither of them says it.
        """
        name = str(ScoreName.of_task(task, metric))
        if told is None and name not in self.directions:
            if not is_known_lower(metric):
                raise InputError(
                    f"task {task} does not say whether a higher {metric} is better: "
                    "add higher_is_better to its metric_list"
                )
            told = False
        if told is not None:
            self.directions[name] = told

    def stderr(self) -> dict[str, float]:
        """The standard errors of the last ``score()`` over its items, by name of score.

        Scores without a formula for it are left out.
        """
        return dict(self._stderr)


def _answers(sample: Mapping[str, Any]) -> list[Answer]:
    """The answers of the model for the texts of one item, as lm-eval logs them."""
    found = [answers[0] for answers in sample["resps"]]
    return [(a[0], a[1]) if isinstance(a, (tuple, list)) else (a, None) for a in found]


def _for_tasks(model: Any, tokenizer: Any) -> Any:
    """Copy ``tokenizer``, for lm-eval sets a pad token on it if it has none, like EOS.

    A pad token that the model has no embedding for goes, since lm-eval would look it up.
    """
    copied = copy.deepcopy(tokenizer)
    rows = model.get_input_embeddings().weight.shape[0]
    if copied.pad_token_id is not None and copied.pad_token_id >= rows:
        copied.pad_token = None
    return copied


def _first_token(tokenizer: Any) -> int | None:
    """The token before a text that has nothing before it; None where lm-eval finds BOS or EOS.

    A tokenizer with neither begins texts with a line break.

    Raises:
        InputError: it has no token for a line break either.
    """
    if tokenizer.bos_token_id is not None or tokenizer.eos_token_id is not None:
        return None
    line_break = tokenizer("\n", add_special_tokens=False).input_ids
    if not line_break:
        raise InputError(
            "tasks need a token to begin a text with, and the tokenizer has no BOS, EOS or line "
            "break: name no tasks, or add a BOS token to it"
        )
    return line_break[-1]
