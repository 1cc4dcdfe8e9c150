"""The configuration of a model that ``kvsharer export`` wrote, under names of its own.

The file config.json of an export names the model type ``kvsharer_exp_llama`` and the architecture
``KVSharedLlamaForCausalLM``, not those of the stock model. A program that does not know the plan
then refuses the folder, instead of loading weights that are not all there and answering nonsense.

``kvsharer export`` writes this file beside the weights, with the model's own class in the line
marked below. Once loaded, the configuration has the stock model type: transformers looks up by it
how weights are renamed, and other things. It is saved under its own names again.
"""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import LlamaConfig as StockConfig  # the class of this model's configuration

TYPE_PREFIX, ARCHITECTURE_PREFIX = "kvsharer_exp_", "KVShared"

REFUSAL = (
    "an engine's own attention and cache would ignore the KV plan of this model: "
    "in vLLM, use the plugin of kvsharer_exp (pip install kvsharer_exp)"
)
"""What an engine is told that would run the model by a general back end."""


def own_architecture(stock: str) -> str:
    """The name of the architecture ``stock`` in exports; one that is such a name stays."""
    return stock if stock.startswith(ARCHITECTURE_PREFIX) else ARCHITECTURE_PREFIX + stock


class OwnNames:
    """Mixed into a configuration class of transformers whose ``model_type`` has the prefix."""

    model_type: ClassVar[str]

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self.__dict__["model_type"] = type(self).model_type.removeprefix(TYPE_PREFIX)

    def to_dict(self) -> dict[str, Any]:
        """As transformers writes it, with the architecture's own name."""
        held = super().to_dict()  # type: ignore[misc]
        held["architectures"] = [own_architecture(name) for name in held["architectures"] or ()]
        return held


class KVSharedConfig(OwnNames, StockConfig):
    """The stock configuration, saved under the names of an export."""

    model_type = TYPE_PREFIX + StockConfig.model_type
