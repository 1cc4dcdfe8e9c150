"""A folder whose plan or weights are broken is refused in one line."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from kvsharer_exp import load_exported
from kvsharer_exp.shipping.export import write_export
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.plan import KVPlan
from tests.shipping.exports import export_plan
from tests.tiny import tiny_model


def refused(folder: Path, match: str) -> None:
    with pytest.raises(InputError, match=match) as error:
        load_exported(folder)
    assert len(str(error.value)) <= 190 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"kv_plan": "0_x_zebra_3_4_5"}, "layer 2 has 'zebra', which is no action"),
        ({"kv_plan": 5}, "5 is no text: give one like 0_1q4_0_x"),
        ({"kv_plan": "[1, 2"}, "is no text: give one like"),
        ({"kv_plan": "/etc/maps.json"}, "is no text: give one like"),
        ({"kv_plan": "0_1q5_2_3_4_5"}, "5 bits: give one of"),
        ({"kv_plan": "x_x"}, "no layer of the plan owns"),
        ({"kv_plan": "0_1q8_0"}, "plan has 3 layers but the model has 6"),
        ({"kv_plan": "0_1_2_a_4_5"}, "is not whole: it lacks model.layers.3.self_attn.weight"),
        ({"kv_plan": "c_1q4g8s4_x_1_4k4v_1k1v"}, "is not whole: it has besides"),
        ({"kv_plan": "a_1q4g8s4_2_1_4_1"}, "is not whole: it lacks model.layers.2"),
        ({"kv_source_layers": [0, 1, 0, 0, 0, 0]}, "has both kv_source_layers and kv_plan"),
        ({"kv_plan": None}, "has no kv_source_layers; use load_model"),
        ({"kv_plan_norms": {"0": "mlp_norm"}}, "mlp_norm of layer 0, which has no such part"),
        ({"kv_plan_norms": {"1": "mlp"}}, "the norm of layer 1, which has no stand-in"),
        ({"kv_plan_norms": {"first": "mlp"}}, "kv_plan"),
        ({"kv_plan_norms": [1]}, "give norms by layer"),
        ({"kv_plan_norms": {"0": "input_layernorm"}}, "is not whole"),
    ],
)
def test_a_broken_configuration_is_refused(changes, match: str, tokenizer, tmp_path) -> None:
    folder = export_plan("llama", "everything", tokenizer, tmp_path / "export")
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    refused(folder, match)


def test_a_configuration_that_is_no_json_is_refused(tokenizer, tmp_path: Path) -> None:
    folder = export_plan("llama", "everything", tokenizer, tmp_path / "export")
    for text in ("{", "[]", ""):
        (folder / "config.json").write_text(text)
        refused(folder, "is no JSON object")


def test_weights_that_do_not_fit_are_refused(tokenizer, tmp_path: Path) -> None:
    folder = export_plan("llama", "everything", tokenizer, tmp_path / "export")
    whole = load_file(folder / "model.safetensors")
    bias = "model.layers.0.self_attn.bias"
    query = "model.layers.3.self_attn.q_proj.weight"
    changes = {
        "lacks model.layers.0.self_attn.bias": {k: v for k, v in whole.items() if k != bias},
        "lacks model.layers.0": {**whole, bias: whole[bias][:-1].contiguous()},
        "lacks model.layers.3": {k: v for k, v in whole.items() if k != query},
        "has besides": {**whole, bias.replace(".0.", ".2."): whole[bias].clone()},
    }
    for match, weights in changes.items():
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        refused(folder, match)


def test_an_action_whose_code_cannot_be_copied_is_refused(tokenizer, tmp_path: Path) -> None:
    kind = type(KVPlan.full(1).actions[0])
    foreign = type("Foreign", (kind,), {"name": "foreign", "__slots__": ()})
    foreign.__module__ = "nowhere.to_be_found"
    plan = KVPlan((kind(), foreign(4), *[kind()] * 4))
    with pytest.raises(InputError, match=r"module nowhere\.to_be_found has no source"):
        write_export(tiny_model("llama"), tokenizer, plan, tmp_path / "export", card="")
    assert not (tmp_path / "export").exists()
