"""What an export's plan means in vLLM, and what is refused; nothing here needs vLLM."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from kvsharer_exp.shipping.exported_config import REFUSAL, TYPE_PREFIX, own_architecture
from kvsharer_exp.shipping.vllm.configs import CONFIGS
from kvsharer_exp.shipping.vllm.translate import engine_plan, nearest_plan
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.vllm_support import FAMILIES, cannot
from tests.shipping.exports import export, export_plan, theirs
from tests.tiny import ARCHITECTURES

LLAMA = {"architectures": ["KVSharedLlamaForCausalLM"]}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.model_type)
def test_the_table_names_what_transformers_has(family) -> None:
    config = getattr(transformers, family.config)
    assert config.model_type == family.model_type
    assert hasattr(transformers, family.architecture)
    assert family.model_type in ARCHITECTURES  # so it passes the contract of running under plans
    (own,) = (c for c in CONFIGS if c.model_type == TYPE_PREFIX + family.model_type)
    held = own(architectures=[family.architecture])
    assert isinstance(held, config)
    assert held.model_type == family.model_type  # what vLLM and transformers look up by
    assert held.to_dict()["model_type"] == TYPE_PREFIX + family.model_type
    assert held.to_dict()["architectures"] == [own_architecture(family.architecture)]


def test_an_exports_own_configuration_is_read(tokenizer, tmp_path: Path) -> None:
    folder = export_plan("llama", "stand-ins", tokenizer, tmp_path / "export")
    config = json.loads((folder / "config.json").read_text())
    assert str(engine_plan(config)) == config["kv_plan"]
    config = json.loads((export("llama", tokenizer, tmp_path / "map") / "config.json").read_text())
    assert engine_plan(config).sharing_map is not None


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({**LLAMA, "kv_plan": "0_1q4_1_x"}, "layer 1 cannot keep 4 bits .* or 0_1_1_x"),
        ({**LLAMA, "kv_plan": "0_1_0k1v"}, "layer 2 cannot do read_kv .* or 0_1_0"),
        ({**LLAMA, "kv_plan": "0_1k0v_2"}, "layer 1 cannot do read_kv .* or 0_1_2"),
        (LLAMA, "neither kv_source_layers nor kv_plan: give"),
        ({"architectures": ["LlamaForCausalLM"], "kv_plan": "0_x"}, "earlier version.*again"),
        ({"architectures": ["KVSharedOlmo2ForCausalLM"], "kv_plan": "0_x"}, "Olmo2.*use"),
        ({"kv_source_layers": [0, 0]}, "earlier version"),
    ],
)
def test_what_vllm_cannot_do_is_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        engine_plan(config)


def test_the_nearest_plan_runs_and_is_the_plan_where_that_runs() -> None:
    for text in ("0_1q4s4_1_x", "0_1_0k1v_a", "0_1_2k0v", "0q2_1q2"):
        plan = nearest_plan(KVPlan.parse(text))
        assert not any(map(cannot, plan.actions))
        assert nearest_plan(plan) == plan


def test_stock_transformers_refuses_the_folder(tokenizer, tmp_path: Path) -> None:
    folder = export("llama", tokenizer, tmp_path / "export")
    with pytest.raises(ValueError, match="custom code"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    held = json.loads((folder / "config.json").read_text())
    del held["auto_map"]
    (folder / "config.json").write_text(json.dumps(held))
    with pytest.raises(ValueError, match="kvsharer_exp_llama"):  # as any other reader of the names
        AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize("plan", ["", "stand-ins"])
def test_an_engine_that_brings_its_own_attention_is_refused(tokenizer, tmp_path, plan: str) -> None:
    folder = tmp_path / "export"
    if plan:
        export_plan("llama", plan, tokenizer, folder)
    else:
        export("llama", tokenizer, folder)
    with pytest.raises(ValueError, match="kvsharer_exp") as refused:
        type(theirs(folder)).is_backend_compatible()
    assert str(refused.value) == REFUSAL
