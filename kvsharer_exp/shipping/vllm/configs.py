"""The configuration classes under which vLLM reads exports, one for each family.

Each is that of transformers with an export's model type, so that no code from the folder is run.
They stand in this module by name, because vLLM sends configurations between its processes.
"""

from __future__ import annotations

import transformers

from kvsharer_exp.shipping.exported_config import TYPE_PREFIX, OwnNames
from kvsharer_exp.values.vllm_support import FAMILIES, Family


def _own_config(family: Family) -> type:
    stock = getattr(transformers, family.config)
    held = {"model_type": TYPE_PREFIX + family.model_type, "__module__": __name__}
    return type(f"KVShared{family.config}", (OwnNames, stock), held)


CONFIGS: tuple[type, ...] = tuple(map(_own_config, FAMILIES.values()))
globals().update({config.__name__: config for config in CONFIGS})
