"""The configuration: what every key means, its range, and how Hydra's config becomes it.

Config objects stop at the commands; everything below takes plain typed arguments.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kvsharer_exp.errors import InputError, at_least, did_you_mean

DEFAULT_MODEL = "smollm2"


@dataclass
class ModelConfig:
    """Which weights, and how they are held; see `kvsharer_exp.models.ModelSpec`."""

    name: str = MISSING
    source: str = MISSING
    dtype: str = "float32"
    device: str = "auto"
    device_map: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    add_bos_token: bool | None = None
    attn_implementation: str | None = None
    seed: int = 0


@dataclass
class CalibrationConfig:
    """Windows for layer means and the acceptance test, as in the paper; ``scoring`` has those of
    the fitness, cut from the same text. ``path``: wikipedia, news,
    a .txt (one passage a line), a .jsonl with "text", or hub:<dataset>[/<config>][:<split>]."""

    path: str = "wikipedia"
    num_windows: int = 30
    window_tokens: int = 64
    distance: str = "euclidean_flat"
    states: str = "kv"

    def __post_init__(self) -> None:
        at_least("calibration.num_windows", self.num_windows, 1)
        at_least("calibration.window_tokens", self.window_tokens, 2)
        distances = ("euclidean_flat", "euclidean_token", "cosine", "cka", "block_output")
        _one_of("calibration.distance", self.distance, distances)
        _one_of("calibration.states", self.states, ("kv", "k", "v"))


@dataclass
class HeldoutConfig:
    """Text the search never sees (its report part) or sees only through search tasks."""

    path: str = "wikipedia"
    num_windows: int = 8
    window_tokens: int = 256

    def __post_init__(self) -> None:
        at_least("heldout.num_windows", self.num_windows, 1)
        at_least("heldout.window_tokens", self.window_tokens, 2)


@dataclass
class CompressionConfig:
    """Targets / layers; a ratio asks for round(ratio × num_layers) targets, halves up."""

    ratios: list[float] = field(default_factory=lambda: [0.125, 0.25, 0.375])

    def __post_init__(self) -> None:
        if not self.ratios:
            raise InputError("compression.ratios is empty: give at least one ratio, like [0.25]")
        for ratio in self.ratios:
            if not 0 < ratio < 1:
                raise InputError(f"compression.ratios={ratio:g}: give ratios between 0 and 1")


@dataclass
class SearchConfig:
    """The paper's greedy strategy: order of the pairs, acceptance test, its threshold T. A pair is
    decided on the first calibration windows where they leave no doubt, otherwise, or with
    ``all_windows``, on all of them."""

    order: str = "dissimilar"
    acceptance: bool = True
    threshold: float = 0.5
    all_windows: bool = False

    def __post_init__(self) -> None:
        _one_of("search.order", self.order, ("dissimilar", "similar", "random"))
        if not -1 <= self.threshold <= 1:
            raise InputError(f"search.threshold={self.threshold:g}: give a cosine in [-1, 1]")


@dataclass
class ComponentConfig:
    """A class by its registry name, with its options."""

    kind: str = MISSING
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class StudyConfig:
    """The Optuna study. ``n_trials`` counts distinct maps in the whole study, seeds and resumed
    ones included; ``minutes`` ends the search phase of this run instead. Two fifths of them go to
    the finals: the best maps of each size on up to ``final_windows`` further windows (null: as many
    as there is time for; without ``minutes`` none). ``patience``: so many maps
    in a row that add less than 0.1 % to the hypervolume end it earlier. ``storage``: an RDB URL or
    a journal file (default: a journal under ``tracking.folder``). ``seeds``: a file with maps to
    start from (a list of maps, or a front.json or result.json of a sweep). A map is scored on the
    first of the scoring windows before it is on all: where it looks beaten after so many as
    ``screen_windows`` lists, by more than ``margin`` (default: learned at each), it stops."""

    name: str | None = None
    n_trials: int = 55
    minutes: float | None = None
    final_windows: int | None = None
    storage: str | None = None
    fresh: bool = False
    patience: int | None = None
    seeds: str | None = None
    screen_windows: list[int] = field(default_factory=lambda: [2, 8])
    margin: float | None = None

    def __post_init__(self) -> None:
        at_least("study.n_trials", self.n_trials, 1)
        if any(a >= b for a, b in pairwise([0, *self.screen_windows])):
            raise InputError(
                f"study.screen_windows={list(self.screen_windows)}: give rising numbers of "
                "windows from 1 up, or [] to score every map on all"
            )
        if self.minutes is not None and self.minutes <= 0:
            raise InputError(f"study.minutes={self.minutes:g}: give minutes above 0, or leave out")
        if self.final_windows is not None:
            at_least("study.final_windows", self.final_windows, 0)
        if self.patience is not None:
            at_least("study.patience", self.patience, 1)
        if self.margin is not None and self.margin < 0:
            raise InputError(f"study.margin={self.margin:g}: give at least 0")
        if self.name is not None and (not self.name or "/" in self.name):
            raise InputError(f"study.name={self.name!r}: give a name without a slash")


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
    def weights(self) -> dict[str, Any]:
        """Every part of the fitness with its weight."""
        return dict(self.fitness) if isinstance(self.fitness, dict) else {str(self.fitness): 1}

    @property
    def fitness_label(self) -> str:
        """``kl``, or ``1·kl + 0.5·lm_eval``."""
        several = " + ".join(f"{weight:g}·{name}" for name, weight in self.weights.items())
        return several if isinstance(self.fitness, dict) else str(self.fitness)


@dataclass
class TrackingConfig:
    """Where MLflow and the studies write."""

    uri: str = "sqlite:///mlruns/mlflow.db"
    experiment: str = "kvsharer_exp"
    folder: str = "mlruns"


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


@dataclass
class Config:
    """Everything a command can be told."""

    command: str = ""
    seed: int = 0
    debug: bool = False
    quiet: bool = False  # the same as --quiet
    map: Any = None  # text, list, path to a .json, or MLflow run id
    run: Any = None  # report, reproduce: MLflow run ids or run folders, one or a list
    model: ModelConfig = field(default_factory=ModelConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    heldout: HeldoutConfig = field(default_factory=HeldoutConfig)
    compression: CompressionConfig = field(default_factory=CompressionConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    search_space: ComponentConfig = field(default_factory=ComponentConfig)
    sampler: ComponentConfig = field(default_factory=ComponentConfig)
    study: StudyConfig = field(default_factory=StudyConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    ui: UiConfig = field(default_factory=UiConfig)
    ablate: AblateConfig = field(default_factory=AblateConfig)
    reproduce: ReproduceConfig = field(default_factory=ReproduceConfig)

    def __post_init__(self) -> None:
        at_least("seed", self.seed, 0)


def register(search_spaces: Path) -> None:
    """Put the schema and every file of ``search_spaces/`` in Hydra's store."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for path in sorted(search_spaces.glob("*.yaml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        store.store(group="search_space", name=path.stem, node=content, provider=str(path))


