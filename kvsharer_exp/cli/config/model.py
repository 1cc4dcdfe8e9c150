"""Which weights a command loads."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

DEFAULT_MODEL = "smollm2"


@dataclass
class ModelConfig:
    """Which weights, and how they are held; see `kvsharer_exp.model.spec.ModelSpec`."""

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
