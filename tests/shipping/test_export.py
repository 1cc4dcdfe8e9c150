"""A shipped map is the model that was scored: bit for bit, with this package and without it."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from kvsharer_exp import load_exported, make_shared, share_kv
from kvsharer_exp.model.footprint import footprint
from kvsharer_exp.model.sharing.cache import cache_bytes
from kvsharer_exp.shipping.export import check_destination, check_model, write_export
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.sharing_map import SharingMap
from tests.tiny import NUM_LAYERS, some_map, tiny_model, tokens

# Separate, separate with q/k norms, sliding with one KV head, fused in one group, transposed and
# fused, fused per head (and renamed when saved), mixture of experts (merged when loaded).
NAMES = ("llama", "qwen3", "gemma3_text", "phi3", "gpt2", "gpt_neox", "qwen3_moe")
# Run where this package cannot be imported: -I leaves the working folder and PYTHONPATH out, and
# an import hook refuses the installed one.
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
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, dtype="auto")
    assert not any(info.values()), info
    ids = load_file(folder + "/../ids.safetensors")["ids"]
    with torch.inference_mode():
        output = model(ids, use_cache=True)
        plain = model(ids, use_cache=False).logits
        said = model.generate(ids[:1], max_new_tokens=8, do_sample=False, num_beams=2)
    layers = output.past_key_values.layers
    held = [0 if getattr(x, "keys", None) is None else x.keys.numel() for x in layers]
    save_file({"logits": output.logits.contiguous(), "plain": plain.contiguous(), "said": said,
        "held": torch.tensor(held), "bytes": torch.tensor(sum(
            p.numel() * p.element_size() for p in model.parameters()))},
        folder + "/../theirs.safetensors")
assert "kvsharer_exp" not in sys.modules
"""


def fresh(name: str) -> PreTrainedModel:
    return copy.deepcopy(tiny_model(name))


def export(name: str, tokenizer, path: Path, **options: bool) -> SharingMap:
    model = fresh(name)
    sharing_map = some_map(model, 2)
    write_export(model, tokenizer, sharing_map, path, card="# card\n", **options)
    return sharing_map


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids, use_cache=True).logits


@pytest.fixture(scope="module")
def theirs(tokenizer, tmp_path_factory) -> dict[str, Path]:
    """Every architecture exported, and all loaded in one process that lacks this package."""
    root = tmp_path_factory.mktemp("exports")
    folders = {name: root / name / "export" for name in NAMES}
    for name, folder in folders.items():
        folder.parent.mkdir()
        save_file({"ids": tokens()}, folder.parent / "ids.safetensors")
        export(name, tokenizer, folder)
    command = [sys.executable, "-I", "-c", WITHOUT_US, *map(str, folders.values())]
    environment = {**os.environ, "HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folders


@pytest.mark.parametrize("name", NAMES)
def test_four_ways_of_running_a_map_agree_bit_for_bit(name: str, theirs, tokenizer) -> None:
    original, ids, folder = tiny_model(name), tokens(), theirs[name]
    sharing_map = some_map(original, 2)
    stock = logits(original, ids)
    with share_kv(original, sharing_map), torch.inference_mode():
        output = original(ids, use_cache=True)
        said = original.generate(ids[:1], max_new_tokens=8, do_sample=False, num_beams=2)
    expected = output.logits
    assert not torch.equal(stock, expected)
    assert torch.equal(logits(make_shared(fresh(name), sharing_map), ids), expected)
    ours, _ = load_exported(folder)
    if name == "qwen3_moe":
        ours.set_experts_implementation("eager")  # the default has no float64
    assert torch.equal(logits(ours, ids), expected)
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())
    other = load_file(folder.parent / "theirs.safetensors")
    for key in ("logits", "plain"):
        if name == "gpt2":  # keeps its weights transposed, files do not: another order of sums
            torch.testing.assert_close(other[key], expected, rtol=0, atol=1e-12)
        else:
            assert torch.equal(other[key], expected)
    assert torch.equal(other["said"], said)
    layers = output.past_key_values.layers
    held = [0 if getattr(x, "keys", None) is None else x.keys.numel() for x in layers]
    assert other["held"].tolist() == held
    assert [held[target] for target in sharing_map.targets] == [0, 0]
    parameters = sum(p.numel() * p.element_size() for p in ours.parameters())
    assert int(other["bytes"]) == parameters


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_lacks_exactly_the_bytes_that_footprint_promises(name: str, theirs) -> None:
    original = tiny_model(name)
    sharing_map = some_map(original, 2)
    saved = footprint(original, sharing_map).parameter_bytes_saved
    with safe_open(theirs[name] / "model.safetensors", "pt") as weights:
        written = sum(weights.get_tensor(key).nbytes for key in weights.keys())
    parameters = sum(p.numel() * p.element_size() for p in original.parameters())
    assert written == parameters - saved < parameters


