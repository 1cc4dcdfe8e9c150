"""Where an attention module makes its queries, keys and values, and what stands there for a target.

A target needs no keys and values of its own, so a stub that computes none replaces its projections.
`architectures` finds the projections with `find_projections`, and `site` puts the stubs in place.

Two ways of projecting are known. They are told apart by the names of the submodules:

- *separate*: ``k_proj`` and ``v_proj``. A target gets a `NoProjection` in place of each.
- *fused*: one linear layer whose rows come in ``groups`` of [queries | keys | values]. There is one
  group for ``qkv_proj`` (phi3) and ``c_attn`` (gpt2), and one per KV head for ``query_key_value``
  (gpt_neox). A target gets `QueryRows`, which holds and computes the query rows alone.

Some models use these names for a fused layer with another layout. Where the number of rows tells,
as for falcon, or the model is known, as codegen is, `find_projections` finds none. Others are
refused at their first forward, since the stub's zeros must come out as exactly the keys and values.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kvsharer_exp.values.errors import InputError

_ONE_GROUP = ("qkv_proj", "c_attn")
_GROUP_PER_KV_HEAD = ("query_key_value",)
_OTHER_ORDER = ("codegen",)  # as many rows as phi3's, in four groups of [queries | values | keys]


class SharingError(InputError):
    """Raised for a model or map that cannot share KV; its message names layers and a way out."""


class NoProjection(nn.Module):
    """Replaces the ``k_proj`` or ``v_proj`` of a target and gives zeros, which nobody keeps.

    They are no view expanded from one token, because some attention writes into what it projects,
    as OLMo does with ``clip_qkv``, and torch refuses that on an expanded tensor.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.out_features = features

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, sequence, hidden) becomes zeros (batch, sequence, features)."""
        return hidden_states.new_zeros(*hidden_states.shape[:-1], self.out_features)


class QueryRows(nn.Module):
    """Replaces the fused projection of a target: computes its queries; keys and values are zero.

    ``weight`` is (query_features, hidden). With one group it shares the memory of the projection
    that it replaces; with more groups the rows are interleaved, and it is a copy. No gradient flows
    to it.
    """

    def __init__(self, fused: nn.Module, groups: int, query_rows: int, kv_rows: int) -> None:
        super().__init__()
        self.groups = groups
        self.query_rows = query_rows  # per group
        self.kv_rows = kv_rows  # per group
        self.out_features = groups * (query_rows + kv_rows)
        self.confirmed = False
        bias = getattr(fused, "bias", None)
        self.weight = self._queries_of(_rows(fused))
        self.bias = None if bias is None else self._queries_of(bias)

    def _queries_of(self, rows: torch.Tensor) -> nn.Parameter:
        grouped = rows.detach().unflatten(0, (self.groups, self.query_rows + self.kv_rows))
        return nn.Parameter(grouped[:, : self.query_rows].flatten(0, 1), requires_grad=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, sequence, hidden) becomes (batch, sequence, features) in the fused layout."""
        queries = nn.functional.linear(hidden_states, self.weight, self.bias)
        grouped = queries.unflatten(-1, (self.groups, self.query_rows))
        return nn.functional.pad(grouped, (0, self.kv_rows)).flatten(-2)

    def own(self) -> None:
        """Copy the rows into memory of their own, so that the whole projection can be freed."""
        self.weight = nn.Parameter(self.weight.clone(), requires_grad=False)
        if self.bias is not None:
            self.bias = nn.Parameter(self.bias.clone(), requires_grad=False)

    def confirm(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Check, once per stub, that its zeros came out as keys and values, and only there.

        ``key`` and ``value`` are each (batch, num_key_value_heads, sequence, head_dim).

        Raises:
            SharingError: they did not, so the rows that were kept are not those of the queries.
        """
        if self.confirmed or torch.compiler.is_compiling():
            return
        features = sum(kv.shape[1] * kv.shape[-1] for kv in (key, value))
        if features != self.groups * self.kv_rows or key.any() or value.any():
            raise SharingError(
                f"layer {layer} cannot share KV: its fused projection is not laid out as queries, "
                "keys, values; choose a model from the list in the README"
            )
        self.confirmed = True


@dataclass(frozen=True, slots=True)
class SeparateProjections:
    """The submodules ``k_proj`` and ``v_proj`` of ``attention``."""

    attention: nn.Module
    key_features: int
    value_features: int
    num_key_value_heads: int

    def parameter_bytes(self, *, key: bool = True, value: bool = True) -> int:
        """Bytes of the weights and biases that make keys and values; a target drops them."""
        modules = (self.attention.get_submodule(name) for name in _named(key, value))
        return sum(_bytes(module.parameters()) for module in modules)

    def num_weights(self, *, key: bool = True, value: bool = True) -> int:
        """How many numbers make keys and values, see `num_weights`."""
        return sum(num_weights(self.attention.get_submodule(name)) for name in _named(key, value))

    @property
    def replaced(self) -> bool:
        """Whether stubs have replaced the projections already."""
        return isinstance(self.attention.k_proj, NoProjection)

    def stubs(self, *, key: bool = True, value: bool = True) -> dict[str, nn.Module]:
        """Make the stubs for a target, by the name of the submodule that each one replaces.

        ``key`` and ``value`` say which of the two the target does not need.
        """
        features = {"k_proj": self.key_features, "v_proj": self.value_features}
        return {name: NoProjection(features[name]) for name in _named(key, value)}


@dataclass(frozen=True, slots=True)
class FusedProjection:
    """The submodule ``name`` of ``attention``: ``groups`` × (``query_rows`` + ``kv_rows``) rows."""

    attention: nn.Module
    name: str
    groups: int
    query_rows: int
    kv_rows: int
    num_key_value_heads: int

    @property
    def key_features(self) -> int:
        return self.groups * self.kv_rows // 2

    @property
    def value_features(self) -> int:
        return self.groups * self.kv_rows // 2

    def parameter_bytes(self, *, key: bool = True, value: bool = True) -> int:
        """Bytes of the rows that make keys and values (weights and biases); a target drops them.

        They are all dropped or none: a layer that needs one of the two projects both.
        """
        whole = _bytes(self.attention.get_submodule(self.name).parameters())
        return self._share(whole, key and value)

    def num_weights(self, *, key: bool = True, value: bool = True) -> int:
        """How many numbers make keys and values, see `num_weights`."""
        return self._share(num_weights(self.attention.get_submodule(self.name)), key and value)

    def _share(self, whole: int, both: bool) -> int:
        """The part of ``whole`` that makes keys and values; none unless ``both`` can go."""
        if self.replaced or not both:
            return 0
        return whole * self.kv_rows // (self.query_rows + self.kv_rows)

    @property
    def replaced(self) -> bool:
        return isinstance(self.attention.get_submodule(self.name), QueryRows)

    def stubs(self, *, key: bool = True, value: bool = True) -> dict[str, nn.Module]:
        if not (key and value):
            return {}
        fused = self.attention.get_submodule(self.name)
        return {self.name: QueryRows(fused, self.groups, self.query_rows, self.kv_rows)}


Projections = SeparateProjections | FusedProjection


def find_projections(attention: nn.Module, config: Any) -> Projections | None:
    """Find how ``attention`` projects; None when it does so in no way that is known here."""
    key_features, value_features = (
        getattr(getattr(attention, name, None), "out_features", None)
        for name in ("k_proj", "v_proj")
    )
    if key_features is not None and value_features is not None:
        head_dim = getattr(attention, "head_dim", None) or key_features
        return SeparateProjections(
            attention, key_features, value_features, key_features // head_dim
        )
    for name in (*_ONE_GROUP, *_GROUP_PER_KV_HEAD):
        fused = getattr(attention, name, None)
        if isinstance(fused, nn.Module):
            return _find_fused(attention, name, fused, config)
    return None


def _find_fused(
    attention: nn.Module, name: str, fused: nn.Module, config: Any
) -> FusedProjection | None:
    heads: int = config.num_attention_heads
    kv_heads: int = getattr(config, "num_key_value_heads", None) or heads
    if isinstance(fused, QueryRows):
        features = fused.out_features
    else:
        weight = getattr(fused, "weight", None)
        # Quantised or offloaded weights have no rows to take.
        if weight is None or weight.ndim != 2 or not weight.is_floating_point() or weight.is_meta:
            return None
        features = len(_rows(fused))
    head_dim, rest = divmod(features, heads + 2 * kv_heads)
    known = getattr(attention, "head_dim", None) or getattr(config, "head_dim", None)
    known = known or config.hidden_size // heads
    if rest or head_dim != known or config.model_type in _OTHER_ORDER:
        return None
    groups = kv_heads if name in _GROUP_PER_KV_HEAD else 1
    return FusedProjection(
        attention,
        name,
        groups,
        query_rows=heads // groups * head_dim,
        kv_rows=2 * kv_heads // groups * head_dim,
        num_key_value_heads=kv_heads,
    )


def num_weights(module: nn.Module) -> int:
    """How many numbers a token is multiplied with, or gets added, in ``module``.

    A linear layer has a number for each of its inputs and outputs, however few bits each takes:
    packages that quantise keep several of them in one element of a parameter, and their scales in
    others, which do not count.
    """
    inputs, outputs = (getattr(module, f"{end}_features", None) for end in ("in", "out"))
    if isinstance(inputs, int) and isinstance(outputs, int):
        bias = getattr(module, "bias", None)
        return inputs * outputs + (0 if bias is None else bias.numel())
    own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
    return own + sum(map(num_weights, module.children()))


def _named(key: bool, value: bool) -> list[str]:
    return [name for name, named in (("k_proj", key), ("v_proj", value)) if named]


def _rows(fused: nn.Module) -> torch.Tensor:
    """The weight of ``fused`` as (features, hidden); transformers' Conv1D keeps it transposed."""
    weight: torch.Tensor = fused.weight  # type: ignore[assignment]
    return weight.T if type(fused).__name__ == "Conv1D" else weight


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
