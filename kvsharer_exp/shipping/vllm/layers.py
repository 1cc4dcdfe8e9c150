"""The modules that a plan puts into a model of vLLM."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear


class QueryRows(ColumnParallelLinear):
    """Stands for a target's ``qkv_proj`` with only its query rows; keys and values are zero.

    vLLM does not look at the keys and values of a layer that reads another layer's blocks.
    """

    def __init__(self, stock: QKVParallelLinear) -> None:
        super().__init__(
            stock.hidden_size,
            stock.total_num_heads * stock.head_size,
            bias=stock.bias is not None,
            params_dtype=stock.params_dtype,
            prefix=stock.prefix,
        )
        self.kv_columns = stock.num_kv_heads * (stock.head_size + stock.v_head_size)

    def weight_loader(self, param: Any, loaded_weight: torch.Tensor, *shard: str) -> None:
        """Load the query rows, which come alone or, where the checkpoint fuses, as all there is."""
        _check_rows(loaded_weight, *shard)
        super().weight_loader(param, loaded_weight)

    def weight_loader_v2(self, param: Any, loaded_weight: torch.Tensor, *shard: str) -> None:
        """As `weight_loader`."""
        _check_rows(loaded_weight, *shard)
        super().weight_loader_v2(param, loaded_weight)

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, None]:
        """(tokens, hidden) becomes (tokens, queries, then zeros for keys and values)."""
        queries, _ = super().forward(input_)
        return nn.functional.pad(queries, (0, self.kv_columns)), None


def _check_rows(weight: torch.Tensor, shard: str | None = None) -> None:
    """Refuse keys and values; vLLM says what a weight is by argument or on the tensor itself."""
    shard = shard or getattr(weight, "shard_id", None)
    if shard not in ("q", None):
        raise ValueError(
            f"kvsharer_exp: the checkpoint has a {shard}_proj at a layer that reads another one's "
            "KV; export it again"
        )


class StandIn(nn.Module):
    """Stands in place of an attention: what the actions drop, constant and affine add.

    Its weights are not sharded, so that every device of a tensor-parallel group has the whole sum.
    """

    def __init__(self, hidden: int, action: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden, hidden)) if action == "affine" else None
        self.bias = nn.Parameter(torch.empty(hidden)) if action != "drop" else None
        self.requires_grad_(False)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """(tokens, hidden) becomes the same shape, in new memory: vLLM adds to it in place."""
        if self.weight is not None:
            return nn.functional.linear(hidden_states, self.weight, self.bias)
        output = torch.zeros_like(hidden_states)
        return output if self.bias is None else output + self.bias
