"""The group ``scoring``: what the search optimises and what the report measures.

`Config` holds the group, and `Scorers` makes what scores a map from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kvsharer_exp.cli.config.text_keys import PATH
from kvsharer_exp.values.errors import InputError, at_least
from kvsharer_exp.values.text import shorten


@dataclass
class TasksConfig:
    """Some lm-eval tasks.

    Args:
        tasks: the name of one of our tasks or of lm-eval's, or the path of a task YAML, for each
            task. Default: no task; the files of ``conf/scoring/`` name some.
        limit: how many of the first items of each task are scored, at least 1. Default: all.
    """

    tasks: list[str] = field(default_factory=list, metadata=PATH)
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None:
            at_least("scoring limit", self.limit, 1)


@dataclass
class ScoringConfig:
    """What the search optimises and what the report measures; a task may not be in both.

    The windows of the fitness are longer than those of the calibration, because short windows
    favour maps that fail further on.

    Args:
        fitness: ``kl`` (the default), ``cosine``, ``perplexity``, ``lm_eval`` or another package's,
            or several with weights above 0, like ``{kl: 1, lm_eval: 0.5}``.
        num_windows: how many windows score a map, at least 1. Default: 24. If the calibration text
            has fewer, those it has are used.
        window_tokens: the tokens of each window, at least 2. Default: 256.
        prompt_tokens: how many first tokens of each scoring and held-out window are a prompt, at
            least 1. Only what the tokens after it predict is scored then, as a server would after a
            prefill. Default: none, all tokens are scored. ``scoring=long`` gives it.
        recall: whether the scoring windows ask, after their prompts, for facts that are planted in
            them, so that plans are chosen by what they can still look up. Default: false.
            ``scoring=recall`` is ``scoring=long`` with it. Needs ``prompt_tokens``.
        batch_size: how many windows of a map, or items of a task, go through the model at once, at
            least 1. Default: 8. It is halved whenever memory runs out.
        maps_per_forward: how many maps go through the first stage at once, at least 1. Default: 1.
            More of them pay if one map leaves the device idle, so not on a CPU. It is halved too.
        memory_budget_gib: GiB that evaluators may keep of states and probabilities, at least 0.
            Default: 4. 0 keeps nothing.
        search: the tasks that the search sees. ``lm_eval`` in the fitness needs at least one.
        report: the tasks that only the report sees.
        allow_overlap: names of tasks that may be in both. Default: none.
        task_metadata: what lm-eval hands to those of its tasks that make their texts themselves,
            like ``{max_seq_lengths: [4096, 8192]}`` to RULER. Default: none, the tokenizer only.
    """

    fitness: Any = "kl"
    num_windows: int = 24
    window_tokens: int = 256
    prompt_tokens: int | None = None
    recall: bool = False
    batch_size: int = 8
    maps_per_forward: int = 1
    memory_budget_gib: float = 4.0
    search: TasksConfig = field(default_factory=TasksConfig)
    report: TasksConfig = field(default_factory=TasksConfig)
    allow_overlap: list[str] = field(default_factory=list, metadata=PATH)
    task_metadata: Any = None

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0:
                raise InputError(f"scoring.fitness={{{name}: {weight}}}: give a weight above 0")
        if not self.weights:
            raise InputError("scoring.fitness is empty: give kl, or weights like {kl: 1}")
        at_least("scoring.num_windows", self.num_windows, 1)
        at_least("scoring.window_tokens", self.window_tokens, 2)
        if self.prompt_tokens is not None:
            at_least("scoring.prompt_tokens", self.prompt_tokens, 1)
        elif self.recall:
            raise InputError("scoring.recall=true plants facts in prompts: give scoring=recall")
        at_least("scoring.batch_size", self.batch_size, 1)
        at_least("scoring.maps_per_forward", self.maps_per_forward, 1)
        if self.memory_budget_gib < 0:
            raise InputError("scoring.memory_budget_gib is negative: give GiB, 0 keeps nothing")
        if "lm_eval" in self.weights and not self.search.tasks:
            raise InputError(
                "scoring.fitness=lm_eval needs tasks: name some in scoring.search.tasks"
            )

        if not isinstance(self.task_metadata, dict | None):
            raise InputError(
                f"scoring.task_metadata={shorten(self.task_metadata)} is no mapping: give one, "
                "like {max_seq_lengths: [8192]}"
            )

    @property
    def memory_budget(self) -> int:
        """The bytes that evaluators may keep."""
        return int(self.memory_budget_gib * 2**30)

    @property
    def weights(self) -> dict[str, Any]:
        """The weight of every part of the fitness, by its name."""
        return dict(self.fitness) if isinstance(self.fitness, dict) else {str(self.fitness): 1}

    @property
    def fitness_label(self) -> str:
        """The fitness in words: ``kl``, or ``1·kl + 0.5·lm_eval``."""
        several = " + ".join(f"{weight:g}·{name}" for name, weight in self.weights.items())
        return several if isinstance(self.fitness, dict) else str(self.fitness)
