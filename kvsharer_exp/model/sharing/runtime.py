"""Run a model under a sharing map: ``with share_kv(model, sharing_map): …``

Three parts, each testable alone: (a) *substitution* — the view a target gets returns its source's
keys and values; (b) *cache* — the same view stores nothing for targets; both in `cache.py`;
(c) *no projection* — targets' projections are replaced by stubs that compute no KV, in
`projections.py`. An identity map installs nothing. Method: https://arxiv.org/abs/2410.18517 §3.3.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

from torch import nn

from kvsharer_exp.model.sharing.architectures import AttentionLayer, attention_layers, check_map
from kvsharer_exp.model.sharing.cache import KeyValue
from kvsharer_exp.model.sharing.hooks import Handover, OneThread, connect
from kvsharer_exp.model.sharing.projections import SharingError
from kvsharer_exp.values.sharing_map import SharingMap

_active: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # first attention -> thread
_lock = threading.Lock()


@contextmanager
def share_kv(model: nn.Module, sharing_map: SharingMap) -> Iterator[nn.Module]:
    """Run ``model`` under ``sharing_map`` inside the block; undone also after an exception.

    Scoring, prefill, decode, ``generate`` (greedy, sampled, beam, assisted), any cache or none. A
    cache filled inside belongs to the map: the stock model refuses it. For inference: no gradient
    reaches a fused projection of a target.

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
    """`share_kv` on layers found before; yields the KV handed from sources to targets.

    Args:
        maps: under each runs an equal part of the batch; several only where there is no cache.
        handed: KV by layer that is there from the start (sources that will not run).
        keep: every owner leaves its KV, and it stays after its last reader: for calibration and
            for resuming a forward in the middle.

    Raises:
        SharingError: the model is already running under a map.
    """
    handed = {} if handed is None else handed
    thread = threading.get_ident()
    with ExitStack() as undo:
        with _lock:
            refuse_if_sharing(layers)
            undo.callback(_active.pop, layers[0].attention, None)
            _active[layers[0].attention] = thread
        connect(layers, maps, OneThread(Handover(handed), thread), undo, keep=keep)
        yield handed


def refuse_if_sharing(layers: tuple[AttentionLayer, ...]) -> None:
    """Maps do not stack.

    Raises:
        SharingError: the model is inside `share_kv`, or shares for good.
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
