"""What the search optimises and what the report measures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kvsharer_exp.values.errors import InputError, at_least


@dataclass
class TasksConfig:
    """lm-eval tasks (ours by name, any of lm-eval's, or a task YAML); ``limit``: items of each."""

    tasks: list[str] = field(default_factory=list)
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None:
            at_least("scoring limit", self.limit, 1)


@dataclass
class ScoringConfig:
    """What the search optimises and what the report measures; the two may not overlap, except
    for tasks named in ``allow_overlap``. ``fitness``: kl, cosine, perplexity or lm_eval, or several
    with weights, like ``{kl: 1, lm_eval: 0.5}``. Its windows are longer than the calibration's:
    short ones favour maps that fail further on. ``maps_per_forward``: how many maps go through the
    first stage at once; more pay where one leaves the device idle, not on a CPU."""

    fitness: Any = "kl"
    num_windows: int = 24
    window_tokens: int = 256
    batch_size: int = 8
    maps_per_forward: int = 1
    memory_budget_gib: float = 4.0
    search: TasksConfig = field(default_factory=TasksConfig)
    report: TasksConfig = field(default_factory=TasksConfig)
    allow_overlap: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0:
                raise InputError(f"scoring.fitness={{{name}: {weight}}}: give a weight above 0")
        if not self.weights:
            raise InputError("scoring.fitness is empty: give kl, or weights like {kl: 1}")
        at_least("scoring.num_windows", self.num_windows, 1)
        at_least("scoring.window_tokens", self.window_tokens, 2)
        at_least("scoring.batch_size", self.batch_size, 1)
        at_least("scoring.maps_per_forward", self.maps_per_forward, 1)
        if self.memory_budget_gib < 0:
            raise InputError("scoring.memory_budget_gib is negative: give GiB, 0 keeps nothing")
        if "lm_eval" in self.weights and not self.search.tasks:
            raise InputError(
                "scoring.fitness=lm_eval needs tasks: name some in scoring.search.tasks"
            )

    @property
    def memory_budget(self) -> int:
        """Bytes that an evaluator may keep."""
        return int(self.memory_budget_gib * 2**30)

    @property
    def weights(self) -> dict[str, Any]:
        """Every part of the fitness with its weight."""
        return dict(self.fitness) if isinstance(self.fitness, dict) else {str(self.fitness): 1}

    @property
    def fitness_label(self) -> str:
        """``kl``, or ``1·kl + 0.5·lm_eval``."""
        several = " + ".join(f"{weight:g}·{name}" for name, weight in self.weights.items())
        return several if isinstance(self.fitness, dict) else str(self.fitness)