def to_config(composed: DictConfig) -> Config:
    """Hydra's composed config as a checked `Config`.

    Raises:
        InputError: an unknown key (also one added with ``+``), a wrong type, a value out of range.
    """
    try:
        plain = OmegaConf.to_container(composed, resolve=True)
        merged = OmegaConf.merge(OmegaConf.structured(Config), plain)
        for key, number in _floats(OmegaConf.to_container(merged)):
            if not math.isfinite(number):
                raise InputError(f"{key}={number}: give a finite number")
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise InputError(explain(error)) from error


def _floats(node: Any, key: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(node, float):
        yield key, node
    elif isinstance(node, dict):
        for name, inner in node.items():
            yield from _floats(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for inner in node:
            yield from _floats(inner, key)


def explain(error: OmegaConfBaseException) -> str:
    """OmegaConf's message as one line that names the key and the way out."""
    first = str(error).strip().splitlines()[0]
    key = getattr(error, "full_key", None) or ""
    if "not in" in first and ".options." in key:
        return f"{key} is not in the file of this {key.partition('.')[0]}: give it as +{key}=…"
    if "not in" in first and key:
        near = difflib.get_close_matches(key, config_keys(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "kvsharer --help lists the keys"
        return f"{key} is not a key of the configuration: {hint}"
    value = re.search("(?<=Value ').*?(?=')", first)
    for sign, way in _WAYS.items():
        if sign in first:
            return f"{key}={value.group()}: {way}" if value else f"{key}: {way}"
    return f"{key}: {first}, see --help" if key else f"{first}, see --help"


# What OmegaConf says of a value → what to give instead.
_WAYS = {
    "to Integer": "give a whole number",
    "to Float": "give a number",
    "valid bool": "give true or false",
    "not Optional": "give a value, not null",
    "not a ListConfig": "give a list, like [a,b]",
    "not a subclass": "give its keys, see --help",
}


def config_keys() -> list[str]:
    """Every key of the configuration, dotted, groups included."""
    return _keys(OmegaConf.structured(Config))


def _keys(node: DictConfig, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name in node:
        keys.append(prefix + str(name))
        child = node._get_node(name)
        if isinstance(child, DictConfig) and not child._is_none():
            keys += _keys(child, prefix + str(name) + ".")
    return keys


def _one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{key}={value} is unknown: {did_you_mean(value, choices)}")
