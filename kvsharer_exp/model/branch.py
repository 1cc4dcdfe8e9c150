"""Find where something can stand in for a layer's attention.

Whatever fits or runs a stand-in (drop, constant, affine) asks `branches_of` first. In most
architectures the block adds the attention's output to the residual as it is. Gemma 2 and 3, OLMo 2
and GLM 4 send it through a norm before that. There a stand-in may replace the attention alone, or
the whole *branch*, which is the attention together with this norm.

Nothing is found by name. A probe forward shows which submodule receives the tensor that the
attention returned, and the block is called again to see that the attention reaches the residual
through that submodule only. A last call sees that a stand-in makes sense: a block whose attention
gives zero has to return a very large input nearly unchanged. BLOOM does not, since it adds the
residual inside its attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from kvsharer_exp.model.devices import input_device
from kvsharer_exp.model.sharing.architectures import AttentionLayer
from kvsharer_exp.model.sharing.projections import SharingError

ATTENTION = "attention"
BRANCH = "branch"

_PROBE_TOKENS = 8
# Of the gaussian input. The second is tried where the MLP's own output is large beside the first;
# both fit in float16.
_INPUT_RMS = (1e3, 1e4)
_SAME_DIRECTION = 0.9  # cosine of a block's output and its large input
_SAME_OUTPUT = 1e-3  # relative difference; some kernels of experts add in no fixed order


@dataclass(frozen=True, slots=True)
class Branch:
    """The branch of layer ``layer``, from the block's input to the residual addition.

    ``norm`` names the submodule of the block between the attention and the residual addition; None
    where there is none. ``refusal`` says why nothing can stand in for the attention; empty where
    something can.
    """

    layer: int
    norm: str | None
    refusal: str = ""

    @property
    def places(self) -> tuple[str, ...]:
        """What a stand-in can replace: the attention; also the branch where it has a norm."""
        return (ATTENTION,) if self.norm is None else (ATTENTION, BRANCH)


def check_stand_in(branch: Branch) -> None:
    """Refuse a layer in which nothing can stand in for the attention.

    Raises:
        SharingError: `find_branches` found that; the message names the layer.
    """
    if branch.refusal:
        raise SharingError(branch.refusal)


_known: WeakKeyDictionary[nn.Module, tuple[Branch, ...]] = WeakKeyDictionary()


def branches_of(layers: Sequence[AttentionLayer]) -> tuple[Branch, ...]:
    """`find_branches` of all ``layers`` of a model; the probe runs once in the model's life."""
    decoder = layers[0].decoder
    if decoder not in _known:
        training = decoder.training
        decoder.eval()
        try:
            _known[decoder] = find_branches(decoder, layers)
        finally:
            decoder.train(training)
    return _known[decoder]


@torch.inference_mode()
def find_branches(model: nn.Module, layers: Sequence[AttentionLayer]) -> tuple[Branch, ...]:
    """Find the branch of each of ``layers`` of ``model``, which is in eval mode and shares no KV.

    It costs one forward of 8 tokens and a few calls of every block. The model is left as it was.
    """
    traces = {layer.index: _Trace() for layer in layers}
    known = len(model.get_input_embeddings().weight)  # type: ignore[operator]
    ids = (torch.arange(_PROBE_TOKENS, device=input_device(model)) * 7 + 3) % known
    with ExitStack() as undo:
        for layer in layers:
            _watch(layer, traces[layer.index], undo)
        model.base_model(ids[None], use_cache=False)  # type: ignore[operator]
    return tuple(_branch(layer, traces[layer.index]) for layer in layers)


