"""Run a model under a sharing map: ``with share_kv(model, sharing_map): …``

Commands and users call `share_kv`. The evaluator and the calibration call `install`, which can also
run several maps at once and give out the KV of every owner.

Three parts, each testable alone, make a target share. (a) *Substitution*: the view of the cache
that a target gets returns the keys and values of its source. (b) *Cache*: the same view stores
nothing for a target. Both are in `cache.py`. (c) *No projection*: stubs that compute no KV replace
the projections of a target, in `projections.py`. An identity map installs nothing.

Method: https://arxiv.org/abs/2410.18517 §3.3
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

from torch import nn

from kvsharer_exp.model.sharing.architectures import AttentionLayer, attention_layers, check_map
from kvsharer_exp.model.sharing.cache import KeyValue
from kvsharer_exp.model.sharing.exchange import Handover, OneThread
from kvsharer_exp.model.sharing.hooks import connect
from kvsharer_exp.model.sharing.projections import SharingError
from kvsharer_exp.values.sharing_map import SharingMap

# The first attention module of each model that runs under a map, and the thread it runs in.
_active: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_lock = threading.Lock()


@contextmanager
def share_kv(model: nn.Module, sharing_map: SharingMap) -> Iterator[nn.Module]:
    """Run ``model`` under ``sharing_map`` inside the block; it is undone also after an exception.

    It works for scoring, prefill, decode and ``generate`` (greedy, sampled, beam, assisted), with
    any cache or none. A cache that was filled inside the block belongs to the map: the stock model
    refuses it. Use it for inference: no gradient reaches a fused projection of a target.

    Raises:
        SharingError: the map does not fit, the model cannot share, or it is already sharing.
    """
    layers = attention_layers(model)
    check_map(sharing_map, layers)
    with install(layers, [sharing_map]):
        yield model


@contextmanager
def install(
    layers: tuple[AttentionLayer, ...],
    maps: Sequence[SharingMap],
    *,
    handed: dict[int, KeyValue] | None = None,
    keep: bool = False,
) -> Iterator[dict[int, KeyValue]]:
    """Do as `share_kv` on layers found before; yield the KV that is handed over, by layer.

    Args:
        maps: an equal part of the batch runs under each. Give several only where there is no cache.
        handed: KV by layer that is there from the start, for sources that will not run.
        keep: every owner hands its KV over, and the KV stays there after its last reader. This is
            for calibration and for resuming a forward in the middle.

    Raises:
        SharingError: the model is already sharing.
    """
    handed = {} if handed is None else handed
    thread = threading.get_ident()
    with ExitStack() as undo:
        with _lock:
            refuse_if_sharing(layers)
            undo.callback(_active.pop, layers[0].attention, None)
            _active[layers[0].attention] = thread
        connect(layers, maps, OneThread(Handover(handed)), undo, keep=keep)
        yield handed


def refuse_if_sharing(layers: tuple[AttentionLayer, ...]) -> None:
    """Refuse a model that runs under a map already, because maps do not stack.

    Raises:
        SharingError: the model is inside `share_kv`, or it shares for good.
    """
    running = _active.get(layers[0].attention)
    if running is not None:
        where = "" if running == threading.get_ident() else " in another thread"
        raise SharingError(
            f"the model is already running under a map{where}: leave that share_kv block first"
        )
    if any(layer.projections.replaced for layer in layers):
        raise SharingError(
            "the model shares KV for good (make_shared): load the original to try another map"
        )
