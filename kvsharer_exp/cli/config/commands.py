"""Options of single commands, and where results go."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from kvsharer_exp.values.errors import InputError, at_least


@dataclass
class TrackingConfig:
    """Where MLflow and the studies write."""

    uri: str = "sqlite:///mlruns/mlflow.db"
    experiment: str = "kvsharer_exp"
    folder: str = "mlruns"

    @property
    def artifacts(self) -> str:
        """The folder of a local store's artifacts."""
        return str(Path(self.folder) / "artifacts")


@dataclass
class BenchConfig:
    """``bench``: cells of batch × context, decode steps and repeats of each; ``memory_gib`` is what
    weights and cache may take in the calculator (no ``map=``)."""

    batch_sizes: list[int] = field(default_factory=lambda: [1])
    contexts: list[int] = field(default_factory=lambda: [256, 1024])
    new_tokens: int = 32
    repeats: int = 3
    memory_gib: float = 24.0

    def __post_init__(self) -> None:
        for key in ("batch_sizes", "contexts"):
            values = getattr(self, key)
            if not values:
                raise InputError(f"bench.{key} is empty: give at least one number, like [1]")
            for value in values:
                at_least(f"bench.{key}", value, 1)
        at_least("bench.new_tokens", self.new_tokens, 1)
        at_least("bench.repeats", self.repeats, 1)
        if self.memory_gib <= 0:
            raise InputError(f"bench.memory_gib={self.memory_gib:g}: give GiB above 0")


@dataclass
class AblateConfig:
    """``ablate``: which arms, and what varies (every combination; an empty list: the value set
    elsewhere). Differences are to the first arm of the first combination.

    ``arms``: (dissimilar|similar|random)_(tested|untested), trailing_layers, adjacent_pairs, given
    (``map=``: a map, or a finished sweep's run). ``max_candidates``: evaluations of each tested arm
    (null: all pairs). ``tasks``: score the report tasks too. ``every_pair``: each pair alone.
    ``lengths``: [prompt, new] tokens to time at ``bench.batch_sizes``.
    """

    name: str = "ablation"
    arms: list[str] = field(
        default_factory=lambda: [
            f"{order}_{test}"
            for test in ("tested", "untested")
            for order in ("dissimilar", "similar", "random")
        ]
    )
    draws: int = 5
    max_candidates: int | None = 80
    thresholds: list[float] = field(default_factory=list)
    distances: list[str] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    calibration_paths: list[str] = field(default_factory=list)
    calibration_sizes: list[int] = field(default_factory=list)
    tasks: bool = False
    every_pair: bool = False
    lengths: list[list[int]] = field(default_factory=list)
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if not self.arms:
            raise InputError("ablate.arms is empty: give at least one, like [dissimilar_tested]")
        at_least("ablate.draws", self.draws, 1)
        if self.max_candidates is not None:
            at_least("ablate.max_candidates", self.max_candidates, 1)
        for pair in self.lengths:
            if len(pair) != 2 or min(pair) < 1:
                raise InputError(
                    f"ablate.lengths={pair}: give [prompt tokens, new tokens], like [512, 32]"
                )
        if not 0 < self.confidence < 1:
            raise InputError(f"ablate.confidence={self.confidence:g}: give a number in (0, 1)")


@dataclass
class ExportConfig:
    """Where a map is written (default: ``export/`` in the run folder); ``overwrite`` replaces an
    earlier export there, never another folder."""

    path: str | None = None
    overwrite: bool = False


@dataclass
class GenerateConfig:
    """``generate``: one prompt, or a file with one a line; greedy. ``chat``: as a user's turn in
    the tokenizer's chat template, else the text as it is."""

    prompt: str | None = None
    file: str | None = None
    max_new_tokens: int = 64
    chat: bool = False

    def __post_init__(self) -> None:
        at_least("generate.max_new_tokens", self.max_new_tokens, 1)
        if self.prompt is not None and self.file is not None:
            raise InputError("generate.prompt and generate.file exclude each other: give one")


@dataclass
class ReproduceConfig:
    """``tolerance``: how far a number may be off, relative to the recorded one, and still match
    (0: to the last digit). Maps, counts and words must be the same."""

    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 1:
            raise InputError(f"reproduce.tolerance={self.tolerance:g}: give a number in [0, 1)")


@dataclass
class UiConfig:
    port: int = 5000

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise InputError(f"ui.port={self.port}: give a port in 1..65535")
