"""Scores of a live model on lm-eval tasks.

The caller decides under which map the model runs (``with share_kv(model, sharing_map): …``). The
model object itself is scored, every time on the same items in the same batches, so that two maps
can be compared item by item.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from statistics import fmean, stdev
from typing import Any

import torch

from kvsharer_exp.data.tasks import members, quiet_lm_eval
from kvsharer_exp.measure.perplexity import finite
from kvsharer_exp.values.errors import InputError, at_least
from kvsharer_exp.values.score_names import ScoreName

_FEWSHOT_SEED = 1234  # lm-eval's own default


class TaskScorer:
    """Scores a live model on lm-eval tasks, on the same items each time.

    After ``score()`` the values for paired tests are here. ``item_scores`` holds the values behind
    each score in the order of the items. Behind a perplexity stands the log-likelihood of an item
    in nats, per word or per byte where the score weights items so. ``samples`` holds the same for
    the main metric of each task, which is the first that the task lists.

    Args:
        tasks: lm-eval ``Task`` objects by name, from `load_tasks`. A ``Group`` has a score of its
            own, which is told instead of those of its members.
        limit: how many of the first items of each task are scored; None: all.
        add_bos_token: whether texts begin with BOS; None leaves it to the tokenizer.

    Raises:
        InputError: no task, or a limit or batch size below 1.
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
    ) -> None:
        from lm_eval.models.huggingface import HFLM

        if not tasks:
            raise InputError("no lm-eval task is named: give at least one, like wiki_cloze")
        for name, value in (("limit", limit), ("batch_size", batch_size)):
            if value is not None:
                at_least(name, value, 1)
        self.tasks = members(tasks)
        self._members = {name: list(members({name: task})) for name, task in tasks.items()}
        self._groups = {name: task for name, task in tasks.items() if name not in self.tasks}
        self.limit = limit
        self.item_scores: dict[str, list[float]] = {}
        self.samples: dict[str, list[float]] = {}
        self._stderr: dict[str, float] = {}
        with quiet_lm_eval():
            self._lm = HFLM(
                pretrained=model,
                tokenizer=copy.deepcopy(tokenizer),  # HFLM sets a pad token on it
                backend="causal",
                batch_size=batch_size,
                softmax_dtype=torch.float32,
                add_bos_token=add_bos_token,
            )

    def score(self) -> dict[str, float]:
        """``lm_eval/<task>/<metric>`` → value, for the model as it is now.

        A metric behind a named filter is written ``<metric>.<filter>``.

        Raises:
            RuntimeError: a metric is not a finite number.
        """
        import lm_eval

        for task in self.tasks.values():
            task.set_fewshot_seed(_FEWSHOT_SEED)  # else every call draws other examples
        with quiet_lm_eval():
            results = lm_eval.evaluate(
                lm=self._lm,
                task_dict={"tasks": self.tasks, "groups": self._groups, "group_map": {}},
                limit=self.limit,
                bootstrap_iters=0,
                log_samples=True,
            )
        scores: dict[str, float] = {}
        self.item_scores, self.samples, self._stderr = {}, {}, {}
        for task, names in self._members.items():
            samples = [
                sample
                for name in names
                for sample in sorted(results["samples"][name], key=lambda s: s["doc_id"])
            ]
            for key, value in results["results"][task].items():
                metric, comma, filtered = key.rpartition(",")
                if not comma or metric.endswith("_stderr"):
                    continue
                name = str(ScoreName.of_task(task, metric, "" if filtered == "none" else filtered))
                scores[name] = finite(name, value)
                items = [
                    sample[metric]
                    for sample in samples
                    if sample["filter"] == filtered and metric in sample
                ]
                error = _standard_error(metric, scores[name], items)
                if error is not None:
                    self._stderr[name] = error
                self.item_scores[name] = _per_item(items)
                if metric == next(iter(self.tasks[names[0]].aggregation())):
                    self.samples.setdefault(task, self.item_scores[name])
        return scores

    def stderr(self) -> dict[str, float]:
        """Standard errors over items of the last ``score()``, where there is a formula."""
        return dict(self._stderr)


def _per_item(items: list[Any]) -> list[float]:
    """Numbers as they are; lm-eval's (log-likelihood, weight) pairs as their quotient."""
    if all(isinstance(item, (int, float)) for item in items):
        return [float(item) for item in items]
    if all(isinstance(item, tuple) and len(item) == 2 for item in items):
        return [float(value) / max(weight, 1) for value, weight in items]
    return []


def _standard_error(metric: str, score: float, items: list[Any]) -> float | None:
    """Of a mean; of exp(-mean) and of a ratio of sums by the delta method; else None."""
    if len(items) < 2:
        return None
    root = math.sqrt(len(items))
    if all(isinstance(item, tuple) and len(item) == 2 for item in items):
        if metric not in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
            return None
        rate = sum(value for value, _ in items) / sum(weight for _, weight in items)
        residuals = [value - rate * weight for value, weight in items]
        error = stdev(residuals) / root / fmean(weight for _, weight in items)
        return error / math.log(2) if metric == "bits_per_byte" else score * error
    if not all(isinstance(item, (int, float)) for item in items):
        return None
    error = stdev(items) / root
    if metric == "perplexity":
        return score * error
    return error if math.isclose(fmean(items), score, abs_tol=1e-9) else None
