"""Exports of tiny models of every family that vLLM has, and their answers there and here.

vLLM's attention on a CPU takes heads of 32 channels and more, so these are wider than the models of
`tests.tiny`.
"""

import copy
import json
import os
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kvsharer_exp import KVPlan, fit_plan, load_exported
from kvsharer_exp.shipping.export import write_export
from tests.tiny import tiny_model

NEW_TOKENS = 64
PROMPTS = [
    torch.randint(3, 250, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (5, 9, 17, 30, 12, 40, 3, 21)
]
# Layers of models with two attention types alternate, so that 0 and 2 are of one type.
PLANS = {
    "full": "0_1_2_3_4_5",
    "map": "0_1_0_1_0_5",
    "drop": "0_x_2_3_x_5",
    "constant": "0_1_2_c_4_c",
    "affine": "0_a_2_3_4_a",
    "mixed": "0_a_0_x_0_c",
}
_WIDE = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "head_dim": 64,
}


@cache
def wide_model(name: str) -> PreTrainedModel:
    """The random model of architecture ``name`` in float32, the same weights every time."""
    return copy.deepcopy(tiny_model(name, **_WIDE)).float()


def export(model: PreTrainedModel, tokenizer: Any, text: str, folder: Path) -> Path:
    """Export ``model``, which is then under the plan ``text`` for good."""
    plan: Any = KVPlan.parse(text)
    if any(action.fitted for action in plan.actions):
        windows = torch.randint(3, 250, (8, 40), generator=torch.Generator().manual_seed(1))
        plan = fit_plan(model, plan, windows)
    write_export(model, tokenizer, plan, folder, card="# card\n")
    return folder


def job(folder: Path, *, one_by_one: bool = False, **options: Any) -> dict[str, Any]:
    prompts = options.pop("prompts", PROMPTS)
    return {
        "folder": str(folder),
        "prompts": prompts,
        "new_tokens": NEW_TOKENS,
        "one_by_one": one_by_one,
        "options": {"dtype": "float32", "enforce_eager": True, **options},
    }


def in_engine(
    jobs: Sequence[dict[str, Any]], folder: Path, plugins: str = "kvsharer_exp"
) -> list[dict[str, Any]]:
    """Run ``jobs`` in one process of the engine's Python, with one GiB for KV."""
    asked, answers = folder / "jobs.json", folder / "answers.json"
    asked.write_text(json.dumps(list(jobs)))
    settings = {
        "VLLM_PLUGINS": plugins,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # to send `parameter_bytes` to the worker
        "HF_HUB_OFFLINE": "1",
    }
    script = Path(__file__).with_name("generate.py")
    with (folder / "engine.log").open("w") as log:
        subprocess.run(
            [os.environ["KVSHARER_ENGINE_PYTHON"], script, asked, answers],
            env={**os.environ, **settings},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            check=True,
        )
    return json.loads(answers.read_text())


def here(folder: Path) -> tuple[list[list[int]], int]:
    """The greedy answers of `load_exported` in float32, and the bytes of its parameters."""
    model, _ = load_exported(folder)
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
            )
        found.append(output[0, len(prompt) :].tolist())
    return found, sum(p.numel() * p.element_size() for p in model.parameters())
