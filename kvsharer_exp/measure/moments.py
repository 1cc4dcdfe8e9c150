"""Collect the second moments of attention's inputs and outputs on the calibration text.

Stand-ins (constant, affine) are fitted from these moments alone, see `model.moments`. Whoever fits
them calls `collect_moments` once for all layers; one forward over the text serves them all, or
several where the memory is too small to hold every layer's sums at once.

The last windows are kept apart as the held-out part. They choose the ridge.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kvsharer_exp.measure.batch_size import halving_batches
from kvsharer_exp.model.branch import Branch
from kvsharer_exp.model.devices import device_of, input_device
from kvsharer_exp.model.moments import Moments
from kvsharer_exp.model.sharing.architectures import AttentionLayer
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.finite import NotFiniteError

# (layer, place) -> the moments of the fitted windows and of the held-out ones.
LayerMoments = dict[tuple[int, str], tuple[Moments, Moments]]

HELD_FRACTION = 0.25


def held_windows(num_windows: int, fraction: float) -> int:
    """How many windows are held out: a ``fraction``, but at least one and not all."""
    return min(max(1, round(num_windows * fraction)), num_windows - 1)


@torch.inference_mode()
@halving_batches
def collect_moments(
    model: nn.Module,
    layers: Sequence[AttentionLayer],
    branches: Sequence[Branch],
    windows: torch.Tensor,
    *,
    which: Sequence[int],
    batch_size: int = 8,
    held_fraction: float = HELD_FRACTION,
    memory_bytes: int | None = None,
    attention_mask: torch.Tensor | None = None,
) -> LayerMoments:
    """Collect the moments of the layers in ``which`` over ``windows`` (num_windows, window_tokens).

    x is the attention's input, after the block's input norm. At the place "attention" y is the
    attention's output; at the place "branch", in blocks that have a norm there, y is what this norm
    returns. ``branches`` has one `Branch` a layer, as `find_branches` returns them. The model runs
    as it is, without a cache.

    ``held_fraction`` of the windows, the last ones and at least one, are the held-out part.
    ``memory_bytes`` bounds what the sums take at a time, see `plan_passes`; the result holds all of
    them, on the model's device. Tokens at which ``attention_mask`` (num_windows, window_tokens) is
    0 are padding: attention does not see them, and they do not count.

    Raises:
        InputError: there are fewer than two windows, ``held_fraction`` is not between 0 and 1, or a
            layer's attention did not run.
        NotFiniteError: the attention's input or output overflows in the model's dtype.
    """
    if len(windows) < 2:
        raise InputError(f"{len(windows)} windows cannot be fitted and held out: give at least 2")
    if not 0 < held_fraction < 1:
        raise InputError(f"held_fraction={held_fraction}: give a number between 0 and 1")
    held = held_windows(len(windows), held_fraction)
    where = {branch.layer: branch for branch in branches}
    by_index = {layer.index: layer for layer in layers}
    found: LayerMoments = {}
    hidden_size = _hidden_size(model)
    for indices in plan_passes(branches, which, hidden_size, memory_bytes):
        chosen = [(by_index[index], where[index]) for index in indices]
        parts = []
        for start, stop in ((0, len(windows) - held), (len(windows) - held, len(windows))):
            mask = None if attention_mask is None else attention_mask[start:stop]
            parts.append(_run(model, chosen, windows[start:stop], mask, batch_size))
        for index in indices:
            for at, place in enumerate(where[index].places):
                outputs = slice(at * hidden_size, (at + 1) * hidden_size)
                fitted_part, held_part = (part[index].select(outputs) for part in parts)
                found[index, place] = fitted_part, held_part
    return found


def plan_passes(
    branches: Sequence[Branch],
    which: Sequence[int],
    hidden_size: int,
    memory_bytes: int | None = None,
) -> list[tuple[int, ...]]:
    """Divide the layers in ``which`` into passes over the text, each of layers that fit together.

    A layer takes 16 bytes × hidden_size² for the squares and as much for each of its places. A pass
    has at least one layer, even if this layer alone takes more than ``memory_bytes``.
    """
    places = {branch.layer: len(branch.places) for branch in branches}
    passes: list[tuple[int, ...]] = []
    left = 0
    for index in dict.fromkeys(which):
        size = 2 * 8 * hidden_size * (hidden_size * (1 + places[index]) + 1 + 2 * places[index])
        if passes and (memory_bytes is None or size <= left):
            passes[-1] = (*passes[-1], index)
        else:
            passes.append((index,))
            left = memory_bytes or 0
        left -= size
    return passes


@dataclass(slots=True)
class _Collector:
    """Adds up one layer; ``moments`` has the outputs of the layer's places side by side."""

    layer: AttentionLayer
    branch: Branch
    moments: Moments
    counted: torch.Tensor | None = None  # (batch, tokens), True where a token is no padding
    pending: list[torch.Tensor] = field(default_factory=list)

    def attach(self, undo: ExitStack) -> None:
        attention = self.layer.attention
        undo.callback(attention.register_forward_hook(self.attended, with_kwargs=True).remove)
        if self.branch.norm is not None:
            norm = self.layer.block.get_submodule(self.branch.norm)
            undo.callback(norm.register_forward_hook(self.normed).remove)

    def attended(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        self.pending = [x, output[0] if isinstance(output, tuple) else output]
        if self.branch.norm is None:
            self.add()

    def normed(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if self.pending:
            self.pending.append(output)
            self.add()

    def add(self) -> None:
        tokens = [self.select(states).to(self.moments.inputs) for states in self.pending]
        self.moments.update(tokens[0], torch.cat(tokens[1:], dim=-1))
        self.pending = []

    def select(self, states: torch.Tensor) -> torch.Tensor:
        """The tokens that count, (tokens, features), of ``states`` (batch, tokens, features)."""
        if self.counted is None:
            return states.flatten(0, -2)
        return states[self.counted.to(states.device)]


def _run(
    model: Any,
    chosen: Sequence[tuple[AttentionLayer, Branch]],
    windows: torch.Tensor,
    attention_mask: torch.Tensor | None,
    batch_size: int,
) -> dict[int, Moments]:
    """Run ``windows`` through the model, and return the moments by layer."""
    size = _hidden_size(model)
    device = input_device(model)
    collectors = []
    for layer, branch in chosen:
        at = device_of(layer.attention)
        home = "cpu" if at.type == "mps" else at  # MPS has no float64
        moments = Moments.zeros(size, size * len(branch.places), home)
        collectors.append(_Collector(layer, branch, moments))
    with ExitStack() as undo:
        for collector in collectors:
            collector.attach(undo)
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size].to(device)
            mask = None
            if attention_mask is not None:
                mask = attention_mask[start : start + batch_size].to(device)
            for collector in collectors:
                collector.counted = None if mask is None else mask.bool()
            model.base_model(batch, attention_mask=mask, use_cache=False)
    for collector in collectors:
        _check(collector)
    return {collector.layer.index: collector.moments for collector in collectors}


def _check(collector: _Collector) -> None:
    index = collector.layer.index
    if not collector.moments.count:
        raise InputError(
            f"the attention of layer {index} saw no token on the calibration text: "
            "give text, and run the model without a stand-in there"
        )
    if not collector.moments.is_finite():
        raise NotFiniteError(
            f"the attention of layer {index} has values that are not finite on the calibration "
            "text: try model.dtype=bfloat16 or float32"
        )


def _hidden_size(model: Any) -> int:
    return model.config.get_text_config(decoder=True).hidden_size
