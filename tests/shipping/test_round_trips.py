"""An export that is loaded, saved and loaded again, either way and in any order, stays itself."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from kvsharer_exp import share_kv
from kvsharer_exp.model.load import load
from kvsharer_exp.model.spec import ModelSpec
from kvsharer_exp.values.errors import InputError
from tests.shipping.exports import WAYS, export, ours, theirs
from tests.tiny import some_map, tiny_model, tokens

# Separate, clamped in place, sliding with tied embeddings, fused in one group, transposed and
# fused, fused per head (and renamed when saved), mixture of experts (split when saved).
NAMES = ("llama", "olmo", "gemma3_text", "phi3", "gpt2", "gpt_neox", "qwen3_moe")
# The file beside the weights as the first version of this package wrote it.
EARLIER = Path(__file__).parent / "earlier_modeling_kv_shared.py"


def logits(model: PreTrainedModel) -> torch.Tensor:
    if "Moe" in type(model).__name__:
        model.set_experts_implementation("eager")  # the default has no float64
    with torch.inference_mode():
        return model(tokens()).logits


def expected(name: str) -> torch.Tensor:
    model = tiny_model(name)
    with torch.inference_mode(), share_kv(model, some_map(model, 2)):
        return model(tokens()).logits


def check(folder: Path, name: str) -> None:
    for way in WAYS.values():
        # Not bit for bit: gpt2 keeps its weights transposed, which is another order of sums.
        torch.testing.assert_close(logits(way(folder)), expected(name), rtol=0, atol=1e-11)


@pytest.mark.parametrize("order", [("theirs", "theirs", "ours"), ("ours", "ours", "theirs")])
@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_rounds(name: str, order: tuple[str, ...], tokenizer, tmp_path) -> None:
    """Public fault 10: a copy named a class or a file that was not there."""
    folder = export(name, tokenizer, tmp_path / "export")
    first = json.loads((folder / "config.json").read_text())
    for number, way in enumerate(order):
        model, folder = WAYS[way](folder), tmp_path / f"copy{number}"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        check(folder, name)
        config = json.loads((folder / "config.json").read_text())
        assert config["kv_source_layers"] == first["kv_source_layers"]
        assert config["kv_sharing"] == first["kv_sharing"]
        assert config["architectures"] == first["architectures"]


@pytest.mark.parametrize("how", ["push_to_hub", "save_pretrained"])
@pytest.mark.parametrize("way", WAYS)
def test_what_would_be_uploaded_is_whole(
    way: str, how: str, tokenizer, tmp_path: Path, monkeypatch
) -> None:
    """Public fault 10: the local part of an upload, with only the hub itself replaced."""
    asked: list[dict[str, Any]] = []

    class Hub:
        def create_repo(self, repo_id: str, **options: Any) -> Any:
            asked.append({"repo_id": repo_id, **options})
            return type("Repo", (), {"repo_id": repo_id})

    class Card:
        def save(self, path: str) -> None:
            Path(path).write_text("# card\n")

    def upload(model: Any, folder: str, repo_id: str, files_timestamps: dict, **more: Any) -> None:
        target = tmp_path / "hub"
        target.mkdir()
        for path in Path(folder).iterdir():
            if path.stat().st_mtime > files_timestamps.get(path.name, 0):
                (target / path.name).write_bytes(path.read_bytes())

    for place in ("utils.hub", "modeling_utils"):
        monkeypatch.setattr(f"transformers.{place}.hf_api", Hub)
        monkeypatch.setattr(
            f"transformers.{place}.create_and_tag_model_card", lambda *_, **__: Card()
        )
    monkeypatch.setattr(PreTrainedModel, "_upload_modified_files", upload)
    model = WAYS[way](export("llama", tokenizer, tmp_path / "export"))
    if how == "push_to_hub":
        model.push_to_hub("someone/model")
    else:
        model.save_pretrained(tmp_path / "local", push_to_hub=True, repo_id="someone/model")
    assert [options["repo_id"] for options in asked] == ["someone/model"]
    uploaded = {path.name for path in (tmp_path / "hub").iterdir()}
    assert {"config.json", "model.safetensors", "modeling_kv_shared.py"} <= uploaded
    tokenizer.save_pretrained(tmp_path / "hub")
    check(tmp_path / "hub", "llama")


def test_a_copy_in_memory_saves_itself(tokenizer, tmp_path: Path) -> None:
    model = ours(export("llama", tokenizer, tmp_path / "export"))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    other.save_pretrained(tmp_path / "copy")
    tokenizer.save_pretrained(tmp_path / "copy")
    torch.testing.assert_close(logits(theirs(tmp_path / "copy")), 2 * expected("llama"))
    check(tmp_path / "export", "llama")


def test_a_helper_process_writes_nothing_beside_its_weights(tokenizer, tmp_path: Path) -> None:
    model = ours(export("llama", tokenizer, tmp_path / "export"))
    model.save_pretrained(tmp_path / "copy", is_main_process=False)
    assert list((tmp_path / "copy").iterdir()) == []


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_exports_of_earlier_versions_load_and_are_mended_by_saving(
    name: str, tokenizer, tmp_path: Path
) -> None:
    """They have other code, and config.json names the stock model type and architecture."""
    folder = export(name, tokenizer, tmp_path / "export")
    stock = type(tiny_model(name)).__name__
    code = EARLIER.read_text().replace("LlamaForCausalLM", stock)
    (folder / "modeling_kv_shared.py").write_text(code)
    (folder / "configuration_kv_shared.py").unlink()
    config = json.loads((folder / "config.json").read_text())
    own = config["model_type"]
    config |= {"model_type": own.removeprefix("kvsharer_exp_"), "architectures": [stock]}
    del config["auto_map"]["AutoConfig"]
    (folder / "config.json").write_text(json.dumps(config))
    check(folder, name)
    ours(folder).save_pretrained(tmp_path / "copy")
    tokenizer.save_pretrained(tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["model_type"] == own
    check(tmp_path / "copy", name)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_copy_is_no_more_a_model_source_than_the_export(
    name: str, way: str, tokenizer, tmp_path: Path
) -> None:
    WAYS[way](export(name, tokenizer, tmp_path / "export")).save_pretrained(tmp_path / "copy")
    tokenizer.save_pretrained(tmp_path / "copy")
    for folder in ("export", "copy"):
        with pytest.raises(InputError, match="is an export and shares KV already"):
            load(ModelSpec(name="m", source=str(tmp_path / folder)))
