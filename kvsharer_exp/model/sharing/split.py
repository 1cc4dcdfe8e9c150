"""Run the parts of a batch under different actions at one layer.

An `Evaluator` that scores several plans in one forward needs this, where the plans do not agree at
a layer. The attention then runs once for each part. There is no cache and no padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from kvsharer_exp.model.sharing.projections import QueryRows
from kvsharer_exp.model.sharing.site import AttentionHook, Site, ViewMaker
from kvsharer_exp.model.sharing.stand_in import StandIn

Forward = Callable[..., Any]


@dataclass(slots=True)
class PartSite(Site):
    """The site of one part; `run_parts` runs what its action put there."""

    stubs: dict[str, nn.Module] = field(default_factory=dict, init=False)
    hooked: AttentionHook | None = field(default=None, init=False)
    stand_in: StandIn | None = field(default=None, init=False)
    norm: str | None = field(default=None, init=False)

    def stub(self, key: bool, value: bool) -> QueryRows | None:
        self.stubs = self.layer.projections.stubs(key=key, value=value)
        return next((s for s in self.stubs.values() if isinstance(s, QueryRows)), None)

    def hook(
        self,
        view: ViewMaker,
        sources: tuple[int, int],
        rows: QueryRows | None = None,
        *,
        watches: bool = False,
    ) -> None:
        self.hooked = self._hook(view, sources, rows, watches)

    def replace(self, stand_in: StandIn, norm: str | None = None) -> None:
        self.stand_in, self.norm = stand_in, norm

    def run(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """What the attention of this part adds; ``forward`` is the attention's own."""
        if self.stand_in is not None:
            return self.stand_in(*args, **kwargs)[0]
        attention = self.layer.attention
        own = {name: attention.get_submodule(name) for name in self.stubs}
        try:
            for name, stub in self.stubs.items():
                setattr(attention, name, stub)
            if self.hooked is not None:
                args, kwargs = self.hooked(attention, args, kwargs)
            output = forward(*args, **kwargs)
            if self.hooked is not None:
                self.hooked.check(attention, args, output)
        finally:
            for name, module in own.items():
                setattr(attention, name, module)
        return output[0]


def run_parts(sites: Sequence[PartSite], done: frozenset[int]) -> None:
    """Let the attention of the ``sites``, which are those of one layer, run each part by itself.

    ``done``: sources that no layer after this one reads.
    """
    layer, undo = sites[0].layer, sites[0].undo

    def attend(own: Forward, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        batch = len(args[0] if args else kwargs["hidden_states"])
        outputs = [
            site.run(
                own,
                tuple(_part(arg, batch, site) for arg in args),
                {name: _part(arg, batch, site) for name, arg in kwargs.items()},
            )
            for site in sites
        ]
        for source in done:
            sites[0].exchange.here().handed.pop(source, None)
        return torch.cat(outputs), None

    def normalise(own: Forward, hidden: torch.Tensor) -> torch.Tensor:
        parts = zip(sites, hidden.chunk(len(sites)), strict=True)
        return torch.cat([part if site.norm else own(part) for site, part in parts])

    _override(layer.attention, attend, undo)
    for norm in {site.norm for site in sites if site.norm}:
        _override(layer.block.get_submodule(norm), normalise, undo)


def _part(value: Any, batch: int, site: PartSite) -> Any:
    """The part of ``value`` that is the site's, if it has a row for each of the ``batch``."""
    if isinstance(value, tuple):
        return tuple(_part(item, batch, site) for item in value)
    if not isinstance(value, torch.Tensor) or not value.ndim or len(value) != batch:
        return value
    assert site.part is not None
    number, count = site.part
    return value.chunk(count)[number]


def _override(module: nn.Module, forward: Forward, undo: Any) -> None:
    own = module.__dict__.get("forward")  # accelerate's hooks put one there
    if own is None:
        undo.callback(module.__dict__.pop, "forward")
    else:
        undo.callback(module.__dict__.__setitem__, "forward", own)
    module.__dict__["forward"] = partial(forward, module.forward)
