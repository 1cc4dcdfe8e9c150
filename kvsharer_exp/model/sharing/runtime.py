"""Run a model under a plan: ``with apply_plan(model, plan): …``; of a map: ``share_kv``.

Commands and users call the two. The evaluator and the calibration call `install`, which can also
run several plans at once and give out the KV of every owner.

Three parts, each testable alone, make a target share. (a) *Substitution*: the view of the cache
that a target gets returns the keys and values of its source. (b) *Cache*: the same view stores
nothing for a target. Both are in `cache.py`. (c) *No projection*: stubs that compute no KV replace
the projections of a target, in `projections.py`. Owners that are
quantised or hold some tokens only keep their KV in a `stores.base.Store`, and a `stand_in.StandIn`
is put where an attention was. Layers that keep their KV as it is are left alone, so the plan of the
full cache installs nothing.

Method: https://arxiv.org/abs/2410.18517 §3.3
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

from torch import nn

from kvsharer_exp.model.actions.check import check_plan
from kvsharer_exp.model.fitted_plan import FittedPlan
from kvsharer_exp.model.sharing.architectures import AttentionLayer, attention_layers
from kvsharer_exp.model.sharing.connect import connect
from kvsharer_exp.model.sharing.exchange import Handed, Handover, OneThread
from kvsharer_exp.model.sharing.projections import SharingError
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.sharing_map import SharingMap

# The first attention module of each model that runs under a map, and the thread it runs in.
_active: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_lock = threading.Lock()


@contextmanager
def apply_plan(
    model: nn.Module, plan: FittedPlan | KVPlan, *, prompt: int | None = None
) -> Iterator[nn.Module]:
    """Run ``model`` under ``plan`` inside the block; it is undone also after an exception.

    It works for scoring, prefill, decode and ``generate`` (greedy, sampled, beam), with any cache
    or none; assisted decoding and static caches only where no layer is quantised. Under
    ``torch.compile`` quantised layers break the graph. A cache that was filled inside the block
    belongs to the plan: the stock model refuses it. Use it for inference: no gradient reaches a
    fused projection of a target, or goes through quantised KV.

    Args:
        prompt: the number of tokens of the prompt, padding included, after which the keeps of
            SnapKV and H2O choose. None: the first forward of a cache is the prompt, so prefill in
            one forward; without a cache these keeps are then refused.

    Raises:
        SharingError: the plan does not fit, or the model cannot share or already runs under a plan.
        InputError: the plan has stand-ins without fits; make them with ``fit_plan``.
    """
    layers = attention_layers(model)
    fitted = FittedPlan.of(plan)
    check_plan(fitted, layers)
    with install(layers, [fitted], prompt=prompt):
        yield model


@contextmanager
def share_kv(model: nn.Module, sharing_map: SharingMap) -> Iterator[nn.Module]:
    """Run ``model`` under ``sharing_map`` inside the block, as `apply_plan`.

    Assisted decoding and static caches work too.

    Raises:
        SharingError: the map does not fit, the model cannot share, or it is already sharing.
    """
    with apply_plan(model, KVPlan.of(sharing_map)):
        yield model


@contextmanager
def install(
    layers: tuple[AttentionLayer, ...],
    plans: Sequence[FittedPlan | KVPlan | SharingMap],
    *,
    handed: Handed | None = None,
    keep: bool = False,
    prompt: int | None = None,
) -> Iterator[Handed]:
    """Do as `apply_plan` on layers found before; yield the KV that is handed over, by layer.

    Args:
        plans: an equal part of the batch runs under each. Give several only where there is no
            cache and no padding.
        handed: KV by layer that is there from the start, for sources that will not run.
        keep: every owner hands its KV over, and the KV stays there after its last reader. This is
            for calibration and for resuming a forward in the middle.
        prompt: as of `apply_plan`.

    Raises:
        SharingError: the model already runs under a plan.
    """
    handed = {} if handed is None else handed
    thread = threading.get_ident()
    with ExitStack() as undo:
        with _lock:
            refuse_if_sharing(layers)
            undo.callback(_active.pop, layers[0].attention, None)
            _active[layers[0].attention] = thread
        fitted = [FittedPlan.of(plan) for plan in plans]
        exchange = OneThread(Handover(handed))
        connect(layers, fitted, exchange, undo, keep=keep, prompt=prompt)
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