def test_what_is_in_the_folder(theirs, tokenizer) -> None:
    folder = theirs["llama"]
    names = {path.name for path in folder.iterdir()}
    assert {
        *("config.json", "generation_config.json", "model.safetensors", "README.md"),
        *("modeling_kv_shared.py", "sharing_map.json", "tokenizer.json", "tokenizer_config.json"),
    } <= names
    config = json.loads((folder / "config.json").read_text())
    sharing_map = some_map(tiny_model("llama"), 2)
    assert config["kv_source_layers"] == list(sharing_map.kv_source_layers)
    assert config["architectures"] == ["KVSharedLlamaForCausalLM"]
    assert config["model_type"] == "kvsharer_exp_llama"
    assert SharingMap.parse(folder / "sharing_map.json") == sharing_map
    _, again = load_exported(folder)
    assert again("a b").input_ids == tokenizer("a b").input_ids
    assert "kvsharer_exp" not in "".join(
        line
        for line in (folder / "modeling_kv_shared.py").read_text().splitlines()
        if "import" in line
    )


def test_tied_embeddings_stay_tied(theirs) -> None:
    model, _ = load_exported(theirs["gemma3_text"])
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_loaded_export_stores_what_the_map_says(theirs) -> None:
    model, _ = load_exported(theirs["llama"])
    original = tiny_model("llama")
    size = footprint(original, SharingMap(tuple(model.config.kv_source_layers)))
    with torch.inference_mode():
        cache = model(tokens(2, 9), use_cache=True).past_key_values
    assert cache_bytes(cache) == size.kv_bytes_per_token * 2 * 9


def test_an_export_is_not_overwritten_unless_asked(tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "export"
    export("llama", tokenizer, path)
    before = (path / "config.json").stat().st_mtime_ns
    with pytest.raises(InputError, match=r"is not empty: give another export\.path"):
        export("llama", tokenizer, path)
    assert (path / "config.json").stat().st_mtime_ns == before
    (path / "left-over").touch()
    export("qwen3", tokenizer, path, overwrite=True)
    assert "Qwen3ForCausalLM" in (path / "config.json").read_text()
    assert not (path / "left-over").exists()
    assert [entry.name for entry in path.parent.iterdir()] == ["export"]


def test_what_is_no_export_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(InputError, match="holds something that is no export"):
        check_destination(tmp_path, overwrite=True)
    with pytest.raises(InputError, match="is a file"):
        check_destination(tmp_path / "thesis.txt", overwrite=True)
    (tmp_path / "empty").mkdir()
    check_destination(tmp_path / "empty", overwrite=False)
    check_destination(tmp_path / "absent", overwrite=False)


def test_a_failure_while_writing_leaves_nothing(tokenizer, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "export"
    export("llama", tokenizer, path)
    before = {file.name: file.read_bytes() for file in path.iterdir()}

    def full(*arguments: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", full)
    with pytest.raises(OSError, match="no space"):
        export("qwen3", tokenizer, path, overwrite=True)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["export"]


def test_a_class_of_ones_own_is_refused() -> None:
    model = fresh("llama")
    model.__class__ = type("MyForCausalLM", (type(model),), {})
    with pytest.raises(InputError, match="MyForCausalLM is not a class of transformers"):
        check_model(model)


def test_quantised_weights_are_refused() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    check_model(model)
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    with pytest.raises(InputError, match="load it without its quantization_config"):
        check_model(model)


@pytest.fixture
def folder(tokenizer, tmp_path: Path) -> Path:
    export("llama", tokenizer, tmp_path / "export")
    return tmp_path / "export"


def amend(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: v for key, v in config.items() if v is not None}))


def test_a_folder_that_is_no_export_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no config\.json"):
        load_exported(tmp_path / "absent")
    amend(folder, kv_source_layers=None)
    with pytest.raises(InputError, match="has no kv_source_layers; use load_model"):
        load_exported(folder)


def test_a_map_of_another_length_is_refused(folder: Path, tokenizer, tmp_path: Path) -> None:
    amend(folder, kv_source_layers=[0, 1, 0])
    with pytest.raises(InputError, match="map has 3 layers but the model has 6"):
        load_exported(folder)
    with pytest.raises(InputError, match="map has 7 layers but the model has 6"):
        write_export(fresh("llama"), tokenizer, SharingMap.identity(7), tmp_path / "other", card="")
    assert not (tmp_path / "other").exists()


def test_weights_that_do_not_fit_are_refused(folder: Path) -> None:
    """A layer that lacks its keys, or has some that the map has no use for, is never ignored."""
    whole = load_file(folder / "model.safetensors")
    target = some_map(tiny_model("llama"), 2).targets[0]
    key = "model.layers.0.self_attn.k_proj.weight"
    changes = {
        "lacks": {name: value for name, value in whole.items() if name != key},
        "has the wrong shape of": {**whole, key: whole[key][:-1].contiguous()},
        "has besides": {**whole, "model.layers.0.self_attn.extra.weight": whole[key].clone()},
    }
    for what, weights in changes.items():
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=f"is not whole: it {what} ") as refused:
            load_exported(folder)
        assert len(str(refused.value)) <= 200
    # A target's weights that are there after all mean that config and weights are not one export.
    extra = {**whole, key.replace(".0.", f".{target}."): whole[key].clone()}
    save_file(extra, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="is not whole"):
        load_exported(folder)
    assert NUM_LAYERS == 6
