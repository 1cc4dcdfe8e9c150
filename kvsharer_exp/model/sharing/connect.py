"""Put plans into a model: every layer's action at its site.

`install` (and so `apply_plan` and `share_kv`), `make_plan` and `make_shared` call `connect`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kvsharer_exp.model.actions.registry import runner_of
from kvsharer_exp.model.fitted_plan import FittedPlan
from kvsharer_exp.model.sharing.architectures import MASK, AttentionLayer
from kvsharer_exp.model.sharing.checkpointing import BlockKV, CheckpointHook
from kvsharer_exp.model.sharing.exchange import Exchange
from kvsharer_exp.model.sharing.site import Site, masked_attention
from kvsharer_exp.model.sharing.split import PartSite, run_parts


def connect(
    layers: tuple[AttentionLayer, ...],
    plans: Sequence[FittedPlan],
    exchange: Exchange,
    undo: ExitStack,
    *,
    keep: bool = False,
    prompt: int | None = None,
) -> None:
    """Put ``plans`` into the model; closing ``undo`` takes them out again.

    The batch of a forward then consists of as many equal parts as there are plans, and each part
    runs under its own plan. Give several plans only where there is no cache. With ``keep`` every
    owner hands its KV over, and the KV stays there after its last reader. ``prompt`` is the number
    of tokens, padding included, after which the keeps choose that mind the end of a prompt.
    """
    sources = [_sources(plan) for plan in plans]
    last_reader: dict[int, int] = {}
    for by_layer in sources:
        for reader, pair in enumerate(by_layer):
            last_reader |= {s: max(reader, last_reader.get(s, 0)) for s in pair if s != reader}
    split: set[int] = set()
    blocks = []
    masks = any(runner_of(action).counts_tokens for plan in plans for action in plan.plan.actions)
    for layer in layers:
        index = layer.index
        read = {s for by_layer in sources for s in by_layer[index]} - {index}
        hands_over = any(index in by_layer[index] for by_layer in sources) and (
            keep or index in last_reader
        )
        done = frozenset(s for s in read if not keep and last_reader[s] == index)
        fit = plans[0].fits.get(index)
        site = Site(layer, exchange, undo, hands_over, done, fit, prompt, masks)
        if len(plans) > 1 and (len({plan.keys[index] for plan in plans}) > 1 or read & split):
            split.add(index)
            _install_parts(site, plans, [by_layer[index] for by_layer in sources])
        else:
            runner_of(plans[0].plan.actions[index]).install(site)
        if read or hands_over:
            kv = BlockKV(index, layer.block, exchange, tuple(sorted(read)), done, hands_over)
            blocks.append(kv)
    decoder = layers[0].decoder
    if blocks:
        checkpoints = CheckpointHook(tuple(blocks))
        undo.callback(checkpoints.undo)
        undo.callback(decoder.register_forward_pre_hook(checkpoints).remove)
    if masks:
        arguments = list(inspect.signature(type(decoder).forward).parameters)[1:]
        hook = PadsHook(exchange, arguments.index(MASK) if MASK in arguments else len(arguments))
        undo.callback(decoder.register_forward_pre_hook(hook, with_kwargs=True).remove)


@dataclass(frozen=True, slots=True)
class PadsHook:
    """Before a forward of the decoder: counts the padding tokens in front of each row.

    It also refuses an attention that cannot run the plan, before the model makes masks for it.
    """

    exchange: Exchange
    mask_position: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        masked_attention(module)
        at = self.mask_position
        mask = args[at] if len(args) > at else kwargs.get(MASK)
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            self.exchange.here().pads = (mask.cumsum(1) == 0).sum(1)
        else:
            self.exchange.here().pads = None


def _sources(plan: FittedPlan) -> list[tuple[int, ...]]:
    """For every layer the layers whose keys and values it reads; nothing without an attention."""
    pairs = zip(plan.plan.key_sources, plan.plan.value_sources, strict=True)
    return [tuple(source for source in pair if source is not None) for pair in pairs]


def _install_parts(
    site: Site, plans: Sequence[FittedPlan], sources: Sequence[tuple[int, ...]]
) -> None:
    index, parts = site.layer.index, []
    for number, plan in enumerate(plans):
        part = PartSite(
            site.layer,
            site.exchange,
            site.undo,
            site.hands_over and index in sources[number],
            frozenset(),
            plan.fits.get(index),
            site.prompt,
            site.masks,
            (number, len(plans)),
        )
        runner_of(plan.plan.actions[index]).install(part)
        parts.append(part)
    run_parts(parts, site.done)
