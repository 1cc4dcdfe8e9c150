"""Run a model under a sharing map: ``with share_kv(model, sharing_map): …``

Three parts, each testable alone: (a) *substitution* — the view a target gets returns its source's
keys and values; (b) *cache* — the same view stores nothing for targets; both in `cache.py`;
(c) *no projection* — targets' ``k_proj``/``v_proj`` are replaced by a stub that computes nothing.
An identity map installs nothing. Method: https://arxiv.org/abs/2410.18517 §3.3.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from kvsharer_exp.sharing.architectures import (
    AttentionLayer,
    SharingError,
    attention_layers,
    check_map,
)
from kvsharer_exp.sharing.cache import KeyValue, SourceView, TargetView
from kvsharer_exp.sharing_map import SharingMap

_active: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # first attention -> thread
_lock = threading.Lock()


@contextmanager
def share_kv(model: nn.Module, sharing_map: SharingMap) -> Iterator[nn.Module]:
    """Run ``model`` under ``sharing_map`` inside the block; undone also after an exception.

    Scoring, prefill, decode, ``generate`` (greedy, sampled, beam), any cache or none.

    Raises:
        SharingError: the map does not fit, the model cannot share, or it is already sharing.
    """
    layers = attention_layers(model)
    check_map(sharing_map, layers)
    with install(layers, sharing_map):
        yield model


@contextmanager
def install(
    layers: tuple[AttentionLayer, ...],
    sharing_map: SharingMap,
    *,
    shared: dict[int, KeyValue] | None = None,
    keep: bool = False,
) -> Iterator[dict[int, KeyValue]]:
    """`share_kv` on layers found before; yields the KV handed from sources to targets.

    Args:
        shared: KV by layer that is there from the start (sources that will not run).
        keep: every owner leaves its KV, and it stays after its last reader: for calibration and
            for resuming a forward in the middle.

    Raises:
        SharingError: the model is already running under a map.
    """
    shared = {} if shared is None else shared
    sources = sharing_map.kv_source_layers
    thread = threading.get_ident()
    with _lock:
        if layers[0].attention in _active:
            where = "" if _active[layers[0].attention] == thread else " in another thread"
            raise SharingError(
                f"the model is already running under a map{where}: leave that share_kv block first"
            )
        _active[layers[0].attention] = thread
    with ExitStack() as undo:
        undo.callback(_active.pop, layers[0].attention, None)
        last_reader = {sources[target]: target for target in sharing_map.targets}
        for layer in layers:
            source = sources[layer.index]
            if source != layer.index:
                last = not keep and last_reader[source] == layer.index
                _install_target(undo, layer, shared, source, last, thread)
            elif keep or layer.index in last_reader:
                _install_source(undo, layer, shared, thread)
        yield shared


def _install_source(
    undo: ExitStack, layer: AttentionLayer, shared: dict[int, KeyValue], thread: int
) -> None:
    def show_view(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        _check_thread(thread)
        return _swap_cache(layer, args, kwargs, lambda cache: SourceView(cache, shared))

    undo.enter_context(
        _hook(layer.attention.register_forward_pre_hook(show_view, with_kwargs=True))
    )


def _install_target(
    undo: ExitStack,
    layer: AttentionLayer,
    shared: dict[int, KeyValue],
    source: int,
    last: bool,
    thread: int,
) -> None:
    view: TargetView | None = None

    def make_view(cache: Any) -> TargetView:
        nonlocal view
        view = TargetView(cache, shared, source, last)
        return view

    def show_view(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        _check_thread(thread)
        return _swap_cache(layer, args, kwargs, make_view)

    def check_read(module: nn.Module, args: Any, output: Any) -> None:
        if view is None or not view.was_read:
            raise RuntimeError(
                f"layer {layer.index} ({type(module).__name__}) did not read its source's KV: "
                "its attention does not call cache.update, so it cannot share"
            )

    attention = layer.attention
    undo.enter_context(_hook(attention.register_forward_pre_hook(show_view, with_kwargs=True)))
    undo.enter_context(_hook(attention.register_forward_hook(check_read)))
    for name, features in (("k_proj", layer.key_features), ("v_proj", layer.value_features)):
        undo.callback(setattr, attention, name, getattr(attention, name))
        setattr(attention, name, NoProjection(features))


class NoProjection(nn.Module):
    """Stands where a target's ``k_proj`` or ``v_proj`` was: one zero, expanded, no memory."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.out_features = features

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, sequence, hidden) -> zeros (batch, sequence, features), stride 0."""
        return hidden_states.new_zeros(()).expand(*hidden_states.shape[:-1], self.out_features)


def _swap_cache(
    layer: AttentionLayer, args: tuple[Any, ...], kwargs: dict[str, Any], view: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    position = layer.cache_position
    if len(args) > position:
        return (*args[:position], view(args[position]), *args[position + 1 :]), kwargs
    cache = kwargs.get(layer.cache_argument)
    return args, {**kwargs, layer.cache_argument: view(cache)}


def _check_thread(thread: int) -> None:
    if threading.get_ident() != thread:
        raise SharingError(
            "the model runs under a map of another thread: use one model per thread, "
            "or enter share_kv in the thread that runs it"
        )


@contextmanager
def _hook(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
