"""A shipped plan is the plan that was scored: bit for bit, with this package and without it."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from kvsharer_exp import load_plan
from kvsharer_exp.model.fitted_plan import FittedPlan
from kvsharer_exp.model.footprint import footprint
from kvsharer_exp.model.sharing.architectures import attention_layers
from kvsharer_exp.model.sharing.cache import cache_bytes
from kvsharer_exp.model.sharing.runtime import apply_plan
from kvsharer_exp.shipping.export import check_destination, write_export
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.plan import KVPlan
from tests.model.actions.plans import PLANS, fitted
from tests.model.sharing.test_checkpointing import check_equal, checkpoint, gradients, loss
from tests.shipping.exports import WAYS, export_plan, ours, theirs
from tests.tiny import tiny_model, tokens

# Separate, sliding with a norm after the attention, fused in one group, transposed and fused.
NAMES = ("llama", "gemma3_text", "phi3", "gpt2")
CASES = [(name, plan) for name in NAMES for plan in PLANS]
# Runs where this package cannot be imported, as in test_export.py.
WITHOUT_US = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "kvsharer_exp":
            raise ImportError("this package is not here")
sys.meta_path.insert(0, Refuse())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
given = load_file("ids.safetensors")
options = {"attention_mask": given["mask"], "max_new_tokens": 6, "do_sample": False}
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, dtype="auto")
    assert not any(info.values()), info
    modules = type(model).__module__.rpartition(".")[0]
    cache_bytes = sys.modules[modules + ".kvplan_model_sharing_cache"].cache_bytes
    with torch.inference_mode():
        output = model(given["ids"], use_cache=True)
        plain = model(given["ids"], use_cache=False).logits
        said = model.generate(given["ids"], **options)
    held = torch.tensor(cache_bytes(output.past_key_values))
    save_file({"logits": output.logits.contiguous(), "plain": plain.contiguous(), "said": said,
        "held": held}, folder + "/../theirs.safetensors")
assert "kvsharer_exp" not in sys.modules
"""


def inputs() -> dict[str, torch.Tensor]:
    """Token ids, and the mask of a text with padding in front."""
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    return {"ids": ids, "mask": mask}


def run(model: PreTrainedModel) -> dict[str, Any]:
    given = inputs()
    with torch.inference_mode():
        output = model(given["ids"], use_cache=True)
        return {
            "logits": output.logits,
            "plain": model(given["ids"], use_cache=False).logits,
            "said": model.generate(
                given["ids"], attention_mask=given["mask"], max_new_tokens=6, do_sample=False
            ),
            "held": torch.tensor(cache_bytes(output.past_key_values)),
        }


