"""Every family and action in vLLM: the tokens of `load_exported`, and the memory that is predicted.

Run by ``make engine``.
"""

import copy
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvsharer_exp import KVPlan
from kvsharer_exp.shipping.vllm.blocks import page_bytes, predicted_blocks
from kvsharer_exp.values.vllm_support import FAMILIES
from tests.engine.exports import PLANS, PROMPTS, export, here, in_engine, job, wide_model

pytestmark = pytest.mark.engine

NAMES = [family.model_type for family in FAMILIES.values()]


@pytest.fixture(scope="module")
def folders(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """By family and plan, the export."""
    root = tmp_path_factory.mktemp("exports")
    return {
        name: {
            kind: export(copy.deepcopy(wide_model(name)), tokenizer, text, root / name / kind)
            for kind, text in PLANS.items()
        }
        for name in NAMES
    }


@pytest.mark.parametrize("name", NAMES)
def test_tokens_and_memory_are_those_of_the_plan(folders, tmp_path: Path, name: str) -> None:
    answers = in_engine([job(folder) for folder in folders[name].values()], tmp_path)
    config = json.loads((folders[name]["full"] / "config.json").read_text())
    types = config.get("layer_types") or [None] * 6
    if config.get("sliding_window") and not config.get("layer_types"):
        types = ["sliding_attention"] * 6
    windows = [config["sliding_window"] if t == "sliding_attention" else None for t in types]
    for (kind, folder), answer in zip(folders[name].items(), answers, strict=True):
        assert "error" not in answer, (kind, answer)
        tokens, held = here(folder)
        assert answer["tokens"] == tokens, kind
        assert answer["parameter_bytes"] == held, kind
        owners = KVPlan.parse(PLANS[kind]).owners
        assert len(answer["keep_kv"]) == len(owners)
        page = page_bytes(
            block_size=answer["block_size"],
            num_key_value_heads=config["num_key_value_heads"],
            head_dim=64,
            element_bytes=4,
        )
        predicted = predicted_blocks(
            [windows[owner] for owner in owners],
            memory_bytes=2**30,
            block_size=answer["block_size"],
            page_bytes=page,
        )
        assert answer["blocks"] == predicted.num_blocks, kind


def test_any_way_of_scheduling_gives_the_same_tokens(folders, tmp_path: Path) -> None:
    folder = folders["llama"]["mixed"]
    many = [prompt[: 2 + i % len(prompt)] for i, prompt in enumerate(PROMPTS * 4)]
    long = [(prompt * 30)[:150] for prompt in PROMPTS]  # prefixes in common, several blocks long
    ways: list[dict[str, Any]] = [
        {"one_by_one": True},
        {},
        {"enable_chunked_prefill": True, "max_num_batched_tokens": 32},
        {"enable_prefix_caching": True, "one_by_one": True},
        {"enable_prefix_caching": False},
    ]
    jobs = [
        job(folder, prompts=prompts, **way) for prompts in (many, [*long, *long]) for way in ways
    ]
    answers = [answer["tokens"] for answer in in_engine(jobs, tmp_path)]
    first, second = answers[: len(ways)], answers[len(ways) :]
    assert all(answer == first[0] for answer in first)
    assert all(answer == second[0] for answer in second)


def test_two_devices_hold_the_query_rows_of_an_owner(tokenizer: Any, tmp_path: Path) -> None:
    script, answers = Path(__file__).with_name("shards.py"), tmp_path / "answers.json"
    settings = {**os.environ, "VLLM_PLUGINS": "none"}
    subprocess.run(
        [os.environ["KVSHARER_ENGINE_PYTHON"], script, answers], env=settings, check=True
    )
    shards = json.loads(answers.read_text())
    for rank, shard in enumerate(shards):
        # Four heads and two KV heads of 64 channels on two devices; weights count up by 32 a row.
        assert shard == {
            "rows": 128,
            "same_as_owner": True,
            "same_fused": True,
            "first": rank * 128 * 32,
            "columns": 256,
            "kv_is_zero": True,
        }


def test_compiled_as_eager(folders, tmp_path: Path) -> None:
    jobs = [
        job(folders[name]["mixed"], enforce_eager=eager)
        for name in ("llama", "gemma3_text")
        for eager in (True, False)
    ]
    eager, compiled, other_eager, other_compiled = in_engine(jobs, tmp_path)
    assert compiled["tokens"] == eager["tokens"]
    assert other_compiled["tokens"] == other_eager["tokens"]


def damaged(folder: Path, path: Path, lost: str = "", added: str = "", **changes: Any) -> Path:
    """A copy of an export without one weight, with another, or with another configuration."""
    path.mkdir()
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    weights = load_file(path / "model.safetensors")
    if lost:
        del weights[lost]
    if added:
        weights[added] = torch.zeros(128, 256)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    return path


def test_what_is_not_whole_or_cannot_be_done_is_refused(folders, tmp_path: Path) -> None:
    llama = folders["llama"]
    attention = "model.layers.{}.self_attn.{}.weight"
    cases = {
        "lacks model.layers.1.self_attn.k_proj.weight": job(
            damaged(llama["map"], tmp_path / "a", lost=attention.format(1, "k_proj"))
        ),
        "k_proj at a layer that reads another": job(
            damaged(llama["map"], tmp_path / "b", added=attention.format(2, "k_proj"))
        ),
        "model.layers.1.self_attn.weight": job(
            damaged(llama["affine"], tmp_path / "c", lost="model.layers.1.self_attn.weight")
        ),
        "layer 1 cannot keep 4 bits in vLLM": job(
            damaged(llama["drop"], tmp_path / "d", kv_plan="0_1q4_2_3_x_5")
        ),
        "kv_cache_dtype=fp8": job(llama["map"], kv_cache_dtype="fp8"),
        "pipeline": job(llama["map"], pipeline_parallel_size=2),
    }
    answers = in_engine(list(cases.values()), tmp_path)
    for words, answer in zip(cases, answers, strict=True):
        assert words.lower() in answer.get("error", "").lower(), (words, answer)


def test_without_the_plugin_nothing_loads(folders, tmp_path: Path) -> None:
    maps = [folders["llama"][kind] for kind in ("map", "mixed")]
    ways: list[dict[str, Any]] = [
        {},
        {"trust_remote_code": True},
        {"trust_remote_code": True, "model_impl": "transformers"},
    ]
    jobs = [job(folder, **way) for folder in maps for way in ways]
    for asked, answer in zip(jobs, in_engine(jobs, tmp_path, plugins="none"), strict=True):
        assert "error" in answer, asked
        # The first is the refusal of transformers, which names the folder and nothing of ours.
        wanted = "KVShared" if "trust_remote_code" in asked["options"] else "custom code"
        assert wanted in answer["error"]
