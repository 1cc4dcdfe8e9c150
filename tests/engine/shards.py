"""Run in the engine's Python: what each of two devices loads of a target's projection.

Usage: ``PYTHON shards.py ANSWERS.json``. The two devices of a tensor-parallel group are played one
after the other, and hold the same query rows in a target as in an owner.
"""

import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import linear
from vllm.model_executor.parameter import BasevLLMParameter

from kvsharer_exp.shipping.vllm.layers import QueryRows

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, DEVICES = 4, 2, 64, 32, 2


def loaded(rank: int, queries: torch.Tensor, kv: torch.Tensor) -> dict[str, object]:
    module = "vllm.model_executor"
    with (
        patch.object(linear, "get_tensor_model_parallel_rank", lambda: rank),
        patch.object(linear, "get_tensor_model_parallel_world_size", lambda: DEVICES),
        patch(f"{module}.parameter.get_tensor_model_parallel_rank", lambda: rank),
        patch(f"{module}.parameter.get_tensor_model_parallel_world_size", lambda: DEVICES),
    ):
        owner = linear.QKVParallelLinear(HIDDEN, HEAD_DIM, HEADS, KV_HEADS, bias=False)
        target = QueryRows(owner)
        for name, weight in (("q", queries), ("k", kv), ("v", kv)):
            _load(owner.weight, weight, name)
        _load(target.weight, queries, "q")
        alone = target.weight.data.clone()
        target.weight.data.zero_()
        _load(target.weight, queries, None)  # a checkpoint whose projections are fused
        fused = target.weight.data.clone()
    rows = len(alone)
    target.quant_method.process_weights_after_loading(target)  # repacks them on a CPU
    output, _ = target(torch.ones(3, HIDDEN))
    return {
        "rows": rows,
        "same_as_owner": torch.equal(alone, owner.weight.data[:rows]),
        "same_fused": torch.equal(alone, fused),
        "first": alone[0, 0].item(),
        "columns": output.shape[-1],
        "kv_is_zero": not output[:, rows:].any().item(),
    }


def _load(parameter: BasevLLMParameter, weight: torch.Tensor, shard: str | None) -> None:
    words = () if shard is None else (shard,)
    parameter.weight_loader(parameter, weight, *words)


if __name__ == "__main__":
    numbers = torch.arange(HEADS * HEAD_DIM * HIDDEN, dtype=torch.float32)
    wanted = numbers.reshape(HEADS * HEAD_DIM, HIDDEN)
    with set_current_vllm_config(VllmConfig()):
        found = [loaded(rank, wanted, wanted[: KV_HEADS * HEAD_DIM]) for rank in range(DEVICES)]
    Path(sys.argv[1]).write_text(json.dumps(found))