def expected(name: str, plan: str) -> dict[str, Any]:
    model = tiny_model(name)
    with apply_plan(model, fitted(model, PLANS[plan])):
        return run(model)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(tokens(), use_cache=True).logits


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory) -> dict[tuple[str, str], Path]:
    """Every case exported, and all loaded in one process that lacks this package."""
    root = tmp_path_factory.mktemp("plans")
    save_file(inputs(), root / "ids.safetensors")
    found = {}
    for name, plan in CASES:
        path = root / f"{name} {plan}".replace(" ", "-") / "export"
        found[name, plan] = export_plan(name, plan, tokenizer, path)
    command = [sys.executable, "-I", "-c", WITHOUT_US, *map(str, found.values())]
    environment = {**os.environ, "HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return found


@pytest.mark.parametrize(("name", "plan"), CASES)
def test_both_ways_of_loading_give_what_the_plan_gave(name: str, plan: str, folders) -> None:
    folder, want = folders[name, plan], expected(name, plan)
    model = ours(folder)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    for key, value in run(model).items():
        assert torch.equal(value, want[key]), key
    for key, value in load_file(folder.parent / "theirs.safetensors").items():
        if name == "gpt2":  # keeps its weights transposed, files do not: another order of sums
            torch.testing.assert_close(value, want[key], rtol=0, atol=1e-12)
        else:
            assert torch.equal(value, want[key]), key


@pytest.mark.parametrize(("name", "plan"), CASES)
def test_an_export_is_a_plan_with_its_fits(name: str, plan: str, folders, tmp_path: Path) -> None:
    """The fits of an export could not be read from it, since they are among its weights."""
    folder, want = folders[name, plan], fitted(tiny_model(name), PLANS[plan])
    loaded = FittedPlan.of(load_plan(folder))
    assert loaded.plan == want.plan
    for layer, fit in want.fits.items():
        held = loaded.fits[layer]
        assert held.norm == fit.norm
        for part, tensor in held.tensors.items():
            assert torch.equal(tensor, fit.tensors[part].to(tensor.dtype))
    if want.fits:
        shutil.copytree(folder, tmp_path / "copy")
        weights = load_file(folder / "model.safetensors")
        place = next(iter(json.loads((folder / "fits.json").read_text())["names"].values()))
        for changed in ({**weights, place: weights[place] + 1}, {"other": weights[place]}):
            save_file(changed, tmp_path / "copy" / "model.safetensors")
            with pytest.raises(InputError, match="are damaged"):
                load_plan(tmp_path / "copy")


@pytest.mark.parametrize(("name", "plan"), CASES)
def test_the_weights_are_as_many_as_footprint_promises(name: str, plan: str, folders) -> None:
    model = tiny_model(name)
    wanted = fitted(model, PLANS[plan])
    saved = footprint(model, wanted.plan).parameter_bytes_saved
    saved += sum(
        p.nbytes
        for layer in attention_layers(model)
        if layer.index in wanted.fits and wanted.fits[layer.index].norm
        for p in layer.block.get_submodule(wanted.fits[layer.index].norm).parameters()
    )
    weights = load_file(folders[name, plan] / "model.safetensors")
    whole = sum(p.nbytes for p in model.parameters())
    assert sum(t.nbytes for t in weights.values()) == whole - saved
    at = {layer.index: layer.attention for layer in attention_layers(model)}
    names = {id(module): place for place, module in model.named_modules()}
    for layer, fit in wanted.fits.items():
        held = {key for key in weights if key.startswith(names[id(at[layer])] + ".")}
        parts = ("weight", "bias") if wanted.plan.texts[layer] == "a" else ("bias",)
        assert held == {f"{names[id(at[layer])]}.{part}" for part in parts}, fit


@pytest.mark.parametrize(
    ("plan", "order"),
    [
        ("everything", ("theirs", "theirs", "ours")),
        ("halves of quantised", ("ours", "ours", "theirs")),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_rounds(name, plan, order, folders, tokenizer, tmp_path: Path) -> None:
    folder, want = folders[name, plan], expected(name, plan)["logits"]
    first = json.loads((folder / "config.json").read_text())
    for number, way in enumerate(order):
        model, folder = WAYS[way](folder), tmp_path / f"copy{number}"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        torch.testing.assert_close(logits(ours(folder)), want, rtol=0, atol=1e-12)
        config = json.loads((folder / "config.json").read_text())
        for key in ("kv_plan", "kv_plan_norms", "architectures"):
            assert config[key] == first[key], key
    for way in WAYS.values():
        torch.testing.assert_close(logits(way(folder)), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_every_bit_in_the_dtypes_of_real_models(name, dtype, tokenizer, tmp_path: Path) -> None:
    tiny = tiny_model(name)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(tiny.config), dtype=dtype).eval()
    model.load_state_dict(tiny.state_dict())  # `to` would change its buffers too
    plan = fitted(tiny, PLANS["everything"])
    with apply_plan(model, plan):
        want = logits(model)
    write_export(model, tokenizer, plan, tmp_path / "export", card="")
    for way in WAYS.values():
        loaded = way(tmp_path / "export")
        assert loaded.dtype == dtype
        assert torch.equal(logits(loaded), want)


def test_what_is_in_the_folder(folders, tokenizer) -> None:
    folder = folders["gemma3_text", "everything"]
    names = {path.name for path in folder.iterdir()}
    assert {
        *("config.json", "generation_config.json", "model.safetensors", "README.md"),
        *("modeling_kv_plan.py", "kv_plan.json", "tokenizer.json", "tokenizer_config.json"),
    } <= names
    assert not {"sharing_map.json", "modeling_kv_shared.py"} & names
    config = json.loads((folder / "config.json").read_text())
    assert config["kv_plan"] == str(KVPlan.parse(PLANS["everything"]))
    assert config["architectures"] == ["KVSharedGemma3ForCausalLM"]
    assert config["model_type"] == "kvsharer_exp_gemma3_text"
    assert not {"kv_source_layers", "kv_sharing"} & config.keys()
    assert str(KVPlan.from_json((folder / "kv_plan.json").read_text())) == config["kv_plan"]
    norms = json.loads((folders["gemma3_text", "stand-ins"] / "config.json").read_text())
    assert norms["kv_plan_norms"] == dict.fromkeys("135", "post_attention_layernorm")


def test_a_plan_that_is_a_map_ships_as_the_map(tokenizer, tmp_path: Path) -> None:
    plan = KVPlan.parse("0_1_0_3_0_1")
    for number, given in enumerate((plan.sharing_map, plan, FittedPlan(plan))):
        model = copy.deepcopy(tiny_model("llama"))
        write_export(model, tokenizer, given, tmp_path / str(number), card="")
    held = [{f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in "012"]
    assert held[0] == held[1] == held[2]
    assert "sharing_map.json" in held[0] and "kv_plan.json" not in held[0]


def test_an_export_of_a_plan_may_be_replaced(folders) -> None:
    folder = folders["llama", "everything"]
    check_destination(folder, overwrite=True)
    with pytest.raises(InputError, match="is not empty"):
        check_destination(folder, overwrite=False)


def test_copies_in_memory_are_independent(folders, tokenizer, tmp_path: Path) -> None:
    folder, want = folders["llama", "everything"], expected("llama", "everything")["logits"]
    for way in WAYS:
        model = WAYS[way](folder)
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.lm_head.weight.mul_(2)
        other.save_pretrained(tmp_path / way)
        tokenizer.save_pretrained(tmp_path / way)
        assert torch.equal(logits(model), want)
        assert torch.equal(logits(ours(tmp_path / way)), 2 * want)


@pytest.mark.parametrize("name", NAMES)
def test_a_new_model_of_the_shipped_class_runs_the_plan(name: str, folders) -> None:
    """Made from the configuration alone, with random weights, in memory of its own."""
    loaded = theirs(folders[name, "everything"])
    model = AutoModelForCausalLM.from_config(loaded.config, trust_remote_code=True)
    model.double().eval().load_state_dict(loaded.state_dict())
    torch.testing.assert_close(logits(model), logits(loaded), rtol=0, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_training_with_checkpointing_gives_the_same_gradients(way: str, folders) -> None:
    model = WAYS[way](folders["llama", "without even layers"]).train().requires_grad_(True)
    loss(model).backward()
    plain = gradients(model)
    checkpoint(model, False)
    loss(model).backward()
    check_equal(gradients(model), plain)


def test_shipped_code_knows_the_actions_that_ship_and_no_installed_ones(folders) -> None:
    model = theirs(folders["llama", "everything"])
    modules = type(model).__module__.rpartition(".")[0]
    registry = sys.modules[f"{modules}.kvplan_values_actions_registry"]
    assert registry.GROUP == "transformers_modules.actions"
    assert list(registry.action_classes()) == [action.name for action in registry.OURS]
