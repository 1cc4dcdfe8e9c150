"""All groups of keys as one configuration.

`to_config` makes a `Config` from what Hydra composes, and every command is given one. The command
line lists the keys with `config_keys`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf

from kvsharer_exp.cli.config.commands import (
    AblateConfig,
    BenchConfig,
    ExportConfig,
    GenerateConfig,
    ReproduceConfig,
    TrackingConfig,
    UiConfig,
)
from kvsharer_exp.cli.config.engine import EngineConfig, ServeConfig
from kvsharer_exp.cli.config.executor import ExecutorConfig
from kvsharer_exp.cli.config.model import ModelConfig
from kvsharer_exp.cli.config.plans import FitConfig, FootprintConfig
from kvsharer_exp.cli.config.scoring import ScoringConfig
from kvsharer_exp.cli.config.search import (
    ComponentConfig,
    CompressionConfig,
    SearchConfig,
    StudyConfig,
)
from kvsharer_exp.cli.config.text_keys import PATH, PATHS
from kvsharer_exp.cli.config.texts import CalibrationConfig, HeldoutConfig
from kvsharer_exp.values.errors import InputError, at_least
from kvsharer_exp.values.text import shorten

FINALS_SHARE = 0.4  # the part of study.minutes that the finals have
_WITH_WORKERS = ("sweep", "reproduce", "doctor", "")
_WITH_RUN = ("plan", "report", "reproduce", "doctor", "")
_IN_ENGINE = ("evaluate", "bench", "serve", "doctor", "")


@dataclass
class Config:
    """Everything that a command can be told. The class of a group says what its keys mean."""

    command: str = ""
    seed: int = 0
    debug: bool = False
    quiet: bool = False  # true does what --quiet does
    # A map as text or list, the path of a .json, or an MLflow run id.
    map: Any = field(default=None, metadata=PATH)
    # A KV plan as text, the path of a .json, a folder with a plan, or an MLflow run id. A front has
    # several: FILE.json:0.25 or RUN_ID:0.25 is the best that keeps at most a quarter of the KV.
    plan: Any = field(default=None, metadata=PATH)
    # For plan, and for bench with engine=vllm: another plan, given as plan= is, to compare with.
    compare: Any = field(default=None, metadata=PATH)
    # For report, reproduce and plan: one or a list of MLflow run ids or run folders.
    run: Any = field(default=None, metadata=PATHS)
    model: ModelConfig = field(default_factory=ModelConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    heldout: HeldoutConfig = field(default_factory=HeldoutConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    footprint: FootprintConfig = field(default_factory=FootprintConfig)
    compression: CompressionConfig = field(default_factory=CompressionConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    search_space: ComponentConfig = field(default_factory=ComponentConfig)
    sampler: ComponentConfig = field(default_factory=ComponentConfig)
    study: StudyConfig = field(default_factory=StudyConfig)
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    ui: UiConfig = field(default_factory=UiConfig)
    ablate: AblateConfig = field(default_factory=AblateConfig)
    reproduce: ReproduceConfig = field(default_factory=ReproduceConfig)

    def __post_init__(self) -> None:
        at_least("seed", self.seed, 0)
        if self.run is not None and self.command not in _WITH_RUN:
            raise InputError(
                f"{self.command} knows no run={shorten(self.run, 60)}: give plan= to name the plan "
                "of a run, or run= to report, reproduce or plan"
            )
        if self.engine.name != "transformers" and self.command not in _IN_ENGINE:
            raise InputError(
                f"{self.command} knows no engine={self.engine.name}: give it to evaluate or bench"
            )

        if self.executor.name != "local" and self.command not in _WITH_WORKERS:
            raise InputError(
                f"{self.command} knows no executor={self.executor.name}: give it to sweep"
            )
        screens, windows = self.study.screen_windows, self.scoring.num_windows
        if screens != StudyConfig().screen_windows and max(screens, default=0) >= windows:
            raise InputError(
                f"study.screen_windows={list(screens)}: give numbers below scoring.num_windows="
                f"{windows}, or [] to score every map on all"
            )
        prompt = self.scoring.prompt_tokens
        for group, of in (("scoring", self.scoring), ("heldout", self.heldout)):
            if prompt is not None and of.window_tokens < prompt + 2:
                raise InputError(
                    f"{group}.window_tokens={of.window_tokens}: give at least {prompt + 2}, two "
                    f"more than scoring.prompt_tokens={prompt}"
                )
        if self.executor.name != "local" and self.scoring.maps_per_forward > 1:
            raise InputError(
                f"scoring.maps_per_forward={self.scoring.maps_per_forward}: a worker takes one "
                "plan at a time, leave it out or give executor=local"
            )

    @property
    def holds_finals(self) -> bool:
        """Whether a sweep ends with finals.

        It does if windows are asked for, and the fitness is of KL and perplexity only.
        """
        wanted = self.study.final_windows
        some = self.study.minutes is not None if wanted is None else wanted > 0
        return some and self.scoring.weights.keys() <= {"kl", "perplexity"}

    @property
    def search_minutes(self) -> float | None:
        """The part of ``study.minutes`` that the search may take; None if there is no limit."""
        minutes = self.study.minutes
        if minutes is None or not self.holds_finals:
            return minutes
        return (1 - FINALS_SHARE) * minutes


def config_keys() -> list[str]:
    """Every key of the configuration in its dotted form; groups are keys too."""
    return _keys(OmegaConf.structured(Config))


def _keys(node: DictConfig, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name in node:
        keys.append(prefix + str(name))
        child = node._get_node(name)
        if isinstance(child, DictConfig) and not child._is_none():
            keys += _keys(child, prefix + str(name) + ".")
    return keys
