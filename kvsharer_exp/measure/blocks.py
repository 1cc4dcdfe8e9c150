"""Run a model, and handle its blocks from outside: skip them, record and repeat what they return.

An `Evaluator` uses this to resume a forward in the middle, for one map or for several together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from kvsharer_exp.model.sharing.architectures import AttentionLayer
from kvsharer_exp.model.sharing.exchange import KeyValue
from kvsharer_exp.model.stores.columns import Columns


def forward(
    model: Any, tokens: torch.Tensor, logits: bool, first: int = 0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run ``model`` without a cache on ``tokens`` (batch, tokens).

    Returns of the tokens from ``first`` on the last hidden states (batch, tokens, hidden_size) and,
    where ``logits`` are asked for, the logits (batch, tokens, vocabulary).
    """
    decoder = model.base_model
    if not logits:
        return decoder(tokens, use_cache=False).last_hidden_state[:, first:], None
    seen: list[torch.Tensor] = []
    handle = decoder.register_forward_hook(
        lambda module, args, output: seen.append(output.last_hidden_state)
    )
    try:
        some = {"logits_to_keep": tokens.shape[1] - first} if first else {}
        raw = model(tokens, use_cache=False, **some).logits
    finally:
        handle.remove()
    return seen[0][:, first:], raw


def repeated(value: Any, times: int) -> Any:
    """Repeat what a block returned, or the KV an owner left, for ``times`` as many windows."""
    if isinstance(value, tuple):
        items = [repeated(item, times) for item in value]
        return type(value)(*items) if isinstance(value, KeyValue) else tuple(items)
    if isinstance(value, Columns):
        return value.repeated(times)
    if times == 1 or not isinstance(value, torch.Tensor):
        return value
    return value.repeat(times, *[1] * (value.ndim - 1))


def part_of(value: Any, part: int, parts: int) -> Any:
    """Take one of equal ``parts`` of the batch in ``value``, copied so that the rest can go."""
    if parts == 1 or value is None:
        return value
    if isinstance(value, tuple):
        return tuple(part_of(item, part, parts) for item in value)
    return value.chunk(parts)[part].clone()


def num_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Count the bytes that ``tensors`` hold in memory; memory that they share counts once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@contextmanager
def skipped(layers: tuple[AttentionLayer, ...], output: Any) -> Iterator[None]:
    """Let the blocks of ``layers`` return ``output`` without computing; undone at the end."""
    with ExitStack() as undo:
        for layer in layers:
            own = layer.block.__dict__.get("forward")  # accelerate's hooks put one there
            if own is None:
                undo.callback(layer.block.__dict__.pop, "forward")
            else:
                undo.callback(layer.block.__dict__.__setitem__, "forward", own)
            layer.block.__dict__["forward"] = lambda *args, **kwargs: output
        yield


@contextmanager
def recorded(layers: tuple[AttentionLayer, ...], outputs: dict[int, Any]) -> Iterator[None]:
    """Record in ``outputs``, by layer index, what the blocks of ``layers`` return meanwhile."""
    with ExitStack() as undo:
        for layer in layers:
            handle = layer.block.register_forward_hook(
                lambda module, args, output, index=layer.index: outputs.__setitem__(index, output)
            )
            undo.callback(handle.remove)
        yield
