"""All groups as one configuration, and its keys."""

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
from kvsharer_exp.cli.config.model import ModelConfig
from kvsharer_exp.cli.config.scoring import ScoringConfig
from kvsharer_exp.cli.config.search import (
    ComponentConfig,
    CompressionConfig,
    SearchConfig,
    StudyConfig,
)
from kvsharer_exp.cli.config.texts import CalibrationConfig, HeldoutConfig
from kvsharer_exp.values.errors import at_least

FINALS_SHARE = 0.4  # of study.minutes


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

    @property
    def holds_finals(self) -> bool:
        """Whether a sweep ends with finals: windows are asked for, and the search goes by what the
        finals measure."""
        wanted = self.study.final_windows
        some = self.study.minutes is not None if wanted is None else wanted > 0
        return some and self.scoring.weights.keys() <= {"kl", "perplexity"}

    @property
    def search_minutes(self) -> float | None:
        """What ``study.minutes`` leaves for the search beside the finals; None: no limit."""
        minutes = self.study.minutes
        if minutes is None or not self.holds_finals:
            return minutes
        return (1 - FINALS_SHARE) * minutes


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
