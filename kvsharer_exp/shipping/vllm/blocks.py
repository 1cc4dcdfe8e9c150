"""Predict how many KV blocks vLLM makes of its KV memory, for a plan.

vLLM cuts the KV memory into blocks of equal size. A block holds ``block_size`` tokens of all layers
of one *group*. Layers of one attention type form one group, so that a block costs as many pages as
there are owners. A model with two types is split into groups of as many layers as the rarer type
has (or the more frequent one, if that has less than half as many more). The last group of a type
may then have places that no layer fills, the padding. A group's block costs the pages of the
widest group. So in such a model fewer owners may save nothing.

The rules are those of `vllm/v1/core/kv_cache_utils.py
<https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/v1/core/kv_cache_utils.py>`_. This file
needs numbers only. `check` compares what it gives with what the engine reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.record import Record

_NEARLY_EQUAL = 1.5  # vLLM's bound on (most layers of a type) / (fewest layers of a type)


@dataclass(frozen=True, slots=True)
class PredictedBlocks(Record):
    """How vLLM holds the KV of a model.

    ``window`` is that of a sliding layer in tokens, and None of a full one.

    Args:
        num_blocks: the blocks in the memory, ⌊memory / ``bytes_per_block``⌋.
        block_size: the tokens of a block.
        page_bytes: what one layer takes of a block.
        group_layers: the layers that a group has room for.
        group_windows: the window of each group.
        padding: places in groups that no layer fills.
    """

    num_blocks: int
    block_size: int
    page_bytes: int
    group_layers: int
    group_windows: tuple[int | None, ...]
    padding: int

    @property
    def bytes_per_block(self) -> int:
        return self.group_layers * self.page_bytes

    def request_bytes(self, tokens: int) -> int:
        """The bytes of the blocks that one request holds once it has ``tokens`` tokens."""
        held = 0
        for window in self.group_windows:
            if window is None or window >= tokens:
                held += -(-tokens // self.block_size)
            else:  # a window may begin in the middle of a block
                held += -(-(window - 1) // self.block_size) + 1
        return held * self.bytes_per_block


def page_bytes(
    *, block_size: int, num_key_value_heads: int, head_dim: int, element_bytes: int
) -> int:
    """The bytes of one layer in one block: keys and values of ``block_size`` tokens."""
    return 2 * block_size * num_key_value_heads * head_dim * element_bytes


def predicted_blocks(
    windows: Sequence[int | None], *, memory_bytes: int, block_size: int, page_bytes: int
) -> PredictedBlocks:
    """Predict the blocks for the owners of a plan.

    Args:
        windows: for each layer that keeps KV of its own, its sliding window; None if it attends to
            everything. Pages of all of them have the same size.

    Raises:
        InputError: there are no owners, or the windows are of more than two kinds.
    """
    counts = {window: windows.count(window) for window in dict.fromkeys(windows)}
    if not counts or len(counts) > 2:
        raise InputError(
            f"{len(counts)} kinds of attention own KV: give a plan whose owners have one or two"
        )
    fewest, most = min(counts.values()), max(counts.values())
    group_layers = most if most < fewest * _NEARLY_EQUAL else fewest
    groups = {window: -(-count // group_layers) for window, count in counts.items()}
    return PredictedBlocks(
        num_blocks=memory_bytes // (group_layers * page_bytes),
        block_size=block_size,
        page_bytes=page_bytes,
        group_layers=group_layers,
        group_windows=tuple(window for window, number in groups.items() for _ in range(number)),
        padding=group_layers * sum(groups.values()) - len(windows),
    )


@dataclass(frozen=True, slots=True)
class BlockCheck(Record):
    """The KV blocks that an engine reports, beside those that are predicted for its plan.

    ``full`` is the prediction for the full cache in the same memory, and ``request_tokens`` the
    length of the longest request.
    """

    reported: int
    predicted: PredictedBlocks
    full: PredictedBlocks
    request_tokens: int

    @property
    def passes(self) -> bool:
        return self.reported == self.predicted.num_blocks

    @property
    def request_bytes(self) -> int:
        """The KV bytes of the longest request under the plan."""
        return self.predicted.request_bytes(self.request_tokens)

    @property
    def full_request_bytes(self) -> int:
        """The KV bytes of the longest request with the full cache."""
        return self.full.request_bytes(self.request_tokens)

    @property
    def saves(self) -> bool:
        """Whether the longest request takes less memory than with the full cache."""
        return self.request_bytes < self.full_request_bytes
