"""Which models and which actions run in vLLM: the one table that plugin, page and docs share.

It holds what the tests in ``tests/engine/`` prove, and nothing else. vLLM runs other models through
its transformers back end, where no plan can be honoured.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvsharer_exp.values.actions.affine import Affine
from kvsharer_exp.values.actions.base import Action
from kvsharer_exp.values.actions.constant import Constant
from kvsharer_exp.values.actions.drop import Drop
from kvsharer_exp.values.actions.own import Own
from kvsharer_exp.values.actions.read import Read

ACTIONS: tuple[type[Action], ...] = (Own, Read, Drop, Constant, Affine)
"""What a layer can do in vLLM; `Own` of all tokens in 16 bits only."""


@dataclass(frozen=True, slots=True)
class Family:
    """A model type of transformers, its architecture and configuration there, its class in vLLM.

    ``vllm`` is the module and the class in ``vllm.model_executor.models``.
    """

    model_type: str
    architecture: str
    config: str
    vllm: str


_FAMILIES = (
    Family("llama", "LlamaForCausalLM", "LlamaConfig", "llama:LlamaForCausalLM"),
    Family("mistral", "MistralForCausalLM", "MistralConfig", "mistral:MistralForCausalLM"),
    Family("qwen2", "Qwen2ForCausalLM", "Qwen2Config", "qwen2:Qwen2ForCausalLM"),
    Family("qwen3", "Qwen3ForCausalLM", "Qwen3Config", "qwen3:Qwen3ForCausalLM"),
    Family("gemma2", "Gemma2ForCausalLM", "Gemma2Config", "gemma2:Gemma2ForCausalLM"),
    Family("gemma3_text", "Gemma3ForCausalLM", "Gemma3TextConfig", "gemma3:Gemma3ForCausalLM"),
    Family("phi3", "Phi3ForCausalLM", "Phi3Config", "phi3:Phi3ForCausalLM"),
    Family("granite", "GraniteForCausalLM", "GraniteConfig", "granite:GraniteForCausalLM"),
    Family("glm4", "Glm4ForCausalLM", "Glm4Config", "glm4:Glm4ForCausalLM"),
    Family("cohere", "CohereForCausalLM", "CohereConfig", "commandr:CohereForCausalLM"),
    Family("stablelm", "StableLmForCausalLM", "StableLmConfig", "stablelm:StablelmForCausalLM"),
    Family("mixtral", "MixtralForCausalLM", "MixtralConfig", "mixtral:MixtralForCausalLM"),
    Family("qwen3_moe", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", "qwen3_moe:Qwen3MoeForCausalLM"),
)
FAMILIES = {family.architecture: family for family in _FAMILIES}
"""By architecture, as transformers names it."""


def cannot(action: Action) -> str:
    """Why vLLM cannot do ``action``, as the end of a sentence; empty if it can."""
    if isinstance(action, Own) and action.quantised:
        return f"cannot keep {action.bits} bits"
    if action.bounded:
        return "cannot let tokens go"
    if not isinstance(action, ACTIONS):
        return f"cannot do {action.name}"
    return ""
