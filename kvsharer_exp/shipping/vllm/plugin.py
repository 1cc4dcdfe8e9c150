"""The vLLM plugin: teaches vLLM to load and run what ``kvsharer export`` writes.

vLLM calls `register` in each of its processes, by the entry point ``kvsharer_exp`` of the group
``vllm.general_plugins``. Models are imported only when one of them is loaded.
"""

from __future__ import annotations

from kvsharer_exp.shipping.exported_config import own_architecture
from kvsharer_exp.values.vllm_support import FAMILIES

_MODELS = "kvsharer_exp.shipping.vllm.models"


def register() -> None:
    """Register the architectures and model types of exports; a second call changes nothing."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from kvsharer_exp.shipping.vllm.configs import CONFIGS

    for config in CONFIGS:
        AutoConfig.register(config.model_type, config, exist_ok=True)  # type: ignore[attr-defined]
    for stock in FAMILIES:
        name = own_architecture(stock)
        ModelRegistry.register_model(name, f"{_MODELS}:{name}")
