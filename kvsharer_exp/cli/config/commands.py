"""The groups of single commands, such as ``bench`` and ``export``, and the group ``tracking``.

`Config` holds the groups. Each command reads its own, and ``tracking`` says where results go.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from kvsharer_exp.cli.config.names import check_file_name
from kvsharer_exp.cli.config.passwords import refuse_password
from kvsharer_exp.cli.config.text_keys import PATH, VERBATIM
from kvsharer_exp.values.errors import InputError, at_least


@dataclass
class TrackingConfig:
    """Where MLflow and the studies write.

    Args:
        uri: the MLflow store, or the address of an MLflow server, without a password. Default: a
            SQLite file in ``folder``.
        experiment: the MLflow experiment, without a slash in a local store, where it names a
            folder. Default: ``kvsharer_exp``.
        folder: the folder of the studies, and of a local store with its artifacts. Default:
            ``mlruns``.
    """

    uri: str = field(default="sqlite:///${tracking.folder}/mlflow.db", metadata=PATH)
    experiment: str = "kvsharer_exp"
    folder: str = field(default="mlruns", metadata=PATH)

    def __post_init__(self) -> None:
        refuse_password("tracking.uri", self.uri)
        if self.uri.startswith("sqlite:///"):
            check_file_name("tracking.experiment", self.experiment)

    @property
    def artifacts(self) -> str:
        """The folder for the artifacts of a local store."""
        return str(Path(self.folder) / "artifacts")


@dataclass
class BenchConfig:
    """What ``bench`` measures: one cell for each batch size and context.

    With ``engine=vllm`` at least 2 ``new_tokens`` and ``repeats`` are needed.

    Args:
        batch_sizes: numbers of sequences, each at least 1; with ``engine=vllm`` loads: requests
            that are sent at once. Default: 1.
        contexts: tokens of each sequence before the decode, at least 1. Default: 256 and 1024.
        new_tokens: decode steps, at least 1. Default: 32.
        repeats: rounds of each cell, of which the median is taken, at least 1. Default: 3.
        memory_gib: GiB for weights and cache, above 0. Default: 24. Only ``bench`` without
            ``map=`` uses it: it calculates the largest batch that fits.
    """

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
    """What ``ablate`` compares: every arm under every combination of the settings that vary.

    Differences are to the first arm of the first combination. The lists of settings are empty by
    default; the value of an empty list is that of its key elsewhere.

    Args:
        name: the name of the ablation in titles and reports. Default: ``ablation``.
        arms: ways to choose a map: (dissimilar|similar|random)_(tested|untested),
            ``trailing_layers``, ``adjacent_pairs`` and ``given`` (``map=`` names a map, or the run
            of a finished sweep). ``read`` is the map of least block error; ``drop``, ``constant``,
            ``affine``, ``quantised``, ``windowed``, ``snapkv``, ``h2o`` and ``joint`` are KV plans
            that keep at most its bytes. ``map_h2o`` and ``map_pyramid`` keep 80 % of a prompt's
            tokens in the owners of the map of ``dissimilar_tested``, and ``h2o_alone`` and
            ``pyramid_alone`` in every layer. Default: the six of the first form.
        draws: how often a random arm is drawn, at least 1. Default: 5.
        max_candidates: how many maps a tested arm may evaluate at most, at least 1. Default: 80.
            null: as many as the ranking has pairs.
        thresholds: values of ``search.threshold``.
        distances: values of ``calibration.distance``.
        states: values of ``calibration.states``.
        calibration_paths: values of ``calibration.path``.
        calibration_sizes: values of ``calibration.num_windows``.
        contexts: values of ``footprint.context``.
        tasks: whether the report tasks are scored too. Default: false.
        every_pair: whether pairs are also scored each on its own, at most ``max_candidates`` of
            them. Default: false.
        lengths: pairs [prompt tokens, new tokens], each number at least 1. The maps of the first
            arm are timed at these lengths and ``bench.batch_sizes``. Default: none.
        confidence: that of the intervals, in (0, 1). Default: 0.95.
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
    calibration_paths: list[str] = field(default_factory=list, metadata=PATH)
    calibration_sizes: list[int] = field(default_factory=list)
    contexts: list[int] = field(default_factory=list)
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
    """Where ``export`` writes a map.

    Args:
        path: the folder. Default: ``export/`` in the run folder.
        overwrite: whether an earlier export there is replaced; any other folder with files never
            is. Default: false.
    """

    path: str | None = field(default=None, metadata=PATH)
    overwrite: bool = False


@dataclass
class GenerateConfig:
    """What ``generate`` answers; the answers are greedy.

    Args:
        prompt: one prompt. Default: none; give either this or ``file``.
        file: a file with one prompt a line. Default: none.
        max_new_tokens: the most tokens of an answer, at least 1. Default: 64.
        chat: whether a prompt is put into the tokenizer's chat template as the turn of a user.
            Default: false, which takes the text as it is.
    """

    prompt: str | None = field(default=None, metadata=VERBATIM)
    file: str | None = field(default=None, metadata=PATH)
    max_new_tokens: int = 64
    chat: bool = False

    def __post_init__(self) -> None:
        at_least("generate.max_new_tokens", self.max_new_tokens, 1)
        if self.prompt is not None and self.file is not None:
            raise InputError("generate.prompt and generate.file exclude each other: give one")


@dataclass
class ReproduceConfig:
    """When ``reproduce`` counts a value as the same.

    Args:
        tolerance: the largest relative difference of two numbers that match, in [0, 1).
            Default: 1e-6. 0 asks for the last digit. Maps, counts and words must be the same.
    """

    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 1:
            raise InputError(f"reproduce.tolerance={self.tolerance:g}: give a number in [0, 1)")


@dataclass
class UiConfig:
    """Where ``ui`` serves the MLflow UI.

    Args:
        port: the port on this machine, from 1 to 65535. Default: 5000.
    """

    port: int = 5000

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise InputError(f"ui.port={self.port}: give a port in 1..65535")