@dataclass(slots=True)
class _Trace:
    """What the probe forward saw in one block.

    ``call`` is what the block was given, ``output`` the attention's output (batch, tokens, hidden),
    ``values`` a copy of it, and ``receivers`` the submodules that were called with it.
    """

    call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    output: torch.Tensor | None = None
    values: torch.Tensor | None = None
    receivers: list[str] = field(default_factory=list)

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.call = args, kwargs

    def follow(self, output: Any) -> None:
        self.output = _tensor(output)
        self.values = self.output.clone()

    def carries(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call's first input is the attention's output, to which nothing was added."""
        first = next(iter((*args, *kwargs.values())), None)
        if self.output is None or self.values is None or not isinstance(first, torch.Tensor):
            return False
        same = first is self.output or (
            first.numel() == self.output.numel() and first.data_ptr() == self.output.data_ptr()
        )
        # The values tell too: a block may add the residual in place.
        return same and torch.equal(first.reshape(self.values.shape), self.values)


def _watch(layer: AttentionLayer, trace: _Trace, undo: ExitStack) -> None:
    """Fill ``trace`` during the next forward; closing ``undo`` removes the hooks."""
    block = layer.block
    undo.callback(block.register_forward_pre_hook(trace.begin, with_kwargs=True).remove)
    follow = layer.attention.register_forward_hook(lambda module, args, out: trace.follow(out))
    undo.callback(follow.remove)
    for name, child in block.named_children():
        if child is layer.attention:
            continue

        def received(
            module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name
        ) -> None:
            if not trace.carries(args, kwargs):
                return
            if isinstance(module, (nn.Dropout, nn.Identity)):
                trace.follow(output)
            else:
                trace.receivers.append(name)

        undo.callback(child.register_forward_hook(received, with_kwargs=True).remove)


def _branch(layer: AttentionLayer, trace: _Trace) -> Branch:
    norm = next((name for name in trace.receivers if _is_norm(layer, name, trace)), None)
    place = layer.attention if norm is None else layer.block.get_submodule(norm)
    about = f"layer {layer.index} ({type(layer.attention).__name__[:30]})"
    cosines = [_kept_direction(layer, place, trace, rms) for rms in _INPUT_RMS]
    if any(cosine > _SAME_DIRECTION for cosine in cosines):
        return Branch(layer.index, norm)
    if any(cosine != cosine for cosine in cosines):
        return Branch(
            layer.index,
            norm,
            f"{about} overflows on a large input, so no stand-in can be checked there: "
            "try model.dtype=bfloat16 or float32",
        )
    return Branch(
        layer.index,
        norm,
        f"{about} takes no stand-in: without attention its block loses its input (is the residual "
        "added inside?); leave drop, constant and affine out there",
    )


def _is_norm(layer: AttentionLayer, name: str, trace: _Trace) -> bool:
    """Whether the attention reaches the block's output through the submodule ``name`` only.

    An MLP has matrices and a norm does not. BLOOM's norm receives the attention's output, but so
    does the residual: its block's output moves with the attention when the norm gives zero.
    """
    norm = layer.block.get_submodule(name)
    if any(parameter.ndim > 1 for parameter in norm.parameters()):
        return False
    args, kwargs = trace.call
    with _giving(norm, 0.0):
        with _giving(layer.attention, 0.0):
            still = _tensor(layer.block(*args, **kwargs)).float()
        with _giving(layer.attention, _INPUT_RMS[0]):
            moved = _tensor(layer.block(*args, **kwargs)).float()
    return bool((moved - still).norm() <= _SAME_OUTPUT * still.norm())


def _kept_direction(layer: AttentionLayer, place: nn.Module, trace: _Trace, rms: float) -> float:
    """Cosine of a large input and what the block makes of it when ``place`` gives zero."""
    args, kwargs = trace.call
    given = args[0] if args else kwargs["hidden_states"]
    large = _gaussian(given, rms)
    if args:
        args = (large, *args[1:])
    else:
        kwargs = {**kwargs, "hidden_states": large}
    with _giving(place, 0.0):
        output = _tensor(layer.block(*args, **kwargs))
    cosine = nn.functional.cosine_similarity(output.float().flatten(), large.float().flatten(), 0)
    return cosine.item()


@contextmanager
def _giving(module: nn.Module, rms: float) -> Iterator[None]:
    """Let ``module`` return a gaussian of ``rms`` in place of what it computes; undone after."""

    def replace(module: nn.Module, args: Any, output: Any) -> Any:
        made = _gaussian(_tensor(output), rms)
        return (made, *output[1:]) if isinstance(output, tuple) else made

    handle = module.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def _gaussian(like: torch.Tensor, rms: float) -> torch.Tensor:
    """The same numbers every time, in the shape, dtype and device of ``like``."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(like.shape, generator=generator) * rms).to(like)


def _tensor(output: Any) -> torch.Tensor:
    """The hidden states (batch, tokens, hidden) in what a block or an attention returned."""
    return output[0] if isinstance(output, tuple) else output
