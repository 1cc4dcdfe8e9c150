"""The hooks that put maps into a model.

`install` (and so `share_kv`) and `make_shared` put them in with `connect`.

Hooks are objects, not closures. So a deep copy of a model that shares for good has hooks of its
own, and its layers hand over KV only among themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from kvsharer_exp.model.sharing.architectures import AttentionLayer
from kvsharer_exp.model.sharing.cache import SourceView, TargetView
from kvsharer_exp.model.sharing.checkpointing import BlockKV, CheckpointHook
from kvsharer_exp.model.sharing.exchange import Exchange, Handover
from kvsharer_exp.model.sharing.projections import QueryRows, SharingError
from kvsharer_exp.values.sharing_map import SharingMap


@dataclass(slots=True)
class _Hook:
    """Swaps the cache that one attention module is given for a view of that cache."""

    layer: int
    argument: str
    position: int
    exchange: Exchange

    def view(self, cache: Any, handover: Handover) -> SourceView | TargetView:
        return SourceView(cache, handover.handed)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if kwargs.get("cache") is not None:
            raise SharingError(
                "continuous batching stores every layer's KV by itself: "
                "a map cannot be honoured there, use generate"
            )
        handover = self.exchange.here()
        at = self.position
        if len(args) > at:
            return (*args[:at], self.view(args[at], handover), *args[at + 1 :]), kwargs
        view = self.view(kwargs.get(self.argument), handover)
        return args, {**kwargs, self.argument: view}


@dataclass(slots=True)
class _TargetHook(_Hook):
    sources: tuple[int, ...]
    done: frozenset[int]
    rows: QueryRows | None

    def view(self, cache: Any, handover: Handover) -> TargetView:
        view = TargetView(cache, handover.handed, self.sources, self.done, self.rows)
        handover.views[self.layer] = view
        return view


@dataclass(slots=True)
class _ReadCheck:
    """Checks after a target's forward that it did read; else the model would silently not share."""

    layer: int
    exchange: Exchange

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.exchange.here().views.pop(self.layer).was_read:
            raise SharingError(
                f"layer {self.layer} ({type(module).__name__}) did not read its source's KV: "
                "its attention does not call cache.update; leave it out of the map"
            )


def connect(
    layers: tuple[AttentionLayer, ...],
    maps: Sequence[SharingMap],
    exchange: Exchange,
    undo: ExitStack,
    *,
    keep: bool = False,
) -> None:
    """Put ``maps`` into the model; closing ``undo`` takes them out again.

    The batch of a forward then consists of as many equal parts as there are maps, and each part
    runs under its own map. Give several maps only where there is no cache. With ``keep`` every
    owner hands its KV over, and the KV stays there after its last reader.
    """
    last_reader: dict[int, int] = {}
    for sharing_map in maps:
        for target in sharing_map.targets:
            source = sharing_map.kv_source_layers[target]
            last_reader[source] = max(target, last_reader.get(source, target))
    blocks = []
    for layer in layers:
        index = layer.index
        sources = tuple(sharing_map.kv_source_layers[index] for sharing_map in maps)
        read = tuple(sorted({source for source in sources if source != index}))
        done = frozenset(s for s in sources if not keep and last_reader.get(s) == index)
        hands_over = index in sources and (keep or index in last_reader)
        place = (index, layer.cache_argument, layer.cache_position, exchange)
        if read:
            rows = _replace(layer, undo) if index not in sources else None
            _before(layer, _TargetHook(*place, sources, done, rows), undo)
            check = layer.attention.register_forward_hook(_ReadCheck(index, exchange))
            undo.callback(check.remove)
        elif hands_over:
            _before(layer, _Hook(*place), undo)
        if read or hands_over:
            blocks.append(BlockKV(index, layer.block, exchange, read, done, hands_over))
    if blocks:
        checkpoints = CheckpointHook(tuple(blocks))
        undo.callback(checkpoints.undo)
        undo.callback(layers[0].decoder.register_forward_pre_hook(checkpoints).remove)


def _before(layer: AttentionLayer, hook: Callable[..., Any], undo: ExitStack) -> None:
    handle = layer.attention.register_forward_pre_hook(hook, with_kwargs=True)
    undo.callback(handle.remove)


def _replace(layer: AttentionLayer, undo: ExitStack) -> QueryRows | None:
    """Put stubs where a target projects; return a fused one, which has to be confirmed."""
    rows = None
    for name, stub in layer.projections.stubs().items():
        stub.train(layer.attention.training)
        undo.callback(setattr, layer.attention, name, layer.projection(name))
        setattr(layer.attention, name, stub)
        rows = stub if isinstance(stub, QueryRows) else None
    return rows
