"""Gradient checkpointing of a model that shares KV: KV goes into and out of a block with the rest.

Gradient checkpointing runs a block a second time, in the backward pass, where the blocks before it
do not run. A target would then find no KV, and a source would hand its own over to nobody. So the
KV that a block reads becomes an input of the checkpointed function, and the KV that it hands over
becomes an output. torch then keeps the one and sends gradients through both, whichever of its two
ways of checkpointing is used.

`connect` puts a `CheckpointHook` before the forward of the module that runs the blocks. There each
block holds the function that checkpoints it, from ``model.gradient_checkpointing_enable`` on.
Method: https://docs.pytorch.org/docs/stable/checkpoint.html
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kvsharer_exp.model.sharing.exchange import Exchange, Handover, KeyValue

_FUNCTION = "_gradient_checkpointing_func"  # transformers' name for it, in every block


@dataclass(frozen=True, slots=True)
class BlockKV:
    """What one block reads and hands over: the ``sources`` it reads, and whether others read it.

    No layer after this one reads the sources that are ``done``.
    """

    layer: int
    block: nn.Module
    exchange: Exchange
    sources: tuple[int, ...] = ()
    done: frozenset[int] = frozenset()
    hands_over: bool = False


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """Does as ``plain``, torch's checkpoint, with the KV of one block as inputs and outputs."""

    plain: Callable[..., Any]
    kv: BlockKV

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        kv, handed = self.kv, self.kv.exchange.here().handed
        returns_tuple = False

        def run(*args_and_kv: Any) -> Any:  # once now, and once in the backward pass
            nonlocal returns_tuple
            own, read = args_and_kv[: len(args)], args_and_kv[len(args) :]
            pairs = zip(read[::2], read[1::2], strict=True)
            given = (KeyValue(*pair) for pair in pairs)
            inside = Handover({s: {None: one} for s, one in zip(kv.sources, given, strict=True)})
            with kv.exchange.within(inside):
                output = function(*own)
            if not kv.hands_over:
                return output
            returns_tuple = isinstance(output, tuple)
            return (*(output if returns_tuple else (output,)), *inside.handed[kv.layer][None][:2])

        read = (tensor for source in kv.sources for tensor in handed[source][None][:2])
        output = self.plain(run, *args, *read)
        for source in kv.done:
            del handed[source]
        if not kv.hands_over:
            return output
        *output, key, value = output
        handed[kv.layer] = {None: KeyValue(key, value)}
        return tuple(output) if returns_tuple else output[0]


@dataclass(frozen=True, slots=True)
class CheckpointHook:
    """Before a forward with gradients: blocks that may be checkpointed are, but with their KV."""

    blocks: tuple[BlockKV, ...]

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        for kv in self.blocks:
            plain = getattr(kv.block, _FUNCTION, None)
            if plain is not None and not isinstance(plain, _Checkpoint):
                setattr(kv.block, _FUNCTION, _Checkpoint(plain, kv))

    def undo(self) -> None:
        """Give the blocks their own functions back."""
        for kv in self.blocks:
            function = getattr(kv.block, _FUNCTION, None)
            if isinstance(function, _Checkpoint):
                setattr(kv.block, _FUNCTION, function.plain)
