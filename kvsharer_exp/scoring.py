"""Scores of the model as it stands: lm-eval tasks, perplexity, and what a map retains of them.

The caller decides under which map the model runs (``with share_kv(model, sharing_map): …``); the
live model object is scored, with the same items, in the same batches, every time.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import torch
from torch.nn import functional

from kvsharer_exp.errors import InputError, at_least
from kvsharer_exp.tasks import members, quiet_lm_eval

_FEWSHOT_SEED = 1234  # lm-eval's own default
# Metrics where less is better, here and in lm-eval's registry and task files.
_LOWER_IS_BETTER = frozenset(
    """bits_per_byte brier_score byte_perplexity cer kl likelihood_diff loss nll perplexity ter wer
    word_perplexity""".split()
)
_NO_RATIO = frozenset(["kl", "cosine"])  # distances to the full cache, not qualities


class TaskScorer:
    """Scores a live model on lm-eval tasks, the same items each time.

    tasks: lm-eval ``Task`` objects by name, from ``tasks.load_tasks``; of a ``Group`` its own score
    is told, not those of its members.
    limit: the first so many items of each task (None: all).
    add_bos_token: None leaves it to the tokenizer.

    After ``score()``, for paired tests: ``item_scores`` holds the values behind each score, item
    by item, in the order of the items; behind a perplexity stands the log-likelihood in nats (per
    word or byte where the score weights them so). ``samples`` is the same for each task's main
    metric, the first that the task lists.

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
                name = f"lm_eval/{task}/{metric}" + ("" if filtered == "none" else f".{filtered}")
                scores[name] = _finite(name, value)
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


def _finite(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise RuntimeError(f"{name} is {value!r}, not a finite number")
    return float(value)


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


def higher_is_better(name: str) -> bool:
    """Whether a score improves upwards: ``perplexity/<text>``, ``kl``, ``lm_eval/<task>/<metric>``.

    Metrics that are not known to improve downwards count as improving upwards.
    """
    return _metric(name) not in _LOWER_IS_BETTER


def _metric(name: str) -> str:
    kind, _, rest = name.partition("/")
    return rest.rpartition("/")[2].partition(".")[0] if kind == "lm_eval" else kind


def retained(scores: Mapping[str, float], full: Mapping[str, float]) -> dict[str, float]:
    """Share of the full cache's quality that is left: 1 is all of it, above 1 is better than it.

    shared / full where more is better, full / shared for perplexities and the like. Scores of one
    side only, distances to the full cache (``kl``, ``cosine``) and zeros have no ratio.
    """
    ratios = {}
    for name, score in scores.items():
        if name not in full or _metric(name) in _NO_RATIO:
            continue
        top, bottom = (score, full[name]) if higher_is_better(name) else (full[name], score)
        if bottom > 0:
            ratios[name] = top / bottom
    return ratios


@torch.no_grad()
def window_losses(model: Any, windows: torch.Tensor, batch_size: int = 8) -> list[float]:
    """Mean negative log-likelihood over the predicted tokens of every window, nats.

    windows: token ids ``(num_windows, window_tokens)``; the first token of each is not predicted.
    A plain forward pass without a cache; summed in float64.
    """
    losses: list[float] = []
    for batch in windows.split(batch_size):
        batch = batch.to(model.device)
        logits = model(input_ids=batch, use_cache=False).logits
        for row, tokens in zip(logits, batch, strict=True):  # one float32 copy at a time
            lost = functional.cross_entropy(
                row[:-1].float(), tokens[1:].to(row.device), reduction="none"
            )
            losses.append(lost.double().mean().item())
    return losses


def perplexity_of(losses: Sequence[float]) -> float:
    """exp of the mean of `window_losses`.

    Raises:
        RuntimeError: not a finite number.
    """
    return _finite("perplexity", math.exp(fmean(losses)))


def perplexity(model: Any, windows: torch.Tensor, batch_size: int = 8) -> float:
    """`perplexity_of` the `window_losses`: all windows are of one length."""
    return perplexity_of(window_losses(model, windows, batch_size))
