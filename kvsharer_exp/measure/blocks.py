"""Decoder blocks from outside: skip them, record what they return, repeat it for several maps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from kvsharer_exp.model.sharing.architectures import AttentionLayer


def repeated(value: Any, times: int) -> Any:
    """What a block returned or an owner left, for a batch of ``times`` as many windows."""
    if times == 1 or value is None:
        return value
    if isinstance(value, tuple):
        return tuple(repeated(item, times) for item in value)
    return value.repeat(times, *[1] * (value.ndim - 1))


def part_of(value: Any, part: int, parts: int) -> Any:
    """One of equal parts of it, in memory of its own."""
    if parts == 1 or value is None:
        return value
    if isinstance(value, tuple):
        return tuple(part_of(item, part, parts) for item in value)
    return value.chunk(parts)[part].clone()


@contextmanager
def skipped(layers: tuple[AttentionLayer, ...], output: Any) -> Iterator[None]:
    """Inside, the blocks of ``layers`` return ``output`` without computing."""
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
    """Inside, the blocks of ``layers`` leave what they return in ``outputs``, by layer index."""
    with ExitStack() as undo:
        for layer in layers:
            handle = layer.block.register_forward_hook(
                lambda module, args, output, index=layer.index: outputs.__setitem__(index, output)
            )
            undo.callback(handle.remove)
        yield
