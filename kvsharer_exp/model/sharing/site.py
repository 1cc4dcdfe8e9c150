"""Where an action is put into a model: one layer, for the whole batch or for a part of it.

`connect` makes a `Site` for each layer that an action changes. The classes of ``model/actions/``
call its `stub`, `hook` and `replace`.

Hooks are objects, not closures. So a deep copy of a model that runs under a plan for good has hooks
of its own, and its layers hand over KV only among themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kvsharer_exp.model.fitted_plan import Fit
from kvsharer_exp.model.sharing.architectures import MASK, AttentionLayer
from kvsharer_exp.model.sharing.cache import LayerView
from kvsharer_exp.model.sharing.exchange import Exchange
from kvsharer_exp.model.sharing.projections import QueryRows, SharingError
from kvsharer_exp.model.sharing.queries import ObservedConfig, observe, own_config
from kvsharer_exp.model.sharing.stand_in import StandIn
from kvsharer_exp.model.stores.columns import Columns

ViewMaker = Callable[..., LayerView]
"""`LayerView`, or a subclass of it with its first arguments."""


def masked_attention(module: nn.Module) -> str:
    """The attention implementation of ``module``; it has to take a mask that says all.

    Raises:
        SharingError: it takes another kind of mask.
    """
    kind = str(own_config(module)._attn_implementation)
    if kind not in ("sdpa", "eager"):
        raise SharingError(
            f"this plan quantises KV or lets tokens go, and {kind} cannot mask what is read: "
            "use model.attn_implementation=sdpa or eager"
        )
    return kind


@dataclass(slots=True)
class AttentionHook:
    """Before an attention: swaps its cache for a view, its mask for that of the view's columns.

    An attention that shows its queries gets that mask later (`queries.observed_attention`).
    After it (`check`): makes sure that the view was used; else the plan would silently not hold.
    """

    layer: int
    cache_argument: str
    cache_position: int
    mask_position: int
    exchange: Exchange
    view: ViewMaker
    options: dict[str, Any]

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if kwargs.get("cache") is not None:
            raise SharingError(
                "continuous batching stores every layer's KV by itself: "
                "a map cannot be honoured there, use generate"
            )
        handover = self.exchange.here()
        held = args[self.cache_position] if len(args) > self.cache_position else None
        cache = held if held is not None else kwargs.get(self.cache_argument)
        view = self.view(cache, handover.handed, **self.options)
        handover.views[self.layer] = view
        hidden = args[0] if args else kwargs["hidden_states"]
        view.laid_out = view.columns(self.layer, hidden, handover.pads)
        if view.laid_out is not None:
            self._refuse_training(module)
            if not isinstance(module.config, ObservedConfig):
                args, kwargs = self._masked(module, args, kwargs, hidden, view.laid_out)
        if len(args) > self.cache_position:
            at = self.cache_position
            return (*args[:at], view, *args[at + 1 :]), kwargs
        return args, {**kwargs, self.cache_argument: view}

    def _refuse_training(self, module: nn.Module) -> None:
        if module.training and torch.is_grad_enabled():
            raise SharingError(
                f"layer {self.layer} reads KV that is quantised or not of all tokens: "
                "give the layers all tokens in 16 bits while training"
            )

    def _masked(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        hidden: torch.Tensor,
        columns: Columns,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kind = masked_attention(module)
        at = self.mask_position
        mask = args[at] if len(args) > at else kwargs.get(MASK)
        mask = columns.mask(mask, kind == "eager", hidden.dtype)
        if len(args) > at:
            return (*args[:at], mask, *args[at + 1 :]), kwargs
        return args, {**kwargs, MASK: mask}

    def check(self, module: nn.Module, args: Any, output: Any) -> None:
        missed = self.exchange.here().views.pop(self.layer).missed()
        if missed:
            raise SharingError(
                f"layer {self.layer} ({type(module).__name__}) {missed}: leave it as it is in the "
                "full cache"
            )


@dataclass(slots=True)
class Site:
    """One layer, and what the actions of the other layers want of it.

    ``hands_over``: others read what this layer keeps. ``done``: sources that no layer after this
    one reads. ``fit``: the numbers of a stand-in. ``prompt``: the number of tokens of the prompt,
    padding included, if that is known. ``masks``: some layer has columns of its own. Closing
    ``undo`` takes everything out again.
    """

    layer: AttentionLayer
    exchange: Exchange
    undo: ExitStack
    hands_over: bool = False
    done: frozenset[int] = frozenset()
    fit: Fit | None = None
    prompt: int | None = None
    masks: bool = False
    part: tuple[int, int] | None = None

    def stub(self, key: bool, value: bool) -> QueryRows | None:
        """Put stubs where keys and values are projected; return a fused one, to be confirmed."""
        rows = None
        for name, stub in self.layer.projections.stubs(key=key, value=value).items():
            stub.train(self.layer.attention.training)
            self._set(self.layer.attention, name, stub)
            rows = stub if isinstance(stub, QueryRows) else None
        return rows

    def hook(
        self,
        view: ViewMaker,
        sources: tuple[int, int],
        rows: QueryRows | None = None,
        *,
        watches: bool = False,
    ) -> None:
        """Give the attention a ``view`` of the cache that reads keys and values of ``sources``.

        Raises:
            SharingError: the view ``watches`` the queries, and the attention does not show them.
        """
        hook = self._hook(view, sources, rows, watches)
        attention = self.layer.attention
        self.undo.callback(attention.register_forward_pre_hook(hook, with_kwargs=True).remove)
        self.undo.callback(attention.register_forward_hook(hook.check).remove)

    def _hook(
        self,
        view: ViewMaker,
        sources: tuple[int, int],
        rows: QueryRows | None,
        watches: bool,
    ) -> AttentionHook:
        if self.masks:
            self._observe(watches)
        layer = self.layer
        options = {
            "part": self.part,
            "sources": sources,
            "hands_over": self.hands_over,
            "done": self.done,
            "rows": rows,
        }
        places = (layer.cache_argument, layer.cache_position, layer.mask_position)
        return AttentionHook(layer.index, *places, self.exchange, view, options)

    def _observe(self, watches: bool) -> None:
        """Let the view of the layer see the queries of its attention, if these can be seen."""
        attention = self.layer.attention
        config = observe(attention, self.layer.index, self.exchange)
        if config is not None:
            self.undo.callback(setattr, attention, "config", attention.config)
            attention.config = config  # type: ignore[assignment]
        elif watches:
            raise SharingError(
                f"layer {self.layer.index} ({type(attention).__name__}) shows its queries to "
                "nobody: give it a window (w4+252) or all tokens"
            )

    def replace(self, stand_in: StandIn, norm: str | None = None) -> None:
        """Put ``stand_in`` in place of the attention, and of the ``norm`` after it if named."""
        stand_in.train(self.layer.attention.training)
        self._set(self.layer.block, self.layer.name, stand_in)
        if norm is not None:
            self._set(self.layer.block, norm, nn.Identity())

    def _set(self, parent: nn.Module, name: str, module: nn.Module) -> None:
        self.undo.callback(setattr, parent, name, parent.get_submodule(name))
        setattr(parent, name, module)
